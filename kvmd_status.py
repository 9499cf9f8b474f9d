"""`--status`: how each instance stands, told from the journal alone.

`--status=json` prints one JSON object on one line. Its form is stable: members are
added, but none is changed or taken away without another `schema`. Times are seconds
since the epoch; what is not known is null.

    schema       1
    running      whether a daemon runs; null if this user may not see
    pid          its pid
    current      whether the rest is that daemon's; if not, it is of an earlier one, and
                 as old as `written`
    version      of the daemon that wrote the rest
    started      when that one started
    written      when it wrote last
    control_dir  the directory of the monitor sockets
    problem      why the journal, or a part of it, could not be read
    instances    a list of objects, by name:
      instance             the name
      state                running, paused, panicked, shut down by user, ended, gone,
                           connecting, no answer, dead socket, unknown
      connected            whether the daemon hears of this instance's end
      since                since when it does, or does not
      socket               the path of the monitor socket
      qemu                 QEMU's version
      pid                  QEMU's pid
      powerdown_requested  whether somebody has pressed the power button
      powerdown_time       when, the last time
      last_verdict         an object, null if there was none:
        verdict  user, not-user, withdrawn, running
        cause    as in the log
        event    QEMU's time stamp
        time     when it was carried out
        file     what became of the shutdown file: null if it can't be written yet
"""

from __future__ import annotations

import json
import os
import time

from kvmd_journal import read_journal
from kvmd_log import printable, write_to_stdout
from kvmd_options import Options
from kvmd_process import lock_holder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SCHEMA = 1
#: Phase of a monitor -> state of an instance of which no more is to be heard.
STATES = {
    "connecting": "connecting",
    "waiting for a file descriptor": "connecting",
    "awaiting greeting": "connecting",
    "not greeted": "no answer",
    "dead": "dead socket",
    "ended": "ended",
    "gone": "gone",
}
SHUT_DOWN = "shut down by user"
VERDICT = ("verdict", "cause", "event", "time", "file")
#: The year 10000, in seconds since the epoch: later than any time stamp.
END_OF_TIME = 253402300800
HEADER = ["INSTANCE", "STATE", "QEMU", "PID", "SINCE", "POWER BUTTON", "LAST VERDICT"]


def status(options: Options) -> int:
    """Print how daemon and instances stand; return 0 if a daemon runs, else 1."""
    report = make_report(options.pid_file, options.state_file)
    if options.status == "json":
        write_to_stdout(json.dumps(report))
    else:
        write_to_stdout("\n".join(describe(report)))
    return 0 if report["running"] else 1


def make_report(pid_file: str, state_file: str) -> dict[str, Any]:
    """Return what there is to be told, as the module has it."""
    report: dict[str, Any] = {"schema": SCHEMA, "running": None, "pid": None}
    report.update(current=False, version=None, started=None, written=None)
    report.update(control_dir=None, problem=None, instances=[])
    try:
        report["pid"] = lock_holder(pid_file)
        report["running"] = report["pid"] is not None
        written = os.stat(state_file).st_mtime
        header, records, problem = read_journal(state_file)
    except OSError as error:
        report["problem"] = f"{error.filename}: {error.strerror}"
        return report
    except ValueError as error:
        report["problem"] = f"{state_file}: {error}"
        return report
    boot = time.time() - time.monotonic()
    control_dir = header.get("control_dir")
    report.update(
        current=report["running"] and header.get("pid") == report["pid"],
        version=header.get("version"),
        started=moment(header.get("started"), boot),
        written=written,
        control_dir=control_dir,
        problem=problem and f"{state_file}: {problem}",
        instances=[
            make_entry(record, control_dir, boot)
            for _, record in sorted(records.items())
        ],
    )
    return report


def make_entry(record: dict[str, Any], control_dir: str, boot: float) -> dict[str, Any]:
    """Return what there is to be told of an instance.

    The clock of its record had 0 at that time. Members that are missing or make no
    sense cost no more than what they would have told.
    """
    guest = member(record, "guest", dict)
    last = member(record, "last", dict)
    suffix = record.get("suffix")
    is_pressed = guest.get("powerdown_requested") is True
    return {
        "instance": record["instance"],
        "state": state_of(record.get("phase"), guest, last),
        "connected": record.get("phase") == "connected",
        "since": moment(record.get("since"), boot),
        "socket": suffix and f"{control_dir}/{record['instance']}{suffix}",
        "qemu": record.get("qemu"),
        "pid": record.get("pid"),
        "powerdown_requested": is_pressed,
        "powerdown_time": moment(guest.get("powerdown_time")) if is_pressed else None,
        "last_verdict": {name: last.get(name) for name in VERDICT} if last else None,
    }


def member(record: dict[str, Any], name: str, kind: type) -> Any:
    """Return a member of a record, an empty one where there is none of this kind."""
    value = record.get(name)
    return value if isinstance(value, kind) else kind()


def state_of(phase: object, guest: dict[str, Any], last: dict[str, Any]) -> str:
    """Return in what state an instance is, in one or a few plain words."""
    ruling = member(guest, "ruling", list)
    if phase == "gone":
        ruling = [last.get("verdict")]
    if ruling[:1] == ["user"] and phase in {"connected", "ended", "gone"}:
        return SHUT_DOWN
    if phase != "connected":
        return STATES.get(phase, "unknown") if isinstance(phase, str) else "unknown"
    if ruling:
        return "ended"
    if guest.get("panicked") is True:
        return "panicked"
    return "paused" if guest.get("stopped") is True else "running"


def moment(value: object, since: float = 0.0) -> float | None:
    """Return a time in seconds since the epoch, None for what is none."""
    if isinstance(value, (int, float)) and 0 <= value < END_OF_TIME:
        return round(value + since, 3)
    return None


def describe(report: dict[str, Any]) -> list[str]:
    """Return the lines for a terminal: the daemon, then a table of the instances."""
    lines = [printable(describe_daemon(report))]
    if report["problem"]:
        lines.append(printable(report["problem"]))
    if report["instances"]:
        lines += ["", *make_table([HEADER, *map(make_row, report["instances"])])]
    return lines


def describe_daemon(report: dict[str, Any]) -> str:
    """Return the line about the daemon."""
    if report["running"] is None:
        return "whether a daemon runs can't be told; run this as root"
    if report["current"]:
        uptime = int(time.time() - (report["started"] or time.time()))
        return (
            f"kvmd {report['version']} runs, pid {report['pid']}, up"
            f" {uptime // 86400} days {uptime // 3600 % 24}:{uptime // 60 % 60:02},"
            f" instances: {len(report['instances'])}"
        )
    line = "no daemon runs"
    if report["running"]:
        line = f"a daemon runs, pid {report['pid']}, that keeps no journal here"
    if report["written"] is None:
        return line
    return (
        f"{line}; this is how kvmd {report['version']} left it,"
        f" {describe_time(report['written'])}"
    )


def make_row(entry: dict[str, Any]) -> list[str]:
    """Return the cells of an instance's row."""
    button = "-"
    if entry["powerdown_requested"]:
        button = describe_time(entry["powerdown_time"] or "pressed")
    verdict = "-"
    last = entry["last_verdict"]
    if last:
        verdict = f"{last['verdict']}, {last['cause']}, {describe_time(last['time'])}"
        if last["file"] is None:
            verdict += ", shutdown file not written yet"
    cells = [entry["instance"], entry["state"], entry["qemu"], entry["pid"]]
    cells += [describe_time(entry["since"]), button, verdict]
    return [printable("-" if cell is None else str(cell)) for cell in cells]


def describe_time(value: object) -> str:
    """Return a time as a reader on this node's clock has it; anything else as it is."""
    seconds = moment(value)
    if seconds is None:
        return "-" if value is None else str(value)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def make_table(rows: list[list[str]]) -> list[str]:
    """Return lines in which the columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
