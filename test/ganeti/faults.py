"""With a fault on the node, kvmd makes nothing worse than it is without kvmd.

Whatever the fault, Ganeti starts an instance and shuts it down, has the QMP socket to
itself, and takes the user's power off for what it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster import (
    CONTROL_DIR,
    LOG_FILE,
    PATIENCE,
    Instance,
    daemon_util,
    expect,
    expect_down_by_ganeti,
    expect_down_by_user,
    run,
    running_instance,
    wait_until,
    which_daemon,
)

# Where Ganeti has the daemon's options from.
DEFAULTS = Path("/etc/default/ganeti")
NOBODY = 65534
# Not the directory of Ganeti's own logs: without those, Ganeti itself does nothing.
OWN_LOG_DIR = Path("/var/log/kvmd")
STATE_DIR = Path("/run/kvmd")
# What somebody would have root write to.
TARGET = Path("/etc/planted")
PROGRAM = Path("/usr/sbin/ganeti-kvmd")
# Without these, root may open no more than anybody.
DROPPED = "--bounding-set=-dac_override,-dac_read_search"


# ---- Scenarios -----------------------------------------------------------------------


def with_a_log_of_another_owner_instances_are_served() -> None:
    """Also by a daemon of root's that may open no more than anybody."""
    with daemon_stopped(), program_without_capabilities():
        LOG_FILE.touch()
        os.chown(LOG_FILE, NOBODY, NOBODY)
        LOG_FILE.chmod(0o600)
        try:
            expect_instances_are_served("other-owner", has_connection)
            expect("owner of the log", LOG_FILE.stat().st_uid, NOBODY)
        finally:
            os.chown(LOG_FILE, 0, 0)


def with_a_symlink_in_the_place_of_the_log_instances_are_served() -> None:
    """Nothing is written to where it leads."""
    kept = LOG_FILE.with_name("kept")
    with daemon_stopped():
        LOG_FILE.rename(kept)
        LOG_FILE.symlink_to(TARGET)
        try:
            expect_instances_are_served("symlink", has_connection)
            expect("file that it leads to", TARGET.exists(), False)
        finally:
            kept.rename(LOG_FILE)
            TARGET.unlink(missing_ok=True)


def with_a_log_directory_that_is_read_only_instances_are_served() -> None:
    log_file = OWN_LOG_DIR / "kvm-daemon.log"
    with small_file_system(OWN_LOG_DIR), daemon_with(f"--log-file={log_file}"):
        run("mount", "-o", "remount,ro", str(OWN_LOG_DIR))
        expect_instances_are_served("read-only-log", has_connection)
        expect("files", list(OWN_LOG_DIR.iterdir()), [])


def with_the_journals_file_system_full_instances_are_served() -> None:
    state_file = STATE_DIR / "kvmd.state"
    with small_file_system(STATE_DIR), daemon_with(f"--state-file={state_file}"):
        fill(STATE_DIR / "filler")
        expect_instances_are_served("full-journal", Instance.is_monitored)
        expect("journal", state_file.exists(), False)


def with_its_kvmd_removed_an_instance_is_served_as_far_as_it_can_be() -> None:
    """Keep the open connection; without one, leave the other socket to Ganeti."""
    with running_instance("removed-kvmd") as instance:
        wait_until("it is monitored", lambda: has_connection(instance))
        remove_kvmd(instance)
        expect_qmp_is_ganetis(instance)
        instance.power_off()
        expect_down_by_user(instance)
        instance.start()
        wait_until("it is monitored", lambda: has_connection(instance))
        remove_kvmd(instance)
        daemon_util("stop")
        daemon_util("start")
        wait_until("the daemon says so", lambda: is_left_to_ganeti(instance))
        expect_qmp_is_ganetis(instance)
        instance.obey_power_button()
        instance.shut_down()
        expect_down_by_ganeti(instance)
        instance.start()
        wait_until("it is monitored", lambda: has_connection(instance))
        instance.power_off()
        expect_down_by_user(instance)


SCENARIOS = [
    with_a_log_of_another_owner_instances_are_served,
    with_a_symlink_in_the_place_of_the_log_instances_are_served,
    with_a_log_directory_that_is_read_only_instances_are_served,
    with_the_journals_file_system_full_instances_are_served,
    with_its_kvmd_removed_an_instance_is_served_as_far_as_it_can_be,
]


# ---- What they share -----------------------------------------------------------------


def expect_instances_are_served(
    name: str, is_monitored: Callable[[Instance], object]
) -> None:
    """Fail unless an instance is started, powered off, started and shut down.

    If no daemon runs, it is Ganeti that starts it with the instance.
    """
    with running_instance(name) as instance:
        expect("daemon", which_daemon(), "ours")
        wait_until("it is monitored", lambda: is_monitored(instance))
        expect_qmp_is_ganetis(instance)
        instance.power_off()
        expect_down_by_user(instance)
        instance.start()
        wait_until("it is monitored again", lambda: is_monitored(instance))
        instance.obey_power_button()
        instance.shut_down()
        expect_down_by_ganeti(instance)
        expect("daemon", which_daemon(), "ours")


def expect_qmp_is_ganetis(instance: Instance) -> None:
    """Fail unless QEMU greets who connects to the socket that Ganeti uses."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(CONTROL_DIR / f"{instance.name}.qmp"))
        expect("greeting", client.recv(1024)[:8], b'{"QMP": ')
    running = run("gnt-instance", "list", "--no-headers", "-o", "oper_ram,oper_vcpus")
    expect("memory and processors", running.split(), ["32M", "1"])


def has_connection(instance: Instance) -> bool:
    """Tell whether the daemon is connected to the instance's QEMU: without its log."""
    printed = run("ganeti-kvmd", "--status=json")
    return any(
        (entry["instance"], entry["connected"], entry["pid"])
        == (instance.name, True, instance.pid)
        for entry in json.loads(printed)["instances"]
    )


def is_left_to_ganeti(instance: Instance) -> bool:
    """Tell whether the daemon has warned that it can't watch the instance."""
    warning = f" WARNING {CONTROL_DIR}/{instance.name}.qmp: left to Ganeti"
    return warning in LOG_FILE.read_text()


def remove_kvmd(instance: Instance) -> None:
    """Remove the daemon's socket, as who cleans up does."""
    (CONTROL_DIR / f"{instance.name}.kvmd").unlink()


@contextlib.contextmanager
def daemon_stopped() -> Iterator[None]:
    """Stop the daemon; at the end, stop whichever runs and start it anew."""
    daemon_util("stop")
    expect("daemon", which_daemon(), "none")
    try:
        yield
    finally:
        daemon_util("stop")
        daemon_util("start")


@contextlib.contextmanager
def program_without_capabilities() -> Iterator[None]:
    """Have Ganeti start the daemon as the sandbox of the unit does."""
    moved = PROGRAM.with_name("ganeti-kvmd.moved")
    PROGRAM.rename(moved)
    PROGRAM.write_text(f'#!/bin/sh\nexec setpriv {DROPPED} {moved} "$@"\n')
    PROGRAM.chmod(0o755)
    try:
        yield
    finally:
        moved.rename(PROGRAM)


@contextlib.contextmanager
def daemon_with(argument: str) -> Iterator[None]:
    """Stop the daemon, and have Ganeti start it with an argument meanwhile."""
    defaults = DEFAULTS.read_text()
    with daemon_stopped():
        DEFAULTS.write_text(f'{defaults}\nKVMD_ARGS="{argument}"\n')
        try:
            yield
        finally:
            DEFAULTS.write_text(defaults)


@contextlib.contextmanager
def small_file_system(path: Path) -> Iterator[None]:
    """Mount one of a few KiB on a directory that is made for it."""
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", "mode=755,size=16k", "tmpfs", str(path))
    try:
        yield
    finally:
        run("umount", str(path))
        path.rmdir()


def fill(path: Path) -> None:
    """Write to a file until its file system is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
