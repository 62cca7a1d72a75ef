"""Find the rows of a data set: of a file, a folder, one of its splits, or a data set of the hub."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lavender.data.columns import COLUMNS
from lavender.data.published import (
    has_texts,
    img2dataset_rows,
    is_img2dataset,
    json_rows,
    no_split,
    several_splits,
    text_rows,
)
from lavender.data.tables import (
    Row,
    Wanted,
    arrow_rows,
    csv_rows,
    dataset_rows,
    jsonl_rows,
    parquet_rows,
    unknown_format,
    unreadable,
)
from lavender.data.webdataset import webdataset_rows
from lavender.errors import DataError
from lavender.files import MISSING, data_path, fault_of, is_plain_path, printable

if TYPE_CHECKING:
    import datasets

_READERS = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".tar": webdataset_rows,
}
_SHARD = re.compile(r"(?P<split>.*?)[-_.]?(?P<number>\d+)[-_]of[-_](?P<count>\d+)(?!\d).*")
# The names that `datasets` knows too.
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
_HUB = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?::(?P<config>[\w.-]+)(?=:))?(?::(?P<split>[\w.+%:\[\]-]+))?")


class Found(NamedTuple):
    """The rows of a data set.

    Attributes:
        rows: the rows.
        folder: to which their paths are relative.
        is_cached: whether pictures may also lie in the cache of `datasets`, into which it downloads.
    """

    rows: Iterable[Row]
    folder: Path
    is_cached: bool = False


def caches() -> list[Path]:
    """The folders into which `datasets` puts what it downloads."""
    from datasets import config
    from huggingface_hub import constants

    names = config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH
    return [Path(name) for name in (*names, constants.HF_HUB_CACHE)]


def find_rows(path: str | Path | datasets.Dataset | datasets.IterableDataset, columns: Mapping[str, str]) -> Found:
    """The rows of a data set, and where its pictures are.

    Args:
        path: see `lavender.data.read_samples`.
        columns: the columns that are read, see `lavender.data.columns`; {} for the usual ones.

    Raises:
        DataError: there is no such data set, or its files have another layout.
    """
    wanted = Wanted(frozenset(columns.values()) or COLUMNS)
    if not isinstance(path, (str, Path)):
        return Found(dataset_rows(path, wanted), Path(), is_cached=True)
    path, may_be_id = data_path(path), not is_plain_path(path)
    if not os.path.lexists(path):
        before, sign, split = str(path).rpartition(":")
        if sign and split and os.path.lexists(before):
            path, wanted = Path(before), wanted._replace(split=split)
    if os.path.isdir(path):
        return _folder_rows(path, wanted)
    reader = _READERS.get(path.suffix.lower())
    hub = _HUB.fullmatch(str(path)) if may_be_id else None
    if hub and not reader and not os.path.lexists(path):
        return Found(_hub_rows(hub, wanted), Path(), is_cached=True)
    if fault := fault_of(path):
        got = f"{printable(path)}, which does not exist" if fault.startswith(MISSING) else fault
        raise DataError(got, "a file or folder of data", "check the path")
    if reader is None:
        raise unknown_format(f"the file {printable(path)}")
    if wanted.split and reader is not json_rows:
        raise no_split(path, wanted.split)
    return Found(reader(path, wanted), path.parent, is_cached=reader is arrow_rows)


def _hub_rows(hub: re.Match[str], wanted: Wanted) -> Iterator[Row]:
    """Rows of a data set of the hub, ORG/NAME[:CONFIG][:SPLIT], which `datasets` downloads into its cache."""
    import datasets

    name, config, split = hub["name"], hub["config"], hub["split"]
    try:
        loaded: Any = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of the network, the hub, or any reader
        why = printable(" ".join(str(error).split()))
        got = f"{name}, which is no path here, and which `datasets` cannot load: {why}"
        raise DataError(got, "a path, or the id of a hub data set", "check the name and the network") from error
    return dataset_rows(_one_split(loaded, Path(hub[0])), wanted, name)


def _one_split(loaded: Any, path: Path, split: str = "") -> Any:
    """The data set of a split. Without the split's name, the only one."""
    import datasets

    if not isinstance(loaded, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split:
            raise no_split(path, split)
        return loaded
    splits = [str(name) for name in loaded]
    if split and split not in splits:
        raise no_split(path, split, splits)
    if not split and len(splits) != 1:
        raise several_splits(path, splits)
    return loaded[split or splits[0]]


def _folder_rows(folder: Path, wanted: Wanted) -> Found:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        got = f"{printable(folder)}, which cannot be read: {error.strerror}"
        raise DataError(got, "a folder that you may read", "change its permissions, or check the path") from error
    tables = [name for name in names if re.fullmatch(r"metadata\.(jsonl|csv|parquet)|results\.csv", name)]
    if len(tables) > 1:
        raise DataError(f"{printable(folder)} with {' and '.join(tables)}", "one of them", "give the path of one file")
    split = wanted.split
    if {"dataset_dict.json", "state.json"} & set(names):
        return Found(_saved_rows(folder, wanted), folder, is_cached=True)
    if split and split in names and os.path.isdir(folder / split):
        return _folder_rows(folder / split, wanted._replace(split=""))
    shards = [name for name in names if re.fullmatch(r"[^.].*\.(parquet|arrow|tar)", name)]
    if split:
        texts = [name for name in names if re.fullmatch(rf"{re.escape(split)}\.(jsonl|json|csv)", name)]
        shards = [name for name in shards if split == _split_in(name) or re.match(rf"{re.escape(split)}[-_.]", name)]
        if tables or bool(shards) + len(texts) != 1:
            raise no_split(folder, split)
        if texts:
            return Found(_READERS[Path(texts[0]).suffix](folder / texts[0], wanted._replace(split="")), folder)
    if tables:
        return Found(_READERS[Path(tables[0]).suffix](folder / tables[0], wanted), folder)
    if is_img2dataset(folder, names):
        return Found(img2dataset_rows(folder, names, wanted), folder)
    if shards:
        _check_shards(folder, shards)
        rows = (row for name in shards for row in _READERS[Path(name).suffix](folder / name, wanted))
        return Found(rows, folder, is_cached=all(name.endswith(".arrow") for name in shards))
    splits = [name for name in names if name.lower() in _SPLITS and os.path.isdir(folder / name)]
    if len(splits) <= 1 and has_texts(folder):
        return Found(text_rows(folder), folder)
    raise several_splits(folder, splits) if splits else _no_data(folder, names)


def _no_data(folder: Path, names: Sequence[str]) -> DataError:
    """The error of a folder that has no known layout."""
    if files := [name for name in names if Path(name).suffix.lower() in _READERS]:
        got = f"the folder {printable(folder)} with {', '.join(printable(name) for name in files[:8])}"
        return DataError(got, "one file", f"give the path of one, as {printable(folder / files[-1])}")
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    holds = ", ".join(printable(name) for name in names[:8])
    return unknown_format(f"{printable(folder)}, which holds {holds + more or 'nothing'}")


def _split_in(name: str) -> str:
    """The split in the name of a shard, or ""."""
    if match := _SHARD.fullmatch(name):
        return match["split"]
    words = re.split(r"[-_. 0-9]+", name.rpartition(".")[0])
    return next((word for word in words if word.lower() in _SPLITS), "")


def _saved_rows(folder: Path, wanted: Wanted) -> Iterator[Row]:
    """Rows of what `save_to_disk` wrote."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged files raise errors of any type
        raise unreadable(folder, error) from error
    return dataset_rows(_one_split(loaded, folder, wanted.split), wanted)


def _check_shards(folder: Path, names: Sequence[str]) -> None:
    """Refuse shards of several splits or kinds, and an incomplete set of shards by the count in their names."""
    if len(kinds := {Path(name).suffix for name in names}) > 1:
        got = f"{printable(folder)} with files of the kinds {', '.join(sorted(kinds))}"
        raise DataError(got, "shards of one kind", "give the path of one file, or remove those of the other kind")
    splits = {_split_in(name) for name in names if _split_in(name) or _SHARD.fullmatch(name)}
    if len(splits) > 1:
        raise several_splits(folder, sorted(splits - {""}))
    numbers: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    for name in names:
        if match := _SHARD.fullmatch(name):
            numbers[match["split"], match["count"]][int(match["number"])] += 1
    label = printable(folder)
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
