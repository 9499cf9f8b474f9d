"""The journal: what is written is read again, whatever was done to the file."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from daemon import INSTANCE
from namespace import call_in_namespace

from kvmd_journal import LONGEST_MEMORY, SLACK, Journal, boot_id, read_journal
from kvmd_log import Log
from kvmd_version import VERSION

LAST = {"verdict": "user", "cause": "guest-shutdown", "file": "created"}


def record_of(instance: str = INSTANCE, **members: Any) -> dict[str, Any]:
    """Return a record as the journal takes it: it looks at its first member alone."""
    return {"instance": instance, "phase": "connected", **members}


class Owner:
    """Who writes a journal: the records, and what the log has of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.lines: list[str] = []
        self.log = Log(None, [self.lines.append])
        self.journal = Journal(
            *(str(path), "/ctrl", self.log),
            *(lambda: self.records.values(), lambda: ["connection-7"]),
        )

    def write(self, instance: str = INSTANCE, **members: Any) -> None:
        """Change a record."""
        self.records[instance] = record_of(instance, **members)
        self.journal.write(self.records[instance])

    def forget(self, instance: str, **members: Any) -> None:
        """Take note of the end of an instance."""
        del self.records[instance]
        self.journal.forget(record_of(instance, phase="gone", **members))

    def read(self) -> dict[str, dict[str, Any]]:
        """Return what is read, with which nothing may be wrong."""
        contents = read_journal(str(self.path))
        assert contents.problem is None
        records: dict[str, dict[str, Any]] = contents.records
        return records

    def logged(self) -> str:
        """Return what was logged since."""
        self.log.flush()
        text = "\n".join(self.lines)
        self.lines.clear()
        return text


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    """Return the owner of a journal that is not begun yet."""
    owner = Owner(tmp_path / "kvmd.state")
    yield owner
    owner.journal.close()


@pytest.fixture
def written(owner: Owner) -> Owner:
    """Return the owner of a journal with a record."""
    owner.journal.begin()
    owner.write()
    return owner


def change_header(path: Path, **members: Any) -> None:
    """Change members of the first line."""
    header, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(header), **members}) + "\n" + rest)


# ---- Writing -------------------------------------------------------------------------


def test_the_header_says_who_writes_and_when(written: Owner) -> None:
    assert read_journal(str(written.path)).header == {
        "format": 1,
        "boot": boot_id(),
        "control_dir": "/ctrl",
        "pid": os.getpid(),
        "version": VERSION,
        "started": written.journal.started,
        "discarded": ["connection-7"],
    }


def test_the_last_record_of_an_instance_counts(written: Owner) -> None:
    written.write("other")
    written.write(phase="ended")
    assert written.read() == {
        INSTANCE: record_of(phase="ended"),
        "other": record_of("other"),
    }


def test_a_change_is_one_write_of_one_record(
    written: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    written.write("other")
    writes: list[bytes] = []

    def count(fd: int, data: bytes, write: Any = os.write) -> int:
        writes.append(data)
        return int(write(fd, data))

    monkeypatch.setattr(os, "write", count)
    written.write(phase="ended")
    written.forget("other")
    written.forget(INSTANCE, last=LAST)
    assert [json.loads(data) for data in writes] == [
        record_of(phase="ended"),
        {"instance": "other", "removed": True},
        record_of(phase="gone", last=LAST),
    ]
    assert all(data.endswith(b"\n") for data in writes)


def test_the_file_is_its_owners_alone(written: Owner) -> None:
    assert written.path.stat().st_mode & 0o777 == 0o600


def test_a_verdict_is_kept_of_an_instance_that_is_gone_and_nothing_else(
    written: Owner,
) -> None:
    written.write("other")
    written.forget("other")
    written.forget(INSTANCE, last=LAST)
    gone = {INSTANCE: record_of(phase="gone", last=LAST)}
    assert written.read() == gone
    written.journal.begin()
    assert written.read() == gone


def test_of_many_instances_that_are_gone_the_latest_are_kept(written: Owner) -> None:
    names = [f"guest{number}" for number in range(LONGEST_MEMORY + 3)]
    for name in names:
        written.write(name)
        written.forget(name, last=LAST)
    assert list(written.read()) == [INSTANCE, *names[3:]]
    assert list(written.journal.gone) == names[3:]


# ---- Writing it anew -----------------------------------------------------------------


NAMES = [
    *(INSTANCE, 'a", b', 'a", c', 'a", "b', 'a", "c', '", "removed": true'),
    *("\n", "\udcff", "{}", "\\"),
]


def test_written_anew_it_has_the_last_record_of_each_and_nothing_of_the_removed(
    written: Owner,
) -> None:
    expected = {}
    for name in [*NAMES, "removed", "gone"]:
        written.write(name)
        expected[name] = record_of(name, phase="ended", text="x" * 100)
    written.forget("removed")
    written.forget("gone", last=LAST)
    del expected["removed"]
    expected["gone"] = record_of("gone", phase="gone", last=LAST)
    inode = written.path.stat().st_ino
    while written.path.stat().st_ino == inode:
        for name in NAMES:
            written.write(name, phase="ended", text="x" * 100)
    assert written.read() == expected
    assert written.path.stat().st_size < SLACK
    assert b"removed\": true}" not in written.path.read_bytes()
    assert os.listdir(written.path.parent) == [written.path.name]


def test_it_never_grows_beyond_twice_what_it_needs_and_some(written: Owner) -> None:
    live = 100
    for number in range(live):
        written.write(f"guest{number}", text="x" * 1000)
    for number in range(500):
        written.write(f"guest{number % live}", text="y" * 1000)
        needed = sum(len(json.dumps(r)) + 1 for r in written.records.values())
        assert written.path.stat().st_size <= 2 * (needed + 1000) + SLACK
    assert written.read() == written.records


def test_where_it_cannot_be_written_anew_it_is_added_to(
    written: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "rename", fail)
    for number in range(3 * SLACK // 1000):
        written.write(text="x" * 1000, number=number)
    assert written.read() == written.records
    assert written.logged().count("Disk quota exceeded") == 2
    assert os.listdir(written.path.parent) == [written.path.name]


# ---- Reading -------------------------------------------------------------------------


def test_a_torn_last_line_is_passed_over_wherever_it_was_cut(written: Owner) -> None:
    whole = written.path.read_bytes()
    line = json.dumps(record_of(phase="ended")).encode()
    for length in range(len(line) + 1):
        written.path.write_bytes(whole + line[:length])
        assert written.read() == {INSTANCE: record_of()}


@pytest.mark.parametrize(
    "line",
    [
        '{"instance": "other", "phase": \n',
        '{"instance": "other", "phase": "\udcff"}\n',
        '{"instance": "other", "phase": ' + "[" * 100000 + "\n",
        '{"instance": 7}\n',
        '{"phase": "ended"}\n',
        "[]\n",
        "\n",
        "\0\0\0\0\n",
    ],
    ids=["cut", "no ASCII", "deep", "no name", "nothing", "list", "empty", "zeros"],
)
def test_a_bad_line_costs_its_instance_alone(written: Owner, line: str) -> None:
    written.write("third")
    with open(written.path, "a", errors="surrogateescape") as file:
        file.write(line)
    written.write("fourth")
    contents = read_journal(str(written.path))
    assert list(contents.records) == [INSTANCE, "third", "fourth"]
    assert contents.problem is not None


def test_a_bad_line_leaves_no_earlier_record_of_its_instance(written: Owner) -> None:
    written.write("other")
    with open(written.path, "a") as file:
        file.write(json.dumps(record_of(phase="ended"))[:40] + "\n")
    assert list(read_journal(str(written.path)).records) == ["other"]


def test_members_that_nobody_knows_are_passed_over(written: Owner) -> None:
    change_header(written.path, format=1, invented="later")
    written.write(invented="later")
    assert written.read() == {INSTANCE: record_of(invented="later")}


@pytest.mark.parametrize("value", [0, 2, "1", None, [1]])
def test_another_format_is_not_read(written: Owner, value: object) -> None:
    change_header(written.path, format=value)
    with pytest.raises(ValueError, match="not of format 1"):
        read_journal(str(written.path))


def test_a_journal_from_before_the_last_boot_is_not_read(written: Owner) -> None:
    change_header(written.path, boot="00000000-0000-0000-0000-000000000000")
    with pytest.raises(ValueError, match="from before the last boot"):
        read_journal(str(written.path))


@pytest.mark.parametrize("text", ["", "\n", "[]\n", "{\n", "kvmd\n", "\udcff\n"])
def test_what_has_no_header_is_not_read(owner: Owner, text: str) -> None:
    owner.path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError):
        read_journal(str(owner.path))


def test_another_users_file_is_not_read(
    written: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    with pytest.raises(ValueError, match="another user's"):
        read_journal(str(written.path))


def test_a_file_with_a_second_name_is_not_read(written: Owner) -> None:
    os.link(written.path, written.path.with_name("another"))
    with pytest.raises(ValueError, match="linked to from elsewhere"):
        read_journal(str(written.path))


def test_a_file_that_is_replaced_while_it_is_read_is_as_good_as_before(
    written: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat = os.fstat

    def replace_then_fstat(fd: int) -> os.stat_result:
        written.path.unlink(missing_ok=True)
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", replace_then_fstat)
    assert read_journal(str(written.path)).records


# ---- What is planted -----------------------------------------------------------------


def plant_symlink(path: Path) -> None:
    path.symlink_to(path.with_name("target"))


def plant_hard_link(path: Path) -> None:
    os.link(path.with_name("target"), path)


def plant_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


PLANTS: list[Callable[[Path], None]] = [plant_symlink, os.mkfifo, plant_socket]


@pytest.mark.parametrize("plant", [*PLANTS, Path.mkdir])
def test_what_is_no_regular_file_is_not_read(
    owner: Owner, plant: Callable[[Path], None]
) -> None:
    Owner(owner.path.with_name("target")).journal.begin()
    plant(owner.path)
    with pytest.raises(OSError):
        read_journal(str(owner.path))


@pytest.mark.parametrize("suffix", [".state", ".state.new"])
@pytest.mark.parametrize("plant", [*PLANTS, plant_hard_link])
def test_what_is_planted_gives_way_and_what_it_leads_to_stays(
    owner: Owner, plant: Callable[[Path], None], suffix: str
) -> None:
    target = owner.path.with_name("target")
    target.write_text("precious")
    plant(owner.path.with_suffix(suffix))
    assert owner.journal.begin()
    owner.write()
    assert owner.read() == owner.records
    assert target.read_text() == "precious"


@pytest.mark.parametrize("suffix", [".state", ".state.new"])
def test_a_directory_in_the_way_is_told_of_until_it_goes(
    owner: Owner, suffix: str
) -> None:
    directory = owner.path.with_suffix(suffix)
    directory.mkdir()
    assert not owner.journal.begin()
    owner.write()
    directory.rmdir()
    owner.journal.check()
    assert owner.read() == owner.records


# ---- When it can't be written --------------------------------------------------------


def assert_is_without(owner: Owner) -> None:
    """See that there is no journal, that it was told of once, and tried again."""
    owner.write("meanwhile")
    owner.journal.check()
    assert owner.logged().count("the journal can't be written") == 1
    assert not owner.path.exists()


def mount_tmpfs(directory: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "kvmd-test", str(directory)]
    subprocess.run(command, check=True)


def fill(path: Path) -> None:
    """Take all room that is left."""
    with open(path, "ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def test_on_a_full_file_system_it_is_no_more_until_there_is_room(
    tmp_path: Path,
) -> None:
    def fill_and_empty() -> None:
        mount_tmpfs(tmp_path, "size=64k")
        owner = Owner(tmp_path / "kvmd.state")
        owner.journal.begin()
        owner.write()
        fill(tmp_path / "ballast")
        for number in range(100):
            owner.write(number=number, text="x" * 100)
        assert not owner.path.exists()
        fill(tmp_path / "ballast")  # what the journal took is free again
        assert_is_without(owner)
        (tmp_path / "ballast").unlink()
        owner.journal.check()
        assert owner.read() == owner.records
        assert "the journal can't be written: it is over" in owner.logged()

    call_in_namespace(fill_and_empty)


def test_on_a_read_only_file_system_it_goes_on_without(tmp_path: Path) -> None:
    def remount() -> None:
        mount_tmpfs(tmp_path, "ro")
        owner = Owner(tmp_path / "kvmd.state")
        assert not owner.journal.begin()
        assert_is_without(owner)
        mount_tmpfs(tmp_path, "remount,rw")
        owner.journal.check()
        assert owner.read() == owner.records

    call_in_namespace(remount)


def test_a_record_that_was_written_in_part_leaves_no_journal(
    written: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:20]))
    written.write(phase="ended")
    monkeypatch.undo()
    assert not written.path.exists()
    written.write("meanwhile")
    written.journal.check()
    assert written.read() == written.records
    assert written.logged().count(" WARNING the journal can't be written") == 1


def remove(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name("away"))


def replace(path: Path) -> None:
    path.unlink()
    path.write_text("another's")


@pytest.mark.parametrize("take_away", [remove, rename, replace])
def test_a_file_that_was_taken_away_is_written_anew(
    written: Owner, take_away: Callable[[Path], None]
) -> None:
    take_away(written.path)
    written.write("meanwhile")
    written.journal.check()
    assert written.read() == written.records
    assert written.logged() == ""


def test_without_its_directory_it_is_told_of_once_and_waited_for(
    control_dir: Path,
) -> None:
    owner = Owner(control_dir / "kvmd.state")
    owner.journal.begin()
    owner.write()
    owner.path.unlink()
    control_dir.rmdir()
    owner.journal.check()
    assert_is_without(owner)
    control_dir.mkdir()
    owner.journal.check()
    assert owner.read() == owner.records
    owner.journal.close()


def test_a_file_that_is_as_it_was_is_left_alone(
    written: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written.path.stat()
    written.journal.check()
    assert os.path.samestat(written.path.stat(), before)
