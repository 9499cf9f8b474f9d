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
    assert options.state_file == "/var/run/ganeti/ganeti-kvmd.state"
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
    assert options.state_file == "/virtual/node1/var/run/ganeti/ganeti-kvmd.state"
    assert options.ssconf_dir == "/virtual/node1/var/lib/ganeti"
    assert options.log_file == "/elsewhere/log"


def test_paths_are_made_absolute(
    monkeypatch: pytest.MonkeyPatch, control_dir: Path
) -> None:
    monkeypatch.chdir(control_dir)
    options = kvmd_options.parse_arguments(["--pid-file", "p"])
    assert options.pid_file == f"{control_dir}/p"


DEFAULT_STATE_FILE = "/var/run/ganeti/ganeti-kvmd.state"


@pytest.mark.parametrize(
    ("arguments", "state_file"),
    [
        (["--pid-file=/run/a.pid"], "/run/a.state"),
        (["--pid-file=/run/a.lock"], "/run/a.lock.state"),
        (["--pid-file=/run/a.pid/b"], "/run/a.pid/b.state"),
        (["--pid-file=/run/a.pid", "--state-file=/run/b"], "/run/b"),
        (["--state-file=/run/b", "--pid-file=/run/a.pid"], "/run/b"),
        (
            ["--pid-file=/run/a.pid", f"--state-file={DEFAULT_STATE_FILE}"],
            DEFAULT_STATE_FILE,
        ),
        (["--debug"], DEFAULT_STATE_FILE),
    ],
    ids=str,
)
def test_the_journal_goes_with_the_pid_file_unless_it_is_given(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], state_file: str
) -> None:
    monkeypatch.delenv("GANETI_ROOTDIR", raising=False)
    options = kvmd_options.parse_arguments(arguments)
    assert options.state_file == state_file
    _, *again = options.command()[len(kvmd_options.own_command()) - 1 :]
    assert vars(kvmd_options.parse_arguments(again)) == vars(options)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--foreground", "--debug", "--syslog=only", "--no-user-checks"],
        ["--no-cluster-checks", "--control-dir=/c", "--log-file=/l", "--ssconf-dir=/s"],
        ["--socket-suffix=.qmp", "--rescan-interval=0.1"],
        ["--status"],
        ["--status=json", "--check"],
    ],
    ids=str,
)
def test_the_command_of_a_restart_has_the_options_and_no_others(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.delenv("GANETI_ROOTDIR", raising=False)
    options = kvmd_options.parse_arguments(arguments)
    command = options.command()
    own = kvmd_options.own_command()
    assert command[: len(own)] == own and len(command) == len(own) + len(arguments)
    assert vars(kvmd_options.parse_arguments(command[len(own) :])) == vars(options)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [([], ""), (["--status"], "text"), (["--status=json"], "json")],
    ids=str,
)
def test_status_is_text_unless_json_is_asked_for(
    arguments: list[str], status: str
) -> None:
    assert kvmd_options.parse_arguments(arguments).status == status


@pytest.mark.parametrize(
    "arguments",
    [
        "positional",
        "--nonsense",
        "--control=abbreviated",
        "--control-dir",
        "--syslog",
        "--syslog=maybe",
        "--status=xml",
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
