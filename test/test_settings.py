"""Ganeti's settings, and what they say of this node."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from deadline import wait_until
from namespace import require_namespaces
from node import SETTINGS, Node
from variant import program_with

import kvmd_settings

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
        ("node1=True\nnode1.example.com=False\n", OK),
        ("node2.example.com=True\n", WARN),
        ("", WARN),
        ("node1.example.com\n", BROKEN),
        ("node1.example.com=maybe\n", BROKEN),
    ],
)
def test_node_vm_capable(text: str, level: kvmd_settings.Level) -> None:
    finding = kvmd_settings.judge_vm_capable(text, "node1")
    assert finding.level is level
    if level is FAIL:
        assert "gnt-node modify --vm-capable=yes node1" in finding.text
    if level is WARN:
        assert "node node1 is not listed" in finding.text


TWO_NAMESAKES = "node1.a.example=False\nnode1.b.example=False\n"


@pytest.mark.parametrize(
    ("text", "host", "level", "node"),
    [
        ("node1.example.com=False\n", "node1.example.com", FAIL, "node1.example.com"),
        ("Node1.Example.COM=False\n", "node1", FAIL, "node1.example.com"),
        ("node1=False\nnode1.example.com=True\n", "node1", FAIL, "node1"),
        (TWO_NAMESAKES, "node1.b.example", FAIL, "node1.b.example"),
        (TWO_NAMESAKES, "node1", WARN, "any of node1.a.example, node1.b.example"),
        ("node1.example.com=False\n", "node1.example", WARN, "is not listed"),
        ("node1.example.com=False\n", "node", WARN, "is not listed"),
        ("node10.example.com=False\n", "node1", WARN, "is not listed"),
        ("a.node1.example.com=False\n", "node1", WARN, "is not listed"),
    ],
)
def test_the_host_is_a_listed_node_or_the_first_label_of_one_alone(
    text: str, host: str, level: kvmd_settings.Level, node: str
) -> None:
    finding = kvmd_settings.judge_vm_capable(text, host)
    assert finding.level is level
    assert node in finding.text


def test_ganeti_hostname_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANETI_HOSTNAME", "Node7.example.com")
    assert kvmd_settings.host_name() == "node7.example.com"
    monkeypatch.delenv("GANETI_HOSTNAME")
    assert kvmd_settings.host_name() == socket.gethostname().lower()


WITHOUT_NETWORK = """
import os
def forbid(event, arguments):
    is_network = event.startswith("socket.get")
    if event == "socket.__new__":
        is_network = arguments[1] != 1  # AF_UNIX
    if event == "open" and isinstance(arguments[0], str):
        is_network = arguments[0].startswith(("/etc/hosts", "/etc/resolv.conf"))
    if is_network:
        os._exit(99)
sys.addaudithook(forbid)
"""


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("node1", "INFO started kvmd"),
        ("node2", "INFO not needed here: .*: node node2.example.com is not vm_capable"),
        ("node3", "WARNING .*: node node3 is not listed"),
    ],
)
def test_the_node_is_found_without_the_network(
    node: Node, host: str, message: str
) -> None:
    require_namespaces()
    program = program_with(node.directory, WITHOUT_NETWORK)
    namespace = ("unshare", "--user", "--map-root-user", "--uts", "sh", "-ec")
    commands = f'hostname {host}; python=$1; shift 2; exec "$python" {program} "$@"'
    del node.environment["GANETI_HOSTNAME"]
    result = node.run(prefix=(*namespace, commands, "sh"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert re.search(message, node.log)


def test_settings_are_read_from_regular_files_alone(node: Node) -> None:
    path = node.ssconf_dir / "ssconf_hypervisor_list"
    planted: list[tuple[Callable[[Path], None], str]] = [
        (os.mkfifo, "no regular file"),
        (link_to_secret, "a symlink"),
    ]
    for plant, reason in planted:
        path.unlink()
        plant(path)
        assert node.run().returncode == 0
        assert f" ERROR not running: {path}: cannot be read: it is {reason}" in node.log
    assert "secret" not in node.log


def link_to_secret(path: Path) -> None:
    path.with_name("shadow").write_text("secret\n")
    path.symlink_to("shadow")


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


def test_a_restart_in_place_does_not_ask_the_settings_again(node: Node) -> None:
    pid = node.start()
    (node.ssconf_dir / "ssconf_enabled_user_shutdown").write_text("False\n")
    os.kill(pid, signal.SIGUSR2)
    wait_until(lambda: node.log.count(" INFO started kvmd ") == 2, "it has restarted")
    assert node.pid == pid
    node.stop()
