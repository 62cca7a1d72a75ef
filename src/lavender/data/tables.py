"""Read the formats of data sets with images and text into rows of named columns.

Rows keep the order of the file. Their names count lines from 1, as editors do, and rows of JSON lists, parquet files
and datasets from 0, as Python does. A row that cannot be read becomes a row with a fault. An error is raised only if
the rest of the file cannot be read either.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lavender.errors import DataError
from lavender.files import (
    MISSING,
    JsonError,
    expanded,
    fault_of,
    json_items,
    open_plain,
    parse_json,
    printable,
    read_plain,
    shown,
)

if TYPE_CHECKING:
    import datasets

DATA_FORMATS = (
    "a folder with metadata.jsonl, .csv or .parquet (columns file_name and text, caption or messages)",
    "Flickr30k's folder with results.csv (image_name| comment_number| comment)",
    "a .jsonl, .json, .csv or .parquet file, or a folder of .parquet shards of one split, with image or images "
    "and messages, conversations (LLaVA), prompt + completion, text or caption",
    "a datasets.Dataset with such columns",
)
PICTURE_COLUMNS = ("images", "image", "file_name")
CAPTION_COLUMNS = ("text", "caption")
VIDEO_COLUMNS = ("videos", "video")
TEXT_COLUMNS = ("messages", "conversations", "completion", *CAPTION_COLUMNS)
OTHER_COLUMNS = ("prompt", "system", "about", "tools", "audios", "audio")
_COLUMNS = frozenset((*PICTURE_COLUMNS, *VIDEO_COLUMNS, *TEXT_COLUMNS, *OTHER_COLUMNS))

_FLICKR_HEADER = ["image_name", "comment_number", "comment"]
_SHARD = re.compile(r"(?P<split>.*?)[-_.]?(?P<number>\d+)[-_]of[-_](?P<count>\d+)(?!\d).*")
_BATCH = 1000  # rows read at once
_MAX_JSON = 2**33  # bytes: a .json file is held in memory
_MAX_LINE = 2**26  # characters: an image of 50 MB as base64
_MAX_RECORD = 1000  # lines of one record of CSV


class Row(NamedTuple):
    """A row of any format; `fault` says why it could not be read, or is ""."""

    name: str
    values: dict[str, Any]
    fault: str = ""


def find_rows(path: str | Path | datasets.Dataset) -> tuple[Iterable[Row], Path]:
    """The rows of a data set, and the folder to which their paths are relative. Raises DataError."""
    if not isinstance(path, (str, Path)):
        return _dataset_rows(path), Path()
    path = expanded(path)
    if os.path.isdir(path):
        return _folder_rows(path), path
    if fault := fault_of(path):
        got = f"{printable(path)}, which does not exist" if fault.startswith(MISSING) else fault
        raise DataError(got, "a file or folder of data", "check the path")
    if path.suffix.lower() not in _READERS:
        raise unknown_format(f"the file {printable(path)}")
    return _READERS[path.suffix.lower()](path), path.parent


def _folder_rows(folder: Path) -> Iterable[Row]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        got = f"{printable(folder)}, which cannot be read: {error.strerror}"
        raise DataError(got, "a folder that you may read", "change its permissions, or check the path") from error
    tables = [name for name in names if re.fullmatch(r"metadata\.(jsonl|csv|parquet)|results\.csv", name)]
    if len(tables) > 1:
        raise DataError(f"{folder} with {' and '.join(tables)}", "one of them", "give the path of one file")
    if tables:
        return _READERS[Path(tables[0]).suffix](folder / tables[0])
    shards = [name for name in names if name.endswith(".parquet") and not name.startswith(".")]
    if not shards:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        holds = ", ".join(printable(name) for name in names[:8])
        raise unknown_format(f"{printable(folder)}, which holds {holds + more or 'nothing'}")
    _check_shards(folder, shards)
    return (row for name in shards for row in _parquet_rows(folder / name))


def _check_shards(folder: Path, names: Sequence[str]) -> None:
    """Refuse shards of several splits, and an incomplete set of shards by the count in their names."""
    numbers: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    for name in names:
        if match := _SHARD.fullmatch(name):
            numbers[match["split"], match["count"]][int(match["number"])] += 1
    label = printable(folder)
    splits = sorted({split for split, _ in numbers})
    if len(splits) > 1:
        raise DataError(f"{label} with shards of {splits}", "one split", "move each split to a folder of its own")
    if len(numbers) > 1:
        counts = sorted({count for _, count in numbers})
        raise DataError(f"{label} with shards of {counts} in all", "one set of shards", "remove those of the other")
    for (split, count), present in numbers.items():
        counts_from_one = 0 not in present and int(count) in present
        expected = range(counts_from_one, int(count) + counts_from_one)
        if num_missing := len(expected) - sum(number in expected for number in present):
            first = islice((f"{number:0{len(count)}}" for number in expected if number not in present), 8)
            missing = ", ".join(first) + (" …" if num_missing > 8 else "")
            got = f"{label} without {num_missing} of the {int(count)} shards of {split!r}: {missing} of {count}"
            raise DataError(got, "all of its shards", "download the missing ones; to read some, give a file's path")
        if unexpected := [number for number, times in present.items() if times > 1 or number not in expected]:
            got = f"{label} with the shard {unexpected[0]} of {count} twice or beyond its count"
            raise DataError(got, "each shard once", "remove what does not belong there")


def unknown_format(got: str) -> DataError:
    formats = "; ".join(f"({number}) {name}" for number, name in enumerate(DATA_FORMATS, 1))
    return DataError(got, f"one of these formats: {formats}", "rename the columns or files to fit one of them")


def _unreadable(path: Path, why: object) -> DataError:
    got = f"{printable(path)}, which cannot be read: {printable(why)}"
    return DataError(got, f"a valid {path.suffix} file", "repair or replace it")


class _Line(NamedTuple):
    """A line of a text file, its number from 1, and what is wrong with it."""

    number: int
    text: str
    fault: str


def _open_text(path: Path) -> io.TextIOWrapper:
    """Open UTF-8 with or without a byte order mark. Line ends are kept; invalid bytes become lone surrogates."""
    file = open_plain(path)
    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.close()
        raise DataError(f"{printable(path)} in UTF-16, by its first two bytes", "UTF-8", "save it as UTF-8")
    file.seek(0)
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _not_utf8(text: str) -> str:
    """What is wrong with a text that `_open_text` decoded, or ""."""
    match = re.search("[\udc80-\udcff]", text)
    if match is None:
        return ""
    return f"not UTF-8: byte 0x{ord(match[0]) - 0xDC00:02x} at character {match.start()}; save the file as UTF-8"


def _lines(path: Path) -> Iterator[_Line]:
    number = 0
    try:
        with _open_text(path) as file:
            while text := file.readline(_MAX_LINE):
                number += 1
                fault, part = "", text
                while len(part) == _MAX_LINE and not part.endswith(("\n", "\r")):
                    if "\0" in part:
                        raise _unreadable(path, f"line {number} has no end and holds NUL bytes; it is no text")
                    fault, text = f"longer than {_MAX_LINE:,} characters", ""
                    part = file.readline(_MAX_LINE)
                yield _Line(number, text, fault or _not_utf8(text))
    except (OSError, MemoryError) as error:
        raise _unreadable(path, f"{type(error).__name__} at line {number + 1}") from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    label = printable(path.name)
    for line in _lines(path):
        name = f"{label} line {line.number}"
        if line.fault:
            yield Row(name, {}, line.fault)
        elif line.text.strip():
            try:
                yield _object_row(name, parse_json(line.text))
            except JsonError as error:
                yield Row(name, {}, str(error))


def _json_rows(path: Path) -> Iterator[Row]:
    content, label = read_plain(path, _MAX_JSON), printable(path.name)
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise _unreadable(path, "it is UTF-16, by its first two bytes; save it as UTF-8")
    text = content.decode("utf-8-sig", "surrogateescape")  # a byte that is not UTF-8 spoils only its row
    try:
        if not re.match(r"\s*\[", text):
            kind = type(parse_json(text)).__name__
            raise unknown_format(f"{printable(path)}, a JSON {kind} where a list of rows should be")
        for index, (values, fault) in enumerate(json_items(text)):
            name = f"{label} row {index}"
            yield Row(name, {}, fault) if fault else _object_row(name, values)
    except JsonError as error:
        raise _unreadable(path, error) from error


def _object_row(name: str, values: Any) -> Row:
    if isinstance(values, dict):
        return Row(name, values)
    return Row(name, {}, f"a JSON {type(values).__name__}, not an object")


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a comma-separated file, or of Flickr30k's results.csv."""
    records, label = _csv_records(_lines(path)), printable(path.name)
    _, columns, fault = next(records, (1, [], ""))
    if fault:
        raise _unreadable(path, f"its header is {fault}")
    if len(columns) == 1 and [field.strip() for field in columns[0].split("|")] == _FLICKR_HEADER:
        yield from _flickr_rows(path)
        return
    _refuse_twice(path, columns)
    for number, fields, fault in records:
        name = f"{label} line {number}"
        if fault:
            yield Row(name, {}, fault)
        elif len(fields) == len(columns):
            yield Row(name, dict(zip(columns, fields, strict=True)))
        elif fields:
            yield Row(name, {}, f"{len(fields)} fields where the header has {len(columns)}")


def _csv_records(lines: Iterator[_Line]) -> Iterator[tuple[int, list[str], str]]:
    """(number of the first line, fields, fault) of each record.

    An unclosed quote spoils only its own line: the lines that it swallowed are read again.
    """
    waiting: deque[_Line] = deque()
    while True:
        used: list[_Line] = []
        try:
            fields = _next_record(waiting, lines, used)
        except csv.Error as error:
            waiting.extendleft(reversed(used[1:]))
            yield used[0].number, [], used[0].fault or f"not CSV: {error}"
            continue
        if fields is None:
            return
        yield used[0].number, fields, next((line.fault for line in used if line.fault), "")


def _next_record(waiting: deque[_Line], lines: Iterator[_Line], used: list[_Line]) -> list[str] | None:
    def take() -> Iterator[str]:
        while len(used) < _MAX_RECORD:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                return
            used.append(line)
            yield line.text

    limit = csv.field_size_limit(_MAX_LINE * _MAX_RECORD)  # a limit of the whole process, so it is restored at once
    try:
        return next(csv.reader(take(), strict=True), None)
    finally:
        csv.field_size_limit(limit)


def _refuse_twice(path: Path, columns: Sequence[str]) -> None:
    if twice := [name for name, times in Counter(columns).items() if times > 1 and name]:
        got = f"{printable(path)} with the column {shown(twice[0])} twice"
        raise DataError(got, "each column once", "rename or remove one of them")


def _names_in(folder: Path) -> set[str]:
    """The names in a folder; none for a file or an unreadable folder, whose images are then dropped as missing."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _flickr_rows(path: Path) -> Iterator[Row]:
    """Rows such as `name.jpg| 0| A caption .`, unquoted. The images lie beside the file or in a folder beside it.

    One row of the published file lacks a bar; it is dropped, not repaired.
    """
    contents = {path.parent: _names_in(path.parent)}
    for name in sorted(contents[path.parent]):
        if names := _names_in(path.parent / name):
            contents[path.parent / name] = names
    for line in _lines(path):
        name = f"{printable(path.name)} line {line.number}"
        fields = [field.strip() for field in line.text.split("|", 2)]
        if line.number == 1 or not (line.text.strip() or line.fault):
            continue
        if line.fault:
            yield Row(name, {}, line.fault)
        elif len(fields) == 3:
            folder = next((folder for folder, names in contents.items() if fields[0] in names), path.parent)
            yield Row(name, {"image": str((folder / fields[0]).absolute()), "caption": fields[2]})
        else:
            yield Row(name, {}, f"{len(fields)} fields separated by bars, not 3: {shown(line.text.strip())}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    open_plain(path).close()
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            _refuse_twice(path, names)
            used = [name for name in names if name in _COLUMNS]
            yield from _table_rows(printable(path.name), file.iter_batches(_BATCH, columns=used or None), names)
    except DataError:
        raise
    except Exception as error:  # on damaged bytes pyarrow may raise anything: OSError, ArrowException, MemoryError …
        raise _unreadable(path, error) from error


def _dataset_rows(dataset: Any) -> Iterator[Row]:
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        do = "choose a split of a DatasetDict, or save another kind to parquet and give its path"
        raise DataError(f"a {type(dataset).__name__}", "a path or a datasets.Dataset", do)
    tables = dataset.with_format("arrow").iter(_BATCH)  # the arrow format decodes no image
    return _table_rows("dataset", tables, dataset.column_names)


class _Unread(str):
    """Why a cell of a table cannot be converted to Python."""


def _table_rows(name: str, tables: Iterable[Any], columns: Sequence[str]) -> Iterator[Row]:
    index = 0
    for table in tables:
        cells = {column: _cells(table.column(column)) for column in columns if column in _COLUMNS}
        for row in range(table.num_rows):
            values = dict.fromkeys(columns) | {column: values[row] for column, values in cells.items()}
            fault = next((f"{key} {value}" for key, value in values.items() if isinstance(value, _Unread)), "")
            yield Row(f"{name} row {index}", values, fault)
            index += 1


def _cells(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except Exception:  # text that is not UTF-8, a date beyond Python's …: convert cell by cell
        return [_cell(scalar) for scalar in column]


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except Exception as error:
        return _Unread(f"cannot be read ({type(error).__name__})")


_READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
