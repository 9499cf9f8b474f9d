"""`make check-ganeti`: the package on a real Ganeti node, with real guests.

Run by `throwaway`, in a copy of the machine that has Ganeti. A scenario is a function;
its name says what must hold. They run in the order in which they stand here: the first
one installs the package, the last one removes it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL, SIGTERM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "package"))

import faults
from cluster import (
    CONTROL_DIR,
    LOG_FILE,
    PID_FILE,
    GanetiUnusableError,
    Instance,
    create_cluster,
    daemon_is_version,
    daemon_pid,
    daemon_util,
    expect,
    expect_down_by_ganeti,
    expect_down_by_user,
    kill_daemon,
    run,
    run_watcher,
    running_instance,
    wait_until,
    which_daemon,
)
from packages import NEWER, our_package, variant
from scenario import all_hold, report

INIT_SCRIPT = "/etc/init.d/ganeti"
VERSION_MODULE = Path("/usr/share/ganeti-kvmd/kvmd_version.py")


# ---- Who shut it down ----------------------------------------------------------------


def user_poweroff_is_user_down_and_the_watcher_leaves_it() -> None:
    with running_instance("poweroff") as instance:
        instance.power_off()
        expect_down_by_user(instance)
        run_watcher()
        expect("state after the watcher", instance.state, "USER_down down")
        run_watcher()
        expect("state after the next one", instance.state, "USER_down down")
        expect("shutdown file", instance.shutdown_file.exists(), False)
        instance.start()
        expect("state when started again", instance.state, "running up")


def shutdown_by_ganeti_leaves_no_file() -> None:
    with running_instance("shutdown") as instance:
        instance.obey_power_button()
        instance.shut_down()
        expect_down_by_ganeti(instance)
        instance.expect_verdicts("not-user guest-shutdown,powerdown-requested")


def forced_shutdown_leaves_no_file() -> None:
    with running_instance("forced") as instance:
        instance.shut_down("--timeout=0")
        expect_down_by_ganeti(instance)
        instance.expect_verdicts("not-user host-signal")


def shutdown_without_acpi_leaves_no_file() -> None:
    with running_instance("no-acpi", "-H", "kvm:acpi=false") as instance:
        instance.shut_down()
        expect_down_by_ganeti(instance)
        instance.expect_verdicts("not-user host-signal")


def watcher_restarts_after_sigterm() -> None:
    with running_instance("sigterm") as instance:
        instance.kill(SIGTERM)
        expect_restarted_by_watcher(instance)
        instance.expect_verdicts("not-user host-signal")


def watcher_restarts_after_sigkill() -> None:
    with running_instance("sigkill") as instance:
        instance.kill(SIGKILL)
        expect_restarted_by_watcher(instance)
        instance.expect_verdicts("not-user connection-ended")


def user_poweroff_is_seen_after_a_reboot_by_ganeti() -> None:
    with running_instance("reboot") as instance:
        instance.obey_power_button()
        instance.reboot()
        expect("state", instance.state, "running up")
        instance.power_off()
        expect_down_by_user(instance)


# ---- The daemon ----------------------------------------------------------------------


def daemon_restarts_while_instances_run() -> None:
    with running_instance("user") as user, running_instance("crash") as crash:
        daemon_util("stop")
        expect("daemon", which_daemon(), "none")
        daemon_util("start")
        wait_until_monitored(user, crash)
        user.power_off()
        expect_down_by_user(user)
        crash.kill(SIGKILL)
        expect_restarted_by_watcher(crash)


def watcher_starts_a_killed_daemon() -> None:
    with running_instance("killed-daemon") as instance:
        kill_daemon()
        run_watcher()
        expect("daemon", which_daemon(), "ours")
        wait_until_monitored(instance)
        instance.power_off()
        expect_down_by_user(instance)


def instance_starts_after_the_daemon_was_killed() -> None:
    kill_daemon()
    with running_instance("after-kill") as instance:
        expect("daemon", which_daemon(), "ours")
        instance.power_off()
        expect_down_by_user(instance)


def pid_file_is_roots_alone_and_starting_again_does_nothing() -> None:
    status = PID_FILE.stat()
    expect("owner and group", (status.st_uid, status.st_gid), (0, 0))
    expect("mode", f"{status.st_mode & 0o7777:o}", "600")
    pid = daemon_pid()
    daemon_util("start")
    expect("process", daemon_pid(), pid)


def cluster_setting_stops_and_starts_it() -> None:
    with running_instance("setting") as instance:
        run("gnt-cluster", "modify", "--user-shutdown=no")
        wait_until("no daemon runs", lambda: which_daemon() == "none")
        run("gnt-cluster", "modify", "--user-shutdown=yes")
        wait_until("our daemon runs", lambda: which_daemon() == "ours")
        wait_until_monitored(instance)
        instance.power_off()
        expect_down_by_user(instance)


def node_setting_stops_and_starts_it() -> None:
    run("gnt-node", "modify", "--vm-capable=no", "node1")
    wait_until("no daemon runs", lambda: which_daemon() == "none")
    run("gnt-node", "modify", "--vm-capable=yes", "node1")
    wait_until("our daemon runs", lambda: which_daemon() == "ours")
    with running_instance("vm-capable") as instance:
        instance.power_off()
        expect_down_by_user(instance)


def init_script_starts_stops_restarts_and_tells() -> None:
    with running_instance("init-script") as instance:
        run(INIT_SCRIPT, "stop", "ganeti-kvmd")
        expect("daemon after stop", which_daemon(), "none")
        expect("status", init_script_status(), 3)
        run(INIT_SCRIPT, "start", "ganeti-kvmd")
        expect("daemon after start", which_daemon(), "ours")
        expect("status", init_script_status(), 0)
        run(INIT_SCRIPT, "restart")
        expect("daemon after restart of all", which_daemon(), "ours")
        wait_until_monitored(instance)
        instance.power_off()
        expect_down_by_user(instance)


def log_is_rotated() -> None:
    pid = daemon_pid()
    old_log, rotated = LOG_FILE.stat().st_ino, Path(f"{LOG_FILE}.1")
    run("logrotate", "--force", "/etc/logrotate.d/ganeti")
    expect("rotated log", rotated.stat().st_ino, old_log)
    with running_instance("rotation") as instance:
        wait_until_monitored(instance)
        expect("process", daemon_pid(), pid)
        open_files = [fd.readlink() for fd in Path(f"/proc/{pid}/fd").iterdir()]
        expect("old log is open", rotated in open_files, False)


# ---- The package ---------------------------------------------------------------------


def installing_takes_over_from_ganetis_daemon() -> None:
    with running_instance("installed") as instance:
        expect("daemon", which_daemon(), "Ganeti's")
        install(our_package())
        expect("daemon", which_daemon(), "ours")
        wait_until_monitored(instance)
        instance.power_off()
        expect_down_by_user(instance)


def upgrading_loses_no_shutdown() -> None:
    package = variant(NEWER)
    with running_instance("upgrade") as early, running_instance("upgraded") as late:
        with ThreadPoolExecutor() as pool:
            upgrade = pool.submit(install, package)
            wait_until("unpacked", lambda: NEWER in VERSION_MODULE.read_text())
            early.power_off()
            upgrade.result()
        expect_down_by_user(early)
        wait_until("the new daemon runs", lambda: daemon_is_version(NEWER))
        expect("daemon", which_daemon(), "ours")
        wait_until_monitored(late)
        late.power_off()
        expect_down_by_user(late)


def removing_brings_ganetis_daemon_back() -> None:
    with running_instance("removed") as instance:
        run("apt-get", "remove", "-qq", "-y", "ganeti-kvmd")
        expect("daemon", which_daemon(), "Ganeti's")
        instance.power_off()
        expect_down_by_user(instance)


def install(package: Path) -> None:
    """Install it, or upgrade to it, as an administrator does."""
    run("apt-get", "install", "-qq", "-y", str(package))


# ---- What the scenarios share --------------------------------------------------------


def expect_restarted_by_watcher(instance: Instance) -> None:
    """Fail unless Ganeti takes it for a crash, and its watcher starts it again."""
    expect("shutdown file", instance.shutdown_file.exists(), False)
    expect("state", instance.state, "ERROR_down up")
    run_watcher()
    expect("state after the watcher", instance.state, "running up")


def wait_until_monitored(*instances: Instance) -> None:
    """Wait until the daemon is connected to each one's QEMU."""
    for instance in instances:
        wait_until(f"{instance.name} is monitored", instance.is_monitored)


def init_script_status() -> int:
    """Return what the init script's status exits with: 0 running, 3 not."""
    command = [INIT_SCRIPT, "status", "ganeti-kvmd"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


SCENARIOS = [
    installing_takes_over_from_ganetis_daemon,
    user_poweroff_is_user_down_and_the_watcher_leaves_it,
    shutdown_by_ganeti_leaves_no_file,
    forced_shutdown_leaves_no_file,
    shutdown_without_acpi_leaves_no_file,
    watcher_restarts_after_sigterm,
    watcher_restarts_after_sigkill,
    user_poweroff_is_seen_after_a_reboot_by_ganeti,
    daemon_restarts_while_instances_run,
    watcher_starts_a_killed_daemon,
    instance_starts_after_the_daemon_was_killed,
    pid_file_is_roots_alone_and_starting_again_does_nothing,
    cluster_setting_stops_and_starts_it,
    node_setting_stops_and_starts_it,
    init_script_starts_stops_restarts_and_tells,
    log_is_rotated,
    *faults.SCENARIOS,
    upgrading_loses_no_shutdown,
    removing_brings_ganetis_daemon_back,
]


def leaving_no_file(scenario: Callable[[], None]) -> Callable[[], None]:
    """Return a scenario that also fails when a shutdown file is left behind."""

    @functools.wraps(scenario)
    def play() -> None:
        scenario()
        expect("files left", [path.name for path in CONTROL_DIR.glob("*.shutdown")], [])

    return play


def main() -> int:
    """Play all scenarios; return 0 if all hold."""
    start = time.monotonic()
    try:
        create_cluster()
    except GanetiUnusableError as error:
        print(f"Ganeti itself does not work here, no scenario was played: {error}")
        return 1
    report("", start, "to create a cluster of one node")
    return 0 if all_hold([leaving_no_file(scenario) for scenario in SCENARIOS]) else 1


if __name__ == "__main__":
    sys.exit(main())
