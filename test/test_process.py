"""The process: pid file, daemonizing, descriptors, priority."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from daemon import LOG_LINE, ROOT, Daemon
from deadline import SECONDS, wait_until
from fake_qemu import FakeQemu
from namespace import call_in_process, require_namespaces
from node import Node
from variant import program_with

import kvmd_process


def wait_until_ended(node: Node) -> None:
    wait_until(lambda: not node.processes(), "the daemon has ended")


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
    path = str(node.pid_file)
    wait_until(lambda: not kvmd_process.lock_holder(path), "its lock is gone")
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


def test_a_restart_in_place_leaves_the_pid_in_the_file_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kvmd_process.PidFile(str(tmp_path / "pid"))
    contents: list[str] = []

    def note(call: Callable[..., int]) -> Callable[..., int]:
        def do_and_note(*arguments: object) -> int:
            result = call(*arguments)
            contents.append((tmp_path / "pid").read_text())
            return result

        return do_and_note

    for name in ("pwrite", "ftruncate"):
        monkeypatch.setattr(os, name, note(getattr(os, name)))
    kvmd_process.PidFile(before.path, before.fd)
    assert contents == [f"{os.getpid()}\n"] * 2
    before.remove()
    os.close(before.fd)


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


def plant_symlink(path: Path) -> None:
    path.with_name("target").write_text("precious")
    path.symlink_to("target")


def plant_hard_link(path: Path) -> None:
    path.with_name("target").write_text("precious")
    os.link(path.with_name("target"), path)


def plant_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (plant_symlink, "it is a symlink"),
        (plant_hard_link, "it has several names"),
        (plant_fifo, "it is no regular file"),
        (Path.mkdir, "Is a directory"),
    ],
)
def test_what_is_planted_in_the_place_of_the_pid_file_is_left_and_told(
    node: Node, plant: Callable[[Path], None], reason: str
) -> None:
    plant(node.pid_file)
    result = node.run()
    assert result.returncode == 1
    assert f"cannot write the pid file {node.pid_file}: {reason}" in result.stderr
    target = node.pid_file.with_name("target")
    assert not target.exists() or target.read_text() == "precious"


# ---- What was inherited --------------------------------------------------------------


def open_pid_file(path: Path, text: str) -> int:
    path.write_text(text)
    return os.open(path, os.O_RDWR)


def test_an_inherited_pid_file_with_this_pid_is_found(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    fd = open_pid_file(path, f"{os.getpid()}\n")
    assert kvmd_process.is_own_pid_file(fd, str(path))
    os.close(fd)
    assert not kvmd_process.is_own_pid_file(fd, str(path))


def test_a_locked_pid_file_is_taken_over_from_the_program_before(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pid"
    before = kvmd_process.PidFile(str(path))
    os.set_inheritable(before.fd, True)
    assert kvmd_process.is_own_pid_file(before.fd, str(path))
    after = kvmd_process.PidFile(str(path), before.fd)
    assert after.fd == before.fd and not os.get_inheritable(after.fd)
    holder = os.getpid()

    def look_from_outside() -> None:
        assert kvmd_process.lock_holder(str(path)) == holder
        assert path.read_text() == f"{holder}\n"

    call_in_process(look_from_outside)
    os.close(after.fd)


def replace_it(path: Path) -> None:
    path.rename(path.with_suffix(".old"))
    path.write_text(f"{os.getpid()}\n")


@pytest.mark.parametrize(
    ("text", "change"),
    [
        (f"{os.getpid() + 1}\n", Path.exists),
        (f"{os.getpid()}", Path.exists),
        (f"{os.getpid()}\n1", Path.exists),
        ("", Path.exists),
        (f"{os.getpid()}\n", Path.unlink),
        (f"{os.getpid()}\n", replace_it),
    ],
    ids=["another's", "torn", "longer", "empty", "removed", "replaced"],
)
def test_no_other_inherited_file_is_taken_for_the_pid_file(
    tmp_path: Path, text: str, change: Callable[[Path], object]
) -> None:
    path = tmp_path / "pid"
    fd = open_pid_file(path, text)
    change(path)
    assert not kvmd_process.is_own_pid_file(fd, str(path))
    os.close(fd)


def test_a_pid_file_that_was_inherited_for_reading_is_not_the_daemons(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pid"
    path.write_text(f"{os.getpid()}\n")
    with open(path) as reader:
        assert not kvmd_process.is_own_pid_file(reader.fileno(), str(path))


def test_an_inherited_pid_file_that_another_has_locked_is_not_taken_over(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pid"
    fd = open_pid_file(path, f"{os.getpid()}\n")

    def take_over() -> None:
        with pytest.raises(kvmd_process.StartError, match="runs already"):
            kvmd_process.PidFile(str(path), fd)

    fcntl.lockf(fd, fcntl.LOCK_EX)
    call_in_process(take_over)
    os.close(fd)


def open_descriptors_of_all_kinds(directory: Path) -> list[int]:
    """Return descriptors of all kinds, of what the kernel has of them."""
    libc = ctypes.CDLL(None)
    found = [
        *os.pipe(),
        os.open(directory, os.O_PATH),
        os.open("/dev/null", os.O_RDWR),
        os.memfd_create("kvmd-test"),
        libc.inotify_init1(0),
        libc.epoll_create1(0),
        libc.eventfd(0, 0),
    ]
    for family, kind in ODD_SOCKETS:
        with suppress(OSError):
            found.append(socket.socket(family, kind).detach())
    return found


#: AF_KEY is 15, AF_XDP 44: Python has no names for them.
ODD_SOCKETS = [
    (socket.AF_INET, socket.SOCK_STREAM),
    (socket.AF_INET, socket.SOCK_RAW),
    (socket.AF_UNIX, socket.SOCK_SEQPACKET),
    (socket.AF_NETLINK, socket.SOCK_RAW),
    (socket.AF_PACKET, socket.SOCK_RAW),
    (socket.AF_ALG, socket.SOCK_SEQPACKET),
    (socket.AF_VSOCK, socket.SOCK_STREAM),
    (15, socket.SOCK_RAW),
    (44, socket.SOCK_RAW),
]


def test_all_descriptors_are_closed_but_the_pid_file_and_the_sockets(
    tmp_path: Path,
) -> None:
    def close_and_look() -> None:
        path = tmp_path / "pid"
        fds = open_descriptors_of_all_kinds(tmp_path)
        os.dup(fds[-1])
        kept = open_pid_file(path, f"{os.getpid()}\n")
        pid_file, sockets = kvmd_process.sort_inherited(str(path))
        assert pid_file == kept
        assert len(sockets) >= 2
        listing = 3  # the lowest that is free
        still_open = {int(name) for name in os.listdir("/proc/self/fd")}
        assert still_open <= {0, 1, 2, listing, kept, *sockets.values()}
        assert fds[-1] in sockets.values()
        for inode, fd in sockets.items():
            assert os.readlink(f"/proc/self/fd/{fd}") == f"socket:[{inode}]"

    call_in_process(close_and_look)


def test_descriptors_of_any_kind_keep_the_daemon_from_nothing(node: Node) -> None:
    fds = open_descriptors_of_all_kinds(node.directory)
    names = {os.readlink(f"/proc/self/fd/{fd}") for fd in fds}
    foreign = {name for name in names if not name.startswith(("/dev/", "anon_inode:"))}
    assert len(foreign) > 5
    try:
        subprocess.run(
            node.command(),
            check=True,
            env=node.environment,
            pass_fds=fds,
            timeout=SECONDS,
        )
    finally:
        for fd in fds:
            os.close(fd)
    assert foreign.isdisjoint(
        os.readlink(f"/proc/{node.pid}/fd/{fd}")
        for fd in os.listdir(f"/proc/{node.pid}/fd")
    )
    node.stop()


def test_a_fifo_in_the_place_of_the_pid_file_is_closed_as_well(tmp_path: Path) -> None:
    def close_and_look() -> None:
        path = tmp_path / "pid"
        os.mkfifo(path)
        fifo = os.open(path, os.O_RDWR)
        assert kvmd_process.sort_inherited(str(path))[0] is None
        with pytest.raises(OSError):
            os.fstat(fifo)

    call_in_process(close_and_look)


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


def test_a_pid_file_that_cannot_be_made_is_told_with_status_1(node: Node) -> None:
    path = node.directory / "missing" / "file"
    result = node.run("--pid-file", str(path))
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


def oom_score_adj(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def may_lower_oom_score() -> bool:
    command = ["sh", "-c", "echo -1000 >/proc/self/oom_score_adj"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_it_is_the_last_to_be_killed_when_memory_runs_out(node: Node) -> None:
    before = oom_score_adj(os.getpid())
    pid = node.start()
    lowered = oom_score_adj(pid)
    assert lowered == -1000 if may_lower_oom_score() else lowered <= before
    assert oom_score_adj(os.getpid()) == before
    node.stop()


def test_without_the_right_it_goes_back_to_the_score_it_may_have(node: Node) -> None:
    require_namespaces()
    raise_it = 'echo 250 >/proc/self/oom_score_adj; exec "$@"'
    pid = node.start(prefix=("unshare", "--user", "sh", "-ec", raise_it, "sh"))
    assert oom_score_adj(pid) < oom_score_adj(os.getpid()) + 100
    node.stop()


@pytest.mark.parametrize("score", ["1000\n", "0\n", "-999\n"])
def test_with_the_right_its_oom_score_is_the_lowest_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: str
) -> None:
    file = tmp_path / "oom_score_adj"
    file.write_text(score)
    monkeypatch.setattr(kvmd_process, "OOM_SCORE_ADJ", str(file))
    kvmd_process.resist_oom_killer()
    assert file.read_text() == "-1000"


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
