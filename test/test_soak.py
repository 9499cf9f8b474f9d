"""A long life: guests come and go, crash and power off; so do the daemon and its paths.

`make soak` runs it for KVMD_SOAK_SECONDS; `make check` for some seconds.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from crowd import Crowd
from daemon import Daemon
from deadline import wait_until
from status import status_table
from variant import program_with

# The program that takes its place is started without it.
AS_ON_A_NODE = "if '--debug' in sys.argv: sys.argv.remove('--debug')"
GUESTS = 40
SEED = int(os.environ.get("KVMD_SOAK_SEED", "0"))


class Life:
    """Guests and a daemon, what happens to them, and what has to be known of it."""

    def __init__(self, daemon: Daemon, crowd: Crowd, random: random.Random) -> None:
        self.daemon = daemon
        self.crowd = crowd
        self.random = random
        self.lives = 0

    def start_guests(self) -> None:
        """Start as many guests as there is room for, and have them watched."""
        names = [f"guest{self.lives + number}" for number in range(GUESTS)]
        names = names[: GUESTS - len(self.crowd.names)]
        self.lives += len(names)
        self.crowd.start(names)
        self.settle()

    def settle(self) -> None:
        """Wait until the daemon knows what it can know: all guests that run."""
        self.crowd.serve_until_connected(self.crowd.names)
        wanted = {f"{name}.kvmd" for name in self.crowd.names}

        def is_settled() -> bool:
            self.crowd.serve(lambda: True, "")
            table = status_table(self.daemon)
            heard = {name for name, said in table.items() if said[:9] == "connected"}
            return heard == wanted

        wait_until(is_settled, "exactly the guests that run are connected")

    def end_guests(self) -> None:
        """Power some guests off, crash and end others; each verdict has to be right."""
        by_user, by_others = [], []
        for name in self.random.sample(self.crowd.names, GUESTS // 2):
            if self.random.random() < 0.5:
                by_user.append(name)
                self.crowd.power_off(name)
            else:
                by_others.append(name)
                self.random.choice([self.crowd.crash, self.crowd.end])(name)
        for name in by_user:
            wait_until(self.crowd.shutdown_file(name).exists, f"the verdict on {name}")
            self.crowd.shutdown_file(name).unlink()  # as Ganeti does
        for name in by_others:
            self.crowd.remove_socket(name)
        self.settle()
        for name in by_user + by_others:
            assert not self.crowd.shutdown_file(name).exists()

    def restart_daemon(self) -> None:
        """End the daemon, one way or another, and start it again."""
        if self.random.random() < 0.5:
            self.daemon.stop()
        else:
            self.daemon.end()
        self.crowd.drop_clients()
        self.daemon.start()

    def replace_program(self) -> None:
        """Have the daemon replace itself; nothing may be lost meanwhile."""
        self.daemon.send_signal(signal.SIGUSR2)

    def storm(self) -> None:
        """Take the control directory away and put it back, whole or in pieces."""
        directory = self.crowd.control_dir
        away = directory.with_name("away")
        for _ in range(self.random.randrange(1, 20)):
            directory.rename(away)
            if self.random.random() < 0.5:
                directory.mkdir()
                (directory / "lost.kvmd").touch()
                (directory / "lost.kvmd").unlink()
                directory.rmdir()
            away.rename(directory)

    def flood_directory(self) -> None:
        """Have more names come and go than the kernel keeps events of."""
        for number in range(self.random.randrange(20000)):
            path = self.crowd.control_dir / f"flood{number % 7}.kvmd"
            path.touch()
            path.unlink()

    def live(self, until: float) -> None:
        """Let things happen, in any order."""
        happenings = [
            *(self.end_guests, self.end_guests, self.storm),
            *(self.flood_directory, self.restart_daemon, self.replace_program),
        ]
        while time.monotonic() < until:
            self.start_guests()
            self.random.choice(happenings)()
            self.settle()


@pytest.fixture
def life(control_dir: Path) -> Iterator[Life]:
    """Return a daemon that looks twice a second, and no guests yet."""
    program = program_with(control_dir.parent, AS_ON_A_NODE)
    daemon = Daemon(control_dir, "--rescan-interval=0.5", program=program)
    with daemon, Crowd(control_dir) as crowd:
        yield Life(daemon, crowd, random.Random(SEED))
        daemon.stop()


def usage(life: Life) -> tuple[int, int]:
    """Return the daemon's descriptors and its memory in KiB, with no guest running."""
    for name in life.crowd.names:
        life.crowd.end(name)
    wait_until(lambda: not status_table(life.daemon), "all are gone")
    process = Path(f"/proc/{life.daemon.pid}")
    resident = re.search(r"VmRSS:\s*(\d+)", (process / "status").read_text())
    assert resident
    return len(list((process / "fd").iterdir())), int(resident[1])


def test_a_life_of_crashes_restarts_and_storms(life: Life) -> None:
    life.live(until=time.monotonic() + 4)


@pytest.mark.soak
def test_a_long_life_of_crashes_restarts_and_storms(life: Life) -> None:
    seconds = float(os.environ.get("KVMD_SOAK_SECONDS", "60"))
    life.live(until=time.monotonic() + seconds)
    print(f"{life.lives} guests in {seconds:.0f} s")


@pytest.mark.soak
def test_nothing_grows_with_the_guests_that_were(life: Life) -> None:
    seconds = float(os.environ.get("KVMD_SOAK_SECONDS", "60"))
    begin = time.monotonic()

    def pass_guests(until: float) -> None:
        while time.monotonic() < until:
            life.start_guests()
            life.end_guests()
            life.storm()

    pass_guests(begin + seconds / 4)
    life.settle()
    descriptors, memory = usage(life)
    pass_guests(begin + seconds)
    life.settle()
    more_descriptors, more_memory = usage(life)
    assert more_descriptors == descriptors
    assert more_memory - memory < 1024
    print(f"{life.lives} guests in {seconds:.0f} s: {memory} to {more_memory} KiB")
