#!/usr/bin/env python3
"""Measure the daemon beside Ganeti's own, its version 1.0.0, and a floor in C.

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
from pathlib import Path
from typing import NamedTuple, Optional

from late import LATE_MEASURES
from measures import MEASURES, ONCE, Load
from subjects import (
    HERE,
    PREPARATIONS,
    DaemonDiedError,
    Subject,
    compile_program,
    enter_node,
)

ALL_MEASURES = {**MEASURES, **LATE_MEASURES}

#: Figure name -> value, of one subject: the medians.
Medians = dict[str, Optional[float]]
#: Subject -> figure name -> a value for each repetition.
Results = dict[str, dict[str, list[Optional[float]]]]

MISSED = "MISSED"


class Target(NamedTuple):
    """What this daemon's figure is held to: a number, or another figure of the run."""

    factor: float
    #: Whose figure it is to be so many times; the number itself, if nobody's.
    subject: str | None = None
    #: Which figure; the row's own, if none is named.
    figure: str | None = None
    #: Added to that.
    slack: float = 0
    #: It is to be that much at the least.
    is_least: bool = False

    def __str__(self) -> str:
        """Return it as the table has it."""
        sign = ">=" if self.is_least else "<="
        of = {None: "", "kvmd": f" {self.figure}"}.get(self.subject, f" {self.subject}")
        slack = f" + {self.slack:g}" if self.slack else ""
        return f"{sign} {self.factor:g}{of}{slack}"

    def bound(self, row: str, medians: dict[str, Medians]) -> float | None:
        """Return the bound of a row's figure, None if it could not be measured."""
        if self.subject is None:
            return self.factor
        base = medians.get(self.subject, {}).get(self.figure or row)
        return None if base is None else self.factor * base + self.slack

    def is_met(self, value: float, bound: float) -> bool:
        """Tell whether a figure keeps the bound."""
        return value >= bound if self.is_least else value <= bound


class Row(NamedTuple):
    """A line of the table."""

    figure: str
    title: str
    format: str
    targets: tuple[Target, ...] = ()


#: No more than a tenth worse than version 1.0.0.
NO_WORSE = Target(1.1, "1.0.0")
NEVER = (Target(0),)
EACH = (Target(4000, is_least=True),)
VERDICT = (Target(0.3, "haskell"), Target(4, "floor"), NO_WORSE)
SYSTEMD_LIFE, SYSTEMD_VERDICT = "systemd-life-250", "systemd-verdict-250"
#: Milliseconds by which an event may be late that something else holds up.
QUIET = (Target(1, "kvmd", "late-quiet", slack=5), NO_WORSE)
QUIET_SYSTEMD = (Target(1, "kvmd", "late-quiet-systemd", slack=5), NO_WORSE)

ROWS = [
    Row("missed", "instances missed, of 300 discoveries", "{:.0f}", NEVER),
    Row("discovery-0", "discovery, alone (ms)", "{:.2f}", (NO_WORSE,)),
    Row("discovery-100", "  beside 100 others", "{:.2f}", (NO_WORSE,)),
    Row("discovery-1000", "  beside 1000 others", "{:.2f}", (NO_WORSE,)),
    Row("verdict-0", "verdict, alone (ms)", "{:.3f}", VERDICT),
    Row(
        "verdict-900",
        "  beside 900 others",
        "{:.3f}",
        (*VERDICT, Target(1.3, "kvmd", "verdict-0")),
    ),
    Row("late-0", "  later than 1 ms, alone (%)", "{:.1f}"),
    Row("late-900", "  later than 1 ms, beside 900 (%)", "{:.1f}"),
    Row(
        "one-cpu",
        "verdict, load and daemon on one CPU (ms)",
        "{:.3f}",
        (Target(1, "haskell"), NO_WORSE),
    ),
    Row("one-cpu-p99", "  p99", "{:.3f}", (Target(1, "haskell"),)),
    Row("life", "CPU of a life beside 1000 (ms)", "{:.2f}"),
    Row("systemd-life-250", "  under systemd, beside 250", "{:.2f}", (NO_WORSE,)),
    Row(
        "systemd-life-1000",
        "  beside 1000",
        "{:.2f}",
        (Target(1.3, "kvmd", SYSTEMD_LIFE), NO_WORSE),
    ),
    Row(
        "systemd-life-4000",
        "  beside 4000",
        "{:.2f}",
        (Target(1.3, "kvmd", SYSTEMD_LIFE), NO_WORSE),
    ),
    Row(
        "systemd-verdict-250",
        "verdict under systemd, beside 250 (ms)",
        "{:.3f}",
        (NO_WORSE,),
    ),
    Row(
        "systemd-verdict-1000",
        "  beside 1000",
        "{:.3f}",
        (Target(1.3, "kvmd", SYSTEMD_VERDICT), NO_WORSE),
    ),
    Row(
        "systemd-verdict-4000",
        "  beside 4000",
        "{:.3f}",
        (Target(1.3, "kvmd", SYSTEMD_VERDICT), NO_WORSE),
    ),
    Row("flooded-verdict", "verdict during a flood, p99 (ms)", "{:.1f}", QUIET[:1]),
    Row(
        "events",
        "events of no interest (CPU s/million)",
        "{:.3f}",
        (Target(6, "floor"), NO_WORSE),
    ),
    Row(
        "flood",
        "flood from one instance (MB/s)",
        "{:.0f}",
        (
            Target(1 / 6, "floor", is_least=True),
            Target(0.9, "1.0.0", is_least=True),
        ),
    ),
    Row("kept", "memory kept after 200,000 events (KiB)", "{:.0f}", (Target(256),)),
    Row("rss-0", "RSS with no connection (MiB)", "{:.2f}", (Target(12.5), NO_WORSE)),
    Row("rss-100", "  with 100", "{:.2f}", (NO_WORSE,)),
    Row("rss-1000", "  with 1000", "{:.2f}", (NO_WORSE,)),
    Row(
        "per-connection",
        "bytes per connection, at 4000",
        "{:.0f}",
        (Target(1100), NO_WORSE),
    ),
    Row("created", "4000 created at once: connected", "{:.0f}", EACH),
    Row("create", "  time (s)", "{:.2f}", (Target(4, "floor"), NO_WORSE)),
    Row("filed", "4000 shut down at once: files", "{:.0f}", EACH),
    Row("shutdown", "  time (s)", "{:.2f}", (Target(4, "floor"), NO_WORSE)),
    Row("start-1000", "exec to 1000 instances connected (s)", "{:.3f}", (NO_WORSE,)),
    Row("bare-start", "the bare interpreter, to its end (ms)", "{:.1f}"),
    Row(
        "start",
        "exec to first instance connected (ms)",
        "{:.1f}",
        (Target(4, "kvmd", "bare-start"), NO_WORSE),
    ),
    Row("idle", "wake-ups in 10 s beside 1000 instances", "{:.0f}", NEVER),
    Row("listing", "  CPU of listdir, and lstat of each (ms)", "{:.2f}"),
    Row(
        "rescan",
        "  CPU of a rescan (ms)",
        "{:.2f}",
        (Target(3, "kvmd", "listing"), NO_WORSE),
    ),
    Row("lives", "instance lives", "{:.0f}"),
    Row("lives-descriptors", "  descriptors left", "{:+.0f}", NEVER),
    Row("lives-rss", "  RSS growth (KiB)", "{:+.0f}", (Target(512),)),
    Row("late-quiet", "verdict, p99 (ms): quiet", "{:.1f}"),
    Row("late-quiet-systemd", "  quiet, under systemd", "{:.1f}"),
    Row("late-frozen", "  the log has just been frozen", "{:.1f}", QUIET),
    Row("late-frozen-next", "  the next, thawed 100 ms later", "{:.1f}"),
    Row("late-status", "  a status of 4000 is logged", "{:.1f}", QUIET),
    Row("late-trickle", "  1000 trickle bytes", "{:.1f}", QUIET),
    Row("late-trickle-systemd", "  the same, under systemd", "{:.1f}", QUIET_SYSTEMD),
    Row("late-restart", "  a restart in place, beside 1000", "{:.1f}", (NO_WORSE,)),
    Row("late-busy", "  four processes take all CPU", "{:.1f}", (NO_WORSE,)),
]


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        action="append",
        choices=list(ALL_MEASURES),
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
    Load.store = compile_program(HERE / "store.c", directory)
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
            if name in {*ONCE, *LATE_MEASURES} and repetition > 0:
                continue
            for subject in subjects:
                show_progress(f"{repetition + 1}/{repetitions} {name} {subject.name}")
                try:
                    figures = ALL_MEASURES[name](subject)
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
    names = list(PREPARATIONS)
    bases = names[:-1]
    heads = [f"{name:>9}" for name in names] + [f"{'/' + name:>9}" for name in bases]
    print(f"{'':42}{''.join(heads)}  targets")
    missed = 0
    for row in ROWS:
        values = {name: medians.get(name, {}).get(row.figure) for name in names}
        if all(value is None for value in values.values()):
            continue
        cells = ["-" if v is None else row.format.format(v) for v in values.values()]
        cells += [ratio(values["kvmd"], values[name]) for name in bases]
        verdicts = [judge(row, target, medians) for target in row.targets]
        missed += sum(verdict.endswith(MISSED) for verdict in verdicts)
        line = "".join(f"{cell:>9}" for cell in cells)
        print(f"{row.title:42}{line}  {', '.join(filter(None, verdicts))}".rstrip())
    return missed


def ratio(value: float | None, base: float | None) -> str:
    """Return a quotient in print, "-" where there is none."""
    if not value or not base or min(value, base) < 0:
        return "-"
    return f"{value / base:.2g}" if value < 100 * base else f"{value / base:.0f}"


def judge(row: Row, target: Target, medians: dict[str, Medians]) -> str:
    """Return a target and whether it is met; nothing where it can't be told."""
    value = medians.get("kvmd", {}).get(row.figure)
    bound = target.bound(row.figure, medians)
    if value is None or bound is None:
        return ""
    return f"{target} {'met' if target.is_met(value, bound) else MISSED}"


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
            subjects, options.only or list(ALL_MEASURES), options.repetitions
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
