"""Rows of webdataset's .tar files: consecutive files of one key are a sample."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavender.data.columns import PICTURE_COLUMNS
from lavender.data.images import MAX_BYTES
from lavender.data.tables import Row, Wanted, unreadable
from lavender.errors import DataError
from lavender.files import JsonError, open_plain, parse_json, printable

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_READ = (*PICTURE_ENDINGS, ".txt", ".json")
_FILE = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)", re.DOTALL)  # key, ending: webdataset's rule


def webdataset_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    """Rows of a .tar file: the columns in a sample's .json, `image` or `images`, and `text`, its .txt.

    `datasets` reads such files too, but refuses a whole file for one sample with other endings, bad JSON or bad UTF-8.
    """
    label = printable(path.name)
    try:
        with open_plain(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for key, files, fault in _samples(archive):
                name = f"{label} {printable(key)}"
                yield Row(name, {"__key__": key}, fault) if fault else _row(name, key, files)
            file.seek(archive.offset)
            end = file.read(tarfile.BLOCKSIZE)
        if end.strip(b"\0"):  # tarfile takes a damaged header for the end
            raise unreadable(path, f"it is damaged at byte {archive.offset:,}")
        if not end:
            yield Row(f"{label} end", {}, "the mark of the archive's end is missing; samples may be missing too")
    except DataError:
        raise
    except Exception as error:  # on damaged bytes tarfile may raise anything
        raise unreadable(path, error) from error


def _samples(archive: Any) -> Iterator[tuple[str, dict[str, bytes | None], str]]:
    """(key, content by ending, fault) of each sample. Files of other endings are not read: None."""
    key, fault = "", ""
    files: dict[str, bytes | None] = {}
    while (member := archive.next()) is not None:
        archive.members = []  # tarfile would keep all of them
        match = _FILE.fullmatch(member.name)
        if not match or not member.isreg():
            continue
        if files and match[1] != key:
            yield key, files, fault
            files, fault = {}, ""
        key, ending = match[1], match[2]
        if ending in files:
            fault = f"two files with the ending .{printable(ending)}"
        files[ending] = None
        if _kind(ending) not in _READ:
            continue
        if member.size > MAX_BYTES:
            fault = f"a file of {member.size:,} bytes, more than {MAX_BYTES:,}"
        elif (content := archive.extractfile(member)) is not None:
            files[ending] = content.read()
    if files:
        yield key, files, fault


def _kind(ending: str) -> str:
    """The last part of an ending: ".jpg" of "0.jpg"."""
    return f".{ending.rpartition('.')[2].lower()}"


def _row(name: str, key: str, files: dict[str, bytes | None]) -> Row:
    """The row of a sample; with a fault if its texts cannot be read."""
    values: dict[str, Any] = {}
    described: Any = {}
    try:
        for ending, content in files.items():
            if content is None:
                continue
            values[ending] = content if _kind(ending) in PICTURE_ENDINGS else content.decode("utf-8-sig")
            if ending.lower() == "txt":
                values["text"] = [values[ending]]
            elif ending.lower() == "json":
                described = parse_json(values[ending])
    except UnicodeDecodeError:
        return Row(name, {"__key__": key}, f"its .{printable(ending)} is not UTF-8")
    except JsonError as error:
        return Row(name, {"__key__": key}, f"its .json is {error}")
    if not isinstance(described, dict):
        return Row(name, {"__key__": key}, f"its .json is a JSON {type(described).__name__}, not an object")
    if pictures := [values[ending] for ending in files if _kind(ending) in PICTURE_ENDINGS]:
        described |= dict.fromkeys(PICTURE_COLUMNS)  # which may name what the pictures were
        described |= {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures}
    return Row(name, described | values | {"__key__": key})
