"""The daemon with other constants, so that what takes it minutes takes a test none."""

from __future__ import annotations

from pathlib import Path

from daemon import ROOT

MODULES = sorted(path.stem for path in ROOT.glob("kvmd*.py"))


def program_with(directory: Path, patch: str) -> Path:
    """Write a program into the directory: kvmd.py, patched by Python code; return it.

    The code runs before the daemon starts, and may name all modules.
    """
    program = directory / "variant.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport {', '.join(MODULES)}\n"
        f"{patch}\nsys.exit(kvmd.main())\n"
    )
    return program
