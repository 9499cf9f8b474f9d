"""The log: a file, stderr, syslog; what may be said, and how often."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time

from kvmd_version import DAEMON_NAME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SYSLOG_SOCKET = "/dev/log"


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


def write_to_stderr(line: str) -> None:
    """Write a line to stderr, and lose it if it can't be written."""
    with contextlib.suppress(OSError):
        os.write(2, line.encode() + b"\n")


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
