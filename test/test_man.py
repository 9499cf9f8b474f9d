"""The man page, held against the program."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import ROOT, Daemon

import kvmd_monitor
import kvmd_status
import kvmd_verdict
import kvmd_version

PAGE = ROOT / "man" / "ganeti-kvmd.8"
PROGRAM = ROOT / "kvmd.py"

# Columns in which every log message stands on one line; mandoc takes no 1001.
WIDTH = 999

# What logs a message, or makes one that is logged; and what names one that will be.
LOGGING = {
    *("info", "warning", "error", "exception", "begin_trouble", "end_trouble"),
    *("_info", "_warn", "_write", "tell", "StartError", "Finding"),
}
MESSAGES = {"problem", "text"}
LEVELS = {"DEBUG", "INFO", "WARNING", "ERROR"}

# The causes that are no reason of QEMU's, and the data of the SHUTDOWN behind them.
DATA_WITHOUT_REASON: dict[str, object] = {
    "guest": {"guest": True},
    "not-guest": {"guest": False},
    "no-data": None,
    "malformed": [],
}

# Where the paths on the page may lie.
GANETI_PATHS = re.compile(r"/(var/(run|log|lib)|etc/default|usr/sbin)/ganeti\b")


def need(tool: str) -> None:
    """Skip the test where the tool is missing, but not where it has to be there."""
    if shutil.which(tool) is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{tool} is not installed")
        pytest.skip(f"{tool} is not installed")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with wide output and nothing of Ganeti's set."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "COLUMNS": "999"}
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, check=False
    )


def run_program(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return run(sys.executable, str(PROGRAM), *options)


@pytest.fixture(scope="module")
def page() -> str:
    """Return the page as it is read, in very long lines."""
    need("mandoc")
    text = run("mandoc", "-T", "ascii", "-O", f"width={WIDTH}", str(PAGE)).stdout
    return re.sub(".\b", "", text)  # bold is typed twice, underlined under a bar


@pytest.fixture(scope="module")
def program() -> ast.Module:
    """Return the program's syntax tree."""
    return ast.parse(PROGRAM.read_text(encoding="utf-8"))


def section(page: str, heading: str) -> str:
    """Return the text of a section, or of a subsection."""
    found = re.search(rf"^ *{re.escape(heading)}\n(.*?)^ {{0,3}}\S", page, re.M | re.S)
    assert found, heading
    return found[1]


def tags(text: str, pattern: str) -> set[str]:
    """Return the tags of a tagged list: what matches where its lines begin."""
    lines = re.findall(rf"^ {{7}}((?:{pattern})(?:, (?:{pattern}))*)", text, re.M)
    return {tag for line in lines for tag in line.split(", ")}


def options_and_defaults(text: str, indent: int) -> dict[str, str | None]:
    """Return the options in a text and their defaults, as in `--name VALUE`."""
    options = {}
    for entry in re.split(rf"^ {{{indent}}}(?=-)", text, flags=re.M)[1:]:
        names = re.split(r"  |\n", entry)[0].strip()
        default = re.search(r"default:\s+([^\s:)]+)", entry, re.IGNORECASE)
        options[names.replace("[=", " [").replace("=", " ")] = default and default[1].rstrip(".")
    return options


def messages(program: ast.Module) -> Iterator[list[str]]:
    """Yield the constant parts of each message that may be logged.

    What `--check` alone prints is left out: each of its lines holds its remedy.
    """
    for function in ast.walk(program):
        if not isinstance(function, ast.FunctionDef) or "check" in function.name:
            continue
        for node in ast.walk(function):
            said: list[ast.expr] = []
            if isinstance(node, ast.Call) and name_of(node.func) in LOGGING:
                said = node.args
            elif isinstance(node, ast.Assign) and name_of(node.targets[0]) in MESSAGES:
                said = [node.value]
            if "OK" not in map(name_of, said):
                yield from filter(None, map(constant_parts, said))


def name_of(node: ast.expr) -> str:
    """Return the last part of a name, empty if it is none."""
    return getattr(node, "attr", getattr(node, "id", ""))


def constant_parts(node: ast.expr) -> list[str]:
    """Return what is constant in a string, around what is put into it."""
    if isinstance(node, ast.Name):
        node = ast.Constant(getattr(kvmd, node.id, None))
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    values = [getattr(part, "value", None) for part in parts]
    return [value for value in values if isinstance(value, str) and value not in LEVELS]


def test_every_option_and_its_default_is_on_the_page(page: str) -> None:
    on_page = options_and_defaults(section(page, "OPTIONS"), indent=7)
    in_help = options_and_defaults(run_program("--help").stdout, indent=2)
    assert on_page == in_help
    assert "-f, --foreground" in on_page


def test_every_member_and_state_of_the_status_is_on_the_page(page: str) -> None:
    report = kvmd_status.make_report("/no/such/file", "/no/such/file")
    entry = kvmd_status.make_entry({"instance": "web1"}, "/ctrl", 0.0)
    states = {*kvmd_status.STATES.values(), kvmd_status.SHUT_DOWN, "unknown"}
    names = {*report, *entry, *kvmd_status.VERDICT, *states}
    names |= {"running", "paused", "panicked"}
    table = re.findall(r"^ {7} *(\w+(?: \w+)*)  ", section(page, "STATUS"), re.M)
    assert set(table) - {"State", "Member"} == names
    documented = re.findall(r"^ {4,8}(\w+)  ", str(kvmd_status.__doc__), re.M)
    assert set(documented) == {*report, *entry, *kvmd_status.VERDICT}


def test_exit_statuses_are_those_on_the_page(page: str) -> None:
    done = run_program("--version")
    failed = run_program("--no-cluster-checks", "--pid-file=/no/such/directory/pid")
    misused = run_program("--no-such-option")
    statuses = [done.returncode, failed.returncode, misused.returncode]
    assert statuses == [0, 1, 2]
    assert tags(section(page, "EXIT STATUS"), r"\d") == set(map(str, statuses))


def test_signals_are_those_that_the_daemon_catches(
    page: str, control_dir: Path
) -> None:
    with Daemon(control_dir, interpreter=[sys.executable]) as daemon:
        status = Path(f"/proc/{daemon.pid}/status").read_text(encoding="ascii")
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    names = {number.name for number in signal.Signals if caught >> (number - 1) & 1}
    assert tags(section(page, "SIGNALS"), r"SIG\w+") == names - {"SIGCHLD", "SIGALRM"}


def test_every_environment_variable_is_on_the_page(
    page: str, program: ast.Module
) -> None:
    constants = {getattr(node, "value", None) for node in ast.walk(program)}
    strings = {constant for constant in constants if isinstance(constant, str)}
    variables = {text for text in strings if re.fullmatch("[A-Z]+_[A-Z]+", text)}
    on_page = tags(section(page, "ENVIRONMENT"), "[A-Z_]+")
    assert on_page == variables - kvmd_verdict.EFFECTS.keys()


def test_every_log_message_is_on_the_page(page: str, program: ast.Module) -> None:
    found = list(messages(program))
    assert ["stopped"] in found
    missing = [
        parts
        for parts in found
        if not re.search(".+".join(map(re.escape, parts)), page)
    ]
    assert missing == []


def test_table_of_causes_is_what_the_verdict_does(page: str) -> None:
    shutdowns = {
        **{name: {"reason": name} for name in kvmd_verdict.NOT_USER_REASONS},
        "guest-shutdown": {"reason": "guest-shutdown"},
        **DATA_WITHOUT_REASON,
    }
    rulings = [
        kvmd_verdict.Guest().on_event("SHUTDOWN", data, None)
        for data in shutdowns.values()
    ]
    crashed = kvmd_verdict.Guest()
    crashed.on_status("running")
    rulings.append(crashed.on_end())
    judged = section(page, "HOW A SHUTDOWN IS JUDGED")
    table = dict(re.findall(r"^ {7}(\S+) +((?:not-)?user)  ", judged, re.M))
    assert table == {
        ruling.cause: ruling.verdict.value for ruling in rulings if ruling
    }


def test_table_of_objections_is_what_the_verdict_does(page: str) -> None:
    judged = section(page, "HOW A SHUTDOWN IS JUDGED")
    rows = re.split(r"^ {7}Objection .*\n", judged, flags=re.M)[1].split("\n\n")[0]
    table = {}
    for row in rows.splitlines():
        objection, causes, _ = re.split("  +", row.strip())
        table[objection] = set(causes.split(", "))
    assert table == {
        name.replace("_", "-"): {
            row for row, objections in kvmd_verdict.OBJECTIONS.items() if name in objections
        }
        for name in kvmd_verdict.OBJECTIONS["no-data"]
    }


def test_every_word_of_a_verdict_line_is_explained(
    page: str, program: ast.Module
) -> None:
    outcomes = {
        part
        for function in ast.walk(program)
        if isinstance(function, ast.FunctionDef)
        and function.name.endswith("_shutdown_file")
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and node.value
        for part in constant_parts(node.value)
    }
    assert "created" in outcomes
    explained = section(page, "Verdicts")
    for word in outcomes | {verdict.value for verdict in kvmd_verdict.Verdict}:
        assert re.search(rf"^ {{14}}(\w+, )?{word}\b", explained, re.M), word
    ruling = kvmd_verdict.Ruling(kvmd_verdict.Verdict.USER, "CAUSE")
    assert f"INSTANCE: {ruling} event=".replace("user", "VERDICT") in explained


def test_every_phase_in_the_status_is_explained(page: str) -> None:
    life = section(page, "The life of the daemon (INFO)")
    explained = life.split("status: version")[1]
    assert [phase for phase in kvmd_monitor.Phase if phase.value not in explained] == []


def test_page_names_the_version_and_a_date() -> None:
    title = rf'^\.TH GANETI\\-KVMD 8 \d{{4}}-\d\d-\d\d "kvmd {kvmd_version.VERSION}" "Ganeti"$'
    assert re.search(title, PAGE.read_text(encoding="ascii"), re.M)


def test_page_names_no_path_of_a_machine(page: str) -> None:
    paths = set(re.findall(r"(?<![\w$.])/[\w.-]+/[\w./-]*", page))
    assert len(paths) > 5
    assert {path for path in paths if not GANETI_PATHS.match(path)} == set()


def test_mandoc_finds_nothing() -> None:
    need("mandoc")
    assert run("mandoc", "-T", "lint", "-W", "style", str(PAGE)).stdout == ""


def test_man_warns_of_nothing() -> None:
    need("man")
    result = run(*("man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"), str(PAGE))
    assert (result.returncode, result.stderr) == (0, "")
