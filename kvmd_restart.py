"""Restart in place: this process runs execve(2) on the program installed now.

Owns the trial of the new program and the exec(2). The locked pid file and the
connections go along as open descriptors, the rest is in the journal. If anything is
amiss, the old program goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal

from kvmd_log import Log
from kvmd_version import VERSION


class Restart:
    """The way from this program to the next."""

    def __init__(self, command: list[str], log: Log) -> None:
        """Prepare; the command is what starts the program anew."""
        #: Whether the new program has been seen to run, and is to take over.
        self.is_due = False
        self._command = command
        self._log = log
        self._trial: int | None = None

    def try_new_program(self) -> None:
        """See whether the program now installed runs, with the options it will get."""
        if self._trial is not None:
            os.kill(self._trial, signal.SIGKILL)
            os.waitpid(self._trial, 0)
            self._trial = None
        quietly = [
            (os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)
        ]
        command = [*self._command, "--version"]
        try:
            self._trial = os.posix_spawn(
                command[0], command, os.environ, file_actions=quietly
            )
        except OSError as error:
            self._log.error(f"not restarting: {command[0]}: {error.strerror}")

    def reap(self) -> None:
        """Take note of every child that has ended; one of them may be the trial."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._trial:
                    self._end_trial(os.waitstatus_to_exitcode(status))

    def _end_trial(self, code: int) -> None:
        self._trial = None
        if code == 0:
            self.is_due = True
            return
        self._log.error(
            f"not restarting: {' '.join(self._command)} --version failed with status"
            f" {code}; going on with version {VERSION}"
        )

    def become_new_program(self, descriptors: list[int]) -> None:
        """Replace this program in place; return only if that fails.

        These descriptors are inherited. The caller has blocked all signals.
        """
        self.is_due = False
        for fd in descriptors:
            os.set_inheritable(fd, True)
        try:
            self._log.open()  # as the new program will: better no restart than no log
            self._log.info("restarting in place")
            self._log.flush()
            os.execv(self._command[0], self._command)
        except OSError as error:
            self._log.error(
                f"cannot restart in place: {error}; going on with version {VERSION}"
            )
        for fd in descriptors:
            os.set_inheritable(fd, False)
