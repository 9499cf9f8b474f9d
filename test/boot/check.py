"""`make check-systemd`: the daemon under a real systemd.

Run by `test/boot/boot`, beside that systemd, on a node with Ganeti and its units. A
scenario is a function; its name says what must hold. They follow on each other: our
package is installed and the daemon runs until it is stopped.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(CHECKOUT / "test"), str(CHECKOUT / "test/ganeti")]

from cluster import CONTROL_DIR, LOG_FILE, PID_FILE, expect, run  # noqa: E402
from deadline import wait_until  # noqa: E402
from guests import Guests  # noqa: E402
from service import (  # noqa: E402
    UNIT,
    is_replaced,
    journal,
    log,
    main_pid,
    show,
    starts,
    state,
    systemctl,
)

NODE = "node1.example.org"
SSCONF = Path("/var/lib/ganeti")
DEFAULTS = Path("/etc/default/ganeti")
NEWER = "999"

#: Seconds: more than systemd waits for a daemon that gives no sign of life.
PATIENCE = 90.0

#: Something that is done while its block runs. It gives what tells whether it is over.
Action = Callable[[], AbstractContextManager[Callable[[], bool]]]


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


def our_package() -> Path:
    """Return the newest package that `make deb` left."""
    packages = (CHECKOUT / "dist").glob("ganeti-kvmd_*_all.deb")
    return max(packages, key=lambda package: package.stat().st_mtime)


def newer_package() -> Path:
    """Return a copy of our package whose version, the daemon's too, is newer."""
    with tempfile.TemporaryDirectory() as directory:
        tree, package = Path(directory, "tree"), Path("/root/newer.deb")
        run("dpkg-deb", "--raw-extract", str(our_package()), str(tree))
        for file in (tree / "DEBIAN/control", *tree.glob("usr/share/ganeti-kvmd/*.py")):
            text = re.sub(r"(?m)^Version: .*", f"Version: {NEWER}", file.read_text())
            file.write_text(re.sub(r"(?m)^VERSION = .*", f'VERSION = "{NEWER}"', text))
        run("dpkg-deb", "-Znone", "--build", str(tree), str(package))
    return package


# ---- What is done to the daemon ------------------------------------------------------


def command(*words: str) -> Action:
    """Return the running of a command, which has to work."""

    @contextlib.contextmanager
    def run_command() -> Iterator[Callable[[], bool]]:
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            yield lambda: process.poll() is not None
            status = process.wait(PATIENCE)
            output.seek(0)
            expect(f"{' '.join(words)}: {output.read()}\nstatus", status, 0)

    return run_command


@contextlib.contextmanager
def restart_in_place() -> Iterator[Callable[[], bool]]:
    """Send the signal that the package sends, and wait until the new program runs."""
    before = starts()
    os.kill(main_pid(), signal.SIGUSR2)
    yield lambda: starts() > before


def replacement_after(number: signal.Signals) -> Action:
    """Return the sending of a signal, and the wait for another process."""

    @contextlib.contextmanager
    def wait_for_another() -> Iterator[Callable[[], bool]]:
        pid = main_pid()
        os.kill(pid, number)
        yield lambda: is_replaced(pid)

    return wait_for_another


def play(action: Action) -> None:
    """Have guests go down before, during and after an action; judge the verdicts."""
    with guests_of_all_kinds() as guests:
        guests.start()
        guests.connect()
        guests.do_before()
        with action() as is_over:
            guests.do_during(is_over)
            wait_until(is_over, "what is done is over", PATIENCE)
        guests.expect_connected()
        guests.do_after()
        guests.judge_files()
        guests.judge_log()


@contextlib.contextmanager
def guests_of_all_kinds() -> Iterator[Guests]:
    """Make guests, and leave none."""
    guests = Guests()
    try:
        yield guests
    finally:
        guests.clear_away()


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


def program() -> str:
    """Return what runs as the daemon: the name of an executable."""
    return Path(f"/proc/{main_pid()}/exe").resolve().name


# ---- Coming and going ----------------------------------------------------------------


def installing_takes_over_from_ganetis_own_daemon() -> None:
    systemctl("start")
    expect("state of Ganeti's", state(), "active (running)")
    run("dpkg", "--install", str(our_package()))
    expect("state", state(), "active (running)")
    expect("program", program().startswith("python3"), True)


def stopped_it_leaves_nothing() -> None:
    systemctl("stop")
    expect("state", state(), "inactive (dead)")
    expect("result", show("Result"), "success")
    expect("pid file", PID_FILE.exists(), False)
    expect("descriptors", show("NFileDescriptorStore"), "0")


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
    DEFAULTS.write_text("KVMD_ARGS=\n")


def started_it_is_ready_when_it_is_at_work() -> None:
    systemctl("start")
    expect("state", state(), "active (running)")
    expect("pid file", PID_FILE.read_text(), f"{main_pid()}\n")
    expect("status", 'Status: "instances watched: 0"' in run("systemctl", "status", UNIT), True)
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


def removing_gives_back_to_ganetis_own_daemon() -> None:
    run("dpkg", "--purge", "ganeti-kvmd")
    expect("state of Ganeti's", state(), "active (running)")
    expect("program", program(), "ganeti-kvmd")
    systemctl("stop")


# ---- While it runs -------------------------------------------------------------------


def reloading_opens_the_log_anew() -> None:
    LOG_FILE.rename(f"{LOG_FILE}.1")
    with same_process():
        play(command("systemctl", "reload", UNIT))
    expect("log", LOG_FILE.exists(), True)


def restarting_in_place_loses_nothing() -> None:
    with same_process():
        play(restart_in_place)


def restarting_loses_nothing() -> None:
    with another_process():
        play(command("systemctl", "restart", UNIT))


def killed_it_is_started_again_and_has_lost_nothing() -> None:
    with another_process():
        play(replacement_after(signal.SIGKILL))


def frozen_it_is_replaced_and_has_lost_nothing() -> None:
    with another_process():
        play(replacement_after(signal.SIGSTOP))
    expect("ended by the watchdog", "Watchdog timeout" in journal(), True)


def upgrading_loses_nothing() -> None:
    package = newer_package()
    with same_process():
        play(command("dpkg", "--install", str(package)))
    expect("version runs", f" INFO started kvmd {NEWER} " in log(), True)


def another_systemd_loses_nothing() -> None:
    with same_process():
        play(command("systemctl", "daemon-reexec"))


SCENARIOS = [
    installing_takes_over_from_ganetis_own_daemon,
    stopped_it_leaves_nothing,
    not_wanted_by_the_cluster_it_has_not_failed,
    started_with_a_wrong_option_it_is_not_started_again,
    started_it_is_ready_when_it_is_at_work,
    started_it_takes_up_what_runs,
    reloading_opens_the_log_anew,
    restarting_in_place_loses_nothing,
    restarting_loses_nothing,
    killed_it_is_started_again_and_has_lost_nothing,
    frozen_it_is_replaced_and_has_lost_nothing,
    upgrading_loses_nothing,
    another_systemd_loses_nothing,
    removing_gives_back_to_ganetis_own_daemon,
]


def main() -> None:
    """Play all scenarios; the first one that fails ends it."""
    begin = time.monotonic()
    set_up_node()
    for scenario in SCENARIOS:
        start = time.monotonic()
        try:
            scenario()
        except BaseException:
            print(f"---- the log\n{log()}---- the journal\n{journal()}")
            raise
        name = scenario.__name__.replace("_", " ")
        print(f"ok {time.monotonic() - start:5.1f} s  {name}", flush=True)
    print(f"all {len(SCENARIOS)} hold, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
