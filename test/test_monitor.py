"""The monitor of one instance, step by step, against a fake QEMU."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clock import pass_time
from daemon import INSTANCE
from deadline import wait_until
from fake_qemu import FakeQemu, event_line

from kvmd_connection import FILL_TIME, HOSTILE_PAUSE
from kvmd_context import (
    LISTENING_LIFETIME,
    PATIENCE,
    RESERVED_DESCRIPTORS,
    MonitorContext,
    Phase,
)
from kvmd_journal import Journal, read_journal
from kvmd_log import Log
from kvmd_loop import Loop
from kvmd_monitor import FILE_RETRY, LONGEST_EXIT, Monitor
from kvmd_shutdown_file import LastVerdict, ShutdownFiles
from kvmd_systemd import DescriptorStore, Notifier
from kvmd_verdict import Ruling

UNINTERESTING = event_line("VNC_CONNECTED", server={}, client={})
POWERDOWN = event_line("POWERDOWN")
RESET = event_line("RESET")
USER_SHUTDOWN = event_line("SHUTDOWN", guest=True, reason="guest-shutdown")
GREETING = b'{"QMP": {}}\r\n'


def ready(context: MonitorContext) -> bool:
    """Tell whether there is something to read."""
    return context.loop.wait(0) != []


def read_all(monitor: Monitor, context: MonitorContext) -> None:
    """Read as often as the loop would have it read."""
    while ready(context):
        monitor.receive()


def read_only(*_: object) -> None:
    """Fail as a system call does on a read-only file system."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def connect_to(
    peer: socket.socket, context: MonitorContext, monkeypatch: pytest.MonkeyPatch
) -> Monitor:
    """Return a monitor that has this for its new connection."""
    monkeypatch.setattr(context, "connect", lambda _path: peer)
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    return monitor


# ---- Connecting ----------------------------------------------------------------------


def test_to_wait_for_a_descriptor_costs_one_record_however_long_it_takes(
    context: MonitorContext, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(code: int) -> None:
        def connect(_path: str) -> socket.socket:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(context, "connect", connect)
        monitor.on_timer()

    fake_qemu.bind()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    refuse(errno.EMFILE)
    size = os.path.getsize(context.journal.path)
    refuse(errno.EMFILE)
    assert monitor.phase is Phase.WAITING
    assert os.path.getsize(context.journal.path) == size
    pass_time(monkeypatch, 2 * PATIENCE)
    refuse(errno.ECONNREFUSED)
    assert monitor.phase.value == "connecting"


def test_a_socket_that_refuses_is_tried_again_at_once_then_less_and_less_often(
    context: MonitorContext, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[float] = []
    monkeypatch.setattr(
        context.loop, "set_timer", lambda _monitor, seconds: delays.append(seconds)
    )
    fake_qemu.bind()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    for _ in range(17):
        monitor.connect()
    assert delays[:4] == [0.00005, 0.0001, 0.0002, 0.0004]
    assert delays[-2:] == [1.0, 1.0]


def test_a_monitor_that_is_closed_waits_for_nothing(
    context: MonitorContext, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu.listen()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    monitor.close()
    pass_time(monkeypatch, PATIENCE)
    assert not list(context.overdue())
    assert context.loop.registered == 0


def test_a_peer_that_does_not_greet_in_time_is_overdue_once(
    context: MonitorContext, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu.listen()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    assert not list(context.overdue())
    later = context.next_overdue()
    assert later == monitor.since + PATIENCE
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert list(context.overdue()) == [monitor]
    monitor.on_overdue()
    assert monitor.phase is Phase.SILENT
    assert not list(context.overdue())
    monitor.close()


@pytest.mark.parametrize("way", ["abandoned", "restored"])
def test_a_guest_is_not_alive_in_a_connection_for_having_been_in_an_earlier_one(
    context: MonitorContext, monitor: Monitor, fake_qemu: FakeQemu, way: str
) -> None:
    record = json.loads(json.dumps(monitor.record()))
    monitor.abandon()
    fake_qemu.disconnect()
    if way == "restored":
        monitor = Monitor.restore(record, None, context)
    fake_qemu.shutdown_file.touch()
    monitor.connect()
    fake_qemu.accept()
    fake_qemu.disconnect()
    while monitor.receive():
        pass
    assert fake_qemu.shutdown_file.exists(), "no verdict without a greeting"


def touch(path: Path) -> None:
    os.utime(path)


def chmod(path: Path) -> None:
    path.chmod(0o700)


def rename_away_and_back(path: Path) -> None:
    path.rename(path.with_suffix(".away"))
    path.with_suffix(".away").rename(path)


def rename_over_itself(path: Path) -> None:
    path.rename(path)


def link(path: Path) -> None:
    os.link(path, path.with_suffix(".link"))


def rename_directory_and_back(path: Path) -> None:
    away = path.parent.with_name("away")
    path.parent.rename(away)
    away.rename(path.parent)


DISTURBANCES = [
    *(touch, chmod, rename_away_and_back, rename_over_itself, link),
    rename_directory_and_back,
]


@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_whatever_is_done_to_the_socket_file_the_qemu_is_the_same(
    monitor: Monitor, fake_qemu: FakeQemu, disturb: object
) -> None:
    assert monitor.socket_file.is_at(monitor.path)
    disturb(fake_qemu.path)  # type: ignore[operator]
    assert monitor.socket_file.is_at(monitor.path)


def test_a_socket_made_anew_is_a_new_qemus(
    monitor: Monitor, fake_qemu: FakeQemu
) -> None:
    for _ in range(120):
        with FakeQemu(fake_qemu.path.parent, INSTANCE) as new:
            new.bind()
            assert not monitor.socket_file.is_at(monitor.path)


def test_a_new_qemus_socket_is_not_for_the_monitor_of_the_old_one(
    context: MonitorContext, fake_qemu: FakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.crash()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    assert monitor.phase is Phase.CONNECTING
    fake_qemu.listen()
    monitor.on_timer()
    assert monitor.phase.value == "gone"
    assert monitor.connection is None


def test_of_a_socket_that_is_back_after_a_moment_all_stays_known(
    context: MonitorContext, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu.bind()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    monitor.guest.on_event("POWERDOWN", None, None)
    monkeypatch.setattr("kvmd_monitor.socket_status", lambda _path: None)
    monitor.connect()
    assert monitor.guest.powerdown_requested


def test_a_connection_that_is_left_alone_takes_a_descriptor_all_the_same(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    limit = RESERVED_DESCRIPTORS + 1
    log, store = Log(None, []), DescriptorStore(Notifier({}))
    context = MonitorContext(str(control_dir), log, Loop(), store, limit)
    context.journal = Journal("/none", "", log, lambda: [], lambda: [])
    fake_qemu.listen()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    fake_qemu.accept()
    fake_qemu.send_descriptor(UNINTERESTING, 0)
    assert not monitor.receive()
    assert not ready(context)
    with pytest.raises(OSError) as caught:
        context.connect(monitor.path)
    assert caught.value.errno == errno.EMFILE
    monitor.close()
    context.connect(monitor.path).close()
    context.loop.close()


# ---- Listening -----------------------------------------------------------------------


def test_what_had_arrived_counts_though_sending_fails(
    context: MonitorContext, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu.bind()
    ours, theirs = socket.socketpair()
    theirs.send(GREETING + b'{"return": {}}\r\n' + USER_SHUTDOWN.rstrip())
    theirs.close()
    with pytest.raises(BrokenPipeError):
        ours.send(b"as the daemon's commands will fare")
    monitor = connect_to(ours, context, monkeypatch)
    while monitor.receive():
        pass
    assert fake_qemu.shutdown_file.exists()


def test_what_had_arrived_counts_though_the_peer_left_something_unread(
    context: MonitorContext, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu.bind()
    ours, theirs = socket.socketpair()
    monitor = connect_to(ours, context, monkeypatch)
    theirs.send(GREETING + USER_SHUTDOWN)
    theirs.close()  # with the commands unread: ECONNRESET
    while monitor.receive():
        pass
    assert fake_qemu.shutdown_file.exists()


def test_the_last_ruling_of_one_read_stands_for_all(
    monitor: Monitor, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried_out: list[object] = []
    carry_out = ShutdownFiles.carry_out

    def note(
        files: ShutdownFiles, instance: str, ruling: Ruling, event: float | None
    ) -> LastVerdict | None:
        carried_out.append(ruling)
        return carry_out(files, instance, ruling, event)

    monkeypatch.setattr(ShutdownFiles, "carry_out", note)
    fake_qemu.send((USER_SHUTDOWN + RESET) * 10 + USER_SHUTDOWN)
    monitor.receive()
    assert list(map(str, carried_out)) == ["verdict=user cause=guest-shutdown"]


def test_a_pending_file_makes_no_peer_look_silent(
    context: MonitorContext, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu.listen()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    fake_qemu.negotiate()
    while monitor.phase is not Phase.CONNECTED:
        monitor.receive()
    monkeypatch.setattr(os, "unlink", read_only)
    fake_qemu.disconnect()
    while monitor.receive():
        pass
    assert monitor.is_pending
    monitor.on_timer()  # connects, and tries to remove the file
    monitor.on_timer()
    assert monitor.phase.value == "awaiting greeting"
    monkeypatch.undo()
    monitor.close()


@pytest.mark.parametrize("phase", ["connected", "ended", "gone"])
def test_a_pending_file_is_not_made_beside_the_socket_of_a_new_qemu(
    context: MonitorContext,
    monitor: Monitor,
    fake_qemu: FakeQemu,
    phase: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "mknod", read_only)
    fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    read_all(monitor, context)
    assert monitor.is_pending
    record = {**json.loads(json.dumps(monitor.record())), "phase": phase}
    monitor.close()
    fake_qemu.bind()
    monkeypatch.undo()
    successor = Monitor.restore(record, None, context)
    successor.on_timer()
    assert successor.last is not None and successor.last.file == "superseded"
    assert not fake_qemu.shutdown_file.exists()


def test_a_shutdown_that_is_read_late_makes_no_file_beside_the_socket_of_a_new_qemu(
    monitor: Monitor, fake_qemu: FakeQemu, control_dir: Path
) -> None:
    fake_qemu.send(USER_SHUTDOWN)
    fake_qemu.path.unlink()
    with FakeQemu(control_dir, INSTANCE) as new:
        new.bind()
        monitor.receive()
        assert monitor.last is not None and monitor.last.file == "superseded"
        assert not new.shutdown_file.exists()


def test_a_name_that_is_back_and_whose_backlog_is_full_is_told_of(
    context: MonitorContext,
    successor: Monitor,
    fake_qemu: FakeQemu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def connect(_path: str) -> socket.socket:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(context, "connect", connect)
    away = fake_qemu.path.with_suffix(".away")
    fake_qemu.path.rename(away)
    successor.on_timer()
    assert successor.phase is Phase.GONE
    away.rename(fake_qemu.path)
    successor.on_timer()
    assert successor.phase.value == "connecting"
    pass_time(monkeypatch, PATIENCE)
    successor.on_timer()
    assert successor.phase.value == "not greeted"


def test_a_dead_socket_comes_to_rest_though_it_is_looked_at_again(
    context: MonitorContext, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu.bind()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    pass_time(monkeypatch, PATIENCE)
    monitor.connect()
    assert monitor.phase is Phase.DEAD
    size = os.path.getsize(context.journal.path)
    list(context.loop.expired())
    monitor.connect()  # as a rescan soon after that does
    assert monitor.phase is Phase.DEAD
    assert monitor.due is None
    assert os.path.getsize(context.journal.path) == size


# ---- A peer that costs ---------------------------------------------------------------


def test_a_peer_that_sends_descriptors_is_left_alone_and_told_of(
    context: MonitorContext,
    monitor: Monitor,
    fake_qemu: FakeQemu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    context.log.sinks.append(warnings.append)
    fake_qemu.send_descriptor(UNINTERESTING, 0)
    assert not monitor.receive()
    context.log.flush()
    assert " WARNING web1.example.com: a descriptor came along" in warnings[-1]
    fake_qemu.send(UNINTERESTING)
    pass_time(monkeypatch, HOSTILE_PAUSE / 2)
    assert not ready(context)
    pass_time(monkeypatch, HOSTILE_PAUSE / 2)
    assert ready(context)


def test_a_peer_with_much_to_parse_is_left_alone_for_a_while(
    context: MonitorContext, monitor: Monitor, fake_qemu: FakeQemu
) -> None:
    fake_qemu.send(event_line("RESET") * 500)
    read_all(monitor, context)
    wait_until(lambda: ready(context), "the end of the pause")
    assert not monitor.receive()


def test_a_long_line_counts_as_parsed_from_its_start(
    context: MonitorContext,
    monitor: Monitor,
    fake_qemu: FakeQemu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pass_time(monkeypatch, 0)
    fake_qemu.send(event_line("RESET", data="x" * 60000))
    read_all(monitor, context)
    fake_qemu.send(UNINTERESTING)
    assert not ready(context)


def test_a_peer_that_is_left_alone_has_its_shutdown_file_all_the_same(
    context: MonitorContext,
    monitor: Monitor,
    fake_qemu: FakeQemu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(os, "mknod", read_only)
        fake_qemu.send_descriptor(USER_SHUTDOWN, 0)
        monitor.receive()
    assert not fake_qemu.shutdown_file.exists()
    pass_time(monkeypatch, FILE_RETRY)
    assert list(context.loop.expired()) == [monitor]
    monitor.on_timer()
    assert fake_qemu.shutdown_file.exists()
    fake_qemu.send(UNINTERESTING)
    assert not ready(context)


def test_of_a_closed_connection_nothing_is_kept(
    context: MonitorContext, monitor: Monitor, fake_qemu: FakeQemu
) -> None:
    fake_qemu.send_descriptor(UNINTERESTING, 0)
    monitor.receive()
    assert context.loop.registered == 1
    monitor.close()
    assert context.loop.registered == 0


def test_a_peer_with_nothing_to_parse_is_never_left_alone(
    context: MonitorContext, monitor: Monitor, fake_qemu: FakeQemu
) -> None:
    for _ in range(100):
        fake_qemu.send(UNINTERESTING * 500)
        read_all(monitor, context)
    assert not monitor.receive()


def test_a_peer_that_has_paid_is_heard_at_once(
    context: MonitorContext,
    monitor: Monitor,
    fake_qemu: FakeQemu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_qemu.send(event_line("RESET") * 500)
    read_all(monitor, context)
    pass_time(monkeypatch, 2 * FILL_TIME)
    assert ready(context)
    monitor.receive()
    assert ready(context)


# ---- The record ----------------------------------------------------------------------


def steps(
    context: MonitorContext, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Monitor]:
    """Take a monitor through all that may change what is to be known of it."""
    fake_qemu.listen()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    monitor.on_overdue()
    yield monitor
    fake_qemu.accept()
    fake_qemu.greet()
    monkeypatch.setattr(os, "mknod", read_only)
    for word in (
        *(UNINTERESTING, b"{}\r\n"),
        b'{"id": "kvmd-status", "return": {"status": "running"}}\r\n',
        *(UNINTERESTING, POWERDOWN, UNINTERESTING, RESET, USER_SHUTDOWN),
    ):
        fake_qemu.send(word)
        monitor.receive()
        yield monitor
    monkeypatch.undo()
    monitor.on_timer()
    yield monitor
    fake_qemu.exit()
    monitor.receive()
    yield monitor


def test_the_record_in_the_journal_is_how_an_instance_stands(
    context: MonitorContext, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    for monitor in steps(context, fake_qemu, monkeypatch):
        records = read_journal(context.journal.path).records
        assert records[INSTANCE] == json.loads(json.dumps(monitor.record()))
    assert monitor.phase is Phase.GONE


def test_a_restored_monitor_has_the_same_record(
    context: MonitorContext, monitor: Monitor, fake_qemu: FakeQemu
) -> None:
    fake_qemu.send(POWERDOWN)
    monitor.receive()
    record = json.loads(json.dumps(monitor.record()))
    assert monitor.connection is not None
    connected = monitor.connection.socket.dup()
    monitor.close()
    successor = Monitor.restore(record, connected, context)
    assert json.loads(json.dumps(successor.record())) == record
    successor.close()


def test_a_record_that_makes_no_sense_leaves_nothing_that_is_waited_for(
    context: MonitorContext, monitor: Monitor
) -> None:
    record = {**monitor.record(), "peeked": ["?"]}
    assert monitor.connection is not None
    connected = monitor.connection.socket.dup()
    monitor.close()
    with connected, pytest.raises(ValueError):
        Monitor.restore(record, connected, context)
    assert context.loop.registered == 0


def test_what_was_peeked_takes_no_memory_however_long_a_record_says_that_it_was(
    context: MonitorContext, monitor: Monitor
) -> None:
    record = {**monitor.record(), "peeked": [1 << 60, 0]}
    assert monitor.connection is not None
    connected = monitor.connection.socket.dup()
    monitor.close()
    successor = Monitor.restore(record, connected, context)
    assert successor.connection is not None
    successor.close()


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_connection_that_is_not_greeted_is_recorded_where_it_is_kept(
    context: MonitorContext, fake_qemu: FakeQemu, is_kept: bool
) -> None:
    notify_socket = str(fake_qemu.path.with_name("notify"))
    notifier = Notifier({"NOTIFY_SOCKET": notify_socket} if is_kept else {})
    context.store = DescriptorStore(notifier)
    fake_qemu.listen()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    records = read_journal(context.journal.path).records
    assert [one["phase"] for one in records.values()] == ["awaiting greeting"] * is_kept
    fake_qemu.accept()
    fake_qemu.greet()
    monitor.receive()
    records = read_journal(context.journal.path).records
    assert records[INSTANCE]["phase"] == "connected"
    monitor.close()
    notifier.close()


def test_a_socket_without_a_connection_so_far_is_worth_no_record(
    context: MonitorContext, fake_qemu: FakeQemu
) -> None:
    fake_qemu.bind()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    assert not read_journal(context.journal.path).records


@pytest.fixture
def successor(
    context: MonitorContext, monitor: Monitor, fake_qemu: FakeQemu
) -> Monitor:
    """Return the monitor that goes on, without the connection, after a restart."""
    record = json.loads(json.dumps(monitor.record()))
    monitor.close()
    fake_qemu.disconnect()
    return Monitor.restore(record, None, context)


def test_a_guest_that_went_down_unobserved_counts_as_crashed(
    context: MonitorContext, successor: Monitor, fake_qemu: FakeQemu
) -> None:
    lines: list[str] = []
    context.log.sinks.append(lines.append)
    fake_qemu.exit()
    successor.on_timer()
    context.log.flush()
    assert "went down while it was not monitored" in lines[-2]
    assert " verdict=not-user cause=unobserved " in lines[-1]
    assert successor.last is not None and successor.last.file == "none"


def test_a_qemu_that_still_listens_may_be_about_to_end(
    successor: Monitor, fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu.path.unlink()
    successor.on_timer()
    assert successor.phase is Phase.GONE
    assert not successor.is_idle()
    fake_qemu.exit()
    pass_time(monkeypatch, LONGEST_EXIT)
    successor.on_timer()
    assert successor.last is not None and successor.last.cause == "unobserved"
    assert successor.is_idle()


def test_the_second_look_is_at_names_that_were_read_since(
    context: MonitorContext,
    successor: Monitor,
    fake_qemu: FakeQemu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_qemu.path.unlink()
    successor.on_timer()
    pass_time(monkeypatch, LISTENING_LIFETIME)
    assert context.is_listened_on(fake_qemu.path.name)  # as another monitor asks
    fake_qemu.exit()
    pass_time(monkeypatch, LONGEST_EXIT - LISTENING_LIFETIME)
    successor.on_timer()
    assert successor.last is not None and successor.last.cause == "unobserved"


def test_of_a_qemu_that_goes_on_though_its_name_is_gone_nothing_is_said(
    context: MonitorContext,
    successor: Monitor,
    fake_qemu: FakeQemu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_qemu.path.unlink()
    successor.on_timer()
    assert INSTANCE in read_journal(context.journal.path).records
    pass_time(monkeypatch, LONGEST_EXIT)
    successor.on_timer()
    assert successor.last is None
    assert successor.is_idle()
    assert INSTANCE not in read_journal(context.journal.path).records


def test_a_name_that_is_back_in_time_is_connected_to_and_all_stays_known(
    successor: Monitor, fake_qemu: FakeQemu
) -> None:
    away = fake_qemu.path.with_suffix(".away")
    fake_qemu.path.rename(away)
    successor.on_timer()
    away.rename(fake_qemu.path)
    successor.on_removed()  # an event that is late
    successor.on_timer()
    assert successor.connection is not None
    assert successor.guest.is_alive
    successor.close()


def test_a_new_qemus_socket_tells_that_the_old_one_went_down(
    successor: Monitor, fake_qemu: FakeQemu
) -> None:
    fake_qemu.path.unlink()
    successor.on_timer()
    fake_qemu.bind()
    successor.on_removed()
    assert successor.last is not None and successor.last.cause == "unobserved"
