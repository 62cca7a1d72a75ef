"""Files: write them whole or not at all, read plain files only, parse JSON strictly, and quote values in messages.

Errors of the operating system become the three-part errors of `lavender.errors`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lavender.errors import DataError, FileError, LavenderError

TEMPORARY = ".tmp-"
"""Prefix of the names of unfinished files."""
MISSING = "no such file"
"""Prefix of the fault of a path where nothing exists."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Image formats that may be opened, by Pillow's names; JPEG includes the MPO of phones. Pillow passes none of these to
another program, as it passes EPS to Ghostscript."""

# Windows lacks the first two flags, and only Windows translates line ends unless O_BINARY is set.
NO_WAIT = getattr(os, "O_NONBLOCK", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
BINARY = getattr(os, "O_BINARY", 0)
READ = os.O_RDONLY | NO_WAIT | BINARY
"""Flags of `os.open` for reading bytes: opening a pipe does not wait for a writer."""

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
# Messages of writers that raise no OSError: torch's archive writer, safetensors, Arrow.
_DISK_MESSAGES = {
    "PytorchStreamWriter failed": errno.EIO,
    "No space left on device": errno.ENOSPC,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
}
_FAULTS = {
    errno.ENOENT: MISSING,
    errno.ENOTDIR: MISSING,
    errno.ELOOP: "links that lead in a circle",
    errno.ENAMETOOLONG: "a name too long for a file",
    errno.EACCES: "no permission to read",
}
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MAX_PRINTED = 300  # characters of a path in a message
_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_JSON_SPACE = re.compile(r"[ \t\n\r]*")

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxtuple = 3, 20, 6, 20
_short.maxstring = _short.maxother = _short.maxlong = 80


# Values in messages


def shown(value: Any) -> str:
    """The repr of a value for a message: short whatever the value's length and depth, and printable."""
    try:
        return printable(_short.repr(value))
    except ValueError:  # Python refuses to print integers of more than some thousand digits
        return f"{type(value).__name__} of very many digits"


def printable(text: object) -> str:
    """A text on one line, control characters and lone surrogates escaped; a long one is cut in the middle."""
    whole = str(text)
    if len(whole) > _MAX_PRINTED:
        half = _MAX_PRINTED // 2
        whole = f"{whole[:half]}…{whole[-half:]} ({len(whole)} characters)"
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in whole)


def half_character(text: str) -> str:
    """Why a text cannot be encoded as UTF-8, or "" if it can."""
    match = _SURROGATE.search(text)
    if match is None:
        return ""
    byte = ord(match[0]) - 0xDC00  # how errors="surrogateescape" decodes a byte that is not UTF-8
    maybe = f", or the byte 0x{byte:02x}, which is not UTF-8," if byte >= 0x80 else ""
    return f"half of a surrogate pair{maybe} at character {match.start()}"


def file_error(error: OSError, place: str | Path | None = None) -> FileError:
    """An OSError as a FileError; `place` is named if the error names no file."""
    where = error.filename or place or "a file"
    where = os.fsdecode(where) if isinstance(where, bytes) else where
    reason = error.strerror or str(error) or type(error).__name__
    advice = _ADVICE.get(error.errno or 0, "check the disk and the rights, and run it again")
    return FileError(f"{where}: {reason}", "a place that can be read and written", advice)


# Writing


@contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """Turn any error of a full or read-only disk into a FileError that names `place`."""
    try:
        yield
    except (LavenderError, BrokenPipeError):
        raise
    except OSError as error:
        raise file_error(error, place) from error
    except Exception as error:
        for message, number in _DISK_MESSAGES.items():
            if message in str(error):
                disk_error = OSError(number, "the disk refuses to take more" if number == errno.EIO else message)
                raise file_error(disk_error, place) from error
        raise


def prepare_place(path: Path) -> None:
    """Make the folder of a file before the work whose result the file will hold, so that a wrong path costs no work.

    Raises:
        FileError: `path` is a folder, or its folder cannot be made or written to.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        raise file_error(error, path) from error


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that it exists completely or not at all, even after a power cut. A text is encoded as UTF-8.

    The content goes to a new file with an unguessable name, which then replaces `path`. A link at `path` is replaced,
    not followed.

    Raises:
        OSError: no space or no right to write. `path` is unchanged.
    """
    encoded = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.urandom(8).hex()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK | BINARY, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is not None:
            error.filename = str(path)  # the name that the caller knows
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make new names survive a power cut too. Windows and some file systems have no such call for folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # as network file systems answer
            raise
    finally:
        os.close(descriptor)


# Reading


def expanded(path: str | Path) -> Path:
    """The path with a leading ~ replaced by the home folder, if there is one of that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_plain_path(text: str | Path) -> bool:
    """Whether the name of a data set can only be a path: it begins with ".", "/" or "~", or ends with a separator."""
    text = os.fspath(text)
    return text.startswith((".", "~")) or os.path.isabs(text) or text.endswith(("/", os.sep))


def data_path(text: str | Path) -> Path:
    """As `expanded`. What `is_plain_path` becomes absolute if it is not there: ./org/name is no hub id.

    `Path` drops the "./", and then nothing would tell the path from the id.
    """
    path = expanded(text)
    return path.absolute() if is_plain_path(text) and not os.path.lexists(path) else path


def fault_of(path: str | Path) -> str:
    """Why a path is no plain file, with its name, or "" if it is one. Follows links and opens nothing."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # NUL, or characters that the file system cannot encode
        return f"a name that no file can have: {printable(path)}"
    except OSError as error:
        return f"{_FAULTS.get(error.errno or 0, error.strerror)}: {printable(path)}"
    if stat.S_ISREG(mode):
        return ""
    return f"{_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file: {printable(path)}"


def open_plain(path: str | Path) -> BinaryIO:
    """Open a plain file for reading. Pipes and devices are refused: reading them could block or never end.

    Raises:
        DataError: missing, not a plain file, or not readable.
    """
    if fault := fault_of(path):
        raise DataError(fault, "a plain file", "check the path")
    try:
        return open(path, "rb", opener=lambda name, flags: os.open(name, flags | NO_WAIT))
    except OSError as error:
        raise _unreadable(path, error) from error


def read_plain(path: str | Path, max_bytes: int) -> bytes:
    """The content of a plain file.

    Raises:
        DataError: as `open_plain`, or more than `max_bytes` bytes, which are then not read.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise DataError(f"{printable(path)} of {size:,} bytes", f"at most {max_bytes:,} bytes", "check the file")
        try:
            return file.read() if size else b""  # files in /proc report no size, and some of them never end
        except (OSError, MemoryError) as error:
            raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> DataError:
    why = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
    return DataError(f"{printable(path)}, which cannot be read: {why}", "a file that can be read", "check the file")


def read_whole(path: Path) -> bytes:
    """The content of a regular file. Raises OSError, also for a pipe or a device, on which reading could block."""
    with os.fdopen(os.open(path, READ), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        return file.read()


def _seek_and_read(descriptor: int, size: int, offset: int) -> bytes:
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)


read_at = getattr(os, "pread", _seek_and_read)
"""`read_at(descriptor, size, offset)`: up to `size` bytes of an open file, `offset` bytes from its start."""


# JSON


class JsonError(ValueError):
    """Why a text is not JSON, or is JSON with more than one meaning."""


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        JsonError: not JSON, an object with a repeated key, a number that Python refuses, or too deep a nesting.
    """
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise _json_error(error, text) from error


def json_items(text: str) -> Iterator[tuple[Any, str]]:
    """The items of a JSON list, each with its fault or "", so that one bad item does not spoil the others.

    Raises:
        JsonError: the text does not continue as a list.
    """
    position = _after_space(text, 0)
    if text[position : position + 1] != "[":
        raise JsonError("not JSON: no list")
    position = _after_space(text, position + 1)
    is_last = text[position : position + 1] == "]"
    while not is_last:
        try:
            (value, end), fault = _DECODER.raw_decode(text, position), ""
        except json.JSONDecodeError as error:
            raise _json_error(error, text) from error
        except (ValueError, RecursionError, MemoryError) as error:
            value, end, fault = None, _end_of_item(text, position), str(_json_error(error, text))
        yield value, fault
        position = _after_space(text, end)
        is_last = text[position : position + 1] == "]"
        if not is_last:
            if text[position : position + 1] != ",":
                raise JsonError(f"not JSON: no comma at character {position}, where the list should go on")
            position = _after_space(text, position + 1)
    if (position := _after_space(text, position + 1)) != len(text):
        raise JsonError(f"not JSON: more text at character {position}, after the end of the list")


def _object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise JsonError(f"an object with the key {shown(repeated)} twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object_with_unique_keys)


def _json_error(error: Exception, text: str) -> JsonError:
    if isinstance(error, JsonError):
        return error
    if isinstance(error, json.JSONDecodeError):
        hint = "; it holds NUL characters, as UTF-16 does" if "\0" in text else ""
        return JsonError(f"not JSON: {error}{hint}")
    if isinstance(error, ValueError):
        return JsonError("a number with too many digits")
    return JsonError("nested too deeply" if isinstance(error, RecursionError) else "too large for the memory")


def _after_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    assert match is not None
    return match.end()


def _end_of_item(text: str, start: int) -> int:
    """Where an item that cannot be decoded ends, by its brackets alone."""
    depth = 0
    for match in _JSON_TOKEN.finditer(text, start):
        token = match[0]
        if token in ("[", "{"):
            depth += 1
        elif token in ("]", "}"):
            depth -= 1
            if depth <= 0:
                return match.end() if depth == 0 else match.start()
        elif token == "," and depth == 0:
            return match.start()
        elif token == '"':  # a string that never ends
            break
    raise JsonError("not JSON: it ends inside of a value")
