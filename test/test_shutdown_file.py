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
from kvmd_shutdown_file import LONGEST_DELAY, LastVerdict, ShutdownFiles
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
    return Log(None, [lambda line: lines.append(line.split(" ", 4)[4])])


@pytest.fixture
def files(control_dir: Path, log: Log) -> ShutdownFiles:
    """Return the shutdown files of all instances; none is there."""
    return ShutdownFiles(str(control_dir), log)


def fail(*_: object) -> None:
    """Fail as a system call does on a read-only file system."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


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
    files: ShutdownFiles,
    log: Log,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    event: float | None,
    when: str,
    after: str,
) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    files.carry_out("web1", USER, event)
    assert logged(log, lines) == [
        "INFO web1: verdict=user cause=guest-shutdown"
        f" event={when} file=created after={after}"
    ]


def test_only_the_verdict_user_makes_a_file(
    files: ShutdownFiles, control_dir: Path
) -> None:
    path = control_dir / "web1.shutdown"
    for verdict in Verdict:
        files.carry_out("web1", Ruling(verdict, "x"), None)
        assert path.exists() == (verdict is Verdict.USER), verdict


def test_of_a_guest_that_runs_without_a_file_there_is_nothing_to_tell(
    files: ShutdownFiles, log: Log, lines: list[str]
) -> None:
    assert files.carry_out("web1", RUNNING, None) is None
    assert logged(log, lines) == []
    files.carry_out("web1", USER, None)
    last = files.carry_out("web1", RUNNING, None)
    assert last is not None and last.file == "removed"


def test_a_file_planted_anew_each_time_is_given_up_for_a_while(
    files: ShutdownFiles,
    control_dir: Path,
    log: Log,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (control_dir / "web1.shutdown").symlink_to("x")
    monkeypatch.setattr(os, "unlink", lambda _path: None)
    pending = files.carry_out("web1", USER, None)
    assert pending is not None and pending.file is None
    *warnings, error = logged(log, lines)
    assert warnings and all(line.startswith("WARNING web1: ") for line in warnings)
    assert "planted again and again" in error or os.strerror(errno.EEXIST) in error


def test_what_could_not_be_written_is_written_later_and_told_of_then(
    files: ShutdownFiles, log: Log, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "mknod", fail)
    pending = files.carry_out("web1", USER, None)
    assert pending is not None and pending.file is None
    with pytest.raises(OSError):
        files.write("web1", pending)
    monkeypatch.undo()
    last = files.write("web1", pending)
    assert last is not None and last.file == "created"
    error, told = logged(log, lines)
    assert re.match("ERROR web1: verdict=user .*Read-only.*trying again", error)
    assert told == f"INFO web1: {last}"


def test_a_verdict_is_restored_as_it_was(files: ShutdownFiles) -> None:
    assert LastVerdict.restore(None) is None
    last = files.carry_out("web1", USER, 1.5)
    assert last is not None
    record = json.loads(json.dumps(last._asdict()))
    assert LastVerdict.restore(record) == last


@pytest.mark.parametrize("member", ["verdict", "cause", "event", "time", "file"])
def test_a_member_of_another_type_is_refused(files: ShutdownFiles, member: str) -> None:
    last = files.carry_out("web1", USER, 1.5)
    assert last is not None
    with pytest.raises(ValueError):
        LastVerdict.restore({**last._asdict(), member: ["x"]})


@pytest.mark.parametrize(
    "record", [{}, {"verdict": "user"}, {"verdict": "maybe"}, {"verdict": 1}, "user"]
)
def test_what_is_no_verdict_is_refused(record: object) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        LastVerdict.restore(record)  # type: ignore[arg-type]
