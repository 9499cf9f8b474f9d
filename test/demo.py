"""Real guests go down in every way, and the daemon says whose doing it was.

Usage: python3 test/demo.py

The daemon works on a directory of its own; no Ganeti is needed. Exit status 0
if every verdict was right.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from daemon import Daemon, control_directory
from qemu import PROGRAM, Qemu, is_installed
from scenarios import MIGRATION, NOT_USER, RUNS_ON, SCENARIOS, USER, Scenario
from witness import Witness

from kvmd_version import VERSION

ROW = "{:42}  {:8}  {:8}  {:>5}  {}"

LEGEND = """\
user: the file <instance>.shutdown was there when QEMU was gone; not user: it
was never there. ms: from QEMU's own time stamp in its SHUTDOWN event until a
process other than the daemon saw the file (by inotify)."""


class Outcome(NamedTuple):
    """What became of a guest; the milliseconds are None without a shutdown file."""

    verdict: str
    milliseconds: float | None = None


def play(scenario: Scenario, qemu: Qemu, daemon: Daemon) -> Outcome:
    """Bring about the end of a guest that has been prepared for it."""
    if qemu.shutdown_file.exists():
        return Outcome("too early")
    if scenario.expected == RUNS_ON:
        scenario.end(qemu)
        return Outcome(USER if qemu.shutdown_file.exists() else RUNS_ON)
    verdicts_so_far = daemon.log.count(f" {qemu.name}: verdict=")
    with Witness(daemon.control_dir, qemu.process.pid) as witness:
        scenario.end(qemu)
        sights = witness.watch_until_gone()
    try:
        daemon.wait_for_verdict(qemu.name, verdicts_so_far + 1)
    except TimeoutError:
        return Outcome("none")
    seen = [sight.time for sight in sights if sight.what == qemu.shutdown_file.name]
    if not seen:
        return Outcome("too late" if qemu.shutdown_file.exists() else NOT_USER)
    if not qemu.shutdown_file.exists():
        return Outcome("withdrawn")
    return Outcome(USER, (seen[0] - time_of_shutdown(qemu, seen[0])) * 1000)


def time_of_shutdown(qemu: Qemu, until: float) -> float:
    """Return the time, by QEMU's clock, of the last SHUTDOWN until then."""
    qemu.qmp.read_to_end()
    moment = 0.0
    for event in qemu.qmp.events:
        stamp = event["timestamp"]
        then = stamp["seconds"] + stamp["microseconds"] / 1e6
        if event["event"] == "SHUTDOWN" and then <= until:
            moment = then
    return moment


def print_row(scenario: Scenario, outcome: Outcome) -> None:
    """Print the outcome beside what was expected."""
    milliseconds = outcome.milliseconds
    print(
        ROW.format(
            scenario.how,
            scenario.expected,
            outcome.verdict,
            "" if milliseconds is None else f"{milliseconds:.1f}",
            "right" if outcome.verdict == scenario.expected else "WRONG",
        ),
        flush=True,
    )


def demonstrate() -> bool:
    """Print the table; tell whether all is right."""
    began = time.monotonic()
    scenarios = [*SCENARIOS, *MIGRATION]
    wrong = []
    print(f"kvmd {VERSION} and {len(scenarios)} guests in QEMU ", end="", flush=True)
    with ExitStack() as ending:
        control_dir = ending.enter_context(control_directory())
        daemon = Daemon(control_dir, interpreter=(sys.executable,))
        ending.enter_context(daemon)
        guests = [
            ending.enter_context(Qemu(control_dir, scenario.name, *scenario.options))
            for scenario in scenarios
        ]
        for scenario, qemu in zip(scenarios, guests):
            daemon.wait_until_connected(qemu.name)
            scenario.prepare(qemu)
        version = guests[0].qmp.command("query-version")["qemu"]
        print("{major}.{minor}.{micro}\n".format(**version))
        print("how the guest went down                     expected  verdict      ms")
        for scenario, qemu in zip(scenarios, guests):
            outcome = play(scenario, qemu, daemon)
            print_row(scenario, outcome)
            if outcome.verdict != scenario.expected:
                wrong.append(scenario.name)
        daemon.stop()
        print(
            f"\n{len(guests) - len(wrong)} of {len(guests)} right,"
            f" in {time.monotonic() - began:.1f} s\n\n{LEGEND}"
        )
        for line in daemon.log.splitlines():
            if any(f" {name}: " in line for name in wrong):
                print(line)
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
    return 0 if demonstrate() else 1


if __name__ == "__main__":
    sys.exit(main())
