"""`make check-systemd`: the daemon under a real systemd.

Run by `test/boot/boot`, beside that systemd, on a node with Ganeti and its units. A
scenario is a function; its name says what must hold. They follow on each other.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
HELPERS = ("test/helpers", "test/ganeti", "test/package")
sys.path[1:1] = [str(CHECKOUT / helpers) for helpers in HELPERS]

from actions import (  # noqa: E402
    PATIENCE,
    Action,
    command,
    held,
    kill_again_and_again,
    replacement_after,
    restart_in_place,
)
from cluster import (  # noqa: E402
    CONTROL_DIR,
    LOG_FILE,
    PID_FILE,
    daemon_util,
    expect,
    run,
)
from deadline import wait_until  # noqa: E402
from guests import Guest, Guests  # noqa: E402
from packages import (  # noqa: E402
    DROP_IN,
    NEWER,
    our_package,
    substitute,
    variant,
)
from scenario import report  # noqa: E402
from service import (  # noqa: E402
    UNIT,
    has_watch,
    journal,
    log,
    main_pid,
    show,
    state,
    systemctl,
    wait_until_watched,
)

NODE = "node1.example.org"
SSCONF = Path("/var/lib/ganeti")
DEFAULTS = Path("/etc/default/ganeti")
GANETIS_EXECUTABLE = "ganeti-kvmd"


# ---- The node ------------------------------------------------------------------------


def set_up_node() -> None:
    """Make this machine look like a node of a cluster with user shutdown enabled."""
    run("hostname", NODE)
    Path("/etc/hosts").write_text(f"127.0.0.1 {NODE} localhost\n")
    CONTROL_DIR.mkdir(parents=True)
    (SSCONF / "ssconf_hypervisor_list").write_text("kvm\n")
    (SSCONF / "ssconf_node_vm_capable").write_text(f"{NODE}=True\n")
    switch_user_shutdown("True")


def switch_user_shutdown(value: str) -> None:
    """Have the cluster want the daemon (`True`), or not (`False`)."""
    (SSCONF / "ssconf_enabled_user_shutdown").write_text(f"{value}\n")


def wait_until_runs(executable: str) -> None:
    """Wait until the daemon is a process of this executable."""

    def runs() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return Path(f"/proc/{main_pid()}/exe").readlink().name == executable
        return False

    wait_until(runs, f"{executable} runs")


# ---- Guests meanwhile ----------------------------------------------------------------


def play(action: Action) -> None:
    """Have guests go down before, during and after an action; judge the verdicts."""
    with guests_of_all_kinds() as guests:
        go_through(action, guests)
        guests.judge_log()


def go_through(action: Action, guests: Guests) -> None:
    """Have guests go down before, during and after an action; judge the files."""
    guests.start()
    guests.connect()
    guests.do_before()
    with action() as is_over:
        guests.do_during(is_over)
        wait_until(is_over, "what is done is over", PATIENCE)
    guests.expect_connected()
    guests.do_after()
    guests.judge_files()


@contextlib.contextmanager
def guests_of_all_kinds() -> Iterator[Guests]:
    """Make guests, and leave none."""
    guests = Guests()
    try:
        yield guests
    finally:
        guests.vanish()


@contextlib.contextmanager
def guests_that_run(number: int) -> Iterator[list[Guest]]:
    """Make guests that the daemon is connected to, and leave none."""
    guests = [Guest("one") for _ in range(number)]
    try:
        for guest in guests:
            guest.start()
            guest.connect()
        yield guests
    finally:
        for guest in guests:
            guest.vanish()


@contextlib.contextmanager
def same_process() -> Iterator[None]:
    """Fail unless the process of the daemon is the same before and after."""
    pid = main_pid()
    yield
    expect("process", main_pid(), pid)


@contextlib.contextmanager
def another_process() -> Iterator[None]:
    """Fail unless the process of the daemon is another one afterwards."""
    pid = main_pid()
    yield
    expect("process is the same", main_pid() == pid, False)


# ---- Starting and stopping -----------------------------------------------------------


def installing_takes_over_from_ganetis_own_daemon() -> None:
    systemctl("start")
    wait_until_runs(GANETIS_EXECUTABLE)
    run("dpkg", "--install", str(our_package()))
    expect("state", state(), "active (running)")
    wait_until_runs(Path("/usr/bin/python3").resolve().name)


def stopped_it_leaves_nothing() -> None:
    systemctl("stop")
    expect("state", state(), "inactive (dead)")
    expect("result", show("Result"), "success")
    expect("pid file", PID_FILE.exists(), False)


def not_wanted_by_the_cluster_it_has_not_failed() -> None:
    switch_user_shutdown("False")
    systemctl("start")
    wait_until(lambda: state() == "inactive (dead)", "it has ended")
    expect("reason", " INFO not needed here: " in log(), True)
    expect("restarts", show("NRestarts"), "0")
    switch_user_shutdown("True")


def started_with_a_wrong_option_it_is_not_started_again() -> None:
    DEFAULTS.write_text("KVMD_ARGS=--no-such-option\n")
    with contextlib.suppress(AssertionError):
        systemctl("start")
    expect("state", state(), "failed (failed)")
    expect("restarts", show("NRestarts"), "0")
    DEFAULTS.write_text("")


def beside_a_daemon_without_the_unit_it_is_not_started() -> None:
    run("/usr/sbin/ganeti-kvmd")
    pid = int(PID_FILE.read_text())
    systemctl("start")
    expect("state", state(), "inactive (dead)")
    expect("daemon", int(PID_FILE.read_text()), pid)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not PID_FILE.exists(), "the other one has ended")


def started_it_is_ready_when_it_is_at_work() -> None:
    systemctl("start")
    expect("state", state(), "active (running)")
    expect("pid file", PID_FILE.read_text(), f"{main_pid()}\n")
    expect("it watches", has_watch(main_pid()), True)
    told = 'Status: "instances watched: 0"' in run("systemctl", "status", UNIT)
    expect("status is told", told, True)
    systemctl("stop")


def started_it_takes_up_what_runs() -> None:
    with guests_of_all_kinds() as guests:
        guests.start()
        with command("systemctl", "start", UNIT)() as is_over:
            guests.connect()
            guests.do_before()
            guests.do_during(is_over)
        guests.do_after()
        guests.judge_files()
        guests.judge_log()


def stopped_and_started_it_remembers_what_was_before() -> None:
    with guests_that_run(4) as guests:
        pressed, left, off, lost = guests
        pressed.press_power_button()
        pressed.wait_until_read()
        off.power_off()
        wait_until_watched(3)
        systemctl("stop")
        lost.be_lost()
        systemctl("start")
        for guest in (pressed, left):
            guest.wait_until_client_leaves()
            guest.connect()
            guest.power_off()
        wait_until_watched(0)
        for guest in guests:
            guest.judge_file()
        for guest in (pressed, left, off):
            guest.judge_log()


def ganetis_daemon_util_uses_the_unit() -> None:
    daemon_util("stop")
    expect("state", state(), "inactive (dead)")
    daemon_util("start")
    expect("state", state(), "active (running)")
    daemon_util("check")


def removing_gives_back_to_ganetis_own_daemon() -> None:
    run("dpkg", "--purge", "ganeti-kvmd")
    expect("state", state(), "active (running)")
    wait_until_runs(GANETIS_EXECUTABLE)
    systemctl("stop")


# ---- While it runs -------------------------------------------------------------------


def reloading_opens_the_log_anew() -> None:
    LOG_FILE.rename(f"{LOG_FILE}.1")
    reload = command("systemctl", "reload", UNIT)
    with same_process():
        play(reload)
        play(held(reload))
    expect("log", LOG_FILE.exists(), True)


def restarting_in_place_loses_nothing() -> None:
    with same_process():
        play(restart_in_place)
        play(held(restart_in_place))


def restarting_loses_nothing() -> None:
    restart = command("systemctl", "restart", UNIT)
    with another_process():
        play(restart)
        play(held(restart))


def killed_it_is_started_again_and_has_lost_nothing() -> None:
    with another_process():
        play(replacement_after(signal.SIGKILL))


def killed_again_and_again_it_has_lost_nothing() -> None:
    # A line of the log may be missing: it comes after the file.
    with another_process(), guests_of_all_kinds() as guests:
        go_through(kill_again_and_again, guests)


def frozen_it_is_replaced_and_has_lost_nothing() -> None:
    with another_process():
        play(replacement_after(signal.SIGSTOP))
    expect("ended by the watchdog", "Watchdog timeout" in journal(), True)


def upgrading_loses_nothing() -> None:
    package = variant(NEWER, restarts_later)
    with same_process():
        play(command("dpkg", "--install", str(package)))
    expect("version runs", f" INFO started kvmd {NEWER} " in log(), True)
    expect("RestartSec of the new drop-in", show("RestartUSec"), "300ms")


def restarts_later(tree: Path) -> None:
    """Have systemd wait longer after a crash."""
    substitute("(?m)^RestartSec=.*", "RestartSec=300ms", tree / DROP_IN)


def restarting_systemd_loses_nothing() -> None:
    with same_process():
        play(command("systemctl", "daemon-reexec"))


def nothing_was_complained_of() -> None:
    expect("complaints", re.findall("(?m)^.* (?:WARNING|ERROR) .*", log()), [])
    expect("accidents", re.findall("Traceback|Exception|Error:", journal()), [])


SCENARIOS = [
    installing_takes_over_from_ganetis_own_daemon,
    stopped_it_leaves_nothing,
    not_wanted_by_the_cluster_it_has_not_failed,
    started_with_a_wrong_option_it_is_not_started_again,
    beside_a_daemon_without_the_unit_it_is_not_started,
    started_it_is_ready_when_it_is_at_work,
    started_it_takes_up_what_runs,
    ganetis_daemon_util_uses_the_unit,
    reloading_opens_the_log_anew,
    restarting_in_place_loses_nothing,
    restarting_loses_nothing,
    stopped_and_started_it_remembers_what_was_before,
    killed_it_is_started_again_and_has_lost_nothing,
    killed_again_and_again_it_has_lost_nothing,
    frozen_it_is_replaced_and_has_lost_nothing,
    upgrading_loses_nothing,
    restarting_systemd_loses_nothing,
    removing_gives_back_to_ganetis_own_daemon,
    nothing_was_complained_of,
]


def main() -> None:
    """Play all scenarios; the first one that fails ends it."""
    set_up_node()
    start = time.monotonic()
    for scenario in SCENARIOS:
        scenario_start = time.monotonic()
        try:
            scenario()
        except BaseException:
            print(f"---- the log\n{log()}---- the journal\n{journal()}")
            raise
        report("ok", scenario_start, scenario.__name__.replace("_", " "))
    report("", start, f"in all; {len(SCENARIOS)} scenarios hold")


if __name__ == "__main__":
    main()
