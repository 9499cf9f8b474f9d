"""The process: pid file, detaching, priority, limits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import stat
import struct
from collections.abc import Callable

from kvmd_file import is_at_path, open_regular_file
from kvmd_log import write_to_stderr
from kvmd_version import DAEMON_NAME

OOM_SCORE_ADJ = "/proc/self/oom_score_adj"
#: Niceness of the daemon: on a busy node its file has to be there before QEMU is gone.
NICENESS = -10


#: struct flock of fcntl(2), padded to its alignment.
RECORD_LOCK = struct.Struct("hhqqi0q")


class StartError(Exception):
    """The daemon can't start; the message says why and what to do."""


class PidFile:
    """The pid file, locked as long as the daemon lives.

    A POSIX record lock as Ganeti's own daemon takes it, so that the two exclude each
    other. It is the process's, not passed on over fork(2), and gone as soon as any
    descriptor of the file is closed (fcntl(2)).
    """

    ATTEMPTS = 10

    def __init__(self, path: str, inherited: int | None = None) -> None:
        """Lock the file, which may be open already, and write the pid.

        Raises StartError.
        """
        self.path = path
        try:
            self.fd = self._open_and_lock() if inherited is None else inherited
            self._lock(self.fd)
            os.set_inheritable(self.fd, False)
            if os.geteuid() == 0:
                # start-stop-daemon acts on no pid file that others than root may write.
                os.fchown(self.fd, 0, 0)
            os.fchmod(self.fd, 0o600)
            # It is never empty for who reads it during a restart in place.
            os.ftruncate(self.fd, os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0))
        except OSError as error:
            raise StartError(
                f"cannot write the pid file {path}: {error.strerror}"
            ) from error

    def _open_and_lock(self) -> int:
        """Return a descriptor of the locked file, which is the one at the path."""
        for _ in range(self.ATTEMPTS):
            fd = open_regular_file(self.path, os.O_RDWR | os.O_CREAT)
            self._lock(fd)
            if is_at_path(fd, self.path):
                return fd
            os.close(fd)  # its last holder has removed it in between
        raise StartError(f"{self.path} can't be locked: somebody keeps removing it")

    def _lock(self, fd: int) -> None:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise StartError(
                f"another daemon runs already, with pid {holder or 'unknown'}: it"
                f" holds the lock on {self.path}"
            ) from None

    def remove(self) -> None:
        """Remove the file, unless another one stands there, or it can't be removed."""
        with contextlib.suppress(OSError):  # only the lock counts
            if is_at_path(self.fd, self.path):
                os.unlink(self.path)


def is_own_pid_file(fd: int, path: str) -> bool:
    """Tell whether a descriptor is of the pid file, and that holds this process's pid.

    Then this program was started in place by the one before (execve(2)).
    """
    if not is_at_path(fd, path):
        return False
    is_writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    return is_writable and os.pread(fd, 20, 0) == f"{os.getpid()}\n".encode()


def sort_inherited(path: str) -> tuple[int | None, dict[int, int]]:
    """Close all descriptors above 2, but for this process's pid file and all sockets.

    Returns the pid file's, None if it is not open, and one of each socket, by inode
    number.
    """
    pid_file = None
    sockets = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd <= 2:
            continue
        with contextlib.suppress(OSError):
            status = os.fstat(fd)
            if stat.S_ISSOCK(status.st_mode) and status.st_ino not in sockets:
                sockets[status.st_ino] = fd
                continue
            if is_own_pid_file(fd, path):
                pid_file = fd
                continue
        with contextlib.suppress(OSError):  # the one that lists them is closed by now
            os.close(fd)
    return pid_file, sockets


def lock_holder(path: str) -> int | None:
    """Return the pid that has a file locked, None if nobody has or no file is there.

    The kernel is asked by means of the file, for what /proc/locks has as its device is
    not what stat(2) has on overlayfs. Not to be called by the holder itself: closing
    the file would end the lock. Raises OSError.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        return None
    question = RECORD_LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        kind, _, _, _, pid = RECORD_LOCK.unpack(
            fcntl.fcntl(fd, fcntl.F_GETLK, question)
        )
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else int(pid)


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


def resist_oom_killer() -> None:
    """Be killed last when memory runs out (proc(5)), as far as that is permitted.

    Without the right to lower its score, a process may still go back to the lowest one
    that somebody with the right gave it, and /proc does not tell which one that is.
    """
    with contextlib.suppress(OSError), open(OOM_SCORE_ADJ, encoding="ascii") as file:
        for score in range(-1000, int(file.read()), 100):
            with contextlib.suppress(OSError):
                with open(OOM_SCORE_ADJ, "w", encoding="ascii") as score_file:
                    score_file.write(str(score))
                return


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


def ignore_report(problem: str) -> None:
    """Take the report on the start where no starter waits for it."""


def raise_descriptor_limit() -> int:
    """Raise the limit of open files as far as it goes, and return it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The sysctl fs.nr_open may have been lowered below it since.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
