"""The instances of the node: which monitors there are, and the watch that says so.

Owns the set of monitors and the watch on the control directory; keeps both in line with
what the directory's path means and what is in it. Decides which of an instance's two
sockets is used. When the directory vanishes, open connections go on; what has none is
gone. Hands the last verdict on an instance to its next monitor; knows no events.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable

from kvmd_context import MonitorContext, Phase
from kvmd_inotify import DirectoryWatch
from kvmd_loop import NEVER
from kvmd_monitor import OUT_OF_DESCRIPTORS, Monitor
from kvmd_shutdown_file import LastVerdict
from kvmd_socket import LONGEST_SOCKET_PATH, socket_status

#: What `--socket-suffix` stands for: the suffixes of monitor sockets, best first.
SUFFIXES = {
    "auto": (".kvmd", ".qmp"),
    ".kvmd": (".kvmd",),
    ".qmp": (".qmp",),
}
#: Seconds that a .qmp has to stand alone before it is used (`--socket-suffix auto`).
#: At least LISTENING_LIFETIME, so that the names that are listened on were read after
#: the .qmp was first seen.
SETTLING_TIME = 1.0
#: Seconds between looks at the directory while inotify can't be relied on.
POLL_INTERVAL = 1.0
#: Instances that one turn looks at, when all are looked at: each may take a new
#: connection, which takes up to a tenth of a millisecond.
CHECKS_PER_TURN = 128
#: Reads of an old connection before a new process takes its instance's name.
LAST_READS = 64

NO_INOTIFY = "inotify does not work"
UNSETTLED = "the control directory's path can't be watched as a whole"
UNREADABLE = "the control directory can't be read"
UNLISTED = "which sockets are listened on can't be told, so each .qmp is left alone"


class Instances:
    """The monitors of all instances, and the watch on their directory."""

    def __init__(
        self,
        context: MonitorContext,
        suffixes: tuple[str, ...],
        rescan_interval: float,
    ) -> None:
        """Begin with none; rescan_interval is in seconds, 0 for never."""
        self.monitors: dict[str, Monitor] = {}
        self.next_rescan = NEVER
        #: Instances that a reconciliation has still to look at.
        self._unchecked: list[str] = []
        self._context = context
        self._directory = context.control_dir
        self._log = context.log
        self._suffixes = suffixes
        self._rescan_interval = rescan_interval or NEVER
        self._watch: DirectoryWatch | None = None
        #: Instance -> when its second-best socket will have stood alone for so long,
        #: the first one first (time.monotonic()).
        self._lone: dict[str, float] = {}

    @property
    def is_waiting_for_directory(self) -> bool:
        """Whether the control directory is watched for, and not there yet."""
        return self._watch is not None and self._watch.target is None

    def deadline(self) -> float:
        """Return when `rescan` or `check_some` is to be called at the latest."""
        next_lone = next(iter(self._lone.values()), NEVER)
        return time.monotonic() if self._unchecked else min(self.next_rescan, next_lone)

    def records(self) -> Iterable[dict[str, object]]:
        """Return the records of all instances."""
        return (monitor.record() for monitor in self.monitors.values())

    def perform(self, monitor: Monitor, step: Callable[[Monitor], object]) -> None:
        """Run one step of a monitor; an exception costs its connection alone."""
        try:
            step(monitor)
        except Exception as error:  # noqa: BLE001 - it must not stop the others
            self._log.exception(
                "unexpected error; connecting anew", error, monitor.instance
            )
            monitor.abandon()
        if monitor.phase is Phase.GONE and monitor.is_idle():
            self._forget(monitor)

    # The monitors.

    def restore(
        self, record: dict[str, object], connected: socket.socket | None
    ) -> bool:
        """Go on with a monitor of an earlier daemon; tell whether it is wanted.

        Of what is gone for good, only the record is kept.
        Raises ValueError, TypeError, KeyError for what is no record.
        """
        if record["suffix"] not in self._suffixes:
            return False  # started with other options: it is to be let go
        monitor = Monitor.restore(record, connected, self._context)
        if monitor.phase is Phase.GONE and monitor.is_idle():
            monitor.due = None
            self._context.journal.gone[monitor.instance] = record
        else:
            self.monitors[monitor.instance] = monitor
        return True

    def _start(self, instance: str, suffix: str) -> None:
        """Monitor a socket that was not there before."""
        monitor = Monitor(instance, suffix, self._context)
        old = self.monitors.pop(instance, None)
        if old is not None:
            self._end(old)
            monitor.last = old.last
        gone = self._context.journal.gone.pop(instance, None)
        if old is None and gone is not None:
            monitor.last = LastVerdict.restore(gone.get("last"))
        self._lone.pop(instance, None)
        self.monitors[instance] = monitor
        self.perform(monitor, Monitor.connect)

    def _end(self, monitor: Monitor) -> None:
        """Have nothing more to do with a monitor whose socket is another's now.

        What is left on its connection is read before another takes its place.
        """
        self.perform(monitor, self._read_rest)
        self.perform(monitor, Monitor.on_removed)
        monitor.drop_pending()
        monitor.close()  # whatever went wrong
        monitor.due = None

    def _read_rest(self, monitor: Monitor) -> None:
        for _ in range(LAST_READS):
            if not monitor.receive():
                break

    def _forget(self, monitor: Monitor) -> None:
        monitor.due = None
        if self.monitors.get(monitor.instance) is monitor:
            del self.monitors[monitor.instance]
            self._look_for(monitor.instance)

    def _look_for(self, instance: str) -> None:
        """Monitor the instance's best socket, unless that is monitored already."""
        monitor = self.monitors.get(instance)
        best = self._suffixes[0]
        if (
            monitor
            and monitor.suffix == best
            and monitor.socket_file.is_at(monitor.path)
        ):
            self._find_again(monitor)
            return
        suffix = self._best_suffix(instance)
        if monitor is not None and monitor.suffix != suffix:
            self.perform(monitor, Monitor.on_removed)
            monitor = self.monitors.get(instance)
        if suffix is None:
            return
        is_known = monitor is not None and monitor.suffix == suffix
        if (
            monitor
            and is_known
            and not monitor.socket_file.is_replaced_at(monitor.path)
        ):
            self._find_again(monitor)
            return
        if suffix == self._suffixes[0]:
            self._start(instance, suffix)
            return
        if is_known:
            self._end(self.monitors.pop(instance))
            monitor = None
        if (monitor is None or monitor.is_idle()) and instance not in self._lone:
            self._lone[instance] = time.monotonic() + SETTLING_TIME

    def _find_again(self, monitor: Monitor) -> None:
        """Take note that a monitor's own socket is there; it may have been away."""
        if monitor.phase is Phase.GONE:
            self.perform(monitor, Monitor.on_timer)

    def _best_suffix(self, instance: str) -> str | None:
        for suffix in self._suffixes:
            path = f"{self._directory}/{instance}{suffix}"
            if socket_status(path) is None:
                continue
            if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
                return suffix
            self._log.begin_trouble(
                f"{path}: ignored",
                f"its path is longer than the {LONGEST_SOCKET_PATH} bytes that a"
                " socket's may have",
            )
        return None

    def _use_lone_socket(self, instance: str) -> None:
        """Monitor a .qmp, unless QEMU listens on a .kvmd whose name was removed."""
        suffix = self._best_suffix(instance)
        monitor = self.monitors.get(instance)
        if suffix in (None, self._suffixes[0]) or (monitor and not monitor.is_idle()):
            return
        better = instance + self._suffixes[0]
        path = f"{self._directory}/{instance}{suffix}"
        is_listened_on = self._context.is_listened_on(better)
        if is_listened_on is None:
            self._log.begin_trouble(UNLISTED, "trying again every second")
            self._lone[instance] = time.monotonic() + SETTLING_TIME
            return
        self._log.end_trouble(UNLISTED)
        if is_listened_on:
            self._log.begin_trouble(
                f"{path}: left to Ganeti",
                f"somebody has removed {better}, on which QEMU still listens; the"
                " instance is not monitored until it gets a new QEMU: gnt-instance"
                f" reboot {instance}",
            )
        else:
            self._log.begin_trouble(
                f"{path}: used, since there is no {better}",
                "Ganeti can't use it meanwhile (every Ganeti since 2.11.1 makes both;"
                f" to have both: gnt-instance reboot {instance})",
            )
            self._start(instance, str(suffix))

    # The directory.

    def rescan(self) -> None:
        """Follow what the path means now, and reconcile the monitors with it."""
        try:
            if self._watch is None:
                self._watch = DirectoryWatch(self._directory)
                self._context.loop.register(self._watch, self)
            before = self._watch.target
            self._watch.follow()
        except OSError as error:
            self._lose_watch(error)
        else:
            self._log.end_trouble(NO_INOTIFY)
            if before not in (None, self._watch.target):
                self._log.info(f"{self._directory} is gone; waiting for it")
            if self._watch.target not in (None, before):
                self._log.info(f"watching {self._directory}")
        self._reconcile()
        self._plan_rescan()
        phases = [monitor.phase for monitor in self.monitors.values()]
        if Phase.WAITING not in phases:
            self._log.end_trouble(OUT_OF_DESCRIPTORS[0])

    def _plan_rescan(self) -> None:
        interval = POLL_INTERVAL
        if self._watch is not None and self._watch.settled:
            interval = self._rescan_interval
            self._log.end_trouble(UNSETTLED)
        elif self._watch is not None:
            self._log.begin_trouble(
                UNSETTLED,
                f"looking at {self._directory} every second instead (a part of its path"
                " may not be read, or is renamed all the time)",
            )
        self.next_rescan = time.monotonic() + interval

    def _lose_watch(self, error: OSError) -> None:
        """Go on without inotify until it works again."""
        if self._watch is not None:
            self._context.loop.unregister(self._watch)
            self._watch.close()
            self._watch = None
        self._log.begin_trouble(
            NO_INOTIFY,
            f"{error.filename}: {error.strerror}; looking at {self._directory} every"
            " second instead (raise the sysctls fs.inotify.max_user_instances and"
            " fs.inotify.max_user_watches)",
        )

    def receive(self) -> None:
        """Take what the kernel tells of the directory."""
        assert self._watch is not None
        changes = self._watch.read()
        for name, has_come in changes.names:
            self._log.debug(f"watch: {name} has {'come' if has_come else 'gone'}")
            instance = instance_of(name, self._suffixes)
            if instance is None:
                continue
            if has_come:
                self._look_for(instance)
            else:
                self._drop_name(instance, name)
        if changes.events_lost:
            self._log.warning(
                "the kernel's queue of file events ran over; looking at all of"
                f" {self._directory}"
            )
        if changes.path_changed or changes.events_lost:
            self.rescan()

    def _drop_name(self, instance: str, name: str) -> None:
        if name != instance + self._suffixes[0]:
            self._lone.pop(instance, None)
        monitor = self.monitors.get(instance)
        if monitor is not None and name == instance + monitor.suffix:
            # The event may be an old one: then `_forget` finds what stands there now.
            self.perform(monitor, Monitor.on_removed)

    def _reconcile(self) -> None:
        """Have the monitors brought in line with what is in the directory."""
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
        self._unchecked = [*(instances | self.monitors.keys())]

    def check_some(self) -> None:
        """Bring some more monitors in line with what is in the directory.

        And use each .qmp that has stood alone for long enough.
        """
        now = time.monotonic()
        while self._lone and next(iter(self._lone.values())) <= now:
            instance = next(iter(self._lone))
            del self._lone[instance]
            self._use_lone_socket(instance)
        for instance in self._unchecked[-CHECKS_PER_TURN:]:
            monitor = self.monitors.get(instance)
            if monitor is not None and monitor.phase is Phase.DEAD:
                self.perform(monitor, Monitor.connect)
            self._look_for(instance)
        del self._unchecked[-CHECKS_PER_TURN:]

    def _list_instances(self) -> set[str]:
        """Return the instances that the directory's names tell of. Raises OSError."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return set()
        return instances_of(names, self._suffixes)


def instance_of(name: str, suffixes: tuple[str, ...]) -> str | None:
    """Return the instance that a file name in the control directory tells of."""
    instance, dot, suffix = name.rpartition(".")
    return instance if instance and dot + suffix in suffixes else None


def instances_of(names: Iterable[str], suffixes: tuple[str, ...]) -> set[str]:
    """Return the instances that any of the names tells of."""
    found = (instance_of(name, suffixes) for name in names)
    return {instance for instance in found if instance is not None}
