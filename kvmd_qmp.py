"""The client side of QMP without I/O: bytes in, messages out."""

from __future__ import annotations

import collections
import json
import re
import sys

from kvmd_verdict import EFFECTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Sent in one write on connecting: events before the negotiation are lost.
COMMANDS = (
    b'{"execute": "qmp_capabilities"}\r\n'
    b'{"execute": "query-status", "id": "kvmd-status"}\r\n'
)
STATUS_ID = "kvmd-status"
#: What may be a status (RunState in QEMU's qapi/run-state.json): it goes into the log.
STATUS = re.compile(r"[a-z0-9-]{1,32}")

#: Bytes of an unfinished line that are kept.
LINE_LIMIT = 65536
#: Bytes of one read. All of them may have to be parsed, line by line.
READ_SIZE = 16384
OVERLONG = f"a line of more than {LINE_LIMIT} bytes"
#: Bytes of one read where every line has to be parsed, or the last one had.
CAREFUL_READ_SIZE = 1024

#: Finds, in a whole chunk, whether any event in it may matter. Most don't, and JSON is
#: parsed for none of those. It looks for the end of "event", for a search that began
#: with a quote would have to stop at each of them.
EVENT_OF_INTEREST = re.compile(
    rb'vent"\s*:\s*"(?:%s)"' % "|".join(["SHUTDOWN", *EFFECTS]).encode()
)

Greeting = collections.namedtuple("Greeting", "version")
Status = collections.namedtuple("Status", "status")
#: The timestamp is in seconds since the epoch by QEMU's clock, None if it has none.
Event = collections.namedtuple("Event", "name data timestamp")


def parse_message(line: bytes) -> Greeting | Status | Event | None:
    """Return what one line says, None for an answer of no interest.

    Raises ValueError, or RecursionError for deep nesting, if it is no QMP message.
    """
    message = json.loads(line.decode("utf-8"))
    if not isinstance(message, dict):
        raise ValueError("not an object")
    if isinstance(message.get("event"), str):
        timestamp = event_time(message.get("timestamp"))
        return Event(message["event"], message.get("data"), timestamp)
    if "QMP" in message:
        return Greeting(qemu_version(message["QMP"]))
    if "error" in message:
        raise ValueError("a command was refused")
    if "return" not in message:
        raise ValueError("neither greeting, answer nor event")
    if message.get("id") != STATUS_ID:
        return None
    answer = message["return"]
    status = answer.get("status") if isinstance(answer, dict) else None
    if not isinstance(status, str) or not STATUS.fullmatch(status):
        raise ValueError("no status in the answer to query-status")
    return Status(status)


def event_time(timestamp: object) -> float | None:
    """Return an event's time in seconds; QEMU gives -1 when it has no clock."""
    if not isinstance(timestamp, dict):
        return None
    seconds, microseconds = timestamp.get("seconds"), timestamp.get("microseconds")
    if not isinstance(seconds, int) or not isinstance(microseconds, int):
        return None
    if not (0 <= seconds < 1 << 40 and 0 <= microseconds < 1000000):
        return None
    return seconds + microseconds / 1e6


def qemu_version(greeting: object) -> str:
    """Return the version that a greeting names, like 7.2.22, or "unknown"."""
    try:
        version = greeting["version"]["qemu"]  # type: ignore[index]
        numbers = [version[part] for part in ("major", "minor", "micro")]
    except (TypeError, KeyError):
        return "unknown"
    if not all(isinstance(number, int) for number in numbers):
        return "unknown"
    # Interned, for a thousand instances tend to run one version.
    return sys.intern(".".join(str(number % 1000) for number in numbers))


class Protocol:
    """The client side of one QMP connection, without I/O: bytes in, messages out.

    QEMU's docs/interop/qmp-spec: a JSON object per line. `read_size` is how many
    bytes the next read should ask for. `complaint` says what was skipped first.
    """

    __slots__ = (
        "_answered",
        "_greeted",
        "_overlong",
        "_unfinished",
        "complaint",
        "read_size",
    )

    def __init__(self) -> None:
        self._greeted = False
        #: query-status was answered, so that only events can be of interest.
        self._answered = False
        #: The start of a line that goes on, at most LINE_LIMIT bytes.
        self._unfinished = b""
        #: The line that comes in is longer than that: it is skipped to its end.
        self._overlong = False
        self.read_size = CAREFUL_READ_SIZE
        self.complaint: str | None = None

    def receive(self, data: bytes) -> list[Greeting | Status | Event]:
        """Take what was read, b"" at the end of the connection; return the messages."""
        listening = self._answered and self._greeted
        end = data.rfind(b"\n") + 1
        if data and not end:
            self._keep(data)
            self.read_size = READ_SIZE if listening else CAREFUL_READ_SIZE
            return []
        lines = self._unfinished + data[:end]
        self._unfinished = b""
        if self._overlong:
            lines = lines[lines.find(b"\n") + 1 :]
            self._overlong = False
        self._keep(data[end:])
        # A glance is all that goes to what can't be of interest: one warning is due.
        odd = lines[:1] != b"{" or len(lines) > LINE_LIMIT
        listening = listening and not (odd and self.complaint is None)
        if listening and not EVENT_OF_INTEREST.search(lines):
            self.read_size = READ_SIZE
            return []
        self.read_size = CAREFUL_READ_SIZE
        messages = [
            self._read_line(line)
            for line in lines.split(b"\n")
            if not listening or EVENT_OF_INTEREST.search(line)
        ]
        return [message for message in messages if message is not None]

    @property
    def pending(self) -> int:
        """How many bytes are kept of a line that goes on."""
        return len(self._unfinished)

    def export(self) -> dict[str, object]:
        """Return what is known of the connection for the state file."""
        return {
            "greeted": self._greeted,
            "answered": self._answered,
            "unfinished": self._unfinished.decode("latin-1"),
            "overlong": self._overlong,
            "complaint": self.complaint,
        }

    def restore(self, record: dict[str, Any]) -> None:
        """Take over what was exported."""
        self._greeted = record["greeted"]
        self._answered = record["answered"]
        self._unfinished = record["unfinished"].encode("latin-1")
        self._overlong = record["overlong"]
        self.complaint = record["complaint"]

    def _keep(self, data: bytes) -> None:
        if self._overlong or len(self._unfinished) + len(data) > LINE_LIMIT:
            self._unfinished = b""
            self._overlong = True
            self._complain(OVERLONG)
        else:
            self._unfinished += data

    def _read_line(self, line: bytes) -> Greeting | Status | Event | None:
        if not line.strip():
            return None
        try:
            if len(line) > LINE_LIMIT:
                raise ValueError(OVERLONG)
            message = parse_message(line)
            if self._greeted and isinstance(message, Greeting):
                raise ValueError("a second greeting")
        except (ValueError, RecursionError) as error:
            self._complain(f"{error}: {line[:80]!r}")
            return None
        self._greeted |= isinstance(message, Greeting)
        self._answered |= isinstance(message, Status)
        # Before the greeting nothing can be told: there was no negotiation yet.
        return message if self._greeted else None

    def _complain(self, complaint: str) -> None:
        self.complaint = self.complaint or complaint
