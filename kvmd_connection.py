"""One connection to a monitor socket: negotiation, reading, what a peer may cost.

Owns the socket and the protocol's state. Where systemd keeps connections, what is read
is only looked at (MSG_PEEK) until `consume` is called: a daemon that is killed before
leaves it in the socket. The peer is a QEMU that its guest may have taken over: what it
makes the daemon do is limited, and beyond that it is not read for a while. Other limits
on a hostile guest are in `kvmd_qmp` (a line's length), `kvmd_daemon` (work per turn),
`kvmd_loop.limited_stalls` and `kvmd_log` (lines per instance).

Knows nothing of instances and verdicts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from binascii import crc32

from kvmd_qmp import CAREFUL_READ_SIZE, COMMANDS, READ_SIZE, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: A token bucket limits what a peer may cost. It holds 128 tokens, and gets one back
#: each TOKEN_INTERVAL seconds. A read that has to be parsed takes one, and one more for
#: each TOKEN_SIZE bytes; so does a short part of a line, and a record that has to be
#: written, with one more for each SAVED_TOKEN_SIZE bytes. An honest QEMU says less.
TOKEN_INTERVAL = 0.25
#: Seconds in which an empty bucket fills up.
FILL_TIME = 128 * TOKEN_INTERVAL
TOKEN_SIZE = 256
SAVED_TOKEN_SIZE = 4096
#: A peer whose bucket takes longer than this to fill up comes after the others.
COSTLY_FILL_TIME = FILL_TIME / 8
#: Seconds for which a peer is left alone at least whose bucket is empty.
SHORTEST_PAUSE = 0.1
#: Seconds for which a peer is left alone that sends descriptors (`limited_stalls`).
HOSTILE_PAUSE = 10.0

#: As a plain number: an operation of an enum.Flag takes as long as a system call.
CONTROL_TRUNCATED = int(socket.MSG_CTRUNC)


class Connection:
    """A non-blocking connection to QEMU."""

    __slots__ = ("_flags", "_full_at", "_peeked", "protocol", "socket")

    def __init__(
        self, connected: socket.socket, protocol: Protocol, peek: bool
    ) -> None:
        """Take over a connected socket, and what is known of what was read of it."""
        connected.setblocking(False)
        # A byte out of band (unix(7)) would be passed over by a look at what there is,
        # and be reported as readable for ever.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self.socket = connected
        self.protocol = protocol
        self._flags = socket.MSG_PEEK if peek else 0
        #: What was looked at, and is not taken out yet.
        self._peeked = b""
        #: When the token bucket will be full again (time.monotonic()).
        self._full_at = 0.0

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self.socket.fileno()

    @property
    def inode(self) -> int:
        """The socket's inode number, which it keeps in whichever process it is."""
        return os.fstat(self.fileno()).st_ino

    @property
    def peer_pid(self) -> int:
        """QEMU's pid (SO_PEERCRED of unix(7))."""
        credentials = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], sys.byteorder)

    def negotiate(self) -> None:
        """Send the commands, at once: QEMU tells nobody of events before that."""
        # The peer may have closed already, and its last words may wait to be read.
        with contextlib.suppress(OSError):
            self.socket.send(COMMANDS)

    def read(self) -> tuple[bytes, bool] | None:
        """Return what one read gives, b"" at the end, and whether descriptors came.

        None if there is nothing to read.
        """
        try:
            data, _, flags, _ = self.socket.recvmsg(
                self.protocol.read_size, 0, self._flags
            )
        except BlockingIOError:
            return None
        except OSError:
            return b"", False  # what had arrived before the error was read before
        if self._flags:
            # The beginning of a line is left to the kernel, if a whole one comes first.
            data = data[: data.rfind(b"\n") + 1] or data
            self._peeked = data
        return data, bool(flags & CONTROL_TRUNCATED)

    def consume(self) -> None:
        """Take out of the socket what was only looked at before."""
        if self._peeked:
            self.socket.recv(len(self._peeked))
            self._peeked = b""

    def export(self) -> dict[str, Any]:
        """Return what the record of its instance has of it.

        `peeked` is length and checksum of the bytes that `consume` will remove.
        """
        record = {
            "connection": self.inode,
            "pid": self.peer_pid,
            "protocol": self.protocol.export(),
        }
        if self._peeked:
            record["peeked"] = [len(self._peeked), crc32(self._peeked)]
        return record

    def consume_peeked(self, peeked: list[int] | None) -> None:
        """Remove what an earlier daemon acted on, and was killed before it removed it.

        QEMU does not say the same twice, for each event has its time stamp.
        """
        if peeked is None:
            return
        length, checksum = peeked
        try:
            data = self.socket.recv(READ_SIZE, socket.MSG_PEEK)[:length]
        except OSError:
            return
        if [len(data), crc32(data)] == [length, checksum]:
            self.socket.recv(length)

    @property
    def is_costly(self) -> bool:
        """Whether the peer has used up a good part of its tokens."""
        return self._full_at - time.monotonic() > COSTLY_FILL_TIME

    def charge(self, data: bytes, size: int, was_saved: bool) -> float:
        """Take tokens for what was read; return the seconds to leave the peer alone.

        `size` is that of the data with the beginning of its first line, which was read
        before; `was_saved` tells whether a record had to be written.
        """
        tokens = 0
        if self.protocol.read_size == CAREFUL_READ_SIZE:
            tokens = 1 + size // TOKEN_SIZE
        elif len(data) < TOKEN_SIZE and b"\n" not in data:
            tokens = 1
        if was_saved:
            tokens += 1 + self.protocol.pending // SAVED_TOKEN_SIZE
        if not tokens:
            return 0.0
        now = time.monotonic()
        self._full_at = max(self._full_at, now) + tokens * TOKEN_INTERVAL
        missing = self._full_at - now - FILL_TIME
        return max(missing, SHORTEST_PAUSE) if missing > 0 else 0.0

    def export_kept(self) -> dict[str, Any] | None:
        """Return what the journal must have before `consume`; None without peeking."""
        return self.protocol.export() if self._flags else None
