"""A clock that a test sets."""

from __future__ import annotations

import time

import pytest


def pass_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have the monotonic clock stand still, so many seconds later."""
    later = time.monotonic() + seconds
    monkeypatch.setattr(time, "monotonic", lambda: later)
