"""The demonstration: how it looks, and that README.md shows what it prints."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from textwrap import dedent

import pytest
from daemon import ROOT
from deadline import SECONDS
from demo import Outcome, Table, in_lines, in_short
from qemu import Message
from scenarios import MIGRATION, NOT_USER, SCENARIOS, USER, Scenario

COLUMNS = 100
ESCAPE = "\033"

# What differs from one run, and from one QEMU, to the next.
CHANGING = re.compile(r"(?<=QEMU )[\d.]+\d|(?: +\d+\.\d){2}(?=  )|(?<=, in )\d+\.\d")

LAST_LINE = re.compile(r"\d+ of \d+ right, in .* s")


class Terminal(io.StringIO):
    """A stream that a reader looks at."""

    def isatty(self) -> bool:
        """Say that it is a terminal."""
        return True


def event(name: str, **data: str) -> Message:
    """Return an event as QEMU sends it."""
    return {"event": name, "data": data} if data else {"event": name}


def scenario(name: str) -> Scenario:
    """Return the scenario of that name."""
    [found] = [scenario for scenario in SCENARIOS if scenario.name == name]
    return found


def print_row(output: io.StringIO, outcome: Outcome) -> str:
    """Return what is printed of a guest that is powered off by its user."""
    table = Table(output)
    table.begin_row(scenario("poweroff"))
    table.end_row(scenario("poweroff"), outcome)
    return output.getvalue()


def without_times(text: str) -> list[str]:
    """Return the lines, with a mark for what another run would print otherwise."""
    return [CHANGING.sub("#", line.rstrip()) for line in text.splitlines()]


def table_in(text: str) -> str:
    """Return the demonstration's table out of a text around it, as it was printed."""
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if " guests boot in QEMU " in line]
    ends = [i for i, line in enumerate(lines) if LAST_LINE.search(line)]
    assert len(heads) == len(ends) == 1, "the demonstration's output is not there once"
    return dedent("\n".join(lines[heads[0] : ends[0] + 1]))


def run_demo() -> subprocess.CompletedProcess[str]:
    """Run the demonstration into a pipe."""
    return subprocess.run(
        [sys.executable, ROOT / "test" / "demo.py"],
        capture_output=True,
        check=False,
        text=True,
        timeout=5 * SECONDS,
    )


@pytest.mark.qemu
def test_readme_shows_what_it_prints() -> None:
    demo = run_demo()
    if demo.returncode != 0:
        # One is forgiven: on a busy machine the end of QEMU may come first.
        demo = run_demo()
    assert (demo.returncode, demo.stderr) == (0, ""), demo.stdout
    readme = (ROOT / "README.md").read_text()
    assert without_times(table_in(readme)) == without_times(table_in(demo.stdout))


def test_only_times_and_qemus_version_may_differ_from_what_readme_shows() -> None:
    row = "reboot    RESET, SHUTDOWN guest-shutdown     0.7   3.9  user      right"
    assert without_times(row) == without_times(row.replace("0.7   3", "9.8  13"))
    assert without_times(row) != without_times(row.replace("user", "not user"))
    assert without_times(row) != without_times(row.replace("0.7", "   "))
    head = "kvmd 1.0.0: 22 guests boot in QEMU 7.2.22 .........."
    assert without_times(head) == without_times(head.replace("7.2.22", "11.1.3"))
    assert without_times(head) != without_times(head.replace("1.0.0", "1.0.1"))
    last = "22 of 22 right, in 4.6 s"
    assert without_times(last) == without_times(last.replace("4.6", "12.3"))
    assert without_times(last) != without_times(last.replace("22", "21", 1))


def test_the_table_is_found_in_a_text_around_it_whatever_its_indentation() -> None:
    table = "kvmd 1: 1 guests boot in QEMU 7 .\n\nhow\n\n1 of 1 right, in 4.6 s"
    indented = "\n".join(f"    {line}".rstrip() for line in table.splitlines())
    assert table_in(f"# How\n\n    make demo\n\n{indented}\n\nAnd so on.") == table


def test_colours_are_for_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    outcome = Outcome(USER, ["SHUTDOWN guest-shutdown"], 0.6, 1.9)
    piped = print_row(io.StringIO(), outcome)
    on_terminal = print_row(Terminal(), outcome)
    assert ESCAPE not in piped
    assert ESCAPE in on_terminal
    assert re.sub(f"{ESCAPE}\\[[0-9;]*m", "", on_terminal) == piped


@pytest.mark.parametrize(
    ("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")], ids=str
)
def test_who_wants_no_colours_gets_none(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(variable, value)
    assert ESCAPE not in print_row(Terminal(), Outcome(USER, ["SHUTDOWN"], 0.6, 1.9))


def test_a_verdict_is_right_or_wrong() -> None:
    said = ["SHUTDOWN guest-shutdown"]
    right = print_row(io.StringIO(), Outcome(USER, said, 0.6, 1.9))
    assert right.split()[-4:] == ["0.6", "1.9", "user", "right"]
    wrong = print_row(io.StringIO(), Outcome(NOT_USER, said))
    assert wrong.split()[-4:] == ["none", "not", "user", "WRONG"]


def test_rows_are_no_wider_than_a_page() -> None:
    said = ["SHUTDOWN host-qmp-system-reset", "GUEST_PANICKED poweroff"] * 3
    for each in [*SCENARIOS, *MIGRATION]:
        output = io.StringIO()
        table = Table(output)
        table.begin_row(each)
        table.end_row(each, Outcome("withdrawn", said, 123.4, 123.4))
        assert max(map(len, output.getvalue().splitlines())) <= COLUMNS
        assert output.getvalue().startswith(f"{each.how} ")


def test_what_is_too_long_for_a_line_goes_on_below() -> None:
    assert in_lines(["STOP", "RESET", "STOP"], 12) == ["STOP, RESET,", "STOP"]
    assert in_lines(["STOP", "RESET", "STOP"], 11) == ["STOP,", "RESET, STOP"]
    assert in_lines(["STOP"], 3) == ["STOP"]


def test_what_qemu_says_is_told_from_the_boot_on_and_without_repetitions() -> None:
    assert in_short([event("RESUME")]) == ["nothing"]
    assert in_short(
        [
            event("STOP"),
            event("RESUME"),
            event("RESET", reason="guest-reset"),
            event("RESET", reason="guest-reset"),
            event("GUEST_PANICKED", action="pause"),
            event("GUEST_PANICKED", action="poweroff"),
            event("SHUTDOWN", reason="guest-panic"),
        ]
    ) == ["RESET", "GUEST_PANICKED poweroff", "SHUTDOWN guest-panic"]
