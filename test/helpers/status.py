"""The status table that the daemon logs on SIGUSR1."""

from __future__ import annotations

import re
import signal

from daemon import Daemon
from deadline import wait_until

_HEADER = r" INFO status: version .* (\d+) instances$"


def status_table(daemon: Daemon) -> dict[str, str]:
    """Return what is said of each monitor socket, by the socket's name."""
    times = len(re.findall(_HEADER, daemon.log, re.MULTILINE))
    daemon.send_signal(signal.SIGUSR1)
    header = daemon.wait_for_log(_HEADER, times + 1)

    def lines() -> list[str] | None:
        found = re.findall(r" INFO status: (.*)", daemon.log[header.end() :])
        return found if len(found) >= int(header[1]) else None

    if header[1] == "0":
        return {}
    table = wait_until(lines, "all lines of the status table")
    return dict(line.rsplit(": ", 1) for line in table)


def wait_for_status(daemon: Daemon, socket_name: str, beginning: str) -> str:
    """Wait until the status of a monitor socket begins so; return it."""

    def status() -> str | None:
        said = status_table(daemon).get(socket_name, "")
        return said if said.startswith(beginning) else None

    return wait_until(status, f"{socket_name} is {beginning}")
