"""Files that are there whole or not at all, and errors of the disk in our three parts."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lavender.errors import FileError, LavenderError

TEMPORARY = ".tmp-"
"""How the names of unfinished files begin."""
_ADVICE = {
    errno.ENOSPC: "free some space, or choose a place on another disk",
    errno.EDQUOT: "free some of your quota, or choose a place on another disk",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change the rights, or choose another place",
    errno.EPERM: "change the rights, or choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "choose another path: a part of this one is a file",
    errno.EISDIR: "choose another path: this one is a folder",
    errno.EEXIST: "choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
}
# what writers outside Python say, which raise no OSError: torch's archive writer, safetensors, Arrow
_SIGNS = {
    "PytorchStreamWriter failed": errno.EIO,
    "No space left on device": errno.ENOSPC,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
}


def file_error(error: OSError, place: str | Path | None = None) -> FileError:
    """An OSError in our three parts; `place` is named where the error names no file."""
    where = error.filename or place or "a file"
    where = os.fsdecode(where) if isinstance(where, bytes) else where
    reason = error.strerror or str(error) or type(error).__name__
    advice = _ADVICE.get(error.errno or 0, "check the disk and the rights, and run it again")
    return FileError(f"{where}: {reason}", "a place that can be read and written", advice)


@contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """Turn whatever a writer raises when the disk refuses into a FileError that names `place`."""
    try:
        yield
    except (LavenderError, BrokenPipeError):
        raise
    except OSError as error:
        raise file_error(error, place) from error
    except Exception as error:
        for sign, number in _SIGNS.items():
            if sign in str(error):
                known = OSError(number, "the disk refuses to take more" if number == errno.EIO else sign)
                raise file_error(known, place) from error
        raise


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that it is there whole or not at all, whenever the machine stops. A text is written as UTF-8.

    The content goes to a new file of an unguessable name, which then takes the place of `path`: a link at `path` is
    replaced, not followed.

    Raises:
        OSError: no space, no right to write; what was at `path` is as it was.
    """
    encoded = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(encoded)
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
