"""The client of systemd: messages, the watchdog, the descriptor store."""

from __future__ import annotations

import os
import re
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from deadline import SECONDS
from systemd import full_notify_socket

from kvmd_systemd import (
    MOST_DISCARDED,
    NEVER,
    RETRY_INTERVAL,
    DescriptorStore,
    Notifier,
)


class Manager(NamedTuple):
    """The other end of the notify socket, and a client of it."""

    socket: socket.socket
    notifier: Notifier

    def messages(self) -> list[str]:
        """Return what was sent since."""
        messages = []
        while select.select([self.socket], [], [], 0)[0]:
            messages.append(self.socket.recv(4096).decode())
        return messages


def notifier_for(address: Path, **environment: str) -> Notifier:
    return Notifier({"NOTIFY_SOCKET": str(address), **environment})


@pytest.fixture
def stuck(control_dir: Path) -> Iterator[Manager]:
    """Return a systemd that takes no more messages."""
    address = control_dir.parent / "notify"
    with full_notify_socket(address) as manager:
        notifier = notifier_for(address, WATCHDOG_USEC="30000000")
        yield Manager(manager, notifier)
        notifier.close()


@pytest.fixture
def manager(stuck: Manager) -> Manager:
    """Return a systemd that takes all."""
    stuck.messages()
    return stuck


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    """Return a connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({}, NEVER),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, NEVER),
        ({"WATCHDOG_USEC": "0"}, NEVER),
        ({"WATCHDOG_USEC": "soon"}, NEVER),
        ({"WATCHDOG_USEC": "\u00b2"}, NEVER),
    ],
)
def test_pings_are_sent_twice_as_often_as_the_watchdog_wants(
    environment: dict[str, str], interval: float
) -> None:
    assert Notifier(environment).watchdog_interval == interval


def test_without_a_notify_socket_nothing_is_sent(connection: socket.socket) -> None:
    notifier = Notifier({})
    store = DescriptorStore(notifier, ["old"])
    store.store(connection)
    assert store.is_idle and not store.is_enabled
    assert notifier.next_message() == NEVER


def test_a_systemd_that_is_stuck_is_waited_for_once(stuck: Manager) -> None:
    start = time.monotonic()
    assert not any(stuck.notifier.send("X=1") for _ in range(1000))
    assert time.monotonic() - start < 5  # if each were waited for, it would be 9
    stuck.messages()
    assert stuck.notifier.send("X=1")


def test_a_systemd_that_is_slow_delays_one_message_and_not_the_next_as_well(
    stuck: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        stuck.socket.recv(4096)

    monkeypatch.setattr(time, "sleep", wait)
    assert stuck.notifier.send("X=1")
    assert not stuck.notifier.send("X=1")
    assert waits == [Notifier.ATTEMPT_INTERVAL]
    stuck.messages()
    assert stuck.notifier.send("X=1")


def test_a_status_is_sent_once_and_again_when_it_changes(manager: Manager) -> None:
    for status in ("1", "1", "2"):
        manager.notifier.send_status(status)
    assert manager.messages() == ["READY=1\nSTATUS=1", "READY=1\nSTATUS=2"]


def test_a_status_that_was_not_taken_is_sent_again_soon(stuck: Manager) -> None:
    stuck.notifier.send_status("1")
    assert stuck.notifier.next_message() <= time.monotonic() + RETRY_INTERVAL
    stuck.messages()
    stuck.notifier.send_status("1")
    assert stuck.messages() == ["READY=1\nSTATUS=1"]
    stuck.notifier.send_ping()
    assert stuck.notifier.next_message() > time.monotonic() + RETRY_INTERVAL


def test_a_reload_ends_with_the_next_status(manager: Manager) -> None:
    manager.notifier.send_status("1")
    manager.notifier.send_reloading()
    manager.notifier.send_status("1")
    first, reloading, second = manager.messages()
    assert first == second == "READY=1\nSTATUS=1"
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)


def test_a_ping_is_sent_when_it_is_due_only(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.notifier.send_ping()
    manager.notifier.send_ping()
    assert manager.messages() == ["WATCHDOG=1"]
    later = time.monotonic() + manager.notifier.watchdog_interval
    monkeypatch.setattr(time, "monotonic", lambda: later)
    manager.notifier.send_ping()
    assert manager.messages() == ["WATCHDOG=1"]


def test_a_ping_that_was_not_taken_is_sent_again_soon(stuck: Manager) -> None:
    stuck.notifier.send_ping()
    assert stuck.notifier.next_message() <= time.monotonic() + RETRY_INTERVAL


def test_a_connection_is_stored_though_its_peer_closes(
    manager: Manager, connection: socket.socket
) -> None:
    DescriptorStore(manager.notifier).store(connection)
    message, (fd,), _, _ = socket.recv_fds(manager.socket, 4096, 1)
    inode = os.fstat(fd).st_ino
    os.close(fd)
    assert inode == os.fstat(connection.fileno()).st_ino
    name = f"connection-{inode}"
    assert message.decode() == f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0"


def test_a_connection_is_closed_whoever_else_has_it_open(manager: Manager) -> None:
    ours, theirs = socket.socketpair()
    with ours.dup(), theirs:
        DescriptorStore(manager.notifier).close(ours)
        theirs.settimeout(SECONDS)
        assert theirs.recv(1) == b""
    (message,) = manager.messages()
    assert re.fullmatch(r"FDSTOREREMOVE=1\nFDNAME=connection-\d+", message)


def test_what_was_not_discarded_is_discarded_later(stuck: Manager) -> None:
    store = DescriptorStore(stuck.notifier, ["one"])
    store.discard("two")
    assert store.discarded == ["one", "two"] and not store.is_idle
    stuck.messages()
    assert store.catch_up() and store.is_idle
    names = {message.split("FDNAME=")[1] for message in stuck.messages()}
    assert names == {"one", "two"}


def test_what_was_not_stored_is_stored_later_unless_it_is_closed_by_then(
    stuck: Manager, connection: socket.socket
) -> None:
    store = DescriptorStore(stuck.notifier)
    closed, peer = socket.socketpair()
    with peer:
        store.store(closed)
        store.store(connection)
        store.close(closed)
    stuck.messages()
    assert store.catch_up()
    messages = [message.split("\n")[0] for message in stuck.messages()]
    assert messages == ["FDSTOREREMOVE=1", "FDSTORE=1"]


def test_of_what_is_not_discarded_for_ever_the_latest_names_are_kept(
    stuck: Manager,
) -> None:
    store = DescriptorStore(stuck.notifier)
    names = [f"connection-{number}" for number in range(MOST_DISCARDED + 5)]
    for name in names:
        store.discard(name)
    assert store.discarded == names[5:]
