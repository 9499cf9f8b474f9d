"""The shutdown file, which tells Ganeti that its user has shut an instance down.

Owns the file `<instance>.shutdown` and the last verdict on the instance, with which
the file is brought in line. Only the verdict `user` makes one. Says in the log what a
verdict was and what became of the file: one line, when that is done.
"""

from __future__ import annotations

import collections
import errno
import os
import stat
import time

from kvmd_log import Log
from kvmd_verdict import Ruling, Verdict

#: Seconds: what is said to have taken longer, or less than none, a clock has done.
LONGEST_DELAY = 86400.0

#: A verdict and what came of it. `event` is QEMU's time stamp, `time` when the verdict
#: was carried out, both in seconds since the epoch; `file` is what became of the file,
#: None as long as it could not be brought in line.
Judgement = collections.namedtuple("Judgement", "verdict cause event time file")


class ShutdownFile:
    """The shutdown file of one instance."""

    __slots__ = ("_directory", "_instance", "_log", "judgement")

    def __init__(self, directory: str, instance: str, log: Log) -> None:
        self._directory = directory
        self._instance = instance
        self._log = log
        #: The last verdict, None if there was none.
        self.judgement: Judgement | None = None

    @property
    def path(self) -> str:
        """Where it is."""
        return f"{self._directory}/{self._instance}.shutdown"

    @property
    def is_pending(self) -> bool:
        """Whether it is still to be brought in line with the last verdict."""
        return self.judgement is not None and self.judgement.file is None

    def give_up(self) -> None:
        """Forget a verdict that could not be carried out: it was on another QEMU."""
        if self.is_pending:
            self.judgement = None

    def carry_out(self, ruling: Ruling, event: float | None) -> None:
        """Bring the file in line with a verdict, or log why that can't be done yet."""
        earlier = self.judgement
        self.judgement = Judgement(*ruling, event, time.time(), None)
        error = self.write()
        if error is not None:
            self._log.error(
                f"{ruling}, but {self.path}: {error.strerror}; trying again every"
                " second",
                self._instance,
            )
        elif self._says_nothing(self.judgement):
            self.judgement = earlier

    def write(self) -> OSError | None:
        """Bring the file in line with the last verdict; return what went wrong."""
        if self.judgement is None:
            return None
        try:
            if self.judgement.verdict is Verdict.USER:
                outcome = self._create()
            else:
                outcome = self._remove()
        except OSError as error:
            return error
        self.judgement = Judgement(*self.judgement[:3], time.time(), outcome)
        if not self._says_nothing(self.judgement):
            self._log.info(describe(self.judgement), self._instance)
        return None

    def _says_nothing(self, judgement: Judgement) -> bool:
        """Tell whether a guest runs, as it should, without a file."""
        return judgement.verdict is Verdict.RUNNING and judgement.file == "none"

    def _create(self) -> str:
        """Make an empty file of mode 0600; return "created", or "present".

        mknod(2) opens nothing: it follows no symlink, waits for no fifo, truncates no
        file, and works when the process has no file descriptor left. What is planted
        under the name is removed, but a directory is left: to Ganeti it counts as well.
        Raises OSError.
        """
        for _ in range(3):
            try:
                os.mknod(self.path, stat.S_IFREG | 0o600)
            except FileExistsError:
                mode = os.lstat(self.path).st_mode
                if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                    return "present"
                self._log.warning(
                    f"removing {self.path}, which is no file, to make the shutdown"
                    " file",
                    self._instance,
                )
                os.unlink(self.path)
            else:
                return "created"
        raise FileExistsError(errno.EEXIST, "planted again and again", self.path)

    def _remove(self) -> str:
        """Remove the file; return "removed", "none" or, for a directory, "directory".

        Raises OSError.
        """
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            return "none"
        except IsADirectoryError:
            return "directory"
        return "removed"


def describe(judgement: Judgement) -> str:
    """Return what the log says of a verdict that was carried out."""
    verdict, cause, event, then, file = judgement
    when, after = "unknown", "unknown"
    if event is not None:
        when = f"{event:.6f}"
        if 0 <= then - event <= LONGEST_DELAY:
            after = f"{(then - event) * 1000:.1f}ms"
    return (
        f"verdict={verdict.value} cause={cause} event={when} file={file} after={after}"
    )


def export_judgement(judgement: Judgement | None) -> dict[str, object] | None:
    """Return a verdict as JSON can hold it."""
    if judgement is None:
        return None
    return {**judgement._asdict(), "verdict": judgement.verdict.value}


def restore_judgement(record: dict[str, object] | None) -> Judgement | None:
    """Return what was exported. Raises ValueError, TypeError, KeyError for all else."""
    if record is None:
        return None
    verdict = Verdict(record["verdict"])
    return Judgement(verdict, *(record[name] for name in Judgement._fields[1:]))
