"""`--check`: what prevents detection on a node, told without disturbing anybody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from daemon import INSTANCE, ROOT, Daemon
from deadline import wait_until
from fake_qemu import FakeQemu
from status import status_table

import kvmd_check
import kvmd_options
import kvmd_settings

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


def check(control_dir: Path, ssconf_dir: Path) -> tuple[int, list[str]]:
    """Run `--check`; return its exit status and its lines."""
    paths = {
        "--control-dir": control_dir,
        "--pid-file": control_dir.parent / "kvmd.pid",
        "--ssconf-dir": ssconf_dir,
    }
    options = [f"{option}={path}" for option, path in paths.items()]
    command = [sys.executable, str(ROOT / "kvmd.py"), "--check", *options]
    result = subprocess.run(
        command,
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
        (["ganeti-kvmd, pid 7"], 7, kvmd_settings.Level.OK),
        (["socat, pid 8"], 7, kvmd_settings.Level.WARN),
        (["socat, pid 77"], 7, kvmd_settings.Level.WARN),
        (["socat, pid 8", "ganeti-kvmd, pid 7"], 7, kvmd_settings.Level.OK),
        (["unknown process"], 7, kvmd_settings.Level.OK),
        ([], 7, kvmd_settings.Level.WARN),
        (["socat, pid 8"], None, kvmd_settings.Level.OK),
        ([], None, kvmd_settings.Level.OK),
    ],
)
def test_clients_of_a_socket(
    clients: list[str], daemon: int | None, level: kvmd_settings.Level
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
        wait_until(lambda: kvmd_check.command_of(compiled.pid) == "sleep 60", "its start")
        monkeypatch.setattr(kvmd_check, "lock_holder", lambda _path: compiled.pid)
        lines = [finding.text for finding in kvmd_check.check_node(options)]
        compiled.kill()
    assert "it is Ganeti's own (sleep 60)" in line_about("a daemon runs", lines)
    assert line_about(f"{INSTANCE}.kvmd", lines).endswith("nobody connected")


def test_the_peer_of_a_socket_is_found() -> None:
    one, other = socket.socketpair()
    with one, other:
        inodes = [os.fstat(end.fileno()).st_ino for end in (one, other)]
        peers = kvmd_check.read_peers()
        assert [peers[inode] for inode in inodes] == inodes[::-1]
        mine = f", pid {os.getpid()}"
        assert kvmd_check.read_holders({inodes[0]})[inodes[0]].endswith(mine)
