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
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lavender.data.columns import COLUMNS
from lavender.errors import DataError
from lavender.files import (
    JsonError,
    open_plain,
    parse_json,
    printable,
    shown,
)

if TYPE_CHECKING:
    import pyarrow.parquet

DATA_FORMATS = (
    "a folder with metadata.jsonl, .csv or .parquet (columns file_name and text, caption or messages)",
    "Flickr30k's folder with results.csv (image_name| comment_number| comment)",
    "a .jsonl, .json, .csv, .parquet or .arrow file, or a folder of .parquet or .arrow shards of one split, with image "
    "or images and messages, conversations (LLaVA), prompt + completion, instruction + output, text or caption",
    "a folder of pictures with a .txt file beside each, of webdataset .tar files, or what img2dataset wrote",
    "Karpathy's dataset_coco.json or dataset_flickr30k.json, as PATH:SPLIT",
    "what datasets' save_to_disk wrote, a hub id (ORG/NAME:SPLIT), or a datasets.Dataset, with such columns",
)
_FLICKR_HEADER = ["image_name", "comment_number", "comment"]
_BATCH, _BATCH_BYTES = 1000, 2**25  # limits of what is read at once
_AT_ONCE = 100  # rows of a data set with encoded images
_BUFFER = 2**20  # bytes of a column that are read at once
_MAX_LINE = 2**26  # characters: an image of 50 MB as base64
_MAX_RECORD = 1000  # lines of one record of CSV


class Row(NamedTuple):
    """A row of any format; `fault` says why it could not be read, or is ""."""

    name: str
    values: dict[str, Any]
    fault: str = ""


class Wanted(NamedTuple):
    """Which part of a data set is read: the columns, and the split of a file or folder with several, or ""."""

    columns: frozenset[str] = COLUMNS
    split: str = ""


def unknown_format(got: str) -> DataError:
    formats = "; ".join(f"({number}) {name}" for number, name in enumerate(DATA_FORMATS, 1))
    return DataError(
        got,
        f"one of these formats: {formats}",
        "rename the files or columns to fit one of them, or name the columns with --columns",
    )


def unreadable(path: Path, why: object) -> DataError:
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
                        raise unreadable(path, f"line {number} has no end and holds NUL bytes; it is no text")
                    fault, text = f"longer than {_MAX_LINE:,} characters", ""
                    part = file.readline(_MAX_LINE)
                yield _Line(number, text, fault or _not_utf8(text))
    except (OSError, MemoryError) as error:
        raise unreadable(path, f"{type(error).__name__} at line {number + 1}") from error


def jsonl_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    label = printable(path.name)
    for line in _lines(path):
        name = f"{label} line {line.number}"
        if line.fault:
            yield Row(name, {}, line.fault)
        elif line.text.strip():
            try:
                yield object_row(name, parse_json(line.text))
            except JsonError as error:
                yield Row(name, {}, str(error))


def object_row(name: str, values: Any) -> Row:
    if isinstance(values, dict):
        return Row(name, values)
    return Row(name, {}, f"a JSON {type(values).__name__}, not an object")


def csv_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    """Rows of a comma-separated file, or of Flickr30k's results.csv."""
    records, label = _csv_records(_lines(path)), printable(path.name)
    _, columns, fault = next(records, (1, [], ""))
    if fault:
        raise unreadable(path, f"its header is {fault}")
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


def parquet_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    import pyarrow.parquet

    open_plain(path).close()
    try:
        # Buffers instead of whole row groups in memory: pandas writes a table as one row group.
        options: Any = {"page_checksum_verification": True, "buffer_size": _BUFFER, "pre_buffer": False}
        with pyarrow.parquet.ParquetFile(path, **options) as file:
            names = file.schema_arrow.names
            _refuse_twice(path, names)
            used = [name for name in names if name in wanted.columns]
            tables = file.iter_batches(_batch_rows(file), columns=used or None)
            yield from _table_rows(printable(path.name), tables, wanted, names)
    except DataError:
        raise
    except Exception as error:  # on damaged bytes pyarrow may raise anything: OSError, ArrowException, MemoryError …
        raise unreadable(path, error) from error


def _batch_rows(file: pyarrow.parquet.ParquetFile) -> int:
    """Rows read at once: fewer of a file with encoded images."""
    size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
    return min(_BATCH, max(1, _BATCH_BYTES * file.metadata.num_rows // max(1, size)))


def arrow_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    """Rows of a file that `datasets` wrote, such as those of its cache."""
    import datasets

    open_plain(path).close()
    try:
        dataset = datasets.Dataset.from_file(str(path))
    except Exception as error:  # pyarrow may raise anything on damaged bytes
        raise unreadable(path, error) from error
    return dataset_rows(dataset, wanted, printable(path.name))


def dataset_rows(dataset: Any, wanted: Wanted, name: str = "dataset") -> Iterator[Row]:
    """Rows of a `datasets.Dataset`, or of a stream."""
    import datasets

    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        do = "choose a split of a DatasetDict, or save another kind to parquet and give its path"
        raise DataError(f"a {type(dataset).__name__}", "a path or a datasets.Dataset", do)
    return _table_rows(name, dataset.with_format("arrow").iter(_AT_ONCE), wanted)  # this format decodes no image


class _Unread(str):
    """Why a cell of a table cannot be converted to Python."""


def _table_rows(name: str, tables: Iterable[Any], wanted: Wanted, names: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of Arrow tables. `names` are all columns of the file, if the tables have only some of them."""
    index = 0
    for table in tables:
        columns = table.schema.names if names is None else names
        cells = {column: _cells(table.column(column)) for column in columns if column in wanted.columns}
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
            folders = [folder for folder, names in contents.items() if fields[0] in names] or [path.parent]
            if len(folders) > 1 and folders[0] != path.parent:
                yield Row(name, {}, f"the picture {shown(fields[0])} is in {folders[0].name} and {folders[1].name}")
                continue
            yield Row(name, {"image": str((folders[0] / fields[0]).absolute()), "caption": fields[2]})
        else:
            yield Row(name, {}, f"{len(fields)} fields separated by bars, not 3: {shown(line.text.strip())}")
