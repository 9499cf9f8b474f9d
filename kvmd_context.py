"""What all monitors of the node share, and the phases in which they stand.

Owns the limit on connections, who awaits a greeting, and the names that are listened
on; brings together directory, log, loop, journal, shutdown files and descriptor store.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import errno
import os
import socket
import time
from collections.abc import Iterator

from kvmd_journal import Journal
from kvmd_log import Log
from kvmd_loop import NEVER, Loop
from kvmd_shutdown_file import ShutdownFiles
from kvmd_socket import listening_names
from kvmd_systemd import DescriptorStore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmd_connection import Connection

    Monitor = Any  # kvmd_monitor's, which is above this module

#: Seconds after which a socket on which nobody listens is dead, and after which a peer
#: that has not greeted is worth a warning.
PATIENCE = 10.0
#: File descriptors that no connection may take: the daemon's own files, with some room.
RESERVED_DESCRIPTORS = 12
#: Seconds for which the names that are listened on are not read again.
LISTENING_LIFETIME = 1.0


class Phase(str, enum.Enum):
    """Where a monitor stands, as the journal and the status have it."""

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
    #: The verdict was given, the connection has ended: this QEMU says no more.
    ENDED = "ended"
    #: There is no socket of this name.
    GONE = "gone"


class MonitorContext:
    """What all monitors share."""

    def __init__(
        self,
        control_dir: str,
        log: Log,
        loop: Loop,
        store: DescriptorStore,
        descriptor_limit: int,
    ) -> None:
        self.control_dir = control_dir
        self.log = log
        self.loop = loop
        self.store = store
        self.journal: Journal
        self.files = ShutdownFiles(control_dir, log)
        self._connection_limit = descriptor_limit - RESERVED_DESCRIPTORS
        #: The names that were listened on, until they are to be read again; None if
        #: they can't be read.
        self._listening: set[str] | None = None
        self._end_of_listening = 0.0
        #: Monitors that await a greeting, in the order in which they connected: a timer
        #: for each would take more room than the rest of the monitor.
        self._ungreeted: collections.deque[Monitor] = collections.deque()

    def connect(self, path: str) -> socket.socket:
        """Connect to a monitor socket, if a descriptor is left for that.

        Raises OSError: EMFILE if none is; else see unix(7).
        """
        if self.loop.registered >= self._connection_limit:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
        connected = socket.socket(socket.AF_UNIX, kind)
        try:
            connected.connect(path)
        except OSError:
            connected.close()
            raise
        return connected

    def close(self, connection: Connection) -> None:
        """Close a connection, and wait for it no more."""
        self.loop.unregister(connection)
        self.store.close(connection.socket)

    def is_listened_on(self, name: str) -> bool | None:
        """Tell whether somebody listens on a name in the directory, there or not.

        All such names are read at once, and not again for a second: that takes long.
        Returns None if they can't be read.
        """
        now = time.monotonic()
        if now >= self._end_of_listening:
            self._end_of_listening = now + LISTENING_LIFETIME
            self._listening = None
            with contextlib.suppress(OSError):
                self._listening = listening_names(self.control_dir)
        return None if self._listening is None else name in self._listening

    def expect_greeting(self, monitor: Monitor) -> None:
        """Have the monitor returned by `overdue` if it is not greeted in time."""
        self._ungreeted.append(monitor)

    def next_overdue(self) -> float:
        """Return when the next peer has been silent for too long."""
        while self._ungreeted:
            monitor = self._ungreeted[0]
            if monitor.connection and monitor.phase is Phase.AWAITING_GREETING:
                return float(monitor.since) + PATIENCE
            self._ungreeted.popleft()
        return NEVER

    def overdue(self) -> Iterator[Monitor]:
        """Take out the monitors whose peers have been silent for too long."""
        while self.next_overdue() <= time.monotonic():
            yield self._ungreeted.popleft()
