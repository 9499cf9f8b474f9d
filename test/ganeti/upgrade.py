"""`make check-upgrade`: a node with running instances gets Debian's next release.

Run by `upgrade`, in a world of the old release that may download the new one no more:
apt has it all. A scenario is a function; its name says what must hold. They run in the
order in which they stand here, and each goes on where the last one has ended.

After the upgrade, Ganeti still runs the version of the old release, until
`gnt-cluster upgrade`; it can then tell how its instances are, but start none.
"""

from __future__ import annotations

import sys
import time

# What Python loads late is loaded now: on the way, the package of this one is purged.
from concurrent.futures import Future
from concurrent.futures.thread import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "package"))

from cluster import (
    DOMAIN,
    LOG_FILE,
    Instance,
    create_cluster,
    daemon_pid,
    expect,
    run,
    wait_until,
    which_daemon,
)
from packages import our_package
from scenario import all_hold, report

DPKG_LOG = Path("/var/log/dpkg.log")
PROGRAM = Path("/usr/sbin/ganeti-kvmd")
GANETIS_PROGRAM = Path("/usr/sbin/ganeti-kvmd.haskell")
OLD_PYTHON = f"python3.{sys.version_info.minor}"
UPGRADE_SECONDS = 900

#: Packages that are unpacked early, half-way through and late in the upgrade.
MILESTONES = ("libc6", "python3", "ganeti")


class Node:
    """The node on its way, with the instances that wait for their time to end."""

    def __init__(self, *names: str) -> None:
        self._instances = {name: Instance(f"{name}.{DOMAIN}") for name in names}
        for instance in self._instances.values():
            instance.add()
            wait_until(f"{instance.name} is monitored", instance.is_monitored)
        self._daemon = daemon_pid()
        self._diversions = diversions()

    def ends_before_the_upgrade_are_told_apart(self) -> None:
        self._power_off("before")
        self._kill("killed-before")
        # It ignores the button as yet: what is known of it has to come along.
        self._instances["pressed"].press_power_button()

    def ends_during_the_upgrade_are_told_apart(self) -> None:
        begin = DPKG_LOG.stat().st_size
        with ThreadPoolExecutor() as pool:
            upgrade = pool.submit(full_upgrade)
            for package in MILESTONES:
                wait_until_unpacked(package, begin, upgrade)
                self._power_off(f"at-{package}")
                self._kill(f"killed-at-{package}")
                expect("the upgrade is over", upgrade.done(), False)
            upgrade.result()

    def the_upgrade_leaves_the_daemon_and_its_connections(self) -> None:
        expect("daemon", (which_daemon(), daemon_pid()), ("ours", self._daemon))
        log = LOG_FILE.read_text()
        for instance in self._instances.values():
            connected = log.count(f" {instance.name}: connected to ")
            expect(f"{instance.name} was connected, times", connected, 1)

    def the_upgrade_leaves_what_is_put_aside(self) -> None:
        expect("diversions", diversions(), self._diversions)
        expect("our program is a link", PROGRAM.is_symlink(), False)
        expect("Ganeti's is one", GANETIS_PROGRAM.is_symlink(), True)
        for package in ("ganeti", "ganeti-kvmd"):
            expect(f"files of {package}", run("dpkg", "--verify", package), "")

    def ends_after_the_upgrade_are_told_apart(self) -> None:
        self._power_off("upgraded")
        self._kill("killed-upgraded")

    def ends_without_the_old_python_are_told_apart(self) -> None:
        minimal = f"{OLD_PYTHON}-minimal"
        run("apt-get", "purge", "-qq", "-y", minimal, f"lib{minimal}")
        expect("old Python", Path(f"/usr/bin/{OLD_PYTHON}").exists(), False)
        expect("old library", Path(f"/usr/lib/{OLD_PYTHON}/os.py").exists(), False)
        self._power_off("purged")
        self._kill("killed-purged")

    def installing_again_restarts_in_place_on_the_new_python(self) -> None:
        run("apt-get", "install", "-qq", "-y", "--reinstall", str(our_package()))
        self.the_upgrade_leaves_the_daemon_and_its_connections()
        program = Path(f"/proc/{self._daemon}/exe").readlink()
        expect("program", program, Path("/usr/bin/python3").resolve())

    def ends_after_the_restart_are_told_apart(self) -> None:
        self._power_off("restarted")
        self._kill("killed-restarted")
        pressed = self._instances["pressed"]
        pressed.power_off()
        expect("shutdown file", pressed.shutdown_file.exists(), False)
        pressed.expect_verdicts("not-user guest-shutdown,powerdown-requested")

    def ganeti_knows_who_ended_them(self) -> None:
        for name, instance in self._instances.items():
            crashed = name == "pressed" or name.startswith("killed-")
            state = "ERROR_down up" if crashed else "USER_down up"
            expect(f"state of {name}", instance.state, state)

    def _power_off(self, name: str) -> None:
        """Have the user power an instance off, and fail unless that is the verdict."""
        instance = self._instances[name]
        instance.power_off()
        expect("shutdown file", instance.shutdown_file.exists(), True)
        instance.expect_verdicts("user guest-shutdown")

    def _kill(self, name: str) -> None:
        """Kill an instance, and fail unless it is taken for a crash."""
        instance = self._instances[name]
        instance.kill(SIGKILL)
        wait_until("there is a verdict", instance.verdicts)
        instance.expect_verdicts("not-user connection-ended")
        expect("shutdown file", instance.shutdown_file.exists(), False)


def full_upgrade() -> None:
    """Upgrade the node to the release of its new sources."""
    keep_settings = [f"-oDpkg::Options::=--force-conf{how}" for how in ("def", "old")]
    command = ("apt-get", "full-upgrade", "-qq", "-y", *keep_settings)
    run(*command, limit=UPGRADE_SECONDS)


def wait_until_unpacked(package: str, begin: int, upgrade: Future[None]) -> None:
    """Wait until the upgrade, whose log begins there, has unpacked a package."""

    def is_unpacked() -> bool:
        if upgrade.done():
            upgrade.result()
        return f" status unpacked {package}:" in DPKG_LOG.read_text()[begin:]

    wait_until(f"{package} is unpacked", is_unpacked, UPGRADE_SECONDS)


def diversions() -> str:
    """Return the diversions of the daemon's files."""
    return run("dpkg-divert", "--list", "*ganeti-kvmd*")


def main() -> int:
    """Take the road; return 0 if all holds on it."""
    start = time.monotonic()
    create_cluster()
    run("dpkg", "--install", str(our_package()))
    expect("daemon", which_daemon(), "ours")
    moments = [*(f"at-{package}" for package in MILESTONES)]
    moments += ["before", "upgraded", "purged", "restarted"]
    node = Node(*moments, *(f"killed-{moment}" for moment in moments), "pressed")
    report("", start, f"to create a cluster with {2 * len(moments) + 1} instances")
    held = all_hold(
        [
            node.ends_before_the_upgrade_are_told_apart,
            node.ends_during_the_upgrade_are_told_apart,
            node.the_upgrade_leaves_the_daemon_and_its_connections,
            node.the_upgrade_leaves_what_is_put_aside,
            node.ends_after_the_upgrade_are_told_apart,
            node.ends_without_the_old_python_are_told_apart,
            node.installing_again_restarts_in_place_on_the_new_python,
            node.ends_after_the_restart_are_told_apart,
            node.ganeti_knows_who_ended_them,
        ]
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
