"""A QEMU that says only what a test has it say, over a QMP socket of its own."""

from __future__ import annotations

import fcntl
import json
import select
import socket
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from deadline import SECONDS, wait_until

Message = dict[str, Any]
Version = tuple[int, int, int]


class FakeQemu:
    """One end of a QMP socket, as QEMU is it; every call does one thing, then returns.

    As in QEMU, one client is served at a time, the others wait in the backlog;
    an event goes to a client that has negotiated, else nowhere. A call that
    waits for the client fails after deadline.SECONDS.
    """

    def __init__(
        self,
        control_dir: Path,
        name: str,
        suffix: str = ".kvmd",
        version: Version = (7, 2, 22),
    ) -> None:
        self.name = name
        self.path = control_dir / (name + suffix)
        self.shutdown_file = control_dir / f"{name}.shutdown"
        self._version = version
        self._listener: socket.socket | None = None
        self._client: socket.socket | None = None
        self._negotiated = False

    def bind(self) -> None:
        """Make the socket file, in the place of one that is there; don't listen yet."""
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(SECONDS)
        self._listener.bind(str(self.path))

    def listen(self) -> None:
        """Take connections from now on, with the backlog that QEMU has."""
        if not self._listener:
            self.bind()
        assert self._listener
        self._listener.listen(1)

    def accept(self) -> None:
        """Wait for a client."""
        assert self._listener and not self._client
        self._client, _ = self._listener.accept()
        self._client.settimeout(SECONDS)

    def greet(self) -> None:
        """Send the greeting."""
        major, minor, micro = self._version
        version = {
            "qemu": {"micro": micro, "minor": minor, "major": major},
            "package": "",
        }
        self.send_message({"QMP": {"version": version, "capabilities": []}})

    def negotiate(self, status: str = "running") -> None:
        """Take a client through all that comes before the events."""
        self.accept()
        self.greet()
        self.answer("qmp_capabilities", {})
        self._negotiated = True
        running = status == "running"
        self.answer("query-status", {"status": status, "running": running})

    def answer(self, command: str, result: Message) -> None:
        """Wait for the client's next command, which has to be this one; answer it."""
        request = self._receive()
        if request["execute"] != command:
            raise ValueError(f"{request}, where {command} was expected")
        reply = {"return": result}
        if "id" in request:
            reply["id"] = request["id"]
        self.send_message(reply)

    def event(self, event: str, **data: object) -> None:
        """Send an event."""
        if self._negotiated:
            self.send(event_line(event, **data))

    def send_message(self, message: Message) -> None:
        """Send a line of JSON."""
        self.send(json.dumps(message).encode() + b"\r\n")

    def send(self, data: bytes) -> None:
        """Send bytes, whatever they say."""
        assert self._client
        self._client.sendall(data)

    def send_descriptor(self, data: bytes, fd: int) -> None:
        """Send bytes, and a descriptor with them."""
        assert self._client
        socket.send_fds(self._client, [data], [fd])

    def send_out_of_band(self, byte: bytes) -> None:
        """Send a byte as no QEMU does; raises OSError where the kernel knows none."""
        assert self._client
        self._client.send(byte, socket.MSG_OOB)

    def wait_until_read(self) -> None:
        """Wait until the client has read all that was sent."""
        client = self._client
        assert client
        unread = bytearray(4)

        def is_read() -> bool:
            fcntl.ioctl(client, termios.TIOCOUTQ, unread)
            return not any(unread)

        wait_until(is_read, "the client has read all")

    def deliver(self, data: bytes) -> bool:
        """Send bytes; tell whether the client has read them, even if it left then."""
        try:
            self.send(data)
            self.wait_until_read()
            if self.client_has_left():
                assert self._client
                while self._client.recv(65536):
                    pass
        except ConnectionError:  # it has left something unread
            return False
        return True

    @property
    def has_client(self) -> bool:
        """Whether a client has been accepted that has not left since."""
        return self._client is not None and not self.client_has_left()

    def client_has_left(self) -> bool:
        """Tell whether the client has closed its end."""
        assert self._client
        poll = select.poll()
        poll.register(self._client, 0)  # POLLHUP is implied
        return bool(poll.poll(0))

    def wait_until_client_leaves(self) -> None:
        """Wait until the client has closed its end."""
        assert self._client
        with suppress(ConnectionResetError):  # it has left something unread
            while self._client.recv(65536):
                pass
        self.disconnect()

    def disconnect(self) -> None:
        """Close the connection; go on listening, as QEMU does for a moment."""
        if self._client:
            self._client.close()
        self._client = None
        self._negotiated = False

    def exit(self) -> None:
        """End as QEMU does: the connection first, then socket file and listener."""
        self.disconnect()
        self.path.unlink(missing_ok=True)
        self._stop_listening()

    def crash(self) -> None:
        """End as with SIGKILL: the socket file stays, and nobody listens."""
        self._stop_listening()
        self.disconnect()

    def _stop_listening(self) -> None:
        if self._listener:
            self._listener.close()
        self._listener = None

    def _receive(self) -> Message:
        """Return one JSON object; what separates it from the next one is not needed."""
        assert self._client
        text = ""
        while True:
            try:
                message: Message = json.loads(text)
            except ValueError:
                pass
            else:
                return message
            byte = self._client.recv(1)
            if not byte:
                raise EOFError(f"the client has left, after {text!r}")
            text += byte.decode()

    def __enter__(self) -> FakeQemu:
        return self

    def __exit__(self, *_: object) -> None:
        self.exit()


def event_line(event: str, **data: object) -> bytes:
    """Return an event of this moment, without data if there are none."""
    now = time.time()
    timestamp = {"seconds": int(now), "microseconds": int(now % 1 * 1000000)}
    message: Message = {"timestamp": timestamp, "event": event}
    if data:
        message["data"] = data
    return json.dumps(message).encode() + b"\r\n"
