"""Many instances at once: what one costs, or a status of all, holds up no other one."""

from __future__ import annotations

import collections
import fcntl
import itertools
import os
import re
import signal
import socket
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from crowd import Crowd
from daemon import Daemon as DaemonProcess
from daemon import control_directory
from deadline import wait_until
from systemd import Service, Systemd
from variant import program_with

from kvmd_connection import FILL_TIME, TOKEN_INTERVAL
from kvmd_context import MonitorContext
from kvmd_daemon import STATUS_LINES_PER_TURN, TIMERS_PER_TURN, Daemon
from kvmd_instances import Instances
from kvmd_loop import Loop
from kvmd_qmp import LINE_LIMIT
from kvmd_restart import Restart
from kvmd_systemd import Notifier

# Keeps the daemon in the first turn that logs lines of the status, from the making of
# one file until there is another.
HELD = """
import os, time
describe = kvmd_daemon.describe
def held(record):
    open({held!r}, "w").close()
    while not os.path.exists({go!r}):
        time.sleep(0.001)
    return describe(record)
kvmd_daemon.describe = held
"""
AS_ON_A_NODE = "sys.argv.remove('--debug')"
# Has the journal keep all that is written.
UNABRIDGED = f"{AS_ON_A_NODE}\nkvmd_journal.SLACK = 1 << 40"
# Has the daemon count its calls of functions, and tell how many they were at SIGHUP.
COUNTED = f"""{AS_ON_A_NODE}
calls = 0
def count(_frame, what, _argument):
    global calls
    calls += what.endswith("call")
kvmd_log.Log.reopen = lambda log: log.info(f"calls: {{calls}}")
sys.setprofile(count)
"""
# Seconds in which a peer pays for a byte that begins a line, and has to be recorded.
INTERVAL_OF_A_BYTE = 2 * TOKEN_INTERVAL


@pytest.fixture
def crowd(control_dir: Path) -> Iterator[Crowd]:
    """Return a crowd of no guests yet."""
    with Crowd(control_dir) as crowd:
        yield crowd


@contextmanager
def started_by_systemd(control_dir: Path, patch: str) -> Iterator[DaemonProcess]:
    """Give a daemon with changes, under systemd; it has to stop cleanly."""
    program = program_with(control_dir.parent, patch)
    with (
        Systemd(control_dir.parent, store_max=1000) as systemd,
        Service(systemd, control_dir, program=program) as service,
    ):
        yield service
        service.stop()


# ---- A status of all -----------------------------------------------------------------


def test_a_status_of_many_instances_holds_up_no_verdict(
    control_dir: Path, crowd: Crowd
) -> None:
    held, go = control_dir.parent / "held", control_dir.parent / "go"
    patch = HELD.format(held=str(held), go=str(go))
    names = [f"guest{number:03}" for number in range(300)]
    with DaemonProcess(
        control_dir, program=program_with(control_dir.parent, patch)
    ) as daemon:
        crowd.start(names)
        crowd.serve_until_connected(names)
        wait_until(lambda: daemon.log.count(": connected to ") == 300, "all greeted")
        daemon.send_signal(signal.SIGUSR1)
        wait_until(held.exists, "the first line of the status")
        crowd.power_off(names[-1])
        go.touch()
        daemon.wait_for_log(rf" INFO status: {names[-2]}")
        before, _, after = daemon.log.partition(f" {names[-1]}: verdict=user ")
        lines = [text.count(" INFO status: guest") for text in (before, after)]
        assert lines[0] <= STATUS_LINES_PER_TURN
        assert lines[1] > 0
        daemon.stop()


# ---- Each beside many others ---------------------------------------------------------


def count_calls(daemon: DaemonProcess) -> int:
    """Return how many functions the daemon has called so far."""
    times = daemon.log.count(" INFO calls: ") + 1
    daemon.send_signal(signal.SIGHUP)
    return int(daemon.wait_for_log(r" INFO calls: (\d+)", times)[1])


def cost_of_lives(control_dir: Path, others: int) -> int:
    """Return how many calls the lives of some guests take beside others that run."""
    names = [f"other{number}" for number in range(others)]
    with (
        started_by_systemd(control_dir, COUNTED) as service,
        Crowd(control_dir) as crowd,
    ):
        crowd.start(names)
        crowd.serve_until_connected(names)
        for name in names:
            service.wait_until_connected(name)
        before = count_calls(service)
        for number in range(20):
            name = f"guest{number}"
            crowd.start([name])
            crowd.serve_until_connected([name])
            crowd.power_off(name)
            service.wait_for_verdict(name)
        return count_calls(service) - before


def test_a_life_costs_the_same_however_many_others_there_are() -> None:
    costs = []
    for others in (1, 300):
        with control_directory() as path:
            costs.append(cost_of_lives(path, others))
    assert costs[1] < 1.5 * costs[0]


# ---- Peers that cost -----------------------------------------------------------------


class Overdue(Loop):
    """A loop in which more timers are due than can be served, for some turns."""

    def __init__(self) -> None:
        super().__init__()
        self.due: float | None = None
        self.served: list[int] = []
        self.end: Callable[[], None]

    def wait(self, deadline: float) -> list[object]:
        if len(self.served) == 3:
            self.end()
        self.served.append(0)
        return []

    def expired(self) -> Iterator[Overdue]:
        return itertools.repeat(self, 1000)

    def serve(self, _owner: object, _step: object) -> None:
        self.served[-1] += 1


def test_a_turn_brings_few_of_those_back_that_were_left_alone(
    context: MonitorContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context.loop = loop = Overdue()
    instances = Instances(context, (".kvmd",), 0)
    monkeypatch.setattr(instances, "perform", loop.serve)
    daemon = Daemon(
        context,
        Notifier({}),
        str(tmp_path / "state"),
        instances,
        Restart([], context.log),
    )
    loop.end = daemon.stop
    daemon.run()
    assert set(loop.served) == {TIMERS_PER_TURN}


@contextmanager
def in_another_process(work: Callable[[], None]) -> Iterator[None]:
    """Have another process work for as long as this one does what is inside."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def most_records(service: DaemonProcess) -> int:
    """Return how many records the journal has of the instance that has most of them."""
    names = re.findall(rb'(?m)^{"instance": "(\w+)"', service.state_file.read_bytes())
    return max(collections.Counter(names).values(), default=0)


def test_peers_that_trickle_bytes_are_recorded_a_few_times_a_second(
    control_dir: Path, crowd: Crowd
) -> None:
    names = [f"trickler{number:02}" for number in range(40)]
    at_once = FILL_TIME / INTERVAL_OF_A_BYTE

    def trickle() -> None:
        while True:
            for name in names:
                with suppress(BlockingIOError):
                    crowd.clients[name].send(b"{")

    with started_by_systemd(control_dir, UNABRIDGED) as service:
        start = time.monotonic()
        crowd.start([*names, "victim"])
        crowd.serve_until_connected([*names, "victim"])
        with in_another_process(trickle):
            wait_until(lambda: most_records(service) > at_once + 4, "many records")
            crowd.power_off("victim")
            service.wait_for_verdict("victim")
        most = most_records(service)
        assert most <= at_once + (time.monotonic() - start) / INTERVAL_OF_A_BYTE + 4


def test_what_peers_leave_unfinished_takes_a_few_times_the_room_that_it_needs(
    control_dir: Path, crowd: Crowd
) -> None:
    names = [f"parker{number:02}" for number in range(100)]
    with started_by_systemd(control_dir, AS_ON_A_NODE) as service:
        crowd.start(names)
        crowd.serve_until_connected(names)
        for name in names:
            service.wait_until_connected(name)
        before = peak_of_memory(service)
        for name in names:
            crowd.clients[name].setblocking(True)
            crowd.clients[name].sendall(b"\xff" * (LINE_LIMIT - 1))
        wait_until(lambda: all(map(is_read, crowd.clients.values())), "all is read")
        assert peak_of_memory(service) - before < 3 * len(names) * LINE_LIMIT // 1024
        assert service.state_file.stat().st_size < 4 * len(names) * LINE_LIMIT


def peak_of_memory(daemon: DaemonProcess) -> int:
    """Return the most that the daemon has had in memory so far, in KiB."""
    text = Path(f"/proc/{daemon.pid}/status").read_text()
    found = re.search(r"^VmHWM:\s*(\d+)", text, re.MULTILINE)
    assert found
    return int(found[1])


def is_read(client: socket.socket) -> bool:
    """Tell whether all that was sent to a client has been read."""
    unread = bytearray(4)
    fcntl.ioctl(client, termios.TIOCOUTQ, unread)
    return not any(unread)
