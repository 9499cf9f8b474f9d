"""The daemons that are measured, and where they find what they expect of a node.

They all use Ganeti's own paths, which are hard-coded in its compiled daemon, in a mount
namespace of this process's own: nothing of it is seen outside, or left behind.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

CONTROL_DIR = Path("/var/run/ganeti/kvm-hypervisor/ctrl")
PID_FILE = Path("/var/run/ganeti/ganeti-kvmd.pid")
STATE_FILE = Path("/var/run/ganeti/ganeti-kvmd.state")
NOTIFY_SOCKET = Path("/run/kvmd-bench-notify")
LOG_DIR = Path("/var/log/ganeti")
SSCONF_DIR = Path("/var/lib/ganeti")

#: The commit of this project's version 1.0.0.
VERSION_1_0_0 = "b2012c9"

#: Ganeti's own daemon in its package. What it needs is installed by `make bench`.
HASKELL_DAEMON = "usr/lib/ganeti/*/usr/sbin/ganeti-kvmd"

#: Users and groups that Ganeti's own daemon insists on finding, all of them root here.
GANETI_NAMES = ["admin", "confd", "daemons", "luxid", "masterd", "metad", "rapi"]

#: The interpreter that an installed daemon runs on.
PYTHON = "/usr/bin/python3"

CLONE_NEWNS = 0x00020000
#: ioctl_fifreeze(2)
FIFREEZE = 0xC0045877
FITHAW = 0xC0045878
LOG_FILE_SYSTEM_SIZE = 16 << 20
LONG_ENOUGH = 20.0


class DaemonDiedError(Exception):
    """The daemon that is measured is gone."""


@dataclass
class Process:
    """A daemon that runs: what the kernel knows of it."""

    pid: int
    #: When it was executed (time.monotonic_ns()).
    executed: int

    def _read(self, name: str) -> str:
        try:
            return Path(f"/proc/{self.pid}/{name}").read_text()
        except (FileNotFoundError, ProcessLookupError):
            raise DaemonDiedError from None

    def _number(self, name: str, key: str) -> int:
        for line in self._read(name).splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1])
        raise DaemonDiedError  # a zombie has no memory

    def _tasks(self) -> list[str]:
        try:
            return os.listdir(f"/proc/{self.pid}/task")
        except (FileNotFoundError, ProcessLookupError):
            raise DaemonDiedError from None

    def cpu_ns(self) -> int:
        """CPU time of all threads so far (sched_info of the kernel)."""
        return sum(
            int(self._read(f"task/{task}/schedstat").split()[0])
            for task in self._tasks()
        )

    def switches(self) -> int:
        """Context switches of all threads so far."""
        return sum(
            self._number(f"task/{task}/status", f"{kind}_ctxt_switches")
            for task in self._tasks()
            for kind in ("voluntary", "nonvoluntary")
        )

    def rss(self) -> int:
        """Resident memory in bytes, as exact as the kernel knows it."""
        return self._number("smaps_rollup", "Rss") * 1024

    def descriptors(self) -> int:
        """Open file descriptors."""
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        except (FileNotFoundError, ProcessLookupError):
            raise DaemonDiedError from None

    def settle(self) -> None:
        """Wait until it has nothing to do."""
        deadline = time.monotonic() + LONG_ENOUGH
        before, now = -1, self.cpu_ns()
        while now != before and time.monotonic() < deadline:
            time.sleep(0.1)
            before, now = now, self.cpu_ns()

    def end(self) -> None:
        """End it, the hard way if it does not obey."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                break
            if select.select([pidfd], [], [], 5)[0]:
                break
        os.close(pidfd)
        with suppress(ChildProcessError):  # it had detached
            os.waitpid(self.pid, 0)


@dataclass
class Subject:
    """A daemon that can be started."""

    name: str
    command: list[str]
    detaches: bool = True
    #: This project's: it looks again at times, takes signals, and knows systemd.
    is_ours: bool = False

    def start(self, **environment: str) -> Process:
        """Start it as an init script does; return when it says that it runs."""
        environment = {**os.environ, **environment}
        executed = time.monotonic_ns()
        pid = os.posix_spawn(self.command[0], self.command, environment)
        if self.detaches:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status != 0:
                raise DaemonDiedError(f"{self.name} did not start: status {status}")
            pid = int(PID_FILE.read_text())
        return Process(pid, executed)


def compile_program(source: Path, directory: Path) -> str:
    """Compile a C program of one file; return its path."""
    program = directory / source.stem
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wextra", "-o", program, source], check=True
    )
    return str(program)


def prepare_floor(directory: Path) -> Subject:
    """Compile the program that does no more than it must."""
    program = compile_program(HERE / "floor.c", directory)
    return Subject("floor", [program, str(CONTROL_DIR)], detaches=False)


def prepare_haskell(directory: Path) -> Subject:
    """Fetch Ganeti's own daemon, and unpack it."""
    name = subprocess.run(
        [HERE / "ganeti-package"], check=True, capture_output=True, text=True
    ).stdout.strip()
    subprocess.run(
        ["apt-get", "download", "-qq", name],
        cwd=directory,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    package = next(directory.glob("*.deb"))
    unpacked = directory / "haskell"
    subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
    (daemon,) = unpacked.glob(HASKELL_DAEMON)
    return Subject("haskell", [str(daemon)])


def prepare_version_1_0_0(directory: Path) -> Subject:
    """Install this project's version 1.0.0, from the history."""
    source = directory / "source"
    source.mkdir()
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", VERSION_1_0_0],
        check=True,
        capture_output=True,
    )
    subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
    return install("1.0.0", source, directory)


def prepare_kvmd(directory: Path) -> Subject:
    """Install this project's daemon as it is in this tree."""
    return install("kvmd", ROOT, directory)


def install(name: str, source: Path, directory: Path) -> Subject:
    """Install this project's daemon, byte-compiled as its package has it."""
    subprocess.run(
        ["make", "--quiet", "-C", source, "install", f"PREFIX={directory}"], check=True
    )
    subprocess.run([PYTHON, "-m", "compileall", "-q", directory], check=True)
    return Subject(name, [str(directory / "sbin" / "ganeti-kvmd")], is_ours=True)


PREPARATIONS = {
    "haskell": prepare_haskell,
    "floor": prepare_floor,
    "1.0.0": prepare_version_1_0_0,
    "kvmd": prepare_kvmd,
}


def enter_node(directory: Path) -> None:
    """Make this process's file system look like a Ganeti node's, to it alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        sys.exit("make bench needs a mount namespace of its own: run it as root")
    mount("--make-rprivate", "/")
    for covered in ("/run", "/var/log", "/var/lib"):
        mount("-t", "tmpfs", "-o", "mode=755", "bench", covered)
    for path in (CONTROL_DIR, LOG_DIR, SSCONF_DIR):
        path.mkdir(parents=True)
    node_names = dict.fromkeys([socket.getfqdn(), socket.gethostname(), "localhost"])
    ssconf = {
        "hypervisor_list": "kvm\n",
        "enabled_user_shutdown": "True\n",
        "node_vm_capable": "".join(f"{name}=True\n" for name in node_names),
    }
    for name, text in ssconf.items():
        (SSCONF_DIR / f"ssconf_{name}").write_text(text)
    for name, fields in {"passwd": "x:0:0::/:/bin/false", "group": "x:0:"}.items():
        names = directory / name
        names.write_text(
            Path("/etc", name).read_text()
            + "".join(f"gnt-{role}:{fields}\n" for role in GANETI_NAMES)
        )
        mount("--bind", str(names), f"/etc/{name}")


def mount(*arguments: str) -> None:
    """Run mount with these arguments (mount(8))."""
    subprocess.run(["mount", *arguments], check=True)


def clear_node() -> None:
    """Remove what an earlier subject left."""
    for path in CONTROL_DIR.iterdir():
        path.unlink()
    PID_FILE.unlink(missing_ok=True)
    STATE_FILE.unlink(missing_ok=True)
    for path in LOG_DIR.iterdir():
        path.unlink()


@contextmanager
def descriptor_store(program: str) -> Iterator[dict[str, str]]:
    """Stand in for systemd (store.c); give what it adds to a service's environment."""
    NOTIFY_SOCKET.unlink(missing_ok=True)
    with subprocess.Popen(
        [program, NOTIFY_SOCKET], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield {"NOTIFY_SOCKET": str(NOTIFY_SOCKET)}
        finally:
            process.kill()


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """Have all that is started meanwhile, and this process, share one CPU."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cpus)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


@contextmanager
def log_file_system() -> Iterator[int]:
    """Give the logs a file system of their own; yield a descriptor of it."""
    with tempfile.TemporaryDirectory(prefix="kvmd-bench-") as directory:
        image = Path(directory, "image")
        image.touch()
        os.truncate(image, LOG_FILE_SYSTEM_SIZE)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        mount("-o", "loop", str(image), str(LOG_DIR))
        try:
            Path(LOG_DIR, "lost+found").rmdir()
            fd = os.open(LOG_DIR, os.O_RDONLY | os.O_DIRECTORY)
            try:
                yield fd
            finally:
                os.close(fd)
        finally:
            subprocess.run(["umount", "--lazy", str(LOG_DIR)], check=True)


@contextmanager
def frozen(file_system: int, seconds: float) -> Iterator[None]:
    """Have a file system take no write for a while; return when it does again."""
    thaw = threading.Timer(seconds, fcntl.ioctl, [file_system, FITHAW, 0])
    fcntl.ioctl(file_system, FIFREEZE, 0)
    thaw.start()
    try:
        yield
    finally:
        thaw.join()


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Have so many processes take all CPU they get, each in a session of its own."""
    processes = [
        subprocess.Popen([PYTHON, "-c", "while True: pass"], start_new_session=True)
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
