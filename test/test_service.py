"""The service: options, exit status, signals, pid file, settings, log, daemonizing."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from daemon import INSTANCE, ROOT, Daemon
from deadline import SECONDS, wait_until
from fake_qemu import FakeQemu
from namespace import call_in_process, require_namespaces
from node import SETTINGS, Node
from status import status_table
from variant import program_with

import kvmd
import kvmd_check
import kvmd_daemon
import kvmd_log
import kvmd_options
import kvmd_process
import kvmd_settings
import kvmd_systemd
import kvmd_version

LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}: ganeti-kvmd pid=\d+"
    r" (DEBUG|INFO|WARNING|ERROR) \S.*"
)


@pytest.fixture
def node(control_dir: Path) -> Iterator[Node]:
    """Return a node with the settings that kvmd needs; nothing may be left running."""
    node = Node(control_dir)
    yield node
    node.end()


def wait_until_ended(node: Node) -> None:
    wait_until(lambda: not node.processes(), "the daemon has ended")


# ---- Options and exit status ---------------------------------------------------------


def test_the_defaults_are_ganetis_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GANETI_ROOTDIR", raising=False)
    options = kvmd_options.parse_arguments([])
    assert options.control_dir == "/var/run/ganeti/kvm-hypervisor/ctrl"
    assert options.pid_file == "/var/run/ganeti/ganeti-kvmd.pid"
    assert options.log_file == "/var/log/ganeti/kvm-daemon.log"
    assert options.ssconf_dir == "/var/lib/ganeti"
    assert (options.syslog, options.socket_suffix) == ("no", "auto")
    assert options.rescan_interval == 15
    assert not (options.foreground or options.debug)
    assert not (options.no_user_checks or options.no_cluster_checks)


def test_ganeti_rootdir_prefixes_the_default_paths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GANETI_ROOTDIR", "/virtual/node1")
    options = kvmd_options.parse_arguments(["--log-file", "/elsewhere/log"])
    assert options.control_dir == "/virtual/node1/var/run/ganeti/kvm-hypervisor/ctrl"
    assert options.pid_file == "/virtual/node1/var/run/ganeti/ganeti-kvmd.pid"
    assert options.ssconf_dir == "/virtual/node1/var/lib/ganeti"
    assert options.log_file == "/elsewhere/log"


def test_paths_are_made_absolute(
    monkeypatch: pytest.MonkeyPatch, control_dir: Path
) -> None:
    monkeypatch.chdir(control_dir)
    assert kvmd_options.parse_arguments(["--pid-file", "p"]).pid_file == f"{control_dir}/p"


@pytest.mark.parametrize(
    "arguments",
    [
        "positional",
        "--nonsense",
        "--control=abbreviated",
        "--control-dir",
        "--syslog",
        "--syslog=maybe",
        "--socket-suffix=.monitor",
        "--rescan-interval=-1",
        "--rescan-interval=nan",
        "--rescan-interval=inf",
        "--rescan-interval=soon",
    ],
)
def test_wrong_usage_is_status_2(arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        kvmd_options.parse_arguments([arguments])
    assert end.value.code == 2


def test_wrong_usage_is_told_and_starts_nothing(node: Node) -> None:
    result = node.run("--nonsense")
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ganeti-kvmd ")
    assert not node.log_file.exists() and not node.pid_file.exists()


def test_help_names_every_option(node: Node) -> None:
    result = node.run("--help")
    assert result.returncode == 0
    for option in ["--foreground", "--debug", "--syslog", "--no-user-checks"]:
        assert option in result.stdout


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(node: Node, option: str) -> None:
    result = node.run(option)
    assert result.returncode == 0
    assert result.stdout == f"ganeti-kvmd (kvmd) version {kvmd_version.VERSION}\n"


def test_without_debug_nothing_but_the_needed_is_logged(
    node: Node, fake_qemu: FakeQemu
) -> None:
    node.start()
    fake_qemu.listen()
    fake_qemu.negotiate()
    wait_until(lambda: " connected to QEMU 7.2.22" in node.log, "it is connected")
    assert " DEBUG " not in node.log


def test_debug_shows_every_message(daemon: Daemon, fake_qemu: FakeQemu) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    fake_qemu.event("RTC_CHANGE", offset=0)
    daemon.wait_for_log(rf" DEBUG {INSTANCE}: <-- .*RTC_CHANGE")


@pytest.mark.parametrize("interval", ["0", "0.05", "1e7", "1e300"])
def test_any_rescan_interval_works(
    control_dir: Path, fake_qemu: FakeQemu, interval: str
) -> None:
    with Daemon(control_dir, "--rescan-interval", interval) as daemon:
        fake_qemu.listen()
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE)
        daemon.stop()


def test_who_is_not_root_is_turned_away(node: Node) -> None:
    require_namespaces()
    result = node.run(prefix=("unshare", "--user"), user_checks=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert "must run as root" in result.stderr
    assert not node.pid_file.exists()


def test_no_user_checks_lets_everybody_in(node: Node) -> None:
    require_namespaces()
    node.start(prefix=("unshare", "--user"))


@pytest.mark.parametrize("option", ["--log-file", "--pid-file"])
def test_a_file_that_cannot_be_made_is_told_with_status_1(
    node: Node, option: str
) -> None:
    path = node.directory / "missing" / "file"
    result = node.run(option, str(path))
    assert (result.returncode, result.stdout) == (1, "")
    assert str(path) in result.stderr and "No such file" in result.stderr
    assert not node.pid_file.exists()


def test_a_path_of_strange_bytes_is_told_and_forges_nothing(node: Node) -> None:
    path = os.fsdecode(os.fsencode(node.directory) + b"/missing\xff\n2026-\033[2J/pid")
    result = node.run("--pid-file", path)
    assert result.returncode == 1
    assert "cannot write the pid file" in result.stderr
    assert result.stderr.count("\n") == 1 and "\033" not in result.stderr
    assert all(LOG_LINE.fullmatch(line) for line in node.log.splitlines())


# ---- The pid file --------------------------------------------------------------------


def test_the_pid_file_is_roots_alone_and_holds_the_pid(node: Node) -> None:
    pid = node.start(prefix=("sh", "-c", 'umask 0; exec "$@"', "sh"))
    assert pid in node.processes()
    assert node.pid_file.read_text() == f"{pid}\n"
    status = node.pid_file.stat()
    assert status.st_mode & 0o7777 == 0o600
    assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be of another group")
def test_the_pid_file_is_of_roots_group_whatever_the_daemons_is(node: Node) -> None:
    node.pid_file.touch(mode=0o666)
    os.chown(node.pid_file, 12345, 12345)
    node.start(prefix=("setpriv", "--regid=12345", "--clear-groups"))
    status = node.pid_file.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 0, 0o600)


def test_a_second_daemon_names_the_first_and_gives_up(node: Node) -> None:
    pid = node.start()
    result = node.run()
    assert result.returncode == 1
    assert f"runs already, with pid {pid}" in result.stderr
    assert f"ERROR another daemon runs already, with pid {pid}" in node.log
    assert node.pid == pid
    node.stop()


@pytest.mark.parametrize("foreground", [(), ("--foreground",)], ids=["", "foreground"])
def test_a_daemon_turned_away_leaves_the_locks_holder_its_file(
    node: Node, foreground: tuple[str, ...]
) -> None:
    with open(node.pid_file, "w") as holder:
        fcntl.lockf(holder, fcntl.LOCK_EX)
        holder.write("another's\n")
        holder.flush()
        assert node.run(*foreground).returncode == 1
        assert node.pid_file.read_text() == "another's\n"


@pytest.mark.parametrize(
    "text", ["", f"{os.getpid()}\n", "999999999\n", "garbage" * 99]
)
def test_only_the_lock_counts(node: Node, text: str) -> None:
    node.pid_file.write_text(text)
    pid = node.start()
    assert node.pid_file.read_text() == f"{pid}\n"
    node.stop()


def test_after_a_crash_the_next_daemon_starts(node: Node) -> None:
    pid = node.start()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not kvmd_check.lock_holder(str(node.pid_file)), "its lock is gone")
    assert node.pid == pid
    assert node.start() != pid
    node.stop()


def test_a_symlink_in_the_place_of_the_pid_file_is_not_followed(node: Node) -> None:
    target = node.directory / "target"
    node.pid_file.symlink_to(target)
    assert node.run().returncode == 1
    assert not target.exists()
    target.write_text("precious")
    assert node.run().returncode == 1
    assert target.read_text() == "precious"


def test_a_pid_file_removed_by_its_holder_just_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pid"
    path.write_text("42\n")
    lockf = fcntl.lockf

    def end_the_holder_and_lock(fd: int, operation: int) -> None:
        monkeypatch.undo()
        path.unlink()
        lockf(fd, operation)

    monkeypatch.setattr(fcntl, "lockf", end_the_holder_and_lock)
    pid_file = kvmd_process.PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    assert os.path.samestat(os.fstat(pid_file.fd), path.stat())
    os.close(pid_file.fd)


def test_a_pid_file_removed_by_another_is_no_matter(node: Node) -> None:
    pid = node.start()
    node.pid_file.unlink()
    os.kill(pid, signal.SIGTERM)
    wait_until_ended(node)
    assert " ERROR " not in node.log


def test_a_pid_file_that_cannot_be_removed_is_no_matter(node: Node) -> None:
    node.pid_file = node.directory / "run" / "ganeti-kvmd.pid"
    node.pid_file.parent.mkdir()
    pid = node.start()
    node.pid_file.parent.rename(node.directory / "away")
    node.pid_file.parent.touch()
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not node.processes(), "its end")
    assert " INFO stopped" in node.log
    assert " ERROR " not in node.log


def test_anothers_file_in_the_place_of_the_pid_file_stays(node: Node) -> None:
    pid = node.start()
    node.pid_file.unlink()
    node.pid_file.write_text("another's\n")
    os.kill(pid, signal.SIGTERM)
    wait_until_ended(node)
    assert node.pid_file.read_text() == "another's\n"


def race_for(pid_file: Path, racers: int) -> int:
    """Return how many of some processes that start at once get the pid file."""
    start, started = os.pipe()
    results, result = os.pipe()
    pids = []
    for _ in range(racers):
        pid = os.fork()
        if pid == 0:
            os.close(started)
            os.read(start, 1)  # ends for all when the parent closes its end
            try:
                locked = kvmd_process.PidFile(str(pid_file))
            except kvmd_process.StartError:
                os.write(result, b"-")
            else:
                os.write(result, b"+")
                signal.pause()
                locked.remove()
            os._exit(0)
        pids.append(pid)
    os.close(started)
    outcome = b""
    while len(outcome) < racers:
        outcome += os.read(results, racers)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for fd in (start, results, result):
        os.close(fd)
    return outcome.count(b"+")


def test_of_those_started_at_once_exactly_one_gets_the_pid_file(tmp_path: Path) -> None:
    for _ in range(100):
        assert race_for(tmp_path / "pid", racers=3) == 1


def test_of_two_daemons_started_at_once_exactly_one_runs(
    node: Node, rounds: int = 3
) -> None:
    for _ in range(rounds):
        starts = [
            subprocess.Popen(
                node.command(), env=node.environment, stderr=subprocess.PIPE
            )
            for _ in range(2)
        ]
        for start in starts:
            start.communicate(timeout=SECONDS)
        assert sorted(start.returncode for start in starts) == [0, 1]
        wait_until(lambda: node.processes() == [node.pid], "the loser has ended")
        node.stop()


@pytest.mark.soak
def test_of_two_daemons_started_at_once_exactly_one_runs_always(node: Node) -> None:
    test_of_two_daemons_started_at_once_exactly_one_runs(node, rounds=100)


# ---- The cluster's settings ----------------------------------------------------------

OK, WARN, FAIL, BROKEN = kvmd_settings.Level


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("kvm\n", OK),
        ("xen-pvm\nkvm\n", OK),
        ("kvm", OK),
        ("xen-pvm\n", FAIL),
        ("", FAIL),
        ("kvm2\n", FAIL),
        ("KVM\n", FAIL),
    ],
)
def test_hypervisor_list(text: str, level: kvmd_settings.Level) -> None:
    finding = kvmd_settings.judge_hypervisors(text)
    assert finding.level is level
    if level is FAIL:
        assert "gnt-cluster modify --enabled-hypervisors" in finding.text


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("True\n", OK),
        ("True", OK),
        ("False\n", FAIL),
        ("", BROKEN),
        ("true\n", BROKEN),
        ("maybe\n", BROKEN),
        ("True\nFalse\n", BROKEN),
    ],
)
def test_enabled_user_shutdown(text: str, level: kvmd_settings.Level) -> None:
    finding = kvmd_settings.judge_user_shutdown(text)
    assert finding.level is level
    if level is FAIL:
        assert "gnt-cluster modify --user-shutdown=yes" in finding.text
    if level is BROKEN:
        assert repr(text) in finding.text


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("node1.example.com=True\n", OK),
        ("node1.example.com=False\n", FAIL),
        ("node2.example.com=False\nnode1.example.com=True\n", OK),
        ("node1=True\n", OK),
        ("node1=False\n", FAIL),
        ("node1=False\nnode1.example.com=True\n", OK),
        ("node2.example.com=True\n", WARN),
        ("", WARN),
        ("node1.example.com\n", BROKEN),
        ("node1.example.com=maybe\n", BROKEN),
    ],
)
def test_node_vm_capable(text: str, level: kvmd_settings.Level) -> None:
    finding = kvmd_settings.judge_vm_capable(text, ["node1.example.com", "node1"])
    assert finding.level is level
    if level is FAIL:
        assert "gnt-node modify --vm-capable=yes node1" in finding.text
    if level is WARN:
        assert "node1.example.com or node1 is not listed" in finding.text


def test_ganeti_hostname_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANETI_HOSTNAME", "node7.example.com")
    assert list(kvmd_settings.names_of_node()) == ["node7.example.com"]
    monkeypatch.delenv("GANETI_HOSTNAME")
    assert next(kvmd_settings.names_of_node()) == socket.gethostname()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("text", "level", "words"),
    [
        (None, "INFO", "this node is in no Ganeti cluster"),
        (b"node1.example.com=False\n", "(INFO|ERROR)", "gnt-"),
        (b"\xff\xfe", "ERROR", "cannot be read: .*0xff"),
    ],
    ids=["missing", "wrong", "unreadable"],
)
def test_a_setting_against_it_ends_it_with_status_0_and_one_line(
    node: Node, setting: str, text: bytes | None, level: str, words: str
) -> None:
    path = node.ssconf_dir / setting
    path.unlink()
    if text is not None:
        path.write_bytes(text)
    result = node.run()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert re.fullmatch(rf".* {level} .*{path}: .*{words}.*\n", node.log)
    assert not node.pid_file.exists()


def test_a_setting_that_is_a_directory_is_an_error_with_status_0(node: Node) -> None:
    path = node.ssconf_dir / "ssconf_hypervisor_list"
    path.unlink()
    path.mkdir()
    assert node.run().returncode == 0
    assert f" ERROR not running: {path}: cannot be read: " in node.log


def test_a_node_that_is_not_listed_runs_with_a_warning(node: Node) -> None:
    node.environment["GANETI_HOSTNAME"] = "node3.example.com"
    node.start()
    assert " WARNING " in node.log and "node3.example.com is not listed" in node.log
    node.stop()


def test_the_settings_are_asked_for_before_all_else(node: Node) -> None:
    (node.ssconf_dir / "ssconf_enabled_user_shutdown").write_text("False\n")
    with open(node.pid_file, "w") as holder:
        fcntl.lockf(holder, fcntl.LOCK_EX)
        assert node.run("--log-file", "/missing/log").returncode == 0


def test_no_cluster_checks_asks_no_settings(node: Node) -> None:
    node.start("--no-cluster-checks", "--ssconf-dir", "/missing")
    node.stop()


# ---- The log -------------------------------------------------------------------------


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
        log.info("lost")
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        log.info("whole")
        log.info("whole")

    call_in_process(write_with_little_room)
    torn, *whole = (tmp_path / "log").read_text().splitlines()
    assert len(torn) == 100
    assert len(whole) == 2 and all(LOG_LINE.fullmatch(line) for line in whole)


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


# ---- In the background ---------------------------------------------------------------

ODD_CIRCUMSTANCES = """
import os, signal, sys
os.umask(0o777)
os.chdir(sys.argv[1])
signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
for fd in (100, 200, 1000):
    os.dup2(0, fd)
os.execv(sys.argv[2], sys.argv[2:])
"""


def status_field(pid: int, name: str) -> str:
    """Return a field of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{name}:\s*(.*)", text, re.MULTILINE)
    assert found
    return found[1]


def test_odd_circumstances_of_the_start_leave_no_trace(node: Node) -> None:
    odd = (sys.executable, "-c", ODD_CIRCUMSTANCES, str(node.directory))
    pid = node.start(prefix=odd)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert status_field(pid, "Umask") == "0077"
    assert int(status_field(pid, "SigBlk"), 16) == 0
    assert os.getsid(pid) not in (pid, os.getsid(0))
    files = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)}
    assert files == dict.fromkeys(range(3), "/dev/null")
    assert {"100", "200", "1000"}.isdisjoint(os.listdir(f"/proc/{pid}/fd"))
    node.stop()


def test_a_socket_of_the_starters_stays_as_it_is(node: Node) -> None:
    ours, starters = socket.socketpair()
    with ours, starters:
        subprocess.run(
            node.command(),
            check=True,
            env=node.environment,
            pass_fds=[starters.fileno()],
            timeout=SECONDS,
        )
        assert os.get_blocking(starters.fileno())
        starters.send(b"x")
        assert ours.recv(1) == b"x"
        starters.close()
        assert ours.recv(1) == b""  # nobody else has it open
    node.stop()


@pytest.mark.parametrize("redirections", ["<&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("foreground", ["", "--foreground &"], ids=["", "foreground"])
def test_closed_stdio_is_no_matter(
    node: Node, fake_qemu: FakeQemu, redirections: str, foreground: str
) -> None:
    subprocess.run(
        ["sh", "-c", f'exec {redirections}; "$@" {foreground}', "sh", *node.command()],
        check=True,
        env=node.environment,
        timeout=SECONDS,
    )
    fake_qemu.listen()
    fake_qemu.negotiate()
    fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    wait_until(fake_qemu.shutdown_file.exists, "the verdict")
    assert all(LOG_LINE.fullmatch(line) for line in node.log.splitlines())
    node.stop()


def test_at_the_starters_exit_the_daemon_is_ready(node: Node) -> None:
    node.start()
    with open(node.pid_file, "r+") as pid_file, pytest.raises(BlockingIOError):
        fcntl.lockf(pid_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert " INFO watching " in node.log and " INFO started kvmd " in node.log
    node.stop()


KILL_THE_STARTER = """
import os, signal
starter = os.getpid()
original = kvmd_daemon.Daemon.start
def start(*arguments):
    os.kill(starter, signal.SIGKILL)
    original(*arguments)
kvmd_daemon.Daemon.start = start
"""


def test_a_starter_that_is_killed_is_no_matter(node: Node) -> None:
    program = program_with(node.directory, KILL_THE_STARTER)
    _kvmd, *options = node.command()[1:]
    starter = subprocess.run(
        [sys.executable, program, *options],
        check=False,
        env=node.environment,
        timeout=SECONDS,
    )
    assert starter.returncode == -signal.SIGKILL
    wait_until(lambda: " INFO started kvmd " in node.log, "the daemon is at work")
    node.stop()


def test_a_limit_of_files_that_cannot_be_raised_is_lived_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert kvmd_process.raise_descriptor_limit() == soft


# Every session that setsid(2) made has an autogroup, see sched(7), if the kernel knows
# of them. What init starts without setsid(2) has none: its file is empty.
AUTOGROUPS = Path("/proc/self/autogroup").exists()
FAVOURED = (kvmd_process.NICENESS, str(kvmd_process.NICENESS) if AUTOGROUPS else "")


def niceness(pid: int) -> tuple[int, str]:
    """Return the niceness of a process and of its autogroup, if it has one."""
    autogroup = Path(f"/proc/{pid}/autogroup")
    words = autogroup.read_text().split() if autogroup.exists() else []
    return os.getpriority(os.PRIO_PROCESS, pid), words[-1] if words else ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise a priority")
def test_it_goes_before_the_guests(node: Node) -> None:
    before = niceness(os.getpid())
    pid = node.start()
    assert niceness(pid) == FAVOURED
    assert niceness(os.getpid()) == before
    node.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise a priority")
def test_a_foreground_session_of_its_own_goes_before_the_guests(node: Node) -> None:
    with subprocess.Popen(
        node.command("--foreground"), env=node.environment, start_new_session=True
    ) as process:
        try:
            wait_until(lambda: " INFO started kvmd " in node.log, "it is at work")
            found = niceness(process.pid)
        finally:
            process.terminate()
    assert found == FAVOURED


def test_in_the_foreground_the_starters_session_stays_as_it_is(
    control_dir: Path,
) -> None:
    _, before = niceness(os.getpid())
    with Daemon(control_dir) as daemon:
        assert niceness(daemon.pid)[1] == before
        daemon.stop()


def test_the_name_of_the_process_is_ganeti_kvmd_however_it_was_started(
    node: Node, daemon: Daemon
) -> None:
    pid = node.start("--control-dir", str(node.directory / "another"))
    assert status_field(pid, "Name") == "ganeti-kvmd"
    assert status_field(daemon.pid, "Name") == "ganeti-kvmd"
    node.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="acts on a pid file of root's alone")
def test_start_stop_daemon_starts_finds_and_stops_it(node: Node) -> None:
    launcher = node.directory / "ganeti-kvmd"
    launcher.symlink_to(ROOT / "kvmd.py")

    def start_stop_daemon(*options: str) -> int:
        command = ["start-stop-daemon", "--quiet", "--pidfile", str(node.pid_file)]
        return subprocess.run(
            [*command, *options], env=node.environment, check=False, timeout=SECONDS
        ).returncode

    start = ("--start", "--oknodo", "--startas", str(launcher), "--")
    name = ("--name", "ganeti-kvmd")
    assert start_stop_daemon("--stop", "--signal", "0", *name) != 0
    assert start_stop_daemon(*start, *node.command()[2:]) == 0
    pid = node.pid
    assert start_stop_daemon(*start, *node.command()[2:]) == 0
    assert node.pid == pid
    assert start_stop_daemon("--stop", "--signal", "0", *name) == 0
    assert start_stop_daemon("--stop", "--signal", "HUP", *name) == 0
    wait_until(lambda: " INFO log file reopened" in node.log, "SIGHUP has come")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "init has taken note")
    assert start_stop_daemon("--stop", "--signal", "0", *name) != 0
    assert start_stop_daemon(*start, *node.command()[2:]) == 0
    assert start_stop_daemon("--stop", "--oknodo", "--retry", "30", *name) == 0
    assert not node.processes() and not node.pid_file.exists()


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
    daemon.send_signal(signal.SIGSTOP)
    for qemu in qemus:
        qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    daemon.send_signal(signal.SIGTERM)
    daemon.send_signal(signal.SIGCONT)
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
    patch = "kvmd.Daemon.log_status = lambda _: 1 / 0"
    program = program_with(control_dir.parent, patch)
    with Daemon(control_dir, program=program) as daemon:
        daemon.send_signal(signal.SIGUSR1)
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
