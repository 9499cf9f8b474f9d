"""What is done to the daemon while guests go down."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from cluster import expect
from service import is_replaced, main_pid, starts

#: Seconds: more than systemd waits for a daemon that gives no sign of life.
PATIENCE = 90.0

#: How often the daemon is killed on end: more than what systemd allows by default.
KILLS = 6

#: Something that goes on while its block runs. It gives what tells whether it is over,
#: and has to be asked.
Action = Callable[[], AbstractContextManager[Callable[[], bool]]]


def command(*words: str) -> Action:
    """Return the running of a command, which has to work."""

    @contextlib.contextmanager
    def run_command() -> Iterator[Callable[[], bool]]:
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            yield lambda: process.poll() is not None
            status = process.wait(PATIENCE)
            output.seek(0)
            expect(f"{' '.join(words)}: {output.read()}\nstatus", status, 0)

    return run_command


@contextlib.contextmanager
def restart_in_place() -> Iterator[Callable[[], bool]]:
    """Send the signal that the package sends, and wait until a program is ready."""
    before = starts()
    os.kill(main_pid(), signal.SIGUSR2)
    yield lambda: starts() > before


def replacement_after(number: signal.Signals) -> Action:
    """Return the sending of a signal, and the wait for another process."""

    @contextlib.contextmanager
    def wait_for_another() -> Iterator[Callable[[], bool]]:
        pid = main_pid()
        os.kill(pid, number)
        yield lambda: is_replaced(pid)

    return wait_for_another


@contextlib.contextmanager
def kill_again_and_again() -> Iterator[Callable[[], bool]]:
    """Kill each daemon that comes, whatever it is doing, and wait for the last one."""
    killed = [0]

    def is_last_there() -> bool:
        if not is_replaced(killed[-1]):
            return False
        if len(killed) > KILLS:
            return True
        killed.append(main_pid())
        os.kill(killed[-1], signal.SIGKILL)
        return False

    yield is_last_there


def held(action: Action) -> Action:
    """Return an action that the daemon sees together with what is done meanwhile.

    It stands still until the first time that somebody asks whether that is over.
    """

    @contextlib.contextmanager
    def hold() -> Iterator[Callable[[], bool]]:
        process = os.pidfd_open(main_pid())
        try:
            signal.pidfd_send_signal(process, signal.SIGSTOP)
            with action() as is_over:
                yield lambda: let_go(process) and is_over()
        finally:
            os.close(process)

    return hold


def let_go(process: int) -> bool:
    """Let a process go on, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGCONT)
    return True
