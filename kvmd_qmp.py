"""The client side of QMP without I/O: bytes in, messages out.

QEMU's docs/interop/qmp-spec has a JSON object per line. The client sends COMMANDS as
soon as it is connected, gives Protocol.receive() what it reads, and gets back the
greeting, the status and the events; of the events, some of no interest are left out.

The peer is not trusted. Of a line that goes on, LINE_LIMIT bytes at most are kept, and
a longer one is skipped. So is every line that is no message, or comes before the
greeting; the first of them is the complaint of the connection. No member has a type
that is not checked, and nothing raises an exception. JSON is parsed for a line of an
event of interest alone, once the status is known: there may be millions of others.
"""

from __future__ import annotations

import collections
import json
import re
import sys
from binascii import a2b_base64, b2a_base64

from kvmd_verdict import EFFECTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Sent in one write on connecting: events before the negotiation are lost.
COMMANDS = (
    b'{"execute": "qmp_capabilities", "id": "kvmd-negotiation"}\r\n'
    b'{"execute": "query-status", "id": "kvmd-status"}\r\n'
)
STATUS_ID = "kvmd-status"
#: QEMU refuses to negotiate again, as a daemon does that was started in between.
NEGOTIATION_ID = "kvmd-negotiation"
#: What may be a status (RunState in QEMU's qapi/run-state.json): it goes into the log.
STATUS = re.compile(r"[a-z0-9-]{1,32}")

#: Bytes of an unfinished line that are kept.
LINE_LIMIT = 65536
#: Characters of an integer that are taken: QEMU's have 64 bits and a sign.
INTEGER_LIMIT = 20
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
#: The time is in seconds since the epoch by QEMU's clock, None if it has none.
Event = collections.namedtuple("Event", "name data time")


def parse_integer(text: str) -> int:
    """Return an integer. Raises ValueError for one of more digits than QEMU's have.

    To convert a number takes the square of its length, and not every Python has a
    limit of its own.
    """
    if len(text) > INTEGER_LIMIT:
        raise ValueError(f"a number of more than {INTEGER_LIMIT} characters")
    return int(text)


DECODER = json.JSONDecoder(parse_int=parse_integer)


def parse_message(line: bytes) -> Greeting | Status | Event | None:
    """Return what one line says, None for an answer of no interest.

    Raises ValueError, or RecursionError for deep nesting, if it is no QMP message.
    """
    if len(line) > LINE_LIMIT:
        raise ValueError(OVERLONG)
    # Given bytes, json would guess the encoding, and take NULs for UTF-16.
    message = DECODER.decode(line.decode("utf-8"))
    if not isinstance(message, dict):
        message = {}
    if isinstance(message.get("event"), str):
        time = event_time(message.get("timestamp"))
        return Event(message["event"], message.get("data"), time)
    if "QMP" in message:
        return Greeting(qemu_version(message["QMP"]))
    if "error" in message and message.get("id") != NEGOTIATION_ID:
        raise ValueError("a command was refused")
    if not {"return", "error"} & message.keys():
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


#: What is kept of a connection, as it is at its start.
INITIAL = {
    "greeted": False,
    "answered": False,
    "unfinished": "",
    "overlong": False,
    "complaint": "",
}


class Protocol:
    """The client side of one QMP connection: bytes in, messages out.

    `read_size` is how many bytes the next read should ask for. `complaint` says what
    was skipped first, "" if nothing was.
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
        self.complaint = ""

    def receive(self, data: bytes) -> list[Greeting | Status | Event]:
        """Take what was read, b"" at the end of the connection; return the messages."""
        only_events = self._answered
        end = data.rfind(b"\n") + 1
        if data and not end:
            self._keep(data)
            self.read_size = READ_SIZE if only_events else CAREFUL_READ_SIZE
            return []
        lines = self._unfinished + data[:end]
        self._unfinished = b""
        if self._overlong:
            lines = lines[lines.find(b"\n") + 1 :]
            self._overlong = False
        self._keep(data[end:])
        # The first bad line is looked for. Of the others only events can matter.
        suspect = lines[:1] != b"{" or len(lines) > LINE_LIMIT
        only_events = only_events and not (suspect and not self.complaint)
        if only_events and not EVENT_OF_INTEREST.search(lines):
            self.read_size = READ_SIZE
            return []
        self.read_size = CAREFUL_READ_SIZE
        messages = [
            self._read_line(line)
            for line in lines.split(b"\n")
            if not only_events or EVENT_OF_INTEREST.search(line)
        ]
        return [message for message in messages if message is not None]

    @property
    def pending(self) -> int:
        """How many bytes are kept of a line that goes on."""
        return len(self._unfinished)

    def export(self) -> dict[str, object]:
        """Return what differs from a new connection, as JSON can hold it."""
        members = {
            "greeted": self._greeted,
            "answered": self._answered,
            # JSON needs six characters for a byte that is no text.
            "unfinished": b2a_base64(self._unfinished, newline=False).decode(),
            "overlong": self._overlong,
            "complaint": self.complaint,
        }
        return {name: value for name, value in members.items() if value}

    @classmethod
    def restore(cls, record: dict[str, Any]) -> Protocol:
        """Return a protocol that goes on where the exported one stood.

        Members that are unknown are passed over, and missing ones are as at the start.
        Raises ValueError for a member of another type.
        """
        members = {**INITIAL, **record}
        for name, initial in INITIAL.items():
            if type(members[name]) is not type(initial):
                raise ValueError(f"a connection's {name} is of another type")
        protocol = cls()
        protocol._greeted = members["greeted"]
        protocol._answered = members["answered"]
        protocol._overlong = members["overlong"]
        protocol.complaint = members["complaint"]
        protocol._keep(a2b_base64(members["unfinished"]))
        return protocol

    def _keep(self, data: bytes) -> None:
        """Keep the start of a line, or skip the line if it is too long."""
        if self._overlong or len(self._unfinished) + len(data) > LINE_LIMIT:
            self._unfinished = b""
            self._overlong = True
            self._complain(OVERLONG)
        else:
            self._unfinished += data

    def _read_line(self, line: bytes) -> Greeting | Status | Event | None:
        """Return what a line says; complain of it if it says nothing."""
        if not line.strip():
            return None
        try:
            message = parse_message(line)
            if isinstance(message, Greeting) is self._greeted:
                # There is one negotiation, and before it nothing can be told.
                raise ValueError(
                    "a second greeting" if self._greeted else "before the greeting"
                )
        except (ValueError, RecursionError) as error:
            self._complain(f"{error}: {line[:80]!r}")
            return None
        self._greeted = True
        self._answered |= isinstance(message, Status)
        return message

    def _complain(self, complaint: str) -> None:
        """Keep the first complaint of the connection."""
        self.complaint = self.complaint or complaint
