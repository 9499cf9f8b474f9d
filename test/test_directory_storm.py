"""The daemon in a storm: directories and sockets come and go faster than it can look.

Whenever the storm rests, exactly the sockets that the path leads to are connected.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from daemon import INSTANCE, INTERPRETER, ROOT, Daemon
from deadline import SECONDS, wait_until
from fake_qemu import FakeQemu
from namespace import require_namespaces
from status import status_table
from variant import program_with

SEED = int(os.environ.get("KVMD_SOAK_SEED", "0"))
AS_ON_A_NODE = "sys.argv.remove('--debug')"

# Without rescans, whatever the watch misses stays missed.
NO_RESCAN = "--rescan-interval=0"
# What gives no event is found by a rescan alone.
RESCAN = "--rescan-interval=0.5"


class Storm:
    """The process that makes the storm (storm.py); with mounts, in its own namespaces.

    `deeds` counts what it did, `connected` the guests that were found connected;
    `slowest` is the longest time in seconds that the daemon took to be right.
    """

    def __init__(self, control_dir: Path, *further_deeds: str) -> None:
        self.control_dir = control_dir
        self.deeds = self.connected = 0
        self.slowest = 0.0
        self.interpreter: tuple[str, ...] = INTERPRETER
        command = [sys.executable, str(ROOT / "test/helpers/storm.py")]
        if "mounts" in further_deeds:
            require_namespaces()
            command[:0] = ["unshare", "--user", "--map-root-user", "--mount"]
        self._process = subprocess.Popen(
            [*command, str(control_dir), str(SEED), *further_deeds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.tell("end")
        if "mounts" in further_deeds:
            enter = ("nsenter", f"--target={self._process.pid}", "--user", "--mount")
            self.interpreter = (*enter, "--preserve-credentials", *INTERPRETER)

    def tell(self, *words: object) -> Any:
        """Tell the process what to do, return what it answers."""
        assert self._process.stdin and self._process.stdout
        print(*words, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def blow_and_rest(self, seconds: float) -> None:
        """Let it storm, then wait until the daemon knows what there is."""
        self.deeds += self.tell("storm", seconds)
        begin = time.monotonic()
        truth = self.tell("rest")
        while truth["mistakes"]:
            if time.monotonic() - begin > SECONDS:
                pytest.fail(f"after {self.deeds} deeds (seed {SEED}): {truth}")
            time.sleep(0.01)
            truth = self.tell("rest")
        self.connected += len(truth["reachable"])
        self.slowest = max(self.slowest, time.monotonic() - begin)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@contextmanager
def daemon_in_storm(
    node: Path, option: str, *further_deeds: str
) -> Iterator[tuple[Storm, Daemon]]:
    """Have a storm in a directory, and a daemon that has come through some of it."""
    path = node / "ctrl" / "run" / "ganeti" / "ctrl"
    storm = Storm(path, *further_deeds)
    try:
        daemon = Daemon(
            node / "ctrl",
            *("--control-dir", str(path), option),
            program=program_with(node, AS_ON_A_NODE),
            interpreter=storm.interpreter,
        )
        with daemon:
            for _ in range(3):
                storm.blow_and_rest(0.3)
            yield storm, daemon
            daemon.stop()
    finally:
        storm.close()


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def inotify_watches(daemon: Daemon) -> int:
    watches = 0
    for path in Path(f"/proc/{daemon.pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # a connection that is gone by now
            watches += path.read_text().count("inotify wd:")
    return watches


def memory(daemon: Daemon) -> int:
    """Return what the daemon holds in memory, in KiB."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    resident = re.search(r"VmRSS:\s*(\d+)", status)
    assert resident
    return int(resident[1])


def calm(storm: Storm, daemon: Daemon) -> None:
    """Have all come to an end, and wait until the daemon knows that."""
    storm.tell("end")
    watches = len(storm.control_dir.parents) + 1
    wait_until(lambda: inotify_watches(daemon) == watches, f"{watches} watches")
    wait_until(lambda: not status_table(daemon), "nothing is monitored")


def weather(storm: Storm, daemon: Daemon, seconds: float) -> None:
    """Let it storm and rest for so long; in the end all is as in the beginning."""
    chance = random.Random(SEED)
    calm(storm, daemon)
    before = descriptors(daemon)
    memory_before = memory(daemon)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        storm.blow_and_rest(chance.choice([0.01, 0.1, 0.1, 0.5]))
    calm(storm, daemon)
    assert descriptors(daemon) == before
    assert memory(daemon) - memory_before < 2048
    assert storm.connected > 0
    print(
        f"{storm.deeds} deeds, {storm.connected} guests connected in the rests;"
        f" right again after {storm.slowest:.3f} s at most"
    )


STORMS = pytest.mark.parametrize(
    ("option", "further_deeds"),
    [(NO_RESCAN, []), (RESCAN, ["symlinks"]), (RESCAN, ["symlinks", "mounts"])],
    ids=["directories", "symlinks", "mounts"],
)


@STORMS
def test_what_can_be_reached_is_connected_whenever_the_storm_rests(
    control_dir: Path, option: str, further_deeds: list[str]
) -> None:
    with daemon_in_storm(control_dir.parent, option, *further_deeds) as in_storm:
        weather(*in_storm, seconds=2)


@pytest.mark.soak
@STORMS
def test_long_storm_changes_nothing(
    control_dir: Path, option: str, further_deeds: list[str]
) -> None:
    seconds = float(os.environ.get("KVMD_SOAK_SECONDS", "60"))
    with daemon_in_storm(control_dir.parent, option, *further_deeds) as in_storm:
        weather(*in_storm, seconds=seconds)


# Once, as the file `haste` wants it, the path changes too fast to be followed.
HASTE = """
follow = kvmd_inotify.DirectoryWatch.follow

def follow_if_there_is_time(watch):
    try:
        kvmd.os.unlink({haste!r})
    except FileNotFoundError:
        return follow(watch)
    watch.settled = False
    return []

kvmd_inotify.DirectoryWatch.follow = follow_if_there_is_time
"""


def test_path_that_changed_too_fast_is_looked_at_again_without_any_event(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    haste = control_dir.parent / "haste"
    program = program_with(control_dir.parent, HASTE.format(haste=str(haste)))
    control_dir.rmdir()
    with Daemon(control_dir, NO_RESCAN, program=program) as daemon:
        haste.touch()
        control_dir.mkdir()
        fake_qemu.listen()
        fake_qemu.negotiate()
        daemon.wait_until_connected(INSTANCE)
        assert not haste.exists()
        daemon.stop()
