"""The list of QEMU's run-state names is that of the QEMU that is installed."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import StartQemu
from qemu import installed_version
from run_state import LATEST, NAMES, Version, members

pytestmark = pytest.mark.qemu

# Where the schema has a type: the event or command, and what of it.
PLACES = {
    "ShutdownCause": ("SHUTDOWN", "arg-type", "reason"),
    "RunState": ("query-status", "ret-type", "status"),
    "WatchdogAction": ("WATCHDOG", "arg-type", "action"),
    "GuestPanicAction": ("GUEST_PANICKED", "arg-type", "action"),
    "MemoryFailureAction": ("MEMORY_FAILURE", "arg-type", "action"),
    "MemoryFailureRecipient": ("MEMORY_FAILURE", "arg-type", "recipient"),
}

Schema = dict[str, dict[str, Any]]


@pytest.fixture
def schema(start_qemu: StartQemu) -> Schema:
    """Return what the installed QEMU says of itself, by name."""
    return {each["name"]: each for each in start_qemu().qmp.command("query-qmp-schema")}


@pytest.fixture
def version() -> Version:
    """Return the version of the installed QEMU, or the last one that is known."""
    major, minor = installed_version().split(".")[:2]
    return min((int(major), int(minor)), LATEST)


def members_in(schema: Schema, where: str, role: str, member: str) -> set[str]:
    """Return the members of the type of a member of an event, or of an answer."""
    arguments = schema[schema[where][role]]["members"]
    [type_] = [each["type"] for each in arguments if each["name"] == member]
    return set(schema[type_]["values"])


def test_qemu_has_the_events_of_the_list(schema: Schema, version: Version) -> None:
    events = [name for name in schema if schema[name]["meta-type"] == "event"]
    # The schema is in the order of its files; of this one MEMORY_FAILURE is the last.
    first, last = events.index("SHUTDOWN"), events.index("MEMORY_FAILURE")
    assert set(events[first : last + 1]) == members("event", version)


def test_qemu_has_the_members_of_the_list(schema: Schema, version: Version) -> None:
    found = {name: members_in(schema, *place) for name, place in PLACES.items()}
    assert found == {name: members(name, version) for name in PLACES}


def test_the_list_has_each_name_once() -> None:
    assert {each.type for each in NAMES} == {"event", *PLACES}
    assert len({(each.type, each.name) for each in NAMES}) == len(NAMES)
