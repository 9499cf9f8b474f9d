"""`make check-package`: the package beside Ganeti's own, in every order.

Run by `test/ganeti/throwaway`, in a copy of the machine that has Ganeti. A scenario is
a function; its name says what must hold. Each one starts on a node that has Ganeti
alone, with Ganeti's own daemon running; at its end our package is purged, and all
has to be as Ganeti's packages made it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ganeti"))

from cluster import (
    CHECKOUT,
    LOG_FILE,
    PID_FILE,
    daemon_pid,
    daemon_util,
    expect,
    kill_daemon,
    run,
    wait_until,
    which_daemon,
)

NODE = "node1.example.org"
PROGRAM = Path("/usr/sbin/ganeti-kvmd")
GANETIS_PROGRAM = Path("/usr/sbin/ganeti-kvmd.haskell")
MAN_PAGE = Path("/usr/share/man/man8/ganeti-kvmd.8.gz")
GANETIS_MAN_PAGE = Path("/usr/share/man/man8/ganeti-kvmd.haskell.8.gz")
POLICY = Path("/usr/sbin/policy-rc.d")

#: The directories in which our package, Ganeti's and dpkg leave what is theirs.
DIRECTORIES = (
    *("/etc/systemd/system", "/lib/systemd/system", "/usr/sbin", "/usr/share"),
    *("/usr/share/doc", "/usr/share/lintian/overrides", "/usr/share/man/man8"),
    *("/usr/share/python3/runtime.d", "/var/lib", "/var/lib/systemd"),
    "/var/lib/systemd/deb-systemd-helper-enabled",
)

OLDER, NEWER = "0.1", "999"


# ---- The node ------------------------------------------------------------------------


def set_up_node() -> None:
    """Make this machine look like a node of a cluster with user shutdown enabled."""
    # The index of man pages takes longer than all else that dpkg does.
    Path("/var/lib/man-db/auto-update").unlink(missing_ok=True)
    Path("/etc/hosts").write_text(f"127.0.0.1 {NODE} node1 localhost\n")
    run("hostname", "node1")
    for name, text in [
        ("hypervisor_list", "kvm\n"),
        ("enabled_user_shutdown", "True\n"),
        ("node_vm_capable", f"{NODE}=True\n"),
    ]:
        Path(f"/var/lib/ganeti/ssconf_{name}").write_text(text)


def traces() -> dict[str, object]:
    """Return what shows that our package is there, or has been."""
    paths = [
        path for place in DIRECTORIES for path in Path(place).glob("*ganeti-kvmd*")
    ]
    return {
        "files": sorted(map(str, paths)),
        "links": [path.readlink() for path in sorted(paths) if path.is_symlink()],
        "diversions": run("dpkg-divert", "--list", "*ganeti-kvmd*"),
        "files of Ganeti that were changed": run("dpkg", "--verify", "ganeti"),
    }


def expect_ours_in_place() -> None:
    """Fail unless our files are there, and Ganeti's, if at all, are put aside."""
    expect("our program is a link", PROGRAM.is_symlink(), False)
    expect("our man page is a link", MAN_PAGE.is_symlink(), False)
    run(str(PROGRAM), "--version")
    expect("changed files", run("dpkg", "--verify", "ganeti-kvmd"), "")
    if Path("/usr/lib/ganeti/daemon-util").exists():
        run(str(GANETIS_PROGRAM), "--version")
        expect("Ganeti's man page", GANETIS_MAN_PAGE.resolve().is_file(), True)


def expect_ganetis_in_place() -> None:
    """Fail unless all is where Ganeti's package has put it."""
    expect("diversions", run("dpkg-divert", "--list", "*ganeti-kvmd*"), "")
    expect("changed files", run("dpkg", "--verify", "ganeti"), "")
    expect("program", "(ganeti)" in run(str(PROGRAM), "--version"), True)
    expect("man page", MAN_PAGE.resolve().is_file(), True)


def expect_one_daemon(which: str) -> None:
    """Fail unless this daemon runs, and no other one."""
    expect("daemon", which_daemon(), which)
    wanted = 0 if which == "none" else 1
    # Who started it may have ended just now, and not be reaped yet.
    wait_until(f"{wanted} daemons run", lambda: daemons_that_run() == wanted)


def daemons_that_run() -> int:
    return int(run("sh", "-c", "pgrep --count --exact ganeti-kvmd || :"))


def expect_version(version: str) -> None:
    """Fail unless this is the version of ours that starts last: it may be about to."""

    def started() -> str:
        return re.findall(r" INFO started kvmd (\S+) for ", LOG_FILE.read_text())[-1]

    wait_until(f"version {version} runs", lambda: started() == version)


@contextlib.contextmanager
def nothing_disturbed() -> Iterator[None]:
    """Fail unless the process of the daemon is the same before and after."""
    pid = daemon_pid()
    yield
    expect("process", daemon_pid(), pid)


@contextlib.contextmanager
def policy_against_restarts() -> Iterator[None]:
    """Have policy-rc.d forbid to start and stop services."""
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


# ---- The packages --------------------------------------------------------------------


def our_version() -> str:
    """Return the version of the package that was built."""
    return run("dpkg-deb", "--field", str(our_package()), "Version").strip()


def our_package() -> Path:
    """Return the newest package that `make deb` left."""
    packages = (CHECKOUT / "dist").glob("ganeti-kvmd_*_all.deb")
    return max(packages, key=lambda package: package.stat().st_mtime)


def variant(version: str, *changes: Callable[[Path], None]) -> Path:
    """Return a copy of our package of another version, with changes to its files."""
    tree, package = Path("/tmp/variant"), Path("/tmp/variant.deb")
    shutil.rmtree(tree, ignore_errors=True)
    run("dpkg-deb", "--raw-extract", str(our_package()), str(tree))
    substitute(tree / "DEBIAN/control", "(?m)^Version: .*", f"Version: {version}")
    module = tree / "usr/share/ganeti-kvmd/kvmd.py"
    substitute(module, "(?m)^VERSION = .*", f'VERSION = "{version}"')
    for change in changes:
        change(tree)
    # What is changed here need not agree with the sums from the build.
    (tree / "DEBIAN/md5sums").unlink()
    run("dpkg-deb", "-Znone", "--build", str(tree), str(package))
    return package


def substitute(path: Path, pattern: str, replacement: str) -> None:
    """Replace what matches in a file; something has to."""
    text, times = re.subn(pattern, replacement, path.read_text())
    expect(f"{pattern} in {path}, found", times > 0, True)
    path.write_text(text)


def fails_in(script: str, action: str) -> Callable[[Path], None]:
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
    substitute(tree / "usr/share/ganeti-kvmd/kvmd.py", "SIGUSR2", "SIGWINCH")


def install(package: Path) -> None:
    """Install or upgrade."""
    run("dpkg", "--install", str(package))


def fail_to(action: str, *arguments: str) -> None:
    """Have dpkg do what has to fail."""
    command = ["dpkg", f"--{action}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    expect(f"{' '.join(command)} fails", done.returncode, 1)


def remove() -> None:
    """Remove our package."""
    run("dpkg", "--remove", "ganeti-kvmd")


def purge() -> None:
    """Purge our package."""
    run("dpkg", "--purge", "ganeti-kvmd")


# ---- Installing, upgrading, removing -------------------------------------------------


def installing_takes_over_and_removing_gives_back() -> None:
    install(our_package())
    expect_ours_in_place()
    expect_one_daemon("ours")
    remove()
    expect_ganetis_in_place()
    expect_one_daemon("Ganeti's")


def nothing_is_started_where_nothing_ran() -> None:
    daemon_util("stop")
    install(our_package())
    expect_one_daemon("none")
    install(variant(NEWER))
    expect_one_daemon("none")
    remove()
    expect_one_daemon("none")


def a_daemon_that_was_killed_is_not_started_but_can_be() -> None:
    kill_daemon()
    expect("pid file of the dead", PID_FILE.exists(), True)
    install(our_package())
    expect_one_daemon("none")
    # Ganeti's daemon has left a pid file that start-stop-daemon would not start on.
    daemon_util("start")
    expect_one_daemon("ours")


def upgrading_restarts_in_place() -> None:
    install(our_package())
    with nothing_disturbed():
        install(variant(NEWER))
    expect_ours_in_place()
    expect_one_daemon("ours")
    expect_version(NEWER)


def upgrading_replaces_a_daemon_that_can_not_restart_in_place() -> None:
    install(variant(OLDER, dies_of_sigusr2))
    install(our_package())
    expect_one_daemon("ours")
    expect_version(our_version())


def downgrading_restarts_in_place() -> None:
    install(variant(NEWER))
    with nothing_disturbed():
        install(our_package())
    expect_one_daemon("ours")
    expect_version(our_version())


def installing_again_changes_nothing() -> None:
    install(our_package())
    with nothing_disturbed():
        install(our_package())
    expect_ours_in_place()


def installing_after_removal_takes_over_again() -> None:
    install(our_package())
    remove()
    expect_one_daemon("Ganeti's")
    install(our_package())
    expect_ours_in_place()
    expect_one_daemon("ours")


def purging_without_removing_gives_back() -> None:
    install(our_package())
    purge()
    expect_one_daemon("Ganeti's")


# ---- Beside Ganeti's packages --------------------------------------------------------


def ours_may_come_before_ganeti() -> None:
    daemon_util("stop")
    remove_ganeti("--purge")
    install(our_package())
    expect_ours_in_place()
    install_ganeti()
    expect_ours_in_place()
    daemon_util("start")
    expect_one_daemon("ours")


def ganeti_may_be_installed_anew() -> None:
    install(our_package())
    with nothing_disturbed():
        install_ganeti()
    expect_ours_in_place()


def ganeti_may_go_and_come_back() -> None:
    install(our_package())
    daemon_util("stop")
    remove_ganeti("--remove")
    expect("Ganeti's program", GANETIS_PROGRAM.is_symlink(), False)
    install_ganeti()
    expect_ours_in_place()
    daemon_util("start")
    expect_one_daemon("ours")


def removing_without_ganeti_stops_ours() -> None:
    install(our_package())
    remove_ganeti("--remove")
    expect_one_daemon("ours")
    remove()
    expect_one_daemon("none")
    expect("program", PROGRAM.is_symlink() or PROGRAM.exists(), False)
    install_ganeti()


def upgrading_without_ganeti_restarts_in_place() -> None:
    install(our_package())
    remove_ganeti("--remove")
    with nothing_disturbed():
        install(variant(NEWER))
    expect_version(NEWER)
    install_ganeti()


def remove_ganeti(how: str) -> None:
    """Remove or purge the package that has Ganeti's links, leaving the daemon alone."""
    with policy_against_restarts():
        run("dpkg", how, "ganeti")


def install_ganeti() -> None:
    """Install that package again, starting nothing."""
    with policy_against_restarts():
        run("dpkg", "--install", *map(str, Path("/packages").glob("ganeti_*.deb")))


# ---- Aborted half way ----------------------------------------------------------------


def failing_to_unpack_disturbs_nothing() -> None:
    before = traces()
    with nothing_disturbed():
        fail_to("install", str(variant(NEWER, fails_to_unpack)))
    expect("left by the failure", traces(), before)


def failing_in_preinst_disturbs_nothing() -> None:
    before = traces()
    with nothing_disturbed():
        fail_to("install", str(variant(NEWER, fails_in("preinst", "install"))))
    expect("left by the failure", traces(), before)


def failing_to_unpack_after_removal_disturbs_nothing() -> None:
    install(our_package())
    remove()
    before = traces()
    with nothing_disturbed():
        fail_to("install", str(variant(NEWER, fails_to_unpack)))
    expect("left by the failure", traces(), before)


def failing_to_unpack_an_upgrade_keeps_the_old_one() -> None:
    install(our_package())
    for failure in (fails_to_unpack, fails_in("preinst", "upgrade")):
        with nothing_disturbed():
            fail_to("install", str(variant(NEWER, failure)))
        expect_ours_in_place()
        expect_version(our_version())


def a_failure_of_the_old_prerm_does_not_stop_an_upgrade() -> None:
    install(variant(OLDER, fails_in("prerm", "upgrade")))
    install(our_package())
    expect_ours_in_place()
    expect_one_daemon("ours")


def failing_in_postinst_is_mended_by_the_next_package() -> None:
    fail_to("install", str(variant(NEWER, fails_in("postinst", "configure"))))
    expect_one_daemon("ours")
    install(variant(NEWER))
    expect_ours_in_place()
    expect_one_daemon("ours")
    expect_version(NEWER)


def failing_to_remove_keeps_ours() -> None:
    install(variant(NEWER, fails_in("prerm", "remove")))
    with nothing_disturbed():
        fail_to("remove", "ganeti-kvmd")
    expect_ours_in_place()
    install(our_package())


def a_program_that_does_not_run_replaces_no_daemon() -> None:
    with nothing_disturbed():
        fail_to("install", str(variant(NEWER, does_not_run)))
    install(our_package())
    expect_one_daemon("ours")
    with nothing_disturbed():
        fail_to("install", str(variant(NEWER, does_not_run)))


# ---- What the administrator has decided ----------------------------------------------


def policy_may_forbid_to_hand_over() -> None:
    with policy_against_restarts(), nothing_disturbed():
        install(our_package())
    expect_one_daemon("Ganeti's")
    daemon_util("stop")
    daemon_util("start")
    expect_one_daemon("ours")
    with policy_against_restarts(), nothing_disturbed():
        remove()
    daemon_util("stop")
    daemon_util("start")
    expect_one_daemon("Ganeti's")


def a_diversion_of_the_administrators_is_left_alone() -> None:
    local = ("--local", "--rename", "--divert", f"{PROGRAM}.local", str(PROGRAM))
    run("dpkg-divert", *local)
    before = traces()
    with nothing_disturbed():
        fail_to("install", str(our_package()))
    expect("left by the failure", traces(), before)
    run("dpkg-divert", "--remove", *local)


SCENARIOS = [
    installing_takes_over_and_removing_gives_back,
    nothing_is_started_where_nothing_ran,
    a_daemon_that_was_killed_is_not_started_but_can_be,
    upgrading_restarts_in_place,
    upgrading_replaces_a_daemon_that_can_not_restart_in_place,
    downgrading_restarts_in_place,
    installing_again_changes_nothing,
    installing_after_removal_takes_over_again,
    purging_without_removing_gives_back,
    ours_may_come_before_ganeti,
    ganeti_may_be_installed_anew,
    ganeti_may_go_and_come_back,
    removing_without_ganeti_stops_ours,
    upgrading_without_ganeti_restarts_in_place,
    failing_to_unpack_disturbs_nothing,
    failing_in_preinst_disturbs_nothing,
    failing_to_unpack_after_removal_disturbs_nothing,
    failing_to_unpack_an_upgrade_keeps_the_old_one,
    a_failure_of_the_old_prerm_does_not_stop_an_upgrade,
    failing_in_postinst_is_mended_by_the_next_package,
    failing_to_remove_keeps_ours,
    a_program_that_does_not_run_replaces_no_daemon,
    policy_may_forbid_to_hand_over,
    a_diversion_of_the_administrators_is_left_alone,
]


def play(scenario: Callable[[], None], untouched: dict[str, object]) -> None:
    """Play a scenario, say that it held. Raises AssertionError if it doesn't."""
    start = time.monotonic()
    PID_FILE.unlink(missing_ok=True)
    daemon_util("start")
    expect_one_daemon("Ganeti's")
    scenario()
    purge()
    expect("left by the package", traces(), untouched)
    daemon_util("stop")
    name = scenario.__name__.replace("_", " ")
    print(f"ok {time.monotonic() - start:5.1f} s  {name}", flush=True)


def main() -> None:
    """Play all scenarios; the first one that fails ends it."""
    start = time.monotonic()
    set_up_node()
    untouched = traces()
    for scenario in SCENARIOS:
        play(scenario, untouched)
    print(f"all {len(SCENARIOS)} hold, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
