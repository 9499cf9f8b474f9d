"""Real QEMU, real guests: who shut the instance down."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import StartQemu
from daemon import INSTANCE, Daemon, control_directory
from deadline import wait_until
from qemu import Qemu
from scenarios import (
    MIGRATION,
    NOT_USER,
    RUNS_ON,
    SCENARIOS,
    STAYING,
    USER,
    Scenario,
    boot_and_ignore_power_button,
    go_on_after_panic,
    kill,
    panic,
    power_off,
    rename_away_and_back,
)
from status import status_table
from witness import GONE, Witness

pytestmark = pytest.mark.qemu

SHUTDOWN_FILE = f"{INSTANCE}.shutdown"


def end_guest(
    end: Callable[[Qemu], object], qemu: Qemu, control_dir: Path
) -> list[str]:
    """Bring about a guest's end, return what was seen of it from outside, in order."""
    with Witness(control_dir, qemu.process.pid) as witness:
        end(qemu)
        return [sight.what for sight in witness.watch_until_gone()]


def assert_verdict(scenario: Scenario, daemon: Daemon, qemu: Qemu) -> None:
    """Hold log and shutdown file against the scenario, when all is over."""
    verdict = scenario.expected.replace(" ", "-")
    line = daemon.wait_for_log(f"{INSTANCE}: verdict=.* cause={scenario.cause} .*")
    assert f"verdict={verdict} " in line[0]
    wait_until(lambda: not is_connected(daemon), "the daemon has heard QEMU's end")
    assert qemu.shutdown_file.exists() == (scenario.expected == USER)


def is_connected(daemon: Daemon) -> bool:
    """Tell whether the daemon is connected to INSTANCE's QEMU."""
    return status_table(daemon).get(f"{INSTANCE}.kvmd", "").startswith("connected")


@pytest.mark.parametrize(
    "scenario",
    [scenario for scenario in SCENARIOS if scenario.expected != RUNS_ON],
    ids=lambda scenario: scenario.name,
)
def test_verdict_on_the_end_of_a_guest(
    scenario: Scenario, daemon: Daemon, start_qemu: StartQemu, control_dir: Path
) -> None:
    qemu = start_qemu(*scenario.options)
    daemon.wait_until_connected(INSTANCE)
    scenario.prepare(qemu)
    seen = end_guest(scenario.end, qemu, control_dir)
    if scenario.expected == NOT_USER:
        assert seen == [GONE]  # and at no time a file
    assert_verdict(scenario, daemon, qemu)


def test_the_file_is_there_before_qemu_is_gone(
    daemon: Daemon, control_dir: Path
) -> None:
    daemon.go_first()
    in_time = 0
    for number in range(5):
        with Qemu(control_dir, f"web{number}.example.com") as qemu:
            daemon.wait_until_connected(qemu.name)
            qemu.boot()
            seen = end_guest(power_off, qemu, control_dir)
            in_time += seen == [qemu.shutdown_file.name, GONE]
    # One is forgiven: QEMU takes a millisecond or two to end, and a busy machine
    # may keep a processor from the daemon for longer than that.
    assert in_time >= 4


def test_a_reset_inside_is_no_end(daemon: Daemon, start_qemu: StartQemu) -> None:
    qemu = start_qemu()
    daemon.wait_until_connected(INSTANCE)
    qemu.boot()
    qemu.reboot_guest()
    daemon.wait_for_log(r'"event": "RESET"')
    assert is_connected(daemon)
    assert ": verdict=" not in daemon.log
    assert not qemu.shutdown_file.exists()


def test_the_file_is_withdrawn_when_the_guest_comes_back(
    daemon: Daemon, start_qemu: StartQemu
) -> None:
    qemu = start_qemu("-no-shutdown")
    daemon.wait_until_connected(INSTANCE)
    qemu.boot()
    power_off(qemu)
    wait_until(qemu.shutdown_file.exists, "the shutdown file")
    qemu.qmp.wait_for_event("STOP")
    qemu.qmp.command("system_reset")
    wait_until(lambda: not qemu.shutdown_file.exists(), "no shutdown file")
    assert "verdict=withdrawn cause=reset " in daemon.wait_for_verdict(INSTANCE, 2)


def test_a_panic_before_the_daemons_start_counts_when_the_guest_goes_on(
    control_dir: Path, start_qemu: StartQemu
) -> None:
    qemu = start_qemu(*STAYING)
    qemu.boot()
    panic(qemu)
    with Daemon(control_dir) as daemon:
        daemon.wait_for_log('"guest-panicked"')  # QEMU's answer to query-status
        go_on_after_panic(qemu)
        power_off(qemu)
        verdict = daemon.wait_for_verdict(INSTANCE)
        assert "verdict=not-user cause=guest-shutdown,panicked " in verdict
        daemon.stop()
    assert not qemu.shutdown_file.exists()


@pytest.mark.parametrize(
    "disturb", [os.utime, rename_away_and_back], ids=["touch", "rename"]
)
def test_a_power_button_outlives_what_is_done_to_the_socket(
    disturb: Callable[[Path], object],
    start_qemu: StartQemu,
    control_dir: Path,
) -> None:
    with Daemon(control_dir, "--rescan-interval=0.05") as daemon:
        qemu = start_qemu()
        daemon.wait_until_connected(INSTANCE)
        boot_and_ignore_power_button(qemu)
        daemon.wait_for_log('"event": "POWERDOWN"')
        disturb(qemu.watched_socket)
        daemon.wait_for_rescan()
        power_off(qemu)
        verdict = daemon.wait_for_verdict(INSTANCE)
        assert "verdict=not-user cause=guest-shutdown,powerdown-requested " in verdict
        daemon.stop()
    assert not qemu.shutdown_file.exists()


def test_a_migration_is_no_shutdown_and_its_target_is_watched(
    daemon: Daemon, start_qemu: StartQemu, control_dir: Path
) -> None:
    leaving, arriving = MIGRATION
    source = start_qemu()
    daemon.wait_until_connected(INSTANCE)
    with control_directory() as other_dir, Daemon(other_dir) as other_daemon:
        uri = f"unix:{control_dir.parent}/migration"
        with Qemu(other_dir, INSTANCE, "-incoming", uri) as target:
            other_daemon.wait_until_connected(INSTANCE)
            leaving.prepare(source)
            arriving.prepare(target)
            assert end_guest(leaving.end, source, control_dir) == [GONE]
            assert_verdict(leaving, daemon, source)
            arriving.end(target)
            assert_verdict(arriving, other_daemon, target)
        other_daemon.stop()


def test_a_stale_file_goes_when_the_instance_is_started(
    daemon: Daemon, start_qemu: StartQemu, control_dir: Path
) -> None:
    stale = control_dir / SHUTDOWN_FILE
    stale.touch()
    start_qemu().boot()
    wait_until(lambda: not stale.exists(), "no shutdown file")


def test_a_new_qemu_among_the_sockets_of_a_killed_one_is_watched(
    daemon: Daemon, start_qemu: StartQemu
) -> None:
    killed = start_qemu()
    daemon.wait_until_connected(INSTANCE)
    killed.boot()
    kill(killed)
    assert killed.wait_until_gone() == -signal.SIGKILL
    qemu = start_qemu()
    daemon.wait_until_connected(INSTANCE, 2)
    qemu.boot()
    power_off(qemu)
    wait_until(qemu.shutdown_file.exists, "the shutdown file")


def test_a_restarted_daemon_takes_up_instances_that_run(
    daemon: Daemon, start_qemu: StartQemu
) -> None:
    qemu = start_qemu()
    daemon.wait_until_connected(INSTANCE)
    qemu.boot()
    daemon.stop()
    assert not qemu.shutdown_file.exists()
    daemon.start()
    daemon.wait_for_log('"kvmd-status"', 2)  # before the negotiation QEMU says nothing
    power_off(qemu)
    wait_until(qemu.shutdown_file.exists, "the shutdown file")
