"""The QMP protocol without I/O: real sessions in all pieces, and all that is bad."""

from __future__ import annotations

import json
import random
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
INTRODUCTION = GREETING + NEGOTIATED + RUNNING
SESSION = INTRODUCTION + UNINTERESTING + STOP + UNINTERESTING + POWEROFF

POWEROFF_HEARD = Event(
    "SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, 1700000001.5
)

Message = Any  # Greeting, Status or Event: named tuples without types


def hear(protocol: Protocol, pieces: Iterable[bytes]) -> list[Message]:
    """Return the messages in some pieces, less the events that nobody cares about."""
    return [
        message
        for piece in pieces
        for message in protocol.receive(piece)
        if not isinstance(message, Event) or message.name in INTERESTING
    ]


def hear_session(*pieces: bytes) -> list[Message]:
    """Return the messages of a connection that brings these pieces, then ends."""
    return hear(Protocol(), [*pieces, b""])


@pytest.fixture
def listening() -> Protocol:
    """Return the protocol of a connection that has been greeted and answered."""
    protocol = Protocol()
    hear(protocol, [INTRODUCTION])
    return protocol


def kept_bytes(protocol: Protocol) -> int:
    """Return how much of its input a protocol keeps."""
    values = [getattr(protocol, name) for name in protocol.__slots__]
    return sum(len(value) for value in values if isinstance(value, (bytes, bytearray)))


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
    heard = [message[0] for message in hear(protocol, [recording, b""])]
    assert heard == list(words_of_interest(recording))
    assert protocol.complaint is None


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
    whole = hear_session(recording)
    for position in range(1, len(recording)):
        assert hear_session(recording[:position], recording[position:]) == whole


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pieces_of_any_size_say_the_same(recording: bytes, size: int) -> None:
    pieces = [recording[i : i + size] for i in range(0, len(recording), size)]
    assert hear_session(*pieces) == hear_session(recording)


# ---- The shape of a line -------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\r\n", b"\n", b"\r\n\r\n", b" \t\r\n", b"\r\r\n"])
def test_any_end_of_line_will_do(end: bytes) -> None:
    assert hear_session(SESSION.replace(b"\r\n", end)) == hear_session(SESSION)


def test_carriage_return_and_line_feed_may_come_apart() -> None:
    pieces = SESSION.replace(b"\r\n", b"\r|\n").split(b"|")
    assert hear_session(*pieces) == hear_session(SESSION)


@pytest.mark.parametrize("end", [b"", b"\r"])
def test_last_line_may_lack_its_newline(end: bytes) -> None:
    assert hear_session(INTRODUCTION, POWEROFF.strip() + end)[-1] == POWEROFF_HEARD


def test_unfinished_last_line_is_no_event(listening: Protocol) -> None:
    assert hear(listening, [POWEROFF.strip()[:-1], b""]) == []


def test_members_may_come_in_any_order(listening: Protocol) -> None:
    backwards = (
        b'{"data": {"reason": "guest-shutdown", "guest": true}, "event": "SHUTDOWN",'
        b' "timestamp": {"microseconds": 500000, "seconds": 1700000001}}\n'
    )
    assert hear(listening, [backwards]) == [POWEROFF_HEARD]


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
    listening: Protocol, write: Callable[[object], str]
) -> None:
    line = write(json.loads(POWEROFF)).encode() + b"\n"
    assert hear(listening, [line]) == [POWEROFF_HEARD]


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
    listening: Protocol, shape: str, text: str
) -> None:
    line = shape % json.dumps(text) + "\n"
    assert hear(listening, [line.encode()]) == []


def test_nothing_is_told_before_the_greeting() -> None:
    assert hear_session(RUNNING, POWEROFF) == []
    assert hear_session(RUNNING, POWEROFF, GREETING, POWEROFF)[1:] == [POWEROFF_HEARD]


def test_answer_to_another_question_is_not_the_status() -> None:
    for stranger in (b'"x"', b"7", b"null", b'["kvmd-status"]'):
        answer = RUNNING.replace(b'"kvmd-status"', stranger)
        assert len(hear_session(GREETING, answer)) == 1


@pytest.mark.parametrize(
    ("timestamp", "time"),
    [
        ('{"seconds": 1700000000, "microseconds": 1}', 1700000000.000001),
        ('{"seconds": 0, "microseconds": 0}', 0.0),
        ('{"seconds": -1, "microseconds": -1}', None),
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
    listening: Protocol, timestamp: str, time: float | None
) -> None:
    line = f'{{"event": "RESET", "timestamp": {timestamp}}}\n'
    assert hear(listening, [line.encode()]) == [Event("RESET", None, time)]


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ('{"major": 7, "minor": 2, "micro": 22}', "7.2.22"),
        ('{"major": 10, "minor": 0, "micro": 0}', "10.0.0"),
        ('{"major": "7", "minor": 2, "micro": 22}', "unknown"),
        ('{"major": 7}', "unknown"),
        ("null", "unknown"),
        ("[7, 2, 22]", "unknown"),
    ],
)
def test_version_is_known_or_not(version: str, text: str) -> None:
    line = f'{{"QMP": {{"version": {{"qemu": {version}}}}}}}\n'
    assert hear_session(line.encode()) == [Greeting(text)]


# ---- Across a restart ----------------------------------------------------------------


def restarted(protocol: Protocol) -> Protocol:
    """Return a protocol that goes on where another one stood."""
    return Protocol.restore(json.loads(json.dumps(protocol.export())))


def test_restart_at_any_byte_of_a_recording_loses_nothing(recording: bytes) -> None:
    whole = hear_session(recording)
    for position in range(1, len(recording)):
        earlier = Protocol()
        messages = hear(earlier, [recording[:position]])
        later = restarted(earlier)
        assert messages + hear(later, [recording[position:], b""]) == whole


def test_restart_amid_a_line_that_is_too_long_goes_on_skipping_it(
    listening: Protocol,
) -> None:
    hear(listening, [b"x" * kvmd_qmp.LINE_LIMIT, b"x"])
    assert hear(restarted(listening), [POWEROFF, POWEROFF]) == [POWEROFF_HEARD]


# ---- The many events that nobody cares about -----------------------------------------


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


def test_no_json_is_parsed_for_an_event_that_nobody_cares_about(
    listening: Protocol, count_parsed: Callable[[], int]
) -> None:
    later = restarted(listening)
    before = count_parsed()
    for protocol in (listening, later):
        assert hear(protocol, [UNINTERESTING] * 100 + [UNINTERESTING * 100]) == []
    assert count_parsed() == before


def test_json_is_parsed_for_an_interesting_event_but_not_for_its_neighbours(
    listening: Protocol, count_parsed: Callable[[], int]
) -> None:
    flood = UNINTERESTING + b"{}\n[\n\n"
    assert hear(listening, [flood * 100 + POWEROFF + flood * 100]) == [POWEROFF_HEARD]
    assert count_parsed() == 1


def test_more_is_read_at_a_time_while_there_is_nothing_to_parse(
    listening: Protocol,
) -> None:
    sizes = []
    for piece in (UNINTERESTING, STOP, UNINTERESTING):
        hear(listening, [piece])
        sizes.append(listening.read_size)
    assert sizes == [kvmd_qmp.READ_SIZE, kvmd_qmp.CAREFUL_READ_SIZE, kvmd_qmp.READ_SIZE]


# ---- What is bad ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "rubbish", [b"rubbish\n", b"\xff\xfe\n", b"{" + b"x" * kvmd_qmp.LINE_LIMIT + b"\n"]
)
def test_rubbish_is_told_of_once_the_guest_runs_too(
    listening: Protocol, rubbish: bytes
) -> None:
    size = kvmd_qmp.READ_SIZE
    pieces = [rubbish[i : i + size] for i in range(0, len(rubbish), size)]
    assert hear(listening, [UNINTERESTING, *pieces]) == []
    complaint = listening.complaint
    assert complaint
    assert hear(listening, [rubbish, POWEROFF]) == [POWEROFF_HEARD]
    assert listening.complaint == complaint


def test_no_json_is_parsed_for_further_rubbish(
    listening: Protocol, count_parsed: Callable[[], int]
) -> None:
    hear(listening, [b"{rubbish\n", b"rubbish\n"])
    before = count_parsed()
    hear(listening, [b"rubbish\n"])
    assert count_parsed() == before


def line_of(length: int) -> bytes:
    """Return a STOP event of so many bytes, the newline not counted."""
    start, end = b'{"event": "STOP", "data": "', b'"}'
    return start + b"x" * (length - len(start) - len(end)) + end + b"\n"


@pytest.mark.parametrize("size", [1000, kvmd_qmp.READ_SIZE])
def test_line_as_long_as_the_limit_is_heard(listening: Protocol, size: int) -> None:
    line = line_of(kvmd_qmp.LINE_LIMIT)
    pieces = [line[i : i + size] for i in range(0, len(line), size)]
    assert [event.name for event in hear(listening, pieces)] == ["STOP"]
    assert listening.complaint is None


@pytest.mark.parametrize("size", [1000, kvmd_qmp.READ_SIZE, 10 * kvmd_qmp.LINE_LIMIT])
@pytest.mark.parametrize("length", [kvmd_qmp.LINE_LIMIT + 1, 3 * kvmd_qmp.LINE_LIMIT])
def test_longer_line_is_skipped_to_its_end(
    listening: Protocol, length: int, size: int
) -> None:
    line = line_of(length) + POWEROFF
    pieces = [line[i : i + size] for i in range(0, len(line), size)]
    assert hear(listening, pieces) == [POWEROFF_HEARD]
    assert listening.complaint is not None
    assert listening.complaint.startswith("a line of more than 65536 bytes")


def test_end_of_a_longer_line_is_no_event_of_its_own(listening: Protocol) -> None:
    pieces = [b"x" * kvmd_qmp.LINE_LIMIT, b"x", POWEROFF, STOP]
    assert [event.name for event in hear(listening, pieces)] == ["STOP"]


def test_longer_last_line_is_nothing(listening: Protocol) -> None:
    assert hear(listening, [POWEROFF.strip(), b" " * kvmd_qmp.LINE_LIMIT, b""]) == []


def test_64_mib_without_a_newline_are_not_kept(listening: Protocol) -> None:
    piece = b"x" * kvmd_qmp.READ_SIZE
    for _ in range((64 << 20) // len(piece)):
        assert listening.receive(piece) == []
        assert kept_bytes(listening) <= kvmd_qmp.LINE_LIMIT
    assert hear(listening, [b"\n" + POWEROFF]) == [POWEROFF_HEARD]


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
    expected = hear_session(session.replace(b"|", b""))
    assert hear_session(session.replace(b"|", line + b"\n")) == expected


# What JSON permits, and QEMU never says.
ODD_LINES = {
    "infinity": b'{"event": "SHUTDOWN", "data": -1e999}',
    "no number": b'{"event": "SHUTDOWN", "data": {"guest": NaN}}',
    "name twice": b'{"event": "STOP", "event": "SHUTDOWN"}',
    "lone surrogate": rb'{"event": "SHUTDOWN", "data": {"reason": "\udfff"}}',
}


@pytest.mark.parametrize("line", ODD_LINES.values(), ids=ODD_LINES.keys())
def test_odd_line_is_an_event(listening: Protocol, line: bytes) -> None:
    messages = hear(listening, [line + b"\n"])
    assert [event.name for event in messages] == ["SHUTDOWN"]
    assert_well_formed(messages)


@pytest.mark.parametrize("status", [b"", rb"\ud800\n", b"up: verdict=user", b"a" * 33])
def test_status_that_could_deceive_who_reads_the_log_is_none(status: bytes) -> None:
    answer = RUNNING.replace(b'running",', status + b'",')
    assert not any(isinstance(m, Status) for m in hear_session(GREETING, answer))


def test_first_bad_line_is_complained_of(listening: Protocol) -> None:
    hear(listening, [b'{"event": "STOP"\n', b'["event": "RESET"]\n'])
    assert listening.complaint is not None
    assert listening.complaint.endswith(r"""b'{"event": "STOP"'""")


def test_second_greeting_is_skipped_with_a_complaint(listening: Protocol) -> None:
    greeting = b'{"QMP": {"version": {}}}\n'
    protocol = Protocol()
    assert hear(protocol, [greeting * 2]) == [Greeting("unknown")]
    assert protocol.complaint is not None and "second greeting" in protocol.complaint


def test_complaint_about_a_long_line_is_short() -> None:
    protocol = Protocol()
    hear(protocol, [b"\xff" * 60000 + b"\n"])
    assert protocol.complaint is not None
    assert len(protocol.complaint) < 500


def assert_well_formed(messages: Iterable[Message]) -> None:
    """Check the types of all that was heard, and that a verdict can be made of it."""
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
            assert_well_formed(hear(protocol, [introduction + wrong]))
            assert hear(protocol, [GREETING + POWEROFF])[-1] == POWEROFF_HEARD


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
        session = session[:start] + chance.choice(
            [
                bytes(chance.randrange(256) for _ in range(end - start)),
                b"",
                session[start:end] * 2,
                chance.choice(FRAGMENTS) + session[start:end],
            ]
        ) + session[end:]
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
