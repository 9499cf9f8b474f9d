"""The set of monitors, against a control directory, without the daemon."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from clock import pass_time
from daemon import INSTANCE
from fake_qemu import FakeQemu

from kvmd_context import MonitorContext, Phase
from kvmd_inotify import Changes, DirectoryWatch
from kvmd_instances import CHECKS_PER_TURN, SETTLING_TIME, Instances
from kvmd_loop import NEVER
from kvmd_monitor import Monitor


@pytest.fixture
def instances(context: MonitorContext) -> Iterator[Instances]:
    """Return an empty set of monitors, which looks at the directory when told to."""
    instances = Instances(context, (".kvmd",), 0)
    yield instances
    for monitor in instances.monitors.values():
        monitor.close()


@pytest.fixture
def names(control_dir: Path) -> Iterator[list[str]]:
    """Return instances whose sockets are listened on: more than a turn looks at."""
    names = [f"web{number}" for number in range(CHECKS_PER_TURN + 1)]
    with ExitStack() as stack:
        for name in names:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(control_dir / f"{name}.kvmd"))
            listener.listen(1)
        yield names


def check_all(instances: Instances) -> None:
    """Look at all instances, in as many turns as that takes."""
    instances.rescan()
    while instances.deadline() <= time.monotonic():
        instances.check_some()


def test_a_turn_looks_at_some_of_many_instances_and_the_next_one_follows_at_once(
    instances: Instances, names: list[str]
) -> None:
    instances.rescan()
    assert instances.deadline() < NEVER
    assert instances.monitors == {}
    instances.check_some()
    assert len(instances.monitors) == CHECKS_PER_TURN
    assert instances.deadline() < NEVER
    instances.check_some()
    assert instances.monitors.keys() == set(names)
    assert instances.deadline() == NEVER


def test_of_a_name_that_is_gone_without_an_event_the_next_rescan_tells(
    instances: Instances, control_dir: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(control_dir / "web1.kvmd"))  # and never listens
        check_all(instances)
        assert "web1" in instances.monitors
        (control_dir / "web1.kvmd").unlink()
        check_all(instances)
    assert instances.monitors == {}


@pytest.mark.parametrize("changes", [([], True, False), ([], False, True)])
def test_after_a_change_of_the_path_or_a_loss_of_events_all_is_looked_at(
    instances: Instances,
    fake_qemu: FakeQemu,
    monkeypatch: pytest.MonkeyPatch,
    changes: tuple[list[tuple[str, bool]], bool, bool],
) -> None:
    check_all(instances)
    fake_qemu.listen()
    monkeypatch.setattr(DirectoryWatch, "read", lambda _watch: Changes(*changes))
    instances.receive()
    instances.check_some()
    assert INSTANCE in instances.monitors


def test_of_an_instance_that_is_gone_for_good_the_record_is_all_that_is_kept(
    context: MonitorContext, instances: Instances, fake_qemu: FakeQemu
) -> None:
    check_all(instances)
    fake_qemu.bind()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    fake_qemu.path.unlink()
    monitor.on_removed()
    context.loop.set_timer(monitor, 0)
    list(context.loop.expired())
    record = json.loads(json.dumps(monitor.record()))
    assert instances.restore(record, None)
    assert instances.monitors == {}
    assert context.journal.gone == {INSTANCE: record}
    assert context.loop.next_timer() == NEVER


def test_a_kvmd_that_is_gone_without_an_event_makes_way_for_the_qmp(
    auto: Instances, control_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeQemu(control_dir, INSTANCE, ".qmp") as qmp:
        qmp.listen()
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(control_dir / f"{INSTANCE}.kvmd"))  # and never listens
            check_all(auto)
        (control_dir / f"{INSTANCE}.kvmd").unlink()
        check_all(auto)
        assert auto.monitors == {}
        pass_time(monkeypatch, SETTLING_TIME)
        auto.check_some()
        assert auto.monitors[INSTANCE].suffix == ".qmp"


def test_a_connection_goes_on_though_its_name_is_gone(
    instances: Instances, names: list[str], control_dir: Path
) -> None:
    check_all(instances)
    (control_dir / "web1.kvmd").unlink()
    check_all(instances)
    assert instances.monitors["web1"].connection is not None


@pytest.mark.parametrize("attempt", [Monitor.connect, Monitor.on_timer])
def test_a_new_qemu_in_the_place_of_one_that_crashed_gets_a_monitor_of_its_own(
    instances: Instances, fake_qemu: FakeQemu, attempt: Callable[[Monitor], None]
) -> None:
    fake_qemu.listen()
    fake_qemu.crash()
    check_all(instances)
    old = instances.monitors[INSTANCE]
    old.guest.on_event("POWERDOWN", None, None)
    fake_qemu.listen()
    instances.perform(old, attempt)
    instances.receive()
    new = instances.monitors[INSTANCE]
    assert new is not old
    assert new.connection is not None
    assert not new.guest.powerdown_requested


@pytest.mark.parametrize("suffix", [".kvmd", ".qmp"])
def test_a_name_that_is_back_after_a_restart_is_connected_to_at_once(
    context: MonitorContext, control_dir: Path, suffix: str
) -> None:
    with FakeQemu(control_dir, INSTANCE, suffix) as qemu:
        qemu.listen()
        instances = Instances(context, (suffix,), 0)
        check_all(instances)
        known = instances.monitors.pop(INSTANCE)
        known.guest.on_event("POWERDOWN", None, None)
        record = json.loads(json.dumps(known.record()))
        known.close()
        away = qemu.path.rename(qemu.path.with_suffix(".away"))
        instances.restore(record, None)
        instances.perform(instances.monitors[INSTANCE], Monitor.on_timer)
        away.rename(qemu.path)
        instances.receive()
        restored = instances.monitors[INSTANCE]
        assert restored.connection is not None
        assert restored.guest.powerdown_requested
        restored.close()


# ---- A .qmp alone --------------------------------------------------------------------


@pytest.fixture
def auto(context: MonitorContext) -> Iterator[Instances]:
    """Return an empty set of monitors that uses a .qmp where there is no .kvmd."""
    auto = Instances(context, (".kvmd", ".qmp"), 0)
    yield auto
    for monitor in auto.monitors.values():
        monitor.close()


@pytest.fixture
def qmp(control_dir: Path) -> Iterator[FakeQemu]:
    """Return a fake QEMU of INSTANCE that has only a .qmp, and that not yet."""
    with FakeQemu(control_dir, INSTANCE, ".qmp") as qemu:
        yield qemu


def test_after_a_crash_too_a_qmp_stands_alone_for_a_while_before_it_is_used(
    auto: Instances, qmp: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    qmp.listen()
    check_all(auto)
    pass_time(monkeypatch, SETTLING_TIME)
    auto.check_some()
    old = auto.monitors[INSTANCE]
    qmp.crash()
    auto.perform(old, Monitor.receive)
    assert old.phase is Phase.CONNECTING
    qmp.listen()
    auto.perform(old, Monitor.on_timer)
    auto.receive()
    assert auto.monitors == {}
    pass_time(monkeypatch, SETTLING_TIME)
    auto.check_some()
    assert auto.monitors[INSTANCE].connection is not None


def test_a_qmp_that_was_away_has_to_stand_alone_for_a_while_again(
    auto: Instances, qmp: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    qmp.listen()
    check_all(auto)
    pass_time(monkeypatch, 0.9 * SETTLING_TIME)
    qmp.exit()
    qmp.listen()
    auto.receive()
    pass_time(monkeypatch, 0.9 * SETTLING_TIME)
    auto.check_some()
    assert auto.monitors == {}
    pass_time(monkeypatch, 0.2 * SETTLING_TIME)
    auto.check_some()
    assert auto.monitors[INSTANCE].connection is not None


@pytest.mark.parametrize("way", ["start", "end"])
def test_at_a_usual_start_or_end_nobody_is_asked_who_listens(
    auto: Instances,
    qmp: FakeQemu,
    fake_qemu: FakeQemu,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qmp.listen()
    check_all(auto)
    fake_qemu.listen()
    auto.receive()
    if way == "end":
        fake_qemu.exit()
        auto.perform(auto.monitors[INSTANCE], Monitor.receive)
        auto.receive()
        qmp.exit()
        auto.receive()

    def fail(_directory: str) -> set[str]:
        raise AssertionError("that takes long")

    monkeypatch.setattr("kvmd_context.listening_names", fail)
    pass_time(monkeypatch, SETTLING_TIME)
    auto.check_some()


# ---- What goes wrong -----------------------------------------------------------------


def test_an_unexpected_error_costs_one_connection(
    context: MonitorContext, instances: Instances, names: list[str]
) -> None:
    lines: list[str] = []
    context.log.sinks.append(lines.append)
    check_all(instances)

    def fail(_monitor: Monitor) -> None:
        raise ZeroDivisionError

    instances.perform(instances.monitors["web1"], fail)
    context.log.flush()
    assert " ERROR web1: unexpected error; connecting anew" in "".join(lines)
    unconnected = [
        name for name, one in instances.monitors.items() if one.connection is None
    ]
    assert unconnected == ["web1"]
