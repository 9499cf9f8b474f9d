"""The daemon is killed under systemd, and the next one goes on where it ended."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from daemon import INSTANCE, Daemon
from deadline import wait_until
from fake_qemu import FakeQemu, event_line
from status import status_table
from systemd import Service, Systemd, full_notify_socket, take_descriptors
from variant import program_with

from kvmd_journal import read_journal
from kvmd_qmp import LINE_LIMIT

RESET = event_line("RESET")
POWERDOWN = event_line("POWERDOWN")
STOP = event_line("STOP")
RESUME = event_line("RESUME")
PANIC = event_line("GUEST_PANICKED", action="pause")
NOISE = event_line("VNC_CONNECTED", server={}, client={})
USER_SHUTDOWN = event_line("SHUTDOWN", guest=True, reason="guest-shutdown")

# Verdicts with their causes.
USER = "user guest-shutdown"
AFTER_POWERDOWN = "not-user guest-shutdown,powerdown-requested"
RUNNING = "running running"


class Way(NamedTuple):
    """A way in which a guest goes down, and what is to be said of it."""

    events: list[bytes]
    verdict: str


WAYS = [
    Way([USER_SHUTDOWN], USER),
    Way([RESET, USER_SHUTDOWN], USER),
    Way([POWERDOWN, RESET, USER_SHUTDOWN], USER),
    Way([STOP, RESUME, event_line("SHUTDOWN")], "user no-data"),
    Way([POWERDOWN, USER_SHUTDOWN], AFTER_POWERDOWN),
    Way([STOP, event_line("SHUTDOWN")], "not-user no-data,stopped"),
    Way([PANIC, event_line("SHUTDOWN", guest=True)], "not-user guest,panicked"),
    Way([], "not-user connection-ended"),
    *(
        Way([event_line("SHUTDOWN", guest=False, reason=reason)], f"not-user {reason}")
        for reason in ("host-signal", "host-qmp-quit", "guest-panic", "guest-reset")
    ),
]

# Makes the daemon kill itself at a call, from the moment on at which a certain thing
# was read. What was told to systemd before was told.
SUICIDE = """
import os

def arm_when(thing):
    receive = kvmd_qmp.Protocol.receive
    def armed(protocol, data):
        global is_armed
        is_armed |= thing in data
        return receive(protocol, data)
    kvmd_qmp.Protocol.receive = armed

def die(when, owner, name):
    call = getattr(owner, name)
    def deadly(*arguments):
        if is_armed and when == "before":
            os.kill(os.getpid(), 9)
        result = call(*arguments)
        if is_armed:
            os.kill(os.getpid(), 9)
        return result
    setattr(owner, name, deadly)

is_armed = False
"""
AROUND_THE_FILE = [
    'die("before", kvmd_shutdown_file.ShutdownFiles, "carry_out")',
    'die("after", kvmd_shutdown_file.ShutdownFiles, "carry_out")',
]
BEFORE_THE_RECORD_IS_WRITTEN = ['die("before", kvmd_journal.Journal, "write")']
SINCE_THE_RECORD_IS_WRITTEN = [
    'die("after", kvmd_journal.Journal, "write")',
    'die("before", kvmd_connection.Connection, "consume")',
    'die("after", kvmd_connection.Connection, "consume")',
]
AROUND_THE_RECORD = BEFORE_THE_RECORD_IS_WRITTEN + SINCE_THE_RECORD_IS_WRITTEN
AT_THE_END = [
    'die("before", kvmd_systemd.DescriptorStore, "close")',
    'die("after", kvmd_systemd.DescriptorStore, "close")',
]

StartDeadly = Callable[[bytes, str], Service]


@pytest.fixture
def systemd(control_dir: Path) -> Iterator[Systemd]:
    """Return a service manager with an empty store."""
    with Systemd(control_dir.parent) as systemd:
        yield systemd


@pytest.fixture
def service(systemd: Systemd, control_dir: Path) -> Iterator[Service]:
    """Return the daemon, not started yet; once started, it has to stop cleanly."""
    service = Service(systemd, control_dir)
    try:
        yield service
        service.stop()
    finally:
        service.end()


@pytest.fixture
def start_deadly(systemd: Systemd, control_dir: Path) -> Iterator[StartDeadly]:
    """Return a function that starts a daemon that is going to kill itself.

    It takes what has to be read before, and the call at which it happens then.
    """
    with ExitStack() as ending:

        def start(thing: bytes, moment: str) -> Service:
            patch = f"{SUICIDE}\narm_when({thing!r})\n{moment}"
            program = program_with(control_dir.parent, patch)
            service = Service(
                systemd, control_dir, program=program, interpreter=[sys.executable]
            )
            ending.enter_context(service)
            return service

        yield start


def records(service: Daemon) -> dict[str, dict[str, Any]]:
    """Return what the journal has of each instance."""
    try:
        contents = read_journal(str(service.state_file))
    except FileNotFoundError:
        return {}  # the daemon has not begun it yet
    found: dict[str, dict[str, Any]] = contents.records
    return found


def is_recorded(service: Daemon, instance: str) -> bool:
    """Tell whether a daemon that starts now would know that the guest runs."""
    record = records(service).get(instance)
    return record is not None and "seen_alive" in record["guest"]


def negotiate(qemu: FakeQemu, service: Daemon) -> None:
    """Take the daemon through all that comes before the events."""
    qemu.listen()
    qemu.negotiate()
    wait_until(lambda: is_recorded(service, qemu.name), "the record of a guest")


def crash(service: Daemon) -> None:
    """Kill the daemon, and start it again."""
    service.end()
    service.start()


def wait_for_suicide(service: Daemon) -> None:
    """Wait for the end of a daemon that kills itself."""
    assert service.wait_until_gone() == -signal.SIGKILL


def wait_until_forgotten(service: Service) -> None:
    """Wait until the daemon has no more to say of any instance."""
    wait_until(lambda: not status_table(service), "the instance to be forgotten")


def last_verdict(service: Daemon, instance: str = INSTANCE) -> str:
    """Return the last verdict in the journal: its line in the log may be lost."""
    last = records(service)[instance]["last"]
    return f"{last['verdict']} {last['cause']}"


def known_verdicts(service: Daemon, instance: str) -> set[str]:
    """Return the verdicts on an instance in the log, or else in the journal."""
    in_log = set(verdicts(service, instance))
    record = records(service).get(instance)
    is_judged = record is not None and "last" in record
    return in_log or ({last_verdict(service, instance)} if is_judged else set())


def verdicts(service: Daemon, instance: str = INSTANCE) -> list[str]:
    """Return all verdicts on the instance so far, each with its cause."""
    pattern = rf" INFO {re.escape(instance)}: verdict=(\S+) cause=(\S+)"
    return [" ".join(found) for found in re.findall(pattern, service.log)]


@pytest.mark.parametrize(
    "moment",
    [
        *AROUND_THE_FILE,
        *BEFORE_THE_RECORD_IS_WRITTEN,
        *SINCE_THE_RECORD_IS_WRITTEN,
        *AT_THE_END,
    ],
)
def test_a_crash_at_the_shutdown_loses_no_verdict(
    start_deadly: StartDeadly,
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    moment: str,
) -> None:
    deadly = start_deadly(b"SHUTDOWN", moment)
    negotiate(fake_qemu, service)
    fake_qemu.send(USER_SHUTDOWN)
    fake_qemu.exit()
    wait_for_suicide(deadly)
    service.start()
    wait_until_forgotten(service)
    assert fake_qemu.shutdown_file.exists()
    assert last_verdict(service) == USER


@pytest.mark.parametrize("moment", SINCE_THE_RECORD_IS_WRITTEN + AT_THE_END)
def test_a_verdict_that_is_kept_is_not_written_again(
    start_deadly: StartDeadly,
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    moment: str,
) -> None:
    deadly = start_deadly(b"SHUTDOWN", moment)
    negotiate(fake_qemu, service)
    # In one read: seen again from the beginning, it would be a shutdown withdrawn.
    fake_qemu.send(RESET + USER_SHUTDOWN)
    fake_qemu.exit()
    wait_for_suicide(deadly)
    fake_qemu.shutdown_file.unlink()  # as Ganeti does when it has taken note
    service.start()
    wait_until_forgotten(service)
    assert last_verdict(service) == USER
    assert not fake_qemu.shutdown_file.exists()


@pytest.mark.parametrize("moment", AROUND_THE_RECORD)
def test_a_crash_at_a_powerdown_leaves_it_known(
    start_deadly: StartDeadly,
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    moment: str,
) -> None:
    deadly = start_deadly(b"POWERDOWN", moment)
    negotiate(fake_qemu, service)
    fake_qemu.send(POWERDOWN)
    wait_for_suicide(deadly)
    service.start()
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [AFTER_POWERDOWN]


@pytest.mark.parametrize("moment", AROUND_THE_RECORD)
def test_a_crash_in_the_midst_of_a_line_leaves_it_whole(
    start_deadly: StartDeadly,
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    moment: str,
) -> None:
    deadly = start_deadly(b"microseconds", moment)
    negotiate(fake_qemu, service)
    fake_qemu.send(USER_SHUTDOWN[:70])
    wait_for_suicide(deadly)
    service.start()
    fake_qemu.send(USER_SHUTDOWN[70:])
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [USER]


@pytest.mark.parametrize(
    ("beginning", "end"),
    [
        (b'{"event": "VNC_CONN', b'ECTED"}\r\n'),
        (b"x" * (LINE_LIMIT + 1), b"\r\n"),
    ],
    ids=["of no interest", "overlong"],
)
def test_a_line_that_had_ended_before_the_crash_is_not_gone_on_with(
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    beginning: bytes,
    end: bytes,
) -> None:
    service.start()
    negotiate(fake_qemu, service)
    for piece in (beginning, end):
        fake_qemu.send(piece)
        fake_qemu.wait_until_read()
    crash(service)
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [USER]


@pytest.mark.parametrize(
    ("events", "verdict"),
    [
        ([USER_SHUTDOWN], USER),
        ([POWERDOWN, USER_SHUTDOWN], AFTER_POWERDOWN),
        (
            [event_line("SHUTDOWN", guest=False, reason="host-signal")],
            "not-user host-signal",
        ),
        ([], "not-user connection-ended"),
    ],
    ids=["user", "powerdown", "signal", "crash"],
)
def test_a_guest_that_went_down_meanwhile_is_judged(
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    events: list[bytes],
    verdict: str,
) -> None:
    service.start()
    negotiate(fake_qemu, service)
    service.end()
    for event in events:
        fake_qemu.send(event)
    fake_qemu.exit()
    service.start()
    wait_until_forgotten(service)
    assert verdicts(service) == [verdict]
    assert fake_qemu.shutdown_file.exists() == (verdict == USER)


def test_a_guest_that_went_down_and_up_meanwhile_has_no_shutdown_file(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, service)
    service.end()
    fake_qemu.send(USER_SHUTDOWN)
    fake_qemu.exit()
    fake_qemu.listen()
    service.start()
    fake_qemu.negotiate()
    service.wait_until_connected(INSTANCE, 2)
    assert verdicts(service) == [USER]
    assert not fake_qemu.shutdown_file.exists()


def test_a_file_that_could_not_be_made_before_the_crash_is_made_after_it(
    service: Service, systemd: Systemd, control_dir: Path, fake_qemu: FakeQemu
) -> None:
    program = program_with(
        control_dir.parent,
        "def full(*_): raise OSError(28, 'No space left on device')\n"
        "kvmd_shutdown_file.os.mknod = full\n",
    )
    with Service(systemd, control_dir, program=program) as unlucky:
        negotiate(fake_qemu, service)
        fake_qemu.send(USER_SHUTDOWN)
        fake_qemu.wait_until_read()
        fake_qemu.exit()
        unlucky.wait_for_log(" ERROR .*No space left on device")
    service.start()
    wait_until_forgotten(service)
    assert verdicts(service) == [USER]
    assert fake_qemu.shutdown_file.exists()


def stop_and_start(service: Daemon) -> None:
    service.stop()
    service.start()


def restart_in_place_and_crash(service: Daemon) -> None:
    service.send_signal(signal.SIGUSR2)
    service.wait_for_log(" INFO started", 2)
    crash(service)


@pytest.mark.parametrize(
    "interrupt", [crash, stop_and_start, restart_in_place_and_crash]
)
def test_a_powerdown_before_an_interruption_counts_after_it(
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    interrupt: Callable[[Daemon], None],
) -> None:
    service.start()
    negotiate(fake_qemu, service)
    fake_qemu.send(POWERDOWN)
    fake_qemu.wait_until_read()
    interrupt(service)
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [AFTER_POWERDOWN]


def test_what_changes_nothing_is_not_recorded_again(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, service)
    before = service.state_file.read_bytes()
    for _ in range(3):
        fake_qemu.send(RESET + NOISE)
        fake_qemu.wait_until_read()
    assert service.state_file.read_bytes() == before


def test_nothing_piles_up_in_the_store(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, service)
    for event in (STOP, RESUME, STOP):
        crash(service)
        fake_qemu.send(event)
        fake_qemu.wait_until_read()
    service.send_signal(signal.SIGUSR2)
    service.wait_for_log(" INFO started", 5)
    fake_qemu.send(RESUME)
    fake_qemu.wait_until_read()
    assert len(systemd.names) == 1
    fake_qemu.send(USER_SHUTDOWN)
    fake_qemu.exit()
    wait_until_forgotten(service)
    assert systemd.names == []


Falsify = Callable[[list[bytes]], list[bytes]]


def start_after(falsify: Falsify, service: Service, fake_qemu: FakeQemu) -> None:
    """Start the daemon a second time, with what a function makes of the journal."""
    service.start()
    negotiate(fake_qemu, service)
    service.end()
    lines = service.state_file.read_bytes().splitlines(keepends=True)
    service.state_file.write_bytes(b"".join(falsify(lines)))
    service.start()


def with_members(line: bytes, **members: Any) -> bytes:
    """Return a line of the journal with other members."""
    return json.dumps({**json.loads(line), **members}).encode() + b"\n"


def assert_connects_anew(service: Service, fake_qemu: FakeQemu) -> None:
    """See that the old connection is let go, and the guest's end heard on a new one."""
    fake_qemu.wait_until_client_leaves()
    fake_qemu.negotiate()
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [USER]


@pytest.mark.parametrize(
    ("falsify", "warning"),
    [
        (lambda lines: [], "it can't be used"),
        (lambda lines: [lines[0][:20]], "it can't be used"),
        (
            lambda lines: [with_members(lines[0], format=0), *lines[1:]],
            "it can't be used .not of format 1.",
        ),
        (
            lambda lines: [with_members(lines[0], boot="another"), *lines[1:]],
            "it can't be used .from before the last boot.",
        ),
        (
            lambda lines: [with_members(lines[0], control_dir="/else"), *lines[1:]],
            "it can't be used .of another control directory.",
        ),
        (
            lambda lines: [*lines[:-1], with_members(lines[-1], protocol=None)],
            "not all can be used",
        ),
        (
            lambda lines: [*lines, lines[-1][:60] + b"\n"],
            "not all can be used",
        ),
        (
            lambda lines: [*lines[:-1], lines[-1][:70] + b"[" * 100000 + b"\n"],
            "not all can be used",
        ),
        (
            lambda lines: [*lines[:-1], with_members(lines[-1], connection=[])],
            "not all can be used",
        ),
        (
            lambda lines: [*lines[:-1], with_members(lines[-1], since=10**400)],
            "not all can be used",
        ),
    ],
    ids=[
        *("empty", "torn", "format", "boot", "directory", "protocol", "bad", "deep"),
        *("connection", "since"),
    ],
)
def test_of_a_journal_that_is_of_no_use_the_daemon_connects_anew(
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    falsify: Falsify,
    warning: str,
) -> None:
    start_after(falsify, service, fake_qemu)
    service.wait_for_log(f" WARNING .*kvmd.state: {warning}")
    assert_connects_anew(service, fake_qemu)


def test_what_an_older_version_left_in_the_store_disturbs_nothing(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, service)
    state = os.memfd_create("state")
    os.write(state, b"of a form that nobody knows any more")
    systemd.put("state", state)
    os.close(state)
    fake_qemu.send(POWERDOWN)
    fake_qemu.wait_until_read()
    crash(service)
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [AFTER_POWERDOWN]


def test_a_torn_last_line_is_passed_over(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    start_after(lambda lines: [*lines, lines[-1][:60]], service, fake_qemu)
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [USER]
    assert " WARNING " not in service.log


def test_a_connection_of_which_no_record_tells_is_made_anew(
    start_deadly: StartDeadly,
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
) -> None:
    moment = 'is_armed = True\ndie("after", kvmd_systemd.DescriptorStore, "store")'
    deadly = start_deadly(b"SHUTDOWN", moment)
    fake_qemu.listen()
    wait_for_suicide(deadly)
    (connection,) = systemd.names
    fake_qemu.accept()
    service.start()
    assert_connects_anew(service, fake_qemu)
    assert connection not in systemd.names


def test_a_connection_without_a_greeting_is_negotiated_on_after_a_crash(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    fake_qemu.listen()
    wait_until(lambda: records(service), "a record")
    crash(service)
    fake_qemu.negotiate()
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [USER]


def test_what_is_looked_at_and_then_followed_by_a_new_socket_counts_once(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, service)
    with service.frozen():
        fake_qemu.send(RESET + USER_SHUTDOWN)
        fake_qemu.exit()
        fake_qemu.listen()
    fake_qemu.negotiate()
    service.wait_until_connected(INSTANCE, 2)
    assert verdicts(service) == [USER]
    assert " ERROR " not in service.log


def test_a_byte_out_of_band_is_read_as_any(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, service)
    try:
        fake_qemu.send_out_of_band(b"\n")
    except OSError as error:
        pytest.skip(f"UNIX sockets have nothing out of band here: {error}")
    fake_qemu.wait_until_read()
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [USER]


def test_a_full_store_costs_only_the_memory_of_what_was_before(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    with Systemd(control_dir.parent, store_max=0) as systemd, Service(
        systemd, control_dir
    ) as service:
        fake_qemu.listen()
        fake_qemu.negotiate()
        service.wait_until_connected(INSTANCE)
        crash(service)
        fake_qemu.wait_until_client_leaves()
        fake_qemu.negotiate()
        fake_qemu.send(USER_SHUTDOWN)
        service.wait_for_verdict(INSTANCE)
        service.stop()


def test_a_journal_that_cannot_be_written_stops_nothing(
    service: Service, systemd: Systemd, control_dir: Path, fake_qemu: FakeQemu
) -> None:
    service.state_file.mkdir()
    service.start()
    fake_qemu.listen()
    fake_qemu.negotiate()
    service.wait_for_log(" WARNING the journal can't be written: .* directory")
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)


def test_started_with_other_options_it_lets_the_connections_go(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    start_after(
        lambda lines: [*lines[:-1], with_members(lines[-1], suffix=".not-asked-for")],
        service,
        fake_qemu,
    )
    assert_connects_anew(service, fake_qemu)
    assert " taking over " not in service.log


class Stuck(NamedTuple):
    """A service manager that has stopped reading, and the daemon that it started."""

    manager: socket.socket
    daemon: Daemon


def connection_name(record: dict[str, Any]) -> str:
    """Return the name of an instance's connection in the store."""
    return f"connection-{record['connection']}"


def read_messages(manager: socket.socket, kind: str, count: int) -> set[str]:
    """Read messages until so many of a kind have come; return the names in them."""
    names: list[str] = []
    while len(names) < count:
        message, fds, _, _ = socket.recv_fds(manager, 4096, 1)
        for fd in fds:
            os.close(fd)
        assignments = message.decode().split("\n")
        if kind in assignments:
            names += [line[7:] for line in assignments if line.startswith("FDNAME=")]
    return set(names)


def test_what_systemd_did_not_take_is_given_to_it_again(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    address = control_dir.parent / "notify"
    environment = {**os.environ, "NOTIFY_SOCKET": str(address)}
    with full_notify_socket(address) as manager, Daemon(
        control_dir, "--rescan-interval=0", environment=environment
    ) as daemon:
        fake_qemu.listen()
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE)
        fake_qemu.wait_until_read()
        status_table(daemon)  # now there is nothing that would wake it up
        assert take_descriptors(manager, 1) == ["connection"]
        daemon.stop()


@contextmanager
def stuck_systemd(control_dir: Path, patch: str = "") -> Iterator[Stuck]:
    """Give a service manager whose queue is full, and a daemon that it has started."""
    address = control_dir.parent / "notify"
    environment = {**os.environ, "NOTIFY_SOCKET": str(address)}
    program = program_with(control_dir.parent, patch)
    options: dict[str, Any] = {"environment": environment, "program": program}
    with full_notify_socket(address) as manager, Daemon(
        control_dir, "--rescan-interval=0", **options
    ) as daemon:
        yield Stuck(manager, daemon)


def restart_in_place(daemon: Daemon) -> None:
    daemon.send_signal(signal.SIGUSR2)
    daemon.wait_for_log(" INFO started", 2)


def test_what_systemd_did_not_take_before_a_restart_in_place_it_is_given_after_it(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    with stuck_systemd(control_dir) as (manager, daemon), FakeQemu(
        control_dir, "other"
    ) as other:
        for qemu in (fake_qemu, other):
            qemu.listen()
            qemu.negotiate()
            daemon.wait_until_connected(qemu.name)
        names = {connection_name(record) for record in records(daemon).values()}
        restart_in_place(daemon)
        assert read_messages(manager, "FDSTORE=1", 2) == names
        daemon.stop()


def test_what_systemd_has_taken_before_a_restart_in_place_it_is_given_again(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, service)
    (name,) = systemd.names
    systemd.remove(name)  # as if it had not taken it
    restart_in_place(service)
    assert systemd.names == [name]
    crash(service)
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [USER]


def test_what_systemd_was_not_told_to_discard_it_is_told_after_a_restart_in_place(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    with stuck_systemd(control_dir) as (manager, daemon):
        fake_qemu.listen()
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE)
        name = connection_name(records(daemon)[INSTANCE])
        fake_qemu.send(USER_SHUTDOWN)  # so that it is not connected to again
        fake_qemu.exit()
        wait_until(lambda: not status_table(daemon), "the instance is forgotten")
        restart_in_place(daemon)
        assert read_messages(manager, "FDSTOREREMOVE=1", 1) == {name}
        daemon.stop()


TOLD_OF_STOP = """
def tell_and_finish(daemon, finish=kvmd_daemon.Daemon.finish):
    open(stopping, "w").close()
    finish(daemon)
kvmd_daemon.Daemon.finish = tell_and_finish
kvmd_daemon.LAST_ATTEMPTS = 20
"""


def test_at_its_stop_the_daemon_waits_a_moment_for_systemd(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    stopping = control_dir.parent / "stopping"
    patch = f"stopping = {str(stopping)!r}\n{TOLD_OF_STOP}"
    with stuck_systemd(control_dir, patch) as (manager, daemon), FakeQemu(
        control_dir, "other"
    ) as other:
        for qemu in (fake_qemu, other):
            qemu.listen()
            qemu.negotiate()
            daemon.wait_until_connected(qemu.name)
        kept, discarded = (
            connection_name(records(daemon)[qemu.name]) for qemu in (fake_qemu, other)
        )
        other.send(USER_SHUTDOWN)  # so that it is not connected to again
        other.exit()
        wait_until(lambda: len(status_table(daemon)) == 1, "one is forgotten")
        daemon.send_signal(signal.SIGTERM)
        wait_until(stopping.exists, "the daemon is about to end")
        assert read_messages(manager, "FDSTOREREMOVE=1", 1) == {discarded}
        assert read_messages(manager, "FDSTORE=1", 1) == {kept}
        assert daemon.wait_until_gone() == 0


def test_a_systemd_that_takes_nothing_is_not_waited_for_longer(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    with stuck_systemd(control_dir) as (_, daemon):
        fake_qemu.listen()
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE)
        daemon.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert daemon.wait_until_gone() == 0
        assert time.monotonic() - begin < 2


class Life(NamedTuple):
    """A guest that has gone down, and whether Ganeti has taken note of its end."""

    qemu: FakeQemu
    way: Way
    noted: bool


def negotiate_in_a_storm(qemu: FakeQemu, service: Service) -> None:
    """Negotiate with one daemon after the other, until no crash ends the connection."""
    while not is_recorded(service, qemu.name):
        try:
            qemu.disconnect()
            qemu.negotiate()
            wait_until(
                lambda: is_recorded(service, qemu.name) or qemu.client_has_left(),
                "the record of a guest that runs",
            )
        except (EOFError, ConnectionError):
            continue


def live(qemu: FakeQemu, service: Service, chance: random.Random) -> Life:
    """Run a guest, and have it go down in some way, in pieces of some length."""
    way = chance.choice(WAYS)
    qemu.listen()
    negotiate_in_a_storm(qemu, service)
    data = b"".join(event + NOISE * chance.randrange(2) for event in way.events)
    while data:
        length = chance.choice([30, 200, 1000])
        qemu.send(data[:length])
        data = data[length:]
        time.sleep(chance.uniform(0, 0.02))
    noted = way.verdict.startswith("user") and chance.random() < 0.5
    if noted:
        qemu.wait_until_read()  # so it is in the journal, and not read again
        qemu.shutdown_file.unlink()
    chance.choice([qemu.exit, qemu.crash])()
    return Life(qemu, way, noted)


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.soak)])
def test_no_verdict_is_wrong_or_missing_however_often_the_daemon_is_killed(
    systemd: Systemd, control_dir: Path, kills: int
) -> None:
    chance = random.Random(kills)
    # The stand-in for systemd has threads beside it, and may take longer than systemd.
    patience = "kvmd.Notifier.ATTEMPTS = kvmd.Notifier.LATER_ATTEMPTS = 1000"
    program = program_with(control_dir.parent, patience)
    service = Service(
        systemd, control_dir, program=program, interpreter=[sys.executable]
    )
    lives: list[Life] = []
    is_over = threading.Event()

    def live_on(number: int) -> None:
        own_chance = random.Random(number)
        while not is_over.is_set():
            qemu = FakeQemu(control_dir, f"guest{len(lives)}-{number}")
            lives.append(live(qemu, service, own_chance))

    with ThreadPoolExecutor() as executor, service:
        threads = [executor.submit(live_on, number) for number in range(4)]
        try:
            for _ in range(kills):
                time.sleep(chance.uniform(0, 0.1))
                service.end()
                time.sleep(chance.uniform(0, 0.05))
                service.start()
        finally:
            is_over.set()
        for thread in threads:
            thread.result()
        for life in lives:
            name = life.qemu.name
            wait_until(partial(known_verdicts, service, name), f"a verdict on {name}")
        service.stop()
    for qemu, way, noted in lives:
        assert known_verdicts(service, qemu.name) == {way.verdict}
        is_there = way.verdict.startswith("user") and not noted
        assert qemu.shutdown_file.exists() == is_there
