"""The daemon: the loop, the monitors of all instances, the watch, the signals."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import time

from kvmd_inotify import DirectoryWatch, Fact
from kvmd_journal import MALFORMED, STATE_VERSION, write_state_file
from kvmd_monitor import (
    LISTEN_DELAY,
    LONGEST_SOCKET_PATH,
    NEVER,
    OUT_OF_DESCRIPTORS,
    Monitor,
    Phase,
    Reactor,
    socket_identity,
)
from kvmd_version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmd_journal import Inheritance

#: Seconds of one wait in the selector: epoll_wait(2) takes milliseconds in an int.
LONGEST_WAIT = 86400.0
#: Seconds after which the kernel is not to keep the loop waiting any more.
STALL_LIMIT = 0.02
#: Seconds between looks at the directory while inotify can't be relied on.
POLL_INTERVAL = 1.0
#: Seconds between attempts to tell the service manager what it did not take.
TELLING_RETRY = 1.0

#: What `--socket-suffix` stands for: the suffixes of monitor sockets, best first.
SUFFIXES = {
    "auto": (".kvmd", ".qmp"),
    ".kvmd": (".kvmd",),
    ".qmp": (".qmp",),
}

NO_INOTIFY = "inotify does not work"
UNSETTLED = "the control directory's path can't be watched as a whole"
UNREADABLE = "the control directory can't be read"
UNKEPT = "the state can't be kept against a crash"


def catch_signals(numbers: list[signal.Signals]) -> int:
    """Have the signals written to a pipe, a byte each; return its end to read from.

    Signals that were blocked are let through from now on.
    """
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda _number, _frame: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    return reader


@contextlib.contextmanager
def limited_stalls() -> Iterator[None]:
    """Have SIGALRM end each wait in the kernel that takes longer than STALL_LIMIT.

    A peer can have it wait: it sends a descriptor, which is closed as it is read, of a
    TCP connection whose close waits for as long as the peer likes (SO_LINGER of
    socket(7)).
    """
    signal.setitimer(signal.ITIMER_REAL, STALL_LIMIT, STALL_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Daemon:
    """The loop, the monitors of all instances, and the watch on their directory."""

    def __init__(
        self,
        reactor: Reactor,
        suffixes: tuple[str, ...],
        rescan_interval: float,
        command: list[str],
    ) -> None:
        """Prepare; rescan_interval is in seconds, 0 for never.

        The command is what starts this program anew.
        """
        self._monitors: dict[str, Monitor] = {}
        self._reactor = reactor
        self._log = reactor.log
        self._suffixes = suffixes
        self._rescan_interval = rescan_interval or NEVER
        self._next_rescan = NEVER
        self._notifier = reactor.notifier
        self._next_sign_of_life = NEVER
        self._watch: DirectoryWatch | None = None
        self._too_long: set[str] = set()
        self._started = time.monotonic()
        self._command = command
        self._trial: int | None = None
        self.stopping = False
        #: The program is to be replaced by the one now installed.
        self.restarting = False
        #: Counts the states that were kept, also by the daemons before.
        self._serial = 0
        reactor.keep_state = self._keep_state
        self._actions: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: self.stop,
            signal.SIGINT: self.stop,
            signal.SIGHUP: self.reopen_log,
            signal.SIGUSR1: self.log_status,
            signal.SIGUSR2: self.try_new_program,
            signal.SIGCHLD: self._end_trial,
            signal.SIGALRM: lambda: None,  # it was enough that it came
        }

    def start(self, inheritance: Inheritance) -> None:
        """Set the watch, take over what was left, connect to all other instances."""
        self._signals = catch_signals(list(self._actions))
        self._reactor.selector.register(
            self._signals, selectors.EVENT_READ, self._on_signals
        )
        with limited_stalls():
            self._take_over(inheritance)
            self.rescan()
            self._keep_state()
        if self._watch is not None and self._watch.target is None:
            self._log.info(
                f"waiting for {self._reactor.control_dir}: no such directory yet"
            )

    def _take_over(self, inheritance: Inheritance) -> None:
        """Go on where an earlier daemon ended."""
        problem = inheritance.problem
        state = {} if problem else inheritance.state
        is_of_here = state.get("control_dir") == self._reactor.control_dir
        records = state.get("monitors", []) if is_of_here else []
        connections = inheritance.connections
        is_complete = inheritance.pid_file is not None
        try:
            self._serial = inheritance.state.get("serial", 0)
            for record in records:
                if record["suffix"] not in self._suffixes:
                    continue  # started with other options: it is to be let go
                name = record["connection"]
                # A greeting may have been read, and the state not been kept any more.
                if not is_complete and record["phase"] != Phase.CONNECTED.value:
                    name = None
                connection = connections.get(name)
                monitor = Monitor.restore(record, connection, self._reactor)
                self._monitors[monitor.instance] = monitor
                connections.pop(name, None)
        except (OSError, *MALFORMED) as error:
            problem = error
        if problem is not None:
            self._log.warning(
                f"the state of an earlier daemon can't be read ({problem!r});"
                " connecting anew"
            )
        elif self._monitors:
            self._log.info(f"taking over instances: {len(self._monitors)}")
        # What nobody knows of would keep QEMU from taking another connection.
        for connection in connections.values():
            self._notifier.end_connection(connection)

    def run(self) -> None:
        """Do the work until a signal ends it, or asks for another program."""
        self._send_status()
        self._give_sign_of_life()
        while not (self.stopping or self.restarting):
            self._turn()

    def _turn(self) -> None:
        """Wait until there is something to do, and do it."""
        timeout = self._timeout()
        if timeout is not None and 0 < timeout <= LISTEN_DELAY:
            time.sleep(timeout)  # the selector would make a whole millisecond of it
            timeout = 0
        ready = self._reactor.selector.select(timeout)
        with limited_stalls():
            self._serve(ready)

    def _serve(self, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        """Serve all that is ready, one read each, then all whose time has come.

        The monitors come first: what was to be read on an old connection is read
        before a new socket of the same name is noticed.
        """
        others: list[Callable[[], None]] = []
        for key, _ in ready:
            if isinstance(key.data, Monitor):
                self._attend(key.data, Monitor.receive)
            else:
                others.append(key.data)
        for act in others:
            act()
        for monitor in self._reactor.expired():
            self._attend(monitor, Monitor.on_timer)
        if time.monotonic() >= self._next_rescan:
            self.rescan()
        if time.monotonic() >= self._next_sign_of_life:
            self._give_sign_of_life()
        self._keep_state()
        self._send_status()

    def _keep_state(self) -> None:
        """Have the service manager keep the state; then take out what was read."""
        if self._notifier.is_heard and self._catch_up() and self._reactor.changed:
            self._reactor.changed = not self._store_state()
        for monitor in self._reactor.unconsumed:
            monitor.consume()
        self._reactor.unconsumed.clear()

    def _catch_up(self) -> bool:
        """Give the service manager what it did not take; tell whether it has all."""
        unkept = self._reactor.unkept
        while unkept and unkept[-1].store():
            unkept.pop()
        return self._notifier.discard_rest() and not unkept

    def _store_state(self) -> bool:
        """Replace the older one of the two states that the service manager keeps."""
        serial = self._serial + 1
        try:
            state = write_state_file(self.export(serial))
        except OSError as error:
            self._log.begin_trouble(UNKEPT, f"{error.strerror}; trying again")
            return False
        self._log.end_trouble(UNKEPT)
        name = f"state-{serial % 2}"
        is_kept = self._notifier.discard(name) and self._notifier.store(name, state)
        os.close(state)
        if is_kept:
            self._serial = serial
        return is_kept

    def export(self, serial: int, pid_file: int | None = None) -> str:
        """Return the state for a state file: JSON, put together from the monitors'."""
        records = ", ".join(
            monitor.record()
            for monitor in self._monitors.values()
            if monitor.has_history()
        )
        return (
            f'{{"version": {STATE_VERSION}, "serial": {serial},'
            f' "pid": {os.getpid()}, "pid_file": {json.dumps(pid_file)},'
            f' "control_dir": {json.dumps(self._reactor.control_dir)},'
            f' "monitors": [{records}]}}'
        )

    def descriptors(self) -> list[int]:
        """Return the descriptors of all connections."""
        found = [monitor.descriptor() for monitor in self._monitors.values()]
        return [fd for fd in found if fd is not None]

    def _send_status(self) -> None:
        self._notifier.send_status(f"instances watched: {len(self._monitors)}")

    def _give_sign_of_life(self) -> None:
        interval = self._notifier.watchdog_interval
        if interval != NEVER and not self._notifier.send("WATCHDOG=1"):
            interval = min(interval, TELLING_RETRY)
        self._next_sign_of_life = time.monotonic() + interval

    def _timeout(self) -> float | None:
        """Return the seconds until something has to be done; None: nothing has."""
        deadline = min(
            self._next_rescan, self._next_sign_of_life, self._reactor.next_timer()
        )
        is_due = self._reactor.changed or self._reactor.unkept
        if self._notifier.is_heard and (is_due or not self._notifier.knows_status()):
            deadline = min(deadline, time.monotonic() + TELLING_RETRY)
        if deadline == NEVER:
            return None
        return min(max(0.0, deadline - time.monotonic()), LONGEST_WAIT)

    def _attend(self, monitor: Monitor, step: Callable[[Monitor], object]) -> None:
        """Have a monitor do one thing; what goes wrong costs its connection alone."""
        try:
            step(monitor)
        except Exception as error:
            self._log.exception(
                "unexpected error; connecting anew", error, monitor.instance
            )
            monitor.abandon()
        if monitor.phase is Phase.GONE and monitor.is_idle():
            self._forget(monitor)

    # The monitors.

    def _start(self, instance: str, suffix: str) -> None:
        """Monitor a socket that was not there before."""
        monitor = Monitor(instance, suffix, self._reactor)
        if len(os.fsencode(monitor.path)) > LONGEST_SOCKET_PATH:
            self._refuse_long_path(monitor.path)
            return
        old = self._monitors.get(instance)
        if old is not None:
            self._attend(old, Monitor.finish)
            old.close()  # whatever went wrong
        self._monitors[instance] = monitor
        first_choice = suffix == self._suffixes[0]
        self._attend(monitor, Monitor.connect if first_choice else Monitor.settle)

    def _refuse_long_path(self, path: str) -> None:
        if path not in self._too_long:
            self._too_long.add(path)
            self._log.warning(
                f"{path}: ignored, for its path is longer than the"
                f" {LONGEST_SOCKET_PATH} bytes that a socket's may have"
            )

    def _forget(self, monitor: Monitor) -> None:
        monitor.due = None
        if self._monitors.get(monitor.instance) is monitor:
            del self._monitors[monitor.instance]
            self._look_for(monitor.instance)

    def _look_for(self, instance: str) -> None:
        """Monitor the instance's best socket, unless that is monitored already."""
        monitor = self._monitors.get(instance)
        for suffix in self._suffixes:
            path = self._reactor.control_dir + "/" + instance + suffix
            identity = socket_identity(path)
            if identity is not None:
                break
        else:
            return
        if monitor is None:
            self._start(instance, suffix)
        elif (suffix, identity) == (monitor.suffix, monitor.identity):
            pass
        elif suffix in (monitor.suffix, self._suffixes[0]) or monitor.is_idle():
            self._start(instance, suffix)

    def _instance_of(self, name: str) -> str | None:
        """Return the instance that a file name in the directory tells of."""
        for suffix in self._suffixes:
            if name.endswith(suffix) and name != suffix:
                return name[: -len(suffix)]
        return None

    # The directory.

    def rescan(self) -> None:
        """Follow what the path means now, and reconcile the monitors with it."""
        try:
            if self._watch is None:
                self._watch = DirectoryWatch(self._reactor.control_dir)
                self._reactor.selector.register(
                    self._watch, selectors.EVENT_READ, self._on_watch
                )
            facts = self._watch.follow()
        except OSError as error:
            self._lose_watch(error)
        else:
            self._log.end_trouble(NO_INOTIFY)
            self._report(facts)
        self._reconcile()
        self._plan_rescan()
        phases = [monitor.phase for monitor in self._monitors.values()]
        if Phase.WAITING not in phases:
            self._log.end_trouble(OUT_OF_DESCRIPTORS)

    def _plan_rescan(self) -> None:
        interval = POLL_INTERVAL
        if self._watch is not None and self._watch.settled:
            interval = self._rescan_interval
            self._log.end_trouble(UNSETTLED)
        elif self._watch is not None:
            self._log.begin_trouble(
                UNSETTLED,
                f"looking at {self._reactor.control_dir} every second instead (a part"
                " of its path may not be read, or is renamed all the time)",
            )
        self._next_rescan = time.monotonic() + interval

    def _lose_watch(self, error: OSError) -> None:
        """Go on without inotify until it works again."""
        if self._watch is not None:
            self._reactor.unregister(self._watch)
            self._watch.close()
            self._watch = None
        self._next_rescan = time.monotonic() + POLL_INTERVAL
        self._log.begin_trouble(
            NO_INOTIFY,
            f"{error.filename}: {error.strerror}; looking at"
            f" {self._reactor.control_dir} every second instead (raise the sysctls"
            " fs.inotify.max_user_instances and fs.inotify.max_user_watches)",
        )

    def _on_watch(self) -> None:
        """Take what the kernel tells of the directory."""
        if self._watch is None:
            return
        try:
            facts = self._watch.read()
        except OSError as error:
            self._lose_watch(error)
            return
        for fact, name in facts:
            instance = self._instance_of(name)
            if instance is None:
                continue
            if fact is Fact.REMOVED:
                self._drop_name(instance, name)
            else:
                self._look_for(instance)
        if self._report(facts):
            self._reconcile()
            self._plan_rescan()
        elif not self._watch.settled:
            soon = time.monotonic() + POLL_INTERVAL
            self._next_rescan = min(self._next_rescan, soon)

    def _drop_name(self, instance: str, name: str) -> None:
        monitor = self._monitors.get(instance)
        if monitor is None or name != instance + monitor.suffix:
            return
        # The event may be an old one, of a socket before the one now monitored.
        if socket_identity(monitor.path) != monitor.identity:
            self._attend(monitor, Monitor.on_removed)

    def _report(self, facts: list[tuple[Fact, str]]) -> bool:
        """Log what happened to the directory; tell whether to look at all of it."""
        control_dir = self._reactor.control_dir
        look = False
        for fact, name in facts:
            self._log.debug(f"watch: {fact.value} {name}")
            look |= not name
            if fact is Fact.APPEARED:
                self._log.info(f"watching {control_dir}")
            elif fact is Fact.VANISHED:
                self._log.info(f"{control_dir} is gone; waiting for it")
            elif fact is Fact.LOST:
                self._log.warning(
                    "the kernel's queue of file events ran over; looking at all of"
                    f" {control_dir}"
                )
        return look

    def _reconcile(self) -> None:
        """Bring the monitors in line with what is in the directory."""
        try:
            instances = self._list_instances()
        except OSError as error:
            self._log.begin_trouble(
                UNREADABLE,
                f"{error.filename}: {error.strerror}; new instances are not found until"
                " it can",
            )
            return
        self._log.end_trouble(UNREADABLE)
        for monitor in list(self._monitors.values()):
            if monitor.phase is Phase.DEAD:
                self._attend(monitor, Monitor.connect)
            elif monitor.instance not in instances and monitor.is_idle():
                self._forget(monitor)
        for instance in instances:
            self._look_for(instance)

    def _list_instances(self) -> set[str]:
        """Return the instances that the directory's names tell of. Raises OSError."""
        try:
            names = os.listdir(self._reactor.control_dir)
        except FileNotFoundError:
            return set()
        return set(filter(None, map(self._instance_of, names)))

    # Signals.

    def _on_signals(self) -> None:
        try:
            numbers = set(os.read(self._signals, 4096))
        except BlockingIOError:
            return
        for number in numbers:
            self._actions[signal.Signals(number)]()

    def try_new_program(self) -> None:
        """See whether the program now installed runs; if so, it takes over."""
        if self._trial is not None:
            os.kill(self._trial, signal.SIGKILL)
            os.waitpid(self._trial, 0)
            self._trial = None
        quietly = [
            (os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)
        ]
        command = [*self._command, "--version"]
        try:
            self._trial = os.posix_spawn(
                command[0], command, os.environ, file_actions=quietly
            )
        except OSError as error:
            self._log.error(f"not restarting: {command[0]}: {error.strerror}")

    def _end_trial(self) -> None:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid != self._trial:
            return  # a trial that was given up, by this program or the one before
        self._trial = None
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            self.restarting = True
            return
        self._log.error(
            f"not restarting: {' '.join(self._command)} --version failed with status"
            f" {code}; going on with version {VERSION}"
        )

    def become_new_program(self, pid_file: int) -> None:
        """Replace this program in place; return only if that fails.

        The connections, the locked pid file and the state go along. Signals wait.
        """
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        self._on_signals()  # what has come before they were blocked
        self.restarting = False
        if self.stopping:
            return
        state = None
        try:
            self._log.open()  # as the new program will: better no restart than no log
            state = write_state_file(self.export(self._serial, pid_file))
            for fd in [state, pid_file, *self.descriptors()]:
                os.set_inheritable(fd, True)
            self._log.info("restarting in place")
            os.execv(self._command[0], self._command)
        except OSError as error:
            self._log.error(
                f"cannot restart in place: {error}; going on with version {VERSION}"
            )
        if state is not None:
            os.close(state)
        for fd in [pid_file, *self.descriptors()]:
            os.set_inheritable(fd, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def stop(self) -> None:
        """End the loop when what was ready is done."""
        self.stopping = True

    def reopen_log(self) -> None:
        """Open the log file anew, for logrotate."""
        self._notifier.send_reloading()
        try:
            self._log.open()
        except OSError as error:
            self._log.error(
                f"cannot reopen the log file {error.filename}: {error.strerror};"
                " keeping the old one"
            )
        else:
            self._log.info("log file reopened")

    def log_status(self) -> None:
        """Log the daemon's status, and a line for each instance."""
        control_dir = self._reactor.control_dir
        self._log.info(
            f"status: version {VERSION}, up {time.monotonic() - self._started:.0f} s,"
            f" {'watching' if os.path.isdir(control_dir) else 'waiting for'}"
            f" {control_dir}, {len(self._monitors)} instances"
        )
        for _, monitor in sorted(self._monitors.items()):
            self._log.info(f"status: {monitor.describe()}")
