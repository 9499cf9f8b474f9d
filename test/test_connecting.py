"""Connecting: to peers that are late, silent, busy, dead, hostile, or new."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from daemon import INSTANCE, Daemon
from deadline import wait_until
from fake_qemu import FakeQemu, event_line
from status import status_table, wait_for_status
from variant import program_with

from kvmd_socket import LONGEST_SOCKET_PATH

SOCKET = f"{INSTANCE}.kvmd"

# Half a second stands for the ten that the daemon waits for a listener or a greeting,
# and a twentieth for the fifteen between two rescans.
IMPATIENT = "kvmd_context.PATIENCE = kvmd_monitor.PATIENCE = 0.5"
RESCAN = "--rescan-interval=0.05"

StartFakeQemu = Callable[..., FakeQemu]


@pytest.fixture
def impatient(control_dir: Path) -> Iterator[Daemon]:
    """Return a daemon that waits half a second where others wait ten."""
    program = program_with(control_dir.parent, IMPATIENT)
    with Daemon(control_dir, RESCAN, program=program) as daemon:
        yield daemon
        daemon.stop()


@pytest.fixture
def make_fake_qemu(control_dir: Path) -> Iterator[StartFakeQemu]:
    """Return a function that makes a fake QEMU, not bound yet."""
    with ExitStack() as ending:
        yield lambda name, suffix=".kvmd": ending.enter_context(
            FakeQemu(control_dir, name, suffix)
        )


def power_off(daemon: Daemon, qemu: FakeQemu, verdicts: int = 1) -> None:
    """End the guest as its user would; the daemon's n-th verdict has to say so."""
    qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    assert " verdict=user " in daemon.wait_for_verdict(qemu.name, verdicts)
    assert qemu.shutdown_file.exists()


def wait_for_rescan(daemon: Daemon, qemu: FakeQemu) -> None:
    """Wait until a socket is found that only a rescan can find: nobody listened."""
    qemu.bind()
    wait_for_status(daemon, qemu.path.name, "dead")
    qemu.listen()
    qemu.negotiate()
    daemon.wait_until_connected(qemu.name)


def connect_client(path: Path) -> socket.socket:
    """Connect another client to the monitor socket, without waiting."""
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    try:
        client.connect(str(path))
    except BaseException:
        client.close()
        raise
    return client


def fill_backlog(path: Path) -> list[socket.socket]:
    """Connect clients until the next one is turned away."""
    clients: list[socket.socket] = []
    while True:
        try:
            clients.append(connect_client(path))
        except BlockingIOError:
            return clients


# ---- Late, silent, busy --------------------------------------------------------------


def test_a_socket_that_is_bound_before_it_listens_is_connected(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.bind()
    wait_for_status(daemon, SOCKET, "connecting")
    fake_qemu.listen()
    fake_qemu.negotiate()
    power_off(daemon, fake_qemu)


def test_a_full_backlog_is_told_of_once_and_waited_for(
    control_dir: Path, fake_qemu: FakeQemu, make_fake_qemu: StartFakeQemu
) -> None:
    fake_qemu.listen()
    clients = fill_backlog(fake_qemu.path)
    program = program_with(control_dir.parent, IMPATIENT)
    with Daemon(control_dir, RESCAN, program=program) as daemon:
        daemon.wait_for_log(f" WARNING {INSTANCE}: no greeting on .*{SOCKET}")
        wait_for_rescan(daemon, make_fake_qemu("refusing"))
        assert status_table(daemon)[SOCKET] == "not greeted"
        for client in clients:
            fake_qemu.accept()
            fake_qemu.disconnect()
            client.close()
        fake_qemu.accept()
        wait_for_status(daemon, SOCKET, "not greeted since")
        assert daemon.log.count(f" WARNING {INSTANCE}: ") == 1
        fake_qemu.disconnect()
        fake_qemu.negotiate()
        power_off(daemon, fake_qemu)
        daemon.stop()


def test_a_peer_without_a_greeting_is_told_of_once_and_waited_for(
    impatient: Daemon, fake_qemu: FakeQemu, make_fake_qemu: StartFakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.accept()
    impatient.wait_for_log(f" WARNING {INSTANCE}: no greeting on .*{SOCKET}")
    wait_for_rescan(impatient, make_fake_qemu("refusing"))
    fake_qemu.greet()
    impatient.wait_until_connected(INSTANCE)
    fake_qemu.answer("qmp_capabilities", {})
    fake_qemu.answer("query-status", {"status": "running"})
    fake_qemu.send(event_line("SHUTDOWN", guest=True, reason="guest-shutdown"))
    assert " verdict=user " in impatient.wait_for_verdict(INSTANCE)
    assert impatient.log.count(f" WARNING {INSTANCE}: ") == 1


def test_a_socket_that_another_client_holds_is_waited_for(
    impatient: Daemon, control_dir: Path, fake_qemu: FakeQemu
) -> None:
    # Listens under a name of no instance, so that the other client is the first.
    hidden = FakeQemu(control_dir, INSTANCE, ".hidden")
    hidden.listen()
    with connect_client(hidden.path), hidden:
        hidden.accept()
        hidden.path.rename(fake_qemu.path)
        hidden.path = fake_qemu.path
        impatient.wait_for_log(f" WARNING {INSTANCE}: no greeting .* another one")
        hidden.disconnect()
        hidden.negotiate()
        impatient.wait_until_connected(INSTANCE)
        power_off(impatient, hidden)
        assert impatient.log.count(" WARNING ") == 1


# ---- Dead, and alive again -----------------------------------------------------------


def test_a_dead_socket_is_left_quietly_to_the_rescan(
    impatient: Daemon, fake_qemu: FakeQemu
) -> None:
    wait_for_rescan(impatient, fake_qemu)
    assert f" WARNING {INSTANCE}: nobody to talk to" not in impatient.log
    power_off(impatient, fake_qemu)


def test_dead_sockets_of_crashed_guests_leave_room_for_their_next_start(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    fake_qemu.crash()
    assert " verdict=not-user " in daemon.wait_for_verdict(INSTANCE)
    wait_for_status(daemon, SOCKET, "connecting")
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE, times=2)
    fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    assert " verdict=user " in daemon.wait_for_verdict(INSTANCE, times=2)
    assert " WARNING " not in daemon.log


def test_a_thousand_dead_sockets_delay_no_live_one(
    control_dir: Path, fake_qemu: FakeQemu
) -> None:
    for number in range(1000):
        with FakeQemu(control_dir, f"dead{number}") as qemu:
            qemu.bind()
            qemu.crash()
            qemu.path = control_dir / "none"
    fake_qemu.listen()
    with Daemon(control_dir) as daemon:
        fake_qemu.negotiate()
        power_off(daemon, fake_qemu)
        daemon.stop()


# ---- Old connections, new processes --------------------------------------------------


def rebind_with_same_inode(qemu: FakeQemu, inode: int) -> None:
    """Bind anew, with that inode number where the file system gives it again."""
    for _ in range(20):
        qemu.bind()
        if qemu.path.stat().st_ino == inode:
            break


def test_what_is_left_on_an_old_connection_is_read_before_the_new_one_is_taken(
    daemon: Daemon, fake_qemu: FakeQemu, make_fake_qemu: StartFakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    inode = fake_qemu.path.stat().st_ino
    with daemon.frozen():
        fake_qemu.send(event_line("RTC_CHANGE", offset=0) * 400)
        fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        fake_qemu.crash()
        fake_qemu.path.unlink()
        successor = make_fake_qemu(INSTANCE)
        rebind_with_same_inode(successor, inode)
        successor.listen()
    verdict = daemon.wait_for_verdict(INSTANCE)
    assert " verdict=user " in verdict and " file=superseded " in verdict
    assert not successor.shutdown_file.exists()
    successor.negotiate()
    daemon.wait_until_connected(INSTANCE, times=2)


def test_a_new_process_begins_with_a_clean_slate(
    daemon: Daemon, fake_qemu: FakeQemu, make_fake_qemu: StartFakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    fake_qemu.event("POWERDOWN")
    wait_until(lambda: "powerdown" in status_table(daemon)[SOCKET], "it was read")
    successor = make_fake_qemu(INSTANCE)
    successor.listen()
    successor.negotiate()
    daemon.wait_until_connected(INSTANCE, times=2)
    power_off(daemon, successor)


def test_an_end_without_a_greeting_gives_no_verdict(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.shutdown_file.touch()
    fake_qemu.listen()
    fake_qemu.accept()
    fake_qemu.disconnect()
    fake_qemu.accept()
    fake_qemu.exit()
    wait_until(lambda: not status_table(daemon), "the instance is gone")
    assert fake_qemu.shutdown_file.exists()
    assert ": verdict=" not in daemon.log


def test_events_before_the_greeting_give_no_verdict(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.accept()
    fake_qemu.send(event_line("SHUTDOWN", guest=True, reason="guest-shutdown"))
    fake_qemu.exit()
    wait_until(lambda: not status_table(daemon), "the instance is gone")
    assert ": verdict=" not in daemon.log


def test_a_socket_is_not_connected_to_again_after_a_shutdown(
    impatient: Daemon, fake_qemu: FakeQemu, make_fake_qemu: StartFakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    power_off(impatient, fake_qemu)
    fake_qemu.disconnect()
    wait_for_status(impatient, SOCKET, "ended")
    wait_for_rescan(impatient, make_fake_qemu("other"))
    assert status_table(impatient)[SOCKET].startswith("ended")
    assert impatient.log.count(f" {INSTANCE}: connected") == 1


def test_a_connection_that_ends_without_a_shutdown_is_made_anew(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE)
    fake_qemu.disconnect()
    fake_qemu.negotiate()
    daemon.wait_until_connected(INSTANCE, times=2)
    fake_qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    assert " verdict=user " in daemon.wait_for_verdict(INSTANCE, times=2)


# ---- Hostile -------------------------------------------------------------------------


class DoorSlammer(threading.Thread):
    """Takes every client, sends it something, and closes at once."""

    def __init__(self, path: Path, words: bytes) -> None:
        super().__init__()
        self.visits = 0
        self._words = words
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)

    def run(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with client:
                if client.recv(1) == b"!":
                    return
                self.visits += 1
                client.sendall(self._words)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self._listener.getsockname())
            client.send(b"!")
            self.join()
        self._listener.close()


GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}}}\r\n'
    b'{"return": {}}\r\n{"return": {"status": "running"}, "id": "kvmd-status"}\r\n'
)


@pytest.mark.parametrize("words", [b"", b"\xff\n", GREETING], ids=repr)
def test_a_peer_that_closes_at_once_is_visited_a_few_times_a_second_at_most(
    daemon: Daemon, control_dir: Path, words: bytes
) -> None:
    slammer = DoorSlammer(control_dir / SOCKET, words[:])
    slammer.start()
    try:
        wait_until(lambda: slammer.visits > 3, "the first visits")
        started, before = time.monotonic(), slammer.visits
        wait_until(lambda: slammer.visits > before + 7, "further visits")
        assert time.monotonic() - started > 0.8
    finally:
        slammer.close()


def test_a_peer_that_never_answers_costs_nothing(
    daemon: Daemon, fake_qemu: FakeQemu, make_fake_qemu: StartFakeQemu
) -> None:
    fake_qemu.listen()
    fake_qemu.accept()
    fake_qemu.greet()
    daemon.wait_until_connected(INSTANCE)
    other = make_fake_qemu("other")
    other.listen()
    other.negotiate()
    power_off(daemon, other)
    fake_qemu.send(event_line("SHUTDOWN", guest=True, reason="guest-shutdown"))
    assert " verdict=user " in daemon.wait_for_verdict(INSTANCE)


# ---- Suffixes and names --------------------------------------------------------------


def is_called_on(qemu: FakeQemu) -> bool:
    """Tell whether a client waits to be accepted."""
    assert qemu._listener
    qemu._listener.setblocking(False)
    try:
        client, _ = qemu._listener.accept()
    except BlockingIOError:
        return False
    finally:
        qemu._listener.settimeout(20)
    client.close()
    return True


def test_auto_uses_a_qmp_that_has_stood_alone_for_a_second(
    daemon: Daemon, make_fake_qemu: StartFakeQemu
) -> None:
    qemu = make_fake_qemu(INSTANCE, ".qmp")
    born = time.monotonic()
    qemu.listen()
    qemu.negotiate()
    assert time.monotonic() - born >= 1.0
    power_off(daemon, qemu)


def test_auto_never_touches_a_qmp_that_a_kvmd_follows(
    daemon: Daemon, make_fake_qemu: StartFakeQemu
) -> None:
    qmp, kvmd = make_fake_qemu(INSTANCE, ".qmp"), make_fake_qemu(INSTANCE, ".kvmd")
    started = time.monotonic()
    qmp.listen()
    kvmd.listen()
    in_time = time.monotonic() - started < 1.0
    kvmd.negotiate()
    daemon.wait_until_connected(INSTANCE)
    later = make_fake_qemu("later", ".qmp")
    later.listen()
    later.negotiate()
    daemon.wait_until_connected("later")
    assert not (in_time and is_called_on(qmp))
    power_off(daemon, kvmd)


def test_auto_lets_go_of_the_qmp_when_a_kvmd_appears(
    daemon: Daemon, make_fake_qemu: StartFakeQemu
) -> None:
    qmp, kvmd = make_fake_qemu(INSTANCE, ".qmp"), make_fake_qemu(INSTANCE, ".kvmd")
    qmp.listen()
    qmp.negotiate()
    daemon.wait_until_connected(INSTANCE)
    kvmd.listen()
    qmp.wait_until_client_leaves()
    kvmd.negotiate()
    daemon.wait_until_connected(INSTANCE, times=2)
    power_off(daemon, kvmd)
    assert not is_called_on(qmp)


def test_auto_connects_once_to_a_kvmd_that_takes_the_place_of_a_qmp(
    daemon: Daemon, make_fake_qemu: StartFakeQemu
) -> None:
    qmp, kvmd = make_fake_qemu(INSTANCE, ".qmp"), make_fake_qemu(INSTANCE, ".kvmd")
    qmp.listen()
    qmp.negotiate()
    daemon.wait_until_connected(INSTANCE)
    with daemon.frozen():
        qmp.event("RESUME")
        qmp.exit()
        kvmd.listen()
    kvmd.negotiate()
    daemon.wait_until_connected(INSTANCE, times=2)
    power_off(daemon, kvmd, verdicts=2)  # the first one was on the .qmp's end
    assert not is_called_on(kvmd)


def test_auto_goes_back_to_the_qmp_when_the_kvmd_is_gone(
    daemon: Daemon, make_fake_qemu: StartFakeQemu
) -> None:
    qmp, kvmd = make_fake_qemu(INSTANCE, ".qmp"), make_fake_qemu(INSTANCE, ".kvmd")
    kvmd.listen()
    qmp.listen()
    kvmd.negotiate()
    daemon.wait_until_connected(INSTANCE)
    kvmd.exit()
    qmp.negotiate()
    daemon.wait_until_connected(INSTANCE, times=2)


@pytest.mark.parametrize(("suffix", "other"), [(".kvmd", ".qmp"), (".qmp", ".kvmd")])
def test_a_single_suffix_uses_that_socket_only_and_at_once(
    control_dir: Path, make_fake_qemu: StartFakeQemu, suffix: str, other: str
) -> None:
    program = program_with(control_dir.parent, "kvmd_instances.SETTLING_TIME = 3600.0")
    with Daemon(control_dir, "--socket-suffix", suffix, program=program) as daemon:
        ignored = make_fake_qemu("ignored", other)
        ignored.listen()
        spared = make_fake_qemu(INSTANCE, other)
        spared.listen()
        used = make_fake_qemu(INSTANCE, suffix)
        used.listen()
        used.negotiate()
        power_off(daemon, used)
        assert set(status_table(daemon)) == {used.path.name}
        assert not is_called_on(spared) and not is_called_on(ignored)
        daemon.stop()


@pytest.mark.parametrize(
    "name", ["a", "a.b.c.example.com", "a.qmp", "a.kvmd", ".hidden", "-rf", "a b", "é"]
)
def test_only_the_last_suffix_is_not_of_the_name(
    daemon: Daemon, make_fake_qemu: StartFakeQemu, name: str
) -> None:
    qemu = make_fake_qemu(name)
    qemu.listen()
    qemu.negotiate()
    power_off(daemon, qemu)


def test_what_has_no_name_or_no_suffix_is_no_instance(
    daemon: Daemon, control_dir: Path, make_fake_qemu: StartFakeQemu
) -> None:
    for name in [".kvmd", ".qmp", "kvmd", "a.kvmd.old", "a.KVMD", "a.monitor", "akvmd"]:
        make_fake_qemu(name, "").listen()
    last = make_fake_qemu("last")
    last.listen()
    last.negotiate()
    daemon.wait_until_connected("last")
    assert set(status_table(daemon)) == {"last.kvmd"}


def test_what_is_no_socket_is_ignored(
    daemon: Daemon, control_dir: Path, make_fake_qemu: StartFakeQemu
) -> None:
    elsewhere = make_fake_qemu("elsewhere", "")
    elsewhere.listen()
    (control_dir / "regular.kvmd").touch()
    (control_dir / "directory.kvmd").mkdir()
    os.mkfifo(control_dir / "fifo.kvmd")
    (control_dir / "symlink.kvmd").symlink_to(elsewhere.path)
    (control_dir / "dangling.kvmd").symlink_to("nowhere")
    last = make_fake_qemu("last")
    last.listen()
    last.negotiate()
    daemon.wait_until_connected("last")
    assert set(status_table(daemon)) == {"last.kvmd"}
    assert not is_called_on(elsewhere)
    assert " WARNING " not in daemon.log


def test_a_socket_in_the_place_of_what_was_none_is_found(
    daemon: Daemon, fake_qemu: FakeQemu
) -> None:
    fake_qemu.path.touch()
    fake_qemu.listen()
    fake_qemu.negotiate()
    power_off(daemon, fake_qemu)


def bind_with_path_of(length: int, control_dir: Path) -> tuple[str, socket.socket]:
    """Make a listening socket whose path has so many bytes; return its instance."""
    name = "x" * (length - len(os.fsencode(control_dir)) - len("/.kvmd"))
    listener = socket.socket(socket.AF_UNIX)
    directory = os.open(control_dir, os.O_PATH)
    listener.bind(f"/proc/self/fd/{directory}/{name}.kvmd")
    os.close(directory)
    listener.listen(1)
    return name, listener


def test_a_path_of_107_bytes_is_connected_and_a_longer_one_told_of_once(
    impatient: Daemon, control_dir: Path, make_fake_qemu: StartFakeQemu
) -> None:
    long_name, unreachable = bind_with_path_of(108, control_dir)
    name, listener = bind_with_path_of(107, control_dir)
    with listener, unreachable:
        wait_for_status(impatient, f"{name}.kvmd", "not greeted")
        impatient.wait_for_log(f" WARNING .*/{long_name}.kvmd: ignored")
        wait_for_rescan(impatient, make_fake_qemu("other"))
        assert set(status_table(impatient)) == {f"{name}.kvmd", "other.kvmd"}
        assert impatient.log.count(f"{long_name}.kvmd: ignored") == 1


# ---- A .qmp that is left to Ganeti ---------------------------------------------------


def test_a_qmp_is_left_to_ganeti_while_qemu_listens_on_a_removed_kvmd(
    control_dir: Path, make_fake_qemu: StartFakeQemu
) -> None:
    qmp, kvmd = make_fake_qemu(INSTANCE, ".qmp"), make_fake_qemu(INSTANCE, ".kvmd")
    qmp.listen()
    kvmd.listen()
    kvmd.path.unlink()
    with Daemon(control_dir) as daemon:
        daemon.wait_for_log(
            f" WARNING .*{INSTANCE}.qmp: left to Ganeti: .*"
            f" gnt-instance reboot {INSTANCE}$"
        )
        assert not is_called_on(qmp)
        kvmd.exit()
        kvmd.listen()
        kvmd.negotiate()
        daemon.wait_until_connected(INSTANCE)
        power_off(daemon, kvmd)
        daemon.stop()


def test_a_qmp_that_is_used_for_want_of_a_kvmd_is_worth_a_warning(
    daemon: Daemon, make_fake_qemu: StartFakeQemu
) -> None:
    qmp = make_fake_qemu(INSTANCE, ".qmp")
    qmp.listen()
    qmp.negotiate()
    daemon.wait_for_log(f" INFO {INSTANCE}: connected .*{INSTANCE}.qmp$")
    daemon.wait_for_log(f" WARNING .*{INSTANCE}.qmp: used, since there is no ")


def test_a_qmp_that_was_used_once_and_is_left_to_ganeti_now_is_told_of_anew(
    daemon: Daemon, make_fake_qemu: StartFakeQemu
) -> None:
    qmp, kvmd = make_fake_qemu(INSTANCE, ".qmp"), make_fake_qemu(INSTANCE, ".kvmd")
    qmp.listen()
    qmp.negotiate()
    daemon.wait_until_connected(INSTANCE)
    qmp.exit()
    with daemon.frozen():
        kvmd.listen()
        kvmd.path.unlink()
        qmp.listen()
    daemon.wait_for_log(f" WARNING .*{INSTANCE}.qmp: left to Ganeti: ")


def test_many_a_qmp_that_is_alone_takes_one_look_at_who_listens(
    control_dir: Path, make_fake_qemu: StartFakeQemu
) -> None:
    look = "names = kvmd_context.listening_names\n"
    count = "lambda path: print('looked', file=sys.stderr) or names(path)"
    program = program_with(
        control_dir.parent, f"{look}kvmd_context.listening_names = {count}"
    )
    for number in range(100):
        make_fake_qemu(f"web{number}", ".qmp").listen()
    with Daemon(control_dir, program=program) as daemon:
        daemon.wait_for_log(" WARNING .*: used, since there is no ", 100)
        assert 1 <= daemon.stderr.count("looked\n") <= 3


def test_without_a_look_at_who_listens_a_qmp_is_left_alone(
    control_dir: Path, make_fake_qemu: StartFakeQemu
) -> None:
    with Daemon(control_dir, "--rescan-interval=0") as daemon:
        limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (5, limits[1]))
        qmp = make_fake_qemu(INSTANCE, ".qmp")
        qmp.listen()
        daemon.wait_for_log(" WARNING which sockets are listened on can't be told")
        assert ": used, since" not in daemon.log
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
        qmp.negotiate()
        daemon.wait_until_connected(INSTANCE)
        daemon.stop()


def test_a_kvmd_with_too_long_a_path_does_not_hide_the_qmp(
    daemon: Daemon, control_dir: Path, make_fake_qemu: StartFakeQemu
) -> None:
    name, unreachable = bind_with_path_of(LONGEST_SOCKET_PATH + 1, control_dir)
    with unreachable:
        qmp = make_fake_qemu(name, ".qmp")
        qmp.listen()
        qmp.negotiate()
        daemon.wait_until_connected(name)
        daemon.wait_for_log(f" WARNING .*{name}.kvmd: ignored: its path is longer ")
