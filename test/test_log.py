"""The log: its lines, its file, stderr and syslog."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from clock import pass_time
from daemon import INSTANCE, LOG_LINE, Daemon
from deadline import SECONDS, wait_until
from fake_qemu import FakeQemu
from namespace import call_in_process, require_namespaces
from node import Node
from status import status_table
from variant import program_with

import kvmd_log
from kvmd_log import UNOPENED, UNWRITABLE


def test_log_lines_are_those_of_ganetis_daemons(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    daemon.wait_for_log(
        rf" INFO {INSTANCE}: verdict=user cause=guest-shutdown event=\d+\.\d{{6}}"
        r" file=created after=\d+\.\dms$"
    )
    daemon.stop()  # no more lines come
    lines = daemon.log.splitlines()
    assert all(LOG_LINE.fullmatch(line) for line in lines)
    assert all(f" pid={daemon.pid} " in line for line in lines)
    assert daemon.log == daemon.stderr


def test_no_name_forges_a_log_line(daemon: Daemon, control_dir: Path) -> None:
    forged = "x\n2026-11-22 20:12:10,123: ganeti-kvmd pid=42 INFO a: verdict=user"
    for name in [forged, "\033[2J\r", "a\x85b\u2028c\u202ed", os.fsdecode(b"\xff\xfe")]:
        with FakeQemu(control_dir, name) as qemu:
            qemu.listen()
            qemu.negotiate()
            qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
            wait_until(qemu.shutdown_file.exists, "the verdict")
    daemon.wait_for_log(" verdict=user", times=5)
    status_table(daemon)
    lines = daemon.log.splitlines()
    assert all(LOG_LINE.fullmatch(line) and line.isprintable() for line in lines)


def test_sighup_reopens_the_log(daemon: Daemon) -> None:
    old = daemon.log_file.with_suffix(".1")
    daemon.log_file.rename(old)
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for_log(" INFO log file reopened")
    assert "started" in old.read_text() and "started" not in daemon.log
    assert daemon.log_file.stat().st_mode & 0o777 == 0o600


def test_a_log_that_cannot_be_reopened_is_kept_and_says_so(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    directory = control_dir.parent / "log"
    directory.mkdir()
    daemon = Daemon(control_dir, "--log-file", str(directory / "kvmd.log"))
    daemon.log_file = directory / "kvmd.log"
    with daemon:
        daemon.log_file = directory.rename(control_dir.parent / "old") / "kvmd.log"
        daemon.send_signal(signal.SIGHUP)
        daemon.wait_for_log(" ERROR cannot reopen the log file .*; keeping the old one")
        fake_qemu.listen()
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE)
        directory.mkdir()
        daemon.log_file = directory / "kvmd.log"
        daemon.send_signal(signal.SIGHUP)
        daemon.wait_for_log(" INFO log file reopened")
        daemon.stop()


def test_sighups_by_the_thousand_cost_nothing(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    descriptors = len(os.listdir(f"/proc/{daemon.pid}/fd"))
    fake_qemu.listen()
    for _ in range(5000):
        daemon.send_signal(signal.SIGHUP)
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    wait_until(  # a reopening, which takes one more for a moment, may be under way
        lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) == descriptors + 1,
        "one descriptor more: the connection's",
    )


def daemon_with_its_log_on_stderr(control_dir: Path, *options: str) -> Daemon:
    daemon = Daemon(control_dir, *options)
    daemon.log_file = daemon.stderr_file
    return daemon


def test_a_full_log_stops_nothing(control_dir: Path, fake_qemu: FakeQemu) -> None:
    with daemon_with_its_log_on_stderr(
        control_dir, "--log-file", "/dev/full"
    ) as daemon:
        fake_qemu.listen()
        fake_qemu.negotiate()
        fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        daemon.wait_for_verdict(INSTANCE)
        assert fake_qemu.shutdown_file.exists()
        daemon.stop()


def test_a_stderr_that_nobody_reads_stops_nothing(
    node: Node, fake_qemu: FakeQemu
) -> None:
    reader, writer = os.pipe()
    with subprocess.Popen(
        node.command("--foreground", "--debug"), env=node.environment, stderr=writer
    ) as process:
        os.close(writer)
        fake_qemu.listen()
        fake_qemu.negotiate()
        for _ in range(100):
            fake_qemu.event("RTC_CHANGE", padding="x" * 5000)
        fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        try:
            wait_until(fake_qemu.shutdown_file.exists, "the verdict")
            process.terminate()
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
            os.close(reader)


def said(line: str) -> str:
    """Return the level and the message of a log line."""
    return line.split(" ", 4)[4]


def log_of_lines(lines: list[str], path: Path | None = None) -> kvmd_log.Log:
    """Return a log whose lines, of level and message alone, are appended to a list.

    If it has a file, these are the lines that it can't take.
    """

    def append(line: str) -> None:
        lines.append(said(line))

    if path is None:
        return kvmd_log.Log(None, [append])
    return kvmd_log.Log(str(path), [], [append])


def test_what_is_printable_is_left_and_all_else_is_escaped_as_in_python() -> None:
    text = "".join(map(chr, range(0x30000)))
    shown = kvmd_log.printable(text)
    assert shown.isprintable() and shown.encode("utf-8")
    for char in text:
        escaped = char.encode("unicode_escape").decode()
        assert kvmd_log.printable(char) == (char if char.isprintable() else escaped)


def test_what_is_queued_is_written_at_once_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = kvmd_log.Log(str(tmp_path / "log"), [])
    log.open()
    write, written = os.write, []

    def count_and_write(fd: int, data: bytes) -> int:
        written.append(data)
        return write(fd, data)

    monkeypatch.setattr(os, "write", count_and_write)
    log.flush()
    for number in range(3):
        log.info(f"line {number}")
    assert not written
    log.flush()
    log.flush()
    assert len(written) == 1
    lines = (tmp_path / "log").read_text().splitlines()
    assert [said(line) for line in lines] == [
        "INFO line 0",
        "INFO line 1",
        "INFO line 2",
    ]


def test_the_verdicts_on_all_guests_of_a_node_wait_for_the_end_of_the_turn() -> None:
    lines: list[str] = []
    log = log_of_lines(lines)
    for number in range(4000):
        log.info("verdict=user " + "x" * 150, f"web{number}.example.com")
    assert not lines
    log.flush()
    assert len(lines) == 4000


def test_no_more_is_queued_than_the_limit() -> None:
    lines: list[str] = []
    log = log_of_lines(lines)
    for _ in range(3):
        log.info("x" * (log.QUEUE_LIMIT // 2 + 1))
    assert len(lines) == 2


def test_each_line_has_the_time_when_it_was_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    log = kvmd_log.Log(None, [lines.append])
    moments = [86399.25, 86400.0, 86400.5, 86399.875, 0.0]
    for moment in moments:
        monkeypatch.setattr(time, "time", lambda moment=moment: moment)
        log.info("said")
    log.flush()
    for line, moment in zip(lines, moments):
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
        assert line.startswith(f"{date},{moment % 1 * 1000:03.0f}: ")


class SilentError(Exception):
    """One that fails itself when it is told of."""

    def __str__(self) -> str:
        raise MemoryError


def raise_it(error: Exception, depth: int) -> None:
    if depth:
        raise_it(error, depth - 1)
    raise error


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (ValueError("of two\nlines"), ["ERROR ValueError: of two", "ERROR lines"]),
        (ValueError("\033[2J\udcff"), [r"ERROR ValueError: \x1b[2J\udcff"]),
        (ValueError(), ["ERROR ValueError: "]),
        (SilentError(), ["ERROR SilentError: (what it says can't be told)"]),
    ],
    ids=["two lines", "unprintable", "nothing", "silent"],
)
@pytest.mark.parametrize("depth", [0, 500])
def test_an_exception_is_told_with_the_innermost_calls(
    error: Exception, last: list[str], depth: int
) -> None:
    lines: list[str] = []
    log = log_of_lines(lines)
    try:
        raise_it(error, depth)
    except Exception as raised:
        log.exception("unexpected", raised)
    log.flush()
    beginning = ["ERROR unexpected", "ERROR Traceback (most recent call last):"]
    assert lines[:2] == beginning
    calls = lines[2 : -len(last)]
    assert len(calls) == min(depth + 2, kvmd_log.LONGEST_TRACEBACK)
    assert calls[-1].endswith(", in raise_it") and __file__ in calls[-1]
    assert calls[0].endswith(", in raise_it") == (depth > kvmd_log.LONGEST_TRACEBACK)
    assert lines[-len(last) :] == last


def test_an_exception_whose_traceback_cannot_be_made_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    log = log_of_lines(lines)

    def fail(_error: BaseException) -> list[str]:
        raise MemoryError

    monkeypatch.setattr(kvmd_log, "traceback_of", fail)
    log.exception("unexpected", ValueError())
    log.flush()
    assert lines == ["ERROR unexpected"]


def test_a_sink_that_fails_stops_nothing() -> None:
    lines: list[str] = []
    log = log_of_lines(lines)

    def fail(_line: str) -> None:
        raise MemoryError

    log.sinks.append(fail)
    log.info("one")
    log.flush()
    log.info("two")
    log.flush()
    assert lines == ["INFO one", "INFO two"]


def test_more_lines_about_one_instance_than_the_limit_are_left_out_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    log, limit = log_of_lines(lines), kvmd_log.Log.LINES_PER_PERIOD
    for number in range(limit + 5):
        log.info(f"line {number}", "talkative")
    log.info("unaffected", "other")
    log.info("unaffected")
    log.flush()
    beginning = [f"INFO talkative: line {number}" for number in range(limit)]
    assert lines[:limit] == beginning
    assert lines[limit:] == [
        "WARNING talkative: more than 60 lines within 60 s; leaving out the next ones",
        "INFO other: unaffected",
        "INFO unaffected",
    ]
    pass_time(monkeypatch, log.PERIOD)
    lines.clear()
    log.error("heard again", "talkative")
    log.flush()
    assert lines == [
        "INFO talkative: lines left out: 5",
        "ERROR talkative: heard again",
    ]


def test_a_guest_that_comes_back_again_and_again_cannot_fill_the_log(
    node: Node, fake_qemu: FakeQemu
) -> None:
    node.start()
    fake_qemu.listen()
    fake_qemu.negotiate()
    for _ in range(2 * kvmd_log.Log.LINES_PER_PERIOD):
        fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        fake_qemu.event("RESET")
        fake_qemu.wait_until_read()  # of what one read says, one line tells
    fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    wait_until(fake_qemu.shutdown_file.exists, "the last verdict")
    assert node.log.count(f" {INSTANCE}: ") == kvmd_log.Log.LINES_PER_PERIOD + 1
    node.stop()


def test_a_line_torn_by_a_full_disk_is_not_gone_on_with(tmp_path: Path) -> None:
    log = kvmd_log.Log(str(tmp_path / "log"), [])
    log.open()

    def write_with_little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        log.info("x" * 80)
        log.flush()
        log.info("lost")
        log.flush()
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        log.info("whole")
        log.flush()
        log.info("whole")
        log.flush()

    call_in_process(write_with_little_room)
    torn, *whole = (tmp_path / "log").read_text().splitlines()
    assert len(torn) == 100
    assert all(LOG_LINE.fullmatch(line) for line in whole)
    said = [line.split(" ", 4)[4] for line in whole]
    assert said == ["INFO whole", f"INFO {UNWRITABLE}: it is over", "INFO whole"]


# ---- A log file that can't be had ----------------------------------------------------


def test_what_a_full_disk_does_not_take_goes_elsewhere(tmp_path: Path) -> None:
    lines: list[str] = []
    log = log_of_lines(lines, tmp_path / "log")
    log.open()

    def write_with_no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        log.info("lost")
        log.flush()
        trouble = f"WARNING {UNWRITABLE}: File too large; logging to syslog too"
        assert lines == ["INFO lost", trouble]
        log.info("lost as well")
        log.flush()
        assert lines == ["INFO lost", trouble, "INFO lost as well"]

    call_in_process(write_with_no_room)


def plant_symlink(path: Path) -> None:
    path.with_name("target").write_text("precious\n")
    path.symlink_to("target")


def plant_hard_link(path: Path) -> None:
    path.with_name("target").write_text("precious\n")
    os.link(path.with_name("target"), path)


def plant_fifo(path: Path) -> None:
    os.mkfifo(path)


PLANTED = [plant_symlink, plant_hard_link, plant_fifo, Path.mkdir]


def remove(path: Path) -> None:
    (path.rmdir if path.is_dir() else path.unlink)()


@pytest.mark.parametrize("plant", PLANTED)
def test_without_its_file_the_log_goes_elsewhere_until_it_can_be_opened(
    tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    lines: list[str] = []
    path = tmp_path / "log"
    plant(path)
    log = log_of_lines(lines, path)
    log.open()
    for _ in range(3):
        log.retry()
        log.reopen()
        log.flush()
    log.info("said meanwhile")
    log.flush()
    assert len(lines) == 2 and lines[1] == "INFO said meanwhile"
    assert lines[0].startswith(f"WARNING {UNOPENED}: {path}: ")
    remove(path)
    log.retry()
    log.retry()
    log.flush()
    assert [said(line) for line in path.read_text().splitlines()] == [
        "INFO log file reopened"
    ]
    assert len(lines) == 2
    target = path.with_name("target")
    assert not target.exists() or target.read_text() == "precious\n"


@pytest.mark.parametrize("plant", PLANTED)
def test_a_log_whose_reopening_failed_is_kept_and_tried_again(
    tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    lines: list[str] = []
    path, old = tmp_path / "log", tmp_path / "log.1"
    log = log_of_lines(lines, path)
    log.open()
    path.rename(old)
    plant(path)
    log.reopen()
    log.retry()
    log.flush()
    assert f"cannot reopen the log file {path}: " in old.read_text()
    assert old.read_text().count("\n") == 1
    remove(path)
    log.retry()
    log.flush()
    assert path.read_text().count("log file reopened") == 1
    assert old.read_text().count("\n") == 1 and not lines


PRIVATE_DEV = """
touch "$1/null" && mount --bind /dev/null "$1/null" && mount --rbind "$1" /dev
shift && exec "$@"
"""


@contextmanager
def syslog_beside(node: Node) -> Iterator[tuple[socket.socket, tuple[str, ...]]]:
    """Give what a syslogd would read from, and what has the daemon write there."""
    require_namespaces()
    dev = node.directory / "dev"
    dev.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(dev / "log"))
        syslog.settimeout(SECONDS)
        namespace = ("unshare", "--user", "--map-root-user", "--mount")
        yield syslog, (*namespace, "sh", "-ec", PRIVATE_DEV, "sh", str(dev))


@contextmanager
def syslog_of(node: Node, *options: str) -> Iterator[socket.socket]:
    """Start the daemon with a syslog of its own; give what syslogd would read from."""
    with syslog_beside(node) as (syslog, prefix):
        node.start(*options, prefix=prefix)
        yield syslog


@pytest.mark.parametrize("mode", ["yes", "only"])
def test_syslog_gets_all_but_debug_messages(
    node: Node, fake_qemu: FakeQemu, mode: str
) -> None:
    with syslog_of(node, f"--syslog={mode}", "--debug") as syslog:
        fake_qemu.listen()
        fake_qemu.negotiate()
        fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        messages: list[str] = []
        while not messages or " verdict=user" not in messages[-1]:
            messages.append(syslog.recv(4096).decode())
        node.stop()
    daemon_info = 3 << 3 | 6
    date, pid = r"[A-Z][a-z]{2} [ 1-3]\d \d\d:\d\d:\d\d", r"ganeti-kvmd\[\d+\]"
    assert re.fullmatch(
        rf"<{daemon_info}>{date} {pid}: {INSTANCE}: verdict=user cause=.*", messages[-1]
    )
    assert not any("<--" in message for message in messages)
    assert node.log_file.exists() == (mode == "yes")


def test_a_syslog_that_is_stuck_stops_nothing(node: Node, fake_qemu: FakeQemu) -> None:
    with syslog_of(node, "--syslog=only"):
        fake_qemu.listen()
        fake_qemu.negotiate()
        for _ in range(1000):
            os.kill(node.pid, signal.SIGHUP)
            fake_qemu.event("RTC_CHANGE")
            fake_qemu.wait_until_read()
        fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        wait_until(fake_qemu.shutdown_file.exists, "the verdict")
        node.stop()


# ---- A log file that can't be had: the daemon ----------------------------------------


def make_directory_read_only(node: Node) -> str:
    node.log_file.parent.mkdir()
    directory = node.log_file.parent
    return f"mount --bind {directory} {directory}; mount -o remount,bind,ro {directory}"


def make_directory_full(node: Node) -> str:
    node.log_file.parent.mkdir()
    return f"mount -t tmpfs -o nr_inodes=1 kvmd-test {node.log_file.parent}"


def make_file_another_users(node: Node) -> str:
    """Leave root no right to the file: that of the user namespace rules over none."""
    node.log_file.parent.mkdir()
    node.log_file.touch(mode=0o640)
    os.chown(node.log_file, 12345, 12345)
    return ""


def leave_directory_out(node: Node) -> str:
    return ""


def plant_a_symlink(node: Node) -> str:
    node.log_file.parent.mkdir()
    plant_symlink(node.log_file)
    return ""


UNUSABLE = [
    (make_directory_read_only, "Read-only file system"),
    (make_directory_full, "No space left on device"),
    pytest.param(
        *(make_file_another_users, "Permission denied"),
        marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file"),
    ),
    (leave_directory_out, "No such file or directory"),
    (plant_a_symlink, "it is a symlink"),
]


@pytest.mark.parametrize(("spoil", "reason"), UNUSABLE)
def test_no_log_file_keeps_the_daemon_from_starting(
    node: Node, fake_qemu: FakeQemu, spoil: Callable[[Node], str], reason: str
) -> None:
    node.log_file = node.directory / "log" / "kvm-daemon.log"
    with syslog_beside(node) as (syslog, prefix):
        *namespace, private_dev, sh, dev = prefix
        commands = f"{spoil(node)}\n{private_dev}"
        result = node.run(prefix=(*namespace, commands, sh, dev))
        trouble = f" WARNING {UNOPENED}: {node.log_file}: {reason}; "
        assert (result.returncode, result.stdout) == (0, "")
        assert trouble in result.stderr and result.stderr.count("\n") == 1
        fake_qemu.listen()
        fake_qemu.negotiate()
        fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        messages = [syslog.recv(4096).decode()]
        assert UNOPENED in messages[0]
        while " verdict=user" not in messages[-1]:
            messages.append(syslog.recv(4096).decode())
        assert sum(UNOPENED in message for message in messages) == 1
        node.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes a capability from root")
def test_root_that_may_not_open_the_log_starts_and_opens_it_when_it_may(
    node: Node, fake_qemu: FakeQemu
) -> None:
    node.log_file.touch(mode=0o640)
    os.chown(node.log_file, 12345, 12345)
    no_override = ("setpriv", "--bounding-set", "-dac_override")
    result = node.run("--rescan-interval=0.05", prefix=no_override)
    assert result.returncode == 0 and UNOPENED in result.stderr
    fake_qemu.listen()
    fake_qemu.negotiate()
    os.chown(node.log_file, 0, 0)
    wait_until(lambda: " INFO log file reopened" in node.log, "it is opened")
    fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    wait_until(lambda: " verdict=user " in node.log, "the verdict")
    node.stop()


def test_sighup_opens_the_log_that_could_not_be_opened(node: Node) -> None:
    plant_symlink(node.log_file)
    assert node.run("--rescan-interval=0").returncode == 0
    node.log_file.unlink()
    os.kill(node.pid, signal.SIGHUP)
    wait_until(lambda: " INFO log file reopened" in node.log, "it is opened")
    assert node.log_file.with_name("target").read_text() == "precious\n"
    node.stop()


# ---- A log that blocks ---------------------------------------------------------------

BLOCKING_LOG = """
import time
write = os.write
def write_when_thawed(fd, data):
    while b"verdict=" in data and os.path.exists({frozen!r}):
        time.sleep(0.01)
    return write(fd, data)
os.write = write_when_thawed
"""


def test_all_shutdown_files_of_a_turn_come_before_the_log(control_dir: Path) -> None:
    frozen = control_dir.parent / "frozen"
    patch = "import os\n" + BLOCKING_LOG.format(frozen=str(frozen))
    program = program_with(control_dir.parent, patch)
    with Daemon(control_dir, program=program) as daemon, ExitStack() as ending:
        qemus = [
            ending.enter_context(FakeQemu(control_dir, f"guest{number}"))
            for number in range(3)
        ]
        for qemu in qemus:
            qemu.listen()
            qemu.negotiate()
            daemon.wait_for_log(f" DEBUG {qemu.name}: <-- .*kvmd-status")
        with daemon.frozen():  # it has no more to log, and waits
            frozen.touch()
            for qemu in qemus:
                qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        for qemu in qemus:
            wait_until(qemu.shutdown_file.exists, "the shutdown file")
        assert " verdict=" not in daemon.log
        frozen.unlink()
        for qemu in qemus:
            daemon.wait_for_verdict(qemu.name)
        daemon.stop()
