"""The service: signals, restarts, the service manager."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from daemon import INSTANCE, Daemon
from deadline import SECONDS, wait_until
from fake_qemu import FakeQemu
from node import Node
from status import status_table
from variant import program_with

import kvmd
import kvmd_options
import kvmd_systemd
import kvmd_version

# ---- Signals -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_ends_it_at_once_with_status_0(
    control_dir: Path, fake_qemu: FakeQemu, number: signal.Signals
) -> None:
    fake_qemu.listen()
    with Daemon(control_dir) as daemon:
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE)
        daemon.go_first()
        sent = time.monotonic()
        daemon.send_signal(number)
        assert daemon.wait_until_gone() == 0
        assert time.monotonic() - sent < 1
        assert daemon.log.endswith(" INFO stopped\n")
        assert not daemon.pid_file.exists()


def end_at_line(node: Node, count: int) -> tuple[int, bool]:
    """Run the daemon in a child that gets SIGTERM at a line of its start.

    Returns the exit status (negative: killed by a signal), and whether the daemon was
    up before it came so far.
    """
    pid = os.fork()
    if pid == 0:
        lines: set[tuple[str, int]] = set()

        def trace(frame: FrameType, _what: str, _argument: object) -> Any:
            code = frame.f_code
            if not Path(code.co_filename).name.startswith("kvmd"):
                return None
            up = code.co_name == "_turn"
            lines.add((code.co_name, frame.f_lineno))
            if len(lines) == count or up:
                sys.settrace(None)
                os.kill(os.getpid(), signal.SIGTERM)
                if up:
                    node.directory.joinpath("up").touch()
            return trace

        status = 99
        try:
            sys.argv = node.command("--foreground", "--log-file", "/dev/null")[1:]
            os.dup2(os.open(os.devnull, os.O_RDWR), 2)
            options = kvmd_options.parse_arguments(sys.argv[1:])
            kvmd_options.parse_arguments = lambda arguments: options
            sys.settrace(trace)
            status = kvmd.main()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), (node.directory / "up").exists()


def test_sigterm_at_any_point_of_the_start_leaves_nothing(
    node: Node, step: int = 5
) -> None:
    with FakeQemu(node.control_dir, INSTANCE) as qemu:
        qemu.bind()
        statuses = []
        for count in itertools.count(1, step):
            status, up = end_at_line(node, count)
            assert status in (0, -signal.SIGTERM)
            assert not node.pid_file.exists()
            statuses.append(status)
            if up:
                break
    assert statuses[0] == -signal.SIGTERM and statuses[-1] == 0
    assert len(statuses) * step > 100


@pytest.mark.soak
def test_sigterm_at_every_point_of_the_start_leaves_nothing(node: Node) -> None:
    test_sigterm_at_any_point_of_the_start_leaves_nothing(node, step=1)


def test_sigterm_in_a_burst_loses_no_verdict_that_was_read(
    control_dir: Path, daemon: Daemon
) -> None:
    qemus = [FakeQemu(control_dir, f"burst{number}") for number in range(30)]
    for qemu in qemus:
        qemu.listen()
        qemu.negotiate()
        daemon.wait_until_connected(qemu.name)
    with daemon.frozen():
        for qemu in qemus:
            qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        daemon.send_signal(signal.SIGTERM)
    assert daemon.wait_until_gone() == 0
    assert all(qemu.shutdown_file.exists() for qemu in qemus)
    for qemu in qemus:
        qemu.exit()
    daemon.start()


def test_sigusr1_logs_a_line_for_each_instance(
    daemon: Daemon, control_dir: Path, fake_qemu: FakeQemu
) -> None:
    with FakeQemu(control_dir, "starting") as starting:
        starting.bind()
        fake_qemu.listen()
        fake_qemu.negotiate()
        fake_qemu.event("POWERDOWN")
        wait_until(
            lambda: status_table(daemon).get(f"{INSTANCE}.kvmd", "").count("powerdown"),
            "the daemon has read the event",
        )
        table = status_table(daemon)
    assert table["starting.kvmd"] == "connecting"
    assert re.fullmatch(
        rf"connected since [\d-]+ [\d:]+, QEMU 7\.2\.22 pid {os.getpid()},"
        " powerdown requested",
        table[f"{INSTANCE}.kvmd"],
    )
    header = daemon.wait_for_log(" status: version .*")[0]
    assert f"version {kvmd_version.VERSION}, up " in header and "2 instances" in header


def test_an_unexpected_error_in_the_loop_is_logged_with_its_traceback(
    control_dir: Path,
) -> None:
    patch = "kvmd_log.Log.reopen = lambda _: 1 / 0"
    program = program_with(control_dir.parent, patch)
    with Daemon(control_dir, program=program) as daemon:
        daemon.send_signal(signal.SIGHUP)
        assert daemon.wait_until_gone() == 1
        assert "ZeroDivisionError" in daemon.log and "Traceback" in daemon.log
        assert not daemon.pid_file.exists()


# ---- Restarts while instances run ----------------------------------------------------


def test_instances_that_run_at_the_start_are_taken_up(
    control_dir: Path, daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    daemon.end()
    fake_qemu.disconnect()
    daemon.start()
    fake_qemu.negotiate()
    fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    assert " verdict=user " in daemon.wait_for_verdict(INSTANCE)


@pytest.mark.parametrize("present", [True, False])
def test_what_was_said_of_a_guest_that_is_down_stands_after_a_restart(
    daemon: Daemon, fake_qemu: FakeQemu, present: bool
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    daemon.end()
    fake_qemu.disconnect()
    if present:
        fake_qemu.shutdown_file.touch()
    daemon.start()
    fake_qemu.negotiate(status="shutdown")
    daemon.wait_until_connected(INSTANCE, times=2)
    fake_qemu.exit()
    wait_until(lambda: not status_table(daemon), "the instance is gone")
    assert fake_qemu.shutdown_file.exists() == present
    assert ": verdict=" not in daemon.log


def rename_away_and_back(path: Path) -> None:
    path.rename(path.with_suffix(".away"))
    path.with_suffix(".away").rename(path)


@pytest.mark.parametrize("disturb", [os.utime, rename_away_and_back])
@pytest.mark.parametrize("runs", [True, False], ids=["running", "stopped"])
def test_a_powerdown_outlives_a_restart_and_what_is_done_to_the_socket(
    control_dir: Path,
    fake_qemu: FakeQemu,
    disturb: Callable[[Path], None],
    runs: bool,
) -> None:
    with Daemon(control_dir, "--rescan-interval=0.05") as daemon:
        fake_qemu.listen()
        fake_qemu.negotiate()
        fake_qemu.event("POWERDOWN")
        fake_qemu.wait_until_read()
        daemon.stop()
        fake_qemu.disconnect()
        if not runs:
            disturb(fake_qemu.path)
        daemon.start()
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE, times=2)
        if runs:
            disturb(fake_qemu.path)
            daemon.wait_for_rescan()
        fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        verdict = daemon.wait_for_verdict(INSTANCE)
        assert " cause=guest-shutdown,powerdown-requested " in verdict
        daemon.stop()


# ---- The service manager -------------------------------------------------------------


class ServiceManager:
    """The end of systemd's that sd_notify(3) talks to."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(SECONDS)

    def wait_for(self, assignment: str) -> None:
        """Wait until a message holds that line."""
        while True:
            message, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 8)
            for descriptor in descriptors:
                os.close(descriptor)
            if re.search(rf"^{assignment}$", message.decode(), re.MULTILINE):
                return

    def close(self) -> None:
        self._socket.close()


def test_for_the_service_manager_a_daemon_that_is_not_needed_has_not_failed(
    node: Node,
) -> None:
    (node.ssconf_dir / "ssconf_enabled_user_shutdown").write_text("False\n")
    address = f"{node.directory}/notify"
    manager = ServiceManager(address)
    node.environment["NOTIFY_SOCKET"] = address
    try:
        assert node.run("--foreground").returncode == 0
        manager.wait_for("READY=1")
    finally:
        manager.close()


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_the_service_manager_is_told(
    control_dir: Path, fake_qemu: FakeQemu, abstract: bool
) -> None:
    path = f"{control_dir.parent}/notify"
    manager = ServiceManager("\0" + path if abstract else path)
    environment = {
        **os.environ,
        "NOTIFY_SOCKET": "@" + path if abstract else path,
        "WATCHDOG_USEC": "1000000",
    }
    try:
        with Daemon(control_dir, environment=environment) as daemon:
            manager.wait_for("READY=1")
            for _ in range(3):
                manager.wait_for("WATCHDOG=1")
            fake_qemu.listen()
            manager.wait_for("STATUS=instances watched: 1")
            daemon.send_signal(signal.SIGHUP)
            manager.wait_for("RELOADING=1")
            manager.wait_for("READY=1")
            daemon.send_signal(signal.SIGTERM)
            manager.wait_for("STOPPING=1")
            assert daemon.wait_until_gone() == 0
    finally:
        manager.close()


@pytest.mark.parametrize(
    ("watchdog", "interval"),
    [
        ({}, kvmd_systemd.NEVER),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, kvmd_systemd.NEVER),
        ({"WATCHDOG_USEC": "0"}, kvmd_systemd.NEVER),
        ({"WATCHDOG_USEC": "soon"}, kvmd_systemd.NEVER),
        ({"WATCHDOG_USEC": "²"}, kvmd_systemd.NEVER),
    ],
    ids=str,
)
def test_watchdog_interval(watchdog: dict[str, str], interval: float) -> None:
    assert kvmd_systemd.Notifier(watchdog).watchdog_interval == interval


def test_a_service_manager_that_is_gone_is_no_matter(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": f"{control_dir.parent}/gone"}
    with Daemon(control_dir, environment=environment) as daemon:
        fake_qemu.listen()
        fake_qemu.negotiate()
        fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        assert " verdict=user " in daemon.wait_for_verdict(INSTANCE)
        daemon.stop()
