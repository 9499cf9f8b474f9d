"""The daemon is interrupted at each of its system calls, and goes on where it ended.

strace(1) sends the signal as the daemon enters the call: SIGKILL lets nothing of that
call be done. Under systemd nothing may be lost then: no verdict is
wrong, none is missing, and no shutdown file is made again after Ganeti has removed it.
Ganeti takes note of a file here when the journal has its verdict. A daemon that is
killed between the two makes the file again if Ganeti is so quick; and its line in the
log may be missing, but not the verdict in the journal.

`make soak` takes every call, `make check` a sample.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import SubprocessError
from typing import Any, NamedTuple

import pytest
from daemon import Daemon, control_directory
from deadline import wait_until
from fake_qemu import FakeQemu, event_line
from systemd import Service, Systemd
from variant import program_with

from kvmd_journal import read_journal

STRACE = shutil.which("strace")
#: Scenarios that run at the same time.
WORKERS = 3
#: How many of the calls are taken by `make check`, and of which it takes them.
SAMPLE = 16
CHANGING = {
    *("connect", "sendto", "sendmsg", "recvfrom", "shutdown", "execve", "exit_group"),
    *("mknod", "mknodat", "unlink", "unlinkat", "rename", "renameat", "write"),
}

POWERDOWN = event_line("POWERDOWN")
RESET = event_line("RESET")
BY_USER = event_line("SHUTDOWN", guest=True, reason="guest-shutdown")
BY_SIGNAL = event_line("SHUTDOWN", guest=False, reason="host-signal")

USER = "user guest-shutdown"
AFTER_POWERDOWN = "not-user guest-shutdown,powerdown-requested"
HOST_SIGNAL = "not-user host-signal"
CONNECTION_ENDED = "not-user connection-ended"
UNOBSERVED = "not-user unobserved"

PLAIN = [sys.executable, "-S", "-E"]
STARTED = " INFO started "
PID_FILE = "kvmd.pid"

# As on a node; the stand-in for systemd may take longer than systemd, and under strace
# a turn takes so long that SIGALRM would come, with a call of its own each time.
PATCH = """
kvmd_loop.STALL_LIMIT = kvmd_loop.NEXT_STALL_LIMIT = 1000
if "--debug" in sys.argv: sys.argv.remove("--debug")
kvmd.Notifier.ATTEMPTS = kvmd.Notifier.LATER_ATTEMPTS = 1000
"""


@pytest.fixture(autouse=True)
def _strace() -> None:
    """Skip what needs strace where it is missing, but not where it has to be there."""
    if STRACE is None:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("strace is not installed")


class Trace(NamedTuple):
    """What the daemon is started under: where strace writes, and what it injects."""

    output: str
    injection: str | None = None

    def interpreter(self) -> list[str]:
        """Return an interpreter that is traced; it is the process that was started."""
        injection = [f"--inject={self.injection}"] if self.injection else []
        return [
            *(str(STRACE), "-D", "-qq", "-o", self.output, *injection),
            *PLAIN,
        ]


class Node:
    """A daemon that may be interrupted, then is started again; and its guests."""

    def __init__(
        self, control_dir: Path, first: Daemon, second: Daemon, keeps: bool
    ) -> None:
        self.control_dir = control_dir
        self.first = first
        #: Whether connections outlive the daemon.
        self.keeps_connections = keeps
        self._second = second
        self._is_over = threading.Event()
        self._executor = ThreadPoolExecutor(1)
        self._life = self._executor.submit(self._live)

    def _live(self) -> bool:
        """Start again a daemon that was interrupted; tell whether it was."""
        with suppress(ChildProcessError):
            self.first.start()
        if self.first.wait_until_gone() == 0 and self._is_over.is_set():
            return False
        self._second.start()
        return True

    def stop(self) -> bool:
        """Stop the daemon; tell whether it was interrupted."""
        self._is_over.set()
        self.first.send_signal(signal.SIGTERM)
        was_interrupted = self._life.result()
        if was_interrupted:
            self._second.stop()
        assert "Traceback" not in self.first.stderr
        return was_interrupted

    def end(self) -> None:
        """End the daemon, whatever it does."""
        self._is_over.set()
        self.first.end()
        with suppress(Exception):
            self._life.result()
        self._second.end()
        self._executor.shutdown()

    # What the daemon knows.

    def record(self, qemu: FakeQemu) -> dict[str, Any] | None:
        """Return what the journal has of a guest."""
        record: dict[str, Any] | None = None
        with suppress(FileNotFoundError, ValueError):
            record = read_journal(str(self.first.state_file)).records.get(qemu.name)
        return record

    def verdict(self, qemu: FakeQemu) -> str | None:
        """Return the last verdict that was carried out, by the journal."""
        record = self.record(qemu)
        last = record and record.get("last")
        return f"{last['verdict']} {last['cause']}" if last and last["file"] else None

    def wait_for_verdict(self, qemu: FakeQemu, *allowed: str) -> None:
        """Wait until the journal has one of these verdicts."""
        wait_until(lambda: self.verdict(qemu) in allowed, f"{qemu.name}: {allowed}")

    def is_running(self, qemu: FakeQemu) -> bool:
        """Tell whether the journal has a connection to it, and that its guest runs."""
        record = self.record(qemu)
        if record is None or record["phase"] != "connected":
            return False
        guest = record["guest"]
        return "seen_alive" in guest and "ruling" not in guest

    def wait_until_gone(self, qemu: FakeQemu) -> None:
        """Wait until the journal has an instance as gone."""

        def is_gone() -> bool:
            record = self.record(qemu)
            return record is not None and record["phase"] == "gone"

        wait_until(is_gone, f"{qemu.name} is gone")

    # The guests.

    def negotiate(self, qemu: FakeQemu) -> None:
        """Negotiate, once more if it has to be, until the daemon has recorded it."""
        while not (qemu.has_client and self.is_running(qemu)):
            try:
                qemu.disconnect()
                qemu.negotiate()
                wait_until(
                    lambda: self.is_running(qemu) or qemu.client_has_left(),
                    "the record of a guest that runs",
                )
            except (EOFError, ConnectionError):
                continue

    def tell(self, qemu: FakeQemu, data: bytes) -> None:
        """Say something until the daemon has read it.

        What was read is not lost; what was said to a client that has left is.
        """
        self.negotiate(qemu)
        while not qemu.deliver(data):
            assert not self.keeps_connections
            self.negotiate(qemu)

    def tell_in_pieces(self, qemu: FakeQemu, data: bytes) -> None:
        """Say something in two pieces, where the connection outlives the daemon."""
        pieces = [data[:70], data[70:]] if self.keeps_connections else [data]
        for piece in pieces:
            self.tell(qemu, piece)


@contextmanager
def traced_node(trace: Trace, under_systemd: bool) -> Iterator[Node]:
    """Return a node on which the daemon is traced."""
    with ExitStack() as ending:
        control_dir = ending.enter_context(control_directory())
        program = program_with(control_dir.parent, PATCH)
        systemd = Systemd(control_dir.parent) if under_systemd else None
        if systemd is not None:
            ending.enter_context(systemd)

        def daemon(interpreter: list[str]) -> Daemon:
            options: dict[str, Any] = {"program": program, "interpreter": interpreter}
            if systemd is not None:
                return Service(systemd, control_dir, **options)
            return Daemon(control_dir, "--rescan-interval=0", **options)

        first, second = daemon(trace.interpreter()), daemon(PLAIN)
        node = Node(control_dir, first, second, under_systemd)
        ending.callback(node.end)
        yield node
        if systemd is not None:
            assert systemd.names == []


# What happens on a node. At the end no instance is left.
Scenario = Callable[[Node], None]


def lives(node: Node) -> None:
    """Have guests go down in several ways, and one come back."""
    first, second, third = (FakeQemu(node.control_dir, name) for name in "abc")
    with first, second, third, FakeQemu(node.control_dir, first.name) as successor:
        for qemu in (first, second, third):
            qemu.listen()
            node.negotiate(qemu)
        node.tell(first, POWERDOWN)
        node.tell(first, RESET)
        node.tell_in_pieces(second, POWERDOWN)
        node.tell_in_pieces(first, BY_USER)
        node.wait_for_verdict(first, USER)
        first.shutdown_file.unlink()  # as Ganeti does when it has taken note
        first.exit()
        node.tell(second, BY_USER)
        node.wait_for_verdict(second, AFTER_POWERDOWN)
        second.exit()
        third.crash()
        third.path.unlink()
        node.wait_for_verdict(third, CONNECTION_ENDED, UNOBSERVED)
        successor.listen()
        node.negotiate(successor)
        assert not successor.shutdown_file.exists()
        node.tell(successor, BY_SIGNAL)
        node.wait_for_verdict(successor, HOST_SIGNAL)
        successor.exit()
        for qemu in (first, second, third):
            node.wait_until_gone(qemu)
            assert not qemu.shutdown_file.exists()
    assert_logged(node, first, USER, HOST_SIGNAL)
    assert_logged(node, second, AFTER_POWERDOWN)
    assert_logged(node, third, CONNECTION_ENDED, UNOBSERVED)


def restart_in_place(node: Node) -> None:
    """Replace the program between the two pieces of a line."""
    with FakeQemu(node.control_dir, "a") as qemu:
        qemu.listen()
        node.negotiate(qemu)
        node.tell(qemu, POWERDOWN)
        node.tell(qemu, BY_USER[:70])
        node.first.send_signal(signal.SIGUSR2)
        wait_until(lambda: node.first.log.count(STARTED) > 1, "the second program")
        node.tell(qemu, BY_USER[70:])
        node.wait_for_verdict(qemu, AFTER_POWERDOWN)
        qemu.exit()
        node.wait_until_gone(qemu)
        assert not qemu.shutdown_file.exists()
    assert_logged(node, qemu, AFTER_POWERDOWN)


def assert_logged(node: Node, qemu: FakeQemu, *allowed: str) -> None:
    """See that each of these verdicts is in the log once at most, and no other."""
    log = node.first.log
    pattern = rf" INFO {re.escape(qemu.name)}: verdict=(\S+) cause=(\S+)"
    found = [" ".join(verdict) for verdict in re.findall(pattern, log)]
    assert len(found) == len(set(found)) and set(found) <= set(allowed), log
    assert " WARNING " not in log and " ERROR " not in log, log


def play(scenario: Scenario, trace: Trace, under_systemd: bool) -> bool:
    """Run a scenario; tell whether the daemon was interrupted."""
    with traced_node(trace, under_systemd) as node:
        scenario(node)
        return node.stop()


class Call(NamedTuple):
    """A system call: the n-th of its name in the process."""

    name: str
    number: int


def calls_of(scenario: Scenario, under_systemd: bool, output: Path) -> list[str]:
    """Return the system calls that the daemon does in a scenario, and its signals.

    Not those of a first run, which may leave bytecode behind.
    """
    for _ in range(2):
        assert not play(scenario, Trace(str(output)), under_systemd)
    return output.read_text(errors="replace").splitlines()


def calls_since(pattern: str, lines: list[str]) -> list[Call]:
    """Return the calls from the first line on that matches.

    Those between an exec and the daemon's own first call are the interpreter's, which
    has not changed anything yet: of them there are some.
    """
    counts: dict[str, int] = {}
    calls = []
    is_since = is_starting = False
    for number, line in enumerate(lines):
        is_since = is_since or re.search(pattern, line) is not None
        found = re.match(r"(\w+)\(", line)
        if found:
            name = found[1]
            counts[name] = counts.get(name, 0) + 1
            if is_since and not (is_starting and number % 30):
                calls.append(Call(name, counts[name]))
            is_starting = name == "execve" or (is_starting and PID_FILE not in line)
    return calls


def sample(calls: list[Call]) -> list[Call]:
    """Return some calls, evenly spread, of those that change something if there are."""
    calls = [call for call in calls if call.name in CHANGING] or calls
    return calls[:: max(1, len(calls) // SAMPLE)]


def interrupt(
    scenario: Scenario, under_systemd: bool, signal_name: str, calls: list[Call]
) -> None:
    """Run a scenario once for each of these calls, with an interruption there."""

    def interrupt_at(call: Call) -> bool | str:
        injection = f"{call.name}:signal={signal_name}:when={call.number}"
        try:
            return play(scenario, Trace(os.devnull, injection), under_systemd)
        except (AssertionError, OSError, EOFError, SubprocessError) as error:
            return f"{injection}: {error!r}"

    with ThreadPoolExecutor(WORKERS) as executor:
        results = list(executor.map(interrupt_at, calls))
    assert [result for result in results if isinstance(result, str)] == []
    # The busier the machine is, the fewer turns does the daemon do for the same work.
    assert results.count(True) > len(results) / 2


SOME_OR_ALL = [sample, pytest.param(list, marks=pytest.mark.soak)]
Choice = Callable[[list[Call]], list[Call]]


@pytest.mark.parametrize("choice", SOME_OR_ALL)
def test_killed_at_any_call_the_daemon_loses_no_verdict(
    tmp_path: Path, choice: Choice
) -> None:
    lines = calls_of(lives, True, tmp_path / "calls")
    calls = calls_since(rf"^openat\(.*{PID_FILE}", lines)
    interrupt(lives, True, "KILL", choice(calls))


@pytest.mark.parametrize("under_systemd", [True, False], ids=["systemd", "alone"])
@pytest.mark.parametrize("choice", SOME_OR_ALL)
def test_stopped_in_any_turn_the_daemon_loses_no_verdict(
    tmp_path: Path, choice: Choice, under_systemd: bool
) -> None:
    lines = calls_of(lives, under_systemd, tmp_path / "calls")
    calls = calls_since("", lines)
    turns = [call for call in calls if call.name in {"epoll_wait", "epoll_pwait"}]
    interrupt(lives, under_systemd, "TERM", choice(turns))


@pytest.mark.parametrize("choice", SOME_OR_ALL)
def test_killed_in_a_restart_in_place_the_daemon_loses_nothing(
    tmp_path: Path, choice: Choice
) -> None:
    lines = calls_of(restart_in_place, True, tmp_path / "calls")
    calls = calls_since("^--- SIGUSR2 ", lines)
    interrupt(restart_in_place, True, "KILL", choice(calls))
