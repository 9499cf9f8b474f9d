"""Waiting for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

SECONDS = 20.0  # far above what anything here takes, even on a busy machine


def wait_until(
    condition: Callable[[], Result | None], what: str, seconds: float = SECONDS
) -> Result:
    """Return what `condition` returns once that is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        late = time.monotonic() > deadline  # then this is the last look
        result = condition()
        if result:
            return result
        if late:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.002)
