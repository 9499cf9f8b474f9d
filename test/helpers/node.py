"""A node's directories, and the daemon started on them as an init script does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from daemon import ROOT, read_log
from deadline import SECONDS, wait_until

SETTINGS = {
    "ssconf_hypervisor_list": "xen-pvm\nkvm\n",
    "ssconf_enabled_user_shutdown": "True\n",
    "ssconf_node_vm_capable": "node1.example.com=True\nnode2.example.com=False\n",
}


class Node:
    """Control directory, pid file, log and settings of a node that is to run kvmd."""

    def __init__(self, control_dir: Path) -> None:
        self.directory = control_dir.parent
        self.control_dir = control_dir
        self.pid_file = self.directory / "ganeti-kvmd.pid"
        self.log_file = self.directory / "kvm-daemon.log"
        self.ssconf_dir = self.directory / "ssconf"
        self.ssconf_dir.mkdir()
        for name, text in SETTINGS.items():
            (self.ssconf_dir / name).write_text(text)
        self.environment = {**os.environ, "GANETI_HOSTNAME": "node1.example.com"}

    def command(self, *options: str, user_checks: bool = False) -> list[str]:
        """Return what starts the daemon here."""
        return [
            *(sys.executable, str(ROOT / "kvmd.py")),
            *(() if user_checks else ("--no-user-checks",)),
            *("--control-dir", str(self.control_dir)),
            *("--pid-file", str(self.pid_file), "--log-file", str(self.log_file)),
            *("--ssconf-dir", str(self.ssconf_dir)),
            *options,
        ]

    def run(
        self, *options: str, prefix: Sequence[str] = (), user_checks: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Start the daemon, wait for the end of the process that was started."""
        return subprocess.run(
            [*prefix, *self.command(*options, user_checks=user_checks)],
            capture_output=True,
            check=False,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=SECONDS,
        )

    def start(self, *options: str, prefix: Sequence[str] = ()) -> int:
        """Start the daemon in the background, return its pid."""
        result = self.run(*options, prefix=prefix)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        return self.pid

    @property
    def pid(self) -> int:
        """What the pid file holds."""
        return int(self.pid_file.read_text())

    @property
    def log(self) -> str:
        """The log so far."""
        return read_log(self.log_file)

    def stop(self) -> None:
        """End the daemon as an init script does, and wait until it is gone."""
        pid = self.pid
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: pid not in self.processes(), f"the end of {pid}")
        assert not self.pid_file.exists()

    def processes(self) -> list[int]:
        """Return the pids of all processes whose command line names this node."""
        return [
            int(process.name)
            for process in Path("/proc").iterdir()
            if process.name.isdigit() and self._is_named_by(process)
        ]

    def end(self) -> None:
        """End all that still runs here."""
        for pid in self.processes():
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.processes(), "nothing runs any more")

    def _is_named_by(self, process: Path) -> bool:
        try:
            return os.fsencode(self.directory) in (process / "cmdline").read_bytes()
        except OSError:
            return False  # it is gone
