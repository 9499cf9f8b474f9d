"""Record what QEMU says on an instance's `.kvmd` socket, in every scenario.

Usage: python3 test/record.py [SCENARIO ...]

Makes test/data/*.qmp anew, or those named, with the QEMU that is installed: for each
scenario the bytes that a client receives, from the greeting to the end of the
connection.
"""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

from daemon import ROOT, control_directory
from deadline import SECONDS
from qemu import Qemu
from scenarios import MIGRATION, RUNS_ON, SCENARIOS, Scenario, kill

from kvmd_qmp import COMMANDS

DATA = ROOT / "test" / "data"


def recording(scenario: Scenario) -> Path:
    """Return the file that holds what QEMU said in a scenario."""
    return DATA / f"{scenario.name}.qmp"


class Recorder:
    """A client of `.kvmd` that negotiates as the daemon does, and listens."""

    def __init__(self, path: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(SECONDS)
        self._connection.connect(str(path))
        self._connection.sendall(COMMANDS)
        self._lines = self._connection.makefile("rb")
        # Greeting and answers come before the guest is let run.
        self._received = b"".join(self._lines.readline() for _ in range(3))

    def read_to_end(self) -> bytes:
        """Return all that QEMU has said."""
        return self._received + self._lines.read()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._connection.close()


def record(scenarios: list[Scenario]) -> None:
    """Record scenarios whose QEMUs have to run side by side."""
    with ExitStack() as ending:
        control_dir = ending.enter_context(control_directory())
        running = []
        for scenario in scenarios:
            qemu = Qemu(control_dir, scenario.name, *scenario.options)
            ending.enter_context(qemu)
            recorder = Recorder(control_dir / f"{scenario.name}.kvmd")
            ending.enter_context(recorder)
            running.append((scenario, qemu, recorder))
        for scenario, qemu, _ in running:
            scenario.prepare(qemu)
        for scenario, qemu, recorder in running:
            scenario.end(qemu)
            if scenario.expected == RUNS_ON:
                kill(qemu)
            recording(scenario).write_bytes(recorder.read_to_end())


def chosen(names: list[str]) -> list[list[Scenario]]:
    """Return what to record, by name, in groups that run side by side."""
    groups = [*([scenario] for scenario in SCENARIOS), MIGRATION]
    known = {scenario.name for group in groups for scenario in group}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"no such scenario: {', '.join(unknown)}")
    return [
        group
        for group in groups
        if not names or any(scenario.name in names for scenario in group)
    ]


def main() -> None:
    """Record all, or what is named."""
    DATA.mkdir(exist_ok=True)
    for scenarios in chosen(sys.argv[1:]):
        record(scenarios)
        for scenario in scenarios:
            print(recording(scenario).relative_to(ROOT))


if __name__ == "__main__":
    main()
