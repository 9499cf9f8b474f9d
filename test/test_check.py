"""`--check`: what prevents detection on a node, told without disturbing anybody."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon import INSTANCE, ROOT, Daemon
from deadline import wait_until
from fake_qemu import FakeQemu
from namespace import call_in_namespace
from status import status_table

import kvmd_check
import kvmd_options
import kvmd_process
from kvmd_settings import Level
from kvmd_socket import LONGEST_SOCKET_PATH

NODE = "node1.example.com"
SETTINGS = {
    "ssconf_hypervisor_list": "kvm\n",
    "ssconf_enabled_user_shutdown": "True\n",
    "ssconf_node_vm_capable": f"{NODE}=True\n",
    "ssconf_hvparams_kvm": "acpi=True\nuser_shutdown=True\n",
}


@pytest.fixture
def ssconf_dir(control_dir: Path) -> Path:
    """Return a directory with the settings of a cluster where detection works."""
    directory = control_dir.parent / "ssconf"
    directory.mkdir()
    for name, text in SETTINGS.items():
        (directory / name).write_text(text)
    return directory


def check_command(control_dir: Path, ssconf_dir: Path) -> list[str]:
    """Return the command that checks a node."""
    paths = {
        "--control-dir": control_dir,
        "--pid-file": control_dir.parent / "kvmd.pid",
        "--ssconf-dir": ssconf_dir,
    }
    options = [f"{option}={path}" for option, path in paths.items()]
    return [sys.executable, str(ROOT / "kvmd.py"), "--check", *options]


def check(control_dir: Path, ssconf_dir: Path) -> tuple[int, list[str]]:
    """Run `--check`; return its exit status and its lines."""
    result = subprocess.run(
        check_command(control_dir, ssconf_dir),
        env={**os.environ, "GANETI_HOSTNAME": NODE},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.stderr == ""
    return result.returncode, result.stdout.splitlines()


def line_about(what: str, lines: list[str]) -> str:
    """Return the only line that holds certain words."""
    [line] = [line for line in lines if what in line]
    return line


def test_a_node_where_detection_works(
    daemon: Daemon, fake_qemu: FakeQemu, control_dir: Path, ssconf_dir: Path
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    status, lines = check(control_dir, ssconf_dir)
    assert status == 0
    assert all(line.startswith("ok    ") for line in lines), lines
    assert f"a daemon runs, pid {daemon.pid}," in line_about("daemon runs", lines)
    about_socket = line_about(f"{INSTANCE}.kvmd", lines)
    assert about_socket.endswith(f"connected by ganeti-kvmd, pid {daemon.pid}")


def test_no_daemon_means_no_detection(control_dir: Path, ssconf_dir: Path) -> None:
    (control_dir.parent / "kvmd.pid").write_text("1\n")
    status, lines = check(control_dir, ssconf_dir)
    assert status == 1
    assert line_about("no daemon runs", lines).startswith("FAIL  ")


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("ssconf_hypervisor_list", "xen-pvm\n", "--enabled-hypervisors"),
        ("ssconf_enabled_user_shutdown", "False\n", "--user-shutdown=yes"),
        ("ssconf_node_vm_capable", f"{NODE}=False\n", f"--vm-capable=yes {NODE}"),
        ("ssconf_enabled_user_shutdown", "maybe\n", "redist-conf"),
    ],
)
def test_a_setting_that_forbids_detection_comes_with_its_remedy(
    daemon: Daemon,
    control_dir: Path,
    ssconf_dir: Path,
    name: str,
    text: str,
    remedy: str,
) -> None:
    (ssconf_dir / name).write_text(text)
    status, lines = check(control_dir, ssconf_dir)
    assert status == 1
    line = line_about(name, lines)
    assert line.startswith("FAIL  ")
    assert remedy in line


@pytest.mark.parametrize("text", ["user_shutdown=False\n", "acpi=True\n"])
def test_the_hypervisor_parameter_is_worth_a_warning(
    daemon: Daemon, control_dir: Path, ssconf_dir: Path, text: str
) -> None:
    (ssconf_dir / "ssconf_hvparams_kvm").write_text(text)
    status, lines = check(control_dir, ssconf_dir)
    assert status == 0
    line = line_about("ssconf_hvparams_kvm", lines)
    assert line.startswith("warn  ")
    assert "gnt-cluster modify -H kvm:user_shutdown=true" in line


def test_what_each_socket_is_found_to_be(control_dir: Path, ssconf_dir: Path) -> None:
    with FakeQemu(control_dir, "listens") as listening:
        listening.listen()
        with FakeQemu(control_dir, "died") as dead:
            dead.listen()
            dead.crash()
            (control_dir / "planted.kvmd").write_text("")
            _, lines = check(control_dir, ssconf_dir)
    assert line_about("listens.kvmd", lines).endswith("listening, nobody connected")
    assert "dead, nobody listens" in line_about("died.kvmd", lines)
    assert line_about("planted.kvmd", lines).endswith("no socket; it is ignored")


def test_an_instance_that_the_daemon_waits_for_is_worth_a_warning(
    daemon: Daemon, fake_qemu: FakeQemu, control_dir: Path, ssconf_dir: Path
) -> None:
    fake_qemu.listen()
    # Or "not greeted", if that takes ten seconds.
    wait_until(
        lambda: "QEMU unknown" in status_table(daemon).get(f"{INSTANCE}.kvmd", ""),
        "it is connected",
    )
    status, lines = check(control_dir, ssconf_dir)
    line = line_about(f"{INSTANCE}.kvmd", lines)
    assert status == 0
    assert line.startswith("warn  ") and f"the daemon, pid {daemon.pid}, waits" in line


@pytest.mark.parametrize(
    ("clients", "daemon", "level"),
    [
        (["ganeti-kvmd, pid 7"], 7, Level.OK),
        (["socat, pid 8"], 7, Level.WARN),
        (["socat, pid 77"], 7, Level.WARN),
        (["socat, pid 8", "ganeti-kvmd, pid 7"], 7, Level.OK),
        (["unknown process"], 7, Level.OK),
        ([], 7, Level.WARN),
        (["socat, pid 8"], None, Level.OK),
        ([], None, Level.OK),
    ],
)
def test_clients_of_a_socket(
    clients: list[str], daemon: int | None, level: Level
) -> None:
    finding = kvmd_check.check_clients("/ctrl/a.kvmd", clients, daemon)
    assert finding.level is level
    assert all(client in finding.text for client in clients)


def test_a_missing_directory_is_no_failure(
    daemon: Daemon, control_dir: Path, ssconf_dir: Path
) -> None:
    control_dir.rmdir()
    status, lines = check(control_dir, ssconf_dir)
    control_dir.mkdir()
    assert status == 0
    assert line_about("not there yet", lines).startswith("warn  ")


def test_what_stands_in_the_directorys_place_is_a_failure(
    daemon: Daemon, control_dir: Path, ssconf_dir: Path
) -> None:
    control_dir.rmdir()
    control_dir.touch()
    status, lines = check(control_dir, ssconf_dir)
    control_dir.unlink()
    control_dir.mkdir()
    assert status == 1
    line = line_about("Not a directory", lines)
    assert line.startswith("FAIL  ") and "move away what stands there" in line


def test_a_setting_that_can_not_be_read_is_told_of_with_its_path_once(
    daemon: Daemon, control_dir: Path, ssconf_dir: Path
) -> None:
    (ssconf_dir / "ssconf_hvparams_kvm").unlink()
    _, lines = check(control_dir, ssconf_dir)
    line = line_about("ssconf_hvparams_kvm", lines)
    assert line.startswith("warn  ") and line.endswith("gnt-cluster redist-conf")
    assert line.count("ssconf_hvparams_kvm") == 1


def test_names_that_are_no_text_are_no_matter(
    daemon: Daemon, fake_qemu: FakeQemu, control_dir: Path, ssconf_dir: Path
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    rename = "open('/proc/self/comm', 'wb').write(b'\\xff'); print(flush=True); input()"
    with (
        socket.socket(socket.AF_UNIX) as other,
        subprocess.Popen(
            [sys.executable, "-c", rename],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process,
    ):
        other.bind(b"\0a\nb \xff%d\n" % os.getpid())
        assert process.stdout and process.stdin
        process.stdout.readline()
        status, lines = check(control_dir, ssconf_dir)
        process.stdin.write(b"\n")
    assert status == 0
    assert f"ganeti-kvmd, pid {daemon.pid}" in line_about(f"{INSTANCE}.kvmd", lines)


def test_a_path_that_leads_nowhere_any_more_is_no_matter(
    daemon: Daemon, fake_qemu: FakeQemu, control_dir: Path, ssconf_dir: Path
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    with (
        socket.socket(socket.AF_UNIX) as other,
        subprocess.Popen(["sleep", "60"]) as zombie,
    ):
        other.bind(f"/proc/{zombie.pid}/root{control_dir.parent}/other")
        zombie.kill()
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        status, lines = check(control_dir, ssconf_dir)
    assert status == 0
    assert f"ganeti-kvmd, pid {daemon.pid}" in line_about(f"{INSTANCE}.kvmd", lines)


def test_of_ganetis_own_daemon_no_status_is_asked_for(
    fake_qemu: FakeQemu,
    control_dir: Path,
    ssconf_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_qemu.listen()
    options = kvmd_options.Options()
    options.control_dir, options.ssconf_dir = str(control_dir), str(ssconf_dir)
    with subprocess.Popen(["sleep", "60"]) as compiled:
        command = "sleep 60"
        wait_until(lambda: kvmd_check.command_of(compiled.pid) == command, "it runs")
        monkeypatch.setattr(kvmd_check, "lock_holder", lambda _path: compiled.pid)
        lines = [finding.text for finding in kvmd_check.check_node(options)]
        compiled.kill()
    assert "it is Ganeti's own (sleep 60)" in line_about("a daemon runs", lines)
    assert line_about(f"{INSTANCE}.kvmd", lines).endswith("nobody connected")


@contextmanager
def locked_by_another(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Have a process hold the lock on a pid file, as the daemon does; yield it."""
    lock = (
        "import fcntl, sys; file = open(sys.argv[1], 'w');"
        " fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", lock, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_the_holder_of_a_lock_is_told_and_keeps_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    assert kvmd_process.lock_holder(str(pid_file)) is None
    with locked_by_another(pid_file) as process:
        for _ in range(2):
            assert kvmd_process.lock_holder(str(pid_file)) == process.pid
    assert kvmd_process.lock_holder(str(pid_file)) is None


def test_the_holder_is_told_where_the_device_is_numbered_otherwise(
    tmp_path: Path,
) -> None:
    def look_on_overlay() -> None:
        for layer in ("lower", "upper", "merged"):
            (tmp_path / layer).mkdir()
        mount_tmpfs = ("mount", "-t", "tmpfs", "none")
        subprocess.run([*mount_tmpfs, tmp_path / "lower"], check=True)
        subprocess.run([*mount_tmpfs, tmp_path / "upper"], check=True)
        for part in ("files", "work"):
            (tmp_path / "upper" / part).mkdir()
        layers = "lowerdir=lower,upperdir=upper/files,workdir=upper/work,userxattr"
        command = ["mount", "-t", "overlay", "-o", layers, "none", "merged"]
        subprocess.run(command, check=True, cwd=tmp_path)
        pid_file = tmp_path / "merged" / "pid"
        with locked_by_another(pid_file) as process:
            assert kvmd_process.lock_holder(str(pid_file)) == process.pid

    call_in_namespace(look_on_overlay)


def test_a_pid_file_that_can_not_be_opened_is_a_failure(
    control_dir: Path, ssconf_dir: Path
) -> None:
    (control_dir.parent / "kvmd.pid").symlink_to("elsewhere")
    status, lines = check(control_dir, ssconf_dir)
    assert status == 1
    line = line_about("kvmd.pid", lines)
    assert line.startswith("FAIL  ") and "Too many levels of symbolic links" in line


def test_nobody_has_to_read_all_of_it(control_dir: Path, ssconf_dir: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with locked_by_another(control_dir.parent / "kvmd.pid"):
        result = subprocess.run(
            [*check_command(control_dir, ssconf_dir), "--no-cluster-checks"],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=30,
            check=False,
        )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_report_that_can_not_be_written_is_a_line(
    control_dir: Path, ssconf_dir: Path
) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            check_command(control_dir, ssconf_dir),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr.startswith("ganeti-kvmd: cannot write to stdout: No space")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("findings", range(6))
def test_what_vanishes_while_it_looks_is_no_matter(
    control_dir: Path, findings: int
) -> None:
    options = kvmd_options.Options()
    options.no_cluster_checks = True
    options.control_dir = str(control_dir)
    options.pid_file = str(control_dir.parent / "kvmd.pid")
    with (
        FakeQemu(control_dir, "a") as qemu,
        FakeQemu(control_dir, "b") as other,
        locked_by_another(Path(options.pid_file)) as daemon,
    ):
        qemu.listen()
        other.listen()
        looking = kvmd_check.check_node(options)
        found = [next(looking) for _ in range(findings)]
        daemon.kill()
        os.waitid(os.P_PID, daemon.pid, os.WEXITED | os.WNOWAIT)  # a zombie at first
        qemu.exit()
        daemon.wait()
        other.exit()
        control_dir.rmdir()
        found += looking
        control_dir.mkdir()
    assert found


def test_what_can_not_be_looked_at_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_path: str) -> None:
        raise OSError(errno.EMFILE, "Too many open files", "/proc/self/net/unix")

    monkeypatch.setattr(kvmd_check, "read_listeners", fail)
    monkeypatch.setattr(kvmd_check, "lock_holder", lambda _path: os.getpid())
    options = kvmd_options.Options()
    options.no_cluster_checks = True
    assert kvmd_check.check(options) == 1
    line = line_about("Too many open files", capfd.readouterr().out.splitlines())
    assert line.startswith("FAIL  ") and "/proc/self/net/unix" in line


def test_of_a_daemon_that_has_just_ended_no_limit_is_known() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    finding = kvmd_check.check_daemon("kvmd.pid", process.pid)
    assert finding.text.endswith("with an unknown number of open files")


def test_whoever_is_connected_is_named(control_dir: Path) -> None:
    with (
        FakeQemu(control_dir, INSTANCE) as qemu,
        subprocess.Popen(["sleep", "60"]) as daemon,
    ):
        qemu.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(qemu.path))
            qemu.accept()
            clients = kvmd_check.read_clients(str(control_dir), daemon.pid)
        daemon.kill()
    [client_of_qemu] = clients[qemu.path.name]
    assert client_of_qemu.endswith(f", pid {os.getpid()}")


def findings_about(control_dir: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Return what is said of each socket by its name, and how grave it is."""
    names = set(os.listdir(control_dir))
    found = kvmd_check.check_instances(str(control_dir), names, suffixes, None)
    texts = {}
    for level, text in found:
        path, _, finding = text.partition(": ")
        assert os.path.basename(path) not in texts
        texts[os.path.basename(path)] = f"{level.value}: {finding}"
    return texts


def test_a_path_that_is_too_long_does_not_hide_the_other_suffix(
    control_dir: Path,
) -> None:
    rest = LONGEST_SOCKET_PATH - len(str(control_dir)) - len("/.qmp")
    name = "a" * rest
    with FakeQemu(control_dir, name, ".qmp") as qemu:
        qemu.bind()
        qemu.path.rename(control_dir / f"{name}.kvmd")
        qemu.listen()
        qemu.exit()
        qemu.listen()
        found = findings_about(control_dir, (".kvmd", ".qmp"))
    assert "longer than the 107 bytes" in found[f"{name}.kvmd"]
    assert "for want of a .kvmd" in found[f"{name}.qmp"]


AUTO = (".kvmd", ".qmp")


@pytest.mark.parametrize(
    ("present", "removed", "suffixes", "expected"),
    [
        ([".kvmd", ".qmp"], [], AUTO, {".kvmd": "ok", ".qmp": "ok"}),
        ([".kvmd", ".qmp"], [".kvmd"], AUTO, {".kvmd": "removed", ".qmp": "ok"}),
        ([".kvmd", ".qmp"], [".kvmd"], (".kvmd",), {".kvmd": "removed", ".qmp": "ok"}),
        ([".kvmd", ".qmp"], [".kvmd"], (".qmp",), {".qmp": "ok"}),
        ([".kvmd", ".qmp"], [".qmp"], AUTO, {".kvmd": "ok"}),
        ([".kvmd", ".qmp"], AUTO, AUTO, {".kvmd": "removed"}),
        ([".qmp"], [], AUTO, {".qmp": "in use"}),
        ([".qmp"], [], (".qmp",), {".qmp": "ok"}),
        ([".qmp"], [], (".kvmd",), {".qmp": "ok"}),
    ],
)
def test_a_kvmd_that_is_not_there(
    control_dir: Path,
    present: list[str],
    removed: list[str],
    suffixes: tuple[str, ...],
    expected: dict[str, str],
) -> None:
    remedy = f"restart the instance (gnt-instance reboot {INSTANCE})"
    endings = {
        "ok": "ok: listening, nobody connected",
        "removed": "warn: listening, nobody connected, but somebody has removed the"
        f" socket: nobody can connect to it any more; {remedy}",
        "in use": "warn: listening, nobody connected; the daemon uses it for want of a"
        f" .kvmd, and keeps Ganeti from it; {remedy}",
    }
    qemus = [FakeQemu(control_dir, INSTANCE, suffix) for suffix in present]
    try:
        for qemu in qemus:
            qemu.listen()
        for suffix in removed:
            (control_dir / (INSTANCE + suffix)).unlink()
        found = findings_about(control_dir, suffixes)
    finally:
        for qemu in qemus:
            qemu.exit()
    assert found == {
        INSTANCE + suffix: endings[what] for suffix, what in expected.items()
    }


def test_a_removed_kvmd_with_something_else_in_its_place(control_dir: Path) -> None:
    with FakeQemu(control_dir, INSTANCE) as qemu:
        qemu.listen()
        qemu.path.unlink()
        qemu.path.touch()
        names = {qemu.path.name}
        found = list(kvmd_check.check_instances(str(control_dir), names, AUTO, None))
    assert [finding.level for finding in found] == [Level.WARN, Level.WARN]
    assert "somebody has removed the socket" in found[0].text
    assert found[1].text.endswith("no socket; it is ignored")
