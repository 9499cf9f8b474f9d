"""Watch one directory that may not be there yet.

`Inotify` is a thin wrapper over inotify(7). `DirectoryWatch` keeps watches on a
directory and on every parent of it. While the directory is missing it waits at the
deepest parent that exists, and goes down as the path is made; when any part of the
path is removed or renamed away, it goes up again. Of the kernel's events three things
are told: the names in the directory that came or went, that the path changed, that
events were lost. A mount over a part of the path, or a symlink replaced, gives no event
at all: `DirectoryWatch.follow` finds out.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import os
import struct

# inotify(7), <sys/inotify.h>
IN_MOVED_FROM = 0x00000040
IN_MOVED_TO = 0x00000080
IN_CREATE = 0x00000100
IN_DELETE = 0x00000200
IN_DELETE_SELF = 0x00000400
IN_MOVE_SELF = 0x00000800
IN_Q_OVERFLOW = 0x00004000
IN_IGNORED = 0x00008000
IN_ONLYDIR = 0x01000000
IN_DONT_FOLLOW = 0x02000000
IN_NONBLOCK = os.O_NONBLOCK
IN_CLOEXEC = os.O_CLOEXEC

#: struct inotify_event without its name: wd, mask, cookie, len.
EVENT_HEADER = struct.Struct("iIII")
#: Bytes asked for in one read; some thousand events.
READ_SIZE = 65536


def parse_events(data: bytes) -> list[tuple[int, int, str]]:
    """Return the (watch descriptor, mask, name) of each event in what was read.

    The name is empty for an event of the watched directory itself.
    """
    events = []
    offset = 0
    while offset < len(data):
        wd, mask, _cookie, length = EVENT_HEADER.unpack_from(data, offset)
        offset += EVENT_HEADER.size
        name = data[offset : offset + length].rstrip(b"\0")
        offset += length
        events.append((wd, mask, os.fsdecode(name)))
    return events


class Inotify:
    """One inotify instance, non-blocking.

    Every method raises OSError as the system call does: EMFILE when the user's
    fs.inotify.max_user_instances is used up, ENOSPC for max_user_watches.
    """

    _libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self) -> None:
        self._fd = self._call("inotify_init1", IN_NONBLOCK | IN_CLOEXEC)

    def _call(self, function: str, *arguments: object) -> int:
        result: int = getattr(self._libc, function)(*arguments)
        if result == -1:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), function)
        return result

    def fileno(self) -> int:
        """Return the file descriptor, for a selector."""
        return self._fd

    def add_watch(self, path: str, mask: int) -> int:
        """Watch what the path names; return the watch descriptor of that inode."""
        path_bytes = ctypes.c_char_p(os.fsencode(path))
        return self._call(
            "inotify_add_watch", self._fd, path_bytes, ctypes.c_uint32(mask)
        )

    def rm_watch(self, wd: int) -> None:
        """End a watch. The kernel still queues an IN_IGNORED for it."""
        self._call("inotify_rm_watch", self._fd, wd)

    def read(self) -> list[tuple[int, int, str]]:
        """Return the events of one read, none if there are none."""
        try:
            return parse_events(os.read(self._fd, READ_SIZE))
        except BlockingIOError:
            return []

    def close(self) -> None:
        """Close the instance and all its watches."""
        os.close(self._fd)


#: What one read of the kernel's queue tells: the names in the directory that came or
#: went, in order, each with whether it came; whether the path changed; whether events
#: were lost.
Changes = collections.namedtuple("Changes", "names path_changed events_lost")

#: Each watch tells of the end of its own directory (IN_UNMOUNT comes unasked).
SELF = IN_DELETE_SELF | IN_MOVE_SELF
#: The directory itself: every name that comes or goes.
TARGET = SELF | IN_CREATE | IN_MOVED_TO | IN_DELETE | IN_MOVED_FROM
#: The deepest parent there is, while the next part of the path is missing.
AWAITING = SELF | IN_CREATE | IN_MOVED_TO
#: The parent of either: the kernel sends no IN_DELETE_SELF for a directory that was
#: removed, or replaced by a rename, as long as any process holds it open. Parents
#: further up can't be removed before it is.
HOLDING = SELF | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO

#: Errors that mean: no directory to be watched here, go on with its parent.
UNWATCHABLE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES}


class DirectoryWatch:
    """The watches on a directory and on its parents.

    `target` is the directory's watch descriptor, None while it is missing.
    `settled` is False if the path changed too fast to be sure of the watches, or if
    a part of it may not be watched: then only looking again helps.
    """

    #: Passes over the path before a storm of renames is left to the next time.
    PASSES = 10

    def __init__(self, path: str) -> None:
        """Begin with no watches; raise OSError like `Inotify`."""
        self.path = path
        self.target: int | None = None
        self.settled = False
        self._inotify = Inotify()
        #: Watch descriptor -> the name in that directory that the path goes on with.
        self._below: dict[int, str] = {}

    def fileno(self) -> int:
        """Return the inotify descriptor, for a selector."""
        return self._inotify.fileno()

    def close(self) -> None:
        """End all watches."""
        self._inotify.close()

    def read(self) -> Changes:
        """Return what one read of the kernel's queue tells.

        After a change of the path, or a loss, `follow` is to be called, and all of the
        directory to be looked at: names may have come or gone without an event.
        """
        names = []
        path_changed = events_lost = False
        for wd, mask, name in self._inotify.read():
            # An overflow has no watch descriptor: it is asked for first.
            if mask & IN_Q_OVERFLOW:
                events_lost = True
            elif wd == self.target and name:
                names.append((name, bool(mask & (IN_CREATE | IN_MOVED_TO))))
            elif wd in self._below and name in ("", self._below[wd]):
                path_changed = True
        return Changes(names, path_changed, events_lost)

    def follow(self) -> None:
        """Set the watches on what the path means now.

        Nothing is missed in between: the watches are set, then set once more, and
        hold when the second pass has met the same inodes as the first. What happens
        after it gives an event. Raises OSError (ENOSPC, ENOMEM) when out of watches.
        """
        passed = set(self._below)
        watches = self._watch_path()
        for _ in range(self.PASSES):
            passed.update(watches[1])
            earlier, watches = watches, self._watch_path()
            if watches == earlier:
                break
        self.target, self._below, permitted = watches
        self.settled = watches == earlier and permitted
        for wd in passed - self._below.keys():
            # Its directory may be gone, and the watch with it.
            with contextlib.suppress(OSError):
                self._inotify.rm_watch(wd)

    def _watch_path(self) -> tuple[int | None, dict[int, str], bool]:
        """Watch the directory and its parents, from below: one pass.

        Going up, a parent that waits for the next part of the path never loses that
        watch for a moment. Returns target, the names below, and whether every part
        that exists may be watched.
        """
        target = None
        below: dict[int, str] = {}
        permitted = True
        directory, name = self.path, ""
        try:
            directory = os.path.realpath(self.path)
        except OSError:
            permitted = False  # a symlink has gone away while it was read
        mask = TARGET
        while True:
            try:
                wd = self._inotify.add_watch(
                    directory, mask | IN_ONLYDIR | IN_DONT_FOLLOW
                )
            except OSError as error:
                if error.errno not in UNWATCHABLE:
                    raise
                # What can't be read may still be passed through to what is below it.
                permitted &= error.errno != errno.EACCES or bool(below)
                mask = SELF if below else AWAITING
            else:
                if mask == TARGET:
                    target = wd
                mask = SELF if below else HOLDING
                below.setdefault(wd, name)
            if directory == "/":
                return target, below, permitted
            directory, name = os.path.split(directory)
