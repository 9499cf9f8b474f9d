"""Every way in which a guest goes down, and what is to be said of it.

The tests, the demo and the recordings of QMP go through the same scenarios.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import guest
from qemu import Qemu

USER = "user"
NOT_USER = "not user"
RUNS_ON = "runs on"


class Scenario(NamedTuple):
    """What happens to a guest before its end is near, then its end."""

    name: str
    how: str
    expected: str
    cause: str
    """The cause that the daemon's log gives, "" if there is no verdict."""
    end: Callable[[Qemu], object]
    prepare: Callable[[Qemu], object] = Qemu.boot
    options: tuple[str, ...] = ()


def power_off(qemu: Qemu) -> None:
    """Do as the user does."""
    qemu.tell_guest(guest.POWER_OFF)


def press_power_button(qemu: Qemu) -> None:
    """Do as `gnt-instance shutdown` does first."""
    qemu.qmp.command("system_powerdown")
    qemu.qmp.wait_for_event("POWERDOWN")


def terminate(qemu: Qemu) -> None:
    """Do as `gnt-instance shutdown` does at last, or an administrator by hand."""
    qemu.process.send_signal(signal.SIGTERM)


def kill(qemu: Qemu) -> None:
    """Do as the kernel does when it is out of memory."""
    qemu.process.send_signal(signal.SIGKILL)


def boot_obedient(qemu: Qemu) -> None:
    """Boot, and have the guest obey the power button."""
    qemu.boot()
    qemu.make_guest_obey_power_button()


def boot_and_ignore_power_button(qemu: Qemu) -> None:
    """Boot, and press the power button, of which the guest takes no note."""
    qemu.boot()
    press_power_button(qemu)


def ignore_power_button_and_reset(qemu: Qemu) -> None:
    """Boot, press the power button in vain, and have the guest reset itself."""
    boot_and_ignore_power_button(qemu)
    qemu.reboot_guest()


def rename_away_and_back(path: Path) -> None:
    """Give a file another name, and its own name again."""
    away = path.with_suffix(".away")
    path.rename(away)
    away.rename(path)


def ignore_power_button_and_disturb_socket(qemu: Qemu) -> None:
    """Press the power button in vain, then do as cleaners of /run do.

    The socket gets other time stamps, and is away under another name for a moment.
    """
    boot_and_ignore_power_button(qemu)
    os.utime(qemu.watched_socket)
    rename_away_and_back(qemu.watched_socket)


def start_crash_kernel(qemu: Qemu) -> None:
    """Boot, and crash, where a crash kernel takes over: a dump, then the end."""
    qemu.boot()
    qemu.have_guest_do(guest.START_CRASH_KERNEL)


def start_crash_kernel_and_reset(qemu: Qemu) -> None:
    """Boot, crash, and have the crash kernel reset the guest."""
    start_crash_kernel(qemu)
    qemu.reboot_guest()


def panic(qemu: Qemu) -> None:
    """Panic, where QEMU pauses the guest then."""
    qemu.tell_guest(guest.PANIC)
    qemu.qmp.wait_for_event("GUEST_PANICKED")
    qemu.qmp.wait_for_event("STOP")


def go_on_after_panic(qemu: Qemu) -> None:
    """Have the guest run on that has panicked."""
    qemu.qmp.command("cont")
    qemu.wait_until_guest_has_done(guest.PANIC)


def boot_panic_and_go_on(qemu: Qemu) -> None:
    """Boot, panic, and go on all the same."""
    qemu.boot()
    panic(qemu)
    go_on_after_panic(qemu)


def boot_with_watchdog(qemu: Qemu, action: str) -> None:
    """Boot, with a watchdog that does so when it expires; obey the power button."""
    boot_obedient(qemu)
    qemu.qmp.command("watchdog-set-action", action=action)


def let_watchdog_expire(qemu: Qemu) -> None:
    """Do as a guest that hangs, in no time."""
    qemu.tell_guest(guest.LET_WATCHDOG_EXPIRE)


def boot_stop_and_continue(qemu: Qemu) -> None:
    """Boot, and pause the guest for a moment."""
    qemu.boot()
    qemu.qmp.command("stop")
    qemu.qmp.command("cont")
    qemu.qmp.wait_for_event("RESUME")


def power_off_and_come_back(qemu: Qemu) -> None:
    """Power off where QEMU stays, and reset the guest into a new life."""
    qemu.boot()
    power_off(qemu)
    qemu.qmp.wait_for_event("SHUTDOWN")
    qemu.qmp.wait_for_event("STOP")
    qemu.qmp.command("system_reset")
    qemu.boot()


def power_off_and_quit(qemu: Qemu) -> None:
    """Power off where QEMU stays, and end QEMU."""
    power_off(qemu)
    qemu.qmp.wait_for_event("SHUTDOWN")
    qemu.qmp.wait_for_event("STOP")
    qemu.qmp.command("quit")


def migrate_away(qemu: Qemu) -> None:
    """Boot, and move the guest to the QEMU that waits for it."""
    qemu.boot()
    qemu.migrate_to(MIGRATION_URI)


# QEMU stays when the guest is down, and pauses the guest when that panics. (Since
# QEMU 6.0 `-action panic=pause` does the second alone.)
STAYING = ("-no-shutdown",)

WATCHDOG = ("-device", "ib700")

SCENARIOS = [
    Scenario(
        name="poweroff",
        how="poweroff in the guest",
        expected=USER,
        cause="guest-shutdown",
        end=power_off,
    ),
    Scenario(
        name="hibernate",
        how="hibernation of the guest",
        expected=USER,
        cause="guest-shutdown",
        end=lambda qemu: qemu.tell_guest(guest.HIBERNATE),
    ),
    Scenario(
        name="powerdown-obeyed",
        how="power button, the guest obeys",
        expected=NOT_USER,
        cause="guest-shutdown,powerdown-requested",
        prepare=boot_obedient,
        end=press_power_button,
    ),
    Scenario(
        name="powerdown-ignored",
        how="power button ignored, SIGTERM",
        expected=NOT_USER,
        cause="host-signal",
        prepare=boot_and_ignore_power_button,
        end=terminate,
    ),
    Scenario(
        name="powerdown-ignored-reset",
        how="power button, reset, poweroff",
        expected=USER,
        cause="guest-shutdown",
        prepare=ignore_power_button_and_reset,
        end=power_off,
    ),
    Scenario(
        name="sigterm",
        how="SIGTERM to QEMU",
        expected=NOT_USER,
        cause="host-signal",
        end=terminate,
    ),
    Scenario(
        name="sigkill",
        how="SIGKILL to QEMU",
        expected=NOT_USER,
        cause="connection-ended",
        end=kill,
    ),
    Scenario(
        name="quit",
        how="quit, by QMP",
        expected=NOT_USER,
        cause="host-qmp-quit",
        end=lambda qemu: qemu.qmp.command("quit"),
    ),
    Scenario(
        name="reset",
        how="reboot in the guest",
        expected=RUNS_ON,
        cause="",
        end=Qemu.reboot_guest,
    ),
    Scenario(
        name="reset-no-reboot",
        how="reboot in the guest (-no-reboot)",
        expected=NOT_USER,
        cause="guest-reset",
        options=("-no-reboot",),
        end=lambda qemu: qemu.tell_guest(guest.REBOOT),
    ),
    Scenario(
        name="system-reset-no-reboot",
        how="system_reset (-no-reboot)",
        expected=NOT_USER,
        cause="host-qmp-system-reset",
        options=("-no-reboot",),
        end=lambda qemu: qemu.qmp.command("system_reset"),
    ),
    Scenario(
        name="stop-cont",
        how="stop, cont, poweroff",
        expected=USER,
        cause="guest-shutdown",
        prepare=boot_stop_and_continue,
        end=power_off,
    ),
    Scenario(
        name="panic",
        how="panic of the guest",
        expected=NOT_USER,
        cause="guest-panic",
        end=lambda qemu: qemu.tell_guest(guest.PANIC),
    ),
    Scenario(
        name="no-shutdown",
        how="poweroff twice (-no-shutdown)",
        expected=USER,
        cause="guest-shutdown",
        options=STAYING,
        prepare=power_off_and_come_back,
        end=power_off_and_quit,
    ),
    Scenario(
        name="powerdown-socket-disturbed",
        how="power button, mv .kvmd, poweroff",
        expected=NOT_USER,
        cause="guest-shutdown,powerdown-requested",
        prepare=ignore_power_button_and_disturb_socket,
        end=power_off,
    ),
    Scenario(
        name="crash-kernel",
        how="crash kernel, poweroff",
        expected=NOT_USER,
        cause="guest-shutdown,panicked",
        prepare=start_crash_kernel,
        end=power_off,
    ),
    Scenario(
        name="crash-kernel-reset",
        how="crash kernel, reset, poweroff",
        expected=USER,
        cause="guest-shutdown",
        prepare=start_crash_kernel_and_reset,
        end=power_off,
    ),
    Scenario(
        name="panic-cont",
        how="panic, cont, poweroff",
        expected=NOT_USER,
        cause="guest-shutdown,panicked",
        options=STAYING,
        prepare=boot_panic_and_go_on,
        end=power_off_and_quit,
    ),
    Scenario(
        name="watchdog-poweroff",
        how="watchdog, action poweroff",
        expected=NOT_USER,
        cause="connection-ended,watchdog-poweroff",
        options=WATCHDOG,
        prepare=lambda qemu: boot_with_watchdog(qemu, "poweroff"),
        end=let_watchdog_expire,
    ),
    Scenario(
        name="watchdog-shutdown",
        how="watchdog, action shutdown",
        expected=NOT_USER,
        cause="guest-shutdown,powerdown-requested",
        options=WATCHDOG,
        prepare=lambda qemu: boot_with_watchdog(qemu, "shutdown"),
        end=let_watchdog_expire,
    ),
]

# The two ends of a live migration; both QEMUs are started before either is prepared.
MIGRATION_URI = "unix:migration"
MIGRATION = [
    Scenario(
        name="migration-source",
        how="live migration away, SIGTERM",
        expected=NOT_USER,
        cause="host-signal",
        prepare=migrate_away,
        end=terminate,
    ),
    Scenario(
        name="migration-target",
        how="live migration to here, poweroff",
        expected=USER,
        cause="guest-shutdown",
        options=("-incoming", MIGRATION_URI),
        prepare=lambda qemu: qemu.qmp.wait_for_event("RESUME"),
        end=power_off,
    ),
]
