"""Facts about sockets: what identifies a socket file, who listens, who is the peer."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from daemon import INSTANCE, ROOT
from deadline import SECONDS, wait_until
from fake_qemu import FakeQemu
from namespace import call_in_namespace, require_namespaces

import kvmd_socket

CALLS = ("name_to_handle_at", "statx")


@pytest.fixture(params=["by handle", "by birth time"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernel tell file handles, then none, as overlayfs does."""
    if request.param == "by birth time":
        fail(monkeypatch, "name_to_handle_at")


def fail(monkeypatch: pytest.MonkeyPatch, *calls: str) -> None:
    """Have calls of the C library fail."""
    for call in calls:
        monkeypatch.setattr(kvmd_socket.LIBC, call, lambda *_: -1)


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
    "its link renamed over it": lambda path: (
        os.link(path, path.with_name("link")),
        path.unlink(),
        path.with_name("link").rename(path),
    ),
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
    fake_qemu: FakeQemu, either_way: None
) -> None:
    seen = None
    for _ in range(300):
        with FakeQemu(fake_qemu.path.parent, INSTANCE) as qemu:
            qemu.bind()
            earlier, seen = seen, kvmd_socket.find_socket_file(str(qemu.path), seen)
        assert seen and (earlier is None or seen.identity != earlier.identity)


def test_where_neither_is_known_the_time_of_the_last_change_has_to_do(
    fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, *CALLS)
    fake_qemu.bind()
    os.utime(fake_qemu.path, ns=(1, 5))
    status = fake_qemu.path.stat()
    expected = (status.st_dev, status.st_ino, 5)
    assert kvmd_socket.socket_identity(str(fake_qemu.path)) == expected


def test_the_kernel_is_asked_no_more_about_a_file_that_has_not_changed(
    fake_qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu.bind()
    path = str(fake_qemu.path)

    def settled() -> kvmd_socket.SocketFile | None:
        file = kvmd_socket.find_socket_file(path)
        return file if file and file.changed else None

    seen = wait_until(settled, "its last change is no longer recent")
    fail(monkeypatch, *CALLS)
    assert kvmd_socket.find_socket_file(path, seen) is seen
    monkeypatch.undo()
    fake_qemu.path.chmod(0o600)
    changed = kvmd_socket.find_socket_file(path, seen)
    assert changed and changed is not seen and changed.identity == seen.identity


def test_a_file_that_has_just_changed_is_asked_about_again(fake_qemu: FakeQemu) -> None:
    fake_qemu.bind()
    os.utime(fake_qemu.path)
    seen = kvmd_socket.find_socket_file(str(fake_qemu.path))
    assert seen and seen.changed == 0
    again = kvmd_socket.find_socket_file(str(fake_qemu.path), seen)
    assert again is not seen


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


def test_the_peer_is_who_listens(fake_qemu: FakeQemu) -> None:
    fake_qemu.listen()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(fake_qemu.path))
        assert kvmd_socket.peer_pid(connection) == os.getpid()


def test_a_peer_outside_of_the_pid_namespace_has_no_pid(fake_qemu: FakeQemu) -> None:
    require_namespaces()
    fake_qemu.listen()
    ask = (
        "import socket, kvmd_socket; connection = socket.socket(socket.AF_UNIX);"
        f" connection.connect({str(fake_qemu.path)!r});"
        " print(kvmd_socket.peer_pid(connection))"
    )
    enter = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    result = subprocess.run(
        [*enter, sys.executable, "-c", ask],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
        timeout=SECONDS,
    )
    assert result.stdout == "None\n"


def test_a_connection_is_known_by_its_inode_number() -> None:
    one, other = socket.socketpair()
    with one, other:
        inode = kvmd_socket.socket_inode(one)
        assert (one.fileno(), f"socket:[{inode}]") in kvmd_socket.open_files("self")


def test_the_peer_of_each_socket_is_told() -> None:
    one, other = socket.socketpair()
    with one, other:
        inodes = [kvmd_socket.socket_inode(end) for end in (one, other)]
        peers = kvmd_socket.read_peers()
    assert [peers[inode] for inode in inodes] == inodes[::-1]


def test_a_name_is_listened_on_as_long_as_there_is_a_listener(
    fake_qemu: FakeQemu, control_dir: Path
) -> None:
    path = str(fake_qemu.path)
    fake_qemu.bind()
    assert not kvmd_socket.is_listened_on(path)
    fake_qemu.listen()
    assert kvmd_socket.is_listened_on(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        fake_qemu.accept()
        fake_qemu.path.unlink()
        assert kvmd_socket.is_listened_on(path)
        [listener, connection] = sorted(
            kvmd_socket.read_bound_sockets(str(control_dir))[fake_qemu.path.name],
            key=lambda bound: not bound.listens,
        )
        assert (listener.listens, listener.is_connected) == (True, False)
        assert (connection.listens, connection.is_connected) == (False, True)
        assert kvmd_socket.read_peers()[connection.inode] == kvmd_socket.socket_inode(
            client
        )
        fake_qemu.exit()
    assert not kvmd_socket.is_listened_on(path)


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

    if os.path.realpath("/var/run") != "/run":
        pytest.skip("/var/run is not /run here")
    call_in_namespace(bind_and_look)


def test_no_name_forges_a_listener(control_dir: Path) -> None:
    forged = f"\0\n0: 2 0 10000 1 1 1 {control_dir}/a.kvmd"
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as third:
        other.bind(forged)
        third.bind(b"\0a\nb \xff zz 1 zz 1 z %b/a.kvmd" % os.fsencode(control_dir))
        assert kvmd_socket.read_bound_sockets(str(control_dir)) == {}
