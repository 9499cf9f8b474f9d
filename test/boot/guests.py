"""Instances that go down before, during and after what is done to their daemon."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from cluster import CONTROL_DIR, expect
from fake_qemu import FakeQemu
from service import log, wait_until_watched

BEFORE, DURING, AFTER = "before", "during", "after"
PHASES = (BEFORE, DURING, AFTER)

#: Seconds from one guest to the next, of those that end in a row.
PACE = 0.003

_numbers = itertools.count(1)


class Guest(FakeQemu):
    """An instance that knows what has to be said of it."""

    def __init__(self, kind: str) -> None:
        super().__init__(CONTROL_DIR, f"{kind}{next(_numbers)}.example.org")
        self.is_running = False
        self.is_connected = False
        self._is_pressed = False
        #: What Ganeti has to find, and what the log has to say.
        self._has_file = False
        self._verdicts: list[str] = []

    def start(self) -> None:
        """Start, for the first time or anew; the daemon comes when it will."""
        self.listen()
        self.is_running = True
        self._has_file = self._is_pressed = False

    def connect(self) -> None:
        """Take the daemon through to the events, but none that has gone meanwhile."""
        while not self.is_connected:
            try:
                self.negotiate()
                self.is_connected = True
            except (ConnectionError, EOFError):
                self.disconnect()

    def disconnect(self) -> None:
        """Close the connection; go on listening."""
        super().disconnect()
        self.is_connected = False

    def press_power_button(self) -> None:
        """Ask the guest to power off, as Ganeti does."""
        self.event("POWERDOWN")
        self._is_pressed = True

    def power_off(self) -> None:
        """End as the user wants it, or as the guest was asked to."""
        self.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        self.exit()
        self._end_as("not-user" if self._is_pressed else "user")

    def terminate(self) -> None:
        """End by SIGTERM, as an administrator may have it."""
        self.event("SHUTDOWN", guest=False, reason="host-signal")
        self.exit()
        self._end_as("not-user")

    def die(self) -> None:
        """End by SIGKILL; what that leaves is removed at once."""
        self.crash()
        self.path.unlink()
        self._end_as("not-user")

    def be_lost(self) -> None:
        """End where nobody sees it, or can tell afterwards whose doing it was."""
        self.exit()
        self.is_running = False

    def be_noted(self) -> None:
        """Have Ganeti take note of the user's shutdown."""
        self.shutdown_file.unlink()
        self._has_file = False

    def judge_file(self) -> None:
        """Fail unless Ganeti finds what it has to find."""
        expect(str(self.shutdown_file), self.shutdown_file.exists(), self._has_file)

    def judge_log(self) -> None:
        """Fail unless each verdict was logged, once."""
        pattern = rf" INFO {re.escape(self.name)}: verdict=((?:not-)?user) "
        logged = re.findall(pattern, log())
        expect(f"verdicts on {self.name}", logged, self._verdicts)

    def vanish(self) -> None:
        """Leave nothing in the control directory."""
        self.exit()
        self.shutdown_file.unlink(missing_ok=True)

    def _end_as(self, verdict: str) -> None:
        self.is_running = False
        self._has_file = verdict == "user"
        self._verdicts.append(verdict)


class Life(NamedTuple):
    """When the power button is pressed, if it is; when and how the guest ends."""

    pressed: str | None
    ends: str
    end: Callable[[Guest], None]


#: Nothing is pressed after the end.
LIVES = [
    Life(pressed, ends, end)
    for end in (Guest.power_off, Guest.terminate, Guest.die)
    for number, ends in enumerate(PHASES, 1)
    for pressed in (None, *PHASES[:number])
]
#: Seven times: a few hundred milliseconds of guests that end one after the other.
ROW = [life for life in LIVES if life.ends == DURING] * 7


class Guests:
    """Guests of all kinds, and what they do before, during and after something."""

    def __init__(self) -> None:
        self._lives = [(Guest("web"), life) for life in LIVES]
        self._row = [(Guest("row"), life) for life in ROW]
        self._noted, self._restarted, self._new = map(Guest, ("noted", "again", "new"))
        self._all = [guest for guest, _ in self._lives + self._row]
        self._all += [self._noted, self._restarted, self._new]

    def start(self) -> None:
        """Start all but one, which the daemon may or may not be there to see."""
        for guest in self._all:
            if guest is not self._new:
                guest.start()

    def connect(self) -> None:
        """Wait until the daemon has connected to all that run."""
        for guest in self._running():
            guest.connect()
        self._settle()

    def do_before(self) -> None:
        """Do what is to be done before; wait until the daemon has seen it."""
        self._press(self._lives + self._row, BEFORE)
        self._end(BEFORE)
        self._noted.power_off()
        self._restarted.power_off()
        self._settle()
        self._noted.be_noted()

    def do_during(self, is_over: Callable[[], bool]) -> None:
        """Do what is to be done meanwhile, some of it for as long as that takes."""
        self._press(self._lives, DURING)
        self._end(DURING)
        self._restarted.start()
        self._new.start()
        while self._row and not is_over():
            self._end_next_of_row()
            time.sleep(PACE)

    def do_after(self) -> None:
        """Do the rest; wait until the daemon has seen it."""
        self._press(self._lives, AFTER)
        self._end(AFTER)
        while self._row:
            self._end_next_of_row()
        for guest in (self._restarted, self._new):
            guest.connect()
            guest.power_off()
        self._settle()

    def expect_connected(self) -> None:
        """Fail if the daemon has let go of a connection that it had before."""
        connected = [guest for guest in self._all if guest.is_connected]
        left = [guest.name for guest in connected if guest.client_has_left()]
        expect("connections let go of", left, [])

    def judge_files(self) -> None:
        """Fail unless Ganeti finds of each what it has to find."""
        for guest in self._all:
            guest.judge_file()

    def judge_log(self) -> None:
        """Fail unless each verdict was logged, once."""
        for guest in self._all:
            guest.judge_log()

    def vanish(self) -> None:
        """Leave nothing of them in the control directory."""
        for guest in self._all:
            guest.vanish()

    def _running(self) -> list[Guest]:
        return [guest for guest in self._all if guest.is_running]

    def _settle(self) -> None:
        wait_until_watched(len(self._running()))

    def _press(self, lives: list[tuple[Guest, Life]], phase: str) -> None:
        for guest, life in lives:
            if life.pressed == phase:
                guest.press_power_button()

    def _end(self, phase: str) -> None:
        for guest, life in self._lives:
            if life.ends == phase:
                life.end(guest)

    def _end_next_of_row(self) -> None:
        guest, life = self._row.pop(0)
        if life.pressed == DURING:
            guest.press_power_button()
        life.end(guest)
