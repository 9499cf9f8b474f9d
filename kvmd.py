#!/usr/bin/python3
"""ganeti-kvmd: tell who shut a KVM instance down, its user or somebody else.

QEMU tells on an instance's monitor socket (QMP) why the guest goes down. When it was
the user (`poweroff` in the guest), an empty file `<instance>.shutdown` is created
beside the socket, at the moment the SHUTDOWN event is read: Ganeti then reports
USER_down and leaves the instance alone. After anything else (an administrator, a
signal, a crash, a migration) there is no file, and Ganeti's watcher may start it again.

From the inside out: the verdict and the QMP protocol (no I/O); the log, the service
manager and the shutdown file; the monitor of one instance; the state across a restart;
the daemon that holds the monitors; the service around it. No part names one that stands
below it.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import errno
import fcntl
import gc
import heapq
import itertools
import json
import os
import re
import resource
import select
import selectors
import signal
import socket
import stat
import struct
import sys
import time

from kvmd_inotify import DirectoryWatch, Fact

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

VERSION = "1.0.0"
DAEMON_NAME = "ganeti-kvmd"
NEVER = float("inf")
#: What taking over an exported state raises if it has another form.
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


# ---- The verdict ---------------------------------------------------------------------


class Verdict(enum.Enum):
    """What there is to be said of a guest. Only USER makes a shutdown file."""

    USER = "user"
    NOT_USER = "not-user"
    #: A guest that had been shut down runs again (QEMU with -no-shutdown).
    WITHDRAWN = "withdrawn"
    #: The guest was found running: a file from before its start is stale.
    RUNNING = "running"
    #: The guest was found shut down: its SHUTDOWN was told to an earlier connection.
    EARLIER = "earlier"


class Ruling(collections.namedtuple("Ruling", "verdict cause")):
    """A verdict and its cause, the latter in a few words without spaces."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return it as log lines have it."""
        return f"verdict={self.verdict.value} cause={self.cause}"

    def export(self) -> list[str]:
        """Return it for the state file."""
        return [self.verdict.value, self.cause]

    @classmethod
    def restore(cls, record: list[str]) -> Ruling:
        """Return what was exported. Raises ValueError, TypeError."""
        verdict, cause = record
        return cls(Verdict(verdict), cause)


#: What each event does to the state of a guest (QEMU's qapi/run-state.json).
EFFECTS: dict[str, dict[str, bool]] = {
    "POWERDOWN": {"powerdown_requested": True},
    "RESET": {"powerdown_requested": False, "panicked": False},
    "STOP": {"stopped": True},
    "RESUME": {"stopped": False},
    "GUEST_PANICKED": {"panicked": True},
}
#: The events after which a guest that was shut down runs again.
REVIVALS = {"RESET", "RESUME"}

#: SHUTDOWN's reasons (ShutdownCause in QEMU's qapi/run-state.json) that are never the
#: user's: a reboot under -no-reboot, a crash, and all that comes from the host.
NOT_USER_REASONS = {
    "guest-reset",
    "guest-panic",
    "host-signal",
    "host-qmp-quit",
    "host-qmp-system-reset",
    "host-ui",
    "host-error",
}
#: What in the guest's state speaks against its user, by what SHUTDOWN carries: the
#: reason guest-shutdown; only that the guest did it (QEMU 2.10 to 3.1); nothing.
OBJECTIONS = {
    "guest-shutdown": ("powerdown_requested",),
    "guest": ("powerdown_requested", "panicked"),
    "no-data": ("powerdown_requested", "stopped", "panicked"),
}
#: Statuses (RunState) of a guest that is down, and of one whose CPUs run.
DOWN_STATUSES = {"shutdown", "guest-panicked"}
RUNNING_STATUSES = {"running", "suspended"}


class GuestState:
    """What is known of the guest of one QEMU process: a state machine without I/O."""

    __slots__ = ("alive", "panicked", "powerdown_requested", "ruling", "stopped")

    def __init__(self) -> None:
        self.powerdown_requested = False
        self.stopped = False
        self.panicked = False
        #: Seen alive in this connection.
        self.alive = False
        #: The verdict of this run of the guest: the first one counts.
        self.ruling: Ruling | None = None

    def on_status(self, status: str) -> Ruling | None:
        """Take the answer to query-status, a RunState of QEMU's."""
        if self.ruling is not None:
            return None
        self.panicked |= status == "guest-panicked"
        if status == "shutdown":
            self.ruling = Ruling(Verdict.EARLIER, status)
        if status in DOWN_STATUSES:
            return None
        self.alive = True
        self.stopped = status not in RUNNING_STATUSES
        return Ruling(Verdict.RUNNING, status)

    def on_event(self, name: str, data: object) -> Ruling | None:
        """Take an event; return what it changes in the verdict, if anything."""
        self.alive = True
        for attribute, value in EFFECTS.get(name, {}).items():
            setattr(self, attribute, value)
        if name == "SHUTDOWN" and self.ruling is None:
            self.ruling = self._judge(data)
            return self.ruling
        if name in REVIVALS and self.ruling is not None:
            self.ruling = None
            return Ruling(Verdict.WITHDRAWN, name.lower())
        return None

    def on_end(self) -> Ruling | None:
        """Take the end of the connection."""
        if self.ruling is not None or not self.alive:
            return None
        self.alive = False
        return Ruling(Verdict.NOT_USER, "connection-ended")

    def export(self) -> dict[str, object]:
        """Return the state for the state file."""
        record = {name: getattr(self, name) for name in self.__slots__}
        return {**record, "ruling": self.ruling and self.ruling.export()}

    def restore(self, record: dict[str, Any]) -> None:
        """Take over what was exported."""
        for name in self.__slots__:
            setattr(self, name, record[name])
        self.ruling = record["ruling"] and Ruling.restore(record["ruling"])

    def _judge(self, data: object) -> Ruling:
        cause, row = grounds_of_shutdown(data)
        objections = [name for name in OBJECTIONS.get(row, ()) if getattr(self, name)]
        cause = ",".join([cause, *objections]).replace("_", "-")
        if row == "not-user" or objections:
            return Ruling(Verdict.NOT_USER, cause)
        return Ruling(Verdict.USER, cause)


def grounds_of_shutdown(data: object) -> tuple[str, str]:
    """Return the cause that SHUTDOWN's data names and the row of OBJECTIONS it is in.

    The row is "not-user" where nothing needs to be said against the user any more.
    """
    if data is None:
        return "no-data", "no-data"
    if not isinstance(data, dict):
        return "malformed", "not-user"
    reason = data.get("reason")
    if reason == "guest-shutdown":
        return reason, reason
    if isinstance(reason, str) and reason in NOT_USER_REASONS:
        return reason, "not-user"
    if data.get("guest") is True:
        return "guest", "guest"
    return "not-guest", "not-user"


# ---- The QMP protocol ----------------------------------------------------------------

#: Sent in one write on connecting: events before the negotiation are lost.
COMMANDS = (
    b'{"execute": "qmp_capabilities"}\r\n'
    b'{"execute": "query-status", "id": "kvmd-status"}\r\n'
)
STATUS_ID = "kvmd-status"
#: What may be a status (RunState in QEMU's qapi/run-state.json): it goes into the log.
STATUS = re.compile(r"[a-z0-9-]{1,32}")

#: Bytes of an unfinished line that are kept.
LINE_LIMIT = 65536
#: Bytes of one read. All of them may have to be parsed, line by line.
READ_SIZE = 16384
OVERLONG = f"a line of more than {LINE_LIMIT} bytes"
#: Bytes of one read where every line has to be parsed, or the last one had.
CAREFUL_READ_SIZE = 1024

#: Finds, in a whole chunk, whether any event in it may matter. Most don't, and JSON is
#: parsed for none of those. It looks for the end of "event", for a search that began
#: with a quote would have to stop at each of them.
EVENT_OF_INTEREST = re.compile(
    rb'vent"\s*:\s*"(?:%s)"' % "|".join(["SHUTDOWN", *EFFECTS]).encode()
)

Greeting = collections.namedtuple("Greeting", "version")
Status = collections.namedtuple("Status", "status")
#: The timestamp is in seconds since the epoch by QEMU's clock, None if it has none.
Event = collections.namedtuple("Event", "name data timestamp")


def parse_message(line: bytes) -> Greeting | Status | Event | None:
    """Return what one line says, None for an answer of no interest.

    Raises ValueError, or RecursionError for deep nesting, if it is no QMP message.
    """
    message = json.loads(line.decode("utf-8"))
    if not isinstance(message, dict):
        raise ValueError("not an object")
    if isinstance(message.get("event"), str):
        timestamp = event_time(message.get("timestamp"))
        return Event(message["event"], message.get("data"), timestamp)
    if "QMP" in message:
        return Greeting(qemu_version(message["QMP"]))
    if "error" in message:
        raise ValueError("a command was refused")
    if "return" not in message:
        raise ValueError("neither greeting, answer nor event")
    if message.get("id") != STATUS_ID:
        return None
    answer = message["return"]
    status = answer.get("status") if isinstance(answer, dict) else None
    if not isinstance(status, str) or not STATUS.fullmatch(status):
        raise ValueError("no status in the answer to query-status")
    return Status(status)


def event_time(timestamp: object) -> float | None:
    """Return an event's time in seconds; QEMU gives -1 when it has no clock."""
    if not isinstance(timestamp, dict):
        return None
    seconds, microseconds = timestamp.get("seconds"), timestamp.get("microseconds")
    if not isinstance(seconds, int) or not isinstance(microseconds, int):
        return None
    if not (0 <= seconds < 1 << 40 and 0 <= microseconds < 1000000):
        return None
    return seconds + microseconds / 1e6


def qemu_version(greeting: object) -> str:
    """Return the version that a greeting names, like 7.2.22, or "unknown"."""
    try:
        version = greeting["version"]["qemu"]  # type: ignore[index]
        numbers = [version[part] for part in ("major", "minor", "micro")]
    except (TypeError, KeyError):
        return "unknown"
    if not all(isinstance(number, int) for number in numbers):
        return "unknown"
    # Interned, for a thousand instances tend to run one version.
    return sys.intern(".".join(str(number % 1000) for number in numbers))


class Protocol:
    """The client side of one QMP connection, without I/O: bytes in, messages out.

    QEMU's docs/interop/qmp-spec: a JSON object per line. `read_size` is how many
    bytes the next read should ask for. `complaint` says what was skipped first.
    """

    __slots__ = (
        "_answered",
        "_greeted",
        "_overlong",
        "_unfinished",
        "complaint",
        "read_size",
    )

    def __init__(self) -> None:
        self._greeted = False
        #: query-status was answered, so that only events can be of interest.
        self._answered = False
        #: The start of a line that goes on, at most LINE_LIMIT bytes.
        self._unfinished = b""
        #: The line that comes in is longer than that: it is skipped to its end.
        self._overlong = False
        self.read_size = CAREFUL_READ_SIZE
        self.complaint: str | None = None

    def receive(self, data: bytes) -> list[Greeting | Status | Event]:
        """Take what was read, b"" at the end of the connection; return the messages."""
        listening = self._answered and self._greeted
        end = data.rfind(b"\n") + 1
        if data and not end:
            self._keep(data)
            self.read_size = READ_SIZE if listening else CAREFUL_READ_SIZE
            return []
        lines = self._unfinished + data[:end]
        self._unfinished = b""
        if self._overlong:
            lines = lines[lines.find(b"\n") + 1 :]
            self._overlong = False
        self._keep(data[end:])
        # A glance is all that goes to what can't be of interest: one warning is due.
        odd = lines[:1] != b"{" or len(lines) > LINE_LIMIT
        listening = listening and not (odd and self.complaint is None)
        if listening and not EVENT_OF_INTEREST.search(lines):
            self.read_size = READ_SIZE
            return []
        self.read_size = CAREFUL_READ_SIZE
        messages = [
            self._read_line(line)
            for line in lines.split(b"\n")
            if not listening or EVENT_OF_INTEREST.search(line)
        ]
        return [message for message in messages if message is not None]

    @property
    def pending(self) -> int:
        """How many bytes are kept of a line that goes on."""
        return len(self._unfinished)

    def export(self) -> dict[str, object]:
        """Return what is known of the connection for the state file."""
        return {
            "greeted": self._greeted,
            "answered": self._answered,
            "unfinished": self._unfinished.decode("latin-1"),
            "overlong": self._overlong,
            "complaint": self.complaint,
        }

    def restore(self, record: dict[str, Any]) -> None:
        """Take over what was exported."""
        self._greeted = record["greeted"]
        self._answered = record["answered"]
        self._unfinished = record["unfinished"].encode("latin-1")
        self._overlong = record["overlong"]
        self.complaint = record["complaint"]

    def _keep(self, data: bytes) -> None:
        if self._overlong or len(self._unfinished) + len(data) > LINE_LIMIT:
            self._unfinished = b""
            self._overlong = True
            self._complain(OVERLONG)
        else:
            self._unfinished += data

    def _read_line(self, line: bytes) -> Greeting | Status | Event | None:
        if not line.strip():
            return None
        try:
            if len(line) > LINE_LIMIT:
                raise ValueError(OVERLONG)
            message = parse_message(line)
            if self._greeted and isinstance(message, Greeting):
                raise ValueError("a second greeting")
        except (ValueError, RecursionError) as error:
            self._complain(f"{error}: {line[:80]!r}")
            return None
        self._greeted |= isinstance(message, Greeting)
        self._answered |= isinstance(message, Status)
        # Before the greeting nothing can be told: there was no negotiation yet.
        return message if self._greeted else None

    def _complain(self, complaint: str) -> None:
        self.complaint = self.complaint or complaint


# ---- The log -------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return the text with all that is not printable escaped, on one line."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


class Log:
    """Log lines as Ganeti's Python daemons write them, to a file and elsewhere.

    Not the logging module: importing it takes about 10 ms and 1.7 MiB, of the 28 ms and
    12 MiB that all may take. Writing never raises and never blocks. What may be said
    about one instance is limited, for a guest may have a hand in it.
    """

    #: Lines about one instance within PERIOD seconds, not counting debug messages.
    LINES_PER_PERIOD = 60
    PERIOD = 60.0

    def __init__(
        self, path: str | None, sinks: list[Callable[[str, str], None]]
    ) -> None:
        """Log to a file, if there is a path, and to sinks: calls with level, line."""
        self.path = path
        self.debugging = False
        self.sinks = sinks
        self._fd: int | None = None
        #: The last line in the file lacks its end.
        self._torn = False
        self._troubles: set[str] = set()
        #: Instance -> lines in the period that ends then (time.monotonic()).
        self._lines: dict[str, int] = {}
        self._end_of_period = 0.0

    def open(self) -> None:
        """Open the file; raises OSError, and keeps the one that was open before."""
        if self.path is None:
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK
        fd = os.open(self.path, flags | os.O_CLOEXEC, 0o600)
        self._torn = False
        if self._fd is None:
            self._fd = fd
        else:
            os.dup2(fd, self._fd, inheritable=False)
            os.close(fd)

    def debug(self, message: str) -> None:
        """Log what only `--debug` shows."""
        if self.debugging:
            self._write("DEBUG", message)

    def info(self, message: str, instance: str | None = None) -> None:
        """Log a verdict, or a step of the daemon's life."""
        self._log("INFO", message, instance)

    def warning(self, message: str, instance: str | None = None) -> None:
        """Log a degraded state."""
        self._log("WARNING", message, instance)

    def error(self, message: str, instance: str | None = None) -> None:
        """Log a failure that somebody has to look at."""
        self._log("ERROR", message, instance)

    def exception(
        self, message: str, error: BaseException, instance: str | None = None
    ) -> None:
        """Log a failure with the exception's traceback."""
        import traceback

        self.error(message, instance)
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        for line in "".join(lines).splitlines():
            self.error(line, instance)

    def begin_trouble(self, trouble: str, consequence: str) -> None:
        """Warn of a degraded state, once until it is over."""
        if trouble not in self._troubles:
            self._troubles.add(trouble)
            self.warning(f"{trouble}: {consequence}")

    def end_trouble(self, trouble: str) -> None:
        """Tell that a degraded state is over, if it was one."""
        if trouble in self._troubles:
            self._troubles.remove(trouble)
            self.info(f"{trouble}: it is over")

    def _log(self, level: str, message: str, instance: str | None) -> None:
        """Log a line, unless there were too many about its instance."""
        if instance is None:
            self._write(level, message)
            return
        if time.monotonic() >= self._end_of_period:
            self._begin_period()
        count = self._lines[instance] = self._lines.get(instance, 0) + 1
        if count <= self.LINES_PER_PERIOD:
            self._write(level, f"{instance}: {message}")
        elif count == self.LINES_PER_PERIOD + 1:
            self._write(
                "WARNING",
                f"{instance}: more than {self.LINES_PER_PERIOD} lines within"
                f" {self.PERIOD:.0f} s; leaving out the next ones",
            )

    def _begin_period(self) -> None:
        for instance, count in self._lines.items():
            if count > self.LINES_PER_PERIOD:
                left_out = count - self.LINES_PER_PERIOD
                self._write("INFO", f"{instance}: lines left out: {left_out}")
        self._lines.clear()
        self._end_of_period = time.monotonic() + self.PERIOD

    def _write(self, level: str, message: str) -> None:
        now = time.time()
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        line = (
            f"{date},{int(now % 1 * 1000):03d}: {DAEMON_NAME} pid={os.getpid()} {level}"
            f" {printable(message)}"
        )
        if self._fd is not None:
            self._append(self._fd, line)
        for sink in self.sinks:
            sink(level, line)

    def _append(self, fd: int, line: str) -> None:
        data = b"\n" * self._torn + line.encode() + b"\n"
        with contextlib.suppress(OSError):  # a full disk must not stop the daemon
            self._torn = os.write(fd, data) < len(data)


# ---- The service manager -------------------------------------------------------------


class Notifier:
    """Tells systemd how the daemon is doing, where it wants to know (sd_notify(3)).

    It also has systemd keep descriptors, so that they outlive a crash
    (sd_pid_notify_with_fds(3)).
    """

    #: Microseconds that a service manager may take for a message.
    SEND_TIMEOUT = 10000

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Take NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID."""
        address = environment.get("NOTIFY_SOCKET", "")
        #: Whether there is a service manager that listens.
        self.is_heard = address[:1] in {"/", "@"}
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        #: Seconds between signs of life, as often as sd_watchdog_enabled(3) advises.
        self.watchdog_interval = NEVER
        self._status = ""
        microseconds = environment.get("WATCHDOG_USEC", "")
        watched_pid = environment.get("WATCHDOG_PID", str(os.getpid()))
        watched = microseconds.isdecimal() and watched_pid == str(os.getpid())
        if watched and int(microseconds) > 0:
            self.watchdog_interval = int(microseconds) / 2e6
        if self.is_heard:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            # Not settimeout: with a full queue at the other end, that spins.
            self._socket.setsockopt(
                socket.SOL_SOCKET,
                socket.SO_SNDTIMEO,
                struct.pack("ll", 0, self.SEND_TIMEOUT),
            )
        self._flags = 0
        #: What is to be kept no longer, and was not taken yet.
        self._discarded: list[str] = []

    def send(self, *assignments: str, fds: Sequence[int] = ()) -> bool:
        """Send lines like READY=1, and descriptors with them; tell whether that worked.

        Nothing else that is done here depends on it.
        """
        if not self.is_heard:
            return False
        message = ["\n".join(assignments).encode()]
        # Not socket.send_fds: that drops the address.
        packed = struct.pack(f"{len(fds)}i", *fds)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)] if fds else []
        try:
            self._socket.sendmsg(message, rights, self._flags, self._address)
        except OSError:
            self._flags = socket.MSG_DONTWAIT  # gone or stuck: wait once, not each time
            return False
        self._flags = 0
        return True

    def send_status(self, status: str) -> None:
        """Send that the daemon is ready, and what `systemctl status` is to show.

        It is sent until it was taken, and again when it has changed.
        """
        if status != self._status and self.send("READY=1", f"STATUS={status}"):
            self._status = status

    def send_reloading(self) -> None:
        """Send that the daemon is not ready until the next `send_status`."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self._status = ""

    def knows_status(self) -> bool:
        """Tell whether the service manager has taken that the daemon is ready."""
        return self._status != ""

    def store(self, name: str, fd: int) -> bool:
        """Have a descriptor kept, also when its peer has closed (FDPOLL=0)."""
        return self.send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])

    def discard(self, name: str) -> bool:
        """Have a descriptor kept no longer; tell whether that worked.

        If it did not, `discard_rest` will.
        """
        self._discarded.append(name)
        return self.discard_rest()

    def discard_rest(self) -> bool:
        """Discard what could not be before; tell whether that worked."""
        while self._discarded:
            if not self.send("FDSTOREREMOVE=1", f"FDNAME={self._discarded[-1]}"):
                return False
            self._discarded.pop()
        return True

    def store_connection(self, connection: socket.socket) -> bool:
        """Have a connection kept; tell whether that worked."""
        return self.store(connection_name(connection), connection.fileno())

    def end_connection(self, connection: socket.socket) -> None:
        """Close a connection, also where it is kept."""
        if self.is_heard:
            self.discard(connection_name(connection))
            # The service manager may have it open a while longer. Where there is none,
            # it may be a socket of the starter's, who goes on using it.
            with contextlib.suppress(OSError):  # the peer has closed it already
                connection.shutdown(socket.SHUT_RDWR)
        connection.close()


def connection_name(connection: socket.socket) -> str:
    """Return the name under which a connection is kept: it holds its inode number.

    The number stays with the socket in whichever process it is.
    """
    return f"connection-{os.fstat(connection.fileno()).st_ino}"


# ---- The shutdown file ---------------------------------------------------------------


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


# ---- The state across a restart ------------------------------------------------------

#: The state is a memory file, sealed: one JSON object with the members `version`,
#: `serial` (the newest of several files counts), `pid`, `pid_file` (its descriptor, for
#: the same process after exec), `control_dir`, and `monitors`, a list of what
#: `Monitor.export` makes.
STATE_VERSION = 1
STATE_NAME = "kvmd-state"


def write_state_file(state: str) -> int:
    """Return the descriptor of a sealed memory file with the state. Raises OSError."""
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    fd = os.memfd_create(STATE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "w", encoding="ascii", closefd=False) as file:
            file.write(state)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_WRITE)
    except OSError:
        os.close(fd)
        raise
    return fd


def read_state_file(fd: int) -> dict[str, Any]:
    """Return the state in a memory file. Raises OSError, MALFORMED."""
    state = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        raise ValueError(f"not of version {STATE_VERSION}")
    return state


def open_files(pid: str) -> Iterator[tuple[int, str]]:
    """Yield the descriptors of a process, and what they are of, as /proc/PID/fd has it.

    Raises OSError.
    """
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):  # the listing's own, for one
            yield int(name), os.readlink(f"{directory}/{name}")


class Inheritance:
    """What an earlier daemon has left open for this one: connections and its state.

    They come through exec(2), or from systemd's descriptor store; what they are is
    told by /proc/self/fd alone.
    """

    def __init__(self) -> None:
        """Find them above 2, and close all else there."""
        #: Connections by their name (`connection_name`).
        self.connections: dict[str, socket.socket] = {}
        #: The newest state, {} if there is none.
        self.state: dict[str, Any] = {}
        #: Why a state could not be read.
        self.problem: Exception | None = None
        others = []
        for fd, target in open_files("self"):
            if fd <= 2:
                continue
            if target.startswith("socket:["):
                connection = socket.socket(fileno=fd)
                connection.set_inheritable(False)
                self.connections[connection_name(connection)] = connection
                continue
            if target.startswith(f"/memfd:{STATE_NAME}"):
                self._read_state(fd)
            others.append(fd)
        for fd in others:
            if fd != self.pid_file:
                os.close(fd)

    def _read_state(self, fd: int) -> None:
        try:
            state = read_state_file(fd)
            if state["serial"] > self.state.get("serial", -1):
                self.state = state
        except (OSError, *MALFORMED) as error:
            self.problem = error

    @property
    def pid_file(self) -> int | None:
        """The locked pid file, if this process itself was the earlier daemon."""
        same_process = self.state.get("pid") == os.getpid()
        return self.state.get("pid_file") if same_process else None


# ---- The daemon ----------------------------------------------------------------------

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


# ---- The service: the cluster's settings ---------------------------------------------


class Level(enum.Enum):
    """What a finding means for the detection of shutdowns on this node."""

    OK = "ok"
    WARN = "warn"
    #: Nothing is detected; as a cluster's setting: nothing is to be detected.
    FAIL = "FAIL"
    #: Nor can it be told what the setting is.
    BROKEN = "BROKEN"


#: A judged setting or fact, and one line for the administrator, with the remedy.
Finding = collections.namedtuple("Finding", "level text")


def judge_hypervisors(text: str) -> Finding:
    """Judge ssconf_hypervisor_list: a hypervisor's name per line."""
    names = text.split()
    if "kvm" in names:
        return Finding(Level.OK, f"enabled hypervisors: {', '.join(names)}")
    return Finding(
        Level.FAIL,
        f"kvm is not among the enabled hypervisors ({', '.join(names)}); to enable it:"
        " gnt-cluster modify --enabled-hypervisors=...,kvm",
    )


def judge_user_shutdown(text: str) -> Finding:
    """Judge ssconf_enabled_user_shutdown: True or False."""
    value = text.strip()
    if value == "True":
        return Finding(Level.OK, "user shutdown is enabled (True)")
    if value == "False":
        return Finding(
            Level.FAIL,
            "user shutdown is not enabled (False); to enable it:"
            " gnt-cluster modify --user-shutdown=yes",
        )
    return Finding(Level.BROKEN, f"neither True nor False: {text[:80]!r}")


def judge_vm_capable(text: str, node_names: Iterable[str]) -> Finding:
    """Judge ssconf_node_vm_capable: a line `node=True` or `node=False` per node.

    Of the node's names no more are asked for than until one is listed.
    """
    capable = {}
    for line in text.splitlines():
        node, _, value = line.strip().partition("=")
        if value not in {"True", "False"}:
            return Finding(Level.BROKEN, f"no line like node=True: {line[:80]!r}")
        capable[node] = value == "True"
    strangers = []
    for node in node_names:
        if node in strangers:
            continue
        if node not in capable:
            strangers.append(node)
        elif capable[node]:
            return Finding(Level.OK, f"node {node} is vm_capable (True)")
        else:
            return Finding(
                Level.FAIL,
                f"node {node} is not vm_capable (False); to make it so:"
                f" gnt-node modify --vm-capable=yes {node}",
            )
    return Finding(
        Level.WARN,
        f"node {' or '.join(strangers)} is not listed; taking it for vm_capable"
        " (compare with: gnt-node list)",
    )


def read_ssconf(path: str) -> str:
    """Return the text of one of Ganeti's ssconf files. Raises OSError, ValueError."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def reason_of(error: OSError | ValueError) -> str:
    """Return what went wrong, without the path, which an OSError holds as well."""
    return error.strerror or "" if isinstance(error, OSError) else str(error)


def judge_cluster(ssconf_dir: str, node_names: Iterable[str]) -> Iterator[Finding]:
    """Judge the cluster's settings, in the order in which the daemon asks for them."""
    judges: dict[str, Callable[[str], Finding]] = {
        "ssconf_hypervisor_list": judge_hypervisors,
        "ssconf_enabled_user_shutdown": judge_user_shutdown,
        "ssconf_node_vm_capable": lambda text: judge_vm_capable(text, node_names),
    }
    for name, judge in judges.items():
        path = os.path.join(ssconf_dir, name)
        try:
            finding = judge(read_ssconf(path))
        except FileNotFoundError:
            finding = Finding(
                Level.FAIL,
                "does not exist: this node is in no Ganeti cluster (gnt-cluster init,"
                " gnt-node add)",
            )
        except (OSError, ValueError) as error:
            finding = Finding(Level.BROKEN, f"cannot be read: {reason_of(error)}")
        if finding.level is Level.BROKEN:
            text = f"{finding.text}; to write it anew: gnt-cluster redist-conf"
            finding = Finding(Level.BROKEN, text)
        yield Finding(finding.level, f"{path}: {finding.text}")


def names_of_node() -> Iterator[str]:
    """Yield the names that Ganeti may know this node by.

    The fully qualified one comes last, for finding it may take the resolver's time.
    """
    if "GANETI_HOSTNAME" in os.environ:
        yield os.environ["GANETI_HOSTNAME"]
        return
    yield socket.gethostname()
    yield socket.getfqdn()


# ---- The service: command line -------------------------------------------------------


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
        self.ssconf_dir = f"{root}/var/lib/ganeti"
        self.socket_suffix = "auto"
        self.rescan_interval = 15.0
        self.check = False
        self.version = False

    def command(self) -> list[str]:
        """Return what starts the program anew with these options, from anywhere."""
        return own_command() + [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in vars(self).items()
            if value != getattr(Options(), name)
        ]


def parse_arguments(arguments: list[str]) -> Options:
    """Return the options, all paths absolute; exit with status 2 on wrong usage."""
    options = Options()
    if not arguments:
        return options  # as Ganeti has it; argparse takes a fifth of the start's time
    import argparse

    parser = argparse.ArgumentParser(
        prog=DAEMON_NAME,
        description="Tell Ganeti which KVM instances were shut down by their users.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    for flags, meaning in [
        (["-f", "--foreground"], "don't detach; log to stderr as well"),
        (["-d", "--debug"], "log debug messages: every QMP message, every watch"),
        (["--no-user-checks"], "don't insist on running as root"),
        (
            ["--no-cluster-checks"],
            "don't ask the cluster's settings; for trials without Ganeti",
        ),
        (["--check"], "say what prevents detection on this node, then exit"),
    ]:
        add(*flags, action="store_true", help=meaning)
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
        ("--ssconf-dir", options.ssconf_dir, "the cluster's settings"),
    ]:
        add(
            option,
            metavar="PATH",
            type=os.path.abspath,
            help=f"{meaning} (default: {default})",
        )
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
        help="how often to look for sockets that no event told of, 0 for never"
        f" (default: {options.rescan_interval:g})",
    )
    # Not argparse's own action, which asks no more what other options there are: a
    # restart in place tries the new program with the options that it will get.
    add("-V", "--version", action="store_true", help="print the version, then exit")
    return parser.parse_args(arguments, namespace=options)


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


# ---- The service: process ------------------------------------------------------------


SYSLOG_SOCKET = "/dev/log"
#: Niceness of the daemon: on a busy node its file has to be there before QEMU is gone.
NICENESS = -10


class StartError(Exception):
    """The daemon can't start; the message says why and what to do."""


class PidFile:
    """The pid file, locked as long as the daemon lives.

    A POSIX record lock as Ganeti's own daemon takes it, so that the two exclude each
    other. It is the process's, not passed on over fork(2), and gone as soon as any
    descriptor of the file is closed (fcntl(2)).
    """

    ATTEMPTS = 10

    def __init__(self, path: str, locked: int | None = None) -> None:
        """Lock the file, if it is not locked already, and write the pid.

        Raises StartError.
        """
        self.path = path
        try:
            self.fd = self._lock() if locked is None else locked
            os.set_inheritable(self.fd, False)
            if os.geteuid() == 0:
                # start-stop-daemon acts on no pid file that others than root may write.
                os.fchown(self.fd, 0, 0)
            os.fchmod(self.fd, 0o600)
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise StartError(
                f"cannot write the pid file {path}: {error.strerror}"
            ) from error

    def _lock(self) -> int:
        """Return a descriptor of the locked file, which is the one at the path."""
        for _ in range(self.ATTEMPTS):
            fd = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = os.read(fd, 20).decode("ascii", "replace").strip()
                os.close(fd)
                raise StartError(
                    f"another daemon runs already, with pid {holder or 'unknown'}: it"
                    f" holds the lock on {self.path}"
                ) from None
            if self._is_at_path(fd):
                return fd
            os.close(fd)  # its last holder has removed it in between
        raise StartError(f"{self.path} is removed again and again")

    def _is_at_path(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Remove the file, unless another one stands there, or it can't be removed."""
        with contextlib.suppress(OSError):  # only the lock counts
            if self._is_at_path(self.fd):
                os.unlink(self.path)


def sanitize_process() -> None:
    """Make the process independent of who started it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    os.umask(0o077)
    os.chdir("/")
    # What comes before the loop can take it waits.
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    with open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write(DAEMON_NAME)


def raise_priority() -> None:
    """Go before the guests' work, as far as that is permitted (sched(7)).

    The kernel may schedule each session as a group, with a niceness of its own.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    if os.getsid(0) != os.getpid():
        return  # the session is that of who started it in the foreground
    path = "/proc/self/autogroup"
    with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as autogroup:
        autogroup.write(str(NICENESS))


def detach() -> Callable[[str], None]:
    """Go on in the background, in a session of its own.

    The first process waits until what is returned is called, with an empty message if
    the daemon is ready, or with the reason if it can't start; then it exits.
    """
    reader, writer = os.pipe()
    if os.fork() != 0:
        os.close(writer)
        with open(reader, encoding="utf-8") as pipe:
            report = pipe.read()
        if report != "ready\n":
            write_to_stderr(f"{DAEMON_NAME}: {report or 'died while starting'}")
        os._exit(0 if report == "ready\n" else 1)
    os.close(reader)
    os.setsid()
    raise_priority()
    if os.fork() != 0:
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)

    def report_to_starter(problem: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it was killed: go on without it
            os.write(writer, (problem or "ready\n").encode())
        os.close(writer)

    return report_to_starter


def write_to_stderr(line: str) -> None:
    """Write a line to stderr, and lose it if it can't be written."""
    with contextlib.suppress(OSError):
        os.write(2, line.encode() + b"\n")


def report_to_nobody(problem: str) -> None:
    """Take what `detach` has a function for, where no starter waits for it."""


def stderr_sink(level: str, line: str) -> None:
    """Write a log line to stderr, cut to what never blocks; not at all if it would."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if poll.poll(0):
        write_to_stderr(line[: select.PIPE_BUF // 4 - 1])  # up to 4 bytes a character


def syslog_sink() -> Callable[[str, str], None]:
    """Return a function that sends log lines to syslog, but no debug messages.

    It sends what syslog(3) does, but that waits as long as a syslogd is stuck.
    """
    import syslog

    priorities = {
        "INFO": syslog.LOG_DAEMON | syslog.LOG_INFO,
        "WARNING": syslog.LOG_DAEMON | syslog.LOG_WARNING,
        "ERROR": syslog.LOG_DAEMON | syslog.LOG_ERR,
    }
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def send(level: str, line: str) -> None:
        if level in priorities:
            date = time.strftime("%b %e %T")
            message = line.split(f" {level} ", 1)[1]
            packet = f"<{priorities[level]}>{date} {DAEMON_NAME}[{os.getpid()}]: "
            with contextlib.suppress(OSError):
                sender.sendto((packet + message).encode(), SYSLOG_SOCKET)

    return send


# ---- The service: --check ------------------------------------------------------------

#: From linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h: what asks for the peer of
#: every UNIX socket, as sock_diag(7) has it.
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST_DUMP = 0x301
UDIAG_SHOW_PEER = 4
UNIX_DIAG_PEER = 2
#: Seconds that the kernel may take for an answer; bytes of one read of it.
DIAG_TIMEOUT = 10
DIAG_READ_SIZE = 65536
NETLINK_HEADER = struct.Struct("=IHHII")
DIAG_REQUEST = struct.Struct("=BBHIIIQ")
DIAG_ANSWER = struct.Struct("=BBBBIQ")
ATTRIBUTE_HEADER = struct.Struct("=HH")

#: Of a socket in /proc/net/unix: it listens; it is connected.
SO_ACCEPTCON = 0x10000
SS_CONNECTED = 3
UNKNOWN_CLIENT = "unknown process"


def read_peers() -> dict[int, int]:
    """Return the inode number of each UNIX socket's peer. Raises OSError."""
    request = DIAG_REQUEST.pack(
        socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, UDIAG_SHOW_PEER, 2**64 - 1
    )
    header = NETLINK_HEADER.pack(
        NETLINK_HEADER.size + len(request),
        *(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 0, 0),
    )
    peers: dict[int, int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(DIAG_TIMEOUT)
        diag.send(header + request)
        while parse_peers(diag.recv(DIAG_READ_SIZE), peers):
            pass
    return peers


def parse_peers(answers: bytes, peers: dict[int, int]) -> bool:
    """Add what one datagram of sock_diag(7) tells; return whether more is to come."""
    offset = 0
    while offset < len(answers):
        length, kind, *_ = NETLINK_HEADER.unpack_from(answers, offset)
        if kind != SOCK_DIAG_BY_FAMILY:
            return False  # NLMSG_DONE, or NLMSG_ERROR
        body = offset + NETLINK_HEADER.size
        inode = DIAG_ANSWER.unpack_from(answers, body)[4]
        attribute = body + DIAG_ANSWER.size
        while attribute < offset + length:
            size, what = ATTRIBUTE_HEADER.unpack_from(answers, attribute)
            if what == UNIX_DIAG_PEER:
                value = answers[attribute + ATTRIBUTE_HEADER.size : attribute + size]
                peers[inode] = int.from_bytes(value, sys.byteorder)
            attribute += (size + 3) & ~3
        offset += (length + 3) & ~3
    return True


def read_holders(inodes: set[int]) -> dict[int, str]:
    """Return which process has each of the sockets open, as far as one may see."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    holders = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                name = comm.read().strip()
            for _, target in open_files(pid):
                if target in wanted:
                    holders[wanted[target]] = f"{name}, pid {pid}"
        except OSError:
            continue  # it is somebody else's, or gone
    return holders


def read_sockets(control_dir: str) -> dict[str, list[tuple[int, int, int]]]:
    """Return the (flags, state, inode number) of the sockets of each path there.

    From /proc/net/unix, which has a line for the listener and for every connection.
    """
    here = os.stat(control_dir)
    sockets: dict[str, list[tuple[int, int, int]]] = {}
    with open("/proc/net/unix", "rb") as table:
        lines = os.fsdecode(table.read()).split("\n")
    for line in lines[1:]:
        try:
            _, _, _, flags, _, state, inode, path = line.split(None, 7)
            entry = (int(flags, 16), int(state, 16), int(inode))
            directory, name = os.path.split(path)
            is_here = os.path.samestat(os.stat(directory), here)
        except (ValueError, OSError):
            continue  # it has no path, or one that leads nowhere
        if is_here:
            sockets.setdefault(name, []).append(entry)
    return sockets


def check_clients(path: str, clients: list[str], daemon: int | None) -> Finding:
    """Judge who is connected to a monitor socket, as `read_holders` names them.

    The daemon's pid is given if one runs that is to be among them.
    """
    text = f"{path}: listening, nobody connected"
    if clients:
        text = f"{path}: connected by {'; '.join(clients)}"
    is_heard = any(
        client == UNKNOWN_CLIENT or client.endswith(f", pid {daemon}")
        for client in clients
    )
    if daemon is None or is_heard:
        return Finding(Level.OK, text)
    return Finding(
        Level.WARN,
        f"{text}: the daemon, pid {daemon}, waits for QEMU to answer, or for that"
        f" client to close; to see what it knows: kill -USR1 {daemon}",
    )


def check_instances(
    control_dir: str, suffixes: tuple[str, ...], daemon: int | None
) -> Iterator[Finding]:
    """Judge each instance's monitor socket, without connecting to it.

    The pid is that of this daemon, None if it does not run.
    """
    sockets = read_sockets(control_dir)
    try:
        peers = read_peers()
    except OSError:
        peers = {}
    clients = {
        name: [
            peers.get(inode, 0)
            for flags, state, inode in entries
            if state == SS_CONNECTED and not flags & SO_ACCEPTCON
        ]
        for name, entries in sockets.items()
    }
    holders = read_holders({inode for found in clients.values() for inode in found})
    names = set(os.listdir(control_dir))
    for name in sorted(names):
        instance, suffix = os.path.splitext(name)
        if suffix not in SUFFIXES["auto"] or not instance:
            continue
        path = os.path.join(control_dir, name)
        if not socket_identity(path):
            yield Finding(Level.WARN, f"{path}: no socket; it is ignored")
        elif not any(flags & SO_ACCEPTCON for flags, _, _ in sockets.get(name, [])):
            yield Finding(
                Level.WARN,
                f"{path}: dead, nobody listens; if the instance does run, restart it"
                f" (gnt-instance reboot {instance})",
            )
        else:
            used = next((one for one in suffixes if instance + one in names), None)
            yield check_clients(
                path,
                [holders.get(inode, UNKNOWN_CLIENT) for inode in clients[name]],
                daemon if suffix == used else None,
            )


def check_directory(control_dir: str) -> Finding:
    """Judge whether the control directory can be read."""
    try:
        os.listdir(control_dir)
    except FileNotFoundError:
        return Finding(
            Level.WARN,
            f"{control_dir}: not there yet; Ganeti makes it at its first KVM operation",
        )
    except PermissionError as error:
        return Finding(Level.FAIL, f"{control_dir}: {error.strerror}; run this as root")
    except OSError as error:
        return Finding(
            Level.FAIL,
            f"{control_dir}: {error.strerror}; move away what stands there, Ganeti"
            " makes the directory anew",
        )
    return Finding(Level.OK, f"{control_dir}: the control directory is there")


def check_inotify(control_dir: str) -> Finding:
    """Judge inotify's limits by using one more instance and its watches."""
    limits = []
    for name in ("max_user_instances", "max_user_watches"):
        with open(f"/proc/sys/fs/inotify/{name}", encoding="ascii") as file:
            limits.append(f"fs.inotify.{name} = {file.read().strip()}")
    try:
        with contextlib.closing(DirectoryWatch(control_dir)) as watch:
            watch.follow()
    except OSError as error:
        return Finding(
            Level.WARN,
            f"inotify: {error.strerror}; new instances are looked for every second"
            f" only; raise with sysctl -w what is used up ({', '.join(limits)})",
        )
    return Finding(Level.OK, f"inotify works ({', '.join(limits)})")


def lock_holder(path: str) -> int | None:
    """Return the pid that holds a record lock on the file (/proc/locks), if any.

    The file is not opened, so the lock can't be disturbed.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    wanted = f"{major:02x}:{minor:02x}:{status.st_ino}"
    with open("/proc/locks", encoding="ascii") as locks:
        for _, kind, _, _, pid, inode, *_ in map(str.split, locks):
            if kind == "POSIX" and inode == wanted:
                return int(pid)
    return None


def command_of(pid: int) -> str:
    """Return the command line of a process, "" if it can't be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsdecode(file.read()).replace("\0", " ").strip()
    except OSError:
        return ""


def is_ganetis(pid: int) -> bool:
    """Tell whether a daemon is Ganeti's own, which is a compiled program."""
    command = command_of(pid)
    return command != "" and "python" not in command


def check_daemon(pid_file: str, pid: int | None) -> Finding:
    """Judge whether a daemon runs, and which; the pid is that of the file's locker."""
    if pid is None:
        return Finding(
            Level.FAIL,
            f"no daemon runs (nobody has {pid_file} locked); start it with"
            " /usr/lib/ganeti/daemon-util start ganeti-kvmd",
        )
    if is_ganetis(pid):
        return Finding(
            Level.WARN,
            f"a daemon runs, pid {pid}, but it is Ganeti's own ({command_of(pid)}); to"
            " have this one: /usr/lib/ganeti/daemon-util stop ganeti-kvmd, then start",
        )
    try:
        with open(f"/proc/{pid}/limits", encoding="ascii") as limits:
            words = next(line for line in limits if line.startswith("Max open files"))
    except OSError as error:
        return Finding(Level.OK, f"a daemon runs, pid {pid} ({error.strerror})")
    limit = words.split()[3]
    return Finding(Level.OK, f"a daemon runs, pid {pid}, with up to {limit} open files")


def check_user_shutdown_parameter(ssconf_dir: str) -> Finding:
    """Judge the hypervisor parameter user_shutdown, which instances may override."""
    path = os.path.join(ssconf_dir, "ssconf_hvparams_kvm")
    remedy = "gnt-cluster modify -H kvm:user_shutdown=true"
    try:
        lines = read_ssconf(path).splitlines()
    except (OSError, ValueError) as error:
        return Finding(
            Level.WARN,
            f"{path}: cannot be read: {reason_of(error)}; to write it anew: gnt-cluster"
            " redist-conf",
        )
    if "user_shutdown=True" in lines:
        return Finding(Level.OK, f"{path}: user_shutdown=True")
    return Finding(
        Level.WARN,
        f"{path}: user_shutdown is not True; Ganeti restarts what users shut down,"
        f" unless the instance says otherwise: {remedy}",
    )


def check_node(options: Options) -> Iterator[Finding]:
    """Judge all that detection on this node hangs on."""
    if not options.no_cluster_checks:
        yield from judge_cluster(options.ssconf_dir, names_of_node())
        yield check_user_shutdown_parameter(options.ssconf_dir)
    daemon = lock_holder(options.pid_file)
    yield check_daemon(options.pid_file, daemon)
    yield check_inotify(options.control_dir)
    directory = check_directory(options.control_dir)
    yield directory
    if directory.level is Level.OK:
        suffixes = SUFFIXES[options.socket_suffix]
        if daemon is not None and is_ganetis(daemon):
            daemon = None
        yield from check_instances(options.control_dir, suffixes, daemon)


def check(options: Options) -> int:
    """Print a line per finding; return 0 if detection works, else 1."""
    works = True
    for finding in check_node(options):
        broken = finding.level in {Level.FAIL, Level.BROKEN}
        works &= not broken
        label = Level.FAIL.value if broken else finding.level.value
        print(f"{label:5} {printable(finding.text)}")
    return 0 if works else 1


# ---- The service: start and end ------------------------------------------------------


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


def raise_descriptor_limit() -> int:
    """Raise the limit of open files as far as it goes, and return it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The sysctl fs.nr_open may have been lowered below it since.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


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
