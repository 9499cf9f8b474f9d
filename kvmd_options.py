"""The command line."""

from __future__ import annotations

import functools
import os
import sys

from kvmd_instances import SUFFIXES
from kvmd_loop import NEVER
from kvmd_version import DAEMON_NAME


class Options:
    """The options, as they are when none is given."""

    def __init__(self) -> None:
        root = os.environ.get("GANETI_ROOTDIR", "")
        self.foreground = False
        self.debug = False
        self.syslog = "no"
        self.no_user_checks = False
        self.no_cluster_checks = False
        self.control_dir = f"{root}/var/run/ganeti/kvm-hypervisor/ctrl"
        self.pid_file = f"{root}/var/run/ganeti/ganeti-kvmd.pid"
        self.log_file = f"{root}/var/log/ganeti/kvm-daemon.log"
        self.state_file = beside(self.pid_file)
        self.ssconf_dir = f"{root}/var/lib/ganeti"
        self.socket_suffix = "auto"
        self.rescan_interval = 15.0
        self.check = False
        self.status = ""
        self.version = False

    def command(self) -> list[str]:
        """Return what starts the program anew with these options, from anywhere."""
        defaults = vars(Options())
        defaults["state_file"] = beside(self.pid_file)
        return own_command() + [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in vars(self).items()
            if value != defaults[name]
        ]


def parse_arguments(arguments: list[str]) -> Options:
    """Return the options, all paths absolute; exit with status 2 on wrong usage."""
    options = Options()
    if not arguments:
        return options  # as Ganeti has it; argparse takes a fifth of the start's time
    import argparse  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog=DAEMON_NAME,
        description="Tell Ganeti which KVM instances were shut down by their users.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    flag = functools.partial(add, action="store_true")
    flag("-f", "--foreground", help="don't detach; log to stderr as well")
    flag("-d", "--debug", help="log debug messages: every QMP message, every watch")
    flag("--no-user-checks", help="don't insist on running as root")
    flag(
        "--no-cluster-checks",
        help="don't ask the cluster's settings; for trials without Ganeti",
    )
    flag("--check", help="report what prevents detection on this node, then exit")
    add(
        "--status",
        nargs="?",
        const="text",
        choices=["text", "json"],
        help="show the state of each instance, as text (default) or JSON, then exit",
    )
    add(
        "--syslog",
        choices=["no", "yes", "only"],
        help="log to syslog as well (yes) or instead (only), but no debug messages"
        f" (default: {options.syslog})",
    )
    for option, default, meaning in [
        ("--control-dir", options.control_dir, "the monitor sockets"),
        ("--pid-file", options.pid_file, "the pid file"),
        ("--log-file", options.log_file, "the log"),
        ("--state-file", options.state_file, "the journal"),
        ("--ssconf-dir", options.ssconf_dir, "the cluster's settings"),
    ]:
        text = f"{meaning} (default: {default})"
        add(option, metavar="PATH", type=os.path.abspath, help=text)
    add(
        "--socket-suffix",
        choices=list(SUFFIXES),
        help="which monitor socket of an instance to use (default:"
        f" {options.socket_suffix}: its .kvmd, or its .qmp if there is none)",
    )
    add(
        "--rescan-interval",
        metavar="SECONDS",
        type=interval,
        help="seconds between looks for sockets that inotify did not report, 0: never"
        f" (default: {options.rescan_interval:g})",
    )
    # Not argparse's own action, which asks no more what other options there are: a
    # restart in place tries the new program with the options that it will get.
    flag("-V", "--version", help="print the version, then exit")
    options.state_file = ""  # unless it is given, it goes with the pid file
    parser.parse_args(arguments, namespace=options)
    options.state_file = options.state_file or beside(options.pid_file)
    return options


def beside(pid_file: str) -> str:
    """Return the path of the journal that the pid file's lock guards."""
    return pid_file.removesuffix(".pid") + ".state"


def own_command() -> list[str]:
    """Return the command that starts this program anew, without options."""
    script = os.path.abspath(sys.argv[0])
    if os.path.basename(script) == DAEMON_NAME:
        return [script]  # the process keeps its name all the time
    flags = ["-I"] * sys.flags.isolated + ["-S"] * sys.flags.no_site
    return [sys.executable, *flags, script]


def interval(text: str) -> float:
    """Return a number of seconds from the command line. Raises ValueError."""
    seconds = float(text)
    if not 0 <= seconds < NEVER:
        raise ValueError(text)
    return seconds
