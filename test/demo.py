"""Real guests go down in every way, and the daemon says whose doing it was.

Usage: python3 test/demo.py

The daemon works on a directory of its own; no Ganeti is needed. Exit status 0
if every verdict was right. In colour on a terminal, unless NO_COLOR is set.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

from daemon import Daemon, control_directory
from qemu import PROGRAM, Message, Qemu, installed_version, is_installed
from scenarios import MIGRATION, NOT_USER, RUNS_ON, SCENARIOS, USER, Scenario
from witness import GONE, Witness

from kvmd_version import VERSION

HEADINGS = {
    USER: "Its user shut the guest down:",
    NOT_USER: "It was not its user:",
    RUNS_ON: "It is not down at all:",
}

# The member of an event that says the most.
DETAILS = {
    "GUEST_CRASHLOADED": "action",
    "GUEST_PANICKED": "action",
    "SHUTDOWN": "reason",
    "WATCHDOG": "action",
}

# 99 columns at most.
ROW = "{:32} {:37} {:>5} {:>5}  {:8}  {}"
SAID_FROM, SAID_COLUMNS = 33, 37

LEGEND = """\
file: ms from QEMU's SHUTDOWN event, by its own time stamp, until a process other than
the daemon saw the file <instance>.shutdown; gone: until that process saw the end of
QEMU. A file that comes after that is too late; none: there was never one. With the file
Ganeti reports USER_down and leaves the instance alone, without it ERROR_down, and
starts it again."""

BOLD, RED, GREEN, DIM = "1", "1;31", "32", "2"


class Outcome(NamedTuple):
    """What became of a guest.

    The milliseconds, None where they mean nothing, are from QEMU's SHUTDOWN until
    the shutdown file was there, and until QEMU was gone.
    """

    verdict: str
    said: list[str]
    file: float | None = None
    gone: float | None = None


class Table:
    """Prints what happens, as it happens: a row for each guest."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._in_colour = (
            output.isatty()
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb"
        )

    def say(self, text: str = "", end: str = "\n") -> None:
        """Print text that is seen at once."""
        print(text, end=end, file=self._output, flush=True)

    def print_heading(self, expected: str) -> None:
        """Print what the verdict on the guests to come has to be."""
        self.say("\n" + self._paint(HEADINGS[expected], BOLD))

    def begin_row(self, scenario: Scenario) -> None:
        """Print what is done to a guest."""
        self.say(f"{scenario.how:{SAID_FROM}}", end="")

    def end_row(self, scenario: Scenario, outcome: Outcome) -> None:
        """Print what came of it."""
        first, *others = in_lines(outcome.said, SAID_COLUMNS)
        right = outcome.verdict == scenario.expected
        text = ROW.format(
            "",
            first,
            "none" if outcome.file is None else f"{outcome.file:.1f}",
            "" if outcome.gone is None else f"{outcome.gone:.1f}",
            outcome.verdict,
            "right" if right else "WRONG",
        )[SAID_FROM:]
        said, verdict = text[:SAID_COLUMNS], text[SAID_COLUMNS:]
        self.say(self._paint(said, DIM) + self._paint(verdict, GREEN if right else RED))
        for line in others:
            self.say(" " * SAID_FROM + self._paint(line, DIM))

    def _paint(self, text: str, colour: str) -> str:
        return f"\033[{colour}m{text}\033[m" if self._in_colour else text


def in_lines(parts: list[str], columns: int) -> list[str]:
    """Join parts by commas, in as few lines as they fit into."""
    *others, last = parts
    lines = [""]
    for word in [*(f"{part}," for part in others), last]:
        longer = f"{lines[-1]} {word}".lstrip()
        if lines == [""] or len(longer) <= columns:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def in_short(events: Iterable[Message]) -> list[str]:
    """Return what QEMU has said of a guest since it runs; of repetitions, the last.

    How often it says RESET of one reset, or GUEST_PANICKED of one panic, depends on
    its version.
    """
    said: list[str] = []
    last = None
    for event in events:
        name = event["event"]
        if name == last:
            said.pop()
        detail = event.get("data", {}).get(DETAILS.get(name), "")
        said.append(f"{name} {detail}".rstrip())
        last = name
    return said[said.index("RESUME") + 1 :] or ["nothing"]


def play(scenario: Scenario, qemu: Qemu, daemon: Daemon) -> Outcome:
    """Bring about the end of a guest that has been prepared for it."""
    if qemu.shutdown_file.exists():
        return Outcome("too early", in_short(qemu.qmp.events))
    if scenario.expected == RUNS_ON:
        return play_on(scenario, qemu)
    verdicts_so_far = daemon.log.count(f" {qemu.name}: verdict=")
    with Witness(daemon.control_dir, qemu.process.pid) as witness:
        scenario.end(qemu)
        seen = {sight.what: sight.time for sight in witness.watch_until_gone()}
    qemu.qmp.read_to_end()
    said = in_short(qemu.qmp.events)
    try:
        daemon.wait_for_verdict(qemu.name, verdicts_so_far + 1)
    except TimeoutError:
        return Outcome("none", said)
    file_seen = seen.get(qemu.shutdown_file.name)
    if file_seen is None:
        late = qemu.shutdown_file.exists()
        return Outcome("too late" if late else NOT_USER, said)
    if not qemu.shutdown_file.exists():
        return Outcome("withdrawn", said)
    shutdown = time_of_shutdown(qemu, file_seen)
    return Outcome(
        USER, said, (file_seen - shutdown) * 1000, (seen[GONE] - shutdown) * 1000
    )


def play_on(scenario: Scenario, qemu: Qemu) -> Outcome:
    """Do to a guest what it outlives."""
    scenario.end(qemu)
    qemu.qmp.command("query-status")  # behind all events so far
    verdict = USER if qemu.shutdown_file.exists() else RUNS_ON
    return Outcome(verdict, in_short(qemu.qmp.events))


def time_of_shutdown(qemu: Qemu, until: float) -> float:
    """Return the time, by QEMU's clock, of the last SHUTDOWN until then."""
    moment = 0.0
    for event in qemu.qmp.events:
        stamp = event["timestamp"]
        then = stamp["seconds"] + stamp["microseconds"] / 1e6
        if event["event"] == "SHUTDOWN" and then <= until:
            moment = then
    return moment


def start_guests(
    scenarios: list[Scenario], daemon: Daemon, table: Table, ending: ExitStack
) -> list[Qemu]:
    """Start and prepare a guest for each scenario, which all run at a time."""
    guests = [
        ending.enter_context(
            Qemu(daemon.control_dir, scenario.name, *scenario.options)
        )
        for scenario in scenarios
    ]
    for scenario, qemu in zip(scenarios, guests):
        daemon.wait_until_connected(qemu.name)
        scenario.prepare(qemu)
        table.say(".", end="")
    return guests


def play_all(
    scenarios: list[Scenario], guests: list[Qemu], daemon: Daemon, table: Table
) -> list[str]:
    """Print the table; return the names of the guests whose verdict was wrong."""
    header = ROW.format("what is done", "what QEMU says", "file", "gone", "verdict", "")
    table.say(f"\n\n{header.rstrip()}")
    wrong = []
    for expected in HEADINGS:
        table.print_heading(expected)
        for scenario, qemu in zip(scenarios, guests):
            if scenario.expected == expected:
                table.begin_row(scenario)
                outcome = play(scenario, qemu, daemon)
                table.end_row(scenario, outcome)
                if outcome.verdict != expected:
                    wrong.append(scenario.name)
    return wrong


def demonstrate(table: Table) -> bool:
    """Show all guests go down; tell whether all verdicts are right."""
    began = time.monotonic()
    scenarios = [*SCENARIOS, *MIGRATION]
    table.say(
        f"kvmd {VERSION}: {len(scenarios)} guests boot in QEMU {installed_version()} ",
        end="",
    )
    with ExitStack() as ending:
        control_dir = ending.enter_context(control_directory())
        daemon = Daemon(control_dir, interpreter=(sys.executable,))
        ending.enter_context(daemon)
        guests = start_guests(scenarios, daemon, table, ending)
        wrong = play_all(scenarios, guests, daemon, table)
        daemon.stop()
        right = len(guests) - len(wrong)
        seconds = time.monotonic() - began
        table.say(f"\n{right} of {len(guests)} right, in {seconds:.1f} s\n\n{LEGEND}")
        for line in daemon.log.splitlines():
            if " DEBUG " not in line and any(f" {name}: " in line for name in wrong):
                table.say(line)
    return not wrong


def leave(number: int, _frame: object) -> None:
    """End what was started, and go; a second signal doesn't get in the way."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    print("\ninterrupted")
    sys.exit(128 + number)


def main() -> int:
    """Run the demonstration; return the exit status."""
    if not is_installed():
        print(f"{PROGRAM} is not installed", file=sys.stderr)
        return 1
    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    return 0 if demonstrate(Table(sys.stdout)) else 1


if __name__ == "__main__":
    sys.exit(main())
