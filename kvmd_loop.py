"""The loop's parts: the selector, the timers, and the limit on what one turn waits.

Owns the selector, the timers and the pauses, and returns the handlers that are ready.
What they do, and in which order, the daemon decides. All times are
time.monotonic()'s seconds.
"""

from __future__ import annotations

import bisect
import contextlib
import heapq
import itertools
import os
import selectors
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Protocol

    class Readable(Protocol):
        """What the selector can wait for."""

        def fileno(self) -> int:
            """Return a file descriptor."""

    class Timed(Protocol):
        """What has a timer."""

        due: float | None


NEVER = float("inf")
#: Seconds of one wait in the selector: epoll_wait(2) takes milliseconds in an int.
LONGEST_WAIT = 86400.0
#: Waits shorter than this, in seconds, are slept: the selector rounds up to 1 ms.
SHORTEST_SELECT = 0.0005
#: Files that one turn waits for again, of those whose pause is over.
RESUMED_PER_TURN = 16
#: Seconds after which the kernel is not to keep a turn waiting any more, and seconds
#: that it may take each time after that: many peers may wait in one turn.
STALL_LIMIT = 0.005
NEXT_STALL_LIMIT = 0.001


class Loop:
    """Descriptors and timers, and who is to be woken by them."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        #: When a pause ends, of what, and its handler: in that order.
        self._paused: list[tuple[float, int, Readable, object]] = []
        self._timers: list[tuple[float, int, Timed]] = []
        self._sequence = itertools.count()

    @property
    def registered(self) -> int:
        """The number of descriptors that are waited for, now or after a pause."""
        return len(self._selector.get_map()) + len(self._paused)

    def register(self, file: Readable, handler: object) -> None:
        """Have a handler returned by `wait` whenever there is something to read."""
        self._selector.register(file, selectors.EVENT_READ, handler)

    def unregister(self, file: Readable) -> None:
        """Stop waiting for a file; it is not registered if epoll_ctl(2) had no room."""
        if file in self._selector.get_map():
            self._selector.unregister(file)
        else:
            self._paused = [one for one in self._paused if one[2] is not file]

    def pause(self, file: Readable, seconds: float) -> None:
        """Don't wait for a file for so many seconds, unless that is so already."""
        if file in self._selector.get_map():
            handler = self._selector.unregister(file).data
            end = time.monotonic() + seconds
            bisect.insort(self._paused, (end, next(self._sequence), file, handler))

    def _resume(self) -> None:
        """Wait again for some of those whose pause is over, not for all at once."""
        now = time.monotonic()
        for _ in range(RESUMED_PER_TURN):
            if not self._paused or self._paused[0][0] > now:
                break
            _, _, file, handler = self._paused.pop(0)
            self.register(file, handler)

    def set_timer(self, owner: Timed, seconds: float) -> None:
        """Have the owner returned by `expired` in so many seconds, and not before."""
        owner.due = time.monotonic() + seconds
        heapq.heappush(self._timers, (owner.due, next(self._sequence), owner))

    def next_timer(self) -> float:
        """Return when the next timer is due."""
        while self._timers and self._timers[0][2].due != self._timers[0][0]:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else NEVER

    def expired(self) -> Iterator[Any]:
        """Take out the owners whose time has come."""
        now = time.monotonic()
        while self.next_timer() <= now:
            owner = heapq.heappop(self._timers)[2]
            owner.due = None
            yield owner

    def wait(self, deadline: float) -> list[Any]:
        """Wait for something to read, until then at most; return the handlers."""
        self._resume()
        if self._paused:
            deadline = min(deadline, self._paused[0][0])
        seconds = min(deadline - time.monotonic(), LONGEST_WAIT)
        if 0 < seconds < SHORTEST_SELECT:
            time.sleep(seconds)
            seconds = 0
        return [key.data for key, _ in self._selector.select(max(0, seconds))]

    def close(self) -> None:
        """Wait for nothing any more."""
        self._selector.close()


class Signals:
    """The signals that the process takes, read from a pipe.

    The handlers do nothing but write to it (signal.set_wakeup_fd).
    """

    def __init__(self, numbers: list[signal.Signals]) -> None:
        """Take these signals; those that were blocked come in from now on."""
        self._reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def fileno(self) -> int:
        """Return the end of the pipe that is read."""
        return self._reader

    def read(self) -> set[signal.Signals]:
        """Return the signals that have come, each once."""
        try:
            return {signal.Signals(number) for number in os.read(self._reader, 4096)}
        except BlockingIOError:
            return set()


@contextlib.contextmanager
def limited_stalls() -> Iterator[None]:
    """Have SIGALRM interrupt a wait in the kernel that takes longer than STALL_LIMIT.

    A hostile peer can cause one: it sends the descriptor of a TCP socket with SO_LINGER
    (socket(7)). The kernel closes it during our read, and that blocks for as long as
    the peer likes. The next one in the same turn lasts for NEXT_STALL_LIMIT.
    """
    signal.setitimer(signal.ITIMER_REAL, STALL_LIMIT, NEXT_STALL_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
