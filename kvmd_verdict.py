"""What an event means: the state of a guest, and the verdict on how it ended.

A guest that its user shut down ends with SHUTDOWN, and nothing that went before speaks
against the user: a powerdown request within POWERDOWN_LIFETIME, a panic, for old QEMUs
also a stop. All other ends are not the user's doing. In tables:

- EFFECTS: what each event changes in the state of the guest, and IGNORED: the events
  that change nothing, each with the reason.
- NOT_USER_REASONS: the reasons in a SHUTDOWN that are never the user's. One that a
  later QEMU brings is to be added there.
- OBJECTIONS: the causes that can be the user's, and what speaks against it.

No I/O and no clock: an event brings its time. The names are those of QEMU's
qapi/run-state.json: the events, ShutdownCause, RunState and WatchdogAction.
"""

from __future__ import annotations

import collections
import enum
import operator
from collections.abc import Mapping


class Verdict(str, enum.Enum):
    """What there is to be said of a guest. Only USER makes a shutdown file.

    A string, so that JSON can hold it.
    """

    USER = "user"
    NOT_USER = "not-user"
    #: A guest that had been shut down runs again (QEMU with -no-shutdown).
    WITHDRAWN = "withdrawn"
    #: The guest was found running: a file from before its start is stale.
    RUNNING = "running"
    #: The guest was found shut down: an earlier connection had its SHUTDOWN.
    EARLIER = "earlier"


class Ruling(collections.namedtuple("Ruling", "verdict cause")):
    """A verdict and its cause, the latter in a few words without spaces."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return it as log lines have it."""
        return f"verdict={self.verdict.value} cause={self.cause}"

    @classmethod
    def restore(cls, record: object) -> Ruling:
        """Return what JSON has of it. Raises ValueError for anything else."""
        if isinstance(record, list) and len(record) == 2 and isinstance(record[1], str):
            return cls(Verdict(record[0]), record[1])
        raise ValueError("not a verdict and its cause")


#: What each event changes in the state of a guest.
EFFECTS: dict[str, dict[str, bool | None]] = {
    # Its time is kept as powerdown_time.
    "POWERDOWN": {"powerdown_requested": True},
    # A new boot.
    "RESET": {
        "powerdown_requested": False,
        "powerdown_time": None,
        "panicked": False,
        "watchdog_action": None,
    },
    "STOP": {"stopped": True},
    "RESUME": {"stopped": False},
    "GUEST_PANICKED": {"panicked": True},
    # A crash kernel takes over. It may end in a power off.
    "GUEST_CRASHLOADED": {"panicked": True},
    # Its action is kept as watchdog_action, if QEMU ends by it.
    "WATCHDOG": {},
}
#: Why the other events of the schema, up to QEMU 11, say nothing of whose doing the
#: end is. (SHUTDOWN is the end.)
IGNORED = {
    "SUSPEND": "the guest sleeps (ACPI S3), and QEMU goes on",
    "WAKEUP": "the guest no longer sleeps, and QEMU goes on",
    "SUSPEND_DISK": "the guest hibernates (ACPI S4): SHUTDOWN follows, guest-shutdown",
    "GUEST_PVSHUTDOWN": "the guest asks for it by pvpanic: the same SHUTDOWN follows",
    "MEMORY_FAILURE": "the host's memory is at fault: if it matters, RESET, a panic or"
    " the end of the connection follows",
}

#: The events after which a guest that was shut down runs again.
REVIVALS = {"RESET", "RESUME"}
#: The WatchdogAction after which QEMU ends without SHUTDOWN. Of the others, reset,
#: shutdown and pause have an event of their own (RESET, or SHUTDOWN under -no-reboot;
#: POWERDOWN; STOP), and QEMU goes on after debug, none and inject-nmi.
ENDING_WATCHDOG_ACTIONS = ("poweroff",)
#: How long a powerdown request counts after the last press, in seconds. Who wants the
#: guest down presses again and again; who sleeps on it has to be believed again.
POWERDOWN_LIFETIME = 3600.0

#: SHUTDOWN's reasons (ShutdownCause) that are never the user's: a reboot under
#: -no-reboot, a crash, and all that comes from the host.
NOT_USER_REASONS = {
    "guest-reset",
    "guest-panic",
    "host-signal",
    "host-qmp-quit",
    "host-qmp-system-reset",
    "host-ui",
    "host-error",
}
#: All that is named as the cause; of any other reason counts only if the guest did it.
REASONS = {"guest-shutdown", *NOT_USER_REASONS}
#: What in the state of the guest speaks against its user, by the cause that SHUTDOWN
#: names: the reason guest-shutdown; only that the guest did it (QEMU 2.10 to 3.1); none
#: (older ones). Any other cause is not the user.
OBJECTIONS = {
    "guest-shutdown": ("powerdown_requested", "panicked"),
    "guest": ("powerdown_requested", "panicked"),
    "no-data": ("powerdown_requested", "stopped", "panicked"),
}
#: Statuses (RunState) of a guest that is down, and of one whose CPUs run.
DOWN_STATUSES = {"shutdown", "guest-panicked"}
RUNNING_STATUSES = {"running", "suspended"}

#: The types that the attributes of a guest may have in a record.
TYPES: dict[str, tuple[type, ...]] = {
    "powerdown_requested": (bool,),
    "powerdown_time": (float, type(None)),
    "stopped": (bool,),
    "panicked": (bool,),
    "watchdog_action": (str, type(None)),
    "seen_alive": (bool,),
    "ruling": (list, type(None)),
}


#: Returns the values of a guest's attributes, in that order.
STATE = operator.attrgetter(*TYPES)


class Guest:
    """What is known of the guest of one QEMU process: a state machine without I/O."""

    __slots__ = tuple(TYPES)

    def __init__(self) -> None:
        self.powerdown_requested = False
        #: When it was requested last, in seconds since the epoch by QEMU's clock.
        self.powerdown_time: float | None = None
        self.stopped = False
        self.panicked = False
        #: One of ENDING_WATCHDOG_ACTIONS, if it was taken.
        self.watchdog_action: str | None = None
        #: Seen alive since the last end of a connection.
        self.seen_alive = False
        #: The verdict on this run of the guest: the first one counts.
        self.ruling: Ruling | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it was seen alive, and there is no verdict on its end yet."""
        return self.seen_alive and self.ruling is None

    def on_status(self, status: str) -> Ruling | None:
        """Take the answer to query-status, a RunState."""
        if self.ruling is not None:
            return None
        self.panicked |= status == "guest-panicked"
        if status == "shutdown":
            self.ruling = Ruling(Verdict.EARLIER, status)
        if status in DOWN_STATUSES:
            return None
        self.seen_alive = True
        self.stopped = status not in RUNNING_STATUSES
        return Ruling(Verdict.RUNNING, status)

    def on_event(self, name: str, data: object, time: float | None) -> Ruling | None:
        """Take an event; return what it changes in the verdict, if anything.

        Its time is in seconds since the epoch by QEMU's clock, None if it has none.
        """
        self.seen_alive = True
        for attribute, value in EFFECTS.get(name, {}).items():
            setattr(self, attribute, value)
        if name == "POWERDOWN":
            self.powerdown_time = time
        if name == "WATCHDOG":
            action = data.get("action") if isinstance(data, dict) else None
            self.watchdog_action = action if action in ENDING_WATCHDOG_ACTIONS else None
        if name == "SHUTDOWN" and self.ruling is None:
            self.ruling = self._judge(data, time)
            return self.ruling
        if name in REVIVALS and self.ruling is not None:
            self.ruling = None
            return Ruling(Verdict.WITHDRAWN, name.lower())
        return None

    def on_end(self) -> Ruling | None:
        """Take the end of the connection."""
        if not self.is_alive:
            return None
        self.seen_alive = False
        cause = "connection-ended"
        if self.watchdog_action is not None:
            cause += f",watchdog-{self.watchdog_action}"
        return Ruling(Verdict.NOT_USER, cause)

    def state(self) -> tuple[object, ...]:
        """Return the state, to be compared with another one."""
        return STATE(self)

    def export(self) -> dict[str, object]:
        """Return what differs from a new guest's state, as JSON can hold it."""
        members = zip(TYPES, self.state(), INITIAL_STATE)
        return {name: value for name, value, initial in members if value != initial}

    @classmethod
    def restore(cls, record: Mapping[str, object]) -> Guest:
        """Return a guest in the state that was exported.

        Members that are unknown are passed over, and missing ones have the value that
        a new guest has. Raises ValueError for a member of another type.
        """
        guest = cls()
        for name in TYPES.keys() & record.keys():
            if type(record[name]) not in TYPES[name]:
                raise ValueError(f"a guest's {name} is of another type")
            setattr(guest, name, record[name])
        if guest.watchdog_action not in (None, *ENDING_WATCHDOG_ACTIONS):
            guest.watchdog_action = None
        if guest.ruling is not None:
            guest.ruling = Ruling.restore(guest.ruling)
        return guest

    def _judge(self, data: object, time: float | None) -> Ruling:
        """Return the ruling on a SHUTDOWN."""
        cause = cause_of_shutdown(data)
        if cause not in OBJECTIONS:
            return Ruling(Verdict.NOT_USER, cause)
        objections = [name for name in OBJECTIONS[cause] if getattr(self, name)]
        if "powerdown_requested" in objections and self._request_has_lapsed(time):
            objections.remove("powerdown_requested")
        verdict = Verdict.NOT_USER if objections else Verdict.USER
        return Ruling(verdict, ",".join([cause, *objections]).replace("_", "-"))

    def _request_has_lapsed(self, time: float | None) -> bool:
        """Tell whether the last powerdown request is too old to count.

        It counts where a time is unknown, or QEMU's clock went backwards.
        """
        if time is None or self.powerdown_time is None:
            return False
        return time - self.powerdown_time > POWERDOWN_LIFETIME


INITIAL_STATE = Guest().state()


def cause_of_shutdown(data: object) -> str:
    """Return what SHUTDOWN's data names as its cause."""
    if data is None:
        return "no-data"
    if not isinstance(data, dict):
        return "malformed"
    reason = data.get("reason")
    if isinstance(reason, str) and reason in REASONS:
        return reason
    return "guest" if data.get("guest") is True else "not-guest"
