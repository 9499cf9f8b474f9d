"""The fixtures of all tests: a control directory, the daemon, fake and real QEMUs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

from daemon import INSTANCE, Daemon, control_directory
from fake_qemu import FakeQemu
from node import Node
from qemu import PROGRAM, Qemu, is_installed

from kvmd_context import MonitorContext
from kvmd_journal import Journal
from kvmd_log import Log
from kvmd_loop import Loop
from kvmd_monitor import Monitor
from kvmd_systemd import DescriptorStore, Notifier

StartQemu = Callable[..., Qemu]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs QEMU where it is missing, but not where it has to be there."""
    if item.get_closest_marker("qemu") and not is_installed():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{PROGRAM} is not installed")
        pytest.skip(f"{PROGRAM} is not installed")


@pytest.fixture
def control_dir() -> Iterator[Path]:
    """Return an empty control directory with a short path."""
    with control_directory() as path:
        yield path


@pytest.fixture
def daemon(control_dir: Path) -> Iterator[Daemon]:
    """Return a daemon at work on `control_dir`, which has to stop cleanly."""
    with Daemon(control_dir) as daemon:
        yield daemon
        daemon.stop()


@pytest.fixture
def node(control_dir: Path) -> Iterator[Node]:
    """Return a node with the settings that kvmd needs; nothing may be left running."""
    node = Node(control_dir)
    yield node
    node.end()


@pytest.fixture
def fake_qemu(control_dir: Path) -> Iterator[FakeQemu]:
    """Return a fake QEMU of INSTANCE that has no socket yet."""
    with FakeQemu(control_dir, INSTANCE) as qemu:
        yield qemu


@pytest.fixture
def start_qemu(control_dir: Path) -> Iterator[StartQemu]:
    """Return a function that starts a real QEMU of INSTANCE with further options."""
    with ExitStack() as ending:

        def start(*options: str) -> Qemu:
            qemu = Qemu(control_dir, INSTANCE, *options)
            return ending.enter_context(qemu)

        yield start


@pytest.fixture
def context(control_dir: Path) -> Iterator[MonitorContext]:
    """Return what a monitor needs, with a log that is thrown away."""
    log, store = Log(None, []), DescriptorStore(Notifier({}))
    context = MonitorContext(str(control_dir), log, Loop(), store, 1000)
    state_file = control_dir.parent / "kvmd.state"
    context.journal = Journal(
        str(state_file), str(control_dir), log, lambda: [], lambda: []
    )
    context.journal.begin()
    yield context
    context.journal.close()
    context.loop.close()


@pytest.fixture
def monitor(
    context: MonitorContext, fake_qemu: FakeQemu
) -> Iterator[Monitor]:
    """Return a monitor that has negotiated with the fake QEMU."""
    fake_qemu.listen()
    monitor = Monitor(INSTANCE, ".kvmd", context)
    monitor.connect()
    fake_qemu.negotiate()
    while not monitor.guest.seen_alive:
        monitor.receive()
    yield monitor
    monitor.close()
