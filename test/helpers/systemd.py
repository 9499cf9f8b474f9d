"""What systemd is to a service that it starts: notify socket and descriptor store.

As systemd 252 has it for a unit with Type=notify, NotifyAccess=main, Restart= and
FileDescriptorStoreMax=: see sd_notify(3), sd_pid_notify_with_fds(3), sd_listen_fds(3).
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from daemon import Daemon
from deadline import SECONDS

# Stored descriptors have numbers above all that a service is started with.
_LOWEST_STORED = 256

# Run by an interpreter of its own, between fork and exec as it were: moves descriptors
# (the first argument, separated by commas) to 3, 4 and so on, and becomes the service.
_EXECUTOR = """
import os, sys
for number, fd in enumerate(sys.argv[1].split(","), 3):
    os.dup2(int(fd), number)
    os.close(int(fd))
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""

Result = TypeVar("Result")


class Stored(NamedTuple):
    """A descriptor in the store."""

    name: str
    fd: int
    polled: bool


class Systemd:
    """The store of one service, and the thread that takes the service's messages."""

    def __init__(self, directory: Path, store_max: int = 64) -> None:
        self.notify_socket = directory / "notify"
        self._store_max = store_max
        self._store: list[Stored] = []
        self._main_pid: int | None = None
        self._idle = threading.Event()
        # Held by who waits for that, and by who uses the store.
        self._waiting = threading.Lock()
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(self.notify_socket))
        self._epoll = select.epoll()
        self._epoll.register(self._socket, select.EPOLLIN)
        self._ending, self._end = os.pipe()
        self._epoll.register(self._ending, select.EPOLLIN)
        self._thread = threading.Thread(target=self._serve)

    @property
    def names(self) -> list[str]:
        """The names of what is in the store, the newest first, as FDNAME= gave them."""
        return self.use_store(lambda store: [stored.name for stored in store])

    def use_store(self, use: Callable[[list[Stored]], Result]) -> Result:
        """Return what a function makes of the store, which can't change meanwhile.

        All that the service has sent before is in it.
        """
        self._wait_until_idle()
        with self._lock:
            return use(self._store)

    def put(self, name: str, fd: int) -> None:
        """Put a copy of a descriptor into the store, as if the service had sent it."""
        self.use_store(lambda _: self._add(name, fd, polled=False))

    def remove(self, name: str) -> None:
        """Remove from the store what has this name, as if the service had said so."""
        self.use_store(lambda _: self._remove("name", name))

    def spawn(
        self, command: list[str], environment: dict[str, str], stderr: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start the service; it gets all that is in the store, the newest first.

        What its dead predecessor has sent is taken note of before.
        """
        self._wait_until_idle()
        with self._lock:
            process = self._spawn(command, environment, stderr)
            self._main_pid = process.pid
        return process

    def _spawn(
        self, command: list[str], environment: dict[str, str], stderr: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        environment = {**environment, "NOTIFY_SOCKET": str(self.notify_socket)}
        fds = [stored.fd for stored in self._store]
        if fds:
            environment["LISTEN_FDS"] = str(len(fds))
            environment["LISTEN_FDNAMES"] = ":".join(
                stored.name for stored in self._store
            )
            numbers = ",".join(map(str, fds))
            command = [sys.executable, "-ISc", _EXECUTOR, numbers, *command]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            env=environment,
            pass_fds=fds,
        )

    def _wait_until_idle(self) -> None:
        """Wait until all that was sent so far has been taken note of."""
        with self._waiting:
            self._idle.clear()
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
                own.sendto(b"", str(self.notify_socket))
            if not self._idle.wait(SECONDS):
                raise TimeoutError("the notify socket is not read")

    def _serve(self) -> None:
        while True:
            ((fd, _),) = self._epoll.poll(maxevents=1)
            if fd == self._ending:
                return
            with self._lock:
                if fd == self._socket.fileno():
                    self._take_message()
                else:
                    self._remove("fd", fd)

    def _take_message(self) -> None:
        # As many descriptors as Linux sends at once, and struct ucred.
        room = socket.CMSG_SPACE(253 * 4) + socket.CMSG_SPACE(12)
        data, ancillary, _, _ = self._socket.recvmsg(4096, room)
        fds: list[int] = []
        sender = None
        for _, kind, content in ancillary:
            if kind == socket.SCM_RIGHTS:
                fds += struct.unpack(f"{len(content) // 4}i", content)
            elif kind == socket.SCM_CREDENTIALS:
                sender, _, _ = struct.unpack("3i", content)
        if sender == os.getpid():
            self._idle.set()
        elif sender == self._main_pid:
            self._obey(data.decode().split("\n"), fds)
        for fd in fds:
            os.close(fd)

    def _obey(self, lines: list[str], fds: list[int]) -> None:
        name = dict(line.split("=", 1) for line in lines).get("FDNAME")
        if "FDSTOREREMOVE=1" in lines:
            self._remove("name", name)
        elif "FDSTORE=1" in lines:
            for fd in fds:
                self._add(name or "stored", fd, polled="FDPOLL=0" not in lines)

    def _add(self, name: str, fd: int, polled: bool) -> None:
        """Keep a copy of a descriptor, unless the store is full or has it already."""
        known = any(os.path.sameopenfile(fd, stored.fd) for stored in self._store)
        if known or len(self._store) >= self._store_max:
            return
        copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOWEST_STORED)
        try:
            if polled:
                self._epoll.register(copy, 0)  # EPOLLHUP and EPOLLERR are implied
        except PermissionError:
            polled = False  # there is nothing to be polled in a memory file
        self._store.insert(0, Stored(name, copy, polled))

    def _remove(self, field: str, value: object) -> None:
        for stored in [s for s in self._store if getattr(s, field) == value]:
            self._store.remove(stored)
            if stored.polled:
                self._epoll.unregister(stored.fd)
            os.close(stored.fd)

    def __enter__(self) -> Systemd:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._end, b"x")
        self._thread.join()
        for stored in self._store:
            os.close(stored.fd)
        self._epoll.close()
        self._socket.close()
        os.close(self._ending)
        os.close(self._end)


@contextmanager
def full_notify_socket(address: Path) -> Iterator[socket.socket]:
    """Give a notify socket whose queue is full; it is read by who is given it."""
    with ExitStack() as ending:
        manager = ending.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(address))
        manager.settimeout(SECONDS)
        is_full = False
        while not is_full:
            # One sender's own buffer may be full before the queue is.
            sender = ending.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            )
            sent = fill(sender, address)
            is_full = sent == 0
        yield manager


def fill(sender: socket.socket, address: Path) -> int:
    """Send until no more is taken; return how often that was."""
    for count in itertools.count():
        try:
            sender.sendto(b"full", socket.MSG_DONTWAIT, str(address))
        except BlockingIOError:
            return count
    raise AssertionError("counted to the end")


def take_descriptors(manager: socket.socket, count: int) -> list[str]:
    """Read a notify socket until so many descriptors have come; return their kinds."""
    kinds: list[str] = []
    while len(kinds) < count:
        message, fds, _, _ = socket.recv_fds(manager, 4096, 1)
        for fd in fds:
            os.close(fd)
            kinds += re.findall(r"FDNAME=([a-z]+)-", message.decode())
    return kinds


class Service(Daemon):
    """The daemon as systemd starts it; a start after a crash begins with the store.

    It looks at the directory at its start alone, so that no rescan makes good for what
    is taken over wrongly.
    """

    def __init__(self, systemd: Systemd, control_dir: Path, **options: Any) -> None:
        super().__init__(control_dir, "--rescan-interval=0", **options)
        self.systemd = systemd

    def _spawn(self, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        return self.systemd.spawn(self._command, dict(os.environ), stderr)
