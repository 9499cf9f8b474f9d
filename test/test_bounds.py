"""The bounds: floods, descriptors, inotify's limits, load; no growth, no spinning."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from crowd import Crowd
from daemon import INSTANCE, INTERPRETER, Daemon
from deadline import wait_until
from fake_qemu import FakeQemu, event_line
from namespace import (
    interpreter_after,
    interpreter_on_tmpfs,
    run_beside,
    seen_by,
)
from status import status_table
from variant import program_with

AS_ON_A_NODE = "sys.argv.remove('--debug')"


@pytest.fixture
def crowd(control_dir: Path) -> Iterator[Crowd]:
    """Return a crowd of no guests yet."""
    with Crowd(control_dir) as crowd:
        yield crowd


def status_number(pid: int, name: str) -> int:
    """Return a number of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{name}:\s*(\d+)", text, re.MULTILINE)
    assert found
    return int(found[1])


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def memory(daemon: Daemon) -> int:
    """Return what the daemon holds in memory, in KiB."""
    return status_number(daemon.pid, "VmRSS")


def delays(log: str) -> list[float]:
    """Return the milliseconds from each SHUTDOWN event to its shutdown file."""
    return [float(ms) for ms in re.findall(r" verdict=user .* after=([\d.]+)ms", log)]


# ---- Floods --------------------------------------------------------------------------

UNINTERESTING = event_line("RTC_CHANGE", offset=1)
FLOODS = {
    "events": UNINTERESTING,
    "events of interest": event_line("STOP") + event_line("RESUME"),
    "verdicts": event_line("SHUTDOWN", guest=True) + event_line("RESET"),
    "greetings": b'{"QMP": {}}\r\n',
    "garbage": b"\xff{]\n",
    "nesting": b"[" * 60000 + b'"event": "STOP"\n',
    "numbers": b"9" * 5000 + b' "event": "STOP"\n',
    "no newline": b"x" * 65536,
    "newlines": b"\r\n" * 30000,
    "event names": b'{"event" :\t"' * 5000,
    # A long read after nothing of interest, and every line of it has to be parsed.
    "changing": UNINTERESTING * 500 + b'vent":"STOP"\n' * 5000,
}


@contextmanager
def flooding(qemu: FakeQemu, words: bytes) -> Iterator[None]:
    """Have another process send the words over and over."""
    qemu.listen()
    qemu.negotiate()
    pid = os.fork()
    if pid == 0:
        try:
            for _ in itertools.count():
                qemu.send(words * (100000 // len(words) + 1))
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("words", FLOODS.values(), ids=FLOODS)
def test_a_flooding_instance_delays_no_other_ones_verdict(
    control_dir: Path, words: bytes
) -> None:
    program = program_with(control_dir.parent, AS_ON_A_NODE)
    interpreter = interpreter_on_tmpfs(control_dir, "size=1m")  # fast, as /run is
    names = [f"quiet{number}" for number in range(10)]
    with (
        Daemon(control_dir, program=program, interpreter=interpreter) as daemon,
        Crowd(seen_by(daemon, control_dir)) as crowd,
        FakeQemu(seen_by(daemon, control_dir), INSTANCE) as flooder,
    ):
        crowd.start(names)
        crowd.serve_until_connected(names)
        daemon.go_first()
        with flooding(flooder, words):
            daemon.wait_until_connected(INSTANCE)
            for name in names:
                crowd.power_off(name)
                daemon.wait_for_verdict(name)
        log = "\n".join(line for line in daemon.log.splitlines() if " quiet" in line)
        times = sorted(delays(log))
        assert len(times) == len(names)
        # The contract says 50 ms; a busy machine may hold the daemon up for longer.
        assert times[len(times) // 2] < 50
        assert memory(daemon) < 40 * 1024
        daemon.stop()


@contextmanager
def unread_connection() -> Iterator[socket.socket]:
    """Give a full TCP connection; its last close waits until it is read, for long."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    linger = struct.pack("ii", 1, 1000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.setblocking(False)
    with peer, connection:
        with suppress(BlockingIOError):
            while True:
                connection.send(b"x" * 65536)
        yield connection


@pytest.mark.parametrize("count", [1, 50])
def test_descriptors_that_are_slow_to_close_hold_nobody_up(
    daemon: Daemon, control_dir: Path, fake_qemu: FakeQemu, count: int
) -> None:
    with ExitStack() as ending:
        hostile = [
            ending.enter_context(FakeQemu(control_dir, f"hostile{number}"))
            for number in range(count)
        ]
        unread = [ending.enter_context(unread_connection()) for _ in hostile]
        for qemu in (fake_qemu, *hostile):
            qemu.listen()
            qemu.negotiate()
            daemon.wait_until_connected(qemu.name)
        with daemon.frozen():
            for qemu, connection in zip(hostile, unread):
                qemu.send_descriptor(UNINTERESTING, connection.fileno())
                connection.close()
            fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        daemon.wait_for_verdict(INSTANCE)
        # Some 60 ms; a busy machine may hold the daemon up for longer.
        assert delays(daemon.log)[0] < 500


def test_what_no_line_ends_takes_no_memory_and_costs_no_event(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    before = memory(daemon)
    for _ in range(64):
        fake_qemu.send(b"x" * 262144)
    fake_qemu.send(b"\r\n")
    fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    daemon.wait_for_log(f" {INSTANCE}: verdict=user ")
    assert memory(daemon) - before < 4096
    skipping = rf" WARNING {INSTANCE}: skipping .* \(a line of more than"
    assert len(re.findall(skipping, daemon.log)) == 1


# ---- Load ----------------------------------------------------------------------------


def end_all_at_once(daemon: Daemon, crowd: Crowd, count: int) -> None:
    names = [f"guest{number}" for number in range(count)]
    crowd.start(names)
    crowd.serve_until_connected(names)
    wait_until(lambda: daemon.log.count(": connected to ") == count, "all are greeted")
    for name in names:
        crowd.power_off(name)
    wait_until(
        lambda: all(crowd.shutdown_file(name).exists() for name in names),
        "all verdicts are given",
    )
    wait_until(lambda: not status_table(daemon), "all are gone")
    assert daemon.log.count(": verdict=user ") == count


def test_hundreds_of_instances_end_at_once_and_leave_nothing(
    daemon: Daemon, crowd: Crowd
) -> None:
    before = descriptors(daemon)
    end_all_at_once(daemon, crowd, 300)
    assert descriptors(daemon) == before
    assert max(delays(daemon.log)) < 5000


@pytest.mark.soak
def test_four_thousand_instances_end_at_once_and_leave_nothing(
    control_dir: Path,
) -> None:
    program = program_with(control_dir.parent, AS_ON_A_NODE)
    interpreter = interpreter_on_tmpfs(control_dir, "size=1m")
    with (
        Daemon(control_dir, program=program, interpreter=interpreter) as daemon,
        Crowd(seen_by(daemon, control_dir)) as crowd,
    ):
        before = descriptors(daemon)
        end_all_at_once(daemon, crowd, 4000)
        assert descriptors(daemon) == before
        assert max(delays(daemon.log)) < 5000
        assert memory(daemon) < 60 * 1024
        daemon.stop()


# ---- Exhaustion ----------------------------------------------------------------------

OUT_OF_DESCRIPTORS = " WARNING out of file descriptors: .*raise the daemon's limit"


def test_out_of_descriptors_the_rest_is_connected_as_they_come_free(
    control_dir: Path, crowd: Crowd
) -> None:
    names = {f"guest{number}" for number in range(64)}
    crowd.start(names)
    limited = ("prlimit", "--nofile=32:32", *INTERPRETER)
    ended: set[str] = set()
    with Daemon(control_dir, "--rescan-interval=0.5", interpreter=limited) as daemon:
        daemon.wait_for_log(OUT_OF_DESCRIPTORS)
        while ended != names:
            crowd.serve(lambda: bool(crowd.clients), "some are connected")
            for name in list(crowd.clients):
                crowd.power_off(name)
                ended.add(name)
                wait_until(crowd.shutdown_file(name).exists, f"the verdict on {name}")
        daemon.wait_for_log(" INFO out of file descriptors: it is over")
        assert len(re.findall(OUT_OF_DESCRIPTORS, daemon.log)) == 1
        assert " ERROR " not in daemon.log
        daemon.stop()


def test_the_descriptor_limit_is_raised_as_far_as_it_goes(control_dir: Path) -> None:
    interpreter = ("prlimit", "--nofile=32:640", *INTERPRETER)
    with Daemon(control_dir, interpreter=interpreter) as daemon:
        limits = Path(f"/proc/{daemon.pid}/limits").read_text()
        assert re.search(r"^Max open files +640 +640 ", limits, re.MULTILINE)
        daemon.stop()


NO_INOTIFY = r" WARNING inotify .*raise the sysctls.* fs\.inotify\.max_user_{}"
INOTIFY_AGAIN = r" INFO inotify .*: it is over"


def limit(what: str, number: int) -> str:
    """Return a shell command that sets one of the namespace's inotify limits."""
    return f"echo {number} > /proc/sys/user/max_inotify_{what}"


@pytest.mark.parametrize("what", ["instances", "watches"])
def test_without_inotify_it_looks_every_second_and_goes_back(
    control_dir: Path, fake_qemu: FakeQemu, what: str
) -> None:
    interpreter = interpreter_after(limit(what, 0))
    with (
        Daemon(control_dir, "--rescan-interval=0", interpreter=interpreter) as daemon,
        FakeQemu(control_dir, "later") as later,
    ):
        daemon.wait_for_log(NO_INOTIFY.format(what))
        fake_qemu.listen()
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE)
        assert status_table(daemon)
        assert f"watching {control_dir}, 1 instances" in daemon.log
        fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        assert " verdict=user " in daemon.wait_for_verdict(INSTANCE)
        run_beside(daemon, limit(what, 1000))
        daemon.wait_for_log(INOTIFY_AGAIN)
        later.listen()
        daemon.wait_for_log(" watch: later.kvmd")
        later.negotiate()
        daemon.wait_until_connected("later")
        assert len(re.findall(NO_INOTIFY.format(what), daemon.log)) == 1
        daemon.stop()


def test_watches_that_run_out_on_the_way_are_fallen_back_from(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    interpreter = interpreter_after(limit("watches", 1000))
    with Daemon(control_dir, "--rescan-interval=0", interpreter=interpreter) as daemon:
        run_beside(daemon, limit("watches", 0))
        control_dir.rename(control_dir.parent / "away")
        control_dir.mkdir()
        daemon.wait_for_log(NO_INOTIFY.format("watches"))
        fake_qemu.listen()
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE)
        run_beside(daemon, limit("watches", 1000))
        daemon.wait_for_log(INOTIFY_AGAIN)
        daemon.stop()


# ---- Idle ----------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [0, 1000])
def test_an_idle_daemon_sleeps(
    control_dir: Path, fake_qemu: FakeQemu, interval: int
) -> None:
    patch = "kvmd_context.PATIENCE = kvmd_monitor.PATIENCE = 0.2"
    program = program_with(control_dir.parent, patch)
    silent, dead = (FakeQemu(control_dir, name) for name in ("silent", "dead"))
    # All listen before the daemon starts: its patience with a bound socket is short.
    fake_qemu.listen()
    silent.listen()
    dead.bind()
    with (
        silent,
        dead,
        Daemon(control_dir, f"--rescan-interval={interval}", program=program) as daemon,
    ):
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE)
        wait_until(
            lambda: status_table(daemon).get("dead.kvmd") == "dead", "it is given up"
        )
        daemon.wait_for_log(" WARNING silent: no greeting")

        def wakes_up_within(seconds: float) -> bool:
            before = status_number(daemon.pid, "voluntary_ctxt_switches")
            time.sleep(seconds)  # not for anything to happen: for nothing to
            return status_number(daemon.pid, "voluntary_ctxt_switches") != before

        def is_asleep() -> bool:
            return "\nState:\tS" in Path(f"/proc/{daemon.pid}/status").read_text()

        # Kept from running, it doesn't wake up either, and has something left to do.
        wait_until(
            lambda: not wakes_up_within(0.1) and is_asleep(),
            "the end of what was begun",
        )
        # Of all that is done again and again, no interval is longer than a second.
        assert not wakes_up_within(2.5)
        daemon.stop()
