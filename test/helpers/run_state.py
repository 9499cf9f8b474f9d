"""What QEMU's schema says of a guest's run state, from test/data/run-state.txt."""

from __future__ import annotations

from typing import NamedTuple

from daemon import ROOT

Version = tuple[int, int]

LATEST: Version = (11, 1)
"""The version up to which the list is complete."""

_ALWAYS: Version = (0, 0)


class Name(NamedTuple):
    """An event, or a member of an enumeration; the first and last version with it."""

    type: str
    name: str
    since: Version
    until: Version | None

    def is_in(self, version: Version) -> bool:
        """Tell whether a version of QEMU has it."""
        return self.since <= version and (self.until is None or version <= self.until)


def _version(text: str) -> Version | None:
    if text == "-":
        return None
    major, minor = text.split(".")
    return int(major), int(minor)


def _read() -> list[Name]:
    text = (ROOT / "test" / "data" / "run-state.txt").read_text()
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return [
        Name(type_, name, _version(since) or _ALWAYS, _version(until))
        for type_, name, since, until in rows
    ]


NAMES = _read()


def members(type_: str, version: Version | None = None) -> set[str]:
    """Return the names of a type ("event", "RunState", ...), of any version or one."""
    return {
        each.name
        for each in NAMES
        if each.type == type_ and (version is None or each.is_in(version))
    }
