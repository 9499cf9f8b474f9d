"""The verdict: its tables line by line, then every short history against an oracle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple, Optional

import pytest
import run_state

import kvmd_verdict
from kvmd_verdict import Guest, Ruling, Verdict

USER, NOT_USER = Verdict.USER, Verdict.NOT_USER

NOON = 1700049600.0
HOUR = 3600.0
MICROSECOND = 0.000001

Message = tuple[str, Any]

# A SHUTDOWN as QEMU since 4.0, 2.10 to 3.1, and before 2.10 says it.
POWEROFF = ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
OLD_POWEROFF = ("SHUTDOWN", {"guest": True})
OLDEST_SHUTDOWN = ("SHUTDOWN", None)


def take(guest: Guest, *events: str | Message) -> Ruling | None:
    """Have a guest take some events, all at noon; return what the last one makes."""
    ruling = None
    for event in events:
        name, data = (event, None) if isinstance(event, str) else event
        ruling = guest.on_end() if name == "end" else guest.on_event(name, data, NOON)
    return ruling


def last_ruling(*events: str | Message) -> Ruling | None:
    """Return what the last of some events makes of a running guest."""
    guest = Guest()
    guest.on_status("running")
    return take(guest, *events)


def last_verdict(*events: str | Message) -> Verdict | None:
    """Return the verdict that the last of some events makes of a running guest."""
    ruling = last_ruling(*events)
    return ruling and ruling.verdict


# ---- What QEMU can say ---------------------------------------------------------------


def test_every_event_of_the_schema_is_used_or_has_its_reason_why_not() -> None:
    used = {"SHUTDOWN", *kvmd_verdict.EFFECTS}
    assert used.isdisjoint(kvmd_verdict.IGNORED)
    assert used | kvmd_verdict.IGNORED.keys() == run_state.members("event")
    assert all(kvmd_verdict.IGNORED.values())


# Of the ShutdownCauses, QEMU keeps these to itself (qapi/run-state.json).
NEVER_IN_SHUTDOWN = {"none", "subsystem-reset", "snapshot-load"}
REASONS = {
    "guest-shutdown": USER,
    "guest-reset": NOT_USER,
    "guest-panic": NOT_USER,
    "host-signal": NOT_USER,
    "host-qmp-quit": NOT_USER,
    "host-qmp-system-reset": NOT_USER,
    "host-ui": NOT_USER,
    "host-error": NOT_USER,
}


def test_every_reason_of_the_schema_is_in_the_table() -> None:
    assert REASONS.keys() | NEVER_IN_SHUTDOWN == run_state.members("ShutdownCause")


@pytest.mark.parametrize(("reason", "verdict"), REASONS.items())
@pytest.mark.parametrize("guest", [True, False])
def test_known_reason_decides(reason: str, guest: bool, verdict: Verdict) -> None:
    ruling = last_ruling(("SHUTDOWN", {"guest": guest, "reason": reason}))
    assert ruling == Ruling(verdict, reason)


@pytest.mark.parametrize(
    ("data", "verdict", "cause"),
    [
        ({"guest": True}, USER, "guest"),
        ({"guest": False}, NOT_USER, "not-guest"),
        ({"guest": True, "reason": "of-a-later-qemu"}, USER, "guest"),
        ({"guest": False, "reason": "of-a-later-qemu"}, NOT_USER, "not-guest"),
        (None, USER, "no-data"),
        # What no QEMU says is no evidence, and without evidence there is no file.
        ({}, NOT_USER, "not-guest"),
        ({"reason": "of-a-later-qemu"}, NOT_USER, "not-guest"),
        ({"guest": False, "reason": "guest"}, NOT_USER, "not-guest"),
        ({"guest": False, "reason": "no-data"}, NOT_USER, "not-guest"),
        ({"guest": 1}, NOT_USER, "not-guest"),
        ({"guest": "true"}, NOT_USER, "not-guest"),
        ({"guest": True, "reason": 7}, USER, "guest"),
        ({"guest": True, "reason": ["guest-shutdown"]}, USER, "guest"),
        ({"guest": None, "reason": {}}, NOT_USER, "not-guest"),
        ("guest-shutdown", NOT_USER, "malformed"),
        ([], NOT_USER, "malformed"),
        (True, NOT_USER, "malformed"),
        (0, NOT_USER, "malformed"),
    ],
)
def test_without_known_reason_the_guest_has_to_have_done_it(
    data: object, verdict: Verdict, cause: str
) -> None:
    assert last_ruling(("SHUTDOWN", data)) == Ruling(verdict, cause)


# ---- What speaks against the user ----------------------------------------------------


@pytest.mark.parametrize(
    ("shutdown", "before", "ruling"),
    [
        (POWEROFF, "POWERDOWN", "not-user guest-shutdown,powerdown-requested"),
        (POWEROFF, "STOP", "user guest-shutdown"),
        (POWEROFF, "GUEST_PANICKED", "not-user guest-shutdown,panicked"),
        (POWEROFF, "GUEST_CRASHLOADED", "not-user guest-shutdown,panicked"),
        (OLD_POWEROFF, "POWERDOWN", "not-user guest,powerdown-requested"),
        (OLD_POWEROFF, "STOP", "user guest"),
        (OLD_POWEROFF, "GUEST_PANICKED", "not-user guest,panicked"),
        (OLD_POWEROFF, "GUEST_CRASHLOADED", "not-user guest,panicked"),
        (OLDEST_SHUTDOWN, "POWERDOWN", "not-user no-data,powerdown-requested"),
        (OLDEST_SHUTDOWN, "STOP", "not-user no-data,stopped"),
        (OLDEST_SHUTDOWN, "GUEST_PANICKED", "not-user no-data,panicked"),
        (OLDEST_SHUTDOWN, "GUEST_CRASHLOADED", "not-user no-data,panicked"),
    ],
)
def test_what_went_before_speaks_against_the_user(
    shutdown: Message, before: str, ruling: str
) -> None:
    assert words(last_ruling(before, shutdown)) == ruling


def words(ruling: Ruling | None) -> str | None:
    """Return a ruling as the tables of these tests have it."""
    return ruling and f"{ruling.verdict.value} {ruling.cause}"


def test_all_that_speaks_against_the_user_is_in_the_cause() -> None:
    ruling = last_ruling("GUEST_PANICKED", "STOP", "POWERDOWN", OLDEST_SHUTDOWN)
    assert str(ruling) == (
        "verdict=not-user cause=no-data,powerdown-requested,stopped,panicked"
    )


@pytest.mark.parametrize(
    ("objection", "taken_back_by", "verdict"),
    [
        ("POWERDOWN", "RESET", USER),
        ("POWERDOWN", "RESUME", NOT_USER),
        ("STOP", "RESUME", USER),
        ("STOP", "RESET", NOT_USER),
        ("GUEST_PANICKED", "RESET", USER),
        ("GUEST_PANICKED", "RESUME", NOT_USER),
        ("GUEST_CRASHLOADED", "RESET", USER),
        ("GUEST_CRASHLOADED", "RESUME", NOT_USER),
    ],
)
def test_objection_is_taken_back_by_its_own_event_alone(
    objection: str, taken_back_by: str, verdict: Verdict
) -> None:
    assert last_verdict(objection, taken_back_by, OLDEST_SHUTDOWN) is verdict


def test_panic_that_goes_on_speaks_against_the_user_until_the_next_boot() -> None:
    going_on = ("GUEST_PANICKED", "STOP", "RESUME")
    assert last_verdict(*going_on, POWEROFF) is NOT_USER
    assert last_verdict(*going_on, "RESET", POWEROFF) is USER


def test_panic_seen_on_connecting_speaks_against_the_user_too() -> None:
    guest = Guest()
    assert guest.on_status("guest-panicked") is None
    assert words(take(guest, "RESUME", POWEROFF)) == "not-user guest-shutdown,panicked"


@pytest.mark.parametrize(
    ("requested", "shut_down", "verdict"),
    [
        (NOON, NOON, NOT_USER),
        (NOON, NOON + HOUR, NOT_USER),
        (NOON, NOON + HOUR + MICROSECOND, USER),
        (NOON, NOON + 7 * 24 * HOUR, USER),
        (NOON, NOON - MICROSECOND, NOT_USER),
        (NOON, NOON - 2 * HOUR, NOT_USER),
        (NOON, None, NOT_USER),
        (None, NOON, NOT_USER),
        (None, None, NOT_USER),
        (0.0, 2 * HOUR, USER),
        (2 * HOUR, 0.0, NOT_USER),
    ],
)
@pytest.mark.parametrize("shutdown", [POWEROFF, OLD_POWEROFF, OLDEST_SHUTDOWN])
def test_powerdown_request_counts_for_an_hour(
    shutdown: Message,
    requested: float | None,
    shut_down: float | None,
    verdict: Verdict,
) -> None:
    guest = Guest()
    guest.on_event("POWERDOWN", None, requested)
    ruling = guest.on_event(*shutdown, shut_down)
    assert ruling and ruling.verdict is verdict


@pytest.mark.parametrize(
    ("last", "verdict"),
    [(NOON + HOUR, NOT_USER), (NOON - HOUR, USER), (None, NOT_USER)],
)
def test_hour_begins_anew_with_each_press(last: float | None, verdict: Verdict) -> None:
    guest = Guest()
    for time in (NOON, NOON, last):
        guest.on_event("POWERDOWN", None, time)
    ruling = guest.on_event(*POWEROFF, NOON + HOUR + MICROSECOND)
    assert ruling and ruling.verdict is verdict


def test_request_that_has_lapsed_leaves_the_other_objections() -> None:
    guest = Guest()
    guest.on_event("POWERDOWN", None, NOON)
    guest.on_event("GUEST_PANICKED", None, NOON)
    ruling = guest.on_event(*POWEROFF, NOON + 2 * HOUR)
    assert words(ruling) == "not-user guest-shutdown,panicked"


def test_last_press_can_be_told() -> None:
    guest = Guest()
    assert (guest.powerdown_requested, guest.powerdown_time) == (False, None)
    guest.on_event("POWERDOWN", None, NOON)
    guest.on_event("STOP", None, NOON + HOUR)
    assert (guest.powerdown_requested, guest.powerdown_time) == (True, NOON)
    guest.on_event("RESET", None, NOON + HOUR)
    assert (guest.powerdown_requested, guest.powerdown_time) == (False, None)


# ---- One run after the other ---------------------------------------------------------


def test_powerdown_after_the_shutdown_changes_nothing() -> None:
    assert last_verdict(POWEROFF, "POWERDOWN") is None


def test_first_shutdown_of_a_run_counts() -> None:
    killed = ("SHUTDOWN", {"guest": False, "reason": "host-signal"})
    for first, second in [(POWEROFF, killed), (killed, POWEROFF)]:
        guest = Guest()
        ruling = take(guest, first)
        assert take(guest, second) is None
        assert guest.ruling == ruling


@pytest.mark.parametrize("event", ["RESET", "RESUME"])
def test_guest_that_comes_back_takes_its_verdict_back(event: str) -> None:
    ruling = last_ruling(POWEROFF, "STOP", event)
    assert ruling == Ruling(Verdict.WITHDRAWN, event.lower())
    assert last_verdict(POWEROFF, event, POWEROFF) is USER


@pytest.mark.parametrize(
    "name",
    [
        *kvmd_verdict.IGNORED,
        "NIC_RX_FILTER_CHANGED",
        "VNC_CONNECTED",
        "shutdown",
        "SHUTDOWN ",
        "",
    ],
)
def test_events_of_no_interest_change_nothing(name: str) -> None:
    guest = Guest()
    guest.on_status("running")
    before = guest.export()
    data = {"reason": "guest-shutdown", "action": "poweroff"}
    assert guest.on_event(name, data, NOON) is None
    assert guest.export() == before


# ---- The end of the connection -------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "ruling"),
    [
        ([], "not-user connection-ended"),
        (["POWERDOWN"], "not-user connection-ended"),
        ([POWEROFF], None),
        ([POWEROFF, "RESET"], "not-user connection-ended"),
        ([OLDEST_SHUTDOWN, "STOP"], None),
    ],
)
def test_end_of_the_connection_is_a_crash_unless_the_verdict_was_given(
    events: list[str | Message], ruling: str | None
) -> None:
    assert words(last_ruling(*events, "end")) == ruling


# What each WatchdogAction adds to the cause where QEMU ends without SHUTDOWN.
WATCHDOG_CAUSES = {
    "poweroff": ",watchdog-poweroff",
    "reset": "",
    "shutdown": "",
    "pause": "",
    "debug": "",
    "none": "",
    "inject-nmi": "",
}


def test_every_watchdog_action_of_the_schema_is_in_the_table() -> None:
    assert WATCHDOG_CAUSES.keys() == run_state.members("WatchdogAction")


def watchdog_event(action: object) -> Message:
    return "WATCHDOG", {"action": action}


@pytest.mark.parametrize(("action", "cause"), WATCHDOG_CAUSES.items())
def test_power_off_by_a_watchdog_is_in_the_cause(action: str, cause: str) -> None:
    ruling = last_ruling(watchdog_event(action), "end")
    assert ruling == Ruling(NOT_USER, "connection-ended" + cause)


@pytest.mark.parametrize(
    "event",
    [
        "WATCHDOG",
        "RESET",
        ("WATCHDOG", "poweroff"),
        ("WATCHDOG", {}),
        watchdog_event("verdict=user"),
        watchdog_event(["poweroff"]),
        watchdog_event({}),
        watchdog_event(None),
    ],
)
def test_action_of_a_watchdog_counts_until_the_next_one_or_boot(
    event: str | Message,
) -> None:
    ruling = last_ruling(watchdog_event("poweroff"), event, "end")
    assert ruling == Ruling(NOT_USER, "connection-ended")


def test_watchdog_says_nothing_against_a_shutdown() -> None:
    assert last_verdict(watchdog_event("poweroff"), POWEROFF) is USER


def test_what_is_known_of_the_guest_outlives_the_connection() -> None:
    assert last_verdict("POWERDOWN", "end", POWEROFF) is NOT_USER


def test_connection_that_brings_nothing_gives_no_verdict() -> None:
    assert Guest().on_end() is None


def test_end_of_a_connection_gives_one_verdict() -> None:
    assert last_verdict("STOP", "end", "end") is None


# ---- The status ----------------------------------------------------------------------

# What each RunState makes of a guest that is connected to: the verdict, the verdict at
# the end of the connection, and that on a SHUTDOWN without data.
STATUSES = {
    "running": (Verdict.RUNNING, NOT_USER, USER),
    "suspended": (Verdict.RUNNING, NOT_USER, USER),
    "paused": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "prelaunch": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "preconfig": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "inmigrate": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "finish-migrate": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "postmigrate": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "save-vm": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "restore-vm": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "colo": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "debug": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "io-error": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "internal-error": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "watchdog": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "of-a-later-qemu": (Verdict.RUNNING, NOT_USER, NOT_USER),
    "shutdown": (None, None, None),
    "guest-panicked": (None, None, NOT_USER),
}


def test_every_status_of_the_schema_is_in_the_table() -> None:
    assert STATUSES.keys() - {"of-a-later-qemu"} == run_state.members("RunState")


@pytest.mark.parametrize("status", STATUSES)
def test_status_tells_how_the_guest_stands(status: str) -> None:
    verdict, at_the_end, at_shutdown = STATUSES[status]
    guest = Guest()
    assert guest.on_status(status) == (verdict and Ruling(verdict, status))
    again = restarted(guest)
    ruling = guest.on_end()
    assert (ruling and ruling.verdict) is at_the_end
    ruling = again.on_event(*OLDEST_SHUTDOWN, NOON)
    assert (ruling and ruling.verdict) is at_shutdown


def test_guest_found_shut_down_had_its_verdict_earlier() -> None:
    guest = Guest()
    guest.on_status("shutdown")
    assert guest.ruling == Ruling(Verdict.EARLIER, "shutdown")


def test_guest_found_running_again_is_stopped_no_longer() -> None:
    guest = Guest()
    guest.on_status("paused")
    guest.on_status("running")
    assert words(guest.on_event(*OLDEST_SHUTDOWN, NOON)) == "user no-data"


def test_status_changes_nothing_once_the_verdict_is_given() -> None:
    # Until QEMU has ended, its status may still be running.
    guest = Guest()
    take(guest, POWEROFF)
    before = guest.export()
    for status in STATUSES:
        assert guest.on_status(status) is None
        assert guest.export() == before


# ---- From one process to the next ----------------------------------------------------


def restarted(guest: Guest) -> Guest:
    """Return a guest that goes on where another one stood."""
    return Guest.restore(json.loads(json.dumps(guest.export())))


def known_guest() -> Guest:
    """Return a guest of which each attribute differs from a new one's."""
    guest = Guest()
    events = (
        "POWERDOWN",
        "STOP",
        "GUEST_PANICKED",
        watchdog_event("poweroff"),
        POWEROFF,
    )
    take(guest, *events)
    return guest


def test_guest_is_restored_from_json() -> None:
    record = known_guest().export()
    assert record.keys() == set(Guest.__slots__)
    assert not hasattr(Guest(), "__dict__")
    restored = restarted(known_guest())
    assert restored.export() == record
    assert restored.ruling == known_guest().ruling


def test_member_that_is_as_in_a_new_guest_is_left_out() -> None:
    assert Guest().export() == {}
    for name in Guest.__slots__:
        record = json.loads(json.dumps(known_guest().export()))
        del record[name]
        assert json.loads(json.dumps(Guest.restore(record).export())) == record


def test_record_says_that_a_guest_was_found_shut_down() -> None:
    guest = Guest()
    guest.on_status("shutdown")
    record = json.loads(json.dumps(guest.export()))
    assert record == {"ruling": ["earlier", "shutdown"]}


def test_time_of_a_powerdown_without_its_request_means_nothing() -> None:
    guest = Guest.restore({"powerdown_time": NOON})
    assert words(guest.on_event(*POWEROFF, NOON + 2 * HOUR)) == "user guest-shutdown"
    guest = Guest.restore({"powerdown_time": NOON})
    assert words(guest.on_event(*POWEROFF, NOON)) == "user guest-shutdown"


def test_unknown_member_of_a_record_is_passed_over() -> None:
    assert Guest.restore({"of-a-later-kvmd": 1}).export() == {}


def test_unknown_watchdog_action_in_a_record_is_none() -> None:
    record = {"watchdog_action": "of-a-later-kvmd"}
    assert Guest.restore(record).watchdog_action is None


OTHER_TYPES: list[object] = [None, True, 1, 1.5, "user", [], {}]
RIGHT_TYPES = {
    "powerdown_requested": (True,),
    "powerdown_time": (None, 1.5),
    "stopped": (True,),
    "panicked": (True,),
    "watchdog_action": (None, "user"),
    "seen_alive": (True,),
    "ruling": (None,),
}


@pytest.mark.parametrize("name", Guest.__slots__)
@pytest.mark.parametrize("value", OTHER_TYPES, ids=repr)
def test_member_of_another_type_is_refused(name: str, value: object) -> None:
    record = {name: value}
    if any(value is right for right in RIGHT_TYPES[name]):
        Guest.restore(record)
    else:
        with pytest.raises(ValueError):
            Guest.restore(record)


@pytest.mark.parametrize(
    "ruling",
    [
        ["user"],
        ["user", "guest", "guest"],
        ["users", "guest"],
        [None, "guest"],
        [[], "guest"],
        ["user", None],
        ["user", ["guest"]],
        {"user": 1, "guest": 2},
        "ug",
        None,
    ],
    ids=repr,
)
def test_what_is_no_ruling_is_refused(ruling: object) -> None:
    with pytest.raises(ValueError):
        Ruling.restore(ruling)


# ---- Every short history -------------------------------------------------------------

# A history is a string, a letter for each thing that happens. First, possibly, the
# answer to query-status (1 to 4); then events, and the end of the connection (.), after
# which the next one to the same QEMU begins.
STATUS_LETTERS = {
    "1": "running",
    "2": "paused",
    "3": "shutdown",
    "4": "guest-panicked",
}
EVENTS: dict[str, tuple[str, Any, float | None]] = {
    "P": ("POWERDOWN", None, NOON),
    "Q": ("POWERDOWN", None, NOON + HOUR),
    "N": ("POWERDOWN", None, None),
    "R": ("RESET", {"guest": True, "reason": "guest-reset"}, NOON),
    "S": ("STOP", None, NOON),
    "C": ("RESUME", None, NOON),
    "G": ("GUEST_PANICKED", {"action": "pause"}, NOON),
    "L": ("GUEST_CRASHLOADED", {"action": "run"}, NOON),
    "W": ("WATCHDOG", {"action": "poweroff"}, NOON),
    "w": ("WATCHDOG", {"action": "reset"}, NOON),
    "x": (*OLDEST_SHUTDOWN, NOON),
}
END = "."

# By whom a SHUTDOWN can be, and what it carries.
SHUTDOWNS: dict[str, list[object]] = {
    "guest-shutdown": [{"guest": True, "reason": "guest-shutdown"}],
    "guest": [{"guest": True}, {"guest": True, "reason": "of-a-later-qemu"}],
    "no-data": [None],
    "guest-reset": [{"guest": True, "reason": "guest-reset"}],
    "guest-panic": [{"guest": True, "reason": "guest-panic"}],
    "host-signal": [{"guest": False, "reason": "host-signal"}],
    "host-qmp-quit": [{"guest": False, "reason": "host-qmp-quit"}],
    "host-qmp-system-reset": [{"guest": False, "reason": "host-qmp-system-reset"}],
    "host-ui": [{"guest": False, "reason": "host-ui"}],
    "host-error": [{"guest": False, "reason": "host-error"}],
    "not-guest": [{"guest": False}, {"guest": False, "reason": "of-a-later-qemu"}],
}
# When it comes, and after which of the presses that is at most an hour later, before,
# or not to be told.
PRESSES_THAT_COUNT = {
    None: "PQN",
    NOON - HOUR: "PQN",
    NOON: "PQN",
    NOON + HOUR: "PQN",
    NOON + HOUR + MICROSECOND: "QN",
    NOON + 2 * HOUR: "QN",
    NOON + 2 * HOUR + MICROSECOND: "N",
}

# What a history leads to: a ruling in words, or None, for all that may happen next.
Answers = dict[Any, Optional[str]]


class Facts(NamedTuple):
    """What of a history matters for what comes next, by the contract."""

    press: str
    stopped: bool
    panicked: bool
    watchdog_powered_off: bool
    seen_alive: bool


def facts_of(history: str) -> Facts | None:
    """Look back over a history; return None if a verdict stands."""
    this_run = history[max(history.rfind("R"), history.rfind("C")) + 1 :]
    if "x" in this_run or "3" in this_run:
        return None
    this_boot = history.rpartition("R")[2]
    return Facts(
        press=last_of("PQN", this_boot),
        stopped=last_of("12SC", history) in {"2", "S"},
        panicked=last_of("GL4", this_boot) != "",
        watchdog_powered_off=last_of("Ww", this_boot) == "W",
        seen_alive=history.rpartition(END)[2] not in {"", "4"},
    )


def last_of(letters: str, history: str) -> str:
    """Return the last of these letters in a history, or nothing."""
    return next((letter for letter in reversed(history) if letter in letters), "")


@cache
def answers_by_contract(facts: Facts | None) -> Answers:
    """Answer from the contract's tables."""
    answers: Answers = dict.fromkeys([*EVENTS, END])
    if facts is None:
        return {
            **answers,
            **dict.fromkeys(shutdowns()),
            "R": "withdrawn reset",
            "C": "withdrawn resume",
        }
    answers["x"] = verdict_by_contract("no-data", NOON, facts)
    for cause, number, time in shutdowns():
        answers[cause, number, time] = verdict_by_contract(cause, time, facts)
    if facts.seen_alive:
        watchdog = ",watchdog-poweroff" if facts.watchdog_powered_off else ""
        answers[END] = "not-user connection-ended" + watchdog
    return answers


def verdict_by_contract(cause: str, time: float | None, facts: Facts) -> str:
    """Judge a SHUTDOWN as the contract's tables do."""
    if cause not in {"guest-shutdown", "guest", "no-data"}:
        return f"not-user {cause}"
    objections = ""
    if facts.press and facts.press in PRESSES_THAT_COUNT[time]:
        objections += ",powerdown-requested"
    if facts.stopped and cause == "no-data":
        objections += ",stopped"
    if facts.panicked:
        objections += ",panicked"
    return f"{'not-user' if objections else 'user'} {cause}{objections}"


def shutdowns() -> Iterator[tuple[str, int, float | None]]:
    """Yield each SHUTDOWN at each time: its cause, a number among these, its time."""
    for cause, carried in SHUTDOWNS.items():
        for number in range(len(carried)):
            for time in PRESSES_THAT_COUNT:
                yield cause, number, time


# A guest as it is exported, in JSON: all that the daemon knows, so that equal states
# have equal futures, and that a restart at any moment changes none of them.
State = str


def state_of(guest: Guest) -> State:
    return json.dumps(guest.export())


def step(state: State, letter: str) -> tuple[str | None, State]:
    """Have a guest in this state take what a letter stands for."""
    guest = Guest.restore(json.loads(state))
    if letter == END:
        ruling = guest.on_end()
    elif letter in STATUS_LETTERS:
        ruling = guest.on_status(STATUS_LETTERS[letter])
    else:
        ruling = guest.on_event(*EVENTS[letter])
    return words(ruling), state_of(guest)


successor = cache(lambda state, letter: step(state, letter)[1])


@cache
def answers_by_daemon(state: State) -> Answers:
    """Return what a guest in this state answers to all that may happen next."""
    answers: Answers = {letter: step(state, letter)[0] for letter in [*EVENTS, END]}
    for cause, number, time in shutdowns():
        guest = Guest.restore(json.loads(state))
        ruling = guest.on_event("SHUTDOWN", SHUTDOWNS[cause][number], time)
        answers[cause, number, time] = words(ruling)
    return answers


Level = list[tuple[str, State]]


def beginnings() -> Level:
    """Return the histories of a guest that is connected to."""
    new = state_of(Guest())
    return [("", new), *((letter, successor(new, letter)) for letter in STATUS_LETTERS)]


def levels(level: Level, letters: Iterable[str], length: int) -> Iterator[Level]:
    """Yield histories with their states, then all with one letter more, and so on."""
    yield level
    for _ in range(length):
        level = [
            (history + letter, successor(state, letter))
            for history, state in level
            for letter in letters
        ]
        yield level


def check(level: Level) -> None:
    """Compare what is answered to histories; each pair of answers once."""
    compared = set()
    for history, state in level:
        pair = facts_of(history), state
        if pair not in compared:
            assert answers_by_daemon(state) == answers_by_contract(pair[0]), history
            compared.add(pair)


@pytest.mark.parametrize("beginning", ["", *STATUS_LETTERS])
def test_every_history_of_six_events_gets_the_verdict_of_the_contract(
    beginning: str,
) -> None:
    # The sixth event is in the answers to each history of five. Of the SHUTDOWNs before
    # that one stands for all: see the next test.
    [first] = [pair for pair in beginnings() if pair[0] == beginning]
    for level in levels([first], [*EVENTS, END], 5):
        check(level)


def test_what_follows_a_verdict_does_not_depend_on_the_verdict() -> None:
    [*_, level] = levels(beginnings(), [*EVENTS, END], 3)
    judged = {state for _, state in level if "ruling" in json.loads(state)}
    rulings = [[verdict.value, "cause"] for verdict in Verdict]
    assert judged
    for state in judged:
        for ruling in rulings:
            other = json.dumps({**json.loads(state), "ruling": ruling})
            assert answers_by_daemon(other) == answers_by_daemon(state)
            for letter in [*EVENTS, END]:
                then = json.loads(successor(other, letter))
                expected = json.loads(successor(state, letter))
                if "ruling" in expected:
                    expected["ruling"] = ruling
                assert then == expected


def test_connections_that_follow_one_another_are_one_history() -> None:
    # After a verdict the daemon does not connect again.
    level = beginnings()
    for _ in range(3):
        level = [
            (history + letter, successor(state, letter))
            for history, state in level
            for letter in [*EVENTS, END, *STATUS_LETTERS]
            if letter not in STATUS_LETTERS
            or (history[-1:] == END and facts_of(history) is not None)
        ]
        check(level)
