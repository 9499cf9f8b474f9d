"""What the targets that are made in worlds rely on: `test/world/unshared`."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, Signals
from typing import IO

import pytest
from deadline import SECONDS

# Who starts it may ignore signals, as a shell does for what is in the background.
UNSHARED = ("env", "--default-signal", Path(__file__).parent / "world/unshared")


@pytest.fixture(autouse=True)
def root() -> None:
    """Skip a test where namespaces are not to be had, but not where they have to be."""
    if os.geteuid() != 0:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("only root can mount")


@contextmanager
def started(command: str) -> Iterator[subprocess.Popen[str]]:
    """Run a shell command unshared, whose first word it is that it has started."""
    with subprocess.Popen(
        [*UNSHARED, "sh", "-c", f"echo started; {command}"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, SIGKILL)


def wait_until_closed(stream: IO[str] | None) -> None:
    """Wait until no process has the other end of a pipe any more."""
    assert stream is not None
    assert select.select([stream], [], [], SECONDS)[0], "somebody has it still"
    assert stream.read() == ""


@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGHUP, SIGKILL])
def test_no_process_is_left_of_what_runs_unshared(number: Signals) -> None:
    with started("setsid sleep 1000 & sleep 1000") as process:
        process.send_signal(number)
        wait_until_closed(process.stdout)
        assert process.wait(SECONDS) != 0


def test_no_process_is_left_when_what_runs_unshared_ends() -> None:
    with started("setsid sleep 1000 & exit 3") as process:
        wait_until_closed(process.stdout)
        assert process.wait(SECONDS) == 3


def test_what_is_mounted_unshared_is_seen_nowhere_else(tmp_path: Path) -> None:
    with started(f"mount -t tmpfs tmpfs {tmp_path} && touch {tmp_path}/there") as run:
        assert run.wait(SECONDS) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_host_name_given_unshared_stays_there() -> None:
    before = os.uname().nodename
    with started("hostname unshared && uname -n") as process:
        assert process.stdout is not None
        assert process.stdout.read() == "unshared\n"
        assert process.wait(SECONDS) == 0
    assert os.uname().nodename == before
