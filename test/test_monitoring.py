"""The man page's example of a check for monitoring, run against what it is to find."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from daemon import INSTANCE, ROOT, Daemon
from deadline import SECONDS, wait_until
from fake_qemu import FakeQemu
from manual import rendered_page, section
from variant import program_with

IMPATIENT = "kvmd_context.PATIENCE = kvmd_monitor.PATIENCE = 0.1"
OK, CRITICAL = 0, 2
# What the example runs.
INSTALLED = "/usr/sbin/ganeti-kvmd"


class Check:
    """The example as an administrator has it, for the daemon of a test."""

    def __init__(self, daemon: Daemon) -> None:
        directory = daemon.control_dir.parent
        command = [
            *(sys.executable, str(ROOT / "kvmd.py"), "--no-cluster-checks"),
            *("--control-dir", str(daemon.control_dir)),
            *("--pid-file", str(daemon.pid_file)),
        ]
        self._program = directory / "ganeti-kvmd"
        self._program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        self._program.chmod(0o755)
        page = section(rendered_page(), "Monitoring")
        example = re.search(r"^ *#!/bin/sh\n.*^ *exit \$status\n", page, re.M | re.S)
        assert example
        self._script = directory / "check_kvmd"
        script = dedent(example[0]).replace(INSTALLED, str(self._program))
        self._script.write_text(script)

    def break_status(self) -> None:
        """Have the program print nothing when it is asked for the status."""
        command = self._program.read_text()
        failing = "case $1 in --status*) exit 1 ;; esac\n"
        self._program.write_text(command.replace("exec ", f"{failing}exec "))

    def run(self) -> tuple[int, str]:
        """Return the exit status and what is printed."""
        done = subprocess.run(
            ["sh", str(self._script)],
            capture_output=True,
            check=False,
            text=True,
            timeout=SECONDS,
        )
        assert done.stderr == ""
        return done.returncode, done.stdout

    def wait_for(self, status: int, line: str) -> None:
        """Wait until it ends with this status, having printed this line."""

        def ends_so() -> bool:
            ended_with, said = self.run()
            return ended_with == status and line in said.splitlines()

        wait_until(ends_so, f"status {status} and {line}")


@pytest.fixture
def daemon(control_dir: Path) -> Iterator[Daemon]:
    """Return a daemon that soon complains of a silent QEMU."""
    program = program_with(control_dir.parent, IMPATIENT)
    with Daemon(control_dir, program=program) as daemon:
        yield daemon


@pytest.fixture
def check(daemon: Daemon) -> Check:
    """Return the check for the daemon."""
    return Check(daemon)


def test_a_node_where_all_is_well(check: Check, fake_qemu: FakeQemu) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    check.wait_for(OK, "OK: every instance that runs is monitored")


def test_no_daemon(check: Check, daemon: Daemon) -> None:
    daemon.stop()
    status, said = check.run()
    assert status == CRITICAL
    assert said.startswith("CRITICAL: no daemon runs ")
    assert said.count("\n") == 1


def test_a_status_that_cannot_be_read(check: Check) -> None:
    check.break_status()
    status, said = check.run()
    assert status == CRITICAL
    assert said.startswith("CRITICAL: the status cannot be read: ")


def test_an_instance_that_runs_and_is_not_monitored(
    check: Check, fake_qemu: FakeQemu
) -> None:
    fake_qemu.listen()
    check.wait_for(CRITICAL, f"CRITICAL: {INSTANCE} is not monitored")


def test_an_instance_whose_socket_was_removed(
    check: Check, daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.listen()
    daemon.stop()
    fake_qemu.path.unlink()
    daemon.start()
    status, said = check.run()
    assert status == 1
    assert said.startswith(f"WARNING: {fake_qemu.path}: ")


def test_a_verdict_that_cannot_be_written(
    check: Check, daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    elsewhere = daemon.control_dir.with_name("elsewhere")
    daemon.control_dir.rename(elsewhere)
    fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    daemon.wait_for_log("trying again every second")
    status, said = check.run()
    assert status == CRITICAL
    verdict = f"CRITICAL: {INSTANCE} has a verdict that cannot be written"
    assert verdict in said.splitlines()
    elsewhere.rename(daemon.control_dir)
