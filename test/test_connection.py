"""One connection: what is only looked at, and what a peer may cost."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from fake_qemu import event_line

from kvmd_connection import (
    FILL_TIME,
    SAVED_TOKEN_SIZE,
    SHORTEST_PAUSE,
    TOKEN_INTERVAL,
    TOKEN_SIZE,
    Connection,
)
from kvmd_qmp import CAREFUL_READ_SIZE, READ_SIZE, Protocol

RESET = event_line("RESET")
LONG_LINE = b"{" + b"x" * 20000


class Line:
    """A connection and the other end of it."""

    def __init__(self, peek: bool) -> None:
        ours, self.peer = socket.socketpair()
        self.protocol = Protocol()
        self.connection = Connection(ours, self.protocol, peek)

    def hear(self, data: bytes) -> bytes:
        """Send bytes; return what one read gives."""
        self.peer.sendall(data)
        received = self.connection.read()
        assert received is not None
        return received[0]

    def unread(self) -> bytes:
        """Return what is left in the socket, by looking at it."""
        try:
            return self.connection.socket.recv(1 << 20, socket.MSG_PEEK)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Close both ends."""
        self.connection.socket.close()
        self.peer.close()


@pytest.fixture
def line() -> Iterator[Line]:
    """Return a connection that takes what it reads."""
    line = Line(peek=False)
    yield line
    line.close()


@pytest.fixture
def peeked_line() -> Iterator[Line]:
    """Return a connection that leaves in the socket what it reads."""
    line = Line(peek=True)
    yield line
    line.close()


def test_what_is_read_is_taken_where_nobody_keeps_the_connection(line: Line) -> None:
    assert line.hear(RESET) == RESET
    assert line.unread() == b""
    assert line.connection.export().get("peeked") is None
    assert line.connection.export_kept() is None


def test_what_is_looked_at_stays_until_it_is_taken(peeked_line: Line) -> None:
    assert peeked_line.hear(RESET) == RESET
    assert peeked_line.unread() == RESET
    peeked_line.connection.consume()
    assert peeked_line.unread() == b""
    assert peeked_line.connection.export().get("peeked") is None


def test_the_beginning_of_a_line_stays_in_the_socket(peeked_line: Line) -> None:
    assert peeked_line.hear(RESET + b"{") == RESET
    peeked_line.connection.consume()
    assert peeked_line.unread() == b"{"
    assert peeked_line.hear(b'"') == b'{"'


def test_the_end_of_a_connection_is_told_once_all_is_read(line: Line) -> None:
    line.peer.send(RESET)
    line.peer.close()
    assert line.connection.read() == (RESET, False)
    assert line.connection.read() == (b"", False)


def test_without_anything_to_read_there_is_none(line: Line) -> None:
    assert line.connection.read() is None


def test_an_error_of_the_connection_is_its_end(line: Line) -> None:
    line.connection.socket.send(b"unread")
    line.peer.close()
    assert line.connection.read() == (b"", False)


def test_a_descriptor_that_comes_along_is_told_of(line: Line) -> None:
    socket.send_fds(line.peer, [RESET], [0])
    assert line.connection.read() == (RESET, True)


def test_the_commands_may_find_nobody(line: Line) -> None:
    line.peer.close()
    line.connection.negotiate()


def test_what_an_earlier_daemon_acted_on_is_taken(peeked_line: Line) -> None:
    peeked_line.hear(RESET)
    peeked = peeked_line.connection.export().get("peeked")
    successor = Connection(peeked_line.connection.socket, Protocol(), peek=True)
    successor.consume_peeked(peeked)
    assert peeked_line.unread() == b""


@pytest.mark.parametrize("other", [b"", RESET[:-3], RESET.replace(b"RESET", b"RESEL")])
def test_what_nobody_acted_on_is_not_taken(peeked_line: Line, other: bytes) -> None:
    peeked_line.hear(RESET)
    peeked = peeked_line.connection.export().get("peeked")
    peeked_line.connection.consume()
    peeked_line.peer.send(other)
    peeked_line.connection.consume_peeked(peeked)
    assert peeked_line.unread() == other


def test_where_nothing_was_looked_at_nothing_is_taken(peeked_line: Line) -> None:
    peeked_line.peer.send(RESET)
    peeked_line.connection.consume_peeked(None)
    assert peeked_line.unread() == RESET


# ---- What a peer may cost ------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list with the time, which stands still until a test changes it."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def charge_tokens(line: Line, count: int) -> float:
    """Charge for so many short reads that have to be parsed; return the last pause."""
    line.protocol.read_size = CAREFUL_READ_SIZE
    pause = 0.0
    for _ in range(count):
        pause = line.connection.charge(b"\n", 1, was_saved=False)
    return pause


def test_a_peer_has_its_tokens_then_is_left_alone(
    line: Line, clock: list[float]
) -> None:
    tokens = round(FILL_TIME / TOKEN_INTERVAL)
    assert charge_tokens(line, tokens) == 0
    longest = max(TOKEN_INTERVAL, SHORTEST_PAUSE)
    assert charge_tokens(line, 1) == pytest.approx(longest)
    assert charge_tokens(line, 9) == pytest.approx(10 * TOKEN_INTERVAL)


def test_tokens_come_back_with_time(line: Line, clock: list[float]) -> None:
    tokens = round(FILL_TIME / TOKEN_INTERVAL)
    charge_tokens(line, tokens + 10)
    clock[0] += 11 * TOKEN_INTERVAL
    assert charge_tokens(line, 1) == 0
    clock[0] += 2 * FILL_TIME
    assert charge_tokens(line, tokens) == 0
    assert charge_tokens(line, 1) > 0


@pytest.mark.parametrize(
    ("read_size", "data", "size", "was_saved", "pending", "tokens"),
    [
        (READ_SIZE, b"x\n", 2, False, b"", 0),
        (READ_SIZE, b"x" * TOKEN_SIZE, TOKEN_SIZE, False, b"", 0),
        (READ_SIZE, b"x" * (TOKEN_SIZE - 1), TOKEN_SIZE - 1, False, b"", 1),
        (READ_SIZE, b"x\n", 2, True, b"", 1),
        (READ_SIZE, b"x\n", 2, True, b"x" * SAVED_TOKEN_SIZE, 2),
        (CAREFUL_READ_SIZE, b"x\n", TOKEN_SIZE - 1, False, b"", 1),
        (CAREFUL_READ_SIZE, b"x\n", 10 * TOKEN_SIZE, False, b"", 11),
        (CAREFUL_READ_SIZE, b"x\n", TOKEN_SIZE, True, b"", 3),
    ],
)
def test_what_a_read_costs(
    line: Line,
    clock: list[float],
    read_size: int,
    data: bytes,
    size: int,
    was_saved: bool,
    pending: bytes,
    tokens: int,
) -> None:
    line.protocol.receive(pending)
    line.protocol.read_size = read_size
    assert line.connection.charge(data, size, was_saved) == 0
    clock[0] += tokens * TOKEN_INTERVAL
    assert charge_tokens(line, round(FILL_TIME / TOKEN_INTERVAL)) == 0
    assert charge_tokens(line, 1) > 0
