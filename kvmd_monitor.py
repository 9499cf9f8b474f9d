"""The monitor of one instance: connect, listen, judge, write the shutdown file.

Owns the instance's connection, its phase and retries, what is known of its guest, and
its shutdown file. Whatever changes is in the journal before it is taken out of the
socket, and the shutdown file is made before that: a daemon that is killed leaves either
the event in the socket or its effect in the journal. Knows nothing of other instances
and of the directory.

A record in the journal has the members

    instance, suffix   the name of the monitor socket
    socket             its identity (`kvmd_socket`)
    phase              a value of `Phase`
    since              when the phase began (CLOCK_MONOTONIC, seconds)
    connection         the inode number of the daemon's end, null if there is none
    qemu, pid          QEMU's version and process, null if not known
    guest              the guest's state (`kvmd_verdict.Guest`)
    protocol           the connection's (`kvmd_qmp.Protocol`), null if there is none
    peeked             number and checksum of the bytes that are acted on, and may still
                       be in the socket, null if there are none
    last               the last verdict: verdict, cause, event (QEMU's time stamp or
                       null), time (seconds since the epoch) and file (what became of
                       the shutdown file, null if that could not be written yet)
"""

from __future__ import annotations

import collections
import contextlib
import enum
import errno
import os
import socket
import time
from collections.abc import Iterator

from kvmd_connection import HOSTILE_PAUSE, Connection
from kvmd_journal import Journal
from kvmd_log import Log
from kvmd_loop import NEVER, Loop
from kvmd_qmp import Event, Greeting, Protocol, Status
from kvmd_shutdown_file import ShutdownFile, export_judgement, restore_judgement
from kvmd_socket import listening_names, socket_identity, socket_status
from kvmd_systemd import DescriptorStore
from kvmd_verdict import Guest, Ruling, Verdict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Seconds until the second attempt to connect: QEMU listens some ten microseconds after
#: it has bound its socket. Then, between attempts, at first and at most.
LISTEN_DELAY = 0.0001
FIRST_DELAY = 0.001
LONGEST_DELAY = 1.0
#: Seconds after which a socket on which nobody listens is dead, and after which a peer
#: that has not greeted is worth a warning.
PATIENCE = 10.0
#: Seconds between attempts to write a shutdown file.
FILE_RETRY = 1.0
#: File descriptors that no connection may take: the daemon's own files, with some room.
RESERVED_DESCRIPTORS = 12
#: A trouble, and what follows from it.
OUT_OF_DESCRIPTORS = (
    "out of file descriptors",
    "the next instances wait until one comes free (raise the daemon's limit, ulimit"
    " -Hn)",
)


class Phase(enum.Enum):
    """Where a monitor stands."""

    #: Trying to connect, again and again.
    CONNECTING = "connecting"
    #: As many connections as descriptors: tried again when one may have come free.
    WAITING = "waiting for a file descriptor"
    #: Connected, and not greeted yet: QEMU is starting, or has another client.
    AWAITING_GREETING = "awaiting greeting"
    #: Not greeted for so long that a warning was due; still connected or trying to.
    SILENT = "not greeted"
    CONNECTED = "connected"
    #: Nobody listens; only the rescan tries again.
    DEAD = "dead"
    #: The verdict was given, the connection has ended: this QEMU says no more.
    ENDED = "ended"
    #: There is no socket of this name.
    GONE = "gone"


#: The phases in which a monitor without a connection tries to get one.
ATTEMPTING = {Phase.CONNECTING, Phase.WAITING, Phase.SILENT}


class Surroundings:
    """What all monitors share."""

    def __init__(
        self,
        control_dir: str,
        log: Log,
        loop: Loop,
        store: DescriptorStore,
        descriptor_limit: int,
    ) -> None:
        self.control_dir = control_dir
        self.log = log
        self.loop = loop
        self.store = store
        self.journal: Journal
        #: Monitors whose connection is left alone for a while.
        self.paused: set[Monitor] = set()
        self._connection_limit = descriptor_limit - RESERVED_DESCRIPTORS
        #: The names that were listened on, until they are to be read again.
        self._listening: set[str] = set()
        self._end_of_listening = 0.0
        #: Monitors that await a greeting, in the order in which they connected: a timer
        #: for each would take more room than the rest of the monitor.
        self._ungreeted: collections.deque[Monitor] = collections.deque()

    def connect(self, path: str) -> socket.socket:
        """Connect to a monitor socket, if a descriptor is left for that.

        Raises OSError: EMFILE if none is; else see unix(7).
        """
        if self.loop.registered + len(self.paused) >= self._connection_limit:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
        connected = socket.socket(socket.AF_UNIX, kind)
        try:
            connected.connect(path)
        except OSError:
            connected.close()
            raise
        return connected

    def is_listened_on(self, name: str) -> bool:
        """Tell whether somebody listens on a name in the directory, there or not.

        All such names are read at once, and not again for a second: that takes long.
        """
        now = time.monotonic()
        if now >= self._end_of_listening:
            self._end_of_listening = now + LONGEST_DELAY
            with contextlib.suppress(OSError):
                self._listening = listening_names(self.control_dir)
        return name in self._listening

    def expect_greeting(self, monitor: Monitor) -> None:
        """Have the monitor returned by `overdue` if it is not greeted in time."""
        self._ungreeted.append(monitor)

    def next_overdue(self) -> float:
        """Return when the next peer has been silent for too long."""
        while self._ungreeted:
            monitor = self._ungreeted[0]
            if monitor.connection and monitor.phase is Phase.AWAITING_GREETING:
                return monitor.since + PATIENCE
            self._ungreeted.popleft()
        return NEVER

    def overdue(self) -> Iterator[Monitor]:
        """Take out the monitors whose peers have been silent for too long."""
        while self.next_overdue() <= time.monotonic():
            yield self._ungreeted.popleft()


class Monitor:
    """The monitor of one instance.

    Every step (`connect`, `receive`, `on_timer` and so on) ends with the journal in
    line with what it has changed.
    """

    __slots__ = (
        "_delay",
        "_is_saved",
        "_status",
        "_surroundings",
        "_version",
        "connection",
        "due",
        "file",
        "guest",
        "identity",
        "instance",
        "phase",
        "since",
        "suffix",
    )

    def __init__(self, instance: str, suffix: str, surroundings: Surroundings) -> None:
        self.instance = instance
        self.suffix = suffix
        self.phase = Phase.CONNECTING
        #: When the phase began, and when the timer is due (time.monotonic()).
        self.since = time.monotonic()
        self.due: float | None = None
        #: The socket it is about, None as long as there is none.
        self.identity: int | None = None
        self.guest = Guest()
        self.file = ShutdownFile(surroundings.control_dir, instance, surroundings.log)
        self.connection: Connection | None = None
        self._surroundings = surroundings
        self._delay = LISTEN_DELAY
        self._version: str | None = None
        #: Whether the journal has it as it stands, or nothing is worth a record yet.
        self._is_saved = True
        #: What lstat(2) told of the socket when its identity was made sure of last.
        self._status: int | None = None

    @property
    def path(self) -> str:
        """The monitor socket."""
        return f"{self._surroundings.control_dir}/{self.instance}{self.suffix}"

    def is_idle(self) -> bool:
        """Tell whether nothing is lost when the monitor is dropped."""
        return self.connection is None and not self.file.is_pending

    def is_of_socket(self) -> bool:
        """Tell whether the socket that it is about still stands at the path.

        Whatever else may have been done to the file, it is the same QEMU's.
        """
        status = socket_status(self.path)
        if status is None or self.identity is None:
            return False
        if status != self._status:
            if hash(socket_identity(self.path)) != self.identity:
                return False
            self._status = status or None
        return True

    # Connecting.

    def connect(self) -> None:
        """Try to connect; set a timer for the next attempt where it makes sense."""
        if not self.is_of_socket():
            identity = socket_identity(self.path)
            if identity is None:
                self._enter(Phase.GONE)
                self._save()
                return
            self._begin_anew(hash(identity))
        try:
            connected = self._surroundings.connect(self.path)
        except OSError as error:
            self._wait(error)
            self._save()
        else:
            store = self._surroundings.store
            self._adopt(Connection(connected, Protocol(), store.is_enabled))
            store.store(connected)
            self._negotiate()

    def _begin_anew(self, identity: int) -> None:
        """Take note of a new QEMU, of which nothing is known yet."""
        self._judge_unobserved_end()
        self.file.give_up()
        self.identity = identity
        self.guest = Guest()
        self._delay = LISTEN_DELAY
        self.phase, self.since = Phase.CONNECTING, time.monotonic()

    def _adopt(self, connection: Connection) -> None:
        self.connection = connection
        self._surroundings.loop.register(connection, self)

    def _negotiate(self) -> None:
        """Negotiate on a connection that was not greeted yet.

        It is kept, and known to be kept, before QEMU has anything to tell on it.
        """
        if self.phase is not Phase.SILENT:  # else its backlog was full, which was told
            self._enter(Phase.AWAITING_GREETING)
            self._surroundings.expect_greeting(self)
        self._is_saved = False
        self._save()
        assert self.connection is not None
        self.connection.negotiate()

    def _wait(self, error: OSError) -> None:
        """Wait for what it takes to connect, by the reason why that failed."""
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            self._surroundings.log.begin_trouble(*OUT_OF_DESCRIPTORS)
            if self.phase is not Phase.WAITING:
                self._enter(Phase.WAITING)
            self._surroundings.loop.set_timer(self, LONGEST_DELAY)
            return
        if self.phase is Phase.WAITING:
            self._enter(Phase.CONNECTING)
        patient = time.monotonic() - self.since < PATIENCE
        if error.errno == errno.ENOENT:
            self._enter(Phase.GONE)
        elif error.errno == errno.EAGAIN or patient:
            self._try_again()
            # EAGAIN: the backlog is full, so somebody does listen.
            if self.phase is Phase.DEAD:
                self._enter(Phase.CONNECTING)
            elif self.phase is Phase.CONNECTING and not patient:
                self.on_overdue()
        elif self.phase is not Phase.DEAD:
            self._enter(Phase.DEAD)
            text = (
                f"nobody to talk to on {self.path} ({error.strerror}); looking again at"
                " each rescan"
            )
            if error.errno == errno.ECONNREFUSED:
                self._surroundings.log.debug(text, self.instance)
            else:
                self._surroundings.log.warning(text, self.instance)

    def _try_again(self) -> None:
        """Set the timer for the next attempt to connect, twice as long each time."""
        self._surroundings.loop.set_timer(self, self._delay)
        self._delay = min(max(FIRST_DELAY, 2 * self._delay), LONGEST_DELAY)

    def on_timer(self) -> None:
        """Do what the timer was set for."""
        if self.connection is None and self.phase in ATTEMPTING:
            self.connect()
        elif self.connection is not None and self in self._surroundings.paused:
            self._surroundings.paused.remove(self)
            self._surroundings.loop.register(self.connection, self)
        if self.file.is_pending:
            self.file.write()
            self._follow_file()
            self._save()

    def on_overdue(self) -> None:
        """Take note that there was no greeting in time."""
        self.phase = Phase.SILENT
        self._is_saved = False
        self._save()
        self._surroundings.log.warning(
            f"no greeting on {self.path} for {PATIENCE:.0f} s; QEMU serves one client"
            " at a time, and another one may be connected",
            self.instance,
        )

    def on_removed(self) -> None:
        """Take note that the name is gone: what stands there next may be new."""
        if self.connection is None and self.phase is not Phase.GONE:
            self._enter(Phase.GONE)
            self._save()

    # Listening.

    def close(self) -> None:
        """Close the connection, if there is one."""
        connection, self.connection = self.connection, None
        self._let_go(connection)

    def _let_go(self, connection: Connection | None) -> None:
        if connection is not None:
            self._surroundings.loop.unregister(connection)
            self._surroundings.paused.discard(self)
            self._surroundings.store.close(connection.socket)

    def receive(self) -> bool:
        """Read once, and act on it; tell whether there was anything to read."""
        connection = self.connection
        received = connection.read() if connection else None
        if connection is None or received is None:
            return False
        data, with_descriptors = received
        size = connection.protocol.pending + len(data)
        self._take(data, connection)
        if not data:
            self._end()
        was_saved = not self._is_saved
        self._save()
        connection.take()
        pause = connection.charge(data, size, was_saved)
        if with_descriptors:
            pause = HOSTILE_PAUSE
            self._surroundings.log.warning(
                "a descriptor came along, which QEMU does not send: someone else speaks"
                f" on {self.path}; listening again in {pause:.0f} s",
                self.instance,
            )
        if pause and data:
            self._surroundings.loop.unregister(connection)
            self._surroundings.paused.add(self)
            self._surroundings.loop.set_timer(self, pause)
        return bool(data)

    def _take(self, data: bytes, connection: Connection) -> None:
        """Act on what was read.

        The last ruling stands for all: a peer that has its guest go down and come back
        all the time is to flood the directory's watch with no events.
        """
        log, protocol = self._surroundings.log, connection.protocol
        if log.debugging:
            for line in data.splitlines():
                log.debug(f"<-- {line!r}", self.instance)
        complaint, kept = protocol.complaint, connection.export_kept()
        messages = protocol.receive(data)
        guest = self.guest.state()
        last = None
        for message in messages:
            ruling = self._take_message(message)
            last = (ruling, getattr(message, "time", None)) if ruling else last
        if last is not None:
            self.file.carry_out(*last)
            self._follow_file()
        if self.guest.state() != guest:
            self._is_saved = False
        if connection.export_kept() != kept:
            self._is_saved = False
        if protocol.complaint != complaint:
            self._is_saved = False
            log.warning(
                f"skipping what QEMU should not say ({protocol.complaint})",
                self.instance,
            )

    def _take_message(self, message: Greeting | Status | Event) -> Ruling | None:
        if isinstance(message, Greeting):
            assert self.connection is not None
            self._version = message.version
            self._enter(Phase.CONNECTED)
            self._surroundings.log.info(
                f"connected to QEMU {message.version}, pid {self.connection.peer_pid}"
                f" on {self.path}",
                self.instance,
            )
            return None
        if isinstance(message, Status):
            return self.guest.on_status(message.status)
        return self.guest.on_event(message.name, message.data, message.time)

    def _end(self) -> None:
        """Take the end of the connection.

        One without a greeting may be to the tail of a QEMU, and says nothing.
        """
        ruling = self.guest.on_end() if self.phase is Phase.CONNECTED else None
        if ruling is not None:
            self.file.carry_out(ruling, None)
            self._follow_file()
        lasted = time.monotonic() - self.since
        connection, self.connection = self.connection, None
        if socket_status(self.path) is None:
            self._enter(Phase.GONE)
        elif self.guest.ruling is not None:
            self._enter(Phase.ENDED)
        else:
            # A peer that closes at once, again and again, must not keep us busy.
            if lasted > LONGEST_DELAY:
                self._delay = FIRST_DELAY
            self._enter(Phase.CONNECTING)
            self._try_again()
        self._save()
        self._let_go(connection)

    def abandon(self) -> None:
        """Give the connection up after an unexpected error; try again, slowly."""
        self.close()
        self._enter(Phase.CONNECTING)
        self._delay = LONGEST_DELAY
        self._surroundings.loop.set_timer(self, LONGEST_DELAY)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = time.monotonic()
        self._is_saved = False
        if phase is Phase.GONE or phase is Phase.DEAD:
            self._judge_unobserved_end()

    # The verdict.

    def _judge_unobserved_end(self) -> None:
        """Take note of a guest that went down while there was no connection.

        A running guest has no shutdown file: one that is there was made by a daemon
        that did not live to say so.
        """
        if self.connection is not None or self.guest.on_end() is None:
            return
        name = self.instance + self.suffix
        if socket_status(self.path) is None and self._surroundings.is_listened_on(name):
            return  # it goes on: somebody has removed the name
        verdict = Verdict.NOT_USER
        text = "nobody can know whose doing it was, so it counts as a crash"
        if os.path.exists(self.file.path) and not self.file.is_pending:
            verdict = Verdict.USER
            text = "its shutdown file was made, and counts"
        self._surroundings.log.info(
            f"went down while it was not monitored; {text}", self.instance
        )
        self.file.carry_out(Ruling(verdict, "unobserved"), None)
        self._follow_file()

    def _follow_file(self) -> None:
        """Take note of what became of the shutdown file."""
        self._is_saved = False
        if self.file.is_pending:
            self._surroundings.loop.set_timer(self, FILE_RETRY)

    # The record.

    def _save(self) -> None:
        """Have the journal in line with how things stand."""
        if not self._is_saved:
            self._is_saved = True
            if self.phase is Phase.GONE and self.is_idle():
                self._surroundings.journal.forget(self.record())
            else:
                self._surroundings.journal.write(self.record())

    def record(self) -> dict[str, Any]:
        """Return what the next program, or `--status`, has to know of the instance."""
        connection = self.connection
        return {
            "instance": self.instance,
            "suffix": self.suffix,
            "socket": self.identity,
            "phase": self.phase.value,
            "since": self.since,
            "connection": connection and connection.inode,
            "qemu": self._version,
            "pid": connection and connection.peer_pid,
            "guest": self.guest.export(),
            "protocol": connection and connection.protocol.export(),
            "peeked": connection and connection.export_peeked(),
            "last": export_judgement(self.file.judgement),
        }

    @classmethod
    def restore(
        cls,
        record: dict[str, Any],
        connected: socket.socket | None,
        surroundings: Surroundings,
    ) -> Monitor:
        """Return a monitor that goes on where the recorded one stood.

        Without its connection it connects anew, unless there is no more to be heard.
        Raises ValueError, TypeError, KeyError for what is no record.
        """
        monitor = cls(record["instance"], record["suffix"], surroundings)
        monitor.identity = record["socket"]
        monitor.guest = Guest.restore(record["guest"])
        monitor.file.judgement = restore_judgement(record["last"])
        phase, since = Phase(record["phase"]), float(record["since"])
        if connected is not None:
            protocol = Protocol.restore(record["protocol"])
            monitor.phase, monitor.since = phase, since
            monitor._version = record["qemu"]
            connection = Connection(connected, protocol, surroundings.store.is_enabled)
            connection.take_peeked(record["peeked"])
            surroundings.store.store(connected)
            monitor._adopt(connection)
            if phase is not Phase.CONNECTED:
                monitor._negotiate()
        elif phase is Phase.ENDED:
            monitor.phase = phase
        if connected is None or monitor.file.is_pending:
            surroundings.loop.set_timer(monitor, FIRST_DELAY)
        return monitor


def describe(record: dict[str, Any]) -> str:
    """Return a record's line in the status that SIGUSR1 has logged."""
    words = [record["phase"]]
    if record["connection"]:
        began = time.time() - (time.monotonic() - record["since"])
        when = time.strftime("%F %T", time.localtime(began))
        words = [
            f"{record['phase']} since {when}",
            f"QEMU {record['qemu'] or 'unknown'} pid {record['pid']}",
        ]
    if record["guest"]["powerdown_requested"]:
        words.append("powerdown requested")
    if record["guest"]["ruling"]:
        words.append("verdict={} cause={}".format(*record["guest"]["ruling"]))
    return f"{record['instance']}{record['suffix']}: {', '.join(words)}"
