"""The daemon is killed under systemd, and the next one goes on where it ended."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from daemon import INSTANCE, Daemon
from deadline import SECONDS, wait_until
from fake_qemu import FakeQemu, event_line
from status import status_table
from systemd import Service, Systemd
from variant import program_with

import kvmd_daemon
import kvmd_journal
import kvmd_log
import kvmd_monitor
import kvmd_qmp
import kvmd_systemd

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
    'die("before", kvmd_monitor, "create_shutdown_file")',
    'die("after", kvmd_monitor, "create_shutdown_file")',
]
BEFORE_THE_STATE_IS_KEPT = [
    'die("before", kvmd_daemon.Daemon, "_keep_state")',
    'die("after", kvmd_daemon, "write_state_file")',
]
SINCE_THE_STATE_IS_KEPT = [
    'die("before", kvmd_monitor.Monitor, "consume")',
    'die("after", kvmd_monitor.Monitor, "consume")',
]
AT_THE_END = [
    'die("before", kvmd_monitor.Monitor, "_disconnect")',
    'die("after", kvmd_monitor.Monitor, "_disconnect")',
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


def kept_state(systemd: Systemd) -> dict[str, Any]:
    """Return the newest state in the store."""
    states = systemd.use_store(
        lambda store: [
            kvmd_journal.read_state_file(stored.fd)
            for stored in store
            if stored.name.startswith("state-")
        ]
    )
    return max(states, key=lambda state: int(state["serial"]), default={"monitors": []})


def is_kept(systemd: Systemd, instance: str) -> bool:
    """Tell whether a daemon that starts now would know that the guest runs."""
    return any(
        record["instance"] == instance and record["guest"]["alive"]
        for record in kept_state(systemd)["monitors"]
    )


def negotiate(qemu: FakeQemu, systemd: Systemd) -> None:
    """Take the daemon through all that comes before the events."""
    qemu.listen()
    qemu.negotiate()
    wait_until(lambda: is_kept(systemd, qemu.name), "the state to be kept")


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


def verdicts(service: Daemon, instance: str = INSTANCE) -> list[str]:
    """Return all verdicts on the instance so far, each with its cause."""
    pattern = rf" INFO {re.escape(instance)}: verdict=(\S+) cause=(\S+)"
    return [" ".join(found) for found in re.findall(pattern, service.log)]


@pytest.mark.parametrize(
    "moment",
    [
        *AROUND_THE_FILE,
        *BEFORE_THE_STATE_IS_KEPT,
        *SINCE_THE_STATE_IS_KEPT,
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
    negotiate(fake_qemu, systemd)
    fake_qemu.send(USER_SHUTDOWN)
    fake_qemu.exit()
    wait_for_suicide(deadly)
    service.start()
    wait_until_forgotten(service)
    assert fake_qemu.shutdown_file.exists()
    assert set(verdicts(service)) == {USER}


@pytest.mark.parametrize("moment", SINCE_THE_STATE_IS_KEPT + AT_THE_END)
def test_a_verdict_that_is_kept_is_not_written_again(
    start_deadly: StartDeadly,
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    moment: str,
) -> None:
    deadly = start_deadly(b"SHUTDOWN", moment)
    negotiate(fake_qemu, systemd)
    # In one read: seen again from the beginning, it would be a shutdown withdrawn.
    fake_qemu.send(RESET + USER_SHUTDOWN)
    fake_qemu.exit()
    wait_for_suicide(deadly)
    fake_qemu.shutdown_file.unlink()  # as Ganeti does when it has taken note
    service.start()
    wait_until_forgotten(service)
    assert verdicts(service) == [USER]
    assert not fake_qemu.shutdown_file.exists()


@pytest.mark.parametrize("moment", BEFORE_THE_STATE_IS_KEPT + SINCE_THE_STATE_IS_KEPT)
def test_a_crash_at_a_powerdown_leaves_it_known(
    start_deadly: StartDeadly,
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    moment: str,
) -> None:
    deadly = start_deadly(b"POWERDOWN", moment)
    negotiate(fake_qemu, systemd)
    fake_qemu.send(POWERDOWN)
    wait_for_suicide(deadly)
    service.start()
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [AFTER_POWERDOWN]


@pytest.mark.parametrize("moment", BEFORE_THE_STATE_IS_KEPT + SINCE_THE_STATE_IS_KEPT)
def test_a_crash_in_the_midst_of_a_line_leaves_it_whole(
    start_deadly: StartDeadly,
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    moment: str,
) -> None:
    deadly = start_deadly(b"microseconds", moment)
    negotiate(fake_qemu, systemd)
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
        (b"x" * (kvmd_qmp.LINE_LIMIT + 1), b"\r\n"),
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
    negotiate(fake_qemu, systemd)
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
    negotiate(fake_qemu, systemd)
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
    negotiate(fake_qemu, systemd)
    service.end()
    fake_qemu.send(USER_SHUTDOWN)
    fake_qemu.exit()
    fake_qemu.listen()
    service.start()
    fake_qemu.negotiate()
    service.wait_for_verdict(INSTANCE, 2)
    assert verdicts(service) == [USER, RUNNING]
    assert not fake_qemu.shutdown_file.exists()


def test_a_file_that_could_not_be_made_before_the_crash_is_made_after_it(
    service: Service, systemd: Systemd, control_dir: Path, fake_qemu: FakeQemu
) -> None:
    program = program_with(
        control_dir.parent,
        "def full(*_): raise OSError(28, 'No space left on device')\n"
        "kvmd_monitor.create_shutdown_file = full\n",
    )
    with Service(systemd, control_dir, program=program) as unlucky:
        negotiate(fake_qemu, systemd)
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
    negotiate(fake_qemu, systemd)
    fake_qemu.send(POWERDOWN)
    fake_qemu.wait_until_read()
    interrupt(service)
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [AFTER_POWERDOWN]


def test_of_several_states_the_newest_counts(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, systemd)
    for event in (STOP, POWERDOWN):
        crash(service)
        fake_qemu.send(event)
        fake_qemu.wait_until_read()
    crash(service)
    assert {"state-0", "state-1"} < set(systemd.names)
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [AFTER_POWERDOWN]


def test_what_changes_nothing_is_not_kept_again(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, systemd)
    before = kept_state(systemd)
    for _ in range(3):
        fake_qemu.send(RESET + NOISE)
        fake_qemu.wait_until_read()
    assert kept_state(systemd) == before


def test_nothing_piles_up_in_the_store(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, systemd)
    for event in (STOP, RESUME, STOP):
        crash(service)
        fake_qemu.send(event)
        fake_qemu.wait_until_read()
    service.send_signal(signal.SIGUSR2)
    service.wait_for_log(" INFO started", 5)
    fake_qemu.send(RESUME)
    fake_qemu.wait_until_read()
    assert len(systemd.names) <= 3  # the connection, the state, the one before
    fake_qemu.send(USER_SHUTDOWN)
    fake_qemu.exit()
    wait_until_forgotten(service)
    assert {name.split("-")[0] for name in systemd.names} == {"state"}


def turn(monitor: kvmd_monitor.Monitor) -> Iterator[None]:
    """Have a monitor do what it does in one turn of the loop, step by step."""
    monitor.receive()
    yield
    monitor.consume()
    yield


def life(
    monitor: kvmd_monitor.Monitor, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Take a monitor through all that may change what is to be known of it."""
    for name in ("create_shutdown_file", "remove_shutdown_file"):
        monkeypatch.setattr(kvmd_monitor, name, lambda path, *_: os.rmdir(path))  # fails
    fake_qemu.listen()
    monitor.connect()
    yield
    monitor._warn_of_silence()
    yield
    fake_qemu.accept()
    fake_qemu.greet()
    for word in (
        *(NOISE, b"{}\r\n"),
        b'{"id": "kvmd-status", "return": {"status": "running"}}\r\n',
        *(NOISE, POWERDOWN, NOISE, RESET, USER_SHUTDOWN),
    ):
        fake_qemu.send(word)
        yield from turn(monitor)
    monkeypatch.undo()
    monitor.on_timer()
    yield
    monitor.on_removed()
    yield
    monitor.close()
    yield


@pytest.mark.parametrize("is_kept", [True, False], ids=["systemd", "nobody"])
def test_the_record_of_an_instance_is_how_it_stands(
    systemd: Systemd,
    control_dir: Path,
    fake_qemu: FakeQemu,
    monkeypatch: pytest.MonkeyPatch,
    is_kept: bool,
) -> None:
    environment = {"NOTIFY_SOCKET": str(systemd.notify_socket)} if is_kept else {}
    notifier = kvmd_systemd.Notifier(environment)
    log = kvmd_log.Log(None, [])
    reactor = kvmd_monitor.Reactor(str(control_dir), log, notifier, descriptor_limit=100)
    monitor = kvmd_monitor.Monitor(INSTANCE, ".kvmd", reactor)
    kept = monitor.record()
    for _ in life(monitor, fake_qemu, monkeypatch):
        assert monitor.record() == json.dumps(monitor.export())
        now = json.dumps({**monitor.export(), "unconsumed": ""})
        if now != kept and is_kept:
            assert reactor.changed
            reactor.changed = False
        kept = now
    assert monitor.phase is kvmd_monitor.Phase.ENDED
    assert (monitor.record() is monitor.record()) == is_kept
    reactor.selector.close()
    if is_kept:
        notifier._socket.close()


def put_state(systemd: Systemd, text: str) -> None:
    """Put a text into the store in place of all states."""
    for name in systemd.names:
        if name.startswith("state-"):
            systemd.remove(name)
    fd = os.memfd_create(kvmd_journal.STATE_NAME)
    os.write(fd, text.encode())
    systemd.put("state-0", fd)
    os.close(fd)


def with_first_monitor(state: dict[str, Any], **members: Any) -> str:
    """Return the state with other members for its first monitor."""
    monitor, *others = state["monitors"]
    return json.dumps({**state, "monitors": [{**monitor, **members}, *others]})


Falsify = Callable[[dict[str, Any]], str]


def start_after(
    falsify: Falsify, service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    """Start the daemon a second time, with what a function makes of its state."""
    service.start()
    negotiate(fake_qemu, systemd)
    service.end()
    put_state(systemd, falsify(kept_state(systemd)))
    service.start()


def assert_connects_anew(service: Service, fake_qemu: FakeQemu) -> None:
    """See that the old connection is let go, and the guest's end heard on a new one."""
    fake_qemu.wait_until_client_leaves()
    fake_qemu.negotiate()
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [USER]


@pytest.mark.parametrize(
    "falsify",
    [
        lambda state: "",
        lambda state: json.dumps(state)[:-20],
        lambda state: json.dumps({**state, "version": 0}),
        lambda state: json.dumps({**state, "monitors": {"a": 1}}),
        lambda state: with_first_monitor(state, protocol=None),
        lambda state: "[" * 100000,
    ],
    ids=["empty", "torn", "version", "no-list", "no-protocol", "deep"],
)
def test_with_a_foreign_state_the_daemon_connects_anew(
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    falsify: Falsify,
) -> None:
    start_after(falsify, service, systemd, fake_qemu)
    service.wait_for_log(" WARNING the state of an earlier daemon can't be read")
    assert_connects_anew(service, fake_qemu)


def test_a_connection_of_which_no_state_tells_is_made_anew(
    start_deadly: StartDeadly,
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
) -> None:
    moment = 'is_armed = True\ndie("after", kvmd_systemd.Notifier, "store")'
    deadly = start_deadly(b"SHUTDOWN", moment)
    fake_qemu.listen()
    wait_for_suicide(deadly)
    (connection,) = systemd.names
    fake_qemu.accept()
    service.start()
    assert_connects_anew(service, fake_qemu)
    assert connection not in systemd.names


def test_a_connection_without_a_greeting_is_made_anew_after_a_crash(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    fake_qemu.listen()
    fake_qemu.accept()
    wait_until(lambda: kept_state(systemd)["monitors"], "the state to be kept")
    crash(service)
    fake_qemu.wait_until_client_leaves()
    fake_qemu.negotiate()
    fake_qemu.send(USER_SHUTDOWN)
    service.wait_for_verdict(INSTANCE)
    assert verdicts(service) == [USER]


def test_what_is_looked_at_and_then_followed_by_a_new_socket_counts_once(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, systemd)
    service.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, service.pid, os.WSTOPPED)
    fake_qemu.send(RESET + USER_SHUTDOWN)
    fake_qemu.exit()
    fake_qemu.listen()
    service.send_signal(signal.SIGCONT)
    fake_qemu.negotiate()
    service.wait_for_verdict(INSTANCE, 2)
    assert verdicts(service) == [USER, RUNNING]
    assert " ERROR " not in service.log


def test_a_byte_out_of_band_is_read_as_any(
    service: Service, systemd: Systemd, fake_qemu: FakeQemu
) -> None:
    service.start()
    negotiate(fake_qemu, systemd)
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


def test_a_state_that_cannot_be_written_stops_nothing(
    systemd: Systemd, control_dir: Path, fake_qemu: FakeQemu
) -> None:
    program = program_with(
        control_dir.parent,
        "import errno, os\n"
        "def memfd_create(*_): raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))\n"
        "os.memfd_create = memfd_create\n",
    )
    with Service(systemd, control_dir, program=program) as service:
        fake_qemu.listen()
        fake_qemu.negotiate()
        service.wait_for_log(" WARNING the state can't be kept against a crash: Too ")
        fake_qemu.send(USER_SHUTDOWN)
        service.wait_for_verdict(INSTANCE)
        service.stop()


@contextmanager
def stuck_manager(address: Path) -> Iterator[tuple[socket.socket, kvmd_systemd.Notifier]]:
    """Give a service manager that takes no more messages, and who sends it some."""
    with ExitStack() as ending:
        manager = ending.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(address))
        notifier = kvmd_systemd.Notifier({"NOTIFY_SOCKET": str(address)})
        while notifier.send("full"):
            # One sender's own buffer may be full before the queue is.
            sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            ending.enter_context(sender)
            with suppress(BlockingIOError):
                while True:
                    sender.sendto(b"full", socket.MSG_DONTWAIT, str(address))
        manager.settimeout(SECONDS)
        yield manager, notifier


def is_readable(manager: socket.socket) -> bool:
    return bool(select.select([manager], [], [], 0)[0])


def take_all(manager: socket.socket) -> None:
    """Take what a service manager was sent."""
    while is_readable(manager):
        manager.recv(4096)


def test_a_service_manager_that_is_stuck_is_waited_for_once(control_dir: Path) -> None:
    with stuck_manager(control_dir.parent / "notify") as (stuck, notifier):
        start = time.monotonic()
        assert not any(notifier.send("WATCHDOG=1") for _ in range(1000))
        assert time.monotonic() - start < 5  # if each were waited for, it would be 10
        stuck.recv(4096)
        assert notifier.send("WATCHDOG=1")


def test_what_a_service_manager_did_not_take_is_given_to_it_again(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    address = control_dir.parent / "notify"
    environment = {**os.environ, "NOTIFY_SOCKET": str(address)}
    with stuck_manager(address) as (manager, _):
        with Daemon(
            control_dir, "--rescan-interval=0", environment=environment
        ) as daemon:
            fake_qemu.listen()
            fake_qemu.negotiate()
            daemon.wait_until_connected(INSTANCE)
            fake_qemu.wait_until_read()
            status_table(daemon)  # now there is nothing that would wake it up
            wanted = {"connection", "state"}
            while wanted:
                message, fds, _, _ = socket.recv_fds(manager, 4096, 1)
                for fd in fds:
                    os.close(fd)
                    wanted -= set(re.findall(r"FDNAME=([a-z]+)-", message.decode()))
            daemon.stop()


def let_a_service_manager_take_all(
    notifier: kvmd_systemd.Notifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "is_heard", True)
    monkeypatch.setattr(notifier, "send", lambda *_, **__: True)


def test_what_a_service_manager_was_not_told_to_discard_it_is_told_later(
    control_dir: Path,
) -> None:
    with stuck_manager(control_dir.parent / "notify") as (manager, notifier):
        assert not notifier.discard("one")
        assert not notifier.discard("two")
        while not notifier.discard_rest():
            assert manager.recv(4096) == b"full"
        names = set()
        while len(names) < 2:
            names.update(manager.recv(4096).split(b"FDNAME=")[1:])
    assert names == {b"one", b"two"}


def test_no_state_is_kept_for_a_socket_to_which_there_is_no_connection_yet(
    reactor: kvmd_monitor.Reactor, fake_qemu: FakeQemu
) -> None:
    fake_qemu.bind()
    monitor = kvmd_monitor.Monitor(INSTANCE, ".kvmd", reactor)
    monitor.connect()
    assert not reactor.changed
    fake_qemu.listen()
    monitor.phase = kvmd_monitor.Phase.SILENT
    monitor.connect()
    assert reactor.changed
    monitor.close()


def test_a_status_that_a_service_manager_did_not_take_is_sent_again(
    control_dir: Path,
) -> None:
    with stuck_manager(control_dir.parent / "notify") as (manager, notifier):
        notifier.send_status("instances watched: 1")
        assert not notifier.knows_status()
        take_all(manager)
        notifier.send_status("instances watched: 1")
        assert notifier.knows_status()
        notifier.send_status("instances watched: 1")
        assert manager.recv(4096) == b"READY=1\nSTATUS=instances watched: 1"
        assert not is_readable(manager), "it is sent once"


def test_a_daemon_that_could_not_tell_that_it_is_ready_tells_it_soon(
    reactor: kvmd_monitor.Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_a_service_manager_take_all(reactor.notifier, monkeypatch)
    daemon = kvmd_daemon.Daemon(reactor, (".kvmd",), 0, [])
    timeout = daemon._timeout()
    assert timeout is not None and timeout <= kvmd_daemon.TELLING_RETRY
    daemon._send_status()
    assert daemon._timeout() is None


def test_a_sign_of_life_that_was_not_taken_is_given_again_soon(
    reactor: kvmd_monitor.Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = kvmd_daemon.Daemon(reactor, (".kvmd",), 0, [])
    monkeypatch.setattr(reactor.notifier, "watchdog_interval", 15.0)
    daemon._give_sign_of_life()
    timeout = daemon._timeout()
    assert timeout is not None and timeout <= kvmd_daemon.TELLING_RETRY
    let_a_service_manager_take_all(reactor.notifier, monkeypatch)
    daemon._send_status()
    daemon._give_sign_of_life()
    timeout = daemon._timeout()
    assert timeout is not None and timeout > kvmd_daemon.TELLING_RETRY


def test_a_service_manager_that_takes_nothing_is_asked_once_a_turn(
    reactor: kvmd_monitor.Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    notifier = reactor.notifier
    monkeypatch.setattr(notifier, "is_heard", True)
    monkeypatch.setattr(notifier, "send", lambda *_, **__: asked.append(_))
    pairs = [socket.socketpair() for _ in range(3)]
    for number, (connection, _) in enumerate(pairs):
        monitor = kvmd_monitor.Monitor(f"guest{number}", ".kvmd", reactor)
        monitor._begin(connection)
    assert len(reactor.unkept) == 3
    kvmd_daemon.Daemon(reactor, (".kvmd",), 0, [])._keep_state()
    assert len(asked) == 1
    for one, other in pairs:
        one.close()
        other.close()


def test_an_inherited_connection_of_nobody_is_let_go_whoever_else_has_it_open(
    reactor: kvmd_monitor.Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_a_service_manager_take_all(reactor.notifier, monkeypatch)
    ours, theirs = socket.socketpair()
    inheritance = kvmd_journal.Inheritance.__new__(kvmd_journal.Inheritance)
    inheritance.connections = {"connection-1": ours}
    inheritance.state, inheritance.problem = {}, None
    with ours.dup(), theirs:
        kvmd_daemon.Daemon(reactor, (".kvmd",), 0, [])._take_over(inheritance)
        theirs.settimeout(SECONDS)
        assert theirs.recv(1) == b""


def test_a_connection_is_let_go_whoever_else_has_it_open(
    reactor: kvmd_monitor.Reactor, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_a_service_manager_take_all(reactor.notifier, monkeypatch)
    monitor = kvmd_monitor.Monitor(INSTANCE, ".kvmd", reactor)
    fake_qemu.listen()
    monitor.connect()
    fake_qemu.accept()
    descriptor = monitor.descriptor()
    assert descriptor is not None
    copy = os.dup(descriptor)
    monitor.close()
    assert fake_qemu.client_has_left()
    os.close(copy)


@pytest.mark.parametrize(
    "falsify",
    [
        lambda state: json.dumps({**state, "control_dir": "/somewhere/else"}),
        lambda state: with_first_monitor(state, suffix=".not-asked-for"),
    ],
    ids=["directory", "suffix"],
)
def test_started_with_other_options_it_lets_the_connections_go(
    service: Service,
    systemd: Systemd,
    fake_qemu: FakeQemu,
    falsify: Falsify,
) -> None:
    start_after(falsify, service, systemd, fake_qemu)
    assert_connects_anew(service, fake_qemu)
    assert " taking over " not in service.log


def test_a_state_that_could_not_be_written_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "patched")

    monkeypatch.setattr(kvmd_journal.fcntl, "fcntl", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="patched"):
        kvmd_journal.write_state_file("{}")
    assert os.listdir("/proc/self/fd") == before


class Life(NamedTuple):
    """A guest that has gone down, and whether Ganeti has taken note of its end."""

    qemu: FakeQemu
    way: Way
    noted: bool


def negotiate_in_a_storm(qemu: FakeQemu, systemd: Systemd) -> None:
    """Negotiate with one daemon after the other, until no crash ends the connection."""
    while not is_kept(systemd, qemu.name):
        try:
            qemu.disconnect()
            qemu.negotiate()
            wait_until(
                lambda: is_kept(systemd, qemu.name) or qemu.client_has_left(),
                "the state to be kept",
            )
        except (EOFError, ConnectionError):
            continue


def live(qemu: FakeQemu, systemd: Systemd, chance: random.Random) -> Life:
    """Run a guest, and have it go down in some way, in pieces of some length."""
    way = chance.choice(WAYS)
    qemu.listen()
    negotiate_in_a_storm(qemu, systemd)
    data = b"".join(event + NOISE * chance.randrange(2) for event in way.events)
    while data:
        length = chance.choice([30, 200, 1000])
        qemu.send(data[:length])
        data = data[length:]
        time.sleep(chance.uniform(0, 0.02))
    noted = way.verdict.startswith("user") and chance.random() < 0.5
    if noted:
        qemu.wait_until_read()  # so the state is kept: it is not read again
        qemu.shutdown_file.unlink()
    chance.choice([qemu.exit, qemu.crash])()
    return Life(qemu, way, noted)


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.soak)])
def test_no_verdict_is_wrong_or_missing_however_often_the_daemon_is_killed(
    systemd: Systemd, control_dir: Path, kills: int
) -> None:
    chance = random.Random(kills)
    lives: list[Life] = []
    is_over = threading.Event()

    def live_on(number: int) -> None:
        own_chance = random.Random(number)
        while not is_over.is_set():
            qemu = FakeQemu(control_dir, f"guest{len(lives)}-{number}")
            lives.append(live(qemu, systemd, own_chance))

    # The stand-in for systemd has threads beside it, and may take longer than systemd.
    program = program_with(control_dir.parent, "kvmd.Notifier.SEND_TIMEOUT = 999999")
    service = Service(
        systemd, control_dir, program=program, interpreter=[sys.executable]
    )
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
            service.wait_for_verdict(life.qemu.name)
        service.stop()
    for qemu, way, noted in lives:
        assert set(verdicts(service, qemu.name)) == {way.verdict}
        is_there = way.verdict.startswith("user") and not noted
        assert qemu.shutdown_file.exists() == is_there
