"""The Makefile: `make help` names every target that is for people, and only those."""

from __future__ import annotations

import re
import subprocess

import pytest
from daemon import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()

# `need-*` are what other targets need to have installed.
TARGETS = [
    name
    for name in re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE)
    if not name.startswith("need-")
]

# Where SUITE is given, it makes TARGET there.
ANY_IN_A_SUITE = "in-suite"

# In a text: a command of its own in a line, or in backticks.
MENTION = re.compile(r"(?:^ +|`)make ([a-z][a-z-]*)", re.MULTILINE)


def make(*arguments: str) -> str:
    """Return what make prints."""
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        capture_output=True,
        check=True,
        cwd=ROOT,
        text=True,
    ).stdout


def test_help_names_every_target_with_what_it_does() -> None:
    *lines, about_releases = make("help").splitlines()
    assert about_releases.startswith("with SUITE=NAME, ")
    named = dict(line.split(maxsplit=1) for line in lines)
    assert list(named) == TARGETS
    assert all(named.values())


def test_help_is_what_make_does_by_itself_and_fits_a_terminal() -> None:
    assert make() == make("help")
    assert max(map(len, make("help").splitlines())) <= 80


def test_no_file_is_taken_for_a_target() -> None:
    lists = re.findall(r"^\.PHONY: (\w.*)", MAKEFILE, re.MULTILINE)
    phony = set(" ".join(lists).split())
    all_targets = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
    assert phony == all_targets


@pytest.mark.parametrize("name", ["README.md", "test/README.md"])
def test_a_target_that_a_text_names_is_there(name: str) -> None:
    mentioned = set(MENTION.findall((ROOT / name).read_text()))
    assert mentioned <= {*TARGETS, ANY_IN_A_SUITE}
