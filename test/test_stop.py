"""Without systemd, the daemon is stopped or killed, and the next one goes on.

The connections are lost then, and what QEMU says meanwhile; the rest is in the journal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from daemon import INSTANCE, Daemon
from deadline import wait_until
from fake_qemu import FakeQemu
from status import status_table
from test_crash import (
    AFTER_POWERDOWN,
    POWERDOWN,
    RUNNING,
    SUICIDE,
    USER,
    USER_SHUTDOWN,
    crash,
    last_verdict,
    negotiate,
    records,
    stop_and_start,
    verdicts,
    wait_for_suicide,
)
from variant import program_with

UNOBSERVED = "not-user unobserved"
WENT_DOWN = "went down while it was not monitored"

# No shutdown file can be made as long as there is this file, and none is tried again.
OBSTACLE = """
mknod = os.mknod
def try_mknod(path, mode):
    if os.path.exists(obstacle): raise OSError(30, "Read-only file system")
    mknod(path, mode)
os.mknod = try_mknod
kvmd_monitor.FILE_RETRY = 1000
"""

Interrupt = Callable[[Daemon], None]
Start = Callable[..., Daemon]


@pytest.fixture
def start(control_dir: Path) -> Iterator[Start]:
    """Return a function that starts a daemon, patched or not; all are ended."""
    with ExitStack() as ending:

        def start(patch: str = "") -> Daemon:
            program = program_with(control_dir.parent, patch)
            # It looks at its start alone, so that nothing makes good what it missed.
            daemon = Daemon(control_dir, "--rescan-interval=0", program=program)
            return ending.enter_context(daemon)

        yield start


@pytest.fixture
def obstacle(control_dir: Path) -> Path:
    """Return the path of what keeps shutdown files from being made."""
    path = control_dir.parent / "obstacle"
    path.touch()
    return path


def wait_until_gone(daemon: Daemon) -> None:
    """Wait until no instance is monitored."""
    wait_until(lambda: not status_table(daemon), "no instance is monitored")


def start_with_obstacle(start: Start, obstacle: Path, fake_qemu: FakeQemu) -> Daemon:
    """Start a daemon that can't write a user's verdict."""
    daemon = start(f"import os\nobstacle = {str(obstacle)!r}\n{OBSTACLE}")
    negotiate(fake_qemu, daemon)
    fake_qemu.send(USER_SHUTDOWN)
    daemon.wait_for_log(" ERROR .*Read-only file system; trying again")
    fake_qemu.exit()
    return daemon


@pytest.mark.parametrize("interrupt", [stop_and_start, crash])
def test_a_powerdown_from_before_counts(
    start: Start, fake_qemu: FakeQemu, interrupt: Interrupt
) -> None:
    daemon = start()
    negotiate(fake_qemu, daemon)
    fake_qemu.send(POWERDOWN)
    wait_until(
        lambda: "powerdown_requested" in records(daemon)[INSTANCE]["guest"],
        "it is known",
    )
    interrupt(daemon)
    fake_qemu.disconnect()
    fake_qemu.negotiate()
    fake_qemu.send(USER_SHUTDOWN)
    daemon.wait_for_verdict(INSTANCE)
    assert verdicts(daemon) == [AFTER_POWERDOWN]
    assert not fake_qemu.shutdown_file.exists()


def test_a_journal_that_somebody_has_removed_is_there_again_after_a_stop(
    start: Start, fake_qemu: FakeQemu
) -> None:
    daemon = start()
    negotiate(fake_qemu, daemon)
    daemon.state_file.unlink()
    fake_qemu.send(POWERDOWN)
    fake_qemu.wait_until_read()
    stop_and_start(daemon)
    fake_qemu.disconnect()
    fake_qemu.negotiate()
    fake_qemu.send(USER_SHUTDOWN)
    daemon.wait_for_verdict(INSTANCE)
    assert verdicts(daemon) == [AFTER_POWERDOWN]


@pytest.mark.parametrize("interrupt", [stop_and_start, crash])
def test_a_verdict_that_was_written_is_not_written_again(
    start: Start, fake_qemu: FakeQemu, interrupt: Interrupt
) -> None:
    daemon = start()
    negotiate(fake_qemu, daemon)
    fake_qemu.send(USER_SHUTDOWN)
    daemon.wait_for_verdict(INSTANCE)
    fake_qemu.shutdown_file.unlink()  # as Ganeti does when it has taken note
    interrupt(daemon)
    fake_qemu.exit()
    wait_until_gone(daemon)
    assert verdicts(daemon) == [USER] == [last_verdict(daemon)]
    assert not fake_qemu.shutdown_file.exists()


def test_a_verdict_that_could_not_be_written_is_written_at_the_stop(
    start: Start, obstacle: Path, fake_qemu: FakeQemu
) -> None:
    daemon = start_with_obstacle(start, obstacle, fake_qemu)
    obstacle.unlink()
    daemon.stop()
    assert fake_qemu.shutdown_file.exists()
    assert verdicts(daemon) == [USER]


@pytest.mark.parametrize("interrupt", [stop_and_start, crash])
def test_a_verdict_that_could_not_be_written_is_written_after_the_start(
    start: Start, obstacle: Path, fake_qemu: FakeQemu, interrupt: Interrupt
) -> None:
    def leave_it_to_the_next(daemon: Daemon) -> None:
        interrupt(daemon)
        assert not fake_qemu.shutdown_file.exists()

    daemon = start_with_obstacle(start, obstacle, fake_qemu)
    leave_it_to_the_next(daemon)
    assert verdicts(daemon) == []
    daemon.end()
    obstacle.unlink()
    daemon.start()
    daemon.wait_for_verdict(INSTANCE)
    assert fake_qemu.shutdown_file.exists()
    wait_until_gone(daemon)
    assert verdicts(daemon) == [USER] == [last_verdict(daemon)]
    assert WENT_DOWN not in daemon.log


def test_a_verdict_that_could_not_be_written_is_given_up_for_a_new_qemu(
    start: Start, obstacle: Path, fake_qemu: FakeQemu
) -> None:
    daemon = start_with_obstacle(start, obstacle, fake_qemu)
    daemon.stop()
    obstacle.unlink()
    negotiate_with_next(fake_qemu, daemon)
    assert not fake_qemu.shutdown_file.exists()
    assert verdicts(daemon) == [USER]
    assert " file=superseded " in daemon.wait_for_verdict(INSTANCE)


def negotiate_with_next(fake_qemu: FakeQemu, daemon: Daemon) -> None:
    """Start a new QEMU of the same name, then the daemon."""
    fake_qemu.listen()
    daemon.start()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE, 2)
    fake_qemu.wait_until_read()


def leave(qemu: FakeQemu) -> None:
    """End as QEMU does."""
    qemu.exit()


def leave_a_dead_socket(qemu: FakeQemu) -> None:
    """End as by SIGKILL."""
    qemu.crash()


@pytest.mark.parametrize("end", [leave, leave_a_dead_socket])
def test_what_went_down_meanwhile_is_told_a_line_each_and_counts_as_a_crash(
    start: Start, control_dir: Path, end: Callable[[FakeQemu], None]
) -> None:
    daemon = start("kvmd_context.PATIENCE = kvmd_monitor.PATIENCE = 0.2")
    with FakeQemu(control_dir, "one") as one, FakeQemu(control_dir, "two") as two:
        for qemu in (one, two):
            negotiate(qemu, daemon)
        daemon.stop()
        for qemu in (one, two):
            end(qemu)
        daemon.start()
        for qemu in (one, two):
            daemon.wait_for_verdict(qemu.name)
            assert verdicts(daemon, qemu.name) == [UNOBSERVED]
            assert daemon.log.count(f" INFO {qemu.name}: {WENT_DOWN}") == 1
            assert not qemu.shutdown_file.exists()
    wait_until_gone(daemon)
    stop_and_start(daemon)
    assert daemon.log.count(WENT_DOWN) == 2


def test_what_went_down_and_was_started_anew_meanwhile_is_told(
    start: Start, fake_qemu: FakeQemu
) -> None:
    daemon = start()
    negotiate(fake_qemu, daemon)
    daemon.stop()
    fake_qemu.exit()
    negotiate_with_next(fake_qemu, daemon)
    assert verdicts(daemon) == [UNOBSERVED]
    assert daemon.log.count(WENT_DOWN) == 1
    fake_qemu.send(USER_SHUTDOWN)
    daemon.wait_for_verdict(INSTANCE, 2)
    assert verdicts(daemon) == [UNOBSERVED, USER]


def test_what_goes_down_before_it_greets_again_is_told(
    start: Start, fake_qemu: FakeQemu
) -> None:
    daemon = start()
    negotiate(fake_qemu, daemon)
    stop_and_start(daemon)
    fake_qemu.disconnect()
    fake_qemu.accept()
    fake_qemu.exit()
    daemon.wait_for_verdict(INSTANCE)
    assert verdicts(daemon) == [UNOBSERVED]
    assert daemon.log.count(WENT_DOWN) == 1


def test_an_end_that_was_being_waited_for_is_told_after_a_crash(
    start: Start, fake_qemu: FakeQemu
) -> None:
    fake_qemu.shutdown_file.touch()  # a stale one: there is a last verdict then
    daemon = start("kvmd_monitor.LONGEST_EXIT = 1000")
    negotiate(fake_qemu, daemon)
    daemon.stop()
    fake_qemu.path.unlink()  # and still listens, as at the end of QEMU
    daemon.start()
    wait_until(lambda: records(daemon)[INSTANCE]["phase"] == "gone", "it is missed")
    daemon.end()
    fake_qemu.exit()
    daemon.start()
    daemon.wait_for_verdict(INSTANCE, 2)
    assert verdicts(daemon) == ["running running", UNOBSERVED]


def test_a_file_that_was_made_stays_though_its_maker_did_not_live_to_say_so(
    start: Start, control_dir: Path, fake_qemu: FakeQemu
) -> None:
    moment = 'die("after", kvmd_shutdown_file.ShutdownFiles, "carry_out")'
    deadly = start(f"{SUICIDE}\narm_when(b'SHUTDOWN')\n{moment}")
    negotiate(fake_qemu, deadly)
    fake_qemu.send(USER_SHUTDOWN)
    wait_for_suicide(deadly)
    fake_qemu.exit()
    daemon = start()
    wait_until_gone(daemon)
    assert verdicts(daemon) == ["user unobserved"]
    assert fake_qemu.shutdown_file.exists()


def test_a_file_of_a_guest_that_is_back_goes(
    start: Start, fake_qemu: FakeQemu
) -> None:
    daemon = start()
    negotiate(fake_qemu, daemon)
    fake_qemu.send(USER_SHUTDOWN)
    daemon.wait_for_verdict(INSTANCE)
    daemon.stop()
    fake_qemu.exit()
    negotiate_with_next(fake_qemu, daemon)
    daemon.wait_for_verdict(INSTANCE, 2)
    assert verdicts(daemon) == [USER, RUNNING]
    assert not fake_qemu.shutdown_file.exists()


def test_of_a_guest_whose_kvmd_was_removed_nothing_is_said_while_it_goes_on(
    start: Start, control_dir: Path, fake_qemu: FakeQemu
) -> None:
    daemon = start()
    negotiate(fake_qemu, daemon)
    daemon.stop()
    fake_qemu.path.unlink()
    with FakeQemu(control_dir, INSTANCE, ".qmp") as qmp:
        qmp.listen()
        daemon = start()
        daemon.wait_for_log(f" WARNING .*{INSTANCE}.qmp: left to Ganeti")
        assert verdicts(daemon) == []
