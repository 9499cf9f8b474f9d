"""One connection to a monitor socket: negotiation, reading, what a peer may cost.

Owns the socket and the protocol's state. Where systemd keeps connections, what is read
is only looked at (MSG_PEEK) until `take` is called: a daemon that is killed before
leaves it in the socket. Whatever costs more than a glance is charged to the peer, which
is a QEMU that its guest may have taken over, and a peer in debt is to be left alone.
Knows nothing of instances and verdicts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from binascii import crc32

from kvmd_qmp import CAREFUL_READ_SIZE, COMMANDS, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Seconds in which a peer pays for one piece of work, and for how many at once it has
#: credit. A read that has to be parsed is a piece, and one more for each PIECE_SIZE
#: bytes; so is a short part of a line, and a record that has to be written, and one more
#: for each SAVED_PIECE_SIZE bytes in it. QEMU says less of interest in a guest's life.
PIECE_PRICE = 0.25
CREDIT = 128 * PIECE_PRICE
PIECE_SIZE = 256
SAVED_PIECE_SIZE = 4096
#: Seconds of that credit after which a peer comes after the others.
TOLERATED_DEBT = CREDIT / 8
#: Seconds for which a peer is left alone at least that has used up its credit.
SHORTEST_PAUSE = 0.1
#: Seconds for which a peer is left alone that sends descriptors (`limited_stalls`).
HOSTILE_PAUSE = 10.0

#: As a plain number: an operation of an enum.Flag takes as long as a system call.
CONTROL_TRUNCATED = int(socket.MSG_CTRUNC)


class Connection:
    """A non-blocking connection to QEMU."""

    __slots__ = ("_debt_until", "_flags", "_peeked", "protocol", "socket")

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
        #: When the peer will have paid for what it had parsed (time.monotonic()).
        self._debt_until = 0.0

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

    def take(self) -> None:
        """Take out of the socket what was only looked at before."""
        if self._peeked:
            self.socket.recv(len(self._peeked))
            self._peeked = b""

    def export_peeked(self) -> list[int] | None:
        """Return what tells the bytes that `take` is to take out: number and checksum."""
        return [len(self._peeked), crc32(self._peeked)] if self._peeked else None

    def take_peeked(self, peeked: list[int] | None) -> None:
        """Take out what an earlier daemon acted on, if it did not live to do so.

        QEMU does not say the same twice, for each event has its time stamp.
        """
        if peeked is None:
            return
        length, checksum = peeked
        try:
            data = self.socket.recv(length, socket.MSG_PEEK)
        except OSError:
            return
        if [len(data), crc32(data)] == [length, checksum]:
            self.socket.recv(length)

    @property
    def is_costly(self) -> bool:
        """Whether the peer has used up a good part of its credit."""
        return self._debt_until - time.monotonic() > TOLERATED_DEBT

    def charge(self, data: bytes, size: int, was_saved: bool) -> float:
        """Charge the peer for what was read; return the seconds to leave it alone.

        `size` is that of the data with the beginning of its first line, which was read
        before; `was_saved` tells whether a record had to be written.
        """
        pieces = 0
        if self.protocol.read_size == CAREFUL_READ_SIZE:
            pieces = 1 + size // PIECE_SIZE
        elif len(data) < PIECE_SIZE and b"\n" not in data:
            pieces = 1
        if was_saved:
            pieces += 1 + self.protocol.pending // SAVED_PIECE_SIZE
        if not pieces:
            return 0.0
        now = time.monotonic()
        self._debt_until = max(self._debt_until, now) + pieces * PIECE_PRICE
        debt = self._debt_until - now - CREDIT
        return max(debt, SHORTEST_PAUSE) if debt > 0 else 0.0

    def export_kept(self) -> dict[str, Any] | None:
        """Return what of it has to be known before `take`; None if nothing has to."""
        return self.protocol.export() if self._flags else None
