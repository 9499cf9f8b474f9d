"""The shutdown file, and the line that tells of a verdict."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from pathlib import Path

import pytest

from kvmd_log import Log
from kvmd_shutdown_file import (
    LONGEST_DELAY,
    ShutdownFile,
    export_judgement,
    restore_judgement,
)
from kvmd_verdict import Ruling, Verdict

USER = Ruling(Verdict.USER, "guest-shutdown")
NOT_USER = Ruling(Verdict.NOT_USER, "host-signal")
RUNNING = Ruling(Verdict.RUNNING, "running")
NOW = 1_800_000_000.0


@pytest.fixture
def lines() -> list[str]:
    """Return the list of what was logged, without dates."""
    return []


@pytest.fixture
def log(lines: list[str]) -> Log:
    """Return a log that is written to the list."""
    return Log(None, [lambda _level, line: lines.append(line.split(" ", 4)[4])])


@pytest.fixture
def file(control_dir: Path, log: Log) -> ShutdownFile:
    """Return the shutdown file of an instance, which is not there."""
    return ShutdownFile(str(control_dir), "web1", log)


def logged(log: Log, lines: list[str]) -> list[str]:
    """Return what was logged by now."""
    log.flush()
    return lines


@pytest.mark.parametrize(
    ("event", "when", "after"),
    [
        (NOW - 0.0008, "1799999999.999200", "0.8ms"),
        (NOW, "1800000000.000000", "0.0ms"),
        (NOW + 0.001, "1800000000.001000", "unknown"),
        (NOW - LONGEST_DELAY, "1799913600.000000", "86400000.0ms"),
        (NOW - LONGEST_DELAY - 1, "1799913599.000000", "unknown"),
        (None, "unknown", "unknown"),
    ],
)
def test_a_delay_that_a_clock_makes_senseless_is_unknown(
    file: ShutdownFile,
    log: Log,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    event: float | None,
    when: str,
    after: str,
) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    file.carry_out(USER, event)
    assert logged(log, lines) == [
        "INFO web1: verdict=user cause=guest-shutdown"
        f" event={when} file=created after={after}"
    ]


def test_only_the_verdict_user_makes_a_file(
    file: ShutdownFile, control_dir: Path
) -> None:
    path = control_dir / "web1.shutdown"
    for verdict in Verdict:
        file.carry_out(Ruling(verdict, "x"), None)
        assert path.exists() == (verdict is Verdict.USER), verdict


def test_a_guest_that_runs_without_a_file_is_worth_no_line_and_no_verdict(
    file: ShutdownFile, log: Log, lines: list[str]
) -> None:
    file.carry_out(NOT_USER, None)
    before = file.judgement
    file.carry_out(RUNNING, None)
    assert file.judgement is before
    assert len(logged(log, lines)) == 1


def test_a_file_planted_anew_each_time_is_given_up_for_a_while(
    file: ShutdownFile,
    control_dir: Path,
    log: Log,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (control_dir / "web1.shutdown").symlink_to("x")
    monkeypatch.setattr(os, "unlink", lambda _path: None)
    file.carry_out(USER, None)
    assert file.is_pending
    *warnings, error = logged(log, lines)
    assert warnings and all(line.startswith("WARNING web1: ") for line in warnings)
    assert "planted again and again" in error or os.strerror(errno.EEXIST) in error


def test_what_could_not_be_written_is_written_later_and_told_of_then(
    file: ShutdownFile, log: Log, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mknod", fail)
    file.carry_out(USER, None)
    assert file.is_pending
    assert isinstance(file.write(), OSError)
    monkeypatch.undo()
    assert file.write() is None
    assert not file.is_pending
    error, told = logged(log, lines)
    assert re.match("ERROR web1: verdict=user .*Read-only.*trying again", error)
    assert " file=created " in told


def test_a_verdict_on_another_qemu_is_given_up(
    file: ShutdownFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mknod", fail)
    file.carry_out(USER, None)
    file.give_up()
    assert not file.is_pending and file.judgement is None
    assert file.write() is None


def test_a_verdict_is_restored_as_it_was(file: ShutdownFile) -> None:
    assert restore_judgement(export_judgement(None)) is None
    file.carry_out(USER, 1.5)
    record = json.loads(json.dumps(export_judgement(file.judgement)))
    assert restore_judgement(record) == file.judgement


@pytest.mark.parametrize(
    "record", [{}, {"verdict": "user"}, {"verdict": "maybe"}, {"verdict": 1}, "user"]
)
def test_what_is_no_verdict_is_refused(record: object) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        restore_judgement(record)  # type: ignore[arg-type]
