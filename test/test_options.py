"""The command line: options, defaults, wrong usage."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemon import INSTANCE, Daemon
from deadline import wait_until
from fake_qemu import FakeQemu
from namespace import require_namespaces
from node import Node

import kvmd_options
import kvmd_version


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
