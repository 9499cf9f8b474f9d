"""Files in directories that others than root may write: no symlink, fifo or device.

/var/log/ganeti and /var/run/ganeti belong to Ganeti's own users. By appending
to a file of their choice, root could give them its rights; a fifo keeps root waiting.
"""

from __future__ import annotations

import errno
import os
import stat

SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def open_regular_file(path: str, flags: int) -> int:
    """Open a regular file, made with mode 0600 if the flags say so. Raises OSError.

    If it is to be written it must not have a second name, which may be that of a file
    elsewhere. The directory may be a symlink, for that is what an administrator makes.
    """
    try:
        fd = os.open(path, flags | SAFE, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "it is a symlink"
        raise
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        problem = OSError(errno.EINVAL, "it is no regular file", path)
    elif status.st_nlink > 1 and flags & os.O_ACCMODE != os.O_RDONLY:
        problem = OSError(errno.EMLINK, "it has several names (hard links)", path)
    else:
        return fd
    os.close(fd)
    raise problem


def is_at_path(fd: int, path: str) -> bool:
    """Tell whether an open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError:
        return False
