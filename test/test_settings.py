"""Ganeti's settings, and what they say of this node."""

from __future__ import annotations

import fcntl
import re
import socket

import pytest
from node import SETTINGS, Node

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
