"""What the package is made of, as `make install` leaves it.

The package itself is tried by `make check-package`.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from daemon import ROOT, Daemon

import kvmd_version


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    """Install below a directory of its own; return the launcher."""
    prefix = tmp_path / "prefix"
    command = ["make", "--directory", str(ROOT), "install", f"PREFIX={prefix}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return prefix / "sbin/ganeti-kvmd"


def test_changelog_has_the_version_of_the_program() -> None:
    entry = re.match(r"ganeti-kvmd \((\S+)\) ", (ROOT / "debian/changelog").read_text())

    assert entry
    assert entry[1] == kvmd_version.VERSION


def test_installs_the_program_its_modules_the_man_page_and_the_drop_in(
    launcher: Path,
) -> None:
    prefix = launcher.parents[1]

    installed = {
        str(path.relative_to(prefix)): f"{path.stat().st_mode & 0o777:o}"
        for path in prefix.rglob("*")
        if path.is_file()
    }

    assert installed == {
        "lib/systemd/system/ganeti-kvmd.service.d/50-kvmd.conf": "644",
        "sbin/ganeti-kvmd": "755",
        **{f"share/ganeti-kvmd/{path.name}": "644" for path in ROOT.glob("kvmd*.py")},
        "share/man/man8/ganeti-kvmd.8": "644",
    }


def test_launcher_heeds_nothing_of_its_callers_python(
    launcher: Path, tmp_path: Path
) -> None:
    modules = {path.stem for path in ROOT.glob("kvmd*.py")}
    for module in modules | {"selectors", "json", "sitecustomize", "usercustomize"}:
        (tmp_path / f"{module}.py").write_text("raise SystemExit('of the caller')\n")

    done = subprocess.run(
        [launcher, "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONHOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert kvmd_version.VERSION in done.stdout


def test_launched_daemon_has_the_name_that_ganeti_looks_for(
    launcher: Path, control_dir: Path
) -> None:
    with Daemon(control_dir, program=launcher, interpreter=()) as daemon:
        assert Path(f"/proc/{daemon.pid}/comm").read_text() == "ganeti-kvmd\n"
        daemon.stop()


def test_launched_daemon_leaves_no_bytecode(launcher: Path, control_dir: Path) -> None:
    with Daemon(control_dir, program=launcher, interpreter=()) as daemon:
        daemon.stop()

    assert not list(launcher.parents[1].rglob("*.pyc"))


def test_unit_is_not_rated_where_systemd_rates_no_files(tmp_path: Path) -> None:
    systemd_analyze = tmp_path / "systemd-analyze"
    systemd_analyze.write_text("#!/bin/sh\necho 'systemd 247 (247.3-7+deb11u7)'\n")
    systemd_analyze.chmod(0o755)

    done = subprocess.run(
        [ROOT / "test/package/rate-unit"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "not rated: systemd 247" in done.stdout
