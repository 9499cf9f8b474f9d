"""Every way in which a guest goes down, and what is to be said of it.

The tests, the demo and the recordings of QMP go through the same scenarios.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
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
    qemu.qmp.command("quit")


def migrate_away(qemu: Qemu) -> None:
    """Boot, and move the guest to the QEMU that waits for it."""
    qemu.boot()
    qemu.migrate_to(MIGRATION_URI)


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
        how="system_powerdown, the guest obeys",
        expected=NOT_USER,
        cause="guest-shutdown,powerdown-requested",
        prepare=boot_obedient,
        end=press_power_button,
    ),
    Scenario(
        name="powerdown-ignored",
        how="system_powerdown ignored, SIGTERM",
        expected=NOT_USER,
        cause="host-signal",
        prepare=boot_and_ignore_power_button,
        end=terminate,
    ),
    Scenario(
        name="powerdown-ignored-reset",
        how="system_powerdown ignored, reset, poweroff",
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
        how="reset in the guest",
        expected=RUNS_ON,
        cause="",
        end=Qemu.reboot_guest,
    ),
    Scenario(
        name="reset-no-reboot",
        how="reset in the guest (-no-reboot)",
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
        how="stop, cont, poweroff in the guest",
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
        how="poweroff, reset, poweroff (-no-shutdown)",
        expected=USER,
        cause="guest-shutdown",
        options=("-no-shutdown",),
        prepare=power_off_and_come_back,
        end=power_off_and_quit,
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
