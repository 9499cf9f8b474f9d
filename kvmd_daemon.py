"""The daemon: what it does in a turn of the loop, and what a signal has it do.

Brings together the instances, the journal, systemd and the restart in place, and says
in which order their work is done: in each turn first what was read on connections, so
that all shutdown files come before anything else, then the directory and the signals,
then the timers, then the log, and systemd last. Knows nothing of the command line and
of Ganeti's settings.
"""

from __future__ import annotations

import collections
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable

from kvmd_context import MonitorContext
from kvmd_instances import Instances
from kvmd_journal import Contents, Journal
from kvmd_loop import NEVER, Signals, limited_stalls
from kvmd_monitor import Monitor, describe
from kvmd_restart import Restart
from kvmd_systemd import RETRY_INTERVAL, Notifier
from kvmd_version import VERSION

#: Timers that are served in one turn, for each may be an attempt to connect, and lines
#: of the status that one turn logs.
TIMERS_PER_TURN = 16
STATUS_LINES_PER_TURN = 16
#: Peers that one turn reads from of those that have used up many of their tokens: what
#: they say takes up to a tenth of a millisecond each.
COSTLY_READS_PER_TURN = 32
#: What a record that makes no sense raises, and one whose connection has gone.
UNUSABLE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    OSError,
)
#: Seconds that systemd may take at the end for what it had not taken yet.
LAST_ATTEMPTS = 0.3


class Daemon:
    """The loop, and all that it serves."""

    def __init__(
        self,
        context: MonitorContext,
        notifier: Notifier,
        state_file: str,
        instances: Instances,
        restart: Restart,
    ) -> None:
        self._context = context
        self._loop = context.loop
        self._log = context.log
        self._notifier = notifier
        self._instances = instances
        self.restart = restart
        self._journal = context.journal = Journal(
            state_file,
            context.control_dir,
            context.log,
            instances.records,
            lambda: context.store.discarded,
        )
        self.is_stopping = False
        #: Instances that are missing in the status that is being logged.
        self._unreported: collections.deque[str] = collections.deque()
        self._actions: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: self.stop,
            signal.SIGINT: self.stop,
            signal.SIGHUP: self._reopen_log,
            signal.SIGUSR1: self._begin_status,
            signal.SIGUSR2: restart.try_new_program,
            signal.SIGCHLD: restart.reap,
            signal.SIGALRM: lambda: None,  # it was enough that it came
        }

    # Start and end.

    def start(self, earlier: Contents, sockets: dict[int, socket.socket]) -> None:
        """Take over what an earlier daemon left, then connect to all other instances.

        `earlier` is its journal, `sockets` are the connections that were inherited, by
        inode number.
        """
        self._signals = Signals(list(self._actions))
        self._loop.register(self._signals, self)
        with limited_stalls():
            self._take_over(earlier, sockets)
            if earlier.header.get("pid") == os.getpid():  # restarted in place
                self._journal.started = earlier.header["started"]
            for connected in sockets.values():
                # What nobody took over would keep QEMU from another connection.
                self._context.store.close(connected)
            self._journal.begin()
            self._instances.rescan()
            self._instances.check_some()
        if self._instances.is_waiting_for_directory:
            self._log.info(
                f"waiting for {self._context.control_dir}: no such directory yet"
            )
        self._log.flush()

    def _take_over(self, earlier: Contents, sockets: dict[int, socket.socket]) -> None:
        problem = earlier.problem
        for instance, record in earlier.records.items():
            connected = sockets.get(record.get("connection"))
            try:
                if self._instances.restore(record, connected):
                    sockets.pop(record.get("connection"), None)
            except UNUSABLE as error:
                problem = f"{error!r}: the record of {instance}"
        if problem is not None:
            self._log.warning(
                f"{self._journal.path}: not all can be used ({problem}); connecting"
                " anew"
            )
        if self._instances.monitors:
            self._log.info(f"taking over instances: {len(self._instances.monitors)}")

    def run(self) -> None:
        """Do the work until a signal ends it, or asks for another program."""
        self._tell_systemd()
        while not (self.is_stopping or self.restart.is_due):
            self._turn()

    def stop(self) -> None:
        """End the loop when what was ready is done."""
        self.is_stopping = True

    def finish(self) -> None:
        """Try once more what is still to be done, and say good-bye."""
        for monitor in list(self._instances.monitors.values()):
            if monitor.is_pending:
                self._instances.perform(monitor, Monitor.retry_file)
        self._journal.check()
        deadline = time.monotonic() + LAST_ATTEMPTS
        while not self._context.store.catch_up() and time.monotonic() < deadline:
            time.sleep(RETRY_INTERVAL / 100)
        self._notifier.send("STOPPING=1")

    def become_new_program(self, pid_file: int) -> None:
        """Replace this program in place; return only if that fails. Signals wait."""
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        self._serve_signals()  # what has come before they were blocked
        while self._unreported:
            self._log_status()
        if not self.is_stopping:
            monitors = self._instances.monitors.values()
            connections = [m.connection for m in monitors if m.connection is not None]
            if self._journal.begin():
                self.restart.become_new_program(
                    [pid_file, *(one.fileno() for one in connections)]
                )
            else:
                self.restart.is_due = False
                self._log.error(
                    "not restarting: without a journal all would be forgotten; going on"
                    f" with version {VERSION}"
                )
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    # A turn of the loop.

    def _turn(self) -> None:
        """Wait until there is something to do, and do it."""
        ready = self._loop.wait(self._deadline())
        with limited_stalls():
            self._receive([one for one in ready if isinstance(one, Monitor)])
            # What was to be read on an old connection is read before a new socket of
            # the same name is noticed.
            if self._instances in ready:
                self._instances.receive()
            if self in ready:
                self._serve_signals()
            self._serve_timers()
            self._log_status()
            self._log.flush()
            self._tell_systemd()

    def _receive(self, monitors: list[Monitor]) -> None:
        """Read once on each connection, but only on some of those that cost most.

        The selector gives the others again, the first ones first.
        """
        costly = []
        for monitor in monitors:
            if monitor.connection is not None and monitor.connection.is_costly:
                costly.append(monitor)
            else:
                self._instances.perform(monitor, Monitor.receive)
        for monitor in costly[:COSTLY_READS_PER_TURN]:
            self._instances.perform(monitor, Monitor.receive)

    def _deadline(self) -> float:
        """Return when something has to be done at the latest."""
        now = time.monotonic()
        return min(
            self._loop.next_timer(),
            self._context.next_overdue(),
            self._instances.deadline(),
            self._notifier.next_message(),
            NEVER if self._context.store.is_idle else now + RETRY_INTERVAL,
            now if self._unreported else NEVER,
        )

    def _serve_timers(self) -> None:
        for owner in itertools.islice(self._loop.expired(), TIMERS_PER_TURN):
            self._instances.perform(owner, Monitor.on_timer)
        for monitor in self._context.overdue():
            self._instances.perform(monitor, Monitor.on_overdue)
        if time.monotonic() >= self._instances.next_rescan:
            self._instances.rescan()
            self._journal.check()
            self._log.retry()
        self._instances.check_some()

    def _tell_systemd(self) -> None:
        self._context.store.catch_up()
        count = len(self._instances.monitors)
        self._notifier.send_status(f"instances watched: {count}")
        self._notifier.send_ping()

    # Signals.

    def _serve_signals(self) -> None:
        for number in self._signals.read():
            self._actions[number]()

    def _reopen_log(self) -> None:
        self._notifier.send_reloading()
        self._log.reopen()

    def _begin_status(self) -> None:
        """Log the daemon's status; the instances follow, some in each turn."""
        control_dir = self._context.control_dir
        self._unreported = collections.deque(sorted(self._instances.monitors))
        up = time.monotonic() - self._journal.started
        self._log.info(
            f"status: version {VERSION}, up {up:.0f} s,"
            f" {'watching' if os.path.isdir(control_dir) else 'waiting for'}"
            f" {control_dir}, {len(self._unreported)} instances"
        )

    def _log_status(self) -> None:
        for _ in range(min(STATUS_LINES_PER_TURN, len(self._unreported))):
            instance = self._unreported.popleft()
            monitor = self._instances.monitors.get(instance)
            text = describe(monitor.record()) if monitor else f"{instance}: gone"
            self._log.info(f"status: {text}")
