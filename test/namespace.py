"""A namespace of its own for a daemon: mounts and limits that the machine never sees."""

from __future__ import annotations

import subprocess
from pathlib import Path

from daemon import INTERPRETER, Daemon
from deadline import SECONDS

_ENTER = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec")


def interpreter_after(commands: str) -> tuple[str, ...]:
    """Return an interpreter that is started in a new namespace, after shell commands."""
    return (*_ENTER, f'{commands}; exec "$@"', "sh", *INTERPRETER)


def interpreter_on_tmpfs(directory: Path, options: str) -> tuple[str, ...]:
    """Return an interpreter that has a tmpfs of its own at the directory, as /run is."""
    return interpreter_after(f"mount -t tmpfs -o {options} kvmd-test {directory}")


def run_beside(daemon: Daemon, command: str) -> None:
    """Run a shell command in the namespace of a daemon."""
    subprocess.run(
        [
            *("nsenter", f"--target={daemon.pid}", "--user", "--mount"),
            *("--preserve-credentials", "sh", "-ec", command),
        ],
        check=True,
        timeout=SECONDS,
    )


def seen_by(daemon: Daemon, path: Path) -> Path:
    """Return a path as the daemon's namespace has it."""
    return Path(f"/proc/{daemon.pid}/root{path}")
