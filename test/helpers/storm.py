"""A process that lets directories and sockets come and go at full speed.

It knows the truth: what the control directory's path means at a moment, and to which
of its sockets a client is connected. It is told what to do on stdin, by a word a line
("storm SECONDS", "rest", "end"), and answers each with a line of JSON.

Usage: storm.py CONTROL_DIR SEED [symlinks] [mounts]
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fake_qemu import event_line

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}}}\r\n'
    b'{"return": {}}\r\n{"return": {"status": "running"}, "id": "kvmd-status"}\r\n'
)
POWEROFF = event_line("SHUTDOWN", guest=True, reason="guest-shutdown")

INSTANCES = [f"web{number}" for number in range(6)]
#: Guests that may run at a time, most of them where the path leads no longer.
GUESTS = 24
#: Directories that may be kept where they were moved to.
MOVED_AWAY = 4
#: Directories that may be held open.
HELD = 4

LIBC = ctypes.CDLL(None, use_errno=True)
MS_BIND = 0x1000
MNT_DETACH = 2


class Guest:
    """A QEMU: its listener and its clients, wherever its socket file is by now."""

    def __init__(self, path: Path) -> None:
        """Bind the socket; nobody listens yet."""
        self.instance = path.stem
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._clients: list[socket.socket] = []
        self.is_listening = False
        try:
            self._listener.bind(str(path))
            status = os.lstat(path)
        except OSError:
            self._listener.close()
            raise
        #: What the socket's file is known by: its device and inode.
        self.file = (status.st_dev, status.st_ino)

    def listen(self) -> None:
        """Listen, with the backlog that QEMU has."""
        self._listener.listen(1)
        self.is_listening = True

    def serve(self) -> int:
        """Take and greet new clients, let go of those that left; count the others."""
        if self.is_listening:
            with suppress(BlockingIOError):
                while True:
                    self._greet(self._listener.accept()[0])
        self._clients = [client for client in self._clients if self._stays(client)]
        return len(self._clients)

    def _greet(self, client: socket.socket) -> None:
        client.setblocking(False)
        self._clients.append(client)
        with suppress(OSError):  # it may have left already
            client.send(GREETING)

    def _stays(self, client: socket.socket) -> bool:
        try:
            while client.recv(4096):
                pass
        except BlockingIOError:
            return True
        except ConnectionError:
            pass
        client.close()
        return False

    def power_off(self) -> None:
        """Say what QEMU says when the guest's user ends it."""
        for client in self._clients:
            with suppress(OSError):
                client.send(POWEROFF)

    def end(self) -> None:
        """Close everything; the socket's file stays."""
        self._listener.close()
        for client in self._clients:
            client.close()


class Storm:
    """What there is, and what may be done to it."""

    def __init__(self, control_dir: Path, seed: int, *further_deeds: str) -> None:
        #: The parts of the path that come and go, outermost first.
        self.parts = [control_dir.parent.parent, control_dir.parent, control_dir]
        self.control_dir = control_dir
        self.node = control_dir.parent.parent.parent
        self.chance = random.Random(seed)
        self.guests: list[Guest] = []
        self._numbers = itertools.count()
        self._moved_away: list[tuple[Path, Path]] = []
        self._held: list[int] = []
        self._deeds: list[Callable[[], None]] = [
            *[self.start_guest] * 8,
            *[self.listen] * 6,
            *[self.end_guest] * 4,
            *[self.unlink_socket, self.plant, self.make_one_part] * 2,
            *[self.make_all, self.move_away, self.move_back, self.move_in] * 2,
            *[self.remove, self.hold_open, self.replace_held],
        ]
        if "symlinks" in further_deeds:
            self._deeds += [self.swap_symlink] * 2
        if "mounts" in further_deeds:
            self._deeds += [self.mount, self.mount, self.bind_mount, self.unmount]

    # Deeds: each does one thing, or raises OSError where that can't be done now.

    def socket_path(self) -> Path:
        return self.control_dir / (self.chance.choice(INSTANCES) + ".kvmd")

    def start_guest(self) -> None:
        """Bind a new socket, in the place of an older one, or renamed over that."""
        path = self.socket_path()
        if self.chance.random() < 0.5:
            with suppress(FileNotFoundError):
                path.unlink()
            guest = Guest(path)
        else:
            guest = Guest(path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
        self.guests.append(guest)
        if self.chance.random() < 0.5:
            guest.listen()
        if len(self.guests) > GUESTS:
            self.guests.pop(0).end()

    def listen(self) -> None:
        for guest in self.guests:
            if not guest.is_listening:
                guest.listen()
                return

    def end_guest(self) -> None:
        """End a guest as QEMU does, or as SIGKILL does: its socket's file stays."""
        if not self.guests:
            return
        guest = self.guests.pop(self.chance.randrange(len(self.guests)))
        guest.serve()
        if self.chance.random() < 0.3:
            guest.power_off()
        with suppress(OSError):
            if self.chance.random() < 0.7:
                self.file_of(guest).unlink()
        guest.end()

    def file_of(self, guest: Guest) -> Path:
        """Return a guest's socket file. Raises FileNotFoundError if it is elsewhere."""
        path = self.control_dir / f"{guest.instance}.kvmd"
        status = path.lstat()
        if (status.st_dev, status.st_ino) != guest.file:
            raise FileNotFoundError(path)
        return path

    def unlink_socket(self) -> None:
        self.socket_path().unlink()

    def plant(self) -> None:
        """Plant what is no socket."""
        plants = [Path.touch, Path.mkdir, os.mkfifo]
        self.chance.choice(plants)(self.socket_path())  # type: ignore[operator]

    def make_one_part(self) -> None:
        for part in self.parts:
            if not part.is_dir():
                part.mkdir()
                return

    def make_all(self) -> None:
        self.control_dir.mkdir(parents=True)

    def move_away(self) -> None:
        part = self.chance.choice(self.parts)
        away = self.node / f"away{next(self._numbers)}"
        part.rename(away)
        self._moved_away.append((part, away))
        if len(self._moved_away) > MOVED_AWAY:
            self.erase(self._moved_away.pop(0)[1])

    def move_back(self) -> None:
        if self._moved_away:
            self.chance.shuffle(self._moved_away)
            part, away = self._moved_away[-1]
            away.rename(part)
            self._moved_away.pop()

    def move_in(self) -> None:
        """Have a part of the path appear with all that is below it, and a guest."""
        part = self.chance.choice(self.parts)
        new = self.node / f"new{next(self._numbers)}"
        directory = new.joinpath(*self.control_dir.parts[len(part.parts) :])
        directory.mkdir(parents=True)
        guest = Guest(directory / self.socket_path().name)
        guest.listen()
        self.guests.append(guest)
        try:
            new.rename(part)
        except OSError:
            self.erase(new)
            raise

    def remove(self) -> None:
        self.erase(self.chance.choice(self.parts))

    def erase(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)

    def hold_open(self) -> None:
        """Hold a directory open, so that its removal gives no IN_DELETE_SELF."""
        part = self.chance.choice(self.parts)
        self._held.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY))
        if len(self._held) > HELD:
            os.close(self._held.pop(0))

    def replace_held(self) -> None:
        """Hold a directory open, remove it, and make it anew."""
        self.hold_open()
        self.erase(self.control_dir)
        self.control_dir.mkdir()

    def swap_symlink(self) -> None:
        """Have the outermost part be a symlink to one directory or another, or none."""
        first = self.parts[0]
        if not first.is_symlink():
            with suppress(OSError):
                first.rename(self.node / "one")
        new = self.node / "symlink"
        new.symlink_to(self.chance.choice(["one", "two", "nowhere"]))
        try:
            new.rename(first)
        except OSError:
            new.unlink()
            raise
        with suppress(FileExistsError):
            (self.node / "two" / "ganeti" / "ctrl").mkdir(parents=True)

    def mount(self) -> None:
        """Mount a new file system over a part of the path."""
        part = bytes(self.chance.choice(self.parts))
        check(LIBC.mount(b"kvmd-test", part, b"tmpfs", 0, b"size=1m"))

    def bind_mount(self) -> None:
        """Mount a directory from elsewhere over a part of the path."""
        if self._moved_away:
            part = bytes(self.chance.choice(self.parts))
            away = bytes(self.chance.choice(self._moved_away)[1])
            check(LIBC.mount(away, part, None, MS_BIND, None))

    def unmount(self) -> None:
        part = bytes(self.chance.choice(self.parts))
        check(LIBC.umount2(part, MNT_DETACH))

    # What the process is told.

    def storm(self, seconds: float) -> int:
        """Do as much as can be done in so many seconds; return how many deeds."""
        end = time.monotonic() + seconds
        deeds = 0
        while time.monotonic() < end:
            with suppress(OSError):
                self.chance.choice(self._deeds)()
                deeds += 1
            if deeds % 16 == 0:
                for guest in self.guests:
                    guest.serve()
        if self.chance.random() < 0.9:
            self.make_reachable()
        for guest in self.guests:
            if not guest.is_listening:
                guest.listen()
        return deeds

    def make_reachable(self) -> None:
        """See to it that there are a directory and guests in it."""
        if self.parts[0].is_symlink() and not self.parts[0].exists():
            self.parts[0].unlink()
        with suppress(OSError):  # what is mounted on the path may have been removed
            self.control_dir.mkdir(parents=True, exist_ok=True)
        for _ in range(self.chance.randint(1, 3)):
            with suppress(OSError):
                self.start_guest()

    def truth(self) -> dict[str, object]:
        """Return which guests can be reached, and which have not the clients due."""
        reachable = {
            guest.instance: guest for guest in self.guests if self.is_reachable(guest)
        }
        mistakes = []
        for guest in self.guests:
            clients = guest.serve()
            in_its_place = reachable.get(guest.instance)
            if in_its_place is guest:
                due, where = {1}, "in reach"
            elif in_its_place is None:
                # It may be listened to, until there is another one.
                due, where = {0, 1}, "out of reach"
            else:
                due, where = {0}, "replaced"
            if clients not in due:
                mistakes.append(f"{guest.instance}, {where}, has {clients} clients")
        return {"reachable": list(reachable), "mistakes": mistakes}

    def is_reachable(self, guest: Guest) -> bool:
        """Tell whether the control directory's path leads to a guest's socket."""
        try:
            return stat.S_ISSOCK(self.file_of(guest).lstat().st_mode)
        except OSError:
            return False

    def end(self) -> None:
        """End all guests, undo all mounts, leave an empty control directory."""
        for guest in self.guests:
            guest.end()
        for fd in self._held:
            os.close(fd)
        self.guests, self._held, self._moved_away = [], [], []
        for mount_point in self.mount_points():
            check(LIBC.umount2(mount_point.encode(), MNT_DETACH))
        if self.parts[0].is_symlink():
            self.parts[0].unlink()
        for path in self.node.iterdir():
            if path.is_dir() and not path.is_symlink():
                self.erase(path)
        # A shutdown file that the daemon made meanwhile may have kept a directory.
        self.control_dir.mkdir(parents=True, exist_ok=True)

    def mount_points(self) -> list[str]:
        """Return what is mounted below the node's directory, the newest first."""
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        points = [line.split()[1] for line in reversed(mounts)]
        return [point for point in points if point.startswith(f"{self.node}/")]


def check(result: int) -> None:
    """Raise OSError if a system call has failed."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> None:
    """Do what is said on stdin."""
    control_dir, seed, *further_deeds = sys.argv[1:]
    storm = Storm(Path(control_dir), int(seed), *further_deeds)
    for line in sys.stdin:
        word, *arguments = line.split()
        answer: object = None
        if word == "storm":
            answer = storm.storm(float(arguments[0]))
        elif word == "rest":
            answer = storm.truth()
        else:
            storm.end()
        print(json.dumps(answer), flush=True)
    storm.end()


if __name__ == "__main__":
    main()
