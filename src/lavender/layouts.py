"""The layouts that people have pictures with text in, each read into rows of named columns.

Order is that of the file. Names of rows are for people: lines count from 1, as editors do, and rows
of JSON lists, parquet files and datasets from 0, as Python does.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lavender.errors import DataError

if TYPE_CHECKING:
    import datasets

LAYOUTS = (
    "a folder with metadata.jsonl, .csv or .parquet (columns file_name and text, caption or messages)",
    "Flickr30k's folder with results.csv (image_name| comment_number| comment)",
    "a .jsonl, .json, .csv or .parquet file, or a folder of .parquet shards of one split, with image or images "
    "and messages, conversations (LLaVA), prompt + completion, text or caption",
    "a datasets.Dataset with such columns",
)
_FLICKR_HEADER = ["image_name", "comment_number", "comment"]
_BATCH = 1000  # rows read at once


class Row(NamedTuple):
    """A row of any layout; `fault` says why it could not be read."""

    name: str
    values: dict[str, Any]
    fault: str = ""


def find_rows(path: str | Path | datasets.Dataset) -> tuple[Iterable[Row], Path]:
    """The rows, and the folder to which their paths are relative."""
    if not isinstance(path, (str, Path)):
        return _dataset_rows(path), Path()
    path = Path(path)
    if path.is_dir():
        return _folder_rows(path), path
    if not path.exists():
        raise DataError(f"{path}, which does not exist", "a file or folder of data", "check the path")
    if path.suffix not in _READERS:
        raise unknown_layout(f"the file {path}")
    return _READERS[path.suffix](path), path.parent


def _folder_rows(folder: Path) -> Iterable[Row]:
    names = sorted(entry.name for entry in folder.iterdir())
    tables = [name for name in names if re.fullmatch(r"metadata\.(jsonl|csv|parquet)|results\.csv", name)]
    if len(tables) > 1:
        raise DataError(f"{folder} with {' and '.join(tables)}", "one of them", "give the path of one file")
    if tables:
        return _READERS[Path(tables[0]).suffix](folder / tables[0])
    shards = [name for name in names if name.endswith(".parquet")]
    if not shards:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise unknown_layout(f"{folder}, which holds {', '.join(names[:8]) + more or 'nothing'}")
    splits = sorted({match[1] for name in shards if (match := re.match(r"(.+)-\d+-of-\d+", name))})
    if len(splits) > 1:
        raise DataError(f"{folder} with shards of {splits}", "one split", "move each split to a folder of its own")
    return (row for name in shards for row in _parquet_rows(folder / name))


def unknown_layout(got: str) -> DataError:
    layouts = "; ".join(f"({number}) {layout}" for number, layout in enumerate(LAYOUTS, 1))
    return DataError(got, f"one of these layouts: {layouts}", "rename the columns or files to fit one of them")


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}, which cannot be read: {error}", f"a valid {path.suffix} file", "repair or replace it")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, decoded as UTF-8 with or without a byte order mark."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise _unreadable(path, error) from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        name = f"{path.name} line {number}"
        if line.strip():
            try:
                yield _object_row(name, json.loads(line))
            except json.JSONDecodeError as error:
                yield Row(name, {}, f"not JSON: {error}")


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise _unreadable(path, error) from error
    if not isinstance(content, list):
        raise unknown_layout(f"{path}, a JSON {type(content).__name__} where a list of rows should be")
    for index, values in enumerate(content):
        yield _object_row(f"{path.name} row {index}", values)


def _object_row(name: str, values: Any) -> Row:
    if isinstance(values, dict):
        return Row(name, values)
    return Row(name, {}, f"a JSON {type(values).__name__}, not an object")


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a comma-separated file, or of Flickr30k's results.csv."""
    lines = (line for _, line in _lines(path))
    header = next(lines, "")
    if [field.strip() for field in header.split("|")] == _FLICKR_HEADER:
        yield from _flickr_rows(path)
        return
    columns = next(csv.reader([header]), [])
    reader = csv.reader(lines)
    try:
        for fields in reader:
            name = f"{path.name} line {reader.line_num + 1}"
            if len(fields) == len(columns):
                yield Row(name, dict(zip(columns, fields, strict=True)))
            elif fields:
                yield Row(name, {}, f"{len(fields)} fields where the header has {len(columns)}")
    except csv.Error as error:
        raise _unreadable(path, error) from error


def _flickr_rows(path: Path) -> Iterator[Row]:
    """`name.jpg| 0| A caption .`, not quoted, the pictures beside the file or in a folder beside it.

    The published file has one row that lacks a bar; it is dropped, not repaired.
    """
    folders = [path.parent, *sorted(entry for entry in path.parent.iterdir() if entry.is_dir())]
    contents = {folder: set(os.listdir(folder)) for folder in folders}
    for number, line in _lines(path):
        name = f"{path.name} line {number}"
        fields = [field.strip() for field in line.split("|", 2)]
        if number > 1 and len(fields) == 3:
            folder = next((folder for folder in folders if fields[0] in contents[folder]), path.parent)
            yield Row(name, {"image": str((folder / fields[0]).absolute()), "caption": fields[2]})
        elif number > 1 and line.strip():
            yield Row(name, {}, f"{len(fields)} fields separated by bars, not 3: {line.strip()!r}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(_BATCH)
            yield from _table_rows(path.name, batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _dataset_rows(dataset: Any) -> Iterator[Row]:
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        do = "choose a split of a DatasetDict, or save another kind to parquet and give its path"
        raise DataError(f"a {type(dataset).__name__}", "a path or a datasets.Dataset", do)
    return _table_rows("dataset", dataset.with_format("arrow").iter(_BATCH))  # the arrow format decodes no picture


def _table_rows(name: str, tables: Iterable[Any]) -> Iterator[Row]:
    index = 0
    for table in tables:
        for values in table.to_pylist():
            yield Row(f"{name} row {index}", values)
            index += 1


_READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
