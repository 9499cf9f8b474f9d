"""SIGUSR2: the program is replaced in place, and no event is lost by it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon import INSTANCE, ROOT, Daemon
from deadline import wait_until
from fake_qemu import FakeQemu, event_line
from status import status_table, wait_for_status

from kvmd_log import Log
from kvmd_restart import Restart


@pytest.fixture
def installed(control_dir: Path) -> Path:
    """Return a copy of the program that a test may replace."""
    directory = control_dir.parent / "installed"
    directory.mkdir()
    for module in ROOT.glob("kvmd*.py"):
        # Of its own age: by time and size Python tells that its bytecode is outdated.
        shutil.copy2(module, directory)
    return directory / "kvmd.py"


@pytest.fixture
def daemon(control_dir: Path, installed: Path) -> Iterator[Daemon]:
    """Return a daemon that runs the copy."""
    with Daemon(control_dir, program=installed) as daemon:
        yield daemon
        daemon.stop()


@pytest.fixture
def qemu(daemon: Daemon, fake_qemu: FakeQemu) -> FakeQemu:
    """Return a fake QEMU that the daemon is connected to."""
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    return fake_qemu


def replace(installed: Path, old: str, new: str) -> None:
    """Install another version of the program."""
    (module,) = [
        path for path in installed.parent.glob("*.py") if old in path.read_text()
    ]
    module.write_text(module.read_text().replace(old, new))


def restart(daemon: Daemon) -> None:
    """Have the daemon restart in place, and wait until the new program works."""
    daemon.send_signal(signal.SIGUSR2)
    daemon.wait_for_log(r" INFO restarting in place\n(.*\n)*?.* INFO started kvmd")


def cause_of_verdict(daemon: Daemon, qemu: FakeQemu) -> str:
    """End the guest as its user would, return verdict and cause."""
    qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    return daemon.wait_for_verdict(qemu.name).split(": ")[1].split(" event=")[0]


def test_the_new_program_keeps_pid_lock_and_connection(
    daemon: Daemon, qemu: FakeQemu, installed: Path
) -> None:
    replace(installed, 'VERSION = "', 'VERSION = "2')
    restart(daemon)
    daemon.wait_for_log(rf"pid={daemon.pid} INFO started kvmd 2")
    assert daemon.pid_file.read_text() == f"{daemon.pid}\n"
    with pytest.raises(ChildProcessError, match=f"with pid {daemon.pid}"):
        Daemon(daemon.control_dir).start()
    assert cause_of_verdict(daemon, qemu) == "verdict=user cause=guest-shutdown"
    assert daemon.log.count(f"{INSTANCE}: connected ") == 1


def test_a_powerdown_from_before_counts_after_the_restart(
    daemon: Daemon, qemu: FakeQemu
) -> None:
    qemu.event("POWERDOWN")
    daemon.wait_for_log("POWERDOWN")
    restart(daemon)
    assert cause_of_verdict(daemon, qemu) == (
        "verdict=not-user cause=guest-shutdown,powerdown-requested"
    )


def test_a_line_that_was_read_in_part_is_completed_after_the_restart(
    daemon: Daemon, qemu: FakeQemu
) -> None:
    line = event_line("SHUTDOWN", guest=True, reason="guest-shutdown")
    qemu.send(line[:70])
    daemon.wait_for_log("microseconds")
    restart(daemon)
    qemu.send(line[70:])
    assert "verdict=user" in daemon.wait_for_verdict(INSTANCE)


def test_a_greeting_that_is_still_to_come_is_heard_after_the_restart(
    daemon: Daemon, control_dir: Path
) -> None:
    with FakeQemu(control_dir, "starting") as starting:
        starting.listen()
        starting.accept()
        wait_for_status(daemon, "starting.kvmd", "awaiting greeting since")
        restart(daemon)
        starting.greet()
        daemon.wait_until_connected("starting")


def test_a_program_started_by_a_relative_path_is_found_again(
    control_dir: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(installed.parent)
    with Daemon(control_dir, program=Path(installed.name)) as daemon:
        restart(daemon)
        daemon.stop()


def test_a_shutdown_in_the_midst_of_a_restart_is_judged(
    daemon: Daemon, qemu: FakeQemu
) -> None:
    daemon.send_signal(signal.SIGUSR2)
    qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    qemu.exit()
    wait_until(qemu.shutdown_file.exists, "the shutdown file")
    daemon.wait_for_log("started kvmd", 2)
    assert qemu.shutdown_file.exists()


def test_a_verdict_from_before_stands(daemon: Daemon, qemu: FakeQemu) -> None:
    cause_of_verdict(daemon, qemu)
    restart(daemon)
    qemu.shutdown_file.unlink()  # as Ganeti does when it has taken note
    qemu.event("SHUTDOWN", guest=False, reason="host-signal")
    qemu.exit()
    wait_until(lambda: not status_table(daemon), "the instance is gone")
    assert daemon.log.count(": verdict=") == 1


def break_program(installed: Path) -> None:
    replace(installed, "def main()", "def main_of_old()")


def drop_an_option_in_use(installed: Path) -> None:
    replace(installed, '"--debug"', '"--verbose"')


@pytest.mark.parametrize("spoil", [break_program, drop_an_option_in_use, Path.unlink])
def test_a_program_that_does_not_run_replaces_nothing(
    daemon: Daemon, qemu: FakeQemu, installed: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(installed)
    daemon.send_signal(signal.SIGUSR2)
    daemon.wait_for_log("ERROR not restarting: .*kvmd.py.* failed with status [12];")
    assert cause_of_verdict(daemon, qemu) == "verdict=user cause=guest-shutdown"


def test_without_a_log_to_be_opened_there_is_no_restart(
    daemon: Daemon, qemu: FakeQemu
) -> None:
    away = daemon.log_file.with_suffix(".1")
    daemon.log_file.rename(away)
    daemon.log_file.mkdir()
    daemon.log_file = away
    daemon.send_signal(signal.SIGUSR2)
    daemon.wait_for_log(r" ERROR cannot restart in place: .* going on with version ")
    assert cause_of_verdict(daemon, qemu) == "verdict=user cause=guest-shutdown"


def test_a_state_of_another_form_is_dropped_with_a_warning(
    daemon: Daemon, qemu: FakeQemu, installed: Path
) -> None:
    replace(installed, "FORMAT = 1", "FORMAT = 2")
    daemon.send_signal(signal.SIGUSR2)
    daemon.wait_for_log("WARNING .*kvmd.state: it can't be used .*not of format 2")
    qemu.wait_until_client_leaves()
    qemu.negotiate()
    assert cause_of_verdict(daemon, qemu) == "verdict=user cause=guest-shutdown"


# ---- The trial of the new program ----------------------------------------------------


def trial_of(code: str, log: Log) -> Restart:
    """Return a restart whose new program is this code."""
    return Restart([sys.executable, "-Sc", code], log)


@pytest.fixture
def lines() -> list[str]:
    """Return the list of what was logged."""
    return []


@pytest.fixture
def log(lines: list[str]) -> Log:
    """Return a log that is written to the list."""
    return Log(None, [lines.append])


def wait_for_zombies(count: int) -> None:
    """Wait until so many children of this process have ended, and reap none."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")

    def states() -> list[str]:
        stats = [Path(f"/proc/{pid}/stat") for pid in children.read_text().split()]
        return [stat.read_text().rpartition(") ")[2][0] for stat in stats]

    wait_until(lambda: states().count("Z") >= count, f"{count} ended children")


def test_a_foreign_child_that_ends_together_with_the_trial_costs_no_restart(
    log: Log,
) -> None:
    restart = trial_of("pass", log)
    os.posix_spawnp("true", ["true"], os.environ)
    restart.try_new_program()
    os.posix_spawnp("true", ["true"], os.environ)
    wait_for_zombies(3)
    restart.reap()
    assert restart.is_due


def test_a_trial_that_fails_is_told_of_and_replaces_nothing(
    log: Log, lines: list[str]
) -> None:
    restart = trial_of("raise SystemExit(3)", log)
    restart.try_new_program()
    wait_for_zombies(1)
    restart.reap()
    restart.reap()
    assert not restart.is_due
    log.flush()
    assert " failed with status 3; going on with version " in lines[0]


def test_a_second_trial_takes_the_place_of_the_first(log: Log) -> None:
    restart = trial_of("import time; time.sleep(60)", log)
    restart.try_new_program()
    restart.try_new_program()
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    (trial,) = map(int, children.split())
    os.kill(trial, signal.SIGKILL)
    wait_for_zombies(1)
    restart.reap()
    assert not restart.is_due


def test_a_program_that_is_not_there_is_told_of(log: Log, lines: list[str]) -> None:
    restart = Restart(["/none/kvmd"], log)
    restart.try_new_program()
    log.flush()
    assert " ERROR not restarting: /none/kvmd: No such file" in lines[0]
