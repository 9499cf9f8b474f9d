"""`--status`: how the instances stand, told from the journal alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from daemon import INSTANCE, ROOT, Daemon
from deadline import SECONDS, wait_until
from fake_qemu import FakeQemu
from test_check import locked_by_another

import kvmd_status
from kvmd_context import Phase
from kvmd_journal import FORMAT, boot_id

GUEST = {"powerdown_requested": False, "stopped": False, "panicked": False}
MEMBERS = {
    *("instance", "state", "connected", "since", "socket", "qemu", "pid"),
    *("powerdown_requested", "powerdown_time", "last_verdict"),
}


def make_record(**changes: object) -> dict[str, Any]:
    """Return a record of an instance that runs, with changes."""
    record = {
        "instance": INSTANCE,
        "suffix": ".kvmd",
        "socket": [1, 2, 3],
        "phase": "connected",
        "since": time.monotonic(),
        "connection": 7,
        "qemu": "7.2.22",
        "pid": 42,
        "guest": {**GUEST, "ruling": None},
        "protocol": None,
        "last": None,
    }
    return {**record, **changes}


def judgement(verdict: str = "user", **changes: object) -> dict[str, Any]:
    """Return what a record has of the last verdict, with changes."""
    last = {"verdict": verdict, "cause": "guest-shutdown", "event": 1.25, "time": 2.0}
    return {**last, "file": "created", **changes}


class Node:
    """A node's pid file and its journal, as a daemon would leave them."""

    def __init__(self, directory: Path) -> None:
        self.pid_file = directory / "kvmd.pid"
        self.state_file = directory / "kvmd.state"

    def write(self, *records: dict[str, Any], end: str = "", **header: object) -> None:
        """Write the journal."""
        first = {
            "format": FORMAT,
            "boot": boot_id(),
            "control_dir": "/ctrl",
            "pid": 1,
            "version": "1.1.0",
            "started": time.monotonic() / 2,
            "discarded": [],
        }
        lines = [json.dumps(line) + "\n" for line in ({**first, **header}, *records)]
        self.state_file.write_text("".join(lines) + end)

    def report(self) -> dict[str, Any]:
        """Return what is to be told."""
        return kvmd_status.make_report(str(self.pid_file), str(self.state_file))

    def lines(self) -> list[str]:
        """Return the lines for a terminal."""
        return kvmd_status.describe(self.report())

    @contextmanager
    def daemon(self) -> Iterator[int]:
        """Have a process hold the lock; give its pid, and the journal to it."""
        with locked_by_another(self.pid_file) as process:
            yield process.pid


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """Return a node without a daemon or a journal."""
    return Node(tmp_path)


def test_a_running_daemon_and_its_instance(node: Node) -> None:
    with node.daemon() as pid:
        node.write(make_record(), pid=pid)
        report = node.report()
    assert report["problem"] is None
    assert (report["running"], report["current"], report["pid"]) == (True, True, pid)
    assert (report["version"], report["control_dir"]) == ("1.1.0", "/ctrl")
    assert abs(report["started"] - (time.time() - time.monotonic() / 2)) < 10
    assert abs(report["written"] - time.time()) < 10
    [entry] = report["instances"]
    assert abs(entry.pop("since") - time.time()) < 10
    assert entry == {
        "instance": INSTANCE,
        "state": "running",
        "connected": True,
        "socket": f"/ctrl/{INSTANCE}.kvmd",
        "qemu": "7.2.22",
        "pid": 42,
        "powerdown_requested": False,
        "powerdown_time": None,
        "last_verdict": None,
    }


def guest(**changes: object) -> dict[str, Any]:
    """Return what a record has of the guest, with changes."""
    return {"guest": {**GUEST, "ruling": None, **changes}}


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "running"),
        (guest(stopped=True), "paused"),
        (guest(panicked=True), "panicked"),
        (guest(panicked=True, stopped=True), "panicked"),
        (guest(ruling=["user", "guest-shutdown"]), "shut down by user"),
        (guest(ruling=["not-user", "host-signal"]), "ended"),
        ({"phase": "ended", **guest(ruling=["user", "guest"])}, "shut down by user"),
        ({"phase": "ended", **guest(ruling=["not-user", "x"])}, "ended"),
        ({"phase": "ended"}, "ended"),
        ({"phase": "connecting"}, "connecting"),
        ({"phase": "connecting", **guest(ruling=["user", "guest"])}, "connecting"),
        ({"phase": "not greeted"}, "no answer"),
        ({"phase": "dead", **guest(stopped=True)}, "dead socket"),
        ({"phase": "gone", "last": None}, "gone"),
        ({"phase": "gone", "last": judgement("not-user")}, "gone"),
        ({"phase": "gone", "last": judgement("user")}, "shut down by user"),
        ({"phase": "of a later version"}, "unknown"),
        ({"phase": ["malformed"]}, "unknown"),
        ({"phase": None, "guest": 7, "last": "?"}, "unknown"),
    ],
)
def test_states(node: Node, changes: dict[str, Any], state: str) -> None:
    node.write(make_record(**changes))
    [entry] = node.report()["instances"]
    assert entry["state"] == state
    assert entry["connected"] == (changes.get("phase", "connected") == "connected")


@pytest.mark.parametrize("phase", Phase)
def test_each_phase_of_a_monitor_has_a_state(node: Node, phase: Phase) -> None:
    node.write(make_record(phase=phase.value))
    [entry] = node.report()["instances"]
    assert entry["state"] != "unknown"


def test_what_is_gone_has_its_last_verdict_alone(node: Node) -> None:
    gone = {"instance": "b", "phase": "gone", "since": 1.0, "last": judgement()}
    node.write(make_record(), gone)
    entry, _ = node.report()["instances"]
    assert entry["instance"] == "b"
    assert entry["last_verdict"] == judgement()
    assert all(entry[name] is None for name in ("socket", "qemu", "pid"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"powerdown_requested": True, "powerdown_time": 5.5}, (True, 5.5)),
        ({"powerdown_requested": True, "powerdown_time": None}, (True, None)),
        ({"powerdown_requested": False, "powerdown_time": 5.5}, (False, None)),
        ({"powerdown_requested": True, "powerdown_time": "yesterday"}, (True, None)),
        ({"powerdown_requested": True, "powerdown_time": 10**400}, (True, None)),
        ({"powerdown_requested": True, "powerdown_time": float("nan")}, (True, None)),
        ({"powerdown_requested": True, "powerdown_time": -1}, (True, None)),
    ],
)
def test_the_power_button(
    node: Node, changes: dict[str, Any], expected: tuple[bool, float | None]
) -> None:
    node.write(make_record(**guest(**changes)))
    [entry] = node.report()["instances"]
    assert (entry["powerdown_requested"], entry["powerdown_time"]) == expected


def test_the_journal_of_a_daemon_that_is_gone_is_told_as_old(node: Node) -> None:
    node.write(make_record())
    os.utime(node.state_file, (1000, 1000))
    report = node.report()
    assert (report["running"], report["current"], report["pid"]) == (False, False, None)
    assert report["written"] == 1000
    assert len(report["instances"]) == 1
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1000))
    assert node.lines()[0] == f"no daemon runs; this is how kvmd 1.1.0 left it, {when}"


def test_the_journal_of_another_daemon_than_runs_is_told_as_old(node: Node) -> None:
    with node.daemon() as pid:
        node.write(make_record(), pid=pid + 1)
        report = node.report()
        first = node.lines()[0]
    assert (report["running"], report["current"]) == (True, False)
    assert first.startswith(f"a daemon runs, pid {pid}, that keeps no journal here;")


@pytest.mark.parametrize("header", [{"boot": "another"}, {"format": FORMAT + 1}])
def test_a_journal_that_means_nothing_is_told_of(
    node: Node, header: dict[str, Any]
) -> None:
    node.write(make_record(), **header)
    with node.daemon() as pid:
        report = node.report()
    assert (report["pid"], report["instances"]) == (pid, [])
    assert report["problem"].startswith(f"{node.state_file}: ")


def test_without_a_journal_there_is_a_line(node: Node) -> None:
    first, second = node.lines()
    assert first == "no daemon runs"
    assert second == f"{node.state_file}: No such file or directory"


def test_a_line_that_is_being_written_is_passed_over(node: Node) -> None:
    node.write(make_record(), end='{"instance": "b", "phase": "conn')
    report = node.report()
    assert [entry["instance"] for entry in report["instances"]] == [INSTANCE]
    assert report["problem"] is None


def test_a_bad_line_costs_its_instance_and_is_told_of(node: Node) -> None:
    node.write(make_record(), end="bad\n")
    report = node.report()
    assert [entry["instance"] for entry in report["instances"]] == [INSTANCE]
    assert report["problem"].startswith(f"{node.state_file}: ")


@pytest.mark.parametrize("name", ["guest", "last", "since", "suffix", "qemu", "phase"])
def test_what_is_missing_of_a_record_costs_nothing_else(node: Node, name: str) -> None:
    record = make_record()
    del record[name]
    node.write(record)
    [entry] = node.report()["instances"]
    assert entry.keys() == MEMBERS
    assert len(node.lines()) == 4


def test_a_table_for_a_terminal(node: Node) -> None:
    last = judgement(time=2000.0)
    pressed = guest(powerdown_requested=True, powerdown_time=3000.0)
    node.write(
        make_record(instance="b", last=last, pid=12345, since=time.monotonic() - 10),
        make_record(instance="a-long-name", phase="not greeted", qemu=None, **pressed),
        {"instance": "c", "phase": "gone", "since": 1, "last": {**last, "file": None}},
    )
    _, empty, header, *rows = node.lines()
    assert empty == ""
    columns = [header.index(name) for name in kvmd_status.HEADER]
    cells = [
        [row[start:end].rstrip() for start, end in zip(columns, [*columns[1:], None])]
        for row in rows
    ]

    def at(seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

    for row in cells:
        since = time.mktime(time.strptime(row.pop(4), "%Y-%m-%d %H:%M:%S"))
        assert since < time.time()
    verdict = f"user, guest-shutdown, {at(2000)}"
    late = f"{verdict}, shutdown file not written yet"
    assert cells == [
        ["a-long-name", "no answer", "-", "42", at(3000), "-"],
        ["b", "running", "7.2.22", "12345", "-", verdict],
        ["c", "shut down by user", "-", "-", "-", late],
    ]


def test_no_name_forges_a_line(node: Node) -> None:
    names = ["a\nb", "\x1b[2J", "\udcff"]
    records = [make_record(instance=name) for name in names]
    node.write(*records, end="bad\n", version="1\n2")
    node.state_file = node.state_file.rename(node.state_file.with_name("a\nb"))
    lines = node.lines()
    assert len(lines) == 4 + len(names)
    assert all(line.isprintable() for line in lines)


def run_status(node: Node, *options: str, **popen: Any) -> subprocess.Popen[str]:
    """Start `--status` on a node."""
    return subprocess.Popen(
        [
            *(sys.executable, "-X", "dev", "-W", "error", str(ROOT / "kvmd.py")),
            *(f"--pid-file={node.pid_file}", f"--state-file={node.state_file}"),
            *options,
        ],
        stderr=subprocess.PIPE,
        text=True,
        **{"stdout": subprocess.PIPE, **popen},
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit status and the output of a process that has no complaint."""
    with process:
        output, complaint = process.communicate(timeout=SECONDS)
    assert complaint == ""
    return process.returncode, output


@pytest.mark.parametrize("option", ["--status", "--status=text", "--status=json"])
def test_the_exit_status_tells_whether_a_daemon_runs(node: Node, option: str) -> None:
    node.write(make_record())
    assert outcome(run_status(node, option))[0] == 1
    with node.daemon():
        assert outcome(run_status(node, option))[0] == 0


def test_json_is_one_line_of_the_same(node: Node) -> None:
    node.write(make_record(instance="\udcff"))
    _, output = outcome(run_status(node, "--status=json"))
    assert output.isascii() and output.count("\n") == 1
    report = json.loads(output)
    report["instances"][0].pop("since")
    expected = node.report()
    expected["instances"][0].pop("since")
    assert {**report, "started": 0} == {**expected, "started": 0}


@pytest.mark.parametrize("option", ["--status", "--status=json"])
def test_nobody_has_to_read_the_status(node: Node, option: str) -> None:
    node.write(*(make_record(instance=f"web{number}") for number in range(1000)))
    reader, writer = os.pipe()
    os.close(reader)
    process = run_status(node, option, stdout=writer)
    os.close(writer)
    assert outcome(process)[0] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
@pytest.mark.parametrize("option", ["--status", "--status=json"])
def test_another_user_is_told_that_he_may_not_see(
    control_dir: Path, option: str
) -> None:
    node = Node(control_dir)
    node.write(make_record())
    for directory in (control_dir.parent, control_dir):
        directory.chmod(0o755)
    node.state_file.chmod(0o600)
    with node.daemon():
        node.pid_file.chmod(0o600)
        program = (
            "import kvmd_options, kvmd_status, os, sys;"
            " options = kvmd_options.parse_arguments(sys.argv[1:]);"
            " os.setgid(65534); os.setuid(65534);"
            " sys.exit(kvmd_status.status(options))"
        )
        paths = (f"--pid-file={node.pid_file}", f"--state-file={node.state_file}")
        process = subprocess.Popen(
            [sys.executable, "-c", program, option, *paths],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        status, output = outcome(process)
    assert status == 1
    assert f"{node.pid_file}: Permission denied" in output


def test_a_real_daemon(daemon: Daemon, fake_qemu: FakeQemu) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    node = Node(daemon.pid_file.parent)

    def entry() -> dict[str, Any]:
        report = node.report()
        assert report["current"] and report["pid"] == daemon.pid
        entries: list[dict[str, Any]] = report["instances"]
        return entries[0]

    wait_until(lambda: entry()["state"] == "running", "it is told as running")
    assert (entry()["pid"], entry()["qemu"]) == (os.getpid(), "7.2.22")
    fake_qemu.event("POWERDOWN")
    wait_until(lambda: entry()["powerdown_requested"], "it is told as pressed")
    fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    last = wait_until(lambda: entry()["last_verdict"], "the verdict is told")
    assert (last["verdict"], last["file"]) == ("not-user", "none")
    fake_qemu.exit()
    wait_until(lambda: entry()["state"] == "gone", "it is told as gone")
