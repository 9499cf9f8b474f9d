"""The log: its lines, its file, stderr and syslog."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon import INSTANCE, LOG_LINE, Daemon
from deadline import SECONDS, wait_until
from fake_qemu import FakeQemu
from namespace import call_in_process, require_namespaces
from node import Node
from status import status_table

import kvmd_log


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


def log_of_lines(lines: list[str]) -> kvmd_log.Log:
    """Return a log whose lines, of level and message alone, are appended to a list."""
    return kvmd_log.Log(None, [lambda _level, line: lines.append(line.split(" ", 4)[4])])


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
    later = time.monotonic() + log.PERIOD
    monkeypatch.setattr(time, "monotonic", lambda: later)
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
    assert node.log.count(INSTANCE) == kvmd_log.Log.LINES_PER_PERIOD + 1
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
    assert said == ["INFO whole", "INFO the log file can't be written: it is over", "INFO whole"]


PRIVATE_DEV = """
touch "$1/null" && mount --bind /dev/null "$1/null" && mount --rbind "$1" /dev
shift && exec "$@"
"""


@contextmanager
def syslog_of(node: Node, *options: str) -> Iterator[socket.socket]:
    """Start the daemon with a syslog of its own; give what syslogd would read from."""
    require_namespaces()
    dev = node.directory / "dev"
    dev.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(dev / "log"))
        syslog.settimeout(SECONDS)
        namespace = ("unshare", "--user", "--map-root-user", "--mount")
        prefix = (*namespace, "sh", "-ec", PRIVATE_DEV, "sh", str(dev))
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
