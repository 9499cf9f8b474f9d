"""Scenarios on a Ganeti node: functions whose names say what must hold."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence

from cluster import LOG_FILE, run


def all_hold(scenarios: Sequence[Callable[[], None]]) -> bool:
    """Play scenarios in their order, say how they went; tell whether all hold."""
    start = time.monotonic()
    results = [_holds(scenario) for scenario in scenarios]
    report("", start, f"in all; {sum(results)} of {len(results)} scenarios hold")
    return all(results)


def _holds(scenario: Callable[[], None]) -> bool:
    """Play a scenario, say on one line how it went; tell whether all held."""
    start = time.monotonic()
    failure = None
    try:
        scenario()
    except Exception:  # noqa: BLE001 (it is told, and the others are played)
        failure = traceback.format_exc()
    report("FAIL" if failure else "ok", start, scenario.__name__.replace("_", " "))
    if failure:
        print(failure, run("tail", str(LOG_FILE)), sep="\n", flush=True)
    return not failure


def report(verdict: str, start: float, what: str) -> None:
    """Print one line, with the seconds it took since the start."""
    print(f"{verdict:4} {time.monotonic() - start:5.1f} s  {what}", flush=True)
