"""Real QEMU processes, started as Ganeti starts them.

Each has the monitor sockets that Ganeti gives it. `.kvmd` is left to the
daemon; the tests drive QEMU over `.qmp`, as Ganeti does, and the guest in it
over its serial port.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import guest
from deadline import SECONDS, wait_until

PROGRAM = "qemu-system-x86_64"

# Software emulation: this guest does little but port I/O, which is slow where
# it has to leave a virtual machine, above all one inside another.
MACHINE = "pc,accel=tcg"

Message = dict[str, Any]


def is_installed() -> bool:
    """Tell whether this machine has QEMU."""
    return shutil.which(PROGRAM) is not None


def installed_version() -> str:
    """Return the version of this machine's QEMU."""
    result = subprocess.run(
        [PROGRAM, "--version"], capture_output=True, check=True, text=True
    )
    return result.stdout.split("version ")[1].split()[0]


class QmpClient:
    """One client of a QMP monitor. `events` are all that have come in so far."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        self.events: list[Message] = []
        self._waited_for = 0
        self._receive()  # the greeting
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        """Have a command carried out, return what it returns."""
        message = {"execute": name, "arguments": arguments}
        self._connection.sendall(json.dumps(message).encode())
        reply = self._receive()
        while "event" in reply:
            reply = self._receive()
        if "return" not in reply:
            raise ValueError(f"{name}: {reply}")
        return reply["return"]

    def wait_for_event(self, name: str) -> Message:
        """Return the next event of that name, passing over others before it."""
        while True:
            while self._waited_for == len(self.events):
                self._receive()
            event = self.events[self._waited_for]
            self._waited_for += 1
            if event["event"] == name:
                return event

    def read_to_end(self) -> None:
        """Take in what QEMU has sent until its end."""
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                self._receive()

    def close(self) -> None:
        """End the connection."""
        self._lines.close()
        self._connection.close()

    def _receive(self) -> Message:
        line = self._lines.readline()
        if not line:
            raise EOFError("QEMU has closed the monitor's connection")
        message: Message = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message


class Qemu:
    """A QEMU process whose guest is paused until `boot`.

    Where a migration comes in, it runs when it arrives. `options` are QEMU's,
    such as `-no-reboot`.
    """

    def __init__(self, control_dir: Path, name: str, *options: str) -> None:
        self.name = name
        self._control_dir = control_dir
        disk = control_dir.parent / f"{name}.disk"
        disk.write_bytes(guest.boot_sector())
        self.process = subprocess.Popen(
            [
                # The order is that of Ganeti's command line.
                *(PROGRAM, "-name", name, "-m", "16", "-machine", MACHINE),
                *("-monitor", self._server("monitor")),
                *("-serial", self._server("serial")),
                *("-nodefaults", "-display", "none", "-device", "pvpanic"),
                *("-qmp", self._server("qmp")),
                *("-qmp", self._server("kvmd")),
                *("-drive", f"file={disk},format=raw,if=floppy,readonly=on"),
                *options,
                *(() if "-incoming" in options else ("-S",)),
            ],
            cwd=control_dir.parent,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._serial: socket.socket | None = None
        self._qmp: QmpClient | None = None
        try:
            self._serial = self._connect("serial")
            self._qmp = QmpClient(self._connect("qmp"))
        except BaseException:
            self.end()
            raise

    @property
    def shutdown_file(self) -> Path:
        """The file that tells Ganeti of a shutdown by the user."""
        return self._control_dir / f"{self.name}.shutdown"

    @property
    def watched_socket(self) -> Path:
        """The monitor socket that exists for the daemon."""
        return self._control_dir / f"{self.name}.kvmd"

    @property
    def qmp(self) -> QmpClient:
        """The client that Ganeti would be."""
        assert self._qmp
        return self._qmp

    def boot(self) -> None:
        """Let the guest run, and wait until it is ready."""
        self.qmp.command("cont")
        self.wait_until_guest_is_ready()

    def migrate_to(self, uri: str) -> None:
        """Move the guest to the QEMU that was started with `-incoming uri`."""
        self.qmp.command("migrate", uri=uri)
        wait_until(
            lambda: self.qmp.command("query-migrate").get("status") == "completed",
            f"{self.name} has migrated",
        )

    def tell_guest(self, letter: bytes) -> None:
        """Give the guest one of its commands."""
        assert self._serial
        self._serial.sendall(letter)

    def reboot_guest(self) -> None:
        """Have the guest reset itself, and wait until it is back."""
        self.tell_guest(guest.REBOOT)
        self.wait_until_guest_is_ready()

    def have_guest_do(self, letter: bytes) -> None:
        """Give the guest a command that it outlives, and wait until it is done."""
        self.tell_guest(letter)
        self.wait_until_guest_has_done(letter)

    def make_guest_obey_power_button(self) -> None:
        """Have the guest power off at `system_powerdown`, until its next boot."""
        self.have_guest_do(guest.OBEY_POWER_BUTTON)

    def wait_until_guest_is_ready(self) -> None:
        """Wait until the guest has booted, for the first time or anew."""
        self._expect_of_guest(guest.READY)

    def wait_until_guest_has_done(self, letter: bytes) -> None:
        """Wait for the guest's answer to a command."""
        self._expect_of_guest(letter)

    def wait_until_watched(self) -> None:
        """Wait until a client is connected to `.kvmd`."""
        wait_until(self._is_watched, f"a client is connected to {self.name}.kvmd")

    def wait_until_gone(self) -> int:
        """Wait for the end of the process, return its exit status."""
        return self.process.wait(SECONDS)

    def end(self) -> None:
        """End the process, if it still runs, and leave nothing of it."""
        self.process.kill()
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()
        if self._serial:
            self._serial.close()
        if self._qmp:
            self._qmp.close()

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _socket_path(self, suffix: str) -> str:
        return str(self._control_dir / f"{self.name}.{suffix}")

    def _server(self, suffix: str) -> str:
        return f"unix:{self._socket_path(suffix)},server=on,wait=off"

    def _connect(self, suffix: str) -> socket.socket:
        """Connect to a socket of the process, which may not listen yet."""
        connection = socket.socket(socket.AF_UNIX)

        def is_connected() -> bool:
            if self.process.poll() is not None:
                _, complaint = self.process.communicate()
                raise ChildProcessError(f"QEMU has ended: {complaint.decode()}")
            return connection.connect_ex(self._socket_path(suffix)) == 0

        try:
            wait_until(is_connected, f"{self.name}.{suffix} listens")
        except BaseException:
            connection.close()
            raise
        connection.settimeout(SECONDS)
        return connection

    def _expect_of_guest(self, letter: bytes) -> None:
        """Wait for an answer; before READY comes that to what ended the last boot."""
        assert self._serial
        answer = b""
        while answer != letter:
            answer = self._serial.recv(1)
            if not answer:
                raise EOFError("QEMU has closed the serial port")

    def _is_watched(self) -> bool:
        [monitor] = [
            device["filename"]
            for device in self.qmp.command("query-chardev")
            if self._socket_path("kvmd") in device["filename"]
        ]
        return not monitor.startswith("disconnected:")
