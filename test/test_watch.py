"""The watch on a directory: on made-up events, and on the real kernel.

The kernel queues an event while the system call that causes it is under way, so
that nothing has to be waited for here.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import select
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from namespace import call_in_namespace, call_in_process

from kvmd_inotify import (
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_IGNORED,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_Q_OVERFLOW,
    Changes,
    DirectoryWatch,
    Inotify,
    parse_events,
)

# What `facts` tells of the directory, beside the names in it.
APPEARED = "the directory appeared"
VANISHED = "the directory vanished"
LOST = "events were lost"

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
RENAME_EXCHANGE = 2


@pytest.fixture
def node() -> Iterator[Path]:
    """Return a directory that stays, with a short path that holds no symlink."""
    path = Path(tempfile.mkdtemp(prefix="kvmd-")).resolve()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def ctrl(node: Path) -> Path:
    """Return the path of a control directory, the parts of which are to be made."""
    return node / "run" / "ganeti" / "ctrl"


# The parts of the path that are there at the start: none, one, two, all.
DEPTHS = range(4)


def parts(ctrl: Path) -> list[Path]:
    """Return what has to be made for the directory to be there, outermost first."""
    return [ctrl.parent.parent, ctrl.parent, ctrl]


def make(ctrl: Path, depth: int = 3) -> None:
    """Make the outer parts of the path, as many as are wanted."""
    for part in parts(ctrl)[:depth]:
        part.mkdir(exist_ok=True)


@contextmanager
def watching(path: Path) -> Iterator[DirectoryWatch]:
    """Watch a directory, from now to the end of the block."""
    with closing(DirectoryWatch(str(path))) as watch:
        watch.follow()
        yield watch


@pytest.fixture
def watch(ctrl: Path) -> Iterator[DirectoryWatch]:
    """Return a watch on the control directory, which is there."""
    make(ctrl)
    with watching(ctrl) as watch:
        yield watch


def is_readable(watch: DirectoryWatch) -> bool:
    """Tell whether the kernel has something to say."""
    return bool(select.select([watch], [], [], 0)[0])


def follow(watch: DirectoryWatch) -> list[str]:
    """Follow the path; return what that changed."""
    before = watch.target
    watch.follow()
    told = []
    if before not in (None, watch.target):
        told.append(VANISHED)
    if watch.target not in (None, before):
        told.append(APPEARED)
    return told


def facts(watch: DirectoryWatch) -> list[str]:
    """Follow the path as long as it changes; return all that there is to be told."""
    told = []
    while is_readable(watch):
        names, path_changed, events_lost = watch.read()
        told += [name for name, _ in names] + [LOST] * events_lost
        if path_changed or events_lost:
            told += follow(watch)
    return told


def kernel_watches(watch: DirectoryWatch) -> int:
    """Return how many watches the kernel keeps for it."""
    info = Path(f"/proc/self/fdinfo/{watch.fileno()}").read_text()
    return info.count("inotify wd:")


def assert_at_work(watch: DirectoryWatch) -> None:
    """Check that the watch tells of what the path means, and watches nothing else."""
    path = Path(watch.path)
    if not path.is_dir():
        assert watch.target is None
        path.mkdir(parents=True)
        assert facts(watch) == [APPEARED]
    name = path / "web1.kvmd"
    name.touch()
    name.unlink()
    assert facts(watch) == [name.name, name.name]
    assert watch.settled
    assert kernel_watches(watch) == len(path.resolve().parents) + 1


# ---- Made-up events ------------------------------------------------------------------


def event(wd: int, mask: int, name: bytes = b"") -> bytes:
    """Return a struct inotify_event as the kernel writes it, padded with NULs."""
    if name:
        name += b"\0" * (16 - len(name) % 16)
    return struct.pack("iIII", wd, mask, 0, len(name)) + name


def hear(watch: DirectoryWatch, *events: bytes) -> Changes:
    """Return what the watch makes of one read that brings these events."""
    made_up = pytest.MonkeyPatch()
    made_up.setattr(Inotify, "read", lambda _: parse_events(b"".join(events)))
    with made_up.context():
        try:
            return watch.read()
        finally:
            made_up.undo()


def test_events_are_parsed_until_the_data_ends() -> None:
    data = event(1, IN_CREATE, b"web1.kvmd") + event(2, IN_DELETE_SELF)
    data += event(3, IN_CREATE, b"x" * 255) + event(-1, IN_Q_OVERFLOW)
    assert parse_events(data) == [
        (1, IN_CREATE, "web1.kvmd"),
        (2, IN_DELETE_SELF, ""),
        (3, IN_CREATE, "x" * 255),
        (-1, IN_Q_OVERFLOW, ""),
    ]
    assert parse_events(b"") == []


def test_name_that_is_no_utf_8_can_be_given_back_to_the_kernel() -> None:
    name = b"\xff\n\x1b[31m.kvmd"
    [(_, _, parsed)] = parse_events(event(1, IN_CREATE, name))
    assert os.fsencode(parsed) == name


def test_names_that_come_and_go_are_told_in_order(watch: DirectoryWatch) -> None:
    assert watch.target is not None
    told = hear(
        watch,
        event(watch.target, IN_CREATE, b"a"),
        event(watch.target, IN_DELETE, b"a"),
        event(watch.target, IN_MOVED_TO, b"b"),
        event(watch.target, IN_MOVED_FROM, b"c"),
    )
    names = [("a", True), ("a", False), ("b", True), ("c", False)]
    assert told == (names, False, False)


def test_overflow_has_no_watch_descriptor_and_is_told(watch: DirectoryWatch) -> None:
    assert hear(watch, event(-1, IN_Q_OVERFLOW)) == ([], False, True)


def test_overflow_is_told_while_the_directory_is_missing(ctrl: Path) -> None:
    with watching(ctrl) as watch:
        assert hear(watch, event(-1, IN_Q_OVERFLOW)) == ([], False, True)


def test_what_came_before_an_overflow_is_told_too(watch: DirectoryWatch) -> None:
    assert watch.target is not None
    created = event(watch.target, IN_CREATE, b"a")
    told = hear(watch, created, event(-1, IN_Q_OVERFLOW))
    assert told == ([("a", True)], False, True)


def test_events_of_forgotten_watches_mean_nothing(watch: DirectoryWatch) -> None:
    told = hear(
        watch,
        event(12345, IN_IGNORED),
        event(12345, IN_DELETE_SELF),
        event(12345, IN_CREATE, b"web1.kvmd"),
        event(12345, IN_CREATE, b"ctrl"),
    )
    assert told == ([], False, False)
    assert_at_work(watch)


# ---- The real kernel: a directory that comes -----------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
def test_directory_appears_piece_by_piece(ctrl: Path, depth: int) -> None:
    make(ctrl, depth)
    with watching(ctrl) as watch:
        for part in parts(ctrl)[depth:]:
            assert watch.target is None
            part.mkdir()
            assert facts(watch) == ([APPEARED] if part == ctrl else [])
        assert_at_work(watch)


@pytest.mark.parametrize("depth", DEPTHS[:3])
def test_directory_appears_at_once(ctrl: Path, depth: int) -> None:
    make(ctrl, depth)
    with watching(ctrl) as watch:
        make(ctrl)
        assert facts(watch) == [APPEARED]
        assert_at_work(watch)


@pytest.mark.parametrize("depth", DEPTHS[:3])
def test_directory_is_moved_in_place_with_its_parents(
    node: Path, ctrl: Path, depth: int
) -> None:
    make(ctrl)
    first = parts(ctrl)[depth]
    first.rename(node / "elsewhere")
    with watching(ctrl) as watch:
        (node / "elsewhere").rename(first)
        assert facts(watch) == [APPEARED]
        assert_at_work(watch)


def test_directory_that_is_there_appears_once(ctrl: Path) -> None:
    make(ctrl)
    with closing(DirectoryWatch(str(ctrl))) as watch:
        assert follow(watch) == [APPEARED]
        assert follow(watch) == []
        assert_at_work(watch)


@pytest.mark.parametrize("depth", DEPTHS[:3])
def test_file_in_the_way_is_waited_for_to_go(ctrl: Path, depth: int) -> None:
    make(ctrl, depth)
    in_the_way = parts(ctrl)[depth]
    in_the_way.touch()
    with watching(ctrl) as watch:
        in_the_way.unlink()
        make(ctrl)
        assert facts(watch) == [APPEARED]
        assert_at_work(watch)


# ---- The real kernel: a directory that goes ------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS[:3])
def test_directory_is_removed_and_made_anew(
    ctrl: Path, watch: DirectoryWatch, depth: int
) -> None:
    shutil.rmtree(parts(ctrl)[depth])
    assert facts(watch) == [VANISHED]
    make(ctrl)
    assert facts(watch) == [APPEARED]
    assert_at_work(watch)


@pytest.mark.parametrize("depth", DEPTHS[:3])
def test_directory_is_made_anew_before_its_removal_was_read(
    ctrl: Path, watch: DirectoryWatch, depth: int
) -> None:
    shutil.rmtree(parts(ctrl)[depth])
    make(ctrl)
    assert facts(watch) == [VANISHED, APPEARED]
    assert_at_work(watch)


@pytest.mark.parametrize("depth", DEPTHS[:3])
def test_directory_is_renamed_away_and_a_new_one_takes_its_place(
    node: Path, ctrl: Path, watch: DirectoryWatch, depth: int
) -> None:
    away = node / "away"
    parts(ctrl)[depth].rename(away)
    assert facts(watch) == [VANISHED]
    (away.joinpath(*ctrl.parts[len(parts(ctrl)[depth].parts) :]) / "x.kvmd").touch()
    assert facts(watch) == []
    make(ctrl)
    assert facts(watch) == [APPEARED]
    assert_at_work(watch)


@pytest.mark.parametrize("depth", DEPTHS[:3])
def test_directory_is_replaced_before_its_renaming_was_read(
    node: Path, ctrl: Path, watch: DirectoryWatch, depth: int
) -> None:
    parts(ctrl)[depth].rename(node / "away")
    make(ctrl)
    assert facts(watch) == [VANISHED, APPEARED]
    assert_at_work(watch)


@pytest.mark.parametrize("depth", DEPTHS[:3])
def test_directory_is_renamed_away_and_comes_back(
    node: Path, ctrl: Path, watch: DirectoryWatch, depth: int
) -> None:
    part = parts(ctrl)[depth]
    part.rename(node / "away")
    assert facts(watch) == [VANISHED]
    (node / "away").rename(part)
    assert facts(watch) == [APPEARED]
    assert_at_work(watch)


@pytest.mark.parametrize("depth", DEPTHS[:3])
def test_directory_that_was_away_for_a_moment_is_to_be_looked_at(
    node: Path, ctrl: Path, watch: DirectoryWatch, depth: int
) -> None:
    part = parts(ctrl)[depth]
    part.rename(node / "away")
    (node / "away").rename(part)
    assert watch.read().path_changed
    assert follow(watch) == []
    assert_at_work(watch)


@pytest.mark.parametrize("depth", DEPTHS[:3])
def test_directory_is_exchanged_for_another(
    node: Path, ctrl: Path, watch: DirectoryWatch, depth: int
) -> None:
    part = parts(ctrl)[depth]
    other = node / "other"
    shutil.copytree(part, other)
    result = LIBC.renameat2(
        *(AT_FDCWD, bytes(part), AT_FDCWD, bytes(other), RENAME_EXCHANGE)
    )
    assert result == 0, os.strerror(ctypes.get_errno())
    assert facts(watch) == [VANISHED, APPEARED]
    assert_at_work(watch)


def hold_open(*paths: Path) -> list[int]:
    """Open directories, so that their removal gives no IN_DELETE_SELF."""
    return [os.open(path, os.O_RDONLY) for path in paths]


@pytest.mark.parametrize("depth", DEPTHS[:3])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "step by step"])
def test_directories_that_somebody_holds_open_are_removed_and_made_anew(
    ctrl: Path, watch: DirectoryWatch, depth: int, at_once: bool
) -> None:
    held = hold_open(*parts(ctrl))
    told = []
    for part in reversed(parts(ctrl)[depth:]):
        part.rmdir()
        told += [] if at_once else facts(watch)
    assert told + facts(watch) == [VANISHED]
    make(ctrl)
    assert facts(watch) == [APPEARED]
    assert_at_work(watch)
    for fd in held:
        os.close(fd)
    assert facts(watch) == []
    assert_at_work(watch)


@pytest.mark.parametrize("depth", [2, 3], ids=["the parent", "the directory"])
def test_held_directory_is_replaced_by_a_rename_over_it(
    node: Path, ctrl: Path, depth: int
) -> None:
    make(ctrl, depth)
    part = parts(ctrl)[depth - 1]
    held = hold_open(part)
    other = node / "other"
    other.joinpath(*ctrl.relative_to(part).parts).mkdir(parents=True)
    with watching(ctrl) as watch:
        other.rename(part)
        assert facts(watch) == ([APPEARED] if depth == 2 else [VANISHED, APPEARED])
        assert_at_work(watch)
    os.close(held[0])


# ---- The real kernel: symlinks and mounts --------------------------------------------


def test_directory_behind_a_symlink_comes_and_goes(node: Path, ctrl: Path) -> None:
    (node / "var-run").symlink_to("run")
    with watching(node / "var-run" / "ganeti" / "ctrl") as watch:
        make(ctrl)
        assert facts(watch) == [APPEARED]
        assert_at_work(watch)
        shutil.rmtree(ctrl.parent)
        assert facts(watch) == [VANISHED]
        make(ctrl)
        assert facts(watch) == [APPEARED]
        assert_at_work(watch)


def test_symlink_to_the_directory_appears(node: Path, ctrl: Path) -> None:
    real = node / "real"
    real.mkdir()
    make(ctrl, 2)
    with watching(ctrl) as watch:
        ctrl.symlink_to(real)
        assert facts(watch) == [APPEARED]
        assert_at_work(watch)


def test_symlink_that_leads_nowhere_comes_to_lead_somewhere(
    node: Path, ctrl: Path
) -> None:
    make(ctrl, 2)
    ctrl.symlink_to(node / "deep" / "real")
    with watching(ctrl) as watch:
        assert watch.target is None
        (node / "deep" / "real").mkdir(parents=True)
        assert facts(watch) == [APPEARED]
        assert_at_work(watch)


def test_swapped_symlink_is_followed_when_asked(node: Path, ctrl: Path) -> None:
    make(ctrl)
    other = node / "other" / "ganeti" / "ctrl"
    other.mkdir(parents=True)
    (node / "link").symlink_to("run")
    with watching(node / "link" / "ganeti" / "ctrl") as watch:
        (node / "new").symlink_to("other")
        (node / "new").rename(node / "link")
        assert follow(watch) == [VANISHED, APPEARED]
        (ctrl / "x.kvmd").touch()
        assert facts(watch) == []
        assert_at_work(watch)


@pytest.mark.parametrize("times", [1, 100])
def test_symlink_that_goes_away_while_it_is_read_is_looked_at_again(
    ctrl: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    failures = iter(range(times))

    def realpath(path: str) -> str:
        for _ in failures:
            raise FileNotFoundError(errno.ENOENT, "gone", path)
        return path

    make(ctrl)
    monkeypatch.setattr(os.path, "realpath", realpath)
    with watching(ctrl) as watch:
        assert watch.target is not None
        assert watch.settled == (times == 1)


def test_symlinks_in_a_circle_are_waited_for_to_go(node: Path, ctrl: Path) -> None:
    (node / "run").symlink_to("nur")
    (node / "nur").symlink_to("run")
    with watching(ctrl) as watch:
        assert watch.target is None
        (node / "run").unlink()
        make(ctrl)
        watch.follow()
        assert watch.target is not None
        facts(watch)
        assert_at_work(watch)


def mount_tmpfs(path: Path) -> None:
    """Mount a new file system over a directory."""
    result = LIBC.mount(b"kvmd-test", bytes(path), b"tmpfs", 0, None)
    assert result == 0, os.strerror(ctypes.get_errno())


def unmount(path: Path) -> None:
    result = LIBC.umount2(bytes(path), 0)
    assert result == 0, os.strerror(ctypes.get_errno())


@pytest.mark.parametrize("depth", DEPTHS[:3])
def test_mount_over_the_path_is_followed_when_asked_and_its_end_by_itself(
    ctrl: Path, depth: int
) -> None:
    def mount_and_unmount() -> None:
        mount_point = parts(ctrl)[depth]
        with watching(ctrl) as watch:
            mount_tmpfs(mount_point)
            assert facts(watch) == []
            make(ctrl)
            assert follow(watch) == [VANISHED, APPEARED]
            assert_at_work(watch)
            unmount(mount_point)
            assert facts(watch) == [VANISHED, APPEARED]
            assert_at_work(watch)

    make(ctrl)
    call_in_namespace(mount_and_unmount)


# ---- The real kernel: its limits -----------------------------------------------------


def overflow(ctrl: Path) -> None:
    """Cause more events than the kernel's queue holds."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    names = (f"{ctrl}/web1.kvmd", f"{ctrl}/web2.kvmd")
    Path(names[0]).touch()
    for number in range(limit // 2):
        os.rename(names[number % 2], names[1 - number % 2])  # two events
    os.unlink(names[limit // 2 % 2])


def test_more_events_than_the_queue_holds_are_told_as_lost(
    ctrl: Path, watch: DirectoryWatch
) -> None:
    overflow(ctrl)
    told = facts(watch)
    assert told[-1] == LOST
    assert told.count(LOST) == 1
    assert_at_work(watch)


def test_directory_made_anew_in_an_overflow_is_found(
    ctrl: Path, watch: DirectoryWatch
) -> None:
    overflow(ctrl)
    replace(ctrl)
    assert facts(watch)[-3:] == [LOST, VANISHED, APPEARED]
    assert_at_work(watch)


def set_limit(what: str, number: int) -> None:
    """Set one of the inotify limits of this user namespace."""
    Path(f"/proc/sys/user/max_inotify_{what}").write_text(f"{number}\n")


def test_no_instance_to_be_had_is_an_error(ctrl: Path) -> None:
    def use_up() -> None:
        set_limit("instances", 0)
        with pytest.raises(OSError, match="inotify_init1") as caught:
            DirectoryWatch(str(ctrl))
        assert caught.value.errno == errno.EMFILE

    call_in_namespace(use_up)


def test_no_watch_to_be_had_is_an_error_at_every_step(ctrl: Path) -> None:
    def use_up() -> None:
        for limit in range(len(ctrl.parents) + 1):
            set_limit("watches", limit)
            with closing(DirectoryWatch(str(ctrl))) as watch:
                with pytest.raises(OSError, match="inotify_add_watch") as caught:
                    watch.follow()
                assert caught.value.errno == errno.ENOSPC
        set_limit("watches", limit + 1)
        with watching(ctrl) as watch:
            assert_at_work(watch)

    make(ctrl)
    call_in_namespace(use_up)


def test_path_that_may_not_be_watched_is_not_settled(node: Path, ctrl: Path) -> None:
    def look_as_nobody() -> None:
        os.seteuid(65534)
        with watching(ctrl) as watch:
            assert watch.target is None
            assert not watch.settled

    if os.geteuid() != 0:
        pytest.skip("needs root, to be nobody")
    make(ctrl)
    node.chmod(0o711)
    ctrl.chmod(0o700)
    call_in_process(look_as_nobody)


# ---- Not a wake-up too many ----------------------------------------------------------


def test_what_is_beside_the_path_wakes_nobody(
    ctrl: Path, watch: DirectoryWatch
) -> None:
    for part in parts(ctrl)[:2]:
        (part / "dhclient.pid").touch()
        (part / "dhclient.pid").write_text("1\n")
        (part / "dhclient.pid").chmod(0o600)
        (part / "user").mkdir()
        list(part.iterdir())
    (ctrl.parent.parent / "dhclient.pid").unlink()
    (ctrl.parent.parent / "user").rmdir()
    assert not is_readable(watch)


def test_path_is_not_looked_at_for_a_name_that_is_no_part_of_it(
    ctrl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(ctrl, 2)
    with watching(ctrl) as watch:
        monkeypatch.delattr(Inotify, "add_watch")
        (ctrl.parent / "dhclient.pid").touch()
        assert facts(watch) == []


def test_what_happens_in_a_file_of_the_directory_wakes_nobody(
    ctrl: Path, watch: DirectoryWatch
) -> None:
    (ctrl / "web1.pid").touch()
    assert facts(watch) == ["web1.pid"]
    (ctrl / "web1.pid").write_text("1\n")
    (ctrl / "web1.pid").read_text()
    (ctrl / "web1.pid").chmod(0o600)
    assert not is_readable(watch)


# ---- Races: something happens between any two steps of the watch ---------------------


def remove(ctrl: Path, depth: int = 0) -> None:
    """Remove the path, but for so many of its outer parts."""
    for part in reversed(parts(ctrl)[depth:]):
        with suppress(FileNotFoundError):
            part.rmdir()


def remove_directory(ctrl: Path) -> None:
    remove(ctrl, 2)


def replace(ctrl: Path) -> None:
    remove(ctrl)
    make(ctrl)


def replace_directory(ctrl: Path) -> None:
    remove_directory(ctrl)
    make(ctrl)


def move_away(ctrl: Path) -> None:
    away = ctrl.parent.parent.parent / "away"
    for old in (away / ctrl.name, away):
        with suppress(FileNotFoundError):
            old.rmdir()
    with suppress(FileNotFoundError):
        ctrl.parent.rename(away)


def move_away_and_replace(ctrl: Path) -> None:
    move_away(ctrl)
    make(ctrl)


DEEDS = [
    make,
    remove,
    remove_directory,
    replace,
    replace_directory,
    move_away,
    move_away_and_replace,
]


def interrupted_before(
    step: int, deed: Callable[[], None], act: Callable[..., int]
) -> Callable[..., int]:
    """Return a function that acts, and does the deed before its n-th action."""
    taken = 0

    def act_and_count(*arguments: object) -> int:
        nonlocal taken
        taken += 1
        if taken == step:
            deed()
        return act(*arguments)

    return act_and_count


@pytest.mark.parametrize("first", DEEDS)
@pytest.mark.parametrize("second", DEEDS)
def test_nothing_is_missed_whenever_it_happens(
    ctrl: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: Callable[[Path], None],
    second: Callable[[Path], None],
) -> None:
    add_watch = Inotify.add_watch
    steps = range(1, 3 * len(ctrl.parents))
    with watching(ctrl) as watch:
        for depth, step in itertools.product([0, 2, 3], steps):
            remove(ctrl)
            make(ctrl, depth)
            facts(watch)
            first(ctrl)
            with monkeypatch.context() as patch:
                interrupted = interrupted_before(step, lambda: second(ctrl), add_watch)
                patch.setattr(Inotify, "add_watch", interrupted)
                facts(watch)
            assert_at_work(watch)


def test_path_that_never_rests_is_left_unsettled_and_can_be_followed_later(
    ctrl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    realpath = os.path.realpath

    def replace_and_resolve(path: str) -> str:
        move_away_and_replace(ctrl)
        return realpath(path)

    with watching(ctrl) as watch:
        with monkeypatch.context() as patch:
            patch.setattr(os.path, "realpath", replace_and_resolve)
            watch.follow()
        assert not watch.settled
        watch.follow()
        facts(watch)
        assert_at_work(watch)
