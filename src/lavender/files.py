"""Writing to disk: what goes wrong becomes one error that names the place."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lavender.errors import FileError, LavenderError

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
