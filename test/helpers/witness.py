"""An outside view of what came first: the shutdown file, or the end of QEMU."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import NamedTuple

from deadline import SECONDS

from kvmd_inotify import IN_CREATE, Inotify

GONE = "process gone"


class Sight(NamedTuple):
    """What was seen (the name of a new file, or GONE), and when by the wall clock."""

    what: str
    time: float


class Witness:
    """Watches a directory for new files, and one process for its end.

    An epoll descriptor reports in the order in which things happened, however
    late it is asked. So the order of the sights is the true one, as long as only
    one new file is expected; their times are those of the asking.
    """

    def __init__(self, directory: Path, pid: int) -> None:
        self._process = os.pidfd_open(pid)
        self._inotify = Inotify()
        self._inotify.add_watch(str(directory), IN_CREATE)
        self._epoll = select.epoll()
        self._epoll.register(self._inotify, select.EPOLLIN)
        self._epoll.register(self._process, select.EPOLLIN)

    def watch_until_gone(self) -> list[Sight]:
        """Return all that is seen until the process is gone, GONE being the last."""
        sights: list[Sight] = []
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            ready = self._epoll.poll(SECONDS)
            now = time.time()
            for descriptor, _ in ready:
                if descriptor == self._process:
                    return [*sights, Sight(GONE, now)]
                sights += [Sight(name, now) for _, _, name in self._inotify.read()]
        raise TimeoutError(f"not within {SECONDS} s: the end of the process")

    def close(self) -> None:
        """Stop watching."""
        self._epoll.close()
        self._inotify.close()
        os.close(self._process)

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
