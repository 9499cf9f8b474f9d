"""The process: pid file, detaching, priority, limits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal

from kvmd_log import write_to_stderr
from kvmd_version import DAEMON_NAME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

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


def report_to_nobody(problem: str) -> None:
    """Take what `detach` has a function for, where no starter waits for it."""


def raise_descriptor_limit() -> int:
    """Raise the limit of open files as far as it goes, and return it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The sysctl fs.nr_open may have been lowered below it since.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
