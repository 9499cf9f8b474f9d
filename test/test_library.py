"""Python is upgraded or removed under the daemon: nothing is imported late."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon import INSTANCE, ROOT, Daemon, read_log
from deadline import wait_until
from fake_qemu import FakeQemu
from status import status_table

# What of the library nothing here needs, and that is large.
LEFT_OUT = shutil.ignore_patterns(
    *("test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3", "site-packages"),
    *("dist-packages", "__pycache__", "config-*", "pydoc_data", "turtledemo"),
)

# The program, which notes the modules that are imported once it is at work.
PROGRAM = """
import sys
sys.path.insert(0, {modules!r})
import kvmd
run = kvmd.Daemon.run
def run_and_compare(daemon):
    before = set(sys.modules)
    try:
        run(daemon)
    finally:
        late = sorted(set(sys.modules) - before)
        with open({late!r}, "w", encoding="utf-8") as file:
            file.write(" ".join(late))
kvmd.Daemon.run = run_and_compare
{patch}
sys.exit(kvmd.main())
"""

FAIL_AT_UNLUCKY_ONES = """
import kvmd_monitor
class SilentError(Exception):
    def __str__(self):
        raise MemoryError
ERRORS = {"unlucky": ValueError(chr(0xdcff) + chr(10)), "unlucky too": SilentError()}
receive = kvmd_monitor.Monitor.receive
def fail(monitor):
    if monitor.instance in ERRORS:
        raise ERRORS[monitor.instance]
    return receive(monitor)
kvmd_monitor.Monitor.receive = fail
"""
FAIL_IN_THE_LOOP = """
import kvmd_log
def fail(log):
    raise ValueError("of the loop")
kvmd_log.Log.reopen = fail
"""


class Installation:
    """A Python's library and the program, copied to where they can be removed."""

    def __init__(self, directory: Path, patch: str) -> None:
        self._home = directory / "python"
        self._modules = directory / "modules"
        self._late = directory / "late"
        library = Path(sysconfig.get_path("stdlib"))
        copy = self._home / "lib" / library.name
        shutil.copytree(library, copy, symlinks=True, ignore=LEFT_OUT)
        self._modules.mkdir()
        for module in ROOT.glob("kvmd*.py"):
            shutil.copy(module, self._modules)
        self.program = directory / "program.py"
        self.program.write_text(
            PROGRAM.format(
                modules=str(self._modules), late=str(self._late), patch=patch
            )
        )
        self.environment = {**os.environ, "PYTHONHOME": str(self._home)}

    def remove(self) -> None:
        """Take the library and the program away."""
        shutil.rmtree(self._home)
        shutil.rmtree(self._modules)
        self.program.unlink()

    @property
    def imported_late(self) -> str:
        """The modules that were imported when the daemon was at work."""
        return self._late.read_text()


@contextmanager
def running(installation: Installation, control_dir: Path) -> Iterator[Daemon]:
    """Give the daemon of an installation, with a systemd that takes no message."""
    address = str(control_dir.parent / "notify")
    daemon = Daemon(
        *(control_dir, "--rescan-interval=0.1", "--syslog=yes"),
        program=installation.program,
        interpreter=(os.path.realpath(sys.executable), "-S", "-s", "-B"),
        environment={**installation.environment, "NOTIFY_SOCKET": address},
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        with daemon:
            yield daemon


# Lines that name no event of interest are not parsed.
HOSTILE_LINES = [
    *(b"SHUTDOWN\xff\n", b"{SHUTDOWN]\n", b"[" * 5000 + b"SHUTDOWN\n"),
    *(b'"SHUTDOWN\0"\n', b'"SHUTDOWN"\n', b"SHUTDOWN" * 9999 + b"\n"),
    b'{"event": "SHUTDOWN", "data": ' + b"9" * 9999 + b"}\n",
]


def run_guests(daemon: Daemon, control_dir: Path) -> None:
    """Have guests with odd names end in every way."""
    names = [INSTANCE, "\n\033[2J", os.fsdecode(b"\xff\xfe"), "\u202e\U0001f5a4"]
    for name in names:
        for reason in ["guest-shutdown", "host-signal", "unheard-of", ""]:
            with FakeQemu(control_dir, name) as qemu:
                qemu.listen()
                qemu.negotiate()
                qemu.event("POWERDOWN")
                qemu.event("RESET")
                qemu.event("GUEST_PANICKED", action="run")
                if reason:
                    qemu.event("SHUTDOWN", guest=True, reason=reason)
                qemu.wait_until_read()
            wait_until(lambda: not status_table(daemon), "it is forgotten")


def plant_shutdown_files(daemon: Daemon, control_dir: Path) -> None:
    """Put in the place of shutdown files what they can't be made over."""
    plants: list[Callable[[Path], None]] = [Path.mkdir, os.mkfifo]
    for number, plant in enumerate(plants):
        with FakeQemu(control_dir, f"planted{number}") as qemu:
            qemu.listen()
            qemu.negotiate()
            plant(qemu.shutdown_file)
            qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
            daemon.wait_for_verdict(qemu.name)


def speak_nonsense(daemon: Daemon, control_dir: Path) -> None:
    """Send what no QEMU sends."""
    for number, line in enumerate(HOSTILE_LINES):
        with FakeQemu(control_dir, f"hostile{number}") as qemu:
            qemu.listen()
            qemu.negotiate()
            qemu.send(line)
            qemu.wait_until_read()
        daemon.wait_for_verdict(f"hostile{number}")
    assert daemon.log.count(" WARNING hostile") >= len(HOSTILE_LINES) - 1
    with FakeQemu(control_dir, "sender") as qemu:
        qemu.listen()
        qemu.negotiate()
        qemu.send_descriptor(b"\n", 0)
        daemon.wait_for_log(" WARNING sender: ")
    with FakeQemu(control_dir, "dead") as qemu:
        qemu.bind()
        wait_until(lambda: "dead.kvmd" in status_table(daemon), "it is tried")
        qemu.crash()


def take_the_directory_away(daemon: Daemon, control_dir: Path) -> None:
    """Have a verdict wait for its directory."""
    with FakeQemu(control_dir, "waiting") as qemu:
        qemu.listen()
        qemu.negotiate()
        daemon.wait_until_connected("waiting")
        away = control_dir.rename(control_dir.with_name("away"))
        qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        daemon.wait_for_log(" ERROR waiting: ")
        away.rename(control_dir)
        wait_until(qemu.shutdown_file.exists, "the file")


def err(daemon: Daemon, control_dir: Path) -> None:
    """Have exceptions that nobody expected."""
    for name in ["unlucky", "unlucky too"]:
        with FakeQemu(control_dir, name) as qemu:
            qemu.listen()
            qemu.accept()
            qemu.greet()
            daemon.wait_for_log(f" ERROR {name}: Traceback")
            daemon.wait_for_log(rf" ERROR {name}: \w+Error: [\\(]")


def wait_until_said(log: Path, text: str) -> None:
    wait_until(lambda: text in read_log(log), text)


def take_the_files_away(daemon: Daemon, control_dir: Path) -> None:
    """Put directories in the place of log and journal, and files again."""
    for file in [daemon.log_file, *control_dir.parent.glob("*.state")]:
        old = file.rename(file.with_suffix(".old"))
        file.mkdir()
        if file == daemon.log_file:
            daemon.send_signal(signal.SIGHUP)
            wait_until_said(old, " ERROR cannot reopen the log file ")
        else:
            daemon.wait_for_log(" WARNING the journal ")
        file.rmdir()
        if file == daemon.log_file:
            daemon.wait_for_log(" INFO log file reopened")
        else:
            wait_until(file.exists, "it is written again")


@pytest.mark.parametrize(
    "is_gone", [True, False], ids=["library gone", "library there"]
)
def test_whatever_happens_nothing_is_imported(control_dir: Path, is_gone: bool) -> None:
    installation = Installation(control_dir.parent, FAIL_AT_UNLUCKY_ONES)
    with running(installation, control_dir) as daemon:
        if is_gone:
            installation.remove()
        run_guests(daemon, control_dir)
        plant_shutdown_files(daemon, control_dir)
        speak_nonsense(daemon, control_dir)
        take_the_directory_away(daemon, control_dir)
        err(daemon, control_dir)
        take_the_files_away(daemon, control_dir)
        if is_gone:
            daemon.send_signal(signal.SIGUSR2)
            daemon.wait_for_log(" ERROR not restarting: .* failed with status ")
        status_table(daemon)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait_until_gone() == 0
    assert daemon.log.endswith(" INFO stopped\n")
    assert installation.imported_late == ""


def test_without_the_library_the_last_words_are_said(control_dir: Path) -> None:
    installation = Installation(control_dir.parent, FAIL_IN_THE_LOOP)
    with running(installation, control_dir) as daemon:
        installation.remove()
        daemon.send_signal(signal.SIGHUP)
        assert daemon.wait_until_gone() == 1
    assert " ERROR unexpected error, giving up\n" in daemon.log
    assert daemon.log.endswith(" ERROR ValueError: of the loop\n")
    assert installation.imported_late == ""


#: Function -> what it imports: none of them runs in a daemon at work.
IMPORTS_WHEN_CALLED = {"parse_arguments": {"argparse"}}
#: Codecs that the interpreter has without importing them.
BUILT_IN_CODECS = {"utf-8", "ascii", "latin-1"}


def syntax_trees() -> Iterator[ast.Module]:
    for module in sorted(ROOT.glob("kvmd*.py")):
        yield ast.parse(module.read_text(encoding="utf-8"))


def test_no_function_imports_a_module() -> None:
    found: dict[str, set[str]] = {}
    for tree in syntax_trees():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    names = [alias.name for alias in getattr(node, "names", [])]
                    if isinstance(node, (ast.Import, ast.ImportFrom)):
                        found.setdefault(function.name, set()).update(names)
    assert found == IMPORTS_WHEN_CALLED


def test_no_codec_is_used_that_has_to_be_imported() -> None:
    codecs = set()
    for tree in syntax_trees():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call):
                named = [word.value for word in call.keywords if word.arg == "encoding"]
                if getattr(call.func, "attr", "") in ("encode", "decode"):
                    named += call.args[:1]
                codecs |= {
                    code.value for code in named if isinstance(code, ast.Constant)
                }
    assert codecs <= BUILT_IN_CODECS
