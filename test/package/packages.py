"""The packages that `make check-package` installs, all made of those that are there.

Ours of other versions, with changes; and Ganeti's with and without systemd units.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ganeti"))

from cluster import CHECKOUT, expect, run

OLDER, NEWER = "0.1", "999"

#: Where Ganeti's package has its units, seen from the root.
UNITS = "usr/lib/systemd/system"
UNIT = f"{UNITS}/ganeti-kvmd.service"
DROP_IN = f"{UNITS}/ganeti-kvmd.service.d/50-kvmd.conf"

Change = Callable[[Path], None]


# ---- Ours ----------------------------------------------------------------------------


def our_version() -> str:
    """Return the version of the package that was built."""
    return version_of(our_package())


def our_package() -> Path:
    """Return the newest package that `make deb` left."""
    packages = (CHECKOUT / "dist").glob("ganeti-kvmd_*_all.deb")
    return max(packages, key=lambda package: package.stat().st_mtime)


def variant(version: str, *changes: Change) -> Path:
    """Return a copy of our package of another version, with changes to its files."""
    tree = unpack(our_package(), "variant")
    substitute("(?m)^Version: .*", f"Version: {version}", tree / "DEBIAN/control")
    substitute("(?m)^VERSION = .*", f'VERSION = "{version}"', *modules(tree))
    for change in changes:
        change(tree)
    # What is changed here need not agree with the sums from the build.
    (tree / "DEBIAN/md5sums").unlink()
    return pack(tree)


def modules(tree: Path) -> list[Path]:
    return list((tree / "usr/share/ganeti-kvmd").glob("*.py"))


def fails_in(script: str, action: str) -> Change:
    """Return a change: a maintainer script does its work, then fails."""

    def change(tree: Path) -> None:
        with (tree / "DEBIAN" / script).open("a") as file:
            file.write(f'\n[ "$1" != {action} ]\n')

    return change


def fails_to_unpack(tree: Path) -> None:
    """Have the package bring a file that is another package's."""
    program = tree / "usr/bin/dpkg-divert"
    program.parent.mkdir()
    program.touch()


def does_not_run(tree: Path) -> None:
    """Break the program."""
    (tree / "usr/share/ganeti-kvmd/kvmd.py").write_text("import nothing_of_this_name\n")


def dies_of_sigusr2(tree: Path) -> None:
    """Have the daemon not know how to restart in place."""
    substitute("SIGUSR2", "SIGWINCH", *modules(tree))


def first_version(directory: str) -> Path:
    """Return what stands for version 1.0.0, which brought a unit, below / or /usr."""

    def brings_a_unit(tree: Path) -> None:
        shutil.rmtree(tree / UNITS)
        unit = tree / directory / "systemd/system/ganeti-kvmd.service"
        unit.parent.mkdir(parents=True)
        unit.write_text(
            "[Service]\nExecStart=/usr/sbin/ganeti-kvmd -f\n"
            "[Install]\nWantedBy=ganeti-node.target ganeti.target\n"
        )
        with (tree / "DEBIAN/postinst").open("a") as file:
            file.write("\ndeb-systemd-helper update-state ganeti-kvmd.service\n")

    return variant("1.0.0", brings_a_unit)


# ---- Ganeti's ------------------------------------------------------------------------


def ganeti_without_units() -> Path:
    """Return this release's package of Ganeti, without units if it brings any."""
    package = ganetis_package()
    tree = unpack(package, "ganeti")
    if not (tree / UNITS).exists():
        return package
    shutil.rmtree(tree / UNITS)
    substitute(f"(?m)^.* {UNITS}/.*\n", "", tree / "DEBIAN/md5sums")
    substitute("(?m)^(Version: .*)", r"\1~without.units", tree / "DEBIAN/control")
    return pack(tree)


def ganeti_with_units() -> Path:
    """Return this release's package of Ganeti, with the units of Debian's newest."""
    package = ganetis_package()
    tree = unpack(package, "ganeti")
    if (tree / UNITS).exists():
        return package
    newest = newest_ganeti()
    shutil.copytree(unpack(newest, "newest") / UNITS, tree / UNITS)
    with (tree / "DEBIAN/md5sums").open("a") as sums:
        for unit in (tree / UNITS).iterdir():
            # MD5 is what dpkg has, against mishaps.
            digest = hashlib.md5(unit.read_bytes()).hexdigest()  # noqa: S324
            sums.write(f"{digest}  {unit.relative_to(tree)}\n")
    substitute(
        "(?m)^Version: .*", f"Version: {version_of(newest)}", tree / "DEBIAN/control"
    )
    return pack(tree)


def ganetis_unit() -> str:
    """Return Ganeti's own unit of the daemon."""
    return (unpack(newest_ganeti(), "newest") / UNIT).read_text()


def ganetis_package() -> Path:
    """Return the package of this release's Ganeti that has its programs' links."""
    (package,) = Path("/packages").glob("ganeti_*.deb")
    return package


def newest_ganeti() -> Path:
    """Return the package of Debian's newest Ganeti, which brings units."""
    (package,) = (CHECKOUT / "dist/with-units").glob("ganeti_*.deb")
    return package


# ---- Any -----------------------------------------------------------------------------


def version_of(package: Path) -> str:
    return run("dpkg-deb", "--field", str(package), "Version").strip()


def unpack(package: Path, name: str) -> Path:
    """Unpack a package anew into a tree of this name; return where that is."""
    tree = Path("/tmp") / name
    shutil.rmtree(tree, ignore_errors=True)
    run("dpkg-deb", "--raw-extract", str(package), str(tree))
    return tree


def pack(tree: Path) -> Path:
    """Make a package of a tree."""
    package = tree.with_suffix(".deb")
    run("dpkg-deb", "-Znone", "--build", str(tree), str(package))
    return package


def substitute(pattern: str, replacement: str, *paths: Path) -> None:
    """Replace what matches in any of some files; something has to."""
    found = 0
    for path in paths:
        text, times = re.subn(pattern, replacement, path.read_text())
        path.write_text(text)
        found += times
    expect(f"{pattern} in {paths}, found", found > 0, True)
