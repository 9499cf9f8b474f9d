"""The shutdown file, which tells Ganeti that its user has shut an instance down.

Owns the files `<instance>.shutdown`: brings them in line with the verdicts. Only the
verdict `user` makes one. Says in the log what a verdict was and what became of the
file: one line, when that is done. What is to be tried again, the monitor knows.
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
#: The types that all but the verdict itself may have in a record.
TYPES: dict[str, tuple[type, ...]] = {
    "cause": (str,),
    "event": (float, type(None)),
    "time": (float,),
    "file": (str, type(None)),
}
#: What became of a file that was left alone.
SUPERSEDED = "superseded"


class LastVerdict(
    collections.namedtuple("LastVerdict", "verdict cause event time file")
):
    """A verdict and what came of it.

    `event` is QEMU's time stamp, `time` when the verdict was carried out, both in
    seconds since the epoch; `file` is what became of the file, None as long as it could
    not be brought in line.
    """

    __slots__ = ()

    def __str__(self) -> str:
        """Return what the log says when it was carried out."""
        when, after = "unknown", "unknown"
        if self.event is not None:
            when = f"{self.event:.6f}"
            if 0 <= self.time - self.event <= LONGEST_DELAY:
                after = f"{(self.time - self.event) * 1000:.1f}ms"
        return f"{self.ruling} event={when} file={self.file} after={after}"

    @property
    def ruling(self) -> Ruling:
        """The verdict and its cause."""
        return Ruling(self.verdict, self.cause)

    @property
    def is_pending(self) -> bool:
        """Whether the file is still to be brought in line with it."""
        return self.file is None

    @classmethod
    def restore(cls, record: dict[str, object] | None) -> LastVerdict | None:
        """Return what JSON has of one. Raises ValueError, TypeError, KeyError."""
        if record is None:
            return None
        for name, types in TYPES.items():
            if type(record[name]) not in types:
                raise ValueError(f"a verdict's {name} is of another type")
        return cls(Verdict(record["verdict"]), *map(record.__getitem__, TYPES))


class ShutdownFiles:
    """The shutdown files of all instances."""

    def __init__(self, directory: str, log: Log) -> None:
        self._directory = directory
        self._log = log

    def path(self, instance: str) -> str:
        """Return where an instance's file is, if it has one."""
        return f"{self._directory}/{instance}.shutdown"

    def carry_out(
        self, instance: str, ruling: Ruling, event: float | None
    ) -> LastVerdict | None:
        """Bring the file in line with a verdict, or log why that can't be done yet.

        Returns None if there is nothing to tell: a guest runs, as it should, without a
        file.
        """
        pending = LastVerdict(*ruling, event, time.time(), None)
        try:
            return self.write(instance, pending)
        except OSError as error:
            self._log.error(
                f"{ruling}, but {self.path(instance)}: {error.strerror}; trying again"
                " every second",
                instance,
            )
            return pending

    def write(self, instance: str, pending: LastVerdict) -> LastVerdict | None:
        """Do the same, or raise OSError."""
        if pending.verdict is Verdict.USER:
            outcome = self._create(instance)
        else:
            outcome = self._remove(instance)
        if pending.verdict is Verdict.RUNNING and outcome == "none":
            return None
        return self._conclude(instance, pending.ruling, pending.event, outcome)

    def supersede(
        self, instance: str, ruling: Ruling, event: float | None
    ) -> LastVerdict:
        """Leave the file alone: a new QEMU process has the instance's name."""
        return self._conclude(instance, ruling, event, SUPERSEDED)

    def _conclude(
        self, instance: str, ruling: Ruling, event: float | None, outcome: str
    ) -> LastVerdict:
        done = LastVerdict(*ruling, event, time.time(), outcome)
        self._log.info(str(done), instance)
        return done

    def _create(self, instance: str) -> str:
        """Make an empty file of mode 0600; return "created", or "present".

        mknod(2) opens nothing: it follows no symlink, waits for no fifo, truncates no
        file, and works when the process has no file descriptor left. What is planted
        under the name is removed, but a directory is left: to Ganeti it counts as well.
        Raises OSError.
        """
        path = self.path(instance)
        for _ in range(3):
            try:
                os.mknod(path, stat.S_IFREG | 0o600)
            except FileExistsError:
                mode = os.lstat(path).st_mode
                if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                    return "present"
                self._log.warning(
                    f"removing {path}, which is no file, to make the shutdown file",
                    instance,
                )
                os.unlink(path)
            else:
                return "created"
        raise FileExistsError(errno.EEXIST, "planted again and again", path)

    def _remove(self, instance: str) -> str:
        """Remove the file; return "removed", "none" or, for a directory, "directory".

        Raises OSError.
        """
        try:
            os.unlink(self.path(instance))
        except FileNotFoundError:
            return "none"
        except IsADirectoryError:
            return "directory"
        return "removed"
