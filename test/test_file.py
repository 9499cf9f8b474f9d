"""Files of root's in directories that others may write."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import kvmd_file

FOR_READING = os.O_RDONLY
FOR_WRITING = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def plant_symlink(path: Path) -> None:
    path.with_name("target").write_text("precious")
    path.symlink_to("target")


def plant_dangling_symlink(path: Path) -> None:
    path.symlink_to("target")


def plant_fifo(path: Path) -> None:
    os.mkfifo(path)


def plant_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


PLANTED: list[tuple[Callable[[Path], None], str]] = [
    (plant_symlink, "it is a symlink"),
    (plant_dangling_symlink, "it is a symlink"),
    (plant_fifo, "No such device or address|it is no regular file"),
    (plant_socket, "No such device or address"),
    (Path.mkdir, "Is a directory|it is no regular file"),
]


@pytest.mark.parametrize(("plant", "reason"), PLANTED)
@pytest.mark.parametrize("flags", [FOR_READING, FOR_WRITING], ids=["read", "write"])
def test_what_is_no_regular_file_is_not_opened(
    control_dir: Path, plant: Callable[[Path], None], reason: str, flags: int
) -> None:
    path = control_dir / "file"
    plant(path)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=reason) as raised:
        kvmd_file.open_regular_file(str(path), flags)
    assert raised.value.filename == str(path)
    assert os.listdir("/proc/self/fd") == before
    target = path.with_name("target")
    assert not target.exists() or target.read_text() == "precious"


def test_a_fifo_that_is_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="it is no regular file"):
        kvmd_file.open_regular_file(str(path), FOR_WRITING)
    os.close(reader)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full", "/dev/tty", "/dev/ptmx"])
def test_a_device_is_not_opened(path: str) -> None:
    with pytest.raises(OSError, match=r"it is no regular file|No such device"):
        kvmd_file.open_regular_file(path, FOR_WRITING)


def test_what_is_written_has_no_second_name(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    other.write_text("precious")
    os.link(other, path)
    with pytest.raises(OSError, match="several names"):
        kvmd_file.open_regular_file(str(path), FOR_WRITING)
    fd = kvmd_file.open_regular_file(str(path), FOR_READING)  # a backup may do that
    assert os.read(fd, 100) == b"precious"
    os.close(fd)


def test_a_file_is_made_for_its_owner_alone_and_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)  # the directory may be one
    path = tmp_path / "link" / "file"
    fd = kvmd_file.open_regular_file(str(path), FOR_WRITING)
    assert not os.get_inheritable(fd)
    assert path.stat().st_mode & 0o777 == 0o600
    os.close(fd)
