"""A real daemon process, on a control directory of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from deadline import SECONDS, wait_until

ROOT = Path(__file__).resolve().parents[2]

# The instance that most tests are about.
INSTANCE = "web1.example.com"

# Every warning of the interpreter's is an error, that of an unclosed socket, say.
INTERPRETER = (sys.executable, "-X", "dev", "-W", "error")

# A line of its log.
LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}: ganeti-kvmd pid=\d+"
    r" (DEBUG|INFO|WARNING|ERROR) \S.*"
)

# What the daemon logs when it is at work.
_AT_WORK = " INFO started"

# What the interpreter says of an error that went unhandled.
_ACCIDENT = re.compile(r"Traceback|Exception ignored|Warning:|Fatal Python error")


@contextmanager
def control_directory() -> Iterator[Path]:
    """Make a control directory, in a node's directory of its own; remove both.

    The path is short, for a socket's path has to fit into 107 bytes.
    """
    node = Path(tempfile.mkdtemp(prefix="kvmd-"))
    control_dir = node / "ctrl"
    control_dir.mkdir()
    try:
        yield control_dir
    finally:
        shutil.rmtree(node)


def read_log(path: Path) -> str:
    """Return the whole lines of a log so far: one may be written just now."""
    try:
        text = path.read_text(errors="backslashreplace")
    except FileNotFoundError:
        return ""
    return text[: text.rfind("\n") + 1]

Self = TypeVar("Self", bound="Daemon")


class Daemon:
    """The daemon in the foreground; `options` come after those that it needs here.

    Its pid file and its log are beside the control directory. All the waiting
    looks at the log, from its beginning.
    """

    def __init__(
        self,
        control_dir: Path,
        *options: str,
        program: Path = ROOT / "kvmd.py",
        interpreter: Sequence[str] = INTERPRETER,
        environment: dict[str, str] | None = None,
    ) -> None:
        node = control_dir.parent
        self.control_dir = control_dir
        self.pid_file = node / "kvmd.pid"
        self.state_file = node / "kvmd.state"
        self.log_file = node / "kvmd.log"
        self.stderr_file = node / "kvmd.stderr"
        self._command = [
            *(*interpreter, str(program)),
            *("--foreground", "--debug", "--no-user-checks", "--no-cluster-checks"),
            *("--control-dir", str(control_dir)),
            *("--pid-file", str(self.pid_file), "--log-file", str(self.log_file)),
            *options,
        ]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The pid of the process, which has been started."""
        assert self._process
        return self._process.pid

    @property
    def log(self) -> str:
        """The log so far."""
        return read_log(self.log_file)

    @property
    def stderr(self) -> str:
        """What was written to stderr so far."""
        return self.stderr_file.read_text(errors="backslashreplace")

    def start(self) -> None:
        """Start the process, and wait until it is at work."""
        times = self.log.count(_AT_WORK) + 1
        with open(self.stderr_file, "ab") as stderr:
            self._process = self._spawn(stderr)
        try:
            self.wait_for_log(_AT_WORK, times)
        except BaseException:
            self.end()
            raise

    def _spawn(self, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            env=self._environment,
        )

    def wait_for_log(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Wait until the log matches a regular expression; return the n-th match."""

        def match() -> re.Match[str] | None:
            matches = list(re.finditer(pattern, self.log, re.MULTILINE))
            if len(matches) >= times:
                return matches[times - 1]
            if self._process and self._process.poll() is not None:
                raise ChildProcessError(f"the daemon has ended: {self.stderr}")
            return None

        try:
            return wait_until(match, f"{pattern!r} in the log")
        except TimeoutError as error:
            raise TimeoutError(f"{error}:\n{self.log}") from None

    def wait_until_connected(self, instance: str, times: int = 1) -> None:
        """Wait until QEMU has greeted it, for the n-th time in this instance's life."""
        self.wait_for_log(f" {re.escape(instance)}: connected ", times)

    def wait_for_verdict(self, instance: str, times: int = 1) -> str:
        """Wait for the n-th verdict on an instance, return its line in the log."""
        pattern = f"(?<= INFO) {re.escape(instance)}: verdict=.*"
        return self.wait_for_log(pattern, times)[0]

    def wait_for_rescan(self) -> None:
        """Wait until it has rescanned, for which it wakes alone when all is quiet.

        A name that changes wakes it twice.
        """
        before = self._sleeps()
        wait_until(lambda: self._sleeps() >= before + 5, "a rescan")

    def _sleeps(self) -> int:
        """Count how often it has had nothing to do."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        assert self._process
        self._process.send_signal(number)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Have the process stand still as long as a `with` block lasts."""
        self.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)
        yield
        self.send_signal(signal.SIGCONT)

    def wait_until_gone(self) -> int:
        """Wait for the end of the process, return its exit status."""
        assert self._process
        return self._process.wait(SECONDS)

    def go_first(self) -> None:
        """Have the process run before all others, if this user may demand that.

        What it does in time, it then does in time on a busy machine as well.
        """
        with suppress(PermissionError):
            os.sched_setscheduler(self.pid, os.SCHED_FIFO, os.sched_param(1))

    def stop(self) -> None:
        """Stop the process as an init script does; all has to have gone well."""
        self.send_signal(signal.SIGTERM)
        status = self.wait_until_gone()
        if status != 0 or _ACCIDENT.search(self.stderr):
            raise AssertionError(f"exit status {status}: {self.stderr}")

    def end(self) -> None:
        """End the process, if it still runs."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def __enter__(self: Self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
