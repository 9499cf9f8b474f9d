"""The loop's parts: timers, waiting, signals, the limit on stalls."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import BinaryIO

import pytest
from deadline import wait_until

from kvmd_loop import (
    LONGEST_WAIT,
    NEVER,
    NEXT_STALL_LIMIT,
    RESUMED_PER_TURN,
    STALL_LIMIT,
    Loop,
    Signals,
    limited_stalls,
)


class Timed:
    """What has a timer."""

    due: float | None = None


@pytest.fixture
def loop() -> Iterator[Loop]:
    """Return a loop with nothing to wait for."""
    loop = Loop()
    yield loop
    loop.close()


def test_the_limit_on_stalls_ends_with_what_it_was_for_also_by_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timers: list[tuple[float, ...]] = []
    monkeypatch.setattr(signal, "setitimer", lambda _, *timer: timers.append(timer))
    with pytest.raises(ZeroDivisionError), limited_stalls():
        _ = 1 / 0
    assert timers == [(STALL_LIMIT, NEXT_STALL_LIMIT), (0,)]


def test_no_timer_looks_at_the_clock(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = Timed()
    loop.set_timer(owner, 3600)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert not list(loop.expired())
    monkeypatch.setattr(time, "time", lambda: 0.0)
    loop.set_timer(owner, 0.05)
    assert loop.next_timer() - time.monotonic() < 0.05
    wait_until(lambda: list(loop.expired()) == [owner], "the timer")


def test_of_several_timers_of_one_owner_the_last_counts(loop: Loop) -> None:
    owner, other = Timed(), Timed()
    loop.set_timer(owner, 0)
    loop.set_timer(other, 0)
    loop.set_timer(owner, 3600)
    assert list(loop.expired()) == [other]
    assert loop.next_timer() == owner.due
    owner.due = None
    assert loop.next_timer() == NEVER


def test_timers_expire_in_the_order_in_which_they_are_due(loop: Loop) -> None:
    owners = [Timed() for _ in range(3)]
    for owner, seconds in zip(owners, (-1, -3, -2)):
        loop.set_timer(owner, seconds)
    assert list(loop.expired()) == [owners[1], owners[2], owners[0]]


def test_what_can_be_read_ends_the_wait(loop: Loop) -> None:
    reader, writer = os.pipe()
    with open(reader) as file, open(writer, "w") as other:
        loop.register(file, "handler")
        assert loop.wait(0) == []
        other.write("x")
        other.flush()
        assert loop.wait(NEVER) == ["handler"]
        assert loop.registered == 1
        loop.unregister(file)
        loop.unregister(file)
        assert loop.registered == 0


@pytest.fixture
def readable() -> Iterator[Sequence[BinaryIO]]:
    """Return files in which there is something to read."""
    with ExitStack() as stack:
        files = []
        for _ in range(RESUMED_PER_TURN + 1):
            reader, writer = os.pipe()
            files.append(stack.enter_context(open(reader, "rb")))
            os.write(writer, b"x")
            os.close(writer)
        yield files


def test_a_file_that_pauses_is_waited_for_when_the_pause_is_over(
    loop: Loop, readable: Sequence[BinaryIO]
) -> None:
    loop.register(readable[0], "first")
    loop.register(readable[1], "second")
    begin = time.monotonic()
    loop.pause(readable[0], 3600)
    loop.pause(readable[1], 0.05)
    loop.pause(readable[1], 3600)  # it pauses already
    assert loop.registered == 2
    wait_until(lambda: loop.wait(NEVER) == ["second"], "the end of the pause")
    assert time.monotonic() >= begin + 0.05
    loop.unregister(readable[0])
    assert loop.registered == 1


def test_those_that_pause_do_not_all_come_back_at_once(
    loop: Loop, readable: Sequence[BinaryIO]
) -> None:
    for number, file in enumerate(readable):
        loop.register(file, number)
        loop.pause(file, 0)
    assert sorted(loop.wait(NEVER)) == list(range(RESUMED_PER_TURN))
    assert RESUMED_PER_TURN in loop.wait(NEVER)


def test_a_short_wait_ends_in_time(loop: Loop) -> None:
    deadline = time.monotonic() + 0.0002
    loop.wait(deadline)
    assert time.monotonic() >= deadline


def test_a_wait_is_no_longer_than_the_kernel_can_count(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def select(_selector: object, seconds: float) -> list[object]:
        waits.append(seconds)
        return []

    monkeypatch.setattr("selectors.DefaultSelector.select", select)
    loop.wait(NEVER)
    assert waits == [LONGEST_WAIT]


def test_each_signal_that_has_come_is_read_once() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    signals = Signals([signal.SIGUSR1])
    try:
        assert signals.read() == set()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.read() == {signal.SIGUSR1}
        assert signals.read() == set()
    finally:
        os.close(signal.set_wakeup_fd(-1))
        os.close(signals.fileno())
        signal.signal(signal.SIGUSR1, before)
