"""Files that are there whole or not at all, and errors of the disk in our three parts."""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lavender.errors import DataError, FileError, LavenderError

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


MISSING = "no such file"
"""How the fault of a path begins where nothing is."""
_LONGEST_NAME = 300  # characters of a path in a message
_HALF = re.compile("[\ud800-\udfff]")
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
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxtuple = 3, 20, 6, 20
_short.maxstring = _short.maxother = _short.maxlong = 80


class JsonError(ValueError):
    """Why a text is not JSON, or not JSON of one meaning."""


def shown(value: Any) -> str:
    """The repr of a value as a message has it: short, whatever its length and depth, and printable."""
    try:
        return printable(_short.repr(value))
    except ValueError:  # Python writes no number of more than some thousand digits
        return f"{type(value).__name__} of very many digits"


def printable(text: object) -> str:
    """A text on one line, without control characters and half characters; cut in the middle if it is long."""
    whole = str(text)
    if len(whole) > _LONGEST_NAME:
        half = _LONGEST_NAME // 2
        whole = f"{whole[:half]}…{whole[-half:]} ({len(whole)} characters)"
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in whole)


def half_character(text: str) -> str:
    """Why a text cannot be written as UTF-8; "" if it can."""
    found = _HALF.search(text)
    if found is None:
        return ""
    byte = ord(found[0]) - 0xDC00  # how a byte that is not UTF-8 is decoded with errors="surrogateescape"
    maybe = f", or the byte 0x{byte:02x}, which is not UTF-8," if byte >= 0x80 else ""
    return f"half of a surrogate pair{maybe} at character {found.start()}"


def expanded(path: str | Path) -> Path:
    """With a leading ~ as the home folder, unless there is none of that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def fault_of(path: str | Path) -> str:
    """Why this is no plain file, with its name; "" if it is one. Links are followed. Opens nothing."""
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
    """Open a plain file for reading; pipes and devices would block, or never end.

    Raises:
        DataError: missing, not a plain file, or not readable.
    """
    if fault := fault_of(path):
        raise DataError(fault, "a plain file", "check the path")
    try:
        return open(path, "rb", opener=_open_without_waiting)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_plain(path: str | Path, max_bytes: int) -> bytes:
    """The content of a plain file. Raises DataError; also for more than `max_bytes`, before they are read."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise DataError(f"{printable(path)} of {size:,} bytes", f"at most {max_bytes:,} bytes", "check the file")
        try:
            return file.read() if size else b""  # files of /proc have no size; some of them never end
        except (OSError, MemoryError) as error:
            raise _unreadable(path, error) from error


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _unreadable(path: str | Path, error: Exception) -> DataError:
    why = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
    return DataError(f"{printable(path)}, which cannot be read: {why}", "a file that can be read", "check the file")


def parse_json(text: str) -> Any:
    """Structure from its JSON text.

    Raises:
        JsonError: no JSON, an object with a key twice, a number that Python refuses, or nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise _json_error(error, text) from error


def json_items(text: str) -> Iterator[tuple[Any, str]]:
    """The items of a JSON list, each with its own fault or "", so that one does not take the others along.

    Raises:
        JsonError: the text does not continue as a list.
    """
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise JsonError("not JSON: no list")
    at = _after_space(text, at + 1)
    is_last = text[at : at + 1] == "]"
    while not is_last:
        try:
            (value, end), fault = _DECODER.raw_decode(text, at), ""
        except json.JSONDecodeError as error:
            raise _json_error(error, text) from error
        except (ValueError, RecursionError, MemoryError) as error:
            value, end, fault = None, _end_of_item(text, at), str(_json_error(error, text))
        yield value, fault
        at = _after_space(text, end)
        is_last = text[at : at + 1] == "]"
        if not is_last:
            if text[at : at + 1] != ",":
                raise JsonError(f"not JSON: no comma at character {at}, where the list should go on")
            at = _after_space(text, at + 1)
    if (at := _after_space(text, at + 1)) != len(text):
        raise JsonError(f"not JSON: more text at character {at}, after the end of the list")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise JsonError(f"an object with the key {shown(twice)} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _json_error(error: Exception, text: str) -> JsonError:
    if isinstance(error, JsonError):
        return error
    if isinstance(error, json.JSONDecodeError):
        hint = "; it holds NUL characters, as UTF-16 does" if "\0" in text else ""
        return JsonError(f"not JSON: {error}{hint}")
    if isinstance(error, ValueError):
        return JsonError("a number with too many digits")
    return JsonError("nested too deeply" if isinstance(error, RecursionError) else "too large for the memory")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _end_of_item(text: str, start: int) -> int:
    """Where an item ends that cannot be decoded, by its brackets alone."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        sign = token[0]
        if sign in ("[", "{"):
            depth += 1
        elif sign in ("]", "}"):
            depth -= 1
            if depth <= 0:
                return token.end() if depth == 0 else token.start()
        elif sign == "," and depth == 0:
            return token.start()
        elif sign == '"':  # never closed
            break
    raise JsonError("not JSON: it ends inside of a value")
