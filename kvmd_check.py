"""`--check`: what prevents detection on this node. Reads, never changes."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys

from kvmd_daemon import SUFFIXES
from kvmd_inotify import DirectoryWatch
from kvmd_journal import open_files
from kvmd_log import printable
from kvmd_monitor import socket_identity
from kvmd_settings import (
    Finding,
    Level,
    judge_cluster,
    names_of_node,
    read_ssconf,
    reason_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmd_options import Options

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

#: Of a socket in /proc/net/unix: it listens; it is connected.
SO_ACCEPTCON = 0x10000
SS_CONNECTED = 3
UNKNOWN_CLIENT = "unknown process"


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
        while parse_peers(diag.recv(DIAG_READ_SIZE), peers):
            pass
    return peers


def parse_peers(answers: bytes, peers: dict[int, int]) -> bool:
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


def read_holders(inodes: set[int]) -> dict[int, str]:
    """Return which process has each of the sockets open, as far as one may see."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    holders = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                name = comm.read().strip()
            for _, target in open_files(pid):
                if target in wanted:
                    holders[wanted[target]] = f"{name}, pid {pid}"
        except OSError:
            continue  # it is somebody else's, or gone
    return holders


def read_sockets(control_dir: str) -> dict[str, list[tuple[int, int, int]]]:
    """Return the (flags, state, inode number) of the sockets of each path there.

    From /proc/net/unix, which has a line for the listener and for every connection.
    """
    here = os.stat(control_dir)
    sockets: dict[str, list[tuple[int, int, int]]] = {}
    with open("/proc/net/unix", "rb") as table:
        lines = os.fsdecode(table.read()).split("\n")
    for line in lines[1:]:
        try:
            _, _, _, flags, _, state, inode, path = line.split(None, 7)
            entry = (int(flags, 16), int(state, 16), int(inode))
            directory, name = os.path.split(path)
            is_here = os.path.samestat(os.stat(directory), here)
        except (ValueError, OSError):
            continue  # it has no path, or one that leads nowhere
        if is_here:
            sockets.setdefault(name, []).append(entry)
    return sockets


def check_clients(path: str, clients: list[str], daemon: int | None) -> Finding:
    """Judge who is connected to a monitor socket, as `read_holders` names them.

    The daemon's pid is given if one runs that is to be among them.
    """
    text = f"{path}: listening, nobody connected"
    if clients:
        text = f"{path}: connected by {'; '.join(clients)}"
    is_heard = any(
        client == UNKNOWN_CLIENT or client.endswith(f", pid {daemon}")
        for client in clients
    )
    if daemon is None or is_heard:
        return Finding(Level.OK, text)
    return Finding(
        Level.WARN,
        f"{text}: the daemon, pid {daemon}, waits for QEMU to answer, or for that"
        f" client to close; to see what it knows: kill -USR1 {daemon}",
    )


def check_instances(
    control_dir: str, suffixes: tuple[str, ...], daemon: int | None
) -> Iterator[Finding]:
    """Judge each instance's monitor socket, without connecting to it.

    The pid is that of this daemon, None if it does not run.
    """
    sockets = read_sockets(control_dir)
    try:
        peers = read_peers()
    except OSError:
        peers = {}
    clients = {
        name: [
            peers.get(inode, 0)
            for flags, state, inode in entries
            if state == SS_CONNECTED and not flags & SO_ACCEPTCON
        ]
        for name, entries in sockets.items()
    }
    holders = read_holders({inode for found in clients.values() for inode in found})
    names = set(os.listdir(control_dir))
    for name in sorted(names):
        instance, suffix = os.path.splitext(name)
        if suffix not in SUFFIXES["auto"] or not instance:
            continue
        path = os.path.join(control_dir, name)
        if not socket_identity(path):
            yield Finding(Level.WARN, f"{path}: no socket; it is ignored")
        elif not any(flags & SO_ACCEPTCON for flags, _, _ in sockets.get(name, [])):
            yield Finding(
                Level.WARN,
                f"{path}: dead, nobody listens; if the instance does run, restart it"
                f" (gnt-instance reboot {instance})",
            )
        else:
            used = next((one for one in suffixes if instance + one in names), None)
            yield check_clients(
                path,
                [holders.get(inode, UNKNOWN_CLIENT) for inode in clients[name]],
                daemon if suffix == used else None,
            )


def check_directory(control_dir: str) -> Finding:
    """Judge whether the control directory can be read."""
    try:
        os.listdir(control_dir)
    except FileNotFoundError:
        return Finding(
            Level.WARN,
            f"{control_dir}: not there yet; Ganeti makes it at its first KVM operation",
        )
    except PermissionError as error:
        return Finding(Level.FAIL, f"{control_dir}: {error.strerror}; run this as root")
    except OSError as error:
        return Finding(
            Level.FAIL,
            f"{control_dir}: {error.strerror}; move away what stands there, Ganeti"
            " makes the directory anew",
        )
    return Finding(Level.OK, f"{control_dir}: the control directory is there")


def check_inotify(control_dir: str) -> Finding:
    """Judge inotify's limits by using one more instance and its watches."""
    limits = []
    for name in ("max_user_instances", "max_user_watches"):
        with open(f"/proc/sys/fs/inotify/{name}", encoding="ascii") as file:
            limits.append(f"fs.inotify.{name} = {file.read().strip()}")
    try:
        with contextlib.closing(DirectoryWatch(control_dir)) as watch:
            watch.follow()
    except OSError as error:
        return Finding(
            Level.WARN,
            f"inotify: {error.strerror}; new instances are looked for every second"
            f" only; raise with sysctl -w what is used up ({', '.join(limits)})",
        )
    return Finding(Level.OK, f"inotify works ({', '.join(limits)})")


def lock_holder(path: str) -> int | None:
    """Return the pid that holds a record lock on the file (/proc/locks), if any.

    The file is not opened, so the lock can't be disturbed.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    wanted = f"{major:02x}:{minor:02x}:{status.st_ino}"
    with open("/proc/locks", encoding="ascii") as locks:
        for _, kind, _, _, pid, inode, *_ in map(str.split, locks):
            if kind == "POSIX" and inode == wanted:
                return int(pid)
    return None


def command_of(pid: int) -> str:
    """Return the command line of a process, "" if it can't be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsdecode(file.read()).replace("\0", " ").strip()
    except OSError:
        return ""


def is_ganetis(pid: int) -> bool:
    """Tell whether a daemon is Ganeti's own, which is a compiled program."""
    command = command_of(pid)
    return command != "" and "python" not in command


def check_daemon(pid_file: str, pid: int | None) -> Finding:
    """Judge whether a daemon runs, and which; the pid is that of the file's locker."""
    if pid is None:
        return Finding(
            Level.FAIL,
            f"no daemon runs (nobody has {pid_file} locked); start it with"
            " /usr/lib/ganeti/daemon-util start ganeti-kvmd",
        )
    if is_ganetis(pid):
        return Finding(
            Level.WARN,
            f"a daemon runs, pid {pid}, but it is Ganeti's own ({command_of(pid)}); to"
            " have this one: /usr/lib/ganeti/daemon-util stop ganeti-kvmd, then start",
        )
    try:
        with open(f"/proc/{pid}/limits", encoding="ascii") as limits:
            words = next(line for line in limits if line.startswith("Max open files"))
    except OSError as error:
        return Finding(Level.OK, f"a daemon runs, pid {pid} ({error.strerror})")
    limit = words.split()[3]
    return Finding(Level.OK, f"a daemon runs, pid {pid}, with up to {limit} open files")


def check_user_shutdown_parameter(ssconf_dir: str) -> Finding:
    """Judge the hypervisor parameter user_shutdown, which instances may override."""
    path = os.path.join(ssconf_dir, "ssconf_hvparams_kvm")
    remedy = "gnt-cluster modify -H kvm:user_shutdown=true"
    try:
        lines = read_ssconf(path).splitlines()
    except (OSError, ValueError) as error:
        return Finding(
            Level.WARN,
            f"{path}: cannot be read: {reason_of(error)}; to write it anew: gnt-cluster"
            " redist-conf",
        )
    if "user_shutdown=True" in lines:
        return Finding(Level.OK, f"{path}: user_shutdown=True")
    return Finding(
        Level.WARN,
        f"{path}: user_shutdown is not True; Ganeti restarts what users shut down,"
        f" unless the instance says otherwise: {remedy}",
    )


def check_node(options: Options) -> Iterator[Finding]:
    """Judge all that detection on this node hangs on."""
    if not options.no_cluster_checks:
        yield from judge_cluster(options.ssconf_dir, names_of_node())
        yield check_user_shutdown_parameter(options.ssconf_dir)
    daemon = lock_holder(options.pid_file)
    yield check_daemon(options.pid_file, daemon)
    yield check_inotify(options.control_dir)
    directory = check_directory(options.control_dir)
    yield directory
    if directory.level is Level.OK:
        suffixes = SUFFIXES[options.socket_suffix]
        if daemon is not None and is_ganetis(daemon):
            daemon = None
        yield from check_instances(options.control_dir, suffixes, daemon)


def check(options: Options) -> int:
    """Print a line per finding; return 0 if detection works, else 1."""
    works = True
    for finding in check_node(options):
        broken = finding.level in {Level.FAIL, Level.BROKEN}
        works &= not broken
        label = Level.FAIL.value if broken else finding.level.value
        print(f"{label:5} {printable(finding.text)}")
    return 0 if works else 1
