"""What an event means: the guest's state, and the verdict. No I/O, no clock."""

from __future__ import annotations

import collections
import enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

class Verdict(enum.Enum):
    """What there is to be said of a guest. Only USER makes a shutdown file."""

    USER = "user"
    NOT_USER = "not-user"
    #: A guest that had been shut down runs again (QEMU with -no-shutdown).
    WITHDRAWN = "withdrawn"
    #: The guest was found running: a file from before its start is stale.
    RUNNING = "running"
    #: The guest was found shut down: its SHUTDOWN was told to an earlier connection.
    EARLIER = "earlier"


class Ruling(collections.namedtuple("Ruling", "verdict cause")):
    """A verdict and its cause, the latter in a few words without spaces."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return it as log lines have it."""
        return f"verdict={self.verdict.value} cause={self.cause}"

    def export(self) -> list[str]:
        """Return it for the state file."""
        return [self.verdict.value, self.cause]

    @classmethod
    def restore(cls, record: list[str]) -> Ruling:
        """Return what was exported. Raises ValueError, TypeError."""
        verdict, cause = record
        return cls(Verdict(verdict), cause)


#: What each event does to the state of a guest (QEMU's qapi/run-state.json).
EFFECTS: dict[str, dict[str, bool]] = {
    "POWERDOWN": {"powerdown_requested": True},
    "RESET": {"powerdown_requested": False, "panicked": False},
    "STOP": {"stopped": True},
    "RESUME": {"stopped": False},
    "GUEST_PANICKED": {"panicked": True},
}
#: The events after which a guest that was shut down runs again.
REVIVALS = {"RESET", "RESUME"}

#: SHUTDOWN's reasons (ShutdownCause in QEMU's qapi/run-state.json) that are never the
#: user's: a reboot under -no-reboot, a crash, and all that comes from the host.
NOT_USER_REASONS = {
    "guest-reset",
    "guest-panic",
    "host-signal",
    "host-qmp-quit",
    "host-qmp-system-reset",
    "host-ui",
    "host-error",
}
#: What in the guest's state speaks against its user, by what SHUTDOWN carries: the
#: reason guest-shutdown; only that the guest did it (QEMU 2.10 to 3.1); nothing.
OBJECTIONS = {
    "guest-shutdown": ("powerdown_requested",),
    "guest": ("powerdown_requested", "panicked"),
    "no-data": ("powerdown_requested", "stopped", "panicked"),
}
#: Statuses (RunState) of a guest that is down, and of one whose CPUs run.
DOWN_STATUSES = {"shutdown", "guest-panicked"}
RUNNING_STATUSES = {"running", "suspended"}


class GuestState:
    """What is known of the guest of one QEMU process: a state machine without I/O."""

    __slots__ = ("alive", "panicked", "powerdown_requested", "ruling", "stopped")

    def __init__(self) -> None:
        self.powerdown_requested = False
        self.stopped = False
        self.panicked = False
        #: Seen alive in this connection.
        self.alive = False
        #: The verdict of this run of the guest: the first one counts.
        self.ruling: Ruling | None = None

    def on_status(self, status: str) -> Ruling | None:
        """Take the answer to query-status, a RunState of QEMU's."""
        if self.ruling is not None:
            return None
        self.panicked |= status == "guest-panicked"
        if status == "shutdown":
            self.ruling = Ruling(Verdict.EARLIER, status)
        if status in DOWN_STATUSES:
            return None
        self.alive = True
        self.stopped = status not in RUNNING_STATUSES
        return Ruling(Verdict.RUNNING, status)

    def on_event(self, name: str, data: object) -> Ruling | None:
        """Take an event; return what it changes in the verdict, if anything."""
        self.alive = True
        for attribute, value in EFFECTS.get(name, {}).items():
            setattr(self, attribute, value)
        if name == "SHUTDOWN" and self.ruling is None:
            self.ruling = self._judge(data)
            return self.ruling
        if name in REVIVALS and self.ruling is not None:
            self.ruling = None
            return Ruling(Verdict.WITHDRAWN, name.lower())
        return None

    def on_end(self) -> Ruling | None:
        """Take the end of the connection."""
        if self.ruling is not None or not self.alive:
            return None
        self.alive = False
        return Ruling(Verdict.NOT_USER, "connection-ended")

    def export(self) -> dict[str, object]:
        """Return the state for the state file."""
        record = {name: getattr(self, name) for name in self.__slots__}
        return {**record, "ruling": self.ruling and self.ruling.export()}

    def restore(self, record: dict[str, Any]) -> None:
        """Take over what was exported."""
        for name in self.__slots__:
            setattr(self, name, record[name])
        self.ruling = record["ruling"] and Ruling.restore(record["ruling"])

    def _judge(self, data: object) -> Ruling:
        cause, row = grounds_of_shutdown(data)
        objections = [name for name in OBJECTIONS.get(row, ()) if getattr(self, name)]
        cause = ",".join([cause, *objections]).replace("_", "-")
        if row == "not-user" or objections:
            return Ruling(Verdict.NOT_USER, cause)
        return Ruling(Verdict.USER, cause)


def grounds_of_shutdown(data: object) -> tuple[str, str]:
    """Return the cause that SHUTDOWN's data names and the row of OBJECTIONS it is in.

    The row is "not-user" where nothing needs to be said against the user any more.
    """
    if data is None:
        return "no-data", "no-data"
    if not isinstance(data, dict):
        return "malformed", "not-user"
    reason = data.get("reason")
    if reason == "guest-shutdown":
        return reason, reason
    if isinstance(reason, str) and reason in NOT_USER_REASONS:
        return reason, "not-user"
    if data.get("guest") is True:
        return "guest", "guest"
    return "not-guest", "not-user"
