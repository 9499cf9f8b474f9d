"""Namespaces of their own: mounts and limits that the machine never sees."""

from __future__ import annotations

import ctypes
import os
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from daemon import INTERPRETER, Daemon
from deadline import SECONDS

_ENTER = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec")


def interpreter_after(commands: str) -> tuple[str, ...]:
    """Return an interpreter that starts in a new namespace, after shell commands."""
    require_namespaces()
    return (*_ENTER, f'{commands}; exec "$@"', "sh", *INTERPRETER)


def interpreter_on_tmpfs(directory: Path, options: str) -> tuple[str, ...]:
    """Return an interpreter that has a tmpfs of its own at the directory."""
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


CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000


def call_in_process(function: Callable[[], None]) -> None:
    """Call a function in a process of its own, whose failures are this one's too."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:  # noqa: BLE001 - whatever it was, the parent tells
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as report:
        text = report.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, text


def require_namespaces() -> None:
    """Skip a test where no namespaces are to be had, but not where they have to be."""
    if subprocess.run([*_ENTER, "true"], check=False).returncode != 0:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("no user and mount namespaces are to be had")


def call_in_namespace(function: Callable[[], None]) -> None:
    """Call a function in a process with user and mount namespaces of its own.

    There it is root, and what it mounts or limits is its own affair.
    """
    require_namespaces()

    def enter_and_call() -> None:
        uid, gid = os.geteuid(), os.getegid()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        function()

    call_in_process(enter_and_call)
