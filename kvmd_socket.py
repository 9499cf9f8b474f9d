"""Facts about UNIX sockets and their files, as the kernel tells them.

What tells one socket file from the next of its name, who is at the other end of a
connection, which names are listened on, what a process has open. No policy, and
nothing of instances.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator

#: Bytes of sun_path but for its NUL, unix(7).
LONGEST_SOCKET_PATH = 107

AT_FDCWD = -100
#: statx(2): flag and masks; struct statx, its mask and its birth time in it.
AT_SYMLINK_NOFOLLOW = 0x100
STATX_BTIME = 0x800
STATX_SIZE = 256
STATX_MASK = struct.Struct("I")
STATX_BIRTH = struct.Struct("80xqI")
#: name_to_handle_at(2): MAX_HANDLE_SZ; struct file_handle without the handle itself.
LONGEST_HANDLE = 128
HANDLE_HEADER = struct.Struct("Ii")
LIBC = ctypes.CDLL(None, use_errno=True)
#: Errors that say that no file is there.
VANISHED = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.EACCES}

#: A change younger than this may be followed by another with the same time: the clock
#: of kernels before 6.13 ticks up to every 10 ms.
CLOCK_TICK_NS = 100_000_000

#: From linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h: what asks for the peer of
#: every UNIX socket, as sock_diag(7) has it.
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST_DUMP = 0x301
UDIAG_SHOW_PEER = 4
UNIX_DIAG_PEER = 2
#: Seconds that the kernel may take for an answer; bytes of one read of it.
DIAG_TIMEOUT = 10
DIAG_READ_SIZE = 65536
NETLINK_HEADER = struct.Struct("=IHHII")
DIAG_REQUEST = struct.Struct("=BBHIIIQ")
DIAG_ANSWER = struct.Struct("=BBBBIQ")
ATTRIBUTE_HEADER = struct.Struct("=HH")

#: Of a line in /proc/net/unix: the width of its second to sixth field; the flag of a
#: listener; the state of a connection.
FIELD_WIDTHS = [8, 8, 8, 4, 2]
SO_ACCEPTCON = 0x10000
SS_CONNECTED = 3


class SocketFile:
    """The file of one QEMU's socket, whatever else was done to it."""

    __slots__ = ("_status", "identity")

    def __init__(self, identity: int | None = None) -> None:
        #: None until it is seen for the first time.
        self.identity = identity
        #: `socket_status` at the last check of the identity; None: check it again.
        self._status: int | None = None

    def is_at(self, path: str) -> bool:
        """Tell whether it stands at the path. The first one that is seen is it."""
        if self.identity is None:
            self.identity = socket_identity(path)
            return self.identity is not None
        return self._identity_at(path) == self.identity

    def is_replaced_at(self, path: str) -> bool:
        """Tell whether another one stands at the path, which is another QEMU's.

        One that is away for a moment, with its directory, may come back.
        """
        return self._identity_at(path) not in {None, self.identity}

    def _identity_at(self, path: str) -> int | None:
        """Return the identity of the socket at the path, None if there is none."""
        status = socket_status(path)
        if status is None:
            return None
        if status == self._status:
            return self.identity
        identity = socket_identity(path)
        if identity == self.identity:
            self._status = status or None
        return identity


def socket_status(path: str) -> int | None:
    """Return what lstat(2) tells of a socket file in one number, None if there is none.

    As long as that is the same, so is the socket. It is 0, which is never the same, if
    the last change is too recent to be told from the next one.
    """
    status = _stat_socket(path)
    if status is None:
        return None
    if status.st_ctime_ns > time.time_ns() - CLOCK_TICK_NS:
        return 0
    return hash((status.st_dev, status.st_ino, status.st_ctime_ns))


def socket_identity(path: str) -> int | None:
    """Return what tells the socket at a path from a later one, None if there is none.

    It is the same after utime, chmod, chown, link and rename, whoever does them. It
    takes four times as long as `socket_status`.
    """
    status = _stat_socket(path)
    if status is None:
        return None
    birth = _birth(os.fsencode(path))
    if birth is None:
        return None
    return hash((status.st_dev, status.st_ino, birth or status.st_mtime_ns))


def _stat_socket(path: str) -> os.stat_result | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status if stat.S_ISSOCK(status.st_mode) else None


def _birth(path: bytes) -> int | None:
    """Return the file handle or the birth time of a file, 0 if neither is known.

    None if the file has gone away: it must not be told by something else then.

    The handle comes first: it holds a random number of each inode (the generation),
    and tmpfs knows no birth times on older kernels. Overlayfs has no handles.
    """
    handle = ctypes.create_string_buffer(
        HANDLE_HEADER.pack(LONGEST_HANDLE, 0), HANDLE_HEADER.size + LONGEST_HANDLE
    )
    mount = ctypes.c_int()
    ctypes.set_errno(0)
    if not LIBC.name_to_handle_at(AT_FDCWD, path, handle, ctypes.byref(mount), 0):
        size, _ = HANDLE_HEADER.unpack_from(handle)
        return int.from_bytes(handle.raw[HANDLE_HEADER.size :][:size], "little")
    if ctypes.get_errno() in VANISHED:
        return None
    status = ctypes.create_string_buffer(STATX_SIZE)  # its mask is 0 after a failure
    failed = LIBC.statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_BTIME, status)
    if failed and ctypes.get_errno() in VANISHED:
        return None
    if not STATX_MASK.unpack_from(status)[0] & STATX_BTIME:
        return 0
    seconds, nanoseconds = STATX_BIRTH.unpack_from(status)
    return int(seconds * 10**9 + nanoseconds)


def read_listeners(directory: str) -> dict[str, list[int]]:
    """Return the names in a directory that somebody listens on, there or not.

    With each are the inode numbers of the connections that its listener has taken.

    From /proc/self/net/unix, which has the names as bound, whatever they lead to now,
    with a line for the listener and for each connection that it took. None of these
    names is looked up: it may lead to a file system of its owner's that never answers.
    A local user can have any name listed, in a mount namespace of his own. Raises
    OSError.
    """
    with open("/proc/self/net/unix", "rb") as table:
        lines = os.fsdecode(table.read()).split("\n")
    real = os.path.realpath(directory)
    spellings = {directory, real, f"/var{real}"}  # /var/run is Ganeti's name for /run
    listening = set()
    connections: dict[str, list[int]] = {}
    for line in lines[1:]:
        place, _, name = line.rpartition("/")
        fields = place.split(None, 7)
        if len(fields) < 8 or fields[7] not in spellings:
            continue
        try:
            flags, state, inode = int(fields[3], 16), int(fields[5], 16), int(fields[6])
        except ValueError:
            continue
        # What a name with a line feed in it forges is to be no shorter than a line.
        if [len(field) for field in fields[1:6]] == FIELD_WIDTHS:
            if flags & SO_ACCEPTCON:
                listening.add(name)
            elif state == SS_CONNECTED:
                connections.setdefault(name, []).append(inode)
    return {name: connections.get(name, []) for name in listening}


def listening_names(directory: str) -> set[str]:
    """Return the names in a directory that somebody listens on, there or not.

    It takes about 7 us for each socket of the whole node. Raises OSError.
    """
    return set(read_listeners(directory))


def read_peers() -> dict[int, int]:
    """Return the inode number of each UNIX socket's peer. Raises OSError."""
    request = DIAG_REQUEST.pack(
        socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, UDIAG_SHOW_PEER, 2**64 - 1
    )
    header = NETLINK_HEADER.pack(
        NETLINK_HEADER.size + len(request),
        *(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 0, 0),
    )
    peers: dict[int, int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(DIAG_TIMEOUT)
        diag.send(header + request)
        while _parse_peers(diag.recv(DIAG_READ_SIZE), peers):
            pass
    return peers


def _parse_peers(answers: bytes, peers: dict[int, int]) -> bool:
    """Add what one datagram of sock_diag(7) tells; return whether more is to come."""
    offset = 0
    while offset < len(answers):
        length, kind, *_ = NETLINK_HEADER.unpack_from(answers, offset)
        if kind != SOCK_DIAG_BY_FAMILY:
            return False  # NLMSG_DONE, or NLMSG_ERROR
        body = offset + NETLINK_HEADER.size
        inode = DIAG_ANSWER.unpack_from(answers, body)[4]
        attribute = body + DIAG_ANSWER.size
        while attribute < offset + length:
            size, what = ATTRIBUTE_HEADER.unpack_from(answers, attribute)
            if what == UNIX_DIAG_PEER:
                value = answers[attribute + ATTRIBUTE_HEADER.size : attribute + size]
                peers[inode] = int.from_bytes(value, sys.byteorder)
            attribute += (size + 3) & ~3
        offset += (length + 3) & ~3
    return True


def open_files(pid: str) -> Iterator[str]:
    """Yield what the descriptors of a process are of, as /proc/PID/fd has it.

    Raises OSError.
    """
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):  # closed in between
            yield os.readlink(f"{directory}/{name}")
