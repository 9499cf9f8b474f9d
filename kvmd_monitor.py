"""The monitor of one instance: connect, listen, judge, write the shutdown file.

Owns the instance's connection, its phase and retries, what is known of its guest, and
the last verdict, which `kvmd_shutdown_file` carries out. Whatever changes is in the
journal before it is taken out of the socket, and the shutdown file is made before that:
a daemon that is killed leaves either the event in the socket or its effect in the
journal. Knows nothing of other instances; what all share is in `kvmd_context`.

A record in the journal has these members; one that there is nothing to say of is left
out:

    instance, suffix   the name of the monitor socket
    socket             a hash of its identity (`kvmd_socket`)
    phase              a value of `Phase`
    since              when the phase began, or for `not greeted` the wait for the
                       greeting (CLOCK_MONOTONIC, seconds)
    guest              the guest's state (`kvmd_verdict.Guest`)
    last               the last verdict (`kvmd_shutdown_file.LastVerdict`)

and with a connection

    connection         the inode number of the daemon's end
    qemu, pid          QEMU's version, null before the greeting, and process
    protocol           what was read (`kvmd_qmp.Protocol`)
    peeked             number and checksum of the bytes that are acted on, and may still
                       be in the socket
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time

from kvmd_connection import HOSTILE_PAUSE, Connection
from kvmd_context import LISTENING_LIFETIME, PATIENCE, MonitorContext, Phase
from kvmd_qmp import Event, Greeting, Protocol, Status
from kvmd_shutdown_file import LastVerdict
from kvmd_socket import SocketFile, socket_status
from kvmd_verdict import Guest, Ruling, Verdict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Seconds until the second attempt to connect: QEMU listens some ten microseconds after
#: it has bound its socket, and the kernel makes a sleep 50 us longer. The delay doubles
#: with each attempt, up to the longest.
LISTEN_DELAY = 0.00005
LONGEST_DELAY = 1.0
#: Seconds until the first attempt where there was a connection before.
FIRST_DELAY = 0.001
#: Seconds for which QEMU may still listen when it has removed its socket's name. By
#: then, `MonitorContext.is_listened_on` has read the names anew.
LONGEST_EXIT = LISTENING_LIFETIME + 1.0
#: Seconds between attempts to write a shutdown file.
FILE_RETRY = 1.0
#: A degraded state and its consequence (`Log.begin_trouble`).
OUT_OF_DESCRIPTORS = (
    "out of file descriptors",
    "the next instances wait until one comes free (raise the daemon's limit, ulimit"
    " -Hn)",
)


#: The phases in which a monitor without a connection tries to get one.
ATTEMPTING = {Phase.CONNECTING, Phase.WAITING, Phase.SILENT}


class Monitor:
    """The monitor of one instance.

    Every step (`connect`, `receive`, `on_timer` and so on) ends with the journal in
    line with what it has changed.
    """

    __slots__ = (
        "_context",
        "_delay",
        "_is_saved",
        "_version",
        "connection",
        "due",
        "guest",
        "instance",
        "last",
        "phase",
        "since",
        "socket_file",
        "suffix",
    )

    def __init__(self, instance: str, suffix: str, context: MonitorContext) -> None:
        self.instance = instance
        self.suffix = suffix
        self.phase = Phase.CONNECTING
        #: When the phase began, and when the timer is due (time.monotonic()).
        self.since = time.monotonic()
        self.due: float | None = None
        #: The socket that it is about. Another is a new QEMU's, for a new monitor.
        self.socket_file = SocketFile()
        self.guest = Guest()
        #: The last verdict, None if there was none.
        self.last: LastVerdict | None = None
        self.connection: Connection | None = None
        self._context = context
        self._delay = LISTEN_DELAY
        self._version: str | None = None
        #: Whether the journal has it as it stands, or nothing is worth a record yet.
        self._is_saved = True

    @property
    def path(self) -> str:
        """The monitor socket."""
        return f"{self._context.control_dir}/{self.instance}{self.suffix}"

    def is_idle(self) -> bool:
        """Tell whether nothing is lost when the monitor is dropped."""
        is_done = not (self.is_pending or self.guest.is_alive)
        return self.connection is None and is_done

    @property
    def is_pending(self) -> bool:
        """Whether the shutdown file is still to be brought in line with the verdict."""
        return self.last is not None and self.last.is_pending

    def drop_pending(self) -> None:
        """Don't carry out any more what could not be: another QEMU stands there."""
        if self.last is not None and self.last.is_pending:
            self.last = self._context.files.supersede(
                self.instance, self.last.ruling, self.last.event
            )
            self._is_saved = False
            self._save()

    # Connecting.

    def connect(self) -> None:
        """Try to connect; set a timer for the next attempt where it makes sense."""
        if not self.socket_file.is_at(self.path):
            self.on_removed()
            return
        try:
            connected = self._context.connect(self.path)
        except OSError as error:
            self._wait(error)
            self._save()
        else:
            store = self._context.store
            self.connection = Connection(connected, Protocol(), store.is_enabled)
            store.store(connected)
            self._negotiate()
            self._context.loop.register(self.connection, self)

    def _negotiate(self) -> None:
        """Negotiate on a connection that was not greeted yet.

        Where it is kept, that is known before QEMU has anything to tell on it;
        elsewhere, it is worth no record before it is greeted.
        """
        if self.phase is not Phase.SILENT:  # else the warning was logged already
            self.phase, self.since = Phase.AWAITING_GREETING, time.monotonic()
            self._context.expect_greeting(self)
        if self._context.store.is_enabled:
            self._is_saved = False
        self._save()
        assert self.connection is not None
        self.connection.negotiate()

    def _wait(self, error: OSError) -> None:
        """Wait for what it takes to connect, by the reason why that failed."""
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            self._context.log.begin_trouble(*OUT_OF_DESCRIPTORS)
            if self.phase is not Phase.WAITING:
                self._enter(Phase.WAITING)
            self._context.loop.set_timer(self, LONGEST_DELAY)
            return
        if self.phase in {Phase.WAITING, Phase.GONE}:
            self._enter(Phase.CONNECTING)
        is_dead = self.phase is Phase.DEAD
        patient = not is_dead and time.monotonic() - self.since < PATIENCE
        if error.errno == errno.ENOENT:
            self._enter(Phase.GONE)
        elif error.errno == errno.EAGAIN or patient:
            self._try_again()
            # EAGAIN: the backlog is full, so somebody does listen.
            if is_dead:
                self._enter(Phase.CONNECTING)
            elif self.phase is Phase.CONNECTING and not patient:
                self.on_overdue()
        elif not is_dead:
            self._enter(Phase.DEAD)
            text = (
                f"nobody to talk to on {self.path} ({error.strerror}); looking again at"
                " each rescan"
            )
            if error.errno == errno.ECONNREFUSED:
                self._context.log.debug(text, self.instance)
            else:
                self._context.log.warning(text, self.instance)

    def _try_again(self) -> None:
        """Set the timer for the next attempt to connect, twice as long each time."""
        self._context.loop.set_timer(self, self._delay)
        self._delay = min(2 * self._delay, LONGEST_DELAY)

    def on_timer(self) -> None:
        """Do what the timer was set for."""
        may_be_back = self.phase is Phase.GONE and self.guest.is_alive
        if self.connection is None and (self.phase in ATTEMPTING or may_be_back):
            self.connect()
        if self.is_pending:
            self.retry_file()

    def retry_file(self) -> None:
        """Try again to bring the shutdown file in line with the verdict."""
        assert self.last is not None
        if self.socket_file.is_replaced_at(self.path):
            self.drop_pending()
            return
        with contextlib.suppress(OSError):  # it was told of at the first time
            self.last = self._context.files.write(self.instance, self.last)
        self._is_saved = False
        self._save()

    def on_overdue(self) -> None:
        """Take note that there was no greeting in time."""
        self.phase = Phase.SILENT
        self._is_saved = False
        self._save()
        self._context.log.warning(
            f"no greeting on {self.path} for {PATIENCE:.0f} s; QEMU serves one client"
            " at a time, and another one may be connected",
            self.instance,
        )

    def on_removed(self) -> None:
        """Take note that the name is gone: what stands there next may be new."""
        if self.connection is not None:
            return
        if self.phase is Phase.GONE:
            self._judge_unobserved_end()
        else:
            self._enter(Phase.GONE)
        self._save()

    # Listening.

    def close(self) -> None:
        """Close the connection, if there is one."""
        connection, self.connection = self.connection, None
        if connection is not None:
            self._context.close(connection)

    def receive(self) -> bool:
        """Read once, and act on it; tell whether there may be more to read now."""
        connection = self.connection
        received = connection.read() if connection else None
        if connection is None or received is None:
            return False
        data, with_descriptors = received
        size = connection.protocol.pending + len(data)
        self._take(data, connection)
        if not data:
            self._end(connection)
        was_saved = not self._is_saved
        self._save()
        connection.consume()
        pause = connection.charge(data, size, was_saved)
        if with_descriptors:
            pause = HOSTILE_PAUSE
            self._context.log.warning(
                "a descriptor came along, which QEMU does not send: someone else speaks"
                f" on {self.path}; listening again in {pause:.0f} s",
                self.instance,
            )
        if pause and data:
            self._context.loop.pause(connection, pause)
        return bool(data) and not pause

    def _take(self, data: bytes, connection: Connection) -> None:
        """Act on what was read."""
        log, protocol = self._context.log, connection.protocol
        if log.debugging:
            for line in data.splitlines():
                log.debug(f"<-- {line!r}", self.instance)
        complaint, kept = protocol.complaint, connection.export_kept()
        messages = protocol.receive(data)
        if messages:
            self._act_on(messages, connection)
        if connection.export_kept() != kept:
            self._is_saved = False
        if protocol.complaint != complaint:
            self._is_saved = False
            log.warning(
                f"skipping what QEMU should not say ({protocol.complaint})",
                self.instance,
            )

    def _act_on(
        self, messages: list[Greeting | Status | Event], connection: Connection
    ) -> None:
        """Act on what QEMU says.

        Only the last ruling of one read changes the file: a guest that goes down and
        comes back all the time can't flood inotify.
        """
        guest = self.guest.state()
        last = None
        for message in messages:
            ruling, event = None, None
            if isinstance(message, Greeting):
                self._version = message.version
                self._enter(Phase.CONNECTED)
                self._context.log.info(
                    f"connected to QEMU {message.version}, pid {connection.peer_pid} on"
                    f" {self.path}",
                    self.instance,
                )
            elif isinstance(message, Status):
                ruling = self.guest.on_status(message.status)
            else:
                ruling, event = self.guest.on_event(*message), message.time
            last = (ruling, event) if ruling else last
        if last is not None:
            self._carry_out(*last)
        if self.guest.state() != guest:
            self._is_saved = False

    def _end(self, connection: Connection) -> None:
        """Take the end of the connection.

        Without a greeting, QEMU may have been exiting already: that says nothing.
        """
        ruling = self.guest.on_end() if self.phase is Phase.CONNECTED else None
        if ruling is not None:
            self._carry_out(ruling, None)
        lasted = time.monotonic() - self.since
        self.connection = None
        if socket_status(self.path) is None:
            self._enter(Phase.GONE)
        elif self.guest.ruling is not None:
            self._enter(Phase.ENDED)
        else:
            # A peer that closes at once, again and again, must not keep us busy.
            delay = FIRST_DELAY if lasted > LONGEST_DELAY else self._delay
            self._delay = max(delay, FIRST_DELAY)
            self._enter(Phase.CONNECTING)
            self._try_again()
        self._save()
        self._context.close(connection)

    def abandon(self) -> None:
        """Give the connection up after an unexpected error; try again, slowly.

        Nothing is saved: that may be what failed.
        """
        self.close()
        self._enter(Phase.CONNECTING)
        self._delay = LONGEST_DELAY
        self._context.loop.set_timer(self, LONGEST_DELAY)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = time.monotonic()
        self._is_saved = False
        if phase is Phase.GONE or phase is Phase.DEAD:
            self._judge_unobserved_end()

    # The verdict.

    def _judge_unobserved_end(self) -> None:
        """Take note of a guest that went down while there was no connection.

        A running guest has no shutdown file. If one exists, an earlier daemon made it
        and was killed before it wrote the journal.
        """
        if self.connection is not None or not self.guest.is_alive:
            return
        if self.phase is Phase.GONE and self.socket_file.is_at(self.path):
            return  # the name is back
        name = self.instance + self.suffix
        if socket_status(self.path) is None and self._context.is_listened_on(name):
            # QEMU is about to end; or it goes on, and somebody has removed the name.
            if time.monotonic() - self.since < LONGEST_EXIT:
                self._context.loop.set_timer(self, LONGEST_EXIT)
            else:
                self.guest, self._is_saved = Guest(), False
            return
        self.guest.on_end()
        verdict = Verdict.NOT_USER
        text = "nobody can know whose doing it was, so it counts as a crash"
        path = self._context.files.path(self.instance)
        if os.path.exists(path) and not self.is_pending:
            verdict = Verdict.USER
            text = "its shutdown file was made, and counts"
        self._context.log.info(
            f"went down while it was not monitored; {text}", self.instance
        )
        self._carry_out(Ruling(verdict, "unobserved"), None)

    def _carry_out(self, ruling: Ruling, event: float | None) -> None:
        """Bring the shutdown file in line with a verdict, now or later.

        A file beside a new QEMU would be taken for a verdict on that one's guest.
        """
        carry_out = self._context.files.carry_out
        is_user = ruling.verdict is Verdict.USER
        if is_user and self.socket_file.is_replaced_at(self.path):
            carry_out = self._context.files.supersede
        self.last = carry_out(self.instance, ruling, event) or self.last
        self._is_saved = False

    # The record.

    def _save(self) -> None:
        """Have the journal in line with how things stand, and the file tried again."""
        if not self._is_saved:
            self._is_saved = True
            if self.is_pending and self.due is None:
                self._context.loop.set_timer(self, FILE_RETRY)
            if self.phase is Phase.GONE and self.is_idle():
                self._context.journal.forget(self.record())
            else:
                self._context.journal.write(self.record())

    def record(self) -> dict[str, Any]:
        """Return what the next program, or `--status`, has to know of the instance."""
        record: dict[str, Any] = {
            "instance": self.instance,
            "suffix": self.suffix,
            "socket": self.socket_file.identity,
            "phase": self.phase,
            "since": self.since,
            "guest": self.guest.export(),
        }
        if self.connection is not None:
            record.update(self.connection.export(), qemu=self._version)
        if self.last is not None:
            record["last"] = self.last._asdict()
        return record

    @classmethod
    def restore(
        cls,
        record: dict[str, Any],
        connected: socket.socket | None,
        context: MonitorContext,
    ) -> Monitor:
        """Return a monitor that goes on where the recorded one stood.

        Without its connection it connects anew, unless there is no more to be heard.
        Raises ValueError, TypeError, KeyError for what is no record.
        """
        monitor = cls(record["instance"], record["suffix"], context)
        monitor.socket_file = SocketFile(record["socket"])
        monitor.guest = Guest.restore(record["guest"])
        monitor.last = LastVerdict.restore(record.get("last"))
        phase, since = Phase(record["phase"]), float(record["since"])
        if connected is not None:
            protocol = Protocol.restore(record["protocol"])
            monitor.phase, monitor.since = phase, since
            monitor._version = record["qemu"]
            connection = Connection(connected, protocol, context.store.is_enabled)
            connection.consume_peeked(record.get("peeked"))
            context.store.store(connected)
            monitor.connection = connection
            context.loop.register(connection, monitor)
            if phase is not Phase.CONNECTED:
                monitor._negotiate()
        elif phase in {Phase.ENDED, Phase.GONE}:
            monitor.phase = phase
        if connected is None or monitor.is_pending:
            context.loop.set_timer(monitor, FIRST_DELAY)
        return monitor


def describe(record: dict[str, Any]) -> str:
    """Return a record's line in the status that SIGUSR1 has logged."""
    words = [record["phase"].value]
    if "connection" in record:
        began = time.time() - (time.monotonic() - record["since"])
        when = time.strftime("%F %T", time.localtime(began))
        words = [
            f"{words[0]} since {when}",
            f"QEMU {record['qemu'] or 'unknown'} pid {record['pid']}",
        ]
    if "powerdown_requested" in record["guest"]:
        words.append("powerdown requested")
    if "ruling" in record["guest"]:
        words.append(str(record["guest"]["ruling"]))
    return f"{record['instance']}{record['suffix']}: {', '.join(words)}"
