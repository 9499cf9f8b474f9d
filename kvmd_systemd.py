"""systemd as seen by a service: status messages and the descriptor store.

Owns the notify socket (sd_notify(3)), the watchdog's interval (sd_watchdog_enabled(3))
and what systemd has not taken yet. A full or dead notify socket never blocks the
daemon: what was not taken is sent again. Knows that sockets are stored, each named by
its inode number; nothing of what is said on them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence

NEVER = float("inf")
#: Seconds between attempts to send what systemd did not take.
RETRY_INTERVAL = 1.0
#: Most names that are queued for removal while systemd takes no messages. Beyond that
#: the oldest are dropped: systemd gives those descriptors back at the next start.
MOST_DISCARDED = 1000
#: What the name of a kept connection begins with.
PREFIX = "connection-"


class Notifier:
    """Sends systemd messages about the service's state."""

    #: How often a message is sent while systemd's queue is full; the same for the next
    #: messages, until systemd takes one at once; seconds between such attempts.
    ATTEMPTS = 10
    LATER_ATTEMPTS = 1
    ATTEMPT_INTERVAL = 0.001

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Take NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID."""
        address = environment.get("NOTIFY_SOCKET", "")
        #: Whether systemd, or what stands for it, started this process.
        self.is_enabled = address[:1] in {"/", "@"}
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        #: Seconds between keep-alive pings: half of what the unit allows.
        self.watchdog_interval = NEVER
        #: The status that systemd has taken last, "" if it was told of a reload since.
        self._status = ""
        self._next_ping = NEVER
        microseconds = environment.get("WATCHDOG_USEC", "")
        watched_pid = environment.get("WATCHDOG_PID", str(os.getpid()))
        watched = microseconds.isdecimal() and watched_pid == str(os.getpid())
        if watched and int(microseconds) > 0:
            self.watchdog_interval = int(microseconds) / 2e6
        if self.is_enabled:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._attempts = self.ATTEMPTS

    def close(self) -> None:
        """Send nothing more."""
        if self.is_enabled:
            self.is_enabled = False
            self._socket.close()

    def send(self, *assignments: str, fds: Sequence[int] = ()) -> bool:
        """Send lines like READY=1, and descriptors with them; tell whether that worked.

        A failure is no error: the caller sends again later, or does without.
        """
        if not self.is_enabled:
            return False
        message = ["\n".join(assignments).encode()]
        # Not socket.send_fds: that drops the address.
        packed = struct.pack(f"{len(fds)}i", *fds)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)] if fds else []
        attempts, self._attempts = self._attempts, self.LATER_ATTEMPTS
        for attempt in range(attempts):
            if attempt > 0:
                time.sleep(self.ATTEMPT_INTERVAL)
            try:
                self._socket.sendmsg(
                    message, rights, socket.MSG_DONTWAIT, self._address
                )
            except BlockingIOError:
                continue
            except OSError:
                break
            if attempt == 0:
                self._attempts = self.ATTEMPTS
            return True
        return False

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

    def send_ping(self) -> None:
        """Send the watchdog's keep-alive ping if it is due."""
        now = time.monotonic()
        if self.watchdog_interval == NEVER or now < self._next_ping < NEVER:
            return
        taken = self.send("WATCHDOG=1")
        interval = self.watchdog_interval
        self._next_ping = now + (interval if taken else min(interval, RETRY_INTERVAL))

    def next_message(self) -> float:
        """Return when something has to be sent next (time.monotonic())."""
        if self.is_enabled and not self._status:
            return min(self._next_ping, time.monotonic() + RETRY_INTERVAL)
        return self._next_ping


class DescriptorStore:
    """Connections that systemd keeps open while the service is down.

    See sd_pid_notify_with_fds(3). Each has a name of its own.
    """

    def __init__(self, notifier: Notifier, discarded: Iterable[str] = ()) -> None:
        """Begin with the names whose removal an earlier daemon could not send."""
        self._notifier = notifier
        #: Name -> descriptor of what systemd has not taken yet.
        self._unstored: dict[str, int] = {}
        #: Names of what is to be kept no longer, which systemd was not told yet.
        self.discarded = list(discarded) if notifier.is_enabled else []

    @property
    def is_enabled(self) -> bool:
        """Whether there is a systemd that may keep descriptors."""
        return self._notifier.is_enabled

    @property
    def is_idle(self) -> bool:
        """Whether systemd has taken all that it was sent."""
        return not self.discarded and not self._unstored

    def store(self, connection: socket.socket) -> None:
        """Have a connection kept, also when its peer has closed it (FDPOLL=0)."""
        if self.is_enabled:
            self._unstored[connection_name(connection)] = connection.fileno()
            self.catch_up()

    def close(self, connection: socket.socket) -> None:
        """Close a connection, also where it is kept."""
        if self.is_enabled:
            self.discard(connection_name(connection))
            # systemd may hold a copy, so closing ours does not end the connection.
            # Without systemd, another process may share the socket.
            with contextlib.suppress(OSError):  # the peer has closed it already
                connection.shutdown(socket.SHUT_RDWR)
        connection.close()

    def discard(self, name: str) -> None:
        """Have a descriptor kept no longer."""
        self._unstored.pop(name, None)
        self.discarded.append(name)
        del self.discarded[:-MOST_DISCARDED]
        self.catch_up()

    def catch_up(self) -> bool:
        """Send what systemd has not taken yet; tell whether it has all."""
        while self.discarded:
            if not self._notifier.send(
                "FDSTOREREMOVE=1", f"FDNAME={self.discarded[-1]}"
            ):
                return False
            self.discarded.pop()
        while self._unstored:
            name, fd = next(iter(self._unstored.items()))
            if not self._notifier.send(
                "FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd]
            ):
                return False
            del self._unstored[name]
        return True


def connection_name(connection: socket.socket) -> str:
    """Return the name under which a connection is kept: it holds its inode number.

    The number stays with the socket in whichever process it is.
    """
    return f"{PREFIX}{os.fstat(connection.fileno()).st_ino}"


def stored_connections(environment: Mapping[str, str]) -> set[int]:
    """Return the inode numbers of the connections that systemd gives back.

    From their names (sd_listen_fds(3)).
    """
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return set()
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    numbers = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    return {int(number) for number in numbers if number.isdecimal()}
