"""ganeti-kvmd.service, as systemd and the daemon's log tell of it."""

from __future__ import annotations

import re
from pathlib import Path

from cluster import LOG_FILE, run
from deadline import wait_until

UNIT = "ganeti-kvmd.service"


def systemctl(verb: str) -> None:
    """Have systemd do something with the unit; it has to work."""
    run("systemctl", verb, UNIT)


def show(name: str) -> str:
    """Return a property of the unit."""
    return run("systemctl", "show", "--value", "--property", name, UNIT).rstrip("\n")


def state() -> str:
    """Return how the unit is, as `systemctl status` has it: `active (running)`."""
    return f"{show('ActiveState')} ({show('SubState')})"


def main_pid() -> int:
    """Return the pid of the daemon, or 0 if there is none."""
    return int(show("MainPID"))


def is_replaced(pid: int) -> bool:
    """Tell whether another process than this one is the daemon, and is ready."""
    return main_pid() not in {0, pid} and show("ActiveState") == "active"


def has_watch(pid: int) -> bool:
    """Tell whether a process watches a directory."""
    files = Path(f"/proc/{pid}/fdinfo").iterdir()
    return any("inotify wd:" in path.read_text() for path in files)


def watched() -> int:
    """Return how many instances the daemon says that it watches; -1 if it doesn't."""
    found = re.fullmatch(r"instances watched: (\d+)", show("StatusText"))
    return int(found[1]) if found else -1


def wait_until_watched(instances: int) -> None:
    """Wait until the daemon says that it watches so many instances."""
    wait_until(
        lambda: watched() == instances,
        f"status {show('StatusText')!r} tells of {instances} instances",
    )


def log() -> str:
    """Return what the daemon has logged, to a file that was moved away as well."""
    files = LOG_FILE.parent.glob(f"{LOG_FILE.name}*")
    return "".join(path.read_text() for path in sorted(files, reverse=True))


def starts() -> int:
    """Return how often a program of ours has become ready."""
    return log().count(" INFO started ")


def journal() -> str:
    """Return what systemd has to say of the unit, with what the daemon printed."""
    return run("journalctl", "--quiet", "--output=cat", "--unit", UNIT)
