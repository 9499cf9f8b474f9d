"""Faults: what is planted, what is full or read-only, what errs, what jumps."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemon import INSTANCE, Daemon
from deadline import wait_until
from fake_qemu import FakeQemu
from namespace import (
    interpreter_on_tmpfs,
    run_beside,
    seen_by,
)
from status import status_table, wait_for_status
from variant import program_with

SOCKET = f"{INSTANCE}.kvmd"


@pytest.fixture
def qemu(daemon: Daemon, fake_qemu: FakeQemu) -> FakeQemu:
    """Return a fake QEMU that the daemon is connected to."""
    connect(daemon, fake_qemu)
    return fake_qemu


def connect(daemon: Daemon, qemu: FakeQemu) -> None:
    qemu.listen()
    qemu.negotiate()
    daemon.wait_until_connected(qemu.name)
    status_table(daemon)  # that the guest runs has been read before


def power_off(qemu: FakeQemu) -> None:
    """End the guest as its user would."""
    qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")


def end_by_user(daemon: Daemon, qemu: FakeQemu) -> str:
    """Power the guest off, return the verdict's line."""
    power_off(qemu)
    return daemon.wait_for_verdict(qemu.name)


def wait_for_file(daemon: Daemon, verdict: str) -> None:
    """Wait until the shutdown file has been brought in line with a verdict."""
    daemon.wait_for_log(f" INFO {INSTANCE}: verdict={verdict} .* file=")


# ---- What stands where the shutdown file goes ----------------------------------------


def plant_symlink(path: Path) -> None:
    path.symlink_to(path.parent.parent / "precious")


def plant_fifo(path: Path) -> None:
    os.mkfifo(path)


def plant_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def plant_device(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a device")
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))


@pytest.mark.parametrize(
    "plant", [plant_symlink, plant_fifo, plant_socket, plant_device]
)
@pytest.mark.parametrize("dangling", [False, True])
def test_what_is_planted_gives_way_to_the_shutdown_file(
    daemon: Daemon, qemu: FakeQemu, plant: Callable[[Path], None], dangling: bool
) -> None:
    precious = qemu.shutdown_file.parent.parent / "precious"
    if not dangling:
        precious.write_text("precious")
    plant(qemu.shutdown_file)
    assert " file=created " in end_by_user(daemon, qemu)
    status = qemu.shutdown_file.lstat()
    assert stat.S_ISREG(status.st_mode) and status.st_size == 0
    assert precious.exists() != dangling
    assert dangling or precious.read_text() == "precious"
    assert daemon.log.count(" WARNING ") == 1
    daemon.wait_for_log(rf" WARNING {INSTANCE}: removing .*{INSTANCE}\.shutdown, ")


def test_the_shutdown_file_is_empty_and_its_owners_alone(
    daemon: Daemon, qemu: FakeQemu
) -> None:
    end_by_user(daemon, qemu)
    status = qemu.shutdown_file.lstat()
    assert (status.st_mode, status.st_size) == (stat.S_IFREG | 0o600, 0)


def test_a_file_that_is_there_is_not_truncated(daemon: Daemon, qemu: FakeQemu) -> None:
    qemu.shutdown_file.write_text("precious")
    assert " file=present " in end_by_user(daemon, qemu)
    assert qemu.shutdown_file.read_text() == "precious"


def test_a_directory_of_that_name_stays_for_it_counts(
    daemon: Daemon, qemu: FakeQemu
) -> None:
    (qemu.shutdown_file / "precious").mkdir(parents=True)
    assert " file=present " in end_by_user(daemon, qemu)
    assert (qemu.shutdown_file / "precious").exists()


def test_a_directory_cannot_be_removed_and_that_is_no_matter(
    daemon: Daemon, qemu: FakeQemu
) -> None:
    qemu.shutdown_file.mkdir()
    qemu.event("SHUTDOWN", guest=False, reason="host-signal")
    assert " verdict=not-user " in daemon.wait_for_verdict(INSTANCE)
    assert " ERROR " not in daemon.log
    assert qemu.shutdown_file.is_dir()


@pytest.mark.parametrize("plant", [plant_symlink, plant_fifo, plant_socket])
def test_what_is_planted_is_removed_when_it_was_not_the_user(
    daemon: Daemon, qemu: FakeQemu, plant: Callable[[Path], None]
) -> None:
    precious = qemu.shutdown_file.parent.parent / "precious"
    precious.write_text("precious")
    plant(qemu.shutdown_file)
    qemu.event("SHUTDOWN", guest=False, reason="host-signal")
    assert " file=removed " in daemon.wait_for_verdict(INSTANCE)
    assert not os.path.lexists(qemu.shutdown_file)
    assert precious.read_text() == "precious"


# ---- When the shutdown file comes and goes -------------------------------------------


def test_a_verdict_written_once_is_not_written_again(
    daemon: Daemon, qemu: FakeQemu
) -> None:
    end_by_user(daemon, qemu)
    qemu.shutdown_file.unlink()  # as Ganeti does when it has taken note
    qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    qemu.event("SHUTDOWN", guest=False, reason="host-signal")
    qemu.exit()
    wait_until(lambda: not status_table(daemon), "the instance is gone")
    assert not qemu.shutdown_file.exists()
    assert daemon.log.count(": verdict=") == 1


@pytest.mark.parametrize("event", ["RESET", "RESUME"])
def test_a_guest_that_comes_back_withdraws_the_verdict(
    daemon: Daemon, qemu: FakeQemu, event: str
) -> None:
    end_by_user(daemon, qemu)
    qemu.event("STOP")
    qemu.event(event)
    assert " verdict=withdrawn " in daemon.wait_for_verdict(INSTANCE, times=2)
    assert not qemu.shutdown_file.exists()
    qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    assert " verdict=user " in daemon.wait_for_verdict(INSTANCE, times=3)
    assert qemu.shutdown_file.exists()
    qemu.event("SHUTDOWN", guest=False, reason="host-qmp-quit")
    qemu.exit()
    wait_until(lambda: not status_table(daemon), "the instance is gone")
    assert qemu.shutdown_file.exists()


def test_a_stale_file_of_a_running_guest_is_removed(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.shutdown_file.touch()
    connect(daemon, fake_qemu)
    assert " verdict=running " in daemon.wait_for_verdict(INSTANCE)
    assert not fake_qemu.shutdown_file.exists()


@pytest.mark.parametrize("status", ["shutdown", "guest-panicked"])
def test_the_file_of_a_guest_that_is_down_stays(
    daemon: Daemon, fake_qemu: FakeQemu, status: str
) -> None:
    fake_qemu.shutdown_file.touch()
    fake_qemu.listen()
    fake_qemu.negotiate(status)
    fake_qemu.exit()
    daemon.wait_until_connected(INSTANCE)
    wait_until(lambda: not status_table(daemon), "the instance is gone")
    assert fake_qemu.shutdown_file.exists()


# ---- When it can't be written --------------------------------------------------------


def use_up_inodes(directory: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        for number in itertools.count():
            (directory / f"file{number}").touch()


def fill(path: Path) -> None:
    """Write to a file until its file system is full."""
    with pytest.raises(OSError, match="No space left"), open(path, "ab", 0) as file:
        while True:
            file.write(b"x" * 4096)


def test_a_full_file_system_has_room_for_an_empty_file(control_dir: Path) -> None:
    interpreter = interpreter_on_tmpfs(control_dir, "size=64k,nr_inodes=50")
    with (
        Daemon(control_dir, interpreter=interpreter) as daemon,
        FakeQemu(seen_by(daemon, control_dir), INSTANCE) as qemu,
    ):
        connect(daemon, qemu)
        fill(qemu.path.with_name("filler"))
        assert " file=created " in end_by_user(daemon, qemu)
        assert qemu.shutdown_file.exists()
        daemon.stop()


def test_without_inodes_it_tries_until_there_is_one(control_dir: Path) -> None:
    with (
        Daemon(
            control_dir, interpreter=interpreter_on_tmpfs(control_dir, "nr_inodes=9")
        ) as daemon,
        FakeQemu(seen_by(daemon, control_dir), INSTANCE) as qemu,
    ):
        connect(daemon, qemu)
        use_up_inodes(qemu.path.parent)
        power_off(qemu)
        daemon.wait_for_log(
            rf" ERROR {INSTANCE}: verdict=user .*{INSTANCE}\.shutdown:"
            r" No space left on device; trying again"
        )
        qemu.path.with_name("file0").unlink()
        wait_for_file(daemon, "user")
        assert qemu.shutdown_file.exists()
        assert daemon.log.count(" ERROR ") == 1
        daemon.stop()


def test_on_a_read_only_file_system_it_tries_until_it_is_none(
    control_dir: Path,
) -> None:
    with (
        Daemon(
            control_dir, interpreter=interpreter_on_tmpfs(control_dir, "size=64k")
        ) as daemon,
        FakeQemu(seen_by(daemon, control_dir), INSTANCE) as qemu,
    ):
        connect(daemon, qemu)
        run_beside(daemon, f"mount -o remount,ro {control_dir}")
        power_off(qemu)
        daemon.wait_for_log(r" ERROR .* Read-only file system; trying again")
        assert not qemu.shutdown_file.exists()
        run_beside(daemon, f"mount -o remount,rw {control_dir}")
        wait_for_file(daemon, "user")
        assert qemu.shutdown_file.exists()
        daemon.stop()


def test_a_verdict_waits_for_the_directory_to_come_back(
    daemon: Daemon, qemu: FakeQemu, control_dir: Path
) -> None:
    away = control_dir.rename(control_dir.with_name("away"))
    power_off(qemu)
    daemon.wait_for_log(" ERROR .* No such file or directory; trying again")
    away.rename(control_dir)
    wait_for_file(daemon, "user")
    assert qemu.shutdown_file.exists()


def test_a_new_process_ends_the_attempts_for_the_old_one(control_dir: Path) -> None:
    with (
        Daemon(
            control_dir, interpreter=interpreter_on_tmpfs(control_dir, "nr_inodes=9")
        ) as daemon,
        FakeQemu(seen_by(daemon, control_dir), INSTANCE) as qemu,
        FakeQemu(seen_by(daemon, control_dir), "successor", "") as successor,
    ):
        connect(daemon, qemu)
        successor.listen()
        use_up_inodes(qemu.path.parent)
        power_off(qemu)
        daemon.wait_for_log(" ERROR ")
        name = qemu.path
        qemu.path = name.rename(name.with_name("old"))
        successor.path = successor.path.rename(name)
        successor.negotiate()
        daemon.wait_until_connected(INSTANCE, times=2)
        for file in name.parent.glob("file*"):
            file.unlink()
        successor.event("SHUTDOWN", guest=False, reason="host-signal")
        wait_for_file(daemon, "not-user")
        successor.exit()
        wait_until(lambda: not status_table(daemon), "the instance is gone")
        assert not qemu.shutdown_file.exists()
        assert " file=superseded " in daemon.wait_for_verdict(INSTANCE)
        daemon.stop()


@pytest.mark.parametrize("ended", [False, True])
def test_a_pending_verdict_outlives_its_instances_socket(
    control_dir: Path, ended: bool
) -> None:
    interpreter = interpreter_on_tmpfs(control_dir, "nr_inodes=9")
    with (
        Daemon(control_dir, "--rescan-interval=0", interpreter=interpreter) as daemon,
        FakeQemu(seen_by(daemon, control_dir), INSTANCE) as qemu,
    ):
        connect(daemon, qemu)
        filler = qemu.path.parent / "file0"
        use_up_inodes(qemu.path.parent)
        power_off(qemu)
        daemon.wait_for_log(" ERROR ")
        qemu.disconnect()
        if ended:
            wait_for_status(daemon, SOCKET, "ended")
        qemu.path = qemu.path.rename(qemu.path.with_name("elsewhere"))
        wait_for_status(daemon, SOCKET, "gone")
        filler.unlink()
        wait_for_file(daemon, "user")
        assert qemu.shutdown_file.exists()
        wait_until(lambda: not status_table(daemon), "the instance is forgotten")
        daemon.stop()


def test_a_full_log_file_system_loses_lines_and_nothing_else(
    control_dir: Path,
) -> None:
    log_dir = control_dir.parent / "log"
    log_dir.mkdir()
    interpreter = interpreter_on_tmpfs(log_dir, "size=16k")
    daemon = Daemon(
        *(control_dir, "--log-file", str(log_dir / "kvmd.log")), interpreter=interpreter
    )
    daemon.log_file = daemon.stderr_file
    with daemon, FakeQemu(control_dir, INSTANCE) as qemu:
        log_file = seen_by(daemon, log_dir / "kvmd.log")
        fill(log_file.with_name("filler"))
        fill(log_file)
        connect(daemon, qemu)
        end_by_user(daemon, qemu)
        assert qemu.shutdown_file.exists()
        assert b"verdict=" not in log_file.read_bytes()
        log_file.with_name("filler").unlink()
        status_table(daemon)
        assert b" INFO status: " in log_file.read_bytes()
        daemon.stop()


# ---- What nobody expected ------------------------------------------------------------

ERRORS = {
    "reading": """
original = kvmd_monitor.Monitor.receive
def receive(self):
    if self.instance == "bad":
        raise MemoryError("patched")
    return original(self)
kvmd_monitor.Monitor.receive = receive
""",
    "connecting": """
original = kvmd_loop.selectors.EpollSelector.register
def register(self, file, events, data=None):
    if getattr(data, "instance", None) == "bad":
        raise OSError(28, "patched")
    return original(self, file, events, data)
kvmd_loop.selectors.EpollSelector.register = register
""",
    "timing": """
original = kvmd_loop.Loop.set_timer
def set_timer(self, owner, seconds):
    if owner.instance == "bad" and seconds < 0.5:
        raise RuntimeError("patched")
    return original(self, owner, seconds)
kvmd_loop.Loop.set_timer = set_timer
""",
}


def greet(qemu: FakeQemu) -> None:
    qemu.listen()
    qemu.accept()
    qemu.greet()


@pytest.mark.parametrize(
    ("error", "provoke"),
    [
        ("reading", greet),
        ("connecting", FakeQemu.listen),
        ("timing", FakeQemu.bind),
    ],
)
def test_an_unexpected_error_costs_that_connection_alone(
    control_dir: Path,
    fake_qemu: FakeQemu,
    error: str,
    provoke: Callable[[FakeQemu], None],
) -> None:
    program = program_with(control_dir.parent, ERRORS[error])
    with (
        Daemon(control_dir, program=program) as daemon,
        FakeQemu(control_dir, "bad") as bad,
    ):
        provoke(bad)
        daemon.wait_for_log(" ERROR bad: unexpected error; connecting anew")
        daemon.wait_for_log(" ERROR .*patched")
        assert " ERROR bad: Traceback" in daemon.log
        connect(daemon, fake_qemu)
        assert " verdict=user " in end_by_user(daemon, fake_qemu)
        assert fake_qemu.shutdown_file.exists()
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait_until_gone() == 0


def test_after_an_unexpected_error_it_connects_anew(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    flag = control_dir.parent / "faulty"
    flag.touch()
    patch = ERRORS["reading"].replace(
        'self.instance == "bad"', f"kvmd.os.path.exists({str(flag)!r})"
    )
    program = program_with(control_dir.parent, patch)
    with Daemon(control_dir, program=program) as daemon:
        fake_qemu.listen()
        fake_qemu.accept()
        fake_qemu.greet()
        fake_qemu.wait_until_client_leaves()
        flag.unlink()
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE)
        assert " verdict=user " in end_by_user(daemon, fake_qemu)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait_until_gone() == 0


# ---- Time ----------------------------------------------------------------------------


def test_a_clock_set_back_and_forth_is_no_matter(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    program = program_with(
        control_dir.parent,
        "import itertools, time\nclock = itertools.cycle([0, 4e9, 1.5, 1e6])\n"
        "time.time = lambda: next(clock)",
    )
    with Daemon(control_dir, "--rescan-interval=0.05", program=program) as daemon:
        fake_qemu.bind()
        wait_for_status(daemon, SOCKET, "connecting")
        connect(daemon, fake_qemu)
        assert " verdict=user " in end_by_user(daemon, fake_qemu)
        daemon.stop()


@pytest.mark.parametrize(
    ("age", "verdict"),
    [
        (3 * 86400, "user cause=guest-shutdown "),
        (1800, "not-user cause=guest-shutdown,powerdown-requested "),
    ],
    ids=["days", "half an hour"],
)
def test_a_power_button_that_was_ignored_long_ago_speaks_against_nobody(
    daemon: Daemon, qemu: FakeQemu, age: int, verdict: str
) -> None:
    now = int(time.time())
    pressed = {"seconds": now - age, "microseconds": 0}
    obeyed = {"seconds": now, "microseconds": 0}
    by_user = {"guest": True, "reason": "guest-shutdown"}
    qemu.send_message({"event": "POWERDOWN", "timestamp": pressed})
    qemu.send_message({"event": "SHUTDOWN", "timestamp": obeyed, "data": by_user})
    assert f" verdict={verdict}" in daemon.wait_for_verdict(INSTANCE)


# ---- Names ---------------------------------------------------------------------------


def test_a_name_of_250_bytes_is_told_of_and_ignored(
    daemon: Daemon, control_dir: Path, fake_qemu: FakeQemu
) -> None:
    with FakeQemu(control_dir, "short", "") as short:
        short.bind()
        name = os.fsdecode(b"\xff\n\033[2J" + b"x" * 239 + b".kvmd")
        assert len(os.fsencode(name)) == 250
        short.path = short.path.rename(control_dir / name)
        connect(daemon, fake_qemu)
        end_by_user(daemon, fake_qemu)
    assert daemon.log.count(" WARNING ") == 1
    daemon.wait_for_log(r" WARNING .*/\\udcff\\n\\x1b\[2Jx+\.kvmd: ignored")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket away")
def test_another_users_socket_is_served_like_any(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.bind()
    os.chown(fake_qemu.path, 12345, 12345)
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    assert " verdict=user " in end_by_user(daemon, fake_qemu)
    assert fake_qemu.shutdown_file.stat().st_uid == 0
