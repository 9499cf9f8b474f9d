"""The man page, held against the program."""

from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from daemon import ROOT, Daemon
from manual import PAGE, need, rendered_page, run, section
from messages import Message, messages_and_findings, syntax_trees

import kvmd_context
import kvmd_journal
import kvmd_monitor
import kvmd_options
import kvmd_qmp
import kvmd_shutdown_file
import kvmd_status
import kvmd_verdict
import kvmd_version

PROGRAM = ROOT / "kvmd.py"

# The causes that are no reason of QEMU's, and the data of the SHUTDOWN behind them.
DATA_WITHOUT_REASON: dict[str, object] = {
    "guest": {"guest": True},
    "not-guest": {"guest": False},
    "no-data": None,
    "malformed": [],
}

# Level -> the heading below which the page has its messages.
HEADINGS = {
    "INFO": "INFO: nothing has to be done",
    "WARNING": "WARNING: detection goes on, but not as it should",
    "ERROR": "ERROR: somebody has to look",
    "stderr": "On standard error",
}

# Where the paths on the page may lie.
GANETI_PATHS = re.compile(r"/(var/(run|log|lib)|etc/default|usr/s?(bin|lib))/ganeti\b")
SHELL = "/bin/sh"


def run_program(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return run(sys.executable, str(PROGRAM), *options)


@pytest.fixture(scope="module")
def page() -> str:
    """Return the page as it is read."""
    return rendered_page()


@pytest.fixture(scope="module")
def strings() -> set[str]:
    """Return the constant strings in the program's source."""
    return {
        node.value
        for tree in syntax_trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


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
        names = names.replace("[=", " [").replace("=", " ")
        options[names] = default and default[1].rstrip(".")
    return options


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
    page: str, strings: set[str]
) -> None:
    variables = {text for text in strings if re.fullmatch("[A-Z]+_[A-Z]+", text)}
    variables -= {*kvmd_verdict.EFFECTS, *kvmd_verdict.IGNORED}
    assert tags(section(page, "ENVIRONMENT"), "[A-Z_]+") == variables


def test_every_file_is_on_the_page(page: str, strings: set[str]) -> None:
    paths = vars(kvmd_options.Options()).values()
    files = {path for path in paths if str(path).startswith("/")}
    files |= {text for text in strings if re.fullmatch("ssconf_[a-z_]+", text)}
    files |= {f"instance{suffix}" for suffix in (".kvmd", ".qmp", ".shutdown")}
    described = section(page, "FILES")
    assert [file for file in files if file not in described] == []


def test_every_member_of_the_journal_is_on_the_page(
    page: str, monitor: kvmd_monitor.Monitor, context: kvmd_context.MonitorContext
) -> None:
    header = kvmd_journal.read_journal(context.journal.path).header
    members = {*header, *monitor.record(), "peeked", "last", "removed"}
    members |= {*kvmd_verdict.TYPES, *kvmd_qmp.INITIAL}
    members |= {*kvmd_shutdown_file.LastVerdict._fields}
    table = re.findall(r"^ {7} *(\w+)  ", section(page, "The journal"), re.M)
    assert set(table) - {"Member"} == members


def test_every_message_is_on_the_page_below_its_level(page: str) -> None:
    messages, findings = messages_and_findings()
    assert Message("INFO", "stopped") in messages
    assert len(findings) > len({finding.level for finding in findings}) == 3
    lines = {level: section(page, heading) for level, heading in HEADINGS.items()}
    missing = [
        message
        for message in messages
        if not re.search(rf"^ {{7}}{message.pattern}$", lines[message.level], re.M)
    ]
    missing += [
        finding
        for finding in findings
        if not re.search(finding.pattern, lines[finding.level])
    ]
    assert missing == []


def test_every_message_on_the_page_is_one_of_the_program(page: str) -> None:
    messages, findings = messages_and_findings()
    said = {*messages, *findings}
    for level, heading in HEADINGS.items():
        for line in re.findall(r"^ {7}(\S.*)", section(page, heading), re.M):
            assert any(
                re.search(f"{message.pattern}$", line)
                for message in said
                if message.level == level
            ), line


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
    causes = {ruling.cause: ruling.verdict.value for ruling in rulings if ruling}
    assert table == {**causes, "unobserved": "not-user"}


def rows_of(text: str, heading: str) -> dict[str, list[set[str]]]:
    """Return a table: first cell of each row -> the words of each other cell."""
    table = re.split(rf"^ {{7}}{heading} .*\n", text, flags=re.M)[1].split("\n\n")[0]
    rows = [re.split("  +", line.strip()) for line in table.splitlines()]
    return {row[0]: [set(cell.split(", ")) for cell in row[1:]] for row in rows}


def test_tables_of_objections_are_what_the_verdict_does(page: str) -> None:
    judged = section(page, "What speaks against the user")
    objections = {name: name.replace("_", "-") for name in objections_after()}
    assert rows_of(judged, "Objection") == {
        objections[name]: [
            {event for event in kvmd_verdict.EFFECTS if objections_after(event)[name]},
            {event for event in kvmd_verdict.EFFECTS if is_cleared(name, event)}
            | ({"one hour"} if is_cleared_by_time(name) else set()),
        ]
        for name in objections
    }
    assert rows_of(judged, "Cause") == {
        cause: [{objections[name] for name in names}]
        for cause, names in kvmd_verdict.OBJECTIONS.items()
    }


def objections_after(*events: str) -> dict[str, bool]:
    """Return which objections there are to a guest of which these events were told."""
    guest = kvmd_verdict.Guest()
    for event in events:
        guest.on_event(event, None, 1000.0)
    return {name: getattr(guest, name) for name in kvmd_verdict.OBJECTIONS["no-data"]}


def is_cleared(name: str, event: str) -> bool:
    """Tell whether an event clears an objection, whatever has raised it."""
    raising = [one for one in kvmd_verdict.EFFECTS if objections_after(one)[name]]
    return not any(objections_after(one, event)[name] for one in raising)


def is_cleared_by_time(name: str) -> bool:
    """Tell whether an objection that is an hour old counts no more."""
    rulings = []
    for event in kvmd_verdict.EFFECTS:
        if objections_after(event)[name]:
            guest = kvmd_verdict.Guest()
            guest.on_event(event, None, 1000.0)
            rulings.append(guest.on_event("SHUTDOWN", None, 1000.0 + 3600.1))
    return all(ruling and ruling.verdict.value == "user" for ruling in rulings)


def test_every_word_of_a_verdict_line_is_explained(page: str) -> None:
    tree = syntax_trees()["kvmd_shutdown_file"]
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    outcomes = {str(one.value) for one in returned if isinstance(one, ast.Constant)}
    outcomes.discard("None")
    outcomes.add(kvmd_shutdown_file.SUPERSEDED)
    assert "created" in outcomes
    explained = section(page, "Verdicts")
    for word in outcomes | {verdict.value for verdict in kvmd_verdict.Verdict}:
        assert re.search(rf"^ {{14}}(\w+, )?{word}\b", explained, re.M), word
    ruling = kvmd_verdict.Ruling(kvmd_verdict.Verdict.USER, "CAUSE")
    assert f"INSTANCE: {ruling} event=".replace("user", "VERDICT") in explained


def test_every_phase_in_the_status_is_explained(page: str) -> None:
    explained = section(page, HEADINGS["INFO"]).split("status: version")[-1]
    assert [phase for phase in kvmd_context.Phase if phase.value not in explained] == []


def test_page_names_the_version_and_a_date() -> None:
    program = f"kvmd {kvmd_version.VERSION}"
    title = rf'^\.TH GANETI\\-KVMD 8 \d{{4}}-\d\d-\d\d "{program}" "Ganeti"$'
    assert re.search(title, PAGE.read_text(encoding="ascii"), re.M)


def test_page_names_no_path_of_a_machine(page: str) -> None:
    paths = set(re.findall(r"(?<![\w$.])/[\w.-]+/[\w./-]*", page))
    assert len(paths) > 5
    assert {path for path in paths if not GANETI_PATHS.match(path)} == {SHELL}


def test_mandoc_finds_nothing() -> None:
    need("mandoc")
    assert run("mandoc", "-T", "lint", "-W", "style", str(PAGE)).stdout == ""


def test_man_warns_of_nothing() -> None:
    need("man")
    result = run(*("man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"), str(PAGE))
    assert (result.returncode, result.stderr) == (0, "")
