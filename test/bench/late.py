"""What makes a file late: the delay from event to file while something goes on.

Each function returns what 99 of 100 delays do not exceed, in milliseconds, once. To be
held against the quiet figures.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from measures import (
    NS_PER_MS,
    PATIENCE_MS,
    TRIALS,
    Figures,
    Load,
    delays_of,
    percentile,
    scene,
    scene_under_systemd,
    shut_down,
)
from subjects import Subject, busy_processes, frozen, log_file_system

COUNT = 200
#: Those between which it has to come to rest.
SLOW_COUNT = 100
STATUS_BESIDE = 4000
RESTART_BESIDE = 1000
#: A restart in place is over in that time: verdicts come at any moment of it.
RESTART_SECONDS = 0.15
FREEZE_SECONDS = 0.1
PEERS = 1000
TRICKLE_INTERVAL_MS = 50
BUSY_PROCESSES = 4


def measure_quiet(subject: Subject) -> Figures:
    """Take the delay while nothing else goes on, with and without systemd."""
    with scene(subject) as (load, _):
        figures = {"late-quiet": tail_of(shut_down(load, COUNT))}
    if subject.is_ours:
        with scene_under_systemd(subject) as (load, _):
            figures["late-quiet-systemd"] = tail_of(shut_down(load, COUNT))
    return figures


def measure_frozen_log(subject: Subject) -> Figures:
    """Freeze the log's file system, and thaw it after a while.

    Of two guests that go down meanwhile, the second finds a daemon that may be waiting
    for its log.
    """
    first, second = [], []
    try:
        with log_file_system() as file_system, scene(subject) as (load, process):
            for number in range(TRIALS, TRIALS + SLOW_COUNT):
                load.ask("create", number, 1, PATIENCE_MS)
                load.ask("create", number + SLOW_COUNT, 1, PATIENCE_MS)
                process.settle()  # it may have something to log of that
                with frozen(file_system, FREEZE_SECONDS):
                    first += delays_of(load, number)
                    second += delays_of(load, number + SLOW_COUNT)
    except subprocess.CalledProcessError as error:
        print(f"without a frozen log: {error}", file=sys.stderr)
        return {}
    return {"late-frozen": tail_of(first), "late-frozen-next": tail_of(second)}


def measure_status(subject: Subject) -> Figures:
    """Have the status of many instances logged."""
    if not subject.is_ours:
        return {}
    times = []
    with scene(subject, STATUS_BESIDE) as (load, process):
        for number in range(SLOW_COUNT):
            process.settle()
            os.kill(process.pid, signal.SIGUSR1)
            times += delays_of(load, number)
    return {"late-status": tail_of(times)}


def measure_restart(subject: Subject) -> Figures:
    """Have it restart in place."""
    if not subject.is_ours:
        return {}
    moments = random.Random(0)
    times = []
    with scene(subject, RESTART_BESIDE) as (load, process):
        for number in range(SLOW_COUNT):
            process.settle()
            os.kill(process.pid, signal.SIGUSR2)
            time.sleep(moments.uniform(0, RESTART_SECONDS))
            times += delays_of(load, number)
    return {"late-restart": tail_of(times)}


def measure_trickle(subject: Subject) -> Figures:
    """Have many peers send a byte of a line that never ends, again and again."""
    with scene(subject, PEERS) as (load, _):
        figures = {"late-trickle": tail_of(shut_down_amid_trickle(load))}
    if subject.is_ours:
        with scene_under_systemd(subject, PEERS) as (load, _):
            times = shut_down_amid_trickle(load)
        figures["late-trickle-systemd"] = tail_of(times)
    return figures


def shut_down_amid_trickle(load: Load) -> list[int]:
    """Return the delays of some guests while all others trickle."""
    load.ask("trickle", 0, PEERS, TRICKLE_INTERVAL_MS)
    time.sleep(0.5)
    times = shut_down(load, COUNT)
    load.ask("calm")
    return times


def measure_busy(subject: Subject) -> Figures:
    """Have other processes take all CPU. What the load sees late does not count."""
    with scene(subject) as (load, _), busy_processes(BUSY_PROCESSES):
        load.raise_priority()
        return {"late-busy": tail_of(shut_down(load, COUNT))}


def tail_of(times: list[int]) -> float | None:
    """Return the delay in ms that 99 of 100 do not exceed."""
    return percentile(times, NS_PER_MS)


LATE_MEASURES: dict[str, Callable[[Subject], Figures]] = {
    "quiet": measure_quiet,
    "frozen-log": measure_frozen_log,
    "status": measure_status,
    "restart": measure_restart,
    "trickle": measure_trickle,
    "busy": measure_busy,
}
