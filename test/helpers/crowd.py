"""Many fake QEMUs at once, all in this thread."""

from __future__ import annotations

import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from deadline import SECONDS
from fake_qemu import event_line

_GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}}}\r\n'
    b'{"return": {}}\r\n{"return": {"status": "running"}, "id": "kvmd-status"}\r\n'
)


class Crowd:
    """QEMUs that take their clients while `serve` runs, and end as they are told."""

    def __init__(self, control_dir: Path) -> None:
        self.control_dir = control_dir
        self._selector = selectors.DefaultSelector()
        self._listeners: dict[str, socket.socket] = {}
        #: The connection of each guest whose client has been greeted.
        self.clients: dict[str, socket.socket] = {}
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    @property
    def names(self) -> list[str]:
        """The guests that run."""
        return list(self._listeners)

    def start(self, names: Iterable[str]) -> None:
        """Start guests, in the place of crashed ones if need be."""
        for name in names:
            path = self._path(name)
            path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.setblocking(False)
            listener.bind(str(path))
            listener.listen(1)
            self._listeners[name] = listener
            self._selector.register(listener, selectors.EVENT_READ, name)

    def serve(self, until: Callable[[], bool], what: str) -> None:
        """Take clients until a condition holds."""
        deadline = time.monotonic() + SECONDS
        while not until():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {SECONDS} s: {what}")
            for key, _ in self._selector.select(0.01):
                self._take(key.data)

    def serve_until_connected(self, names: Iterable[str]) -> None:
        """Take clients until each of these guests has one."""
        wanted = set(names)
        self.serve(lambda: wanted <= self.clients.keys(), "all are connected")

    def power_off(self, name: str) -> None:
        """End a guest as its user would."""
        self.clients[name].send(
            event_line("SHUTDOWN", guest=True, reason="guest-shutdown")
        )
        self.end(name)

    def end(self, name: str) -> None:
        """End a guest without a word."""
        self.crash(name)
        self.remove_socket(name)

    def crash(self, name: str) -> None:
        """End a guest as SIGKILL does; its socket stays."""
        listener = self._listeners.pop(name)
        if name in self.clients:
            self._drop(name)
        else:
            self._selector.unregister(listener)
        listener.close()

    def remove_socket(self, name: str) -> None:
        """Remove what a crashed guest has left, as Ganeti's clean-up may."""
        self._path(name).unlink(missing_ok=True)

    def drop_clients(self) -> None:
        """Take note that the daemon is gone."""
        for name in list(self.clients):
            self._await_client(name)

    def shutdown_file(self, name: str) -> Path:
        """Return what the daemon makes of a user's shutdown."""
        return self.control_dir / f"{name}.shutdown"

    def close(self) -> None:
        """End all that still run."""
        for name in self.names:
            self.end(name)
        self._selector.close()

    def _path(self, name: str) -> Path:
        return self.control_dir / f"{name}.kvmd"

    def _take(self, name: str) -> None:
        """Greet the guest's new client, or hear what the one it has says."""
        if name not in self.clients:
            client, _ = self._listeners[name].accept()
            client.setblocking(False)
            self._selector.unregister(self._listeners[name])
            self._selector.register(client, selectors.EVENT_READ, name)
            self.clients[name] = client
            with suppress(OSError):  # it may have left already
                client.send(_GREETING)
        elif not self._hear(self.clients[name]):
            self._await_client(name)

    def _await_client(self, name: str) -> None:
        self._drop(name)
        self._selector.register(self._listeners[name], selectors.EVENT_READ, name)

    def _hear(self, client: socket.socket) -> bool:
        try:
            return bool(client.recv(4096))
        except ConnectionError:
            return False

    def _drop(self, name: str) -> None:
        client = self.clients.pop(name)
        self._selector.unregister(client)
        client.close()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
