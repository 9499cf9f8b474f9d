"""The log: a file, stderr, syslog; what may be said, and how often.

Lines are queued, and written when a turn of the loop has done all else: a disk that
is slow or frozen makes the next verdicts late, but none that could be read before. No
module or codec is imported when it is needed: Python may be upgraded under the daemon.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence

from kvmd_file import open_regular_file
from kvmd_version import DAEMON_NAME

Sink = Callable[[str], None]

SYSLOG_SOCKET = "/dev/log"
#: Level -> priority, of the facility LOG_DAEMON (syslog(3)).
SYSLOG_PRIORITIES = {"ERROR": 3 << 3 | 3, "WARNING": 3 << 3 | 4, "INFO": 3 << 3 | 6}

#: Calls in a traceback.
LONGEST_TRACEBACK = 30

UNOPENED = "the log file can't be opened"
UNWRITABLE = "the log file can't be written"


def printable(text: str) -> str:
    """Return the text with all that is not printable escaped, on one line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def traceback_of(error: BaseException) -> list[str]:
    """Return the lines of an exception's traceback, with the innermost calls.

    Not the traceback module's: it reads the program's text, which may be gone by now,
    or another version's.
    """
    calls: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        calls.append(f"  {code.co_filename}, line {trace.tb_lineno}, in {code.co_name}")
        trace = trace.tb_next
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 (whatever it is, it must not hide the first one)
        text = "(what it says can't be told)"
    last = f"{type(error).__name__}: {text}".splitlines()
    return ["Traceback (most recent call last):", *calls[-LONGEST_TRACEBACK:], *last]


class Log:
    """Log lines as Ganeti's Python daemons write them, to a file and elsewhere.

    Not the logging module: importing it takes about 10 ms and 1.7 MiB, of the 28 ms and
    12 MiB that all may take. What may be said about one instance is limited, for a
    guest may have a hand in it. Without its file, the log goes to the fallbacks.
    """

    #: Lines about one instance within PERIOD seconds, not counting debug messages.
    LINES_PER_PERIOD = 60
    PERIOD = 60.0
    #: Bytes that may be queued: the verdicts on some thousand guests at once.
    QUEUE_LIMIT = 1 << 20

    def __init__(
        self, path: str | None, sinks: list[Sink], fallbacks: Sequence[Sink] = ()
    ) -> None:
        """Log to a file, if there is a path, and to sinks: calls with a line."""
        self.path = path
        self.debugging = False
        self.sinks = sinks
        self._fallbacks = fallbacks
        self._fd: int | None = None
        #: The file at the path is not the one that is open.
        self._overdue = False
        #: The last line in the file lacks its end.
        self._torn = False
        #: The lines that are not written yet. In one piece, for of many small ones the
        #: allocator would not give back the room.
        self._queue = bytearray()
        #: The second (of time.time()) of the last line, and how it is written.
        self._second, self._date = -1, ""
        self._troubles: set[str] = set()
        #: Instance -> lines in the period that ends then (time.monotonic()).
        self._lines: dict[str, int] = {}
        self._end_of_period = 0.0

    def open(self) -> None:
        """Open the file, or go on without it until `reopen` or `retry` can.

        Raises OSError if one was open before, and keeps that.
        """
        if self.path is None:
            return
        self._overdue = True
        try:
            fd = open_regular_file(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            if self._fd is not None:
                raise
            self.begin_trouble(
                UNOPENED,
                f"{self.path}: {error.strerror}; logging to syslog, and trying again at"
                " SIGHUP and at each rescan",
            )
            return
        self._overdue = self._torn = False
        self._troubles.discard(UNOPENED)
        if self._fd is None:
            self._fd = fd
        else:
            os.dup2(fd, self._fd, inheritable=False)
            os.close(fd)

    def reopen(self) -> None:
        """Open the file anew, as logrotate wants it."""
        try:
            self.open()
        except OSError as error:
            self.error(
                f"cannot reopen the log file {self.path}: {error.strerror}; keeping the"
                " old one"
            )
        else:
            self._tell_of_reopening()

    def retry(self) -> None:
        """Open the file if that has failed; say so only if it works now."""
        if self._overdue:
            with contextlib.suppress(OSError):
                self.open()
                self._tell_of_reopening()

    def _tell_of_reopening(self) -> None:
        if not self._overdue:
            self.info("log file reopened")

    def debug(self, message: str, instance: str | None = None) -> None:
        """Log what only `--debug` shows."""
        if self.debugging:
            self._put("DEBUG", f"{instance}: {message}" if instance else message)

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
        self.error(message, instance)
        with contextlib.suppress(Exception):  # the first one is what matters
            for line in traceback_of(error):
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
            self._put(level, message)
            return
        if time.monotonic() >= self._end_of_period:
            self._begin_period()
        count = self._lines[instance] = self._lines.get(instance, 0) + 1
        if count <= self.LINES_PER_PERIOD:
            self._put(level, f"{instance}: {message}")
        elif count == self.LINES_PER_PERIOD + 1:
            self._put(
                "WARNING",
                f"{instance}: more than {self.LINES_PER_PERIOD} lines within"
                f" {self.PERIOD:.0f} s; leaving out the next ones",
            )

    def _begin_period(self) -> None:
        for instance, count in self._lines.items():
            if count > self.LINES_PER_PERIOD:
                left_out = count - self.LINES_PER_PERIOD
                self._put("INFO", f"{instance}: lines left out: {left_out}")
        self._lines.clear()
        self._end_of_period = time.monotonic() + self.PERIOD

    def _put(self, level: str, message: str) -> None:
        now = time.time()
        if int(now) != self._second:
            self._second = int(now)
            self._date = time.strftime("%F %T", time.localtime(now))
        line = (
            f"{self._date},{int(now % 1 * 1000):03d}: {DAEMON_NAME}"
            f" pid={os.getpid()} {level} {printable(message)}\n"
        )
        self._queue += line.encode()
        if len(self._queue) > self.QUEUE_LIMIT:
            self.flush()

    def flush(self) -> None:
        """Write all that is queued, in one go. Never raises."""
        with contextlib.suppress(Exception):  # what can't be logged can't be told
            while self._queue:  # of a trouble with the file, a line tells at once
                lines, self._queue = self._queue, bytearray()
                sinks = [*self.sinks]
                if self.path is not None and not self._append(lines):
                    sinks += self._fallbacks
                for line in lines.decode().splitlines() if sinks else []:
                    for sink in sinks:
                        sink(line)

    def _append(self, lines: bytearray) -> bool:
        """Write lines to the file; tell whether it has them all."""
        if self._fd is None:
            return False
        data = b"\n" * self._torn + bytes(lines)
        try:
            while data:
                written = os.write(self._fd, data)
                self._torn = not data[:written].endswith(b"\n")
                data = data[written:]
        except OSError as error:
            self.begin_trouble(UNWRITABLE, f"{error.strerror}; logging to syslog too")
            return False
        self.end_trouble(UNWRITABLE)
        return True


def write_to_stderr(line: str) -> None:
    """Write a line to stderr, and lose it if it can't be written."""
    with contextlib.suppress(OSError):
        os.write(2, line.encode() + b"\n")


def write_to_stdout(text: str) -> None:
    """Write text and a line feed to stdout; lose it if its reader has gone.

    Ends the program if it can't be written for another reason.
    """
    try:
        os.write(1, text.encode() + b"\n")
    except BrokenPipeError:
        pass  # as in `| head`
    except OSError as error:
        sys.exit(f"{DAEMON_NAME}: cannot write to stdout: {error.strerror}")


def stderr_sink(line: str) -> None:
    """Write a log line to stderr, cut to what never blocks; not at all if it would."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if poll.poll(0):
        write_to_stderr(line[: select.PIPE_BUF // 4 - 1])  # up to 4 bytes a character


def syslog_sink(line: str) -> None:
    """Send a log line to syslog, unless it is a debug message.

    It sends what syslog(3) does, but that waits as long as a syslogd is stuck.
    """
    *_, level, message = line.split(" ", 5)
    if level not in SYSLOG_PRIORITIES:
        return
    date = time.strftime("%b %e %T")
    header = f"<{SYSLOG_PRIORITIES[level]}>{date} {DAEMON_NAME}[{os.getpid()}]"
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as sender:
        sender.sendto(f"{header}: {message}".encode(), SYSLOG_SOCKET)
