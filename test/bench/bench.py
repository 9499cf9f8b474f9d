#!/usr/bin/env python3
"""Measure the daemon beside Ganeti's own and beside the least a program has to do.

All in one run, in alternating order, several times: what counts are the ratios, for
the figures themselves depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Optional

from measures import MEASURES, ONCE, Load
from subjects import (
    HERE,
    PREPARATIONS,
    DaemonDiedError,
    Subject,
    compile_program,
    enter_node,
)

#: Figure name -> value, of one subject: the medians.
Medians = dict[str, Optional[float]]
#: Subject -> figure name -> a value for each repetition.
Results = dict[str, dict[str, list[Optional[float]]]]


class Target(NamedTuple):
    """What this daemon's figure is held to, given the floor's in the same run."""

    text: str
    is_met: Callable[[float, float], bool]


class Row(NamedTuple):
    """A line of the table."""

    figure: str
    title: str
    format: str
    target: Target | None = None


def at_most(bound: float, unit: str = "") -> Target:
    """Return the target of a figure that is not to exceed a bound."""
    return Target(f"<= {bound:g}{unit}", lambda value, _floor: value <= bound)


def below(bound: float, unit: str = "") -> Target:
    """Return the target of a figure that is to stay below a bound."""
    return Target(f"< {bound:g}{unit}", lambda value, _floor: value < bound)


def times_floor(factor: float, otherwise: float = 0) -> Target:
    """Return the target of a figure held to the floor's, or to a bound."""
    text = f"<= {factor:g} x floor" + (f" or {otherwise:g}" if otherwise else "")
    return Target(
        text, lambda value, floor: value <= max(factor * floor, otherwise)
    )


ROWS = [
    Row("missed", "instances missed, of 300 discoveries", "{:.0f}", at_most(0)),
    Row("discovery-0", "discovery, alone (ms)", "{:.2f}", times_floor(2, 1)),
    Row("discovery-100", "  beside 100 others", "{:.2f}", times_floor(2, 1)),
    Row("discovery-1000", "  beside 1000 others", "{:.2f}", times_floor(2, 1)),
    Row("verdict-0", "verdict, alone (ms)", "{:.3f}", times_floor(1.5)),
    Row("verdict-900", "  beside 900 others", "{:.3f}", times_floor(1.5)),
    Row("late-0", "  later than 1 ms, alone (%)", "{:.1f}"),
    Row("late-900", "  later than 1 ms, beside 900 (%)", "{:.1f}"),
    Row("flooded-verdict", "verdict during a flood, p99 (ms)", "{:.1f}", below(20)),
    Row("events", "events of no interest (CPU s/million)", "{:.3f}", at_most(0.35)),
    Row("flood", "flood from one instance (MB/s)", "{:.0f}", Target(
        ">= 500", lambda value, _floor: value >= 500)),
    Row("kept", "memory kept after 200,000 events (KiB)", "{:.0f}", below(256)),
    Row("rss-0", "RSS with no connection (MiB)", "{:.2f}", at_most(11.8)),
    Row("rss-100", "  with 100", "{:.2f}", at_most(11.9)),
    Row("rss-1000", "  with 1000", "{:.2f}", at_most(12.5)),
    Row("per-connection", "bytes per connection, at 4000", "{:.0f}", at_most(700)),
    Row("created", "4000 created at once: connected", "{:.0f}", Target(
        "4000", lambda value, _floor: value == 4000)),
    Row("create", "  time (s)", "{:.2f}", times_floor(2)),
    Row("filed", "4000 shut down at once: files", "{:.0f}", Target(
        "4000", lambda value, _floor: value == 4000)),
    Row("shutdown", "  time (s)", "{:.2f}", times_floor(2)),
    Row("start-1000", "exec to 1000 instances connected (s)", "{:.3f}", at_most(0.1)),
    Row("start", "exec to first instance connected (ms)", "{:.1f}", at_most(28)),
    Row("idle", "wake-ups in 10 s beside 1000 instances", "{:.0f}", at_most(0)),
    Row("rescan", "  CPU of a rescan (ms)", "{:.2f}", below(5)),
    Row("lives", "instance lives", "{:.0f}"),
    Row("lives-descriptors", "  descriptors left", "{:+.0f}", at_most(0)),
    Row("lives-rss", "  RSS growth (KiB)", "{:+.0f}", below(512)),
]


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        action="append",
        choices=list(MEASURES),
        help="measure this alone (may be given several times)",
    )
    parser.add_argument(
        "--subject",
        action="append",
        choices=list(PREPARATIONS),
        help="measure this daemon alone (may be given several times)",
    )
    parser.add_argument(
        "--separate-cpus",
        action="store_true",
        help="give the fake QEMUs a CPU to themselves: every wake-up then has to reach"
        " another CPU, where else the scheduler may choose",
    )
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "result.json",
        metavar="PATH",
        help="where to write all figures as JSON (default: %(default)s)",
    )
    return parser.parse_args()


def prepare(names: list[str], directory: Path) -> list[Subject]:
    """Build, fetch or install the subjects."""
    Load.program = compile_program(HERE / "load.c", directory)
    subjects = []
    for name in names:
        own = directory / name
        own.mkdir()
        try:
            subjects.append(PREPARATIONS[name](own))
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"without {name}: {error}", file=sys.stderr)
    return subjects


def separate_cpus() -> None:
    """Keep the first CPU for the load, the others for the daemons and this process."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        sys.exit("--separate-cpus needs two CPUs")
    Load.cpus = frozenset([first])
    os.sched_setaffinity(0, others)


def measure_all(
    subjects: list[Subject], measures: list[str], repetitions: int
) -> Results:
    """Measure everything, in alternating order."""
    results: Results = defaultdict(lambda: defaultdict(list))
    for repetition in range(repetitions):
        for name in measures:
            if name in ONCE and repetition > 0:
                continue
            for subject in subjects:
                show_progress(f"{repetition + 1}/{repetitions} {name} {subject.name}")
                try:
                    figures = MEASURES[name](subject)
                except DaemonDiedError:
                    figures = {}
                for figure, value in figures.items():
                    results[subject.name][figure].append(value)
        subjects = subjects[::-1]
    show_progress("")
    return results


def show_progress(text: str) -> None:
    """Say on a terminal what is being measured."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def medians_of(results: Results) -> dict[str, Medians]:
    """Return each subject's medians over the repetitions."""
    return {
        subject: {figure: median(values) for figure, values in figures.items()}
        for subject, figures in results.items()
    }


def median(values: list[float | None]) -> float | None:
    """Return the median of what was measured, None if nothing was."""
    measured = [value for value in values if value is not None]
    return statistics.median(measured) if measured else None


def describe_machine() -> dict[str, object]:
    """Return what the figures were taken on."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.split(":")[1] for line in file if line.startswith("model name")]
    return {
        "cpu": models[0].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": subprocess.check_output(
            ["/usr/bin/python3", "--version"], text=True
        ).split()[1],
        "load": round(os.getloadavg()[0], 1),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def print_table(medians: dict[str, Medians]) -> int:
    """Print the medians beside each other; return how many targets are missed."""
    print(
        f"{'':40}{'haskell':>9}{'floor':>9}{'kvmd':>9}"
        f"{'/haskell':>10}{'/floor':>8}  target"
    )
    missed = 0
    for row in ROWS:
        values = {
            name: medians.get(name, {}).get(row.figure) for name in PREPARATIONS
        }
        if all(value is None for value in values.values()):
            continue
        cells = [
            "-" if value is None else row.format.format(value)
            for value in values.values()
        ]
        kvmd, floor, haskell = values["kvmd"], values["floor"], values["haskell"]
        verdict = judge(row.target, kvmd, floor)
        missed += verdict == "MISSED"
        print(
            f"{row.title:40}{cells[0]:>9}{cells[1]:>9}{cells[2]:>9}"
            f"{ratio(kvmd, haskell):>10}{ratio(kvmd, floor):>8}"
            f"  {row.target.text if row.target else '':20}{verdict}".rstrip()
        )
    return missed


def ratio(value: float | None, base: float | None) -> str:
    """Return a quotient in print, "-" where there is none."""
    if not value or not base or min(value, base) < 0:
        return "-"
    return f"{value / base:.2g}" if value < 100 * base else f"{value / base:.0f}"


def judge(target: Target | None, kvmd: float | None, floor: float | None) -> str:
    """Tell whether a target is met; nothing where it can't be told."""
    if target is None or kvmd is None:
        return ""
    if floor is None and "floor" in target.text:
        return ""
    return "met" if target.is_met(kvmd, floor or 0) else "MISSED"


def main() -> int:
    """Run the benchmark; the status says whether it ran, not what it found."""
    options = parse_arguments()
    machine = describe_machine()
    # Opened at once: afterwards its path may be covered.
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(options.output.open("w", encoding="utf-8"))
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmd-bench-"))
        )
        subjects = prepare(options.subject or list(PREPARATIONS), directory)
        enter_node(directory)
        if options.separate_cpus:
            separate_cpus()
        results = measure_all(
            subjects, options.only or list(MEASURES), options.repetitions
        )
        medians = medians_of(results)
        report = {"machine": machine, "medians": medians, "values": results}
        json.dump(report, output, indent=1)
    missed = print_table(medians)
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"targets missed: {missed}; all figures: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
