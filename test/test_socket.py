"""Facts about sockets: what identifies a socket file, who listens, who is the peer."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from daemon import INSTANCE
from deadline import wait_until
from fake_qemu import FakeQemu
from namespace import call_in_namespace

import kvmd_socket

CALLS = ("name_to_handle_at", "statx")


@pytest.fixture(params=["by handle", "by birth time"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernel tell file handles, then none, as overlayfs does."""
    if request.param == "by birth time":
        fail(monkeypatch, "name_to_handle_at")


def inode_of(connection: socket.socket) -> int:
    """Return the inode number of a socket."""
    return os.fstat(connection.fileno()).st_ino


def is_listened_on(path: Path) -> bool:
    """Tell whether somebody listens on a name."""
    return path.name in kvmd_socket.listening_names(str(path.parent))


def fail(monkeypatch: pytest.MonkeyPatch, *calls: str) -> None:
    """Have calls of the C library fail."""
    for call in calls:
        monkeypatch.setattr(kvmd_socket.LIBC, call, lambda *_: -1)


def rename_link_over(path: Path) -> None:
    os.link(path, path.with_name("link"))
    path.unlink()
    path.with_name("link").rename(path)


def move_and_back(path: Path) -> None:
    """Rename a file, then rename it back."""
    away = path.with_name("away")
    path.rename(away)
    away.rename(path)


def set_access_list(path: Path) -> None:
    """Let user 1 read a file, as setfacl does (acl(5), version 2 of its xattr)."""
    nobody = 0xFFFFFFFF
    entries = [(1, 6, nobody), (2, 4, 1), (4, 4, nobody), (16, 4, nobody)]
    entries.append((32, 0, nobody))
    packed = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + packed)


UNCHANGING: dict[str, Callable[[Path], object]] = {
    "touch": lambda path: path.touch(),
    "an old time": lambda path: os.utime(path, (1, 1)),
    "chmod": lambda path: path.chmod(0o600),
    "chown": lambda path: os.chown(path, os.getuid(), os.getgid()),
    "setfacl": set_access_list,
    "link": lambda path: os.link(path, path.with_name("link")),
    "renamed away and back": move_and_back,
    "renamed over itself": lambda path: path.rename(path),
    "its link renamed over it": rename_link_over,
    "the directory renamed away and back": lambda path: move_and_back(path.parent),
}


@pytest.mark.parametrize("change", UNCHANGING)
def test_what_leaves_the_process_alone_leaves_the_identity(
    fake_qemu: FakeQemu, either_way: None, change: str
) -> None:
    fake_qemu.listen()
    before = kvmd_socket.socket_identity(str(fake_qemu.path))
    UNCHANGING[change](fake_qemu.path)
    assert before is not None
    assert kvmd_socket.socket_identity(str(fake_qemu.path)) == before


def test_a_socket_bound_anew_has_another_identity_however_fast(
    control_dir: Path, either_way: None
) -> None:
    identity = status = None
    for _ in range(300):
        with FakeQemu(control_dir, INSTANCE) as qemu:
            qemu.bind()
            path = str(qemu.path)
            earlier = identity, status
            identity = kvmd_socket.socket_identity(path)
            status = kvmd_socket.socket_status(path)
        assert identity is not None and identity != earlier[0]
        assert status == 0 or status != earlier[1]


def test_where_neither_is_known_the_time_of_the_last_change_has_to_do(
    fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, *CALLS)
    fake_qemu.bind()
    os.utime(fake_qemu.path, ns=(1, 5))
    status = fake_qemu.path.stat()
    expected = hash((status.st_dev, status.st_ino, 5))
    assert kvmd_socket.socket_identity(str(fake_qemu.path)) == expected


def settled_status(path: str) -> int:
    """Return the status of a socket file when its last change is some time ago."""
    return wait_until(lambda: kvmd_socket.socket_status(path), "it has a status")


def test_a_status_stays_until_something_changes(fake_qemu: FakeQemu) -> None:
    fake_qemu.bind()
    path = str(fake_qemu.path)
    before = settled_status(path)
    assert kvmd_socket.socket_status(path) == before
    fake_qemu.path.chmod(0o600)
    assert kvmd_socket.socket_status(path) != before
    assert settled_status(path) != before


def test_a_file_that_has_just_changed_is_not_known_by_its_status(
    fake_qemu: FakeQemu,
) -> None:
    fake_qemu.bind()

    def touch_and_look() -> bool:
        fake_qemu.path.touch()
        return kvmd_socket.socket_status(str(fake_qemu.path)) == 0

    wait_until(touch_and_look, "the look comes soon enough after the touch")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.touch(),
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: path.symlink_to(f"{INSTANCE}.kvmd"),
        lambda path: path.symlink_to("nothing"),
    ],
    ids=["nothing", "file", "directory", "fifo", "link to a socket", "dangling link"],
)
def test_what_is_no_socket_has_no_identity(
    fake_qemu: FakeQemu, make: Callable[[Path], object]
) -> None:
    fake_qemu.bind()
    path = fake_qemu.path.with_name("other")
    make(path)
    assert kvmd_socket.socket_identity(str(path)) is None
    assert kvmd_socket.socket_status(str(path)) is None


def test_the_peer_of_each_socket_is_told() -> None:
    one, other = socket.socketpair()
    with one, other:
        inodes = [inode_of(end) for end in (one, other)]
        peers = kvmd_socket.read_peers()
    assert [peers[inode] for inode in inodes] == inodes[::-1]


def test_a_name_is_listened_on_as_long_as_there_is_a_listener(
    fake_qemu: FakeQemu, control_dir: Path
) -> None:
    path = str(fake_qemu.path)
    fake_qemu.bind()
    assert not is_listened_on(fake_qemu.path)
    fake_qemu.listen()
    assert is_listened_on(fake_qemu.path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        fake_qemu.accept()
        fake_qemu.path.unlink()
        assert is_listened_on(fake_qemu.path)
        listeners = kvmd_socket.read_listeners(str(control_dir))
        [connection] = listeners[fake_qemu.path.name]
        assert kvmd_socket.read_peers()[connection] == inode_of(client)
        fake_qemu.exit()
    assert not is_listened_on(fake_qemu.path)


def test_a_directory_has_two_names(fake_qemu: FakeQemu, control_dir: Path) -> None:
    link = control_dir.with_name("link")
    link.symlink_to(control_dir)
    fake_qemu.listen()
    assert kvmd_socket.listening_names(str(link)) == {fake_qemu.path.name}
    with FakeQemu(link, "other") as other:
        other.listen()
        names = {fake_qemu.path.name, other.path.name}
        assert kvmd_socket.listening_names(str(link)) == names


def test_what_is_bound_below_var_run_is_found_below_run() -> None:
    def bind_and_look() -> None:
        subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/var/run/{INSTANCE}.kvmd")
            listener.listen()
            assert kvmd_socket.listening_names("/run") == {f"{INSTANCE}.kvmd"}

    call_in_namespace(bind_and_look)


def test_no_name_forges_a_listener(control_dir: Path) -> None:
    forged = f"\0\n0: 2 0 10000 1 1 1 {control_dir}/a.kvmd"
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as third:
        other.bind(forged)
        third.bind(b"\0a\nb \xff zz 1 zz 1 z %b/a.kvmd" % os.fsencode(control_dir))
        assert kvmd_socket.read_listeners(str(control_dir)) == {}


def test_a_socket_that_goes_away_while_it_is_looked_at_has_no_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "away" / "a"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        status = os.lstat(path)
        path.parent.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(os, "lstat", lambda _path: status)
    assert kvmd_socket.socket_identity(str(path)) is None
