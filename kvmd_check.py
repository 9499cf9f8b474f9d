"""`--check`: what prevents detection on this node. Reads, never changes."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

from kvmd_inotify import DirectoryWatch
from kvmd_instances import SUFFIXES, instances_of
from kvmd_log import printable, write_to_stdout
from kvmd_options import Options
from kvmd_process import lock_holder
from kvmd_settings import Finding, Level, judge_cluster, read_ssconf, reason_of
from kvmd_socket import (
    LONGEST_SOCKET_PATH,
    open_files,
    read_listeners,
    read_peers,
    socket_identity,
)

UNKNOWN_CLIENT = "unknown process"


def read_holders(inodes: set[int], daemon: int | None) -> dict[int, str]:
    """Return which process has each of the sockets open, as far as one may see.

    Who holds most of them is asked first, and nobody else if he holds all.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    holders: dict[int, str] = {}
    for pid in [str(daemon), *filter(str.isdigit, os.listdir("/proc"))]:
        if len(holders) == len(wanted):
            break
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                name = comm.read().strip()
            for target in open_files(pid):
                if target in wanted:
                    holders[wanted[target]] = f"{name}, pid {pid}"
        except OSError:
            continue  # it is somebody else's, or gone
    return holders


def read_clients(control_dir: str, daemon: int | None) -> dict[str, list[str]]:
    """Return who is connected to each name that somebody listens on, there or not."""
    listeners = read_listeners(control_dir)
    try:
        peers = read_peers()
    except OSError:
        peers = {}
    inodes = {peers.get(inode, 0) for found in listeners.values() for inode in found}
    holders = read_holders(inodes, daemon)
    return {
        name: [holders.get(peers.get(inode, 0), UNKNOWN_CLIENT) for inode in found]
        for name, found in listeners.items()
    }


def describe_clients(clients: list[str]) -> str:
    """Say who is connected to a socket that somebody listens on."""
    if not clients:
        return "listening, nobody connected"
    return f"connected by {'; '.join(clients)}"


def check_clients(path: str, clients: list[str], daemon: int | None) -> Finding:
    """Judge who is connected to a monitor socket, as `read_holders` names them.

    The daemon's pid is given if one runs that is to be among them.
    """
    text = f"{path}: {describe_clients(clients)}"
    is_connected = any(
        client == UNKNOWN_CLIENT or client.endswith(f", pid {daemon}")
        for client in clients
    )
    if daemon is None or is_connected:
        return Finding(Level.OK, text)
    return Finding(
        Level.WARN,
        f"{text}: the daemon, pid {daemon}, waits for QEMU to answer, or for that"
        f" client to close; to see what it knows: ganeti-kvmd --status",
    )


def why_ignored(path: str) -> str | None:
    """Return why the daemon would not connect to what is there, None if it would."""
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        return f"longer than the {LONGEST_SOCKET_PATH} bytes of a socket's path"
    return "no socket" if socket_identity(path) is None else None


def check_instance(
    path: str,
    names: set[str],
    suffixes: tuple[str, ...],
    clients: dict[str, list[str]],
    daemon: int | None,
) -> Iterator[Finding]:
    """Judge the monitor sockets of one instance; the path is theirs less the suffix.

    The names are those in the directory, the clients those of each name that somebody
    listens on. The pid is that of this daemon, None if it does not run.
    """
    instance = os.path.basename(path)
    remedy = f"restart the instance (gnt-instance reboot {instance})"
    ignored = {
        suffix: why_ignored(path + suffix)
        for suffix in SUFFIXES["auto"]
        if instance + suffix in names
    }
    used = next((one for one in suffixes if ignored.get(one, "") is None), None)
    if ".kvmd" in suffixes and used != ".kvmd" and f"{instance}.kvmd" in clients:
        used = None
        yield Finding(
            Level.WARN,
            f"{path}.kvmd: {describe_clients(clients[f'{instance}.kvmd'])}, but"
            f" somebody has removed the socket: nobody can connect to it any more;"
            f" {remedy}",
        )
    for suffix, reason in ignored.items():
        found = clients.get(instance + suffix)
        if reason is not None:
            yield Finding(Level.WARN, f"{path}{suffix}: {reason}; it is ignored")
        elif found is None:
            text = f"{path}{suffix}: dead, nobody listens; if it does run, {remedy}"
            yield Finding(Level.WARN, text)
        elif suffix == used == ".qmp" and ".kvmd" in suffixes:
            yield Finding(
                Level.WARN,
                f"{path}{suffix}: {describe_clients(found)}; the daemon uses it for"
                f" want of a .kvmd, and keeps Ganeti from it; {remedy}",
            )
        else:
            expected = daemon if suffix == used else None
            yield check_clients(path + suffix, found, expected)


def check_instances(
    control_dir: str, names: set[str], suffixes: tuple[str, ...], daemon: int | None
) -> Iterator[Finding]:
    """Judge all monitor sockets, without connecting to any (see `check_instance`)."""
    clients = read_clients(control_dir, daemon)
    for instance in sorted(instances_of({*names, *clients}, SUFFIXES["auto"])):
        path = os.path.join(control_dir, instance)
        yield from check_instance(path, names, suffixes, clients, daemon)


def check_directory(control_dir: str) -> tuple[Finding, set[str]]:
    """Judge the control directory; return the names in it as well. Raises OSError."""
    try:
        names = set(os.listdir(control_dir))
    except FileNotFoundError:
        return Finding(
            Level.WARN,
            f"{control_dir}: not there yet; Ganeti makes it at its first KVM operation",
        ), set()
    except NotADirectoryError as error:
        return Finding(
            Level.FAIL,
            f"{control_dir}: {error.strerror}; move away what stands there, Ganeti"
            " makes the directory anew",
        ), set()
    return Finding(Level.OK, f"{control_dir}: the control directory is there"), names


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
    limit = "an unknown number of"
    with contextlib.suppress(OSError):  # it may have ended meanwhile
        limit = f"up to {resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]}"
    return Finding(Level.OK, f"a daemon runs, pid {pid}, with {limit} open files")


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
        yield from judge_cluster(options.ssconf_dir)
        yield check_user_shutdown_parameter(options.ssconf_dir)
    daemon = lock_holder(options.pid_file)
    yield check_daemon(options.pid_file, daemon)
    yield check_inotify(options.control_dir)
    finding, names = check_directory(options.control_dir)
    yield finding
    suffixes = SUFFIXES[options.socket_suffix]
    if daemon is not None and is_ganetis(daemon):
        daemon = None
    yield from check_instances(options.control_dir, names, suffixes, daemon)


def check_all(options: Options) -> Iterator[Finding]:
    """Judge the node, up to what can't be looked at, or is not there any more."""
    try:
        yield from check_node(options)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}; run this as root, or once more"
        yield Finding(Level.FAIL, text)


def check(options: Options) -> int:
    """Print a line per finding; return 0 if detection works, else 1."""
    works = True
    for finding in check_all(options):
        broken = finding.level in {Level.FAIL, Level.BROKEN}
        works &= not broken
        label = Level.FAIL.value if broken else finding.level.value
        write_to_stdout(f"{label:5} {printable(finding.text)}")
    return 0 if works else 1
