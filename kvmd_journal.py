"""The journal: what a new daemon has to know after a stop, a crash or a restart.

The connections themselves stay open in systemd's descriptor store (`kvmd_systemd`), or
across execve(2) (`kvmd_restart`). The rest outlives the process here.

A text file, mode 0600, by default /var/run/ganeti/ganeti-kvmd.state. Its first line is
a header, a JSON object with the members

    format       1
    boot         the kernel's boot id: nothing here means anything after a boot
    control_dir  the directory of the monitor sockets
    pid          of the daemon that writes it
    version      of that daemon
    started      when that daemon started (CLOCK_MONOTONIC, seconds)
    discarded    names of descriptors that systemd is still to drop from its store

Every other line is a record, one JSON object about one instance as it stands; its first
member is `instance`. A later record of an instance replaces the earlier one, and one
with the member `removed` removes it. `kvmd_monitor` says what else is in a record.

One change is one write(2) of one record. The file is written anew, beside itself, and
renamed: at each start, and when it has grown beyond twice what it needs. Nothing is
synced. A line without its end was cut by a crash and is passed over; so are members
that nobody knows. A bad line costs what is known of its instance.

Knows nothing of monitors: who owns the records gives them.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterable

from kvmd_file import is_at_path, open_regular_file
from kvmd_log import Log
from kvmd_version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FORMAT = 1
BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"
#: The file is compacted when it exceeds twice its size after the last compaction plus
#: this many bytes.
SLACK = 65536
#: Bytes of the file that are in memory at once.
BUFFER_SIZE = 65536
#: Instances that are gone, whose last verdict is kept for `--status`.
LONGEST_MEMORY = 1000
UNWRITABLE = "the journal can't be written"

ENCODER = json.JSONEncoder(check_circular=False)  # it is faster so

Contents = collections.namedtuple("Contents", "header records problem")


class Journal:
    """The file, as its one writer sees it. No method raises OSError."""

    def __init__(
        self,
        path: str,
        control_dir: str,
        log: Log,
        records: Callable[[], Iterable[dict[str, Any]]],
        discarded: Callable[[], list[str]],
    ) -> None:
        """Prepare; write nothing yet.

        `records` gives those of all instances that are monitored, `discarded` what the
        header is to hold under that name.
        """
        self.path = path
        #: Instance -> record of those that are gone, the latest last.
        self.gone: dict[str, dict[str, Any]] = {}
        self.started = time.monotonic()
        self._control_dir = control_dir
        self._log = log
        self._records = records
        self._discarded = discarded
        #: None while it can't be written.
        self._fd: int | None = None
        self._size = 0
        #: The size at which it is written anew.
        self._limit = 0

    def begin(self) -> bool:
        """Write the file anew; tell whether that worked.

        A warning tells if not, once until it is over.
        """
        return self._replace(map(encode, [*self.gone.values(), *self._records()]))

    def write(self, record: dict[str, Any]) -> None:
        """Add the record of an instance that is monitored."""
        self._append(encode(record))

    def forget(self, record: dict[str, Any]) -> None:
        """Add the last record of an instance whose socket is gone.

        It stays for who wants to know the last verdict, if there was one.
        """
        if "last" not in record:
            self._append(encode_removal(record["instance"]))
            return
        self.gone.pop(record["instance"], None)
        self.gone[record["instance"]] = record
        lines = encode(record)
        if len(self.gone) > LONGEST_MEMORY:
            oldest = next(iter(self.gone))
            del self.gone[oldest]
            lines += encode_removal(oldest)
        self._append(lines)

    def check(self) -> None:
        """Write the file anew if it could not be written, or is no more at its path."""
        if self._fd is not None:
            if is_at_path(self._fd, self.path):
                return
            self.close()
        self.begin()

    def _append(self, lines: bytes) -> None:
        if self._fd is None:
            return
        try:
            if os.write(self._fd, lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += len(lines)
            if self._size > self._limit:
                self._compact()
        except OSError as error:
            self._give_up(error)

    def _compact(self) -> None:
        """Write the file anew with the last record of each instance. Raises OSError."""
        assert self._fd is not None
        # Line by line: the allocator would not give back the room for all of them.
        with open(self._fd, "rb", BUFFER_SIZE, closefd=False) as file:
            file.seek(0)
            last = {instance_part(line): at for at, line in enumerate(file) if at}
            current = set(last.values())
            file.seek(0)
            self._replace(
                line
                for at, line in enumerate(file)
                if at in current and b'"removed": true' not in line
            )

    def _replace(self, lines: Iterable[bytes]) -> bool:
        """Put a file with these records in the place of the old one."""
        new = self.path + ".new"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)
            fd = os.open(new, flags | os.O_NOFOLLOW, 0o600)
            try:
                with open(fd, "wb", BUFFER_SIZE, closefd=False) as file:
                    file.write(self._header())
                    file.writelines(lines)
                os.rename(new, self.path)
            except OSError:
                os.close(fd)
                with contextlib.suppress(OSError):
                    os.unlink(new)
                raise
        except OSError as error:
            if self._fd is None:
                self._give_up(error)
            else:  # what is there is right, and can be added to
                self._limit *= 2
                self._log.warning(
                    f"{self.path}: can't be written anew ({error.strerror}); it grows"
                )
            return False
        self.close()
        self._fd, self._size = fd, os.fstat(fd).st_size
        self._limit = 2 * self._size + SLACK
        self._log.end_trouble(UNWRITABLE)
        return True

    def _header(self) -> bytes:
        return encode(
            {
                "format": FORMAT,
                "boot": boot_id(),
                "control_dir": self._control_dir,
                "pid": os.getpid(),
                "version": VERSION,
                "started": self.started,
                "discarded": self._discarded(),
            }
        )

    def _give_up(self, error: OSError) -> None:
        """Go on without a journal; remove it, so that nobody reads what is outdated."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self.close()
        self._log.begin_trouble(
            UNWRITABLE,
            f"{self.path}: {error.strerror}; a crash or a stop now loses what is known"
            " of the instances; trying again at each rescan",
        )

    def close(self) -> None:
        """Write no more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def encode(record: dict[str, Any]) -> bytes:
    """Return a line of the journal."""
    return ENCODER.encode(record).encode() + b"\n"


def encode_removal(instance: str) -> bytes:
    """Return the line that removes an instance."""
    return encode({"instance": instance, "removed": True})


def instance_part(line: bytes) -> bytes:
    """Return a record's first member, as it is encoded, without parsing the rest.

    Quotes in a JSON string are escaped, so the separator can't occur in the name.
    """
    return line.partition(b', "')[0]


def boot_id() -> str:
    """Return the kernel's identifier of this boot (random(4))."""
    with open(BOOT_ID_FILE, encoding="ascii") as file:
        return file.read().strip()


def read_journal(path: str) -> Contents:
    """Return the header, the records by instance, and what was wrong with some of them.

    The last is None if nothing was. Raises OSError, and ValueError for a file that is
    not of this program, of another format, or of another boot.
    """
    with open(open_regular_file(path, os.O_RDONLY), "rb") as file:
        # A file without a name was replaced just now: it is as good as a moment ago.
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_nlink > 1:
            raise ValueError("another user's file, or linked to from elsewhere")
        lines = file.read().split(b"\n")
    header = parse_object(lines[0])
    if header.get("format") != FORMAT:
        raise ValueError(f"not of format {FORMAT}")
    discarded, started = header.get("discarded"), header.get("started")
    if not isinstance(discarded, list) or not isinstance(started, float):
        raise ValueError("a header without its members")
    if header.get("boot") != boot_id():
        raise ValueError("from before the last boot")
    return Contents(header, *parse_records(lines[1:-1]))


def parse_records(
    lines: Iterable[bytes],
) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Return the last record of each instance, and what was wrong with a line."""
    last = {instance_part(line): line for line in lines}
    records: dict[str, dict[str, Any]] = {}
    problem = None
    for line in last.values():
        try:
            record = parse_object(line)
            instance = record["instance"]
            if not isinstance(instance, str):
                raise ValueError("an instance without a name")
            if not isinstance(record.get("connection"), (int, type(None))):
                raise ValueError("a connection that is no number")
        except (ValueError, KeyError) as error:
            problem = f"{error}: {line[:80]!r}"
            continue
        if not record.get("removed"):
            records[instance] = record
    return records, problem


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line. Raises ValueError."""
    try:
        value = json.loads(line.decode("ascii"))
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
