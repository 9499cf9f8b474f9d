"""What is measured: each function here returns the figures of one subject, once.

A figure that the daemon did not live to give, or that it never came to, is None.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional

from subjects import (
    CONTROL_DIR,
    PYTHON,
    DaemonDiedError,
    Process,
    Subject,
    clear_node,
    descriptor_store,
    on_one_cpu,
)

Figures = dict[str, Optional[float]]

#: The first of the instances that come one at a time, beside those that stand by.
TRIALS = 5000

DISCOVERIES = {0: 300, 100: 100, 1000: 100}
VERDICTS = {0: 100, 900: 100}
ONE_CPU_VERDICTS = 200
LIFE_BESIDE = 1000
SYSTEMD_BESIDE = (250, 1000, 4000)
SYSTEMD_VERDICTS = 100
LIVES_ALONE = 300
FLOODED_VERDICTS = 300
FLOODED_VERDICTS_MS = 4000
FLOOD_SECONDS = 1.5
EVENTS_EACH = 200
STARTS = 10
IDLE_SECONDS = 10
LISTINGS = 9
#: One listdir, and an lstat of each: the CPU time in ns.
LISTING = """
import os, sys, time
directory = sys.argv[1]
begin = time.process_time_ns()
for name in os.listdir(directory):
    os.lstat(f"{directory}/{name}")
print(time.process_time_ns() - begin)
"""
LIVES = 5000
#: Lives in parallel; so many more come first, for what is allocated only once.
WAVE = 50
PATIENCE_MS = 20
TIMEOUT_MS = 5000
NS_PER_MS = 1e6
NS_PER_S = 1e9
MIB = 1 << 20
KIB = 1 << 10


class Load:
    """The fake QEMUs (load.c), in a process of their own."""

    program: str
    #: What stands in for systemd (store.c), for those that know it.
    store: str
    #: The CPUs it may use; those of this process if there are none.
    cpus: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [self.program, CONTROL_DIR],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if self.cpus:
            os.sched_setaffinity(self._process.pid, self.cpus)

    def ask(self, *command: object) -> list[int]:
        """Give a command, return the answer. Raises DaemonDiedError."""
        assert self._process.stdin and self._process.stdout
        print(*command, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline().split()
        if not answer:
            raise DaemonDiedError
        return [int(word) for word in answer]

    def raise_priority(self) -> None:
        """Have it see soon what it waits for, whatever else wants the CPUs."""
        os.setpriority(os.PRIO_PROCESS, self._process.pid, -20)
        with suppress(FileNotFoundError):  # a kernel without autogroups
            Path(f"/proc/{self._process.pid}/autogroup").write_text("-20")

    def end(self) -> None:
        """End the process, and all the instances with it."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def scene(
    subject: Subject, standing: int = 0, **environment: str
) -> Iterator[tuple[Load, Process]]:
    """Start the subject beside so many running instances, which it finds at start."""
    clear_node()
    load = Load()
    try:
        load.ask("listen", 0, standing)
        process = subject.start(**environment)
        try:
            load.ask("wait", 0, standing, TIMEOUT_MS)
            process.settle()
            yield load, process
        finally:
            process.end()
    finally:
        load.end()


@contextmanager
def scene_under_systemd(
    subject: Subject, standing: int = 0
) -> Iterator[tuple[Load, Process]]:
    """Do the same with something that keeps the subject's connections, as systemd."""
    with descriptor_store(Load.store) as environment, scene(
        subject, standing, **environment
    ) as started:
        yield started


def measure_discovery(subject: Subject) -> Figures:
    """Let instances appear one at a time; take how soon each is negotiated with."""
    figures: Figures = {}
    for others, count in DISCOVERIES.items():
        with scene(subject, others) as (load, _):
            times = load.ask("discover", TRIALS, count, PATIENCE_MS)
        if others == 0:
            figures["missed"] = times.count(-1)
        happened = [nanoseconds for nanoseconds in times if nanoseconds != -1]
        figures[f"discovery-{others}"] = median(happened, NS_PER_MS)
    return figures


def measure_verdict(subject: Subject) -> Figures:
    """Let one user after the other shut down; take how soon the file is there."""
    figures: Figures = {}
    for others, count in VERDICTS.items():
        with scene(subject, others) as (load, _):
            times = shut_down(load, count)
        late = sum(time > NS_PER_MS for time in times)
        figures[f"verdict-{others}"] = median(times, NS_PER_MS)
        figures[f"late-{others}"] = 100 * late / len(times) if times else None
    return figures


def shut_down(load: Load, count: int) -> list[int]:
    """Create instances and have their users shut them down; return the delays."""
    times = []
    for number in range(TRIALS, TRIALS + count):
        load.ask("create", number, 1, PATIENCE_MS)
        times += delays_of(load, number)
    return times


def delays_of(load: Load, number: int) -> list[int]:
    """Have one instance shut down by its user; return the delay, if it was connected.

    A file that never came has the longest one.
    """
    _late, *times = load.ask("verdict", number, 1, TIMEOUT_MS)
    return [int(TIMEOUT_MS * NS_PER_MS) if time == -1 else time for time in times]


def measure_one_cpu(subject: Subject) -> Figures:
    """Do the same where load and daemon have one CPU.

    There, all that the daemon does in that turn, after the file too, is part of it.
    """
    with on_one_cpu(), scene(subject) as (load, _):
        times = shut_down(load, ONE_CPU_VERDICTS)
    return {
        "one-cpu": median(times, NS_PER_MS),
        "one-cpu-p99": percentile(times, NS_PER_MS),
    }


def measure_life(subject: Subject) -> Figures:
    """Take the CPU of one life after the other beside many, without systemd."""
    with scene(subject, LIFE_BESIDE) as (load, process):
        return {"life": cpu_of_life(load, process)}


def measure_systemd(subject: Subject) -> Figures:
    """Take what a life costs, and a verdict takes, while systemd keeps connections."""
    figures: Figures = {}
    if not subject.is_ours:
        return figures
    for others in SYSTEMD_BESIDE:
        with scene_under_systemd(subject, others) as (load, process):
            figures[f"systemd-life-{others}"] = cpu_of_life(load, process)
            times = shut_down(load, SYSTEMD_VERDICTS)
        figures[f"systemd-verdict-{others}"] = median(times, NS_PER_MS)
    return figures


def cpu_of_life(load: Load, process: Process) -> float | None:
    """Return the CPU time in ms that a daemon takes for a life, one after the other."""
    load.ask("lives", TRIALS, WAVE, 1)
    process.settle()
    cpu = process.cpu_ns()
    lives, _missed = load.ask("lives", TRIALS, LIVES_ALONE, 1)
    process.settle()
    return (process.cpu_ns() - cpu) / NS_PER_MS / lives if lives else None


def measure_flooded_verdict(subject: Subject) -> Figures:
    """Do the same while one instance sends events as fast as they are taken."""
    with scene(subject, 1 + FLOODED_VERDICTS) as (load, _):
        load.ask("flood", 0)
        time.sleep(0.2)
        _late, *times = load.ask("verdict", 1, FLOODED_VERDICTS, FLOODED_VERDICTS_MS)
        load.ask("calm")
    never = int(FLOODED_VERDICTS_MS * NS_PER_MS)
    times = [never if time == -1 else time for time in times]
    return {"flooded-verdict": percentile(times, NS_PER_MS)}


def measure_flood(subject: Subject) -> Figures:
    """Take how much is read from an instance that sends without end."""
    with scene(subject, 1) as (load, _):
        load.ask("flood", 0)
        time.sleep(0.3)
        begin_bytes, begin = load.ask("flooded")
        time.sleep(FLOOD_SECONDS)
        end_bytes, end = load.ask("flooded")
        load.ask("calm")
    return {"flood": (end_bytes - begin_bytes) / (end - begin) * NS_PER_S / 1e6}


def measure_events(subject: Subject) -> Figures:
    """Take what events that nobody cares about cost, and leave behind."""
    with scene(subject, 1000) as (load, process):
        cpu, rss = process.cpu_ns(), process.rss()
        load.ask("events", 0, 1000, EVENTS_EACH)
        process.settle()
        cpu, rss = process.cpu_ns() - cpu, process.rss() - rss
    return {"events": cpu / NS_PER_S / (EVENTS_EACH * 1000) * 1e6, "kept": rss / KIB}


def measure_memory(subject: Subject) -> Figures:
    """Take the memory by the number of instances."""
    many = 1000 if subject.name == "haskell" else 4000
    rss = {}
    for count in (0, 100, 1000, many):
        with scene(subject, count) as (_, process):
            rss[count] = process.rss()
    return {
        **{f"rss-{count}": rss[count] / MIB for count in (0, 100, 1000)},
        "per-connection": (rss[many] - rss[0]) / many,
    }


def measure_mass(subject: Subject) -> Figures:
    """Start a whole host's instances at once, and shut them down at once."""
    with scene(subject) as (load, _):
        created, time_to_create = load.ask("create", 0, 4000, TIMEOUT_MS)
        if created != 4000:
            return {"created": created}
        filed, time_to_file = load.ask("shutdown", 0, 4000, TIMEOUT_MS)
    return {
        "created": created,
        "create": time_to_create / NS_PER_S,
        "filed": filed,
        "shutdown": time_to_file / NS_PER_S if filed == 4000 else None,
    }


def measure_start(subject: Subject) -> Figures:
    """Take the time from exec until one instance, and 1000 are connected.

    And how long the interpreter takes for nothing.
    """
    first, bare = [], []
    for _ in range(STARTS):
        first.append(start_beside(subject, 1)[0])
        begin = time.monotonic_ns()
        subprocess.run([PYTHON, "-IS", "-c", "pass"], check=True)
        bare.append(time.monotonic_ns() - begin)
    return {
        "start": median(first, NS_PER_MS),
        "bare-start": median(bare, NS_PER_MS),
        "start-1000": start_beside(subject, 1000)[1] / NS_PER_S,
    }


def start_beside(subject: Subject, standing: int) -> tuple[float, float]:
    """Return the nanoseconds until the first and the last was negotiated with."""
    with scene(subject, standing) as (load, process):
        negotiated, first, last = load.ask("wait", 0, standing, TIMEOUT_MS)
        if negotiated != standing:
            raise DaemonDiedError
        return first - process.executed, last - process.executed


def measure_idle(subject: Subject) -> Figures:
    """See whether it sleeps when nothing happens, and what a rescan costs."""
    with scene(subject, 1000) as (_, process):
        figures: Figures = {"rescan": None}
        if subject.is_ours:
            # It wakes for the rescan alone: sleep through the time between two.
            wait_for_wake_up(process)
        switches = process.switches()
        time.sleep(IDLE_SECONDS)
        figures["idle"] = process.switches() - switches
        if subject.is_ours:
            cpu = process.cpu_ns()
            wait_for_wake_up(process)
            figures["rescan"] = (process.cpu_ns() - cpu) / NS_PER_MS
            figures["listing"] = median(
                [cpu_of_listing() for _ in range(LISTINGS)], NS_PER_MS
            )
        return figures


def cpu_of_listing() -> float:
    """Return the ns that one look at each name in the directory takes, at the least."""
    return float(
        subprocess.check_output([PYTHON, "-IS", "-c", LISTING, CONTROL_DIR], text=True)
    )


def wait_for_wake_up(process: Process) -> None:
    """Wait until it has done something, and is done with it."""
    switches = process.switches()
    while process.switches() == switches:
        time.sleep(0.05)
    process.settle()


def measure_lives(subject: Subject) -> Figures:
    """See what is left of instances that came and went."""
    with scene(subject) as (load, process):
        load.ask("lives", 0, WAVE, WAVE)
        process.settle()
        descriptors, rss = process.descriptors(), process.rss()
        lives, _missed = load.ask("lives", 0, LIVES, WAVE)
        process.settle()
        return {
            "lives": lives,
            "lives-descriptors": process.descriptors() - descriptors,
            "lives-rss": (process.rss() - rss) / KIB,
        }


def median(times: Sequence[float], unit: float) -> float | None:
    """Return the median in a unit, None of nothing."""
    return statistics.median(times) / unit if times else None


def percentile(times: Sequence[float], unit: float) -> float | None:
    """Return what 99 of 100 do not exceed, in a unit; None of nothing."""
    return sorted(times)[int(len(times) * 0.99)] / unit if times else None


MEASURES: dict[str, Callable[[Subject], Figures]] = {
    "discovery": measure_discovery,
    "verdict": measure_verdict,
    "one-cpu": measure_one_cpu,
    "life": measure_life,
    "systemd": measure_systemd,
    "flooded-verdict": measure_flooded_verdict,
    "flood": measure_flood,
    "events": measure_events,
    "memory": measure_memory,
    "mass": measure_mass,
    "start": measure_start,
    "idle": measure_idle,
    "lives": measure_lives,
}
#: Too long to be repeated, and too plain to need it.
ONCE = {"idle", "lives"}
