"""Files that are there whole or not at all, and that no planted link or pipe leads elsewhere."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

TEMPORARY = ".tmp-"
"""How the names of unfinished files begin."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whenever the machine stops.

    The content goes to a new file of an unguessable name, which then takes the place of `path`: a link at `path` is
    replaced, not followed.

    Raises:
        OSError: no space, no right to write; what was at `path` is as it was.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too must survive a power cut
    finally:
        os.close(folder)


def read_whole(path: Path) -> bytes:
    """The content of a regular file. Raises OSError, also for a pipe or a device, on which reading could wait."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        return file.read()
