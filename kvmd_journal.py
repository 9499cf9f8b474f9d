"""What outlives the process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket

from kvmd_systemd import connection_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

#: What taking over an exported state raises if it has another form.
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)

#: The state is a memory file, sealed: one JSON object with the members `version`,
#: `serial` (the newest of several files counts), `pid`, `pid_file` (its descriptor, for
#: the same process after exec), `control_dir`, and `monitors`, a list of what
#: `Monitor.export` makes.
STATE_VERSION = 1
STATE_NAME = "kvmd-state"


def write_state_file(state: str) -> int:
    """Return the descriptor of a sealed memory file with the state. Raises OSError."""
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    fd = os.memfd_create(STATE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "w", encoding="ascii", closefd=False) as file:
            file.write(state)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_WRITE)
    except OSError:
        os.close(fd)
        raise
    return fd


def read_state_file(fd: int) -> dict[str, Any]:
    """Return the state in a memory file. Raises OSError, MALFORMED."""
    state = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        raise ValueError(f"not of version {STATE_VERSION}")
    return state


def open_files(pid: str) -> Iterator[tuple[int, str]]:
    """Yield the descriptors of a process, and what they are of, as /proc/PID/fd has it.

    Raises OSError.
    """
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):  # the listing's own, for one
            yield int(name), os.readlink(f"{directory}/{name}")


class Inheritance:
    """What an earlier daemon has left open for this one: connections and its state.

    They come through exec(2), or from systemd's descriptor store; what they are is
    told by /proc/self/fd alone.
    """

    def __init__(self) -> None:
        """Find them above 2, and close all else there."""
        #: Connections by their name (`connection_name`).
        self.connections: dict[str, socket.socket] = {}
        #: The newest state, {} if there is none.
        self.state: dict[str, Any] = {}
        #: Why a state could not be read.
        self.problem: Exception | None = None
        others = []
        for fd, target in open_files("self"):
            if fd <= 2:
                continue
            if target.startswith("socket:["):
                connection = socket.socket(fileno=fd)
                connection.set_inheritable(False)
                self.connections[connection_name(connection)] = connection
                continue
            if target.startswith(f"/memfd:{STATE_NAME}"):
                self._read_state(fd)
            others.append(fd)
        for fd in others:
            if fd != self.pid_file:
                os.close(fd)

    def _read_state(self, fd: int) -> None:
        try:
            state = read_state_file(fd)
            if state["serial"] > self.state.get("serial", -1):
                self.state = state
        except (OSError, *MALFORMED) as error:
            self.problem = error

    @property
    def pid_file(self) -> int | None:
        """The locked pid file, if this process itself was the earlier daemon."""
        same_process = self.state.get("pid") == os.getpid()
        return self.state.get("pid_file") if same_process else None
