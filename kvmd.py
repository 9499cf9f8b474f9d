#!/usr/bin/python3
"""ganeti-kvmd: tell who shut a KVM instance down, its user or somebody else.

QEMU tells on an instance's monitor socket (QMP) why the guest goes down. When it was
the user (`poweroff` in the guest), an empty file `<instance>.shutdown` is created
beside the socket, at the moment the SHUTDOWN event is read: Ganeti then reports
USER_down and leaves the instance alone. After anything else (an administrator, a
signal, a crash, a migration) there is no file, and Ganeti's watcher may start it again.
"""

from __future__ import annotations

import gc
import os
import sys

from kvmd_check import check
from kvmd_daemon import SUFFIXES, Daemon
from kvmd_journal import Inheritance
from kvmd_log import Log, printable, stderr_sink, syslog_sink, write_to_stderr
from kvmd_monitor import Reactor
from kvmd_options import Options, parse_arguments
from kvmd_process import (
    PidFile,
    StartError,
    detach,
    raise_descriptor_limit,
    raise_priority,
    report_to_nobody,
    sanitize_process,
)
from kvmd_settings import Level, judge_cluster, names_of_node
from kvmd_systemd import Notifier
from kvmd_version import DAEMON_NAME, VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def is_wanted(options: Options, log: Log) -> bool:
    """Ask the cluster's settings; log the one that speaks against running."""
    for finding in judge_cluster(options.ssconf_dir, names_of_node()):
        if finding.level is Level.WARN:
            log.warning(finding.text)
        elif finding.level is Level.FAIL:
            log.info(f"not needed here: {finding.text}")
            return False
        elif finding.level is Level.BROKEN:
            log.error(f"not running: {finding.text}")
            return False
    return True


def make_log(options: Options) -> Log:
    """Return the log as the options want it, the file not open yet."""
    sinks: list[Callable[[str, str], None]] = []
    if options.foreground:
        sinks.append(stderr_sink)
    if options.syslog != "no":
        sinks.append(syslog_sink())
    log = Log(None if options.syslog == "only" else options.log_file, sinks)
    log.debugging = options.debug
    return log


def serve(
    options: Options, command: list[str], log: Log, inheritance: Inheritance
) -> int:
    """Run the daemon, which the command starts anew; return the exit status."""
    report: Callable[[str], None] = report_to_nobody
    if options.foreground:
        raise_priority()
    elif inheritance.pid_file is None:
        report = detach()
    try:
        pid_file = PidFile(options.pid_file, inheritance.pid_file)
    except StartError as error:
        log.error(str(error))
        report(printable(str(error)))
        return 1
    try:
        limit = raise_descriptor_limit()
        notifier = Notifier(os.environ)
        daemon = Daemon(
            Reactor(options.control_dir, log, notifier, limit),
            SUFFIXES[options.socket_suffix],
            options.rescan_interval,
            command,
        )
        daemon.start(inheritance)
        log.info(f"started kvmd {VERSION} for {options.control_dir}")
        report("")
        gc.freeze()
        daemon.run()
        while daemon.restarting and not daemon.stopping:
            daemon.become_new_program(pid_file.fd)
            daemon.run()
        notifier.send("STOPPING=1")
        log.info("stopped")
    finally:
        pid_file.remove()
    return 0


def main() -> int:
    """Run the command; return the exit status: 0, or 1 if it could not start."""
    options = parse_arguments(sys.argv[1:])
    if options.version:
        print(f"{DAEMON_NAME} (kvmd) version {VERSION}")
        return 0
    if options.check:
        return check(options)
    command = options.command()  # its path may be relative to where we are now
    inheritance = Inheritance()
    sanitize_process()
    log = make_log(options)
    sys.excepthook = lambda _type, error, _traceback: log.exception(
        "unexpected error, giving up", error
    )
    problem = None
    try:
        log.open()
    except OSError as error:
        problem = f"cannot open the log file {error.filename}: {error.strerror}"
        if not options.foreground:
            log.sinks.append(stderr_sink)
    if not options.no_cluster_checks and not is_wanted(options, log):
        if inheritance.pid_file is not None:
            PidFile(options.pid_file, inheritance.pid_file).remove()
        # Without it, systemd takes the end for a failure, and starts the daemon again.
        Notifier(os.environ).send("READY=1")
        return 0
    if not options.no_user_checks and os.geteuid() != 0:
        problem = "must run as root (or with --no-user-checks, for trials)"
    if problem and inheritance.pid_file is None:
        write_to_stderr(printable(f"{DAEMON_NAME}: {problem}"))
        return 1
    return serve(options, command, log, inheritance)


if __name__ == "__main__":
    sys.exit(main())
