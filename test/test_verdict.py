"""The verdict: its tables line by line, then every short history against an oracle."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Optional

import pytest

from kvmd_verdict import Guest, Verdict

USER, NOT_USER = Verdict.USER, Verdict.NOT_USER

Message = tuple[str, Any]

# A SHUTDOWN as QEMU since 4.0, 2.10 to 3.1, and before 2.10 says it.
POWEROFF = ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
OLD_POWEROFF = ("SHUTDOWN", {"guest": True})
OLDEST_SHUTDOWN = ("SHUTDOWN", None)


def last_verdict(*events: str | Message) -> Verdict | None:
    """Return what the last of some events makes of a running guest."""
    guest = Guest()
    guest.on_status("running")
    ruling = None
    for event in events:
        name, data = (event, None) if isinstance(event, str) else event
        ruling = guest.on_end() if name == "end" else guest.on_event(name, data, None)
    return ruling and ruling.verdict


@pytest.mark.parametrize(
    ("reason", "verdict"),
    [
        ("guest-shutdown", USER),
        ("guest-reset", NOT_USER),
        ("guest-panic", NOT_USER),
        ("host-signal", NOT_USER),
        ("host-qmp-quit", NOT_USER),
        ("host-qmp-system-reset", NOT_USER),
        ("host-ui", NOT_USER),
        ("host-error", NOT_USER),
    ],
)
@pytest.mark.parametrize("guest", [True, False])
def test_known_reason_decides(reason: str, guest: bool, verdict: Verdict) -> None:
    assert last_verdict(("SHUTDOWN", {"guest": guest, "reason": reason})) is verdict


@pytest.mark.parametrize(
    ("data", "verdict"),
    [
        ({"guest": True}, USER),
        ({"guest": False}, NOT_USER),
        ({"guest": True, "reason": "of-a-later-qemu"}, USER),
        ({"guest": False, "reason": "of-a-later-qemu"}, NOT_USER),
        (None, USER),
        # What no QEMU says is no evidence, and without evidence there is no file.
        ({}, NOT_USER),
        ({"reason": "of-a-later-qemu"}, NOT_USER),
        ({"guest": 1}, NOT_USER),
        ({"guest": "true"}, NOT_USER),
        ({"guest": True, "reason": 7}, USER),
        ({"guest": True, "reason": ["guest-shutdown"]}, USER),
        ({"guest": None, "reason": {}}, NOT_USER),
        ("guest-shutdown", NOT_USER),
        ([], NOT_USER),
        (True, NOT_USER),
        (0, NOT_USER),
    ],
)
def test_without_known_reason_the_guest_has_to_have_done_it(
    data: object, verdict: Verdict
) -> None:
    assert last_verdict(("SHUTDOWN", data)) is verdict


@pytest.mark.parametrize(
    ("shutdown", "before", "verdict"),
    [
        (POWEROFF, "POWERDOWN", NOT_USER),
        (POWEROFF, "STOP", USER),
        (POWEROFF, "GUEST_PANICKED", NOT_USER),
        (OLD_POWEROFF, "POWERDOWN", NOT_USER),
        (OLD_POWEROFF, "STOP", USER),
        (OLD_POWEROFF, "GUEST_PANICKED", NOT_USER),
        (OLDEST_SHUTDOWN, "POWERDOWN", NOT_USER),
        (OLDEST_SHUTDOWN, "STOP", NOT_USER),
        (OLDEST_SHUTDOWN, "GUEST_PANICKED", NOT_USER),
    ],
)
def test_what_went_before_speaks_against_the_user(
    shutdown: Message, before: str, verdict: Verdict
) -> None:
    assert last_verdict(before, shutdown) is verdict


@pytest.mark.parametrize(
    ("objection", "taken_back_by", "verdict"),
    [
        ("POWERDOWN", "RESET", USER),
        ("POWERDOWN", "RESUME", NOT_USER),
        ("STOP", "RESUME", USER),
        ("STOP", "RESET", NOT_USER),
        ("GUEST_PANICKED", "RESET", USER),
        ("GUEST_PANICKED", "RESUME", NOT_USER),
    ],
)
def test_objection_is_taken_back_by_its_own_event_alone(
    objection: str, taken_back_by: str, verdict: Verdict
) -> None:
    assert last_verdict(objection, taken_back_by, OLDEST_SHUTDOWN) is verdict


def test_powerdown_may_be_repeated() -> None:
    assert last_verdict("POWERDOWN", "POWERDOWN", "POWERDOWN", POWEROFF) is NOT_USER


def test_powerdown_after_the_shutdown_changes_nothing() -> None:
    assert last_verdict(POWEROFF, "POWERDOWN") is None


def test_first_shutdown_of_a_run_counts() -> None:
    killed = ("SHUTDOWN", {"guest": False, "reason": "host-signal"})
    assert last_verdict(POWEROFF, killed) is None
    assert last_verdict(killed, POWEROFF) is None


@pytest.mark.parametrize("event", ["RESET", "RESUME"])
def test_guest_that_comes_back_takes_its_verdict_back(event: str) -> None:
    assert last_verdict(POWEROFF, "STOP", event) is Verdict.WITHDRAWN
    assert last_verdict(POWEROFF, event, POWEROFF) is USER


def test_events_of_no_interest_change_nothing() -> None:
    for name in ("NIC_RX_FILTER_CHANGED", "VNC_CONNECTED", "shutdown", "SHUTDOWN ", ""):
        assert last_verdict((name, {"reason": "guest-shutdown"})) is None


@pytest.mark.parametrize(
    ("events", "verdict"),
    [
        ([], NOT_USER),
        (["POWERDOWN"], NOT_USER),
        ([POWEROFF], None),
        ([POWEROFF, "RESET"], NOT_USER),
        ([OLDEST_SHUTDOWN, "STOP"], None),
    ],
)
def test_end_of_the_connection_is_a_crash_unless_the_verdict_was_given(
    events: list[str | Message], verdict: Verdict | None
) -> None:
    assert last_verdict(*events, "end") is verdict


def test_what_is_known_of_the_guest_outlives_the_connection() -> None:
    assert last_verdict("POWERDOWN", "end", POWEROFF) is NOT_USER


def test_connection_in_which_nothing_was_heard_gives_no_verdict() -> None:
    assert Guest().on_end() is None


@pytest.mark.parametrize(
    ("status", "verdict", "at_the_end"),
    [
        ("running", Verdict.RUNNING, NOT_USER),
        ("paused", Verdict.RUNNING, NOT_USER),
        ("prelaunch", Verdict.RUNNING, NOT_USER),
        ("inmigrate", Verdict.RUNNING, NOT_USER),
        ("postmigrate", Verdict.RUNNING, NOT_USER),
        ("io-error", Verdict.RUNNING, NOT_USER),
        ("suspended", Verdict.RUNNING, NOT_USER),
        ("of-a-later-qemu", Verdict.RUNNING, NOT_USER),
        ("shutdown", None, None),
        ("guest-panicked", None, None),
    ],
)
def test_status_tells_whether_the_guest_is_alive(
    status: str, verdict: Verdict | None, at_the_end: Verdict | None
) -> None:
    guest = Guest()
    ruling = guest.on_status(status)
    end = guest.on_end()
    assert (ruling and ruling.verdict, end and end.verdict) == (verdict, at_the_end)


@pytest.mark.parametrize(
    ("status", "verdict"),
    [("running", USER), ("suspended", USER), ("paused", NOT_USER)],
)
def test_guest_found_stopped_counts_as_stopped(status: str, verdict: Verdict) -> None:
    guest = Guest()
    guest.on_status(status)
    ruling = guest.on_event(*OLDEST_SHUTDOWN, None)
    assert ruling and ruling.verdict is verdict


# ---- Every short history -------------------------------------------------------------

# A history is a string, a letter for each thing that happens. First, possibly, the
# answer to query-status; then the events, the kinds of SHUTDOWN in lower case, and the
# end of the connection, after which the next one to the same QEMU begins.
STATUSES = {
    "1": "running",
    "2": "paused",
    "3": "shutdown",
    "4": "guest-panicked",
}
EVENTS: dict[str, Message] = {
    "P": ("POWERDOWN", None),
    "R": ("RESET", {"guest": True, "reason": "guest-reset"}),
    "S": ("STOP", None),
    "C": ("RESUME", None),
    "G": ("GUEST_PANICKED", {"action": "pause"}),
    "a": POWEROFF,
    "b": ("SHUTDOWN", {"guest": True, "reason": "guest-reset"}),
    "c": ("SHUTDOWN", {"guest": True, "reason": "guest-panic"}),
    "d": ("SHUTDOWN", {"guest": False, "reason": "host-signal"}),
    "e": ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}),
    "f": ("SHUTDOWN", {"guest": False, "reason": "host-qmp-system-reset"}),
    "g": ("SHUTDOWN", {"guest": False, "reason": "host-ui"}),
    "h": ("SHUTDOWN", {"guest": False, "reason": "host-error"}),
    "i": ("SHUTDOWN", {"guest": True, "reason": "of-a-later-qemu"}),
    "j": ("SHUTDOWN", {"guest": False, "reason": "of-a-later-qemu"}),
    "k": OLD_POWEROFF,
    "l": ("SHUTDOWN", {"guest": False}),
    "m": OLDEST_SHUTDOWN,
}
END = "."
SHUTDOWNS = "abcdefghijklm"

# What a history leads to: a verdict, or None, for each thing that may happen next.
Answers = dict[str, Optional[Verdict]]

SILENCE: Answers = dict.fromkeys([*EVENTS, END])
AFTER_VERDICT: Answers = {**SILENCE, "R": Verdict.WITHDRAWN, "C": Verdict.WITHDRAWN}
BEFORE_VERDICT: Answers = {**SILENCE, **dict.fromkeys(SHUTDOWNS, NOT_USER)}


def answers_by_contract(history: str) -> Answers:
    """Answer from the contract's tables, by looking back over the whole history."""
    this_run = history[max(history.rfind("R"), history.rfind("C")) + 1 :]
    if not set(SHUTDOWNS + "3").isdisjoint(this_run):
        return AFTER_VERDICT
    this_boot = history.rpartition("R")[2]
    powerdown_requested = "P" in this_boot
    panicked = "G" in this_boot or "4" in this_boot
    stopped = max(map(history.rfind, "2S")) > max(map(history.rfind, "1C"))
    seen_alive = history.rpartition(END)[2] not in {"", "4"}
    answers = dict(BEFORE_VERDICT)
    if seen_alive:
        answers[END] = NOT_USER
    if not powerdown_requested:
        if not panicked:
            answers["a"] = answers["i"] = answers["k"] = USER
            if not stopped:
                answers["m"] = USER
    return answers


# All that a Guest holds.
State = tuple[Any, ...]


def state_of(guest: Guest) -> State:
    return tuple(getattr(guest, name) for name in Guest.__slots__)


@cache
def answers_by_daemon(state: State) -> tuple[Answers, dict[str, State]]:
    """Return what a guest in this state answers, and the states that it goes to."""
    answers: Answers = {}
    successors = {}
    for letter in SILENCE:
        guest = Guest()
        for name, value in zip(Guest.__slots__, state):
            setattr(guest, name, value)
        ruling = guest.on_end() if letter == END else guest.on_event(*EVENTS[letter], None)
        answers[letter] = ruling and ruling.verdict
        successors[letter] = state_of(guest)
    return answers, successors


def histories(first: str, state: State, length: int) -> Iterator[tuple[str, State]]:
    """Yield what so many events at most can make of a history, with the states."""
    level = [(first, state)]
    for _ in range(length):
        yield from level
        level = [
            (history + letter, successor)
            for history, state in level
            for letter, successor in answers_by_daemon(state)[1].items()
        ]
    yield from level


@pytest.mark.parametrize("status", ["", *STATUSES])
def test_every_history_of_five_events_gets_the_verdict_of_the_contract(
    status: str,
) -> None:
    # Nothing is hidden in a state, so that equal states have equal futures.
    assert not hasattr(Guest(), "__dict__")
    guest = Guest()
    if status:
        guest.on_status(STATUSES[status])
    # The fifth event is in the answers to each history of four.
    for history, state in histories(status, state_of(guest), 4):
        assert answers_by_daemon(state)[0] == answers_by_contract(history), history
