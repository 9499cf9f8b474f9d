"""systemd's side of the service, as a client: sd_notify(3) and the descriptor store."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NEVER = float("inf")


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
