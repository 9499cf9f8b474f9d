"""`make check-package`: the package beside Ganeti's own, in every order.

Run by `test/ganeti/throwaway`, in a copy of the machine that has Ganeti. A scenario is
a function; its name says what must hold. Each one starts on a node that has Ganeti
alone, with Ganeti's own daemon running; at its end our package is purged, and all
has to be as Ganeti's packages made it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ganeti"))

from cluster import (
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
from packages import (
    DROP_IN,
    NEWER,
    OLDER,
    UNIT,
    dies_of_sigusr2,
    does_not_run,
    fails_in,
    fails_to_unpack,
    first_version,
    ganeti_with_units,
    ganeti_without_units,
    ganetis_unit,
    our_package,
    our_version,
    variant,
)

NODE = "node1.example.org"
ROOT = Path("/")
PROGRAM = Path("/usr/sbin/ganeti-kvmd")
GANETIS_PROGRAM = Path("/usr/sbin/ganeti-kvmd.haskell")
MAN_PAGE = Path("/usr/share/man/man8/ganeti-kvmd.8.gz")
GANETIS_MAN_PAGE = Path("/usr/share/man/man8/ganeti-kvmd.haskell.8.gz")
STATE_FILE = PID_FILE.with_suffix(".state")
POLICY = Path("/usr/sbin/policy-rc.d")

#: The directories in which our package, Ganeti's and dpkg leave what is theirs.
DIRECTORIES = (
    *("/etc/systemd/system", "/lib/systemd/system", "/usr/sbin", "/usr/share"),
    *("/usr/share/doc", "/usr/share/lintian/overrides", "/usr/share/man/man8"),
    *("/usr/share/python3/runtime.d", "/var/lib", "/var/lib/systemd"),
    "/var/lib/systemd/deb-systemd-helper-enabled",
)


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
    install_ganeti()


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
    expect("drop-in", (ROOT / DROP_IN).is_file(), True)
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


def expect_ganetis_unit_in_place() -> None:
    """Fail unless the unit is there, as Ganeti's package has it."""
    expect("changed files", run("dpkg", "--verify", "ganeti"), "")
    expect("unit", (ROOT / UNIT).read_text(), ganetis_unit())
    expect("diversions", run("dpkg-divert", "--list", "*ganeti-kvmd.service*"), "")


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

    def last_started() -> list[str]:
        return re.findall(r" INFO started kvmd (\S+) for ", LOG_FILE.read_text())[-1:]

    wait_until(f"version {version} runs", lambda: last_started() == [version])


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


# ---- What dpkg does ------------------------------------------------------------------


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


def removing_keeps_the_journal_and_purging_does_not() -> None:
    install(our_package())
    STATE_FILE.touch()
    remove()
    expect("journal", STATE_FILE.exists(), True)
    purge()
    expect("journal", STATE_FILE.exists(), False)


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


# ---- Beside a Ganeti that brings a unit of its own -----------------------------------


@contextlib.contextmanager
def the_node_back() -> Iterator[None]:
    """At the end, have the node as all scenarios find it, with a Ganeti without units.

    Going back to that, Ganeti's package leaves the unit enabled.
    """
    yield
    purge()
    install_ganeti()
    for link in Path("/etc/systemd/system").glob("*.wants/ganeti-kvmd.service"):
        link.unlink()


def ganetis_unit_is_left_alone_whatever_becomes_of_ours() -> None:
    with the_node_back():
        install_ganeti(ganeti_with_units())
        for action in (remove, purge):
            install(our_package())
            expect_ours_in_place()
            expect_ganetis_unit_in_place()
            install(variant(NEWER))
            expect_ganetis_unit_in_place()
            action()
            expect_ganetis_unit_in_place()
            expect("drop-in", (ROOT / DROP_IN).exists(), False)


def ganeti_may_bring_its_unit_later() -> None:
    with the_node_back():
        install(our_package())
        expect("unit", (ROOT / UNIT).exists(), False)
        with nothing_disturbed():
            install_ganeti(ganeti_with_units())
        expect_ours_in_place()
        expect_ganetis_unit_in_place()
        purge()
        expect_ganetis_unit_in_place()


def ganeti_may_go_with_its_unit_and_come_back() -> None:
    with the_node_back():
        install_ganeti(ganeti_with_units())
        install(our_package())
        daemon_util("stop")
        remove_ganeti("--remove")
        expect("unit", (ROOT / UNIT).exists(), False)
        expect("drop-in", (ROOT / DROP_IN).is_file(), True)
        install_ganeti(ganeti_with_units())
        expect_ours_in_place()
        expect_ganetis_unit_in_place()


def a_unit_that_was_ours_goes_and_leaves_the_place_to_ganetis() -> None:
    for directory in ("lib", "usr/lib"):
        with the_node_back():
            install(first_version(directory))
            expect("unit", (ROOT / UNIT).is_file(), True)
            with nothing_disturbed():
                install(our_package())
            expect("unit", (ROOT / UNIT).exists(), False)
            expect_ours_in_place()
            expect_ganetis_unit_can_be_enabled()
            install_ganeti(ganeti_with_units())
            expect_ganetis_unit_in_place()


def ganetis_unit_that_ours_was_in_the_way_of_comes_after_an_upgrade() -> None:
    with the_node_back():
        install(first_version("usr/lib"))
        with policy_against_restarts():
            fail_to("install", str(ganeti_with_units()))
        install(our_package())
        install_ganeti(ganeti_with_units())
        expect_ours_in_place()
        expect_ganetis_unit_in_place()


def ganetis_unit_that_replaced_ours_survives_an_upgrade() -> None:
    with the_node_back():
        install(first_version("lib"))
        install_ganeti(ganeti_with_units())
        for failure in (fails_to_unpack, fails_in("preinst", "upgrade")):
            fail_to("install", str(variant(NEWER, failure)))
            expect_ganetis_unit_in_place()
        fail_to("install", str(variant(NEWER, fails_in("postinst", "configure"))))
        expect_ganetis_unit_in_place()
        install(variant(NEWER))
        expect_ours_in_place()
        expect_ganetis_unit_in_place()
        expect_ganetis_unit_can_be_enabled()
        purge()
        expect_ganetis_unit_in_place()


def ganetis_unit_that_ours_has_overwritten_is_told_of() -> None:
    with the_node_back():
        install_ganeti(ganeti_with_units())
        install(first_version("lib"))
        told = run("dpkg", "--install", str(our_package()))
        expect("told", "apt-get install --reinstall ganeti" in told, True)
        expect("unit", (ROOT / UNIT).is_file(), True)
        install_ganeti(ganeti_with_units())
        expect_ours_in_place()
        expect_ganetis_unit_in_place()


def expect_ganetis_unit_can_be_enabled() -> None:
    """Fail unless Ganeti's package will find, or has found, nothing against that."""
    run(
        *("env", "DPKG_MAINTSCRIPT_PACKAGE=ganeti", "deb-systemd-helper"),
        *("--quiet", "was-enabled", "ganeti-kvmd.service"),
    )
    if (ROOT / UNIT).exists() and shutil.which("systemctl"):
        run("systemctl", "--root=/", "--quiet", "is-enabled", "ganeti-kvmd.service")


def remove_ganeti(how: str) -> None:
    """Remove or purge the package that has Ganeti's links, leaving the daemon alone."""
    with policy_against_restarts():
        run("dpkg", how, "ganeti")


def install_ganeti(package: Path | None = None) -> None:
    """Install that package, by default without units, starting nothing."""
    with policy_against_restarts():
        install(package or ganeti_without_units())


# ---- The launcher --------------------------------------------------------------------


def the_launcher_heeds_nothing_of_its_callers_python() -> None:
    install(our_package())
    first_line = PROGRAM.read_text().split("\n", 1)[0]
    expect("first line", first_line, "#!/usr/bin/python3 -BIS")
    hostile = Path("/tmp/hostile")
    hostile.mkdir()
    for module in ("selectors", "kvmd", "json", "sitecustomize", "usercustomize"):
        (hostile / f"{module}.py").write_text("raise SystemExit('of the caller')\n")
    os.chdir(hostile)
    run("env", f"PYTHONPATH={hostile}", f"PYTHONHOME={hostile}", str(PROGRAM), "-V")
    os.chdir("/")
    shutil.rmtree(hostile)


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
    removing_keeps_the_journal_and_purging_does_not,
    ours_may_come_before_ganeti,
    ganeti_may_be_installed_anew,
    ganeti_may_go_and_come_back,
    removing_without_ganeti_stops_ours,
    upgrading_without_ganeti_restarts_in_place,
    ganetis_unit_is_left_alone_whatever_becomes_of_ours,
    ganeti_may_bring_its_unit_later,
    ganeti_may_go_with_its_unit_and_come_back,
    a_unit_that_was_ours_goes_and_leaves_the_place_to_ganetis,
    ganetis_unit_that_ours_was_in_the_way_of_comes_after_an_upgrade,
    ganetis_unit_that_replaced_ours_survives_an_upgrade,
    ganetis_unit_that_ours_has_overwritten_is_told_of,
    the_launcher_heeds_nothing_of_its_callers_python,
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
    """Play all scenarios, or those named; the first one that fails ends it."""
    start = time.monotonic()
    set_up_node()
    untouched = traces()
    scenarios = [s for s in SCENARIOS if s.__name__ in (sys.argv[1:] or [s.__name__])]
    for scenario in scenarios:
        play(scenario, untouched)
    print(f"all {len(scenarios)} hold, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
