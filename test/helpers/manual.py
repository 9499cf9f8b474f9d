"""The man page as its readers see it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from daemon import ROOT

PAGE = ROOT / "man" / "ganeti-kvmd.8"

# Columns in which every log message stands on one line; mandoc takes no 1001.
WIDTH = 999


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


def rendered_page() -> str:
    """Return the page as it is read, in very long lines."""
    need("mandoc")
    text = run("mandoc", "-T", "ascii", "-O", f"width={WIDTH}", str(PAGE)).stdout
    return re.sub(".\b", "", text)  # bold is typed twice, underlined under a bar


def section(page: str, heading: str) -> str:
    """Return the text of a section, or of a subsection."""
    found = re.search(rf"^ *{re.escape(heading)}\n(.*?)^ {{0,3}}\S", page, re.M | re.S)
    assert found, heading
    return found[1]
