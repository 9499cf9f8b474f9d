"""The QMP protocol without I/O: real sessions in all pieces, and all that is bad."""

from __future__ import annotations

import json
import random
import sys
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvmd_qmp
import kvmd_verdict
from kvmd_qmp import Event, Greeting, Protocol, Status
from kvmd_verdict import Guest

RECORDINGS = sorted(Path(__file__).with_name("data").glob("*.qmp"))
INTERESTING = {"SHUTDOWN", *kvmd_verdict.EFFECTS}

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7},'
    b' "package": "Debian 1:7.2+dfsg-7"}, "capabilities": ["oob"]}}\r\n'
)
NEGOTIATED = b'{"return": {}}\r\n'
RUNNING = (
    b'{"return": {"status": "running", "singlestep": false, "running": true},'
    b' "id": "kvmd-status"}\r\n'
)
STOP = (
    b'{"timestamp": {"seconds": 1700000000, "microseconds": 250000},'
    b' "event": "STOP"}\r\n'
)
POWEROFF = (
    b'{"timestamp": {"seconds": 1700000001, "microseconds": 500000}, "event":'
    b' "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}\r\n'
)
UNINTERESTING = (
    b'{"timestamp": {"seconds": 1700000000, "microseconds": 750000}, "event":'
    b' "BLOCK_IO_ERROR", "data": {"device": "SHUTDOWN", "action": "report"}}\r\n'
)
NEWLINE = b"\n"
INTRODUCTION = GREETING + NEGOTIATED + RUNNING
SESSION = INTRODUCTION + UNINTERESTING + STOP + UNINTERESTING + POWEROFF

POWEROFF_EVENT = Event(
    "SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, 1700000001.5
)

Message = Any  # Greeting, Status or Event: named tuples without types


def receive(protocol: Protocol, pieces: Iterable[bytes]) -> list[Message]:
    """Return the messages in some pieces, less the events of no interest."""
    return [
        message
        for piece in pieces
        for message in protocol.receive(piece)
        if not isinstance(message, Event) or message.name in INTERESTING
    ]


def session_messages(*pieces: bytes) -> list[Message]:
    """Return the messages of a connection that brings these pieces, then ends."""
    return receive(Protocol(), [*pieces, b""])


@pytest.fixture
def negotiated() -> Protocol:
    """Return the protocol of a connection that has been greeted and answered."""
    protocol = Protocol()
    receive(protocol, [INTRODUCTION])
    return protocol


def kept_bytes(protocol: Protocol) -> int:
    """Return how much of its input a protocol keeps."""
    assert not hasattr(protocol, "__dict__")
    kept = {**protocol.export(), "complaint": ""}
    texts = [value for value in kept.values() if isinstance(value, str)]
    size = sum(len(a2b_base64(text)) for text in texts)
    assert protocol.pending == size
    return size


# ---- Real sessions -------------------------------------------------------------------


@pytest.fixture(params=RECORDINGS, ids=lambda path: path.stem)
def recording(request: pytest.FixtureRequest) -> bytes:
    """Return what a real QEMU once sent over one connection."""
    path: Path = request.param
    return path.read_bytes()


def test_there_are_recordings() -> None:
    assert RECORDINGS


def test_recording_is_understood(recording: bytes) -> None:
    protocol = Protocol()
    found = [message[0] for message in receive(protocol, [recording, b""])]
    assert found == list(words_of_interest(recording))
    assert protocol.complaint == ""


def words_of_interest(recording: bytes) -> Iterator[str]:
    """Yield the version, the status and the names of the events that matter."""
    for message in map(json.loads, recording.splitlines()):
        if "QMP" in message:
            yield "{major}.{minor}.{micro}".format(**message["QMP"]["version"]["qemu"])
        elif "id" in message:
            yield message["return"]["status"]
        elif message.get("event") in INTERESTING:
            yield message["event"]


def test_every_split_of_a_recording_says_the_same(recording: bytes) -> None:
    whole = session_messages(recording)
    for position in range(1, len(recording)):
        assert session_messages(recording[:position], recording[position:]) == whole


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pieces_of_any_size_say_the_same(recording: bytes, size: int) -> None:
    pieces = [recording[i : i + size] for i in range(0, len(recording), size)]
    assert session_messages(*pieces) == session_messages(recording)


# ---- The shape of a line -------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\r\n", b"\n", b"\r\n\r\n", b" \t\r\n", b"\r\r\n"])
def test_any_end_of_line_will_do(end: bytes) -> None:
    assert session_messages(SESSION.replace(b"\r\n", end)) == session_messages(SESSION)


def test_carriage_return_and_line_feed_may_come_apart() -> None:
    pieces = SESSION.replace(b"\r\n", b"\r|\n").split(b"|")
    assert session_messages(*pieces) == session_messages(SESSION)


@pytest.mark.parametrize("end", [b"", b"\r"])
def test_last_line_may_lack_its_newline(end: bytes) -> None:
    assert session_messages(INTRODUCTION, POWEROFF.strip() + end)[-1] == POWEROFF_EVENT


def test_unfinished_last_line_is_no_event(negotiated: Protocol) -> None:
    assert receive(negotiated, [POWEROFF.strip()[:-1], b""]) == []


def test_members_may_come_in_any_order(negotiated: Protocol) -> None:
    backwards = (
        b'{"data": {"reason": "guest-shutdown", "guest": true}, "event": "SHUTDOWN",'
        b' "timestamp": {"microseconds": 500000, "seconds": 1700000001}}\n'
    )
    assert receive(negotiated, [backwards]) == [POWEROFF_EVENT]


@pytest.mark.parametrize(
    "write",
    [
        lambda message: json.dumps(message, separators=(",", ":")),
        lambda message: json.dumps(message, separators=(" ,\t", " \t:  ")),
        lambda message: json.dumps({**message, "x": [{}], "of-a-later-qemu": None}),
    ],
    ids=["compact", "spaced", "with unknown members"],
)
def test_white_space_and_unknown_members_mean_nothing(
    negotiated: Protocol, write: Callable[[object], str]
) -> None:
    line = write(json.loads(POWEROFF)).encode() + b"\n"
    assert receive(negotiated, [line]) == [POWEROFF_EVENT]


@pytest.mark.parametrize(
    "text",
    [
        "SHUTDOWN",
        'x"event": "SHUTDOWN"',
        '"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}',
        POWEROFF.decode(),
    ],
)
@pytest.mark.parametrize(
    "shape",
    [
        '{"event": "VNC_CONNECTED", "data": {"client": %s}}',
        '{"event": "BLOCK_JOB_ERROR", "data": {"event": %s}}',
        '{"event": "DEVICE_DELETED", "data": %s}',
        '{"return": %s, "id": "kvmd-status"}',
        '{"return": {"event": "SHUTDOWN", "text": %s}}',
        '{"data": {"event": "SHUTDOWN", "text": %s}, "event": "DEVICE_DELETED"}',
    ],
)
def test_text_that_looks_like_an_event_is_none(
    negotiated: Protocol, shape: str, text: str
) -> None:
    line = shape % json.dumps(text) + "\n"
    assert receive(negotiated, [line.encode()]) == []


def test_client_negotiates_and_asks_for_the_status() -> None:
    lines = kvmd_qmp.COMMANDS.split(b"\r\n")
    assert lines.pop() == b""
    assert [json.loads(line) for line in lines] == [
        {"execute": "qmp_capabilities", "id": "kvmd-negotiation"},
        {"execute": "query-status", "id": "kvmd-status"},
    ]


def test_negotiation_that_was_there_before_is_refused_without_a_complaint() -> None:
    refusal = b'{"id": "kvmd-negotiation", "error": {"class": "CommandNotFound"}}\r\n'
    protocol = Protocol()
    assert receive(protocol, [GREETING, refusal + RUNNING])[1:] == [Status("running")]
    assert protocol.complaint == ""


@pytest.mark.parametrize("name", sorted(INTERESTING))
def test_every_event_that_matters_is_returned(negotiated: Protocol, name: str) -> None:
    line = UNINTERESTING.replace(b"BLOCK_IO_ERROR", name.encode())
    data = {"device": "SHUTDOWN", "action": "report"}
    assert receive(negotiated, [line]) == [Event(name, data, 1700000000.75)]


@pytest.mark.parametrize("line", [NEGOTIATED, RUNNING, STOP, UNINTERESTING, POWEROFF])
def test_message_before_the_greeting_is_skipped_with_a_complaint(line: bytes) -> None:
    protocol = Protocol()
    assert receive(protocol, [line, POWEROFF]) == []
    assert protocol.complaint == f"before the greeting: {line.rstrip(NEWLINE)[:80]!r}"
    assert receive(protocol, [SESSION]) == session_messages(SESSION)


def test_status_before_the_greeting_is_none() -> None:
    # Else answers of no interest would be all that is left to come.
    assert session_messages(RUNNING, GREETING, RUNNING)[1:] == [Status("running")]


def test_answer_to_another_question_is_not_the_status() -> None:
    for stranger in (b'"x"', b"7", b"null", b'["kvmd-status"]'):
        answer = RUNNING.replace(b'"kvmd-status"', stranger)
        assert len(session_messages(GREETING, answer)) == 1


@pytest.mark.parametrize(
    ("timestamp", "time"),
    [
        ('{"seconds": 1700000000, "microseconds": 1}', 1700000000.000001),
        ('{"seconds": 0, "microseconds": 0}', 0.0),
        ('{"seconds": 1099511627775, "microseconds": 0}', 1099511627775.0),
        ('{"seconds": 1099511627776, "microseconds": 0}', None),
        ('{"seconds": -1, "microseconds": -1}', None),
        ('{"seconds": -1, "microseconds": 0}', None),
        ('{"seconds": 1, "microseconds": -1}', None),
        ('{"seconds": 0, "microseconds": 999999}', 0.999999),
        ('{"seconds": 1e3, "microseconds": 0}', None),
        ('{"seconds": "1", "microseconds": 0}', None),
        ('{"seconds": 1, "microseconds": 1000000}', None),
        ('{"seconds": 1%s, "microseconds": 0}' % ("0" * 19), None),
        ('{"seconds": 1}', None),
        ("{}", None),
        ("null", None),
        ("[1, 2]", None),
    ],
)
def test_time_of_an_event_is_known_or_not(
    negotiated: Protocol, timestamp: str, time: float | None
) -> None:
    line = f'{{"event": "RESET", "timestamp": {timestamp}}}\n'
    assert receive(negotiated, [line.encode()]) == [Event("RESET", None, time)]


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ('{"major": 7, "minor": 2, "micro": 22}', "7.2.22"),
        ('{"major": 10, "minor": 0, "micro": 0}', "10.0.0"),
        ('{"major": 7, "minor": 999, "micro": 1000}', "7.999.0"),
        ('{"major": "7", "minor": 2, "micro": 22}', "unknown"),
        ('{"major": 7}', "unknown"),
        ("null", "unknown"),
        ("[7, 2, 22]", "unknown"),
    ],
)
def test_version_is_known_or_not(version: str, text: str) -> None:
    line = f'{{"QMP": {{"version": {{"qemu": {version}}}}}}}\n'
    assert session_messages(line.encode()) == [Greeting(text)]


# ---- Across a restart ----------------------------------------------------------------


def restarted(protocol: Protocol) -> Protocol:
    """Return a protocol that goes on where another one stood."""
    return Protocol.restore(json.loads(json.dumps(protocol.export())))


def test_restart_at_any_byte_of_a_recording_loses_nothing(recording: bytes) -> None:
    whole = session_messages(recording)
    for position in range(1, len(recording)):
        earlier = Protocol()
        messages = receive(earlier, [recording[:position]])
        later = restarted(earlier)
        assert messages + receive(later, [recording[position:], b""]) == whole


def test_restart_amid_a_line_that_is_too_long_goes_on_skipping_it(
    negotiated: Protocol,
) -> None:
    receive(negotiated, [b"x" * kvmd_qmp.LINE_LIMIT, b"x"])
    assert receive(restarted(negotiated), [POWEROFF, POWEROFF]) == [POWEROFF_EVENT]


@pytest.fixture
def records() -> list[dict[str, object]]:
    """Return what is exported amid a line, and amid one that is too long."""
    protocol = Protocol()
    receive(protocol, [INTRODUCTION + b"rubbish\n\xff"])
    amid = protocol.export()
    receive(protocol, [b"{" * kvmd_qmp.LINE_LIMIT])
    return [amid, protocol.export()]


def test_protocol_is_restored_from_json(records: list[dict[str, object]]) -> None:
    assert {name for record in records for name in record} == kvmd_qmp.INITIAL.keys()
    for record in records:
        assert Protocol.restore(json.loads(json.dumps(record))).export() == record


def test_complaint_outlives_a_restart(negotiated: Protocol) -> None:
    receive(negotiated, [b"rubbish\n"])
    later = restarted(negotiated)
    receive(later, [b"more rubbish\n"])
    assert later.complaint == negotiated.complaint
    assert restarted(Protocol()).complaint == ""


def test_member_that_is_as_in_a_new_connection_is_left_out() -> None:
    assert Protocol().export() == {}
    assert Protocol.restore(kvmd_qmp.INITIAL).export() == {}
    assert Protocol.restore({}).export() == {}
    assert Protocol.restore({"greeted": True}).export() == {"greeted": True}


def test_unknown_member_of_a_record_is_passed_over() -> None:
    assert Protocol.restore({"of-a-later-kvmd": 1}).export() == {}


@pytest.mark.parametrize("name", kvmd_qmp.INITIAL)
@pytest.mark.parametrize("value", [None, True, 1, 1.5, "text", [], {}], ids=repr)
def test_member_of_another_type_is_refused(name: str, value: object) -> None:
    if type(value) is type(kvmd_qmp.INITIAL[name]):
        Protocol.restore({name: value})
    else:
        with pytest.raises(ValueError):
            Protocol.restore({name: value})


def test_unfinished_line_that_is_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError):
        Protocol.restore({"unfinished": "\u20ac"})


def test_unfinished_line_of_a_record_is_bounded() -> None:
    line = b"{" * (kvmd_qmp.LINE_LIMIT + 1)
    record = {"unfinished": b2a_base64(line).decode()}
    restored = Protocol.restore(record)
    assert kept_bytes(restored) == 0
    assert restored.complaint == "a line of more than 65536 bytes"


# ---- The many events of no interest -----------------------------------------


@pytest.fixture
def count_parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that tells how many lines JSON was parsed for so far."""
    texts = []
    parse_message = kvmd_qmp.parse_message

    def note_and_parse(line: bytes) -> object:
        texts.append(line)
        return parse_message(line)

    monkeypatch.setattr(kvmd_qmp, "parse_message", note_and_parse)
    return lambda: len(texts)


def test_no_json_is_parsed_for_an_event_of_no_interest(
    negotiated: Protocol, count_parsed: Callable[[], int]
) -> None:
    later = restarted(negotiated)
    before = count_parsed()
    for protocol in (negotiated, later):
        assert receive(protocol, [UNINTERESTING] * 100 + [UNINTERESTING * 100]) == []
    assert count_parsed() == before


def test_json_is_parsed_for_an_interesting_event_but_not_for_its_neighbours(
    negotiated: Protocol, count_parsed: Callable[[], int]
) -> None:
    flood = UNINTERESTING + b"{}\n[\n\n"
    assert receive(negotiated, [flood * 100 + POWEROFF + flood * 100]) == [
        POWEROFF_EVENT
    ]
    assert count_parsed() == 1


def test_little_is_read_at_a_time_at_first(negotiated: Protocol) -> None:
    for protocol in (Protocol(), restarted(negotiated)):
        assert protocol.read_size == kvmd_qmp.CAREFUL_READ_SIZE


def test_much_is_read_of_a_line_that_goes_on_once_the_status_is_known(
    negotiated: Protocol,
) -> None:
    for protocol, size in [
        (Protocol(), kvmd_qmp.CAREFUL_READ_SIZE),
        (negotiated, kvmd_qmp.READ_SIZE),
    ]:
        receive(protocol, [b"{"])
        assert protocol.read_size == size


def test_more_is_read_at_a_time_while_there_is_nothing_to_parse(
    negotiated: Protocol,
) -> None:
    sizes = []
    for piece in (UNINTERESTING, STOP, UNINTERESTING):
        receive(negotiated, [piece])
        sizes.append(negotiated.read_size)
    assert sizes == [kvmd_qmp.READ_SIZE, kvmd_qmp.CAREFUL_READ_SIZE, kvmd_qmp.READ_SIZE]


# ---- What is bad ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "rubbish", [b"rubbish\n", b"\xff\xfe\n", b"{" + b"x" * kvmd_qmp.LINE_LIMIT + b"\n"]
)
def test_rubbish_is_complained_of_while_the_guest_runs_too(
    negotiated: Protocol, rubbish: bytes
) -> None:
    size = kvmd_qmp.READ_SIZE
    pieces = [rubbish[i : i + size] for i in range(0, len(rubbish), size)]
    assert receive(negotiated, [UNINTERESTING, *pieces]) == []
    complaint = negotiated.complaint
    assert complaint
    assert receive(negotiated, [rubbish, POWEROFF]) == [POWEROFF_EVENT]
    assert negotiated.complaint == complaint


def test_no_json_is_parsed_for_further_rubbish(
    negotiated: Protocol, count_parsed: Callable[[], int]
) -> None:
    receive(negotiated, [b"{rubbish\n", b"rubbish\n"])
    before = count_parsed()
    receive(negotiated, [b"rubbish\n"])
    assert count_parsed() == before


def line_of(length: int) -> bytes:
    """Return a STOP event of so many bytes, the newline not counted."""
    start, end = b'{"event": "STOP", "data": "', b'"}'
    return start + b"x" * (length - len(start) - len(end)) + end + b"\n"


@pytest.mark.parametrize("size", [1000, kvmd_qmp.READ_SIZE])
def test_line_as_long_as_the_limit_is_read(negotiated: Protocol, size: int) -> None:
    line = line_of(kvmd_qmp.LINE_LIMIT)
    pieces = [line[i : i + size] for i in range(0, len(line), size)]
    assert [event.name for event in receive(negotiated, pieces)] == ["STOP"]
    assert negotiated.complaint == ""


@pytest.mark.parametrize("size", [1000, kvmd_qmp.READ_SIZE, 10 * kvmd_qmp.LINE_LIMIT])
@pytest.mark.parametrize("length", [kvmd_qmp.LINE_LIMIT + 1, 3 * kvmd_qmp.LINE_LIMIT])
def test_longer_line_is_skipped_to_its_end(
    negotiated: Protocol, length: int, size: int
) -> None:
    line = line_of(length) + POWEROFF
    pieces = [line[i : i + size] for i in range(0, len(line), size)]
    assert receive(negotiated, pieces) == [POWEROFF_EVENT]
    assert negotiated.complaint.startswith("a line of more than 65536 bytes")


def test_nothing_is_kept_of_a_longer_line(negotiated: Protocol) -> None:
    for piece in (b"x" * kvmd_qmp.LINE_LIMIT, b"x", b"x"):
        receive(negotiated, [piece])
    assert kept_bytes(negotiated) == 0


def test_end_of_a_longer_line_is_no_event_of_its_own(negotiated: Protocol) -> None:
    pieces = [b"x" * kvmd_qmp.LINE_LIMIT, b"x", POWEROFF, STOP]
    assert [event.name for event in receive(negotiated, pieces)] == ["STOP"]


def test_longer_last_line_is_nothing(negotiated: Protocol) -> None:
    assert (
        receive(negotiated, [POWEROFF.strip(), b" " * kvmd_qmp.LINE_LIMIT, b""]) == []
    )


def test_64_mib_without_a_newline_are_not_kept(negotiated: Protocol) -> None:
    piece = b"x" * kvmd_qmp.READ_SIZE
    for _ in range((64 << 20) // len(piece)):
        assert negotiated.receive(piece) == []
        assert kept_bytes(negotiated) <= kvmd_qmp.LINE_LIMIT
    assert receive(negotiated, [b"\n" + POWEROFF]) == [POWEROFF_EVENT]


BAD_LINES = {
    "empty object": b"{}",
    "array": b'["event", "SHUTDOWN"]',
    "string": b'"event"',
    "number": b"7",
    "null": b"null",
    "not a number": b"NaN",
    "garbage": b"\x7f\x45\x4c\x46 what is this?",
    "unclosed": b'{"event": "SHUTDOWN"',
    "two in a line": POWEROFF.strip() + POWEROFF.strip(),
    "many opening brackets": b"[" * 60000,
    "too many opening brackets": b"[" * 100000,
    "deep event": b'{"event": "SHUTDOWN", "data": ' + b'{"a":' * 10000 + b"}" * 10001,
    "5000 digits": b'{"event": "SHUTDOWN", "data": ' + b"9" * 5000 + b"}",
    "NULs": b"\0" * 100,
    "UTF-16": '{"event": "SHUTDOWN"}'.encode("utf-16"),
    "UTF-32": '{"event": "SHUTDOWN"}'.encode("utf-32"),
    "byte order mark": b'\xef\xbb\xbf{"event": "SHUTDOWN"}',
    "invalid UTF-8": b'{"event": "SHUTDOWN", "data": "\xff\xfe\xc0\x80"}',
    "raw surrogate": b'{"event": "SHUTDOWN", "data": "\xed\xa0\x80"}',
    "refusal": b'{"error": {"class": "CommandNotFound", "desc": "SHUTDOWN"}}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
@pytest.mark.parametrize("introduction", [b"", GREETING, INTRODUCTION])
def test_bad_line_costs_nothing_but_itself(introduction: bytes, line: bytes) -> None:
    session = introduction + b"|" + INTRODUCTION + POWEROFF
    expected = session_messages(session.replace(b"|", b""))
    assert session_messages(session.replace(b"|", line + b"\n")) == expected


@pytest.fixture(params=["the interpreter's limit", "no limit"])
def digit_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have the interpreter convert integers of any length, as older ones do."""
    if request.param == "no limit" and hasattr(sys, "set_int_max_str_digits"):
        limit = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)
        try:
            yield
        finally:
            sys.set_int_max_str_digits(limit)
    else:
        yield


@pytest.mark.usefixtures("digit_limit")
@pytest.mark.parametrize(
    ("number", "complaint"),
    [
        (-(2**63), None),
        (2**64 - 1, None),
        (10**20, "a number of more than 20 characters"),
        (10**4299, "a number of more than 20 characters"),
        ("9" * 60000, "a number of more than 20 characters"),
    ],
    ids=["smallest", "largest", "longer", "long", "very long"],
)
def test_integer_is_as_long_as_those_of_qemu(
    negotiated: Protocol, number: object, complaint: str | None
) -> None:
    line = f'{{"event": "STOP", "data": {number}}}\n'.encode()
    names = [event.name for event in receive(negotiated, [line])]
    assert names == (["STOP"] if complaint is None else [])
    assert negotiated.complaint.startswith(complaint or "")
    assert bool(negotiated.complaint) is bool(complaint)


# What JSON permits, and QEMU never says.
ODD_LINES = {
    "infinity": b'{"event": "SHUTDOWN", "data": -1e999}',
    "no number": b'{"event": "SHUTDOWN", "data": {"guest": NaN}}',
    "name twice": b'{"event": "STOP", "event": "SHUTDOWN"}',
    "lone surrogate": rb'{"event": "SHUTDOWN", "data": {"reason": "\udfff"}}',
}


@pytest.mark.parametrize("line", ODD_LINES.values(), ids=ODD_LINES.keys())
def test_odd_line_is_an_event(negotiated: Protocol, line: bytes) -> None:
    messages = receive(negotiated, [line + b"\n"])
    assert [event.name for event in messages] == ["SHUTDOWN"]
    assert_well_formed(messages)


@pytest.mark.parametrize("status", [b"", rb"\ud800\n", b"up: verdict=user", b"a" * 33])
def test_status_that_could_deceive_who_reads_the_log_is_none(status: bytes) -> None:
    answer = RUNNING.replace(b'running",', status + b'",')
    assert not any(isinstance(m, Status) for m in session_messages(GREETING, answer))


def test_first_bad_line_is_complained_of(negotiated: Protocol) -> None:
    receive(negotiated, [b'{"event": "STOP"\n', b'["event": "RESET"]\n'])
    assert negotiated.complaint.endswith(r"""b'{"event": "STOP"'""")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"error": {"class": "CommandNotFound"}}', "a command was refused: "),
        (b'{"error": {}, "id": "kvmd-status"}', "a command was refused: "),
        (b"{}", "neither greeting, answer nor event: b'{}'"),
        (b"[]", "neither greeting, answer nor event: b'[]'"),
        (b'{"return": 1, "id": "kvmd-status"}', "no status in the answer to"),
        (b"x" * (kvmd_qmp.LINE_LIMIT + 1), "a line of more than 65536 bytes: b'xxx"),
        (b"1" * 21, "a number of more than 20 characters: b'111"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff"),
        (b"x", "Expecting value: line 1 column 1 (char 0): b'x'"),
    ],
)
def test_complaint_says_what_is_bad(line: bytes, complaint: str) -> None:
    protocol = Protocol()
    receive(protocol, [GREETING + line + b"\n"])
    assert protocol.complaint.startswith(complaint)


def test_second_greeting_is_skipped_with_a_complaint(negotiated: Protocol) -> None:
    greeting = b'{"QMP": {"version": {}}}\n'
    protocol = Protocol()
    assert receive(protocol, [greeting * 2]) == [Greeting("unknown")]
    assert protocol.complaint.startswith("a second greeting: ")


def test_complaint_about_a_long_line_is_short() -> None:
    protocol = Protocol()
    receive(protocol, [b"\xff" * 60000 + b"\n"])
    assert 0 < len(protocol.complaint) < 500


def assert_well_formed(messages: Iterable[Message]) -> None:
    """Check the types of all messages, and that a verdict can be made of it."""
    guest = Guest()
    for message in messages:
        if isinstance(message, Greeting):
            assert isinstance(message.version, str)
        elif isinstance(message, Status):
            assert isinstance(message.status, str)
            guest.on_status(message.status)
        else:
            assert isinstance(message, Event)
            assert isinstance(message.name, str)
            assert isinstance(message.time, (float, type(None)))
            guest.on_event(message.name, message.data, message.time)
    guest.on_end()


OTHER_VALUES: list[object] = [None, True, 0, -1, 1.5, 10**30, float("nan"), "", "\0"]
OTHER_VALUES += [[], [[]], ["SHUTDOWN"], {}, {"": {}}, {"event": "SHUTDOWN"}]


def with_other_values(value: object) -> Iterator[object]:
    """Yield a JSON value with another value in each of its places."""
    yield from OTHER_VALUES
    if isinstance(value, dict):
        for name in value:
            yield {other: value[other] for other in value if other != name}
            for inner in with_other_values(value[name]):
                yield {**value, name: inner}


@pytest.mark.parametrize("line", [GREETING, NEGOTIATED, RUNNING, STOP, POWEROFF])
def test_wrong_types_at_every_place_are_survived(line: bytes) -> None:
    for value in with_other_values(json.loads(line)):
        wrong = json.dumps(value).encode() + b"\n"
        for introduction in (b"", GREETING, INTRODUCTION):
            protocol = Protocol()
            assert_well_formed(receive(protocol, [introduction + wrong]))
            assert receive(protocol, [GREETING + POWEROFF])[-1] == POWEROFF_EVENT


# ---- What nobody thought of ----------------------------------------------------------

# What mutations put in: parts of JSON, of messages, and of what breaks decoders.
FRAGMENTS = [b"\r\n", b"\n", b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b"\0"]
FRAGMENTS += [b'"event"', b'"SHUTDOWN"', b'"QMP"', b'"return"', b"null", b"-1", b"1e9"]
FRAGMENTS += [b"\\ud800", b"\xff", b"\xed\xa0\x80", b"[" * 2000, b"9" * 5000, POWEROFF]


def mutated(session: bytes, chance: random.Random) -> bytes:
    """Return a session with some bytes changed, taken out, repeated or put in."""
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(session) + 1)
        end = min(len(session), start + chance.randrange(40))
        session = (
            session[:start]
            + chance.choice(
                [
                    bytes(chance.randrange(256) for _ in range(end - start)),
                    b"",
                    session[start:end] * 2,
                    chance.choice(FRAGMENTS) + session[start:end],
                ]
            )
            + session[end:]
        )
    return session


def in_pieces(data: bytes, chance: random.Random) -> Iterator[bytes]:
    """Yield the data in a few pieces, then its end."""
    while data:
        size = chance.choice([1, chance.randint(1, 200), kvmd_qmp.READ_SIZE])
        yield data[:size]
        data = data[size:]
    yield b""


def survive(data: bytes, chance: random.Random) -> None:
    """Have a protocol and a guest's state take the data, in pieces."""
    protocol = Protocol()
    messages = []
    for piece in in_pieces(data, chance):
        messages += protocol.receive(piece)
        assert kept_bytes(protocol) <= kvmd_qmp.LINE_LIMIT
    assert_well_formed(messages)


def survive_mutations(count: int) -> None:
    """Take so many mutations of the sessions; each number stands for one mutation."""
    sessions = [SESSION, *(path.read_bytes() for path in RECORDINGS)]
    for number in range(count):
        chance = random.Random(number)
        try:
            survive(mutated(chance.choice(sessions), chance), chance)
        except Exception as error:
            raise AssertionError(f"mutation {number}") from error


def survive_noise(count: int) -> None:
    """Take so many runs of random bytes; each number stands for one run."""
    for number in range(count):
        chance = random.Random(number)
        noise = chance.getrandbits(8 * 500).to_bytes(500, "little")
        try:
            survive(chance.choice([b"", GREETING, INTRODUCTION]) + noise, chance)
        except Exception as error:
            raise AssertionError(f"noise {number}") from error


def test_mutations_of_sessions_are_survived() -> None:
    survive_mutations(5000)


def test_random_bytes_are_survived() -> None:
    survive_noise(5000)


@pytest.mark.soak
def test_a_million_mutations_of_sessions_are_survived() -> None:
    survive_mutations(1000000)


@pytest.mark.soak
def test_a_million_runs_of_random_bytes_are_survived() -> None:
    survive_noise(1000000)
