"""The monitor of one instance, and its shutdown file."""

from __future__ import annotations

import collections
import enum
import errno
import heapq
import itertools
import json
import os
import selectors
import socket
import stat
import sys
import time

from kvmd_qmp import (
    CAREFUL_READ_SIZE,
    COMMANDS,
    Event,
    Greeting,
    Protocol,
    Status,
)
from kvmd_systemd import connection_name
from kvmd_verdict import GuestState, Ruling, Verdict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from kvmd_inotify import DirectoryWatch
    from kvmd_log import Log
    from kvmd_systemd import Notifier

NEVER = float("inf")


def create_shutdown_file(path: str, warn: Callable[[str], None]) -> str:
    """Make an empty file of mode 0600; return "created", or "present".

    mknod(2) opens nothing: it follows no symlink, waits for no fifo, truncates no
    file, and works when the process has no file descriptor left. What is planted
    under the name is removed, but a directory is left: to Ganeti it counts as well.
    Raises OSError.
    """
    for _ in range(3):
        try:
            os.mknod(path, stat.S_IFREG | 0o600)
        except FileExistsError:
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                return "present"
            warn(f"removing {path}, which is no file, to make the shutdown file")
            os.unlink(path)
        else:
            return "created"
    raise FileExistsError(errno.EEXIST, "planted again and again", path)


def remove_shutdown_file(path: str) -> str:
    """Remove the file; return "removed", "none" or, for a directory, "directory".

    Raises OSError.
    """
    try:
        os.unlink(path)
    except FileNotFoundError:
        return "none"
    except IsADirectoryError:
        return "directory"
    return "removed"


# ---- The monitor of one instance -----------------------------------------------------

#: Seconds until the second attempt to connect: QEMU listens some ten microseconds after
#: it has bound its socket. Then, between attempts, at first and at most.
LISTEN_DELAY = 0.0001
FIRST_DELAY = 0.001
LONGEST_DELAY = 1.0
#: Seconds after which a socket on which nobody listens is dead, and after which a peer
#: that has not greeted is worth a warning.
PATIENCE = 10.0
#: Seconds that a .qmp has to stand alone before it is used (`--socket-suffix auto`).
SETTLING_TIME = 1.0
#: Seconds between attempts to write a shutdown file.
FILE_RETRY = 1.0
#: Pieces of one connection that may be parsed within a second before it is left alone
#: for PAUSE seconds; a read has one, and one more for each PIECE_SIZE bytes. QEMU says
#: less of interest in a guest's whole life.
PARSED_PIECES = 128
PIECE_SIZE = 256
PAUSE = 0.1
#: Seconds for which a peer is left alone that sends descriptors (`limited_stalls`).
HOSTILE_PAUSE = 10.0
#: Reads of an old connection before a new process takes its instance's name.
LAST_READS = 64
#: Bytes of sun_path, less the NUL at its end (unix(7)).
LONGEST_SOCKET_PATH = 107
#: File descriptors that no connection may take: the daemon's own files, with some room.
RESERVED_DESCRIPTORS = 12
OUT_OF_DESCRIPTORS = "out of file descriptors"


def socket_identity(path: str) -> int | None:
    """Return what tells this socket from a later one of its name, None if it is none.

    The inode number does not: the kernel gives it to the next file at once.
    """
    try:
        status = os.lstat(path)
    except OSError:
        return None
    if not stat.S_ISSOCK(status.st_mode):
        return None
    return hash((status.st_dev, status.st_ino, status.st_mtime_ns))


class Phase(enum.Enum):
    """Where a monitor stands."""

    #: A .qmp that may be joined by a .kvmd.
    SETTLING = "settling"
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
    #: The verdict was given, the connection has ended: no more is to be heard here.
    ENDED = "ended"
    #: There is no socket of this name.
    GONE = "gone"


#: The phases in which a monitor without a connection tries to get one.
ATTEMPTING = {Phase.SETTLING, Phase.CONNECTING, Phase.WAITING, Phase.SILENT}


class Reactor:
    """What the monitors share: directory, log, selector, timers, descriptor limit.

    Where a service manager keeps the state against a crash, what is read of a
    connection is only looked at (MSG_PEEK) until the state that follows from it is
    kept: a daemon that is killed before leaves it to be read again. The state holds it
    as well, so that it is not read again if the daemon is killed right afterwards.
    """

    def __init__(
        self, control_dir: str, log: Log, notifier: Notifier, descriptor_limit: int
    ) -> None:
        self.control_dir = control_dir
        self.log = log
        self.notifier = notifier
        self.selector = selectors.DefaultSelector()
        self.receive_flags = socket.MSG_PEEK if notifier.is_heard else 0
        #: Monitors that have looked at something without taking it out.
        self.unconsumed: list[Monitor] = []
        #: Monitors whose new connection is not kept yet.
        self.unkept: list[Monitor] = []
        #: Some monitor's state is not what was kept last.
        self.changed = False
        #: Has the state kept, and takes out what was looked at.
        self.keep_state: Callable[[], None] = lambda: None
        self._connection_limit = descriptor_limit - RESERVED_DESCRIPTORS
        self._timers: list[tuple[float, int, Monitor]] = []
        #: The monitors that await a greeting, in the order in which they connected.
        self._unanswered: collections.deque[Monitor] = collections.deque()
        self._sequence = itertools.count()
        #: Monitors whose connection is left alone for a while.
        self.paused: set[Monitor] = set()
        self._end_of_second = 0.0

    def unregister(self, file: socket.socket | DirectoryWatch) -> None:
        """Have the selector wait for a file no more; epoll(7) may have had no room."""
        if file in self.selector.get_map():
            self.selector.unregister(file)

    def this_second(self) -> float:
        """Return when the second ends for which is counted what monitors parse."""
        now = time.monotonic()
        if now >= self._end_of_second:
            self._end_of_second = now + 1
        return self._end_of_second

    def set_timer(self, monitor: Monitor, seconds: float) -> None:
        """Have the monitor's `on_timer` called in so many seconds."""
        monitor.due = time.monotonic() + seconds
        heapq.heappush(self._timers, (monitor.due, next(self._sequence), monitor))

    def expect_greeting(self, monitor: Monitor) -> None:
        """Have `on_timer` called if there is no greeting within PATIENCE."""
        self._unanswered.append(monitor)

    def _end_of_patience(self) -> float:
        """Return when the next peer has been silent for too long."""
        while self._unanswered:
            monitor = self._unanswered[0]
            if monitor.phase is Phase.AWAITING_GREETING:
                return monitor.since + PATIENCE
            self._unanswered.popleft()
        return NEVER

    def next_timer(self) -> float:
        """Return when the next timer is due, in time.monotonic()'s seconds."""
        while self._timers and self._timers[0][2].due != self._timers[0][0]:
            heapq.heappop(self._timers)
        first = self._timers[0][0] if self._timers else NEVER
        return min(first, self._end_of_patience())

    def expired(self) -> Iterator[Monitor]:
        """Take out the monitors whose time has come."""
        now = time.monotonic()
        while self._end_of_patience() <= now:
            yield self._unanswered.popleft()
        while self._timers and self._timers[0][0] <= now:
            due, _, monitor = heapq.heappop(self._timers)
            if monitor.due == due:
                monitor.due = None
                yield monitor

    def has_room(self) -> bool:
        """Tell whether a descriptor is left for one more connection."""
        taken = len(self.selector.get_map()) + len(self.paused)
        return taken < self._connection_limit


class Monitor:
    """The monitor of one instance: connection, retries, protocol and verdict."""

    __slots__ = (
        "_delay",
        "_parsed",
        "_protocol",
        "_reactor",
        "_record",
        "_second",
        "_socket",
        "_unconsumed",
        "_unwritten",
        "_version",
        "due",
        "identity",
        "instance",
        "phase",
        "since",
        "state",
        "suffix",
    )

    def __init__(self, instance: str, suffix: str, reactor: Reactor) -> None:
        self.instance = instance
        self.suffix = suffix
        self.phase = Phase.CONNECTING
        #: When the phase began, and when the timer is due (time.monotonic()).
        self.since = time.monotonic()
        self.due: float | None = None
        #: The socket it is about, None when its name is gone (`socket_identity`).
        self.identity: int | None = None
        self.state = GuestState()
        self._reactor = reactor
        self._delay = LISTEN_DELAY
        self._socket: socket.socket | None = None
        self._protocol: Protocol | None = None
        self._version: str | None = None
        #: Pieces that were parsed in the second that ends then (`this_second`).
        self._parsed = 0
        self._second = 0.0
        #: What was looked at last, and is not taken out of the socket yet.
        self._unconsumed = b""
        #: The ruling whose file could not be written yet, and its event's time.
        self._unwritten: tuple[Ruling, float | None] | None = None
        #: What `record` returned last, if nothing has changed since.
        self._record: str | None = None

    @property
    def path(self) -> str:
        """The monitor socket."""
        return self._reactor.control_dir + "/" + self.instance + self.suffix

    @property
    def shutdown_file(self) -> str:
        """The file that tells Ganeti of the user's doing."""
        return self._reactor.control_dir + "/" + self.instance + ".shutdown"

    def is_idle(self) -> bool:
        """Tell whether nothing is lost when the monitor is dropped."""
        return self._socket is None and self._unwritten is None

    def has_history(self) -> bool:
        """Tell whether a monitor that begins anew would know less."""
        return not self.is_idle() or self.state.ruling is not None

    def descriptor(self) -> int | None:
        """Return the connection's descriptor, if there is one."""
        return None if self._socket is None else self._socket.fileno()

    def store(self) -> bool:
        """Have the connection kept, if there is one; tell whether that worked."""
        notifier = self._reactor.notifier
        return self._socket is None or notifier.store_connection(self._socket)

    def settle(self) -> None:
        """Wait until the socket has stood alone long enough, then connect."""
        self.identity = socket_identity(self.path)
        self._enter(Phase.SETTLING if self.identity else Phase.GONE)
        self._reactor.set_timer(self, SETTLING_TIME)

    def connect(self) -> None:
        """Try to connect; set a timer for the next attempt where it makes sense."""
        identity = socket_identity(self.path)
        if identity is None:
            self._enter(Phase.GONE)
            return
        if identity != self.identity:
            self.identity = identity
            self.state = GuestState()
            self._unwritten = None
            self._delay = LISTEN_DELAY
            self.phase, self.since = Phase.CONNECTING, time.monotonic()
        if not self._reactor.has_room():
            self._wait_for_descriptor()
            return
        try:
            connection = socket.socket(
                socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK
            )
        except OSError:
            self._wait_for_descriptor()
            return
        try:
            connection.connect(self.path)
        except OSError as error:
            connection.close()
            self._wait_for_listener(error)
            return
        self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        """Negotiate at once on a new connection: events before that are lost."""
        self.state.alive = False
        try:
            connection.send(COMMANDS)
        except OSError:
            pass  # the peer has closed already, and its last words may wait to be read
        self._adopt(connection, Protocol())
        if self._reactor.notifier.is_heard:
            self._reactor.unkept.append(self)
        if self.phase is not Phase.SILENT:  # else its backlog was full, which was told
            self._enter(Phase.AWAITING_GREETING)
            self._reactor.expect_greeting(self)

    def _adopt(self, connection: socket.socket, protocol: Protocol) -> None:
        # A byte out of band (unix(7)) would be passed over by a look at what there is,
        # and be reported as readable for ever.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self._socket = connection
        self._protocol = protocol
        self._note_change()
        self._listen()

    def _listen(self) -> None:
        if self._socket is not None:
            self._reactor.selector.register(self._socket, selectors.EVENT_READ, self)

    def _pause(self, seconds: float) -> None:
        """Read no more for a while."""
        if self._socket is not None:
            self._reactor.unregister(self._socket)
        self._reactor.paused.add(self)
        self._reactor.set_timer(self, seconds)

    def _wait_for_listener(self, error: OSError) -> None:
        if error.errno == errno.ENOENT:
            self._enter(Phase.GONE)
            return
        patient = time.monotonic() - self.since < PATIENCE
        if error.errno == errno.EAGAIN:
            # The backlog is full: somebody does listen.
            if self.phase is Phase.DEAD:
                self._enter(Phase.CONNECTING)
            elif self.phase is Phase.CONNECTING and not patient:
                self._warn_of_silence()
            patient = True
        if patient:
            self._try_again()
        elif self.phase is not Phase.DEAD:
            self._enter(Phase.DEAD)
            tell = self._warn
            if error.errno == errno.ECONNREFUSED:
                tell = self._debug
            tell(
                f"nobody to talk to on {self.path} ({error.strerror}); looking again at"
                " each rescan"
            )

    def _try_again(self) -> None:
        """Set the timer for the next attempt to connect, twice as long each time."""
        self._reactor.set_timer(self, self._delay)
        self._delay = min(max(FIRST_DELAY, 2 * self._delay), LONGEST_DELAY)

    def _wait_for_descriptor(self) -> None:
        self._reactor.log.begin_trouble(
            OUT_OF_DESCRIPTORS,
            "the next instances wait until one comes free (raise the daemon's limit,"
            " ulimit -Hn)",
        )
        self._enter(Phase.WAITING)
        self._reactor.set_timer(self, LONGEST_DELAY)

    def on_timer(self) -> None:
        """Do what the timer was set for."""
        if self.phase is Phase.AWAITING_GREETING:
            # The timer may be that of a file to be written.
            if self.since + PATIENCE <= time.monotonic():
                self._warn_of_silence()
        elif self._socket is None and self.phase in ATTEMPTING:
            if self.phase in {Phase.SETTLING, Phase.WAITING}:
                self._enter(Phase.CONNECTING)
            self.connect()
        if self in self._reactor.paused:
            self._reactor.paused.remove(self)
            self._listen()
        self._write_file()

    def _warn_of_silence(self) -> None:
        self.phase = Phase.SILENT
        self._note_change()
        self._warn(
            f"no greeting on {self.path} for {PATIENCE:.0f} s; QEMU serves one client"
            " at a time, and another one may be connected"
        )

    def on_removed(self) -> None:
        """Note that the socket's name is gone: what stands there next is new."""
        self.identity = None
        self._note_change()
        if self._socket is None:
            self._enter(Phase.GONE)

    def finish(self) -> None:
        """Read what is left on the connection, and close it for good."""
        for _ in range(LAST_READS):
            self._reactor.keep_state()  # takes out what was looked at before
            if not self.receive() or self in self._reactor.paused:
                break
        self.close()

    def close(self) -> None:
        """Have nothing more to do with the instance: another monitor takes it."""
        self._disconnect()
        self._unwritten = None
        self.due = None
        self._enter(Phase.ENDED)

    def receive(self) -> bool:
        """Read once, and act on it; tell whether there was anything to read."""
        if self._socket is None or self._protocol is None:
            return False
        received = self._read(self._socket, self._protocol.read_size)
        if received is None:
            return False
        data, flags = received
        self._hear(data, self._protocol)
        if not data:
            self._end()
        elif flags & socket.MSG_CTRUNC:
            self._warn(
                "a descriptor came along, which QEMU does not send: someone else speaks"
                f" on {self.path}; listening again in {HOSTILE_PAUSE:.0f} s"
            )
            self._pause(HOSTILE_PAUSE)
        return bool(data)

    def _read(self, connection: socket.socket, size: int) -> tuple[bytes, int] | None:
        """Return what one read gives, and flags of recv(2); None if there is nothing.

        At the end it gives b"".
        """
        flags = 0
        try:
            data, _, flags, _ = connection.recvmsg(size, 0, self._reactor.receive_flags)
        except BlockingIOError:
            return None
        except OSError:
            data = b""  # what had arrived before the error was read before
        if self._reactor.receive_flags:
            # A line that goes on is left to the kernel.
            data = data[: data.rfind(b"\n") + 1] or data
            self._unconsumed = data
            self._record = None
            self._reactor.unconsumed.append(self)
        return data, flags

    def _hear(self, data: bytes, protocol: Protocol) -> None:
        """Act on what was read."""
        if self._reactor.log.debugging:
            for line in data.splitlines():
                self._debug(f"<-- {line!r}")
        complaint = protocol.complaint
        size = protocol.pending + len(data)
        before = self._state_to_keep()
        # The last ruling of one read stands for all: a peer that has its guest go down
        # and come back all the time is to flood the directory's watch with no events.
        last = None
        for message in protocol.receive(data):
            last = self._take(message) or last
        if last is not None:
            self._carry_out(*last)
        if self._state_to_keep() != before:
            self._note_change()
        if protocol.complaint != complaint:
            self._warn(f"skipping what QEMU should not say ({protocol.complaint})")
        if protocol.read_size == CAREFUL_READ_SIZE:
            self._count_parsed(size)

    def _count_parsed(self, size: int) -> None:
        """Read no more for a while if too much had to be parsed in this second."""
        second = self._reactor.this_second()
        if second != self._second:
            self._second, self._parsed = second, 0
        self._parsed += 1 + size // PIECE_SIZE
        if self._parsed > PARSED_PIECES:
            self._pause(PAUSE)

    def _state_to_keep(self) -> object:
        """Return what reading may change of the state, None if nobody keeps that."""
        if self._protocol is None or not self._reactor.notifier.is_heard:
            return None
        return self._protocol.export(), self.state.export()

    def consume(self) -> None:
        """Take out of the socket what was only looked at before."""
        if self._socket is not None and self._unconsumed:
            self._socket.recv(len(self._unconsumed))
        self._unconsumed = b""
        self._record = None

    def _take(
        self, message: Greeting | Status | Event
    ) -> tuple[Ruling, float | None] | None:
        """Take a message; return the ruling to be carried out, and its event's time."""
        ruling, timestamp = None, None
        if isinstance(message, Greeting):
            self._version = message.version
            self._enter(Phase.CONNECTED)
            self._info(f"connected to QEMU {message.version}, pid {self._peer_pid()}")
        elif isinstance(message, Status):
            ruling = self.state.on_status(message.status)
        else:
            ruling = self.state.on_event(message.name, message.data)
            timestamp = message.timestamp
        return None if ruling is None else (ruling, timestamp)

    def _end(self) -> None:
        """Take the end of the connection."""
        ruling = self.state.on_end()
        if ruling is not None:
            self._carry_out(ruling, None)
        lasted = time.monotonic() - self.since
        self._disconnect()
        if socket_identity(self.path) is None:
            self._enter(Phase.GONE)
        elif self.state.ruling is not None:
            self._enter(Phase.ENDED)
        else:
            # A peer that closes at once, again and again, must not keep us busy.
            if lasted > LONGEST_DELAY:
                self._delay = FIRST_DELAY
            self._enter(Phase.CONNECTING)
            self._try_again()

    def abandon(self) -> None:
        """Give the connection up after an unexpected error; try again, slowly."""
        self._disconnect()
        self._enter(Phase.CONNECTING)
        self._delay = LONGEST_DELAY
        self._reactor.set_timer(self, LONGEST_DELAY)

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._reactor.unregister(self._socket)
            self._reactor.paused.discard(self)
            self._reactor.notifier.end_connection(self._socket)
        self._socket = self._protocol = None

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = time.monotonic()
        self._note_change()

    def _note_change(self) -> None:
        """Have the state kept anew."""
        self._record = None
        self._reactor.changed = True

    def _peer_pid(self) -> int:
        """Return QEMU's pid (SO_PEERCRED of unix(7))."""
        if self._socket is None:
            return 0
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], sys.byteorder)

    def _carry_out(self, ruling: Ruling, timestamp: float | None) -> None:
        self._unwritten = (ruling, timestamp)
        error = self._write_file()
        if error is not None:
            self._reactor.log.error(
                f"{ruling}, but {self.shutdown_file}: {error.strerror}; trying again"
                " every second",
                self.instance,
            )

    def _write_file(self) -> OSError | None:
        """Bring the shutdown file in line with the ruling; try again later if need be.

        Returns the error, None if it is done.
        """
        if self._unwritten is None:
            return None
        ruling, timestamp = self._unwritten
        try:
            if ruling.verdict is Verdict.USER:
                outcome = create_shutdown_file(self.shutdown_file, self._warn)
            else:
                outcome = remove_shutdown_file(self.shutdown_file)
        except OSError as error:
            self._reactor.set_timer(self, FILE_RETRY)
            return error
        self._unwritten = None
        self._note_change()
        if ruling.verdict is Verdict.RUNNING and outcome == "none":
            return None
        event, after = "unknown", "unknown"
        if timestamp is not None:
            event = f"{timestamp:.6f}"
            after = "%.1fms" % ((time.time() - timestamp) * 1000)
        self._info(f"{ruling} event={event} file={outcome} after={after}")
        return None

    def _debug(self, text: str) -> None:
        self._reactor.log.debug(f"{self.instance}: {text}")

    def _info(self, text: str) -> None:
        self._reactor.log.info(text, self.instance)

    def _warn(self, text: str) -> None:
        self._reactor.log.warning(text, self.instance)

    def record(self) -> str:
        """Return `export` as JSON, made anew only if it may have changed.

        Where nobody keeps the state, nobody minds its changes either.
        """
        if self._record is None or not self._reactor.notifier.is_heard:
            self._record = json.dumps(self.export())
        return self._record

    def export(self) -> dict[str, object]:
        """Return what the next program has to know of this instance."""
        unwritten = None
        if self._unwritten is not None:
            unwritten = [self._unwritten[0].export(), self._unwritten[1]]
        return {
            "instance": self.instance,
            "suffix": self.suffix,
            "identity": self.identity,
            "connection": self._socket and connection_name(self._socket),
            "phase": self.phase.value,
            "since": self.since,
            "qemu": self._version,
            "guest": self.state.export(),
            "protocol": self._protocol and self._protocol.export(),
            "unconsumed": self._unconsumed.decode("latin-1"),
            "unwritten": unwritten,
        }

    @classmethod
    def restore(
        cls, record: dict[str, Any], connection: socket.socket | None, reactor: Reactor
    ) -> Monitor:
        """Return a monitor that goes on where the exported one stood.

        Without its connection it connects anew, unless there is no more to be heard.
        Raises MALFORMED for what was not exported.
        """
        monitor = cls(record["instance"], record["suffix"], reactor)
        monitor.identity = record["identity"]
        monitor.state.restore(record["guest"])
        if record["unwritten"] is not None:
            ruling, timestamp = record["unwritten"]
            monitor._unwritten = (Ruling.restore(ruling), timestamp)
        if connection is not None:
            protocol = Protocol()
            protocol.restore(record["protocol"])
            monitor._version = record["qemu"]
            monitor.phase = Phase(record["phase"])
            monitor.since = record["since"]
            monitor._unconsumed = record["unconsumed"].encode("latin-1")
            connection.setblocking(False)
            monitor._adopt(connection, protocol)
            monitor._skip_unconsumed()
            reactor.expect_greeting(monitor)
        elif monitor.state.ruling is not None:
            monitor.phase = Phase.ENDED if socket_identity(monitor.path) else Phase.GONE
        if connection is None or monitor._unwritten is not None:
            reactor.set_timer(monitor, FIRST_DELAY)
        return monitor

    def _skip_unconsumed(self) -> None:
        """Take out what the state accounts for, if the daemon before did not."""
        count = len(self._unconsumed)
        try:
            looked_at = self._socket and self._socket.recv(count, socket.MSG_PEEK)
        except OSError:
            looked_at = None
        if looked_at == self._unconsumed:
            self.consume()

    def describe(self) -> str:
        """Return the monitor's line of the status table."""
        if self._socket is None:
            words = [self.phase.value]
        else:
            since = time.localtime(time.time() - (time.monotonic() - self.since))
            words = [
                "{} since {}".format(self.phase.value, time.strftime("%F %T", since)),
                f"QEMU {self._version or 'unknown'} pid {self._peer_pid()}",
            ]
        if self.state.powerdown_requested:
            words.append("powerdown requested")
        if self.state.ruling is not None:
            words.append(str(self.state.ruling))
        return "{}{}: {}".format(self.instance, self.suffix, ", ".join(words))
