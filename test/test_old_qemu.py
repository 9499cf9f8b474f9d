"""QEMUs of other times: what old ones leave unsaid, what later ones may say."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemon import INSTANCE, Daemon
from deadline import wait_until
from fake_qemu import FakeQemu, Version

BEFORE_REASON: Version = (3, 1, 0)  # `reason` came with 4.0
BEFORE_GUEST: Version = (2, 9, 1)  # `guest` came with 2.10
LATER: Version = (99, 0, 0)

POWEROFF = '{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}'


def verdict(
    daemon: Daemon, control_dir: Path, version: Version, events: str, **shutdown: object
) -> str:
    """Return "user" or "not-user" for a guest that ends after some events."""
    with FakeQemu(control_dir, INSTANCE, version=version) as qemu:
        qemu.listen()
        qemu.negotiate()
        for event in events.split():
            qemu.event(event)
        qemu.event("SHUTDOWN", **shutdown)
        line = daemon.wait_for_verdict(INSTANCE)
        assert qemu.shutdown_file.exists() == ("verdict=user " in line)
    return line.split()[1].split("=")[1]


@pytest.mark.parametrize(
    ("events", "guest", "expected"),
    [
        ("", True, "user"),
        ("", False, "not-user"),
        ("POWERDOWN", True, "not-user"),
        ("POWERDOWN RESET", True, "user"),
        ("STOP", True, "user"),
        ("GUEST_PANICKED", True, "not-user"),
        ("GUEST_PANICKED RESET", True, "user"),
    ],
)
def test_without_a_reason_the_guest_has_to_have_done_it(
    daemon: Daemon, control_dir: Path, events: str, guest: bool, expected: str
) -> None:
    assert verdict(daemon, control_dir, BEFORE_REASON, events, guest=guest) == expected


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ("", "user"),
        ("POWERDOWN", "not-user"),
        ("POWERDOWN RESET", "user"),
        ("STOP", "not-user"),
        ("STOP RESUME", "user"),
        ("GUEST_PANICKED", "not-user"),
        ("GUEST_PANICKED RESET", "user"),
    ],
)
def test_without_any_data_nothing_may_speak_against_the_user(
    daemon: Daemon, control_dir: Path, events: str, expected: str
) -> None:
    assert verdict(daemon, control_dir, BEFORE_GUEST, events) == expected


@pytest.mark.parametrize(
    ("guest", "expected"), [(True, "user"), (False, "not-user")]
)
def test_a_reason_that_nobody_knows_yet_leaves_it_to_the_guest(
    daemon: Daemon, control_dir: Path, guest: bool, expected: str
) -> None:
    reason = {"guest": guest, "reason": "guest-sublimation"}
    assert verdict(daemon, control_dir, LATER, "", **reason) == expected


@pytest.mark.parametrize("reason", ["host-ui", "host-error"])
def test_what_the_host_does_is_not_the_users_doing(
    daemon: Daemon, control_dir: Path, reason: str
) -> None:
    shutdown = {"guest": False, "reason": reason}
    assert verdict(daemon, control_dir, (7, 2, 22), "", **shutdown) == "not-user"


@pytest.fixture
def connected(daemon: Daemon, fake_qemu: FakeQemu) -> FakeQemu:
    """Return a fake QEMU that the daemon is connected to."""
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    return fake_qemu


@pytest.mark.parametrize(
    "line",
    [
        '{"data": {"new": [1, {}], "reason": "guest-shutdown", "guest": true},'
        ' "event": "SHUTDOWN", "timestamp": {"microseconds": 5, "seconds": 1}}',
        '{"timestamp": {"seconds": -1, "microseconds": -1},' + POWEROFF[1:],
        '{"seq": 12345678901234567890,"event":"SHUTDOWN",'
        '"data":{"guest":true,"reason":"guest-shutdown"}}',
    ],
    ids=["other-order", "no-clock", "no-spaces"],
)
def test_the_form_of_an_event_does_not_matter(connected: FakeQemu, line: str) -> None:
    connected.send(line.encode() + b"\r\n")
    wait_until(connected.shutdown_file.exists, "the shutdown file")


def test_a_last_line_may_lack_its_end(connected: FakeQemu) -> None:
    connected.send(POWEROFF.encode())
    connected.exit()
    wait_until(connected.shutdown_file.exists, "the shutdown file")


def test_an_event_may_come_a_byte_at_a_time(connected: FakeQemu) -> None:
    for byte in POWEROFF.encode() + b"\r\n":
        connected.send(bytes([byte]))
        connected.wait_until_read()
    wait_until(connected.shutdown_file.exists, "the shutdown file")


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "VNC_CONNECTED", "data": {"name": "SHUTDOWN"}}',
        '{"event": "BLOCK_IO_ERROR", "data": ' + POWEROFF + "}",
        '{"return": {"event": "SHUTDOWN"}, "id": "other"}',
        '{"event": "shutdown"}',
        '["event", "SHUTDOWN"]',
    ],
)
def test_the_word_alone_is_no_shutdown(
    connected: FakeQemu, daemon: Daemon, line: str
) -> None:
    connected.send(line.encode() + b"\r\n")
    connected.event("SHUTDOWN", guest=False, reason="host-signal")
    assert " verdict=not-user cause=host-signal " in daemon.wait_for_verdict(INSTANCE)
    assert daemon.log.count(": verdict=") == 1


def test_the_negotiation_does_not_wait_for_the_greeting(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.accept()
    fake_qemu.answer("qmp_capabilities", {})
    fake_qemu.answer("query-status", {"status": "running"})


def test_a_refused_status_is_no_obstacle(daemon: Daemon, fake_qemu: FakeQemu) -> None:
    fake_qemu.listen()
    fake_qemu.accept()
    fake_qemu.greet()
    fake_qemu.answer("qmp_capabilities", {})
    fake_qemu.send_message({"error": {"class": "GenericError", "desc": "no status"}})
    fake_qemu.send(POWEROFF.encode() + b"\r\n")
    assert " verdict=user " in daemon.wait_for_verdict(INSTANCE)
