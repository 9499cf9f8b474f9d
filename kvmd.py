#!/usr/bin/python3
"""ganeti-kvmd: tell who shut a KVM instance down, its user or somebody else.

QEMU tells on an instance's monitor socket (QMP) why the guest goes down. When it was
the user (`poweroff` in the guest), an empty file `<instance>.shutdown` is created
beside the socket, at the moment the SHUTDOWN event is read: Ganeti then reports
USER_down and leaves the instance alone. After anything else (an administrator, a
signal, a crash, a migration) there is no file, and Ganeti's watcher may start it again.

README.md, "How the code is laid out", has a map of the modules.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable

from kvmd_check import check
from kvmd_context import MonitorContext
from kvmd_daemon import Daemon
from kvmd_instances import SUFFIXES, Instances
from kvmd_journal import Contents, read_journal
from kvmd_log import Log, printable, stderr_sink, syslog_sink, write_to_stderr
from kvmd_loop import Loop
from kvmd_options import Options, parse_arguments
from kvmd_process import (
    PidFile,
    StartError,
    detach,
    ignore_report,
    raise_descriptor_limit,
    raise_priority,
    resist_oom_killer,
    sanitize_process,
    sort_inherited,
)
from kvmd_restart import Restart
from kvmd_settings import Level, judge_cluster
from kvmd_status import status
from kvmd_systemd import DescriptorStore, Notifier, stored_connections
from kvmd_version import DAEMON_NAME, VERSION


def is_wanted(options: Options, log: Log) -> bool:
    """Ask the cluster's settings; log the one that speaks against running."""
    for finding in judge_cluster(options.ssconf_dir):
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
    sinks: list[Callable[[str], None]] = []
    fallbacks: list[Callable[[str], None]] = []
    (sinks if options.foreground else fallbacks).append(stderr_sink)
    (sinks if options.syslog != "no" else fallbacks).append(syslog_sink)
    log = Log(None if options.syslog == "only" else options.log_file, sinks, fallbacks)
    log.debugging = options.debug
    return log


def read_earlier_journal(options: Options, log: Log) -> Contents:
    """Return what an earlier daemon left in the journal, empty if it is of no use."""
    try:
        contents = read_journal(options.state_file)
        if contents.header.get("control_dir") != options.control_dir:
            raise ValueError("of another control directory")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning(
            f"{options.state_file}: it can't be used ({error}); connecting anew"
        )
    else:
        return contents
    return Contents({}, {}, None)


def adopt_connections(
    earlier: Contents, sockets: dict[int, int]
) -> dict[int, socket.socket]:
    """Take over the inherited sockets that are the daemon's; close the others.

    Keys are inode numbers.
    """
    known = {record.get("connection") for record in earlier.records.values()}
    known |= stored_connections(os.environ)
    adopted = {}
    for inode, fd in sockets.items():
        if inode in known:
            adopted[inode] = socket.socket(fileno=fd)
            adopted[inode].set_inheritable(False)
        else:
            os.close(fd)
    return adopted


def make_daemon(
    options: Options, command: list[str], log: Log, earlier: Contents
) -> Daemon:
    """Put the daemon together."""
    notifier = Notifier(os.environ)
    store = DescriptorStore(notifier, earlier.header.get("discarded", []))
    limit = raise_descriptor_limit()
    context = MonitorContext(options.control_dir, log, Loop(), store, limit)
    suffixes = SUFFIXES[options.socket_suffix]
    instances = Instances(context, suffixes, options.rescan_interval)
    restart = Restart(command, log)
    return Daemon(context, notifier, options.state_file, instances, restart)


def serve(
    options: Options,
    command: list[str],
    log: Log,
    inherited: int | None,
    sockets: dict[int, int],
) -> int:
    """Run the daemon; return the exit status. `command` starts it again.

    `inherited` is the locked pid file of a restart in place, `sockets` what sockets the
    process was started with.
    """
    report: Callable[[str], None] = ignore_report
    if options.foreground:
        raise_priority()
    elif inherited is None:
        report = detach()
    try:
        pid_file = PidFile(options.pid_file, inherited)
    except StartError as error:
        log.error(str(error))
        log.flush()
        report(printable(str(error)))
        return 1
    try:
        earlier = read_earlier_journal(options, log)
        daemon = make_daemon(options, command, log, earlier)
        daemon.start(earlier, adopt_connections(earlier, sockets))
        log.info(f"started kvmd {VERSION} for {options.control_dir}")
        log.flush()
        report("")
        gc.freeze()
        daemon.run()
        while daemon.restart.is_due and not daemon.is_stopping:
            daemon.become_new_program(pid_file.fd)
            daemon.run()
        daemon.finish()
        log.info("stopped")
        log.flush()
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
    if options.status:
        return status(options)
    command = options.command()  # its path may be relative to where we are now
    inherited, sockets = sort_inherited(options.pid_file)
    sanitize_process()
    log = make_log(options)
    try:
        log.open()
        return run(options, command, log, inherited, sockets)
    except Exception as error:
        log.exception("unexpected error, giving up", error)
        return 1
    finally:
        log.flush()


def run(
    options: Options,
    command: list[str],
    log: Log,
    inherited: int | None,
    sockets: dict[int, int],
) -> int:
    """Run the daemon if it is wanted and may run; return the exit status."""
    is_asked = not options.no_cluster_checks and inherited is None
    if is_asked and not is_wanted(options, log):
        # Without it, systemd takes the end for a failure, and starts the daemon again.
        Notifier(os.environ).send("READY=1")
        return 0
    if not options.no_user_checks and os.geteuid() != 0:
        write_to_stderr(
            f"{DAEMON_NAME}: must run as root (or with --no-user-checks, for trials)"
        )
        return 1
    resist_oom_killer()
    log.flush()  # before another process goes on
    return serve(options, command, log, inherited, sockets)


if __name__ == "__main__":
    sys.exit(main())
