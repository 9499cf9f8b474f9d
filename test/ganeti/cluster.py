"""A Ganeti cluster of one node, its instances, and the KVM daemon on it.

For use in the throw-away copy of a machine that `throwaway` makes: the cluster is
created in /etc, /var and /run, and nothing is put back.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "test/helpers"))

import guest  # noqa: E402

DOMAIN = "example.org"
NODE = "node1"
# Of TEST-NET-1: for documentation, never routed.
NODE_ADDRESS = "192.0.2.1"
CLUSTER_ADDRESS = "192.0.2.2"

INSTANCE_DISKS = Path("/var/lib/instances")
GUEST_IMAGE = Path("/tmp/guest")
RUN_DIR = Path("/var/run/ganeti")
CONTROL_DIR = RUN_DIR / "kvm-hypervisor/ctrl"
QEMU_PID_FILES = RUN_DIR / "kvm-hypervisor/pid"
PID_FILE = RUN_DIR / "ganeti-kvmd.pid"
LOG_FILE = Path("/var/log/ganeti/kvm-daemon.log")

# What Ganeti 3.1.0~rc2 makes a cluster's certificates with, and Python's OpenSSL on
# Debian sid has no longer.
LOST_FUNCTION = "module 'OpenSSL.crypto' has no attribute 'X509Req'"

# Seconds that one command may take, and that a condition may take to come true.
COMMAND_LIMIT = 120
PATIENCE = 60


class GanetiUnusableError(Exception):
    """Ganeti itself, without us, makes no cluster with what this release has."""


def expect(what: str, actual: object, wanted: object) -> None:
    """Fail unless both are equal."""
    if actual != wanted:
        raise AssertionError(f"{what}: {actual!r}, expected {wanted!r}")


def wait_until(
    what: str, condition: Callable[[], object], limit: float = PATIENCE
) -> None:
    """Wait for a condition; fail when it doesn't come true within the seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit} s: {what}")
        time.sleep(0.05)


def run(*command: str, limit: float = COMMAND_LIMIT) -> str:
    """Run a command, return what it prints; fail with that when it fails."""
    # A file, not a pipe: a daemon that the command starts may keep it open.
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
        output.seek(0)
        printed = output.read()
    expect(f"{' '.join(command)}: {printed}\nstatus", done.returncode, 0)
    return printed


# ---- The cluster ---------------------------------------------------------------------


def create_cluster() -> None:
    """Make this machine the one node of a new cluster."""
    Path("/etc/hosts").write_text(
        "127.0.0.1 localhost\n"
        f"{NODE_ADDRESS} {NODE}.{DOMAIN} {NODE}\n"
        f"{CLUSTER_ADDRESS} cluster.{DOMAIN}\n"
    )
    run("hostname", NODE)
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", f"{NODE_ADDRESS}/32", "dev", "lo")
    GUEST_IMAGE.write_bytes(guest.boot_sector())
    INSTANCE_DISKS.mkdir()
    Path("/etc/ganeti/file-storage-paths").write_text(f"{INSTANCE_DISKS}\n")
    try:
        run(
            *("gnt-cluster", "init", "--no-ssh-init", "--no-etc-hosts"),
            *("--master-netdev=lo", "--enabled-hypervisors=kvm"),
            *("--enabled-disk-templates=file", f"--file-storage-dir={INSTANCE_DISKS}"),
            "--user-shutdown=yes",
            # No kernel: boot from the disk. No kvm_flag: without accel=kvm on its
            # command line a QEMU that is called kvm emulates where there is no KVM.
            *("-H", "kvm:kernel_path=,user_shutdown=true,kvm_flag=disabled"),
            f"cluster.{DOMAIN}",
        )
    except AssertionError as error:
        if LOST_FUNCTION not in str(error):
            raise
        raise GanetiUnusableError(f"gnt-cluster init: {LOST_FUNCTION}") from None


def run_watcher() -> None:
    """Let Ganeti's watcher look once, as cron does every five minutes."""
    run("ganeti-watcher")


# ---- Instances -----------------------------------------------------------------------


@contextlib.contextmanager
def running_instance(name: str, *parameters: str) -> Iterator[Instance]:
    """Create and start an instance; remove it at the end."""
    instance = Instance(f"{name}.{DOMAIN}")
    try:
        instance.add(*parameters)
        yield instance
    finally:
        instance.remove()


class Instance:
    """A KVM instance whose guest is told over its serial port how to end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shutdown_file = CONTROL_DIR / f"{name}.shutdown"

    def add(self, *parameters: str) -> None:
        """Have Ganeti create and start it."""
        run(
            # SeaBIOS doesn't read a disk of less than 4 MiB.
            *("gnt-instance", "add", "-t", "file", "-s", "4M", "-n", NODE),
            *("-O", f"os-image={GUEST_IMAGE}", "-B", "memory=32,vcpus=1"),
            *("--no-nics", "--no-name-check", "--no-ip-check", "--ignore-ipolicy"),
            *(*parameters, self.name),
        )

    def start(self) -> None:
        """Have Ganeti start it."""
        run("gnt-instance", "start", self.name)

    def shut_down(self, *options: str) -> None:
        """Have Ganeti shut it down."""
        run("gnt-instance", "shutdown", *options, self.name)

    def reboot(self) -> None:
        """Have Ganeti shut it down and start it again, with a new QEMU."""
        run("gnt-instance", "reboot", self.name)

    def remove(self) -> None:
        """Have Ganeti remove it, running or not."""
        run("gnt-instance", "remove", "-f", "--shutdown-timeout=0", self.name)

    @property
    def state(self) -> str:
        """Its status as Ganeti sees it, and the state it is meant to have."""
        columns = "--output=status,admin_state"
        return " ".join(
            run("gnt-instance", "list", "--no-headers", columns, self.name).split()
        )

    @property
    def pid(self) -> int:
        """The process of its QEMU, or of the last one."""
        return int((QEMU_PID_FILES / self.name).read_text())

    def power_off(self) -> None:
        """Have the guest's user power it off; return when its QEMU has ended."""
        with waiting_for_end(self.pid):
            self._tell(guest.POWER_OFF)

    def press_power_button(self) -> None:
        """Press the power button, as Ganeti does; return when QEMU has done so."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(PATIENCE)
            monitor.connect(str(CONTROL_DIR / f"{self.name}.monitor"))
            await_prompt(monitor)
            monitor.send(b"system_powerdown\n")
            await_prompt(monitor)

    def obey_power_button(self) -> None:
        """Have the guest obey the power button; until it is told, it ignores it."""
        self._tell(guest.OBEY_POWER_BUTTON)

    def kill(self, number: signal.Signals) -> None:
        """Send QEMU a signal that ends it; return when it has ended."""
        with waiting_for_end(self.pid):
            os.kill(self.pid, number)

    def _tell(self, command: bytes) -> None:
        """Send the guest a command until it answers, or is gone.

        What comes before the guest is up is lost in the firmware.
        """
        with socket.socket(socket.AF_UNIX) as serial:
            serial.settimeout(0.1)
            serial.connect(str(CONTROL_DIR / f"{self.name}.serial"))
            wait_until(
                f"{self.name} does {command!r}", lambda: self._done(serial, command)
            )

    def _done(self, serial: socket.socket, command: bytes) -> bool:
        try:
            serial.send(command)
            answer = serial.recv(1024)
        except socket.timeout:
            return False
        except OSError:
            return True
        return answer == b"" or command in answer

    def is_monitored(self) -> object:
        """Tell whether the daemon that runs has connected to the QEMU that runs."""
        connected = rf"{self.name}: connected to .* pid {self.pid} "
        return re.search(rf" pid={daemon_pid()} .* {connected}", LOG_FILE.read_text())

    def verdicts(self) -> list[str]:
        """Return the daemon's verdicts, each with its cause."""
        pattern = rf" {self.name}: verdict=(\S+) cause=(\S+)"
        return [" ".join(words) for words in re.findall(pattern, LOG_FILE.read_text())]

    def expect_verdicts(self, *wanted: str) -> None:
        """Fail unless the daemon's verdicts, with their causes, are these."""
        expect("verdicts", self.verdicts(), list(wanted))


def await_prompt(monitor: socket.socket) -> None:
    """Read from QEMU's monitor until it waits for a command."""
    text = b""
    while not text.endswith(b"(qemu) "):
        piece = monitor.recv(4096)
        if not piece:
            raise AssertionError(f"the monitor is gone, after {text!r}")
        text += piece


@contextlib.contextmanager
def waiting_for_end(pid: int) -> Iterator[None]:
    """Wait, after what is done inside, for the end of a process."""
    process = os.pidfd_open(pid)
    try:
        yield
        if not select.select([process], [], [], PATIENCE)[0]:
            raise AssertionError(f"process {pid} has not ended within {PATIENCE} s")
    finally:
        os.close(process)


def expect_down_by_user(instance: Instance) -> None:
    """Fail unless Ganeti knows of the user's shutdown."""
    expect("state", instance.state, "USER_down up")
    expect("shutdown file", instance.shutdown_file.exists(), True)


def expect_down_by_ganeti(instance: Instance) -> None:
    """Fail unless Ganeti takes the shutdown for its own."""
    expect("shutdown file", instance.shutdown_file.exists(), False)
    expect("state", instance.state, "ADMIN_down down")


# ---- The daemon ----------------------------------------------------------------------


def daemon_util(action: str) -> None:
    """Start, stop, check the daemon as Ganeti does."""
    run("/usr/lib/ganeti/daemon-util", action, "ganeti-kvmd")


def daemon_pid() -> int | None:
    """Return the running daemon's process, as its pid file has it."""
    try:
        pid = int(PID_FILE.read_text())
        name = Path(f"/proc/{pid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return pid if name == "ganeti-kvmd\n" else None


def which_daemon() -> str:
    """Tell which daemon runs: "ours", "Ganeti's" or "none"."""
    pid = daemon_pid()
    if pid is None:
        return "none"
    program = Path(f"/proc/{pid}/exe").readlink()
    return "ours" if program.name.startswith("python3") else "Ganeti's"


def daemon_is_version(version: str) -> bool:
    """Tell whether the running daemon has started as this version of ours."""
    started = f" pid={daemon_pid()} INFO started kvmd {version} for "
    return started in LOG_FILE.read_text()


def kill_daemon() -> None:
    """Kill the daemon as a lack of memory would."""
    pid = daemon_pid()
    if pid is None:
        raise AssertionError("no daemon to kill")
    with waiting_for_end(pid):
        os.kill(pid, signal.SIGKILL)
