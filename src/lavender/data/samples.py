"""Read data sets of images with conversations into samples.

`lavender.data.folders` finds the rows and `lavender.data.conversations` reads their texts; here rows become samples. A
row that cannot be used is dropped, and reported with its name and a reason.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from lavender.data.about import entries_of, links_of
from lavender.data.columns import (
    CAPTION_COLUMNS,
    COLUMNS,
    PICTURE_COLUMNS,
    TEXT_COLUMNS,
    check_columns_found,
    checked_columns,
    renamed,
)
from lavender.data.conversations import UnusableError, read_row
from lavender.data.folders import caches, find_rows
from lavender.data.images import embedded, image_id
from lavender.data.sample import Sample, Source
from lavender.data.sample_table import SampleTable
from lavender.data.tables import Row, unknown_format
from lavender.errors import DataError, nearest
from lavender.files import expanded, fault_of, half_character, printable, shown
from lavender.maps import Dropped

if TYPE_CHECKING:
    import datasets

__all__ = [
    "CAPTION_COLUMNS",
    "PICTURE_COLUMNS",
    "TEXT_COLUMNS",
    "Sample",
    "Samples",
    "Source",
    "read_samples",
    "readable",
    "to_dataset",
]

_COLUMN = re.compile(r"\w[\w .\-]{0,39}")
_MAX_THREADS = 8  # that decode at once: an image of the largest size takes up to 1 GB
_AT_ONCE = 64  # samples whose images are decoded at once
_REMEMBERED = 20_000  # image files whose ids are remembered, for the other texts of the same image


@dataclass(frozen=True)
class Samples:
    """The samples of a data set in its order, and what was dropped from it.

    Attributes:
        samples: the usable samples. `read_samples` keeps them in a temporary file, so they may be more than fit into
            the memory.
        dropped: the rows that cannot be used, with the reason.
        outside: the images that are read although they lie outside the folder of the data, by an absolute path, "..",
            or a link. Of a data set of `datasets` or of the hub, the cache of `datasets` is inside too.
        identities: the `image_id` of each image of each sample. `readable` fills it; before it is ().
    """

    samples: Sequence[Sample]
    dropped: tuple[Dropped, ...] = ()
    outside: tuple[Dropped, ...] = ()
    identities: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def check_strict(self) -> None:
        """Raise DataError if a row was dropped or an image lies outside the folder. Decodes nothing."""
        for drop in (*self.dropped, *self.outside):
            do = "move the pictures there, or leave strict out" if drop in self.outside else "repair or remove it"
            raise DataError(f"{drop.what}: {drop.reason}", "every sample to be usable, as strict asks", do)


def read_samples(
    path: str | Path | datasets.Dataset | datasets.IterableDataset,
    prompt: str = "Describe the image.",
    columns: Mapping[str, str] | None = None,
) -> Samples:
    """Read a data set of images with text, in any of `lavender.data.tables.DATA_FORMATS`.

    Image files must exist and are not decoded. Their paths are relative to the data file, or to the working directory
    for a `datasets.Dataset` and a data set of the hub. They may lead out of its folder, see `Samples.outside`.

    The rows are read one by one into a temporary file, with the encoded images that they hold. `TMPDIR` chooses its
    folder. So the memory does not grow with the number of samples.

    Columns are tried in the order messages, conversations, prompt + completion, instruction + output, text, caption. A
    list of captions gives one sample per caption. A conversation may have any number of images, each with its place in
    a user's turn, and may name them there. A single image without a place is put at the beginning of the first user
    turn. A column `about` may say which words of the answers take the map of which other words, see
    `lavender.data.about`.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (40, 30)).save(f"{folder}/dog.png")
        ...     _ = Path(folder, "metadata.jsonl").write_text('{"file_name": "dog.png", "alt": "a red dog"}')
        ...     columns = {"image": "file_name", "caption": "alt"}
        ...     print([sample.answers for sample in read_samples(folder, columns=columns)])
        [('a red dog',)]

    Args:
        path: a file, a folder, a hub id, any of these with `:SPLIT`, or a data set of `datasets`.
        prompt: the user's turn for data that have only captions.
        columns: the data's own names of columns: image, question, answer, caption, messages, system, about → name.
            Only these columns are read then. None for the usual names.

    Returns:
        The usable samples, and the dropped rows with the reason.

    Raises:
        ConfigError: `columns` has an unknown key, no text, or names a column that no row has.
        DataError: no such path, an unknown format, a missing shard, a file that cannot be read, no usable row, or no
            row with an image.
        FileError: the disk of temporary files is full.
    """
    columns = checked_columns(columns)
    found = find_rows(path, columns)
    label = printable(path) if isinstance(path, (str, Path)) else "a dataset"
    reading = _Reading(found.rows, _Folder(found.folder, caches() if found.is_cached else ()), prompt, columns)
    table = SampleTable.of(reading)
    check_columns_found(columns, reading.columns, label)
    if not reading.has_pictures:
        names = dict.fromkeys(renamed({}, columns)) if columns and reading.columns else reading.columns
        raise _without_pictures(label, len(table), reading.dropped, names)
    return Samples(table, tuple(reading.dropped), outside=tuple(reading.folder.outside))


class _Reading:
    """The samples of rows, one by one; and what was found on the way."""

    def __init__(self, rows: Iterable[Row], folder: _Folder, prompt: str, columns: Mapping[str, str]):
        self._rows, self._prompt, self._renamed = rows, prompt, columns
        self.folder = folder
        self.dropped: list[Dropped] = []
        self.columns: dict[str, None] = {}  # an ordered set
        self.has_pictures = False

    def __iter__(self) -> Iterator[Sample]:
        for row in self._rows:
            self.columns |= dict.fromkeys(row.values)
            try:
                for sample in self._samples(row):
                    self.has_pictures |= bool(sample.sources)
                    yield sample
            except UnusableError as error:
                self.dropped.append(Dropped(row.name, str(error)))

    def _samples(self, row: Row) -> list[Sample]:
        if row.fault:
            raise UnusableError(row.fault)
        values = renamed(row.values, self._renamed) if self._renamed else row.values
        pictures, conversations = read_row(values, self._prompt)
        about = entries_of(values.get("about"))
        if about and len(conversations) > 1:
            raise UnusableError("about with several captions; write a row for each caption")
        if about:
            links_of(about, conversations[0])
        sources = tuple(self.folder.source(picture, row.name) for picture in pictures)
        if len(conversations) == 1:
            return [Sample(row.name, sources, conversations[0], about)]
        return [Sample(f"{row.name} caption {index}", sources, turns) for index, turns in enumerate(conversations)]


def _other_columns(label: str, names: list[str], has_pictures: bool) -> DataError:
    """The error of a data set whose column of pictures or of texts has another name, if one looks like it."""
    missing = TEXT_COLUMNS if has_pictures else PICTURE_COLUMNS
    others = [name for name in names if name not in COLUMNS]
    found = next(((name, own) for name in others if (own := nearest(name, missing))), None)
    if found is None:
        return unknown_format(f"{label} with the columns {shown(names)}")
    other, own = found
    known = next((name for name in names if name in (PICTURE_COLUMNS if has_pictures else TEXT_COLUMNS)), "")
    picture, (text, kind) = (known, (other, own)) if has_pictures else (other, (known, known))
    option = ""
    if kind in ("messages", *CAPTION_COLUMNS):
        option = f", or give --columns image={picture},{'messages' if kind == 'messages' else 'caption'}={text}"
    return DataError(
        f"{label} with the columns {shown(names)}",
        f"one of {', '.join(missing)}",
        f"rename the column {other} to {own}{option}",
    )


def _without_pictures(label: str, number: int, dropped: list[Dropped], columns: Mapping[str, None]) -> DataError:
    """The error of a data set without an image."""
    if not columns and not dropped:
        return DataError(f"{label}, which has no row", "at least one usable row", "check the file")
    first = f"; the first, {dropped[0].what}: {dropped[0].reason}" if dropped else ""
    has_pictures = columns.keys() & set(PICTURE_COLUMNS)
    if not has_pictures and (addresses := [name for name in ("url", "URL") if name in columns]):
        got = f"{label}, whose column {addresses[0]} has addresses of pictures{first}"
        return DataError(
            got, "pictures on this disk", "download them with img2dataset, and give the folder that it writes"
        )
    if columns and not (has_pictures and columns.keys() & set(TEXT_COLUMNS)):
        # What does not look like a column name may be the content of a file that is not a table.
        names = [name if _COLUMN.fullmatch(name) else "…" for name in columns]
        return _other_columns(label, names, bool(has_pictures))
    if number:
        got = f"{label} with {number} samples, none with a picture, and {len(dropped)} rows dropped{first}"
        return DataError(got, "a sample with a picture", f"name pictures in a column {' or '.join(PICTURE_COLUMNS)}")
    return DataError(f"{label} with {len(dropped)} rows, none usable{first}", "at least one usable row", "repair them")


def to_dataset(samples: Iterable[Sample]) -> datasets.Dataset:
    """Convert samples to a dataset with the columns `images` and `messages`, as TRL's SFTTrainer takes it.

    If a sample has `about`, the dataset has this column too; an `AlignmentCollator` reads it. Paths stay paths, and
    encoded images stay encoded. An image in memory is stored as PNG, which keeps its pixels and its `image_id`. The
    dataset lies in a temporary file, which is removed when the process ends.

    Examples:
        >>> from PIL import Image
        >>> from lavender.data import Sample
        >>> question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
        >>> answer = {"role": "assistant", "content": [{"type": "text", "text": "a red dog"}]}
        >>> dataset = to_dataset([Sample("example", (Image.new("RGB", (40, 30)),), [question, answer])])
        >>> dataset.column_names, dataset[0]["images"][0].size
        (['images', 'messages'], (40, 30))

    Args:
        samples: the samples, for instance `Samples`.

    Returns:
        A dataset with a row per sample. `images` is a list of decoded images when read, empty for text-only samples.

    Raises:
        DataError: an image in memory cannot be used.
        FileError: the disk of temporary files is full.
    """
    table = samples.samples if isinstance(samples, Samples) else samples
    return (table if isinstance(table, SampleTable) else SampleTable.of(table)).dataset()


class _Folder:
    """The folder to which the paths of images are relative; `others` are folders in which they may lie too."""

    def __init__(self, path: Path, others: Iterable[Path] = ()):
        self._path, self._real = path, os.path.realpath(path)
        self._inside = tuple(os.path.join(os.path.realpath(one), "") for one in (path, *others))
        if fault := half_character(self._real):
            got = f"the folder {printable(self._real)}, whose name has {fault}"
            raise DataError(got, "a name in UTF-8", "rename it")
        self._real_folder = lru_cache(maxsize=1000)(os.path.realpath)
        self.outside: list[Dropped] = []

    def source(self, picture: Any, row: str) -> Source:
        """The source of an image as a row names it. Raises UnusableError."""
        if isinstance(picture, dict):
            picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
        if isinstance(picture, bytes):
            return picture
        if not isinstance(picture, str):
            raise UnusableError(f"the picture is a {type(picture).__name__}, not a path or an encoded picture")
        if fault := half_character(picture):
            raise UnusableError(f"the picture's name has {fault}")
        name = unquote(picture[7:]) if picture[:7].lower() == "file://" else picture
        path = self._path / (expanded(name) if name.startswith("~") else name)
        fault = fault_of(path)
        if not fault:
            if self._is_outside(path):
                where = printable(self._real)
                self.outside.append(Dropped(row, f"the picture {printable(path)} lies outside the folder {where}"))
            return path
        try:
            encoded = embedded(picture)
        except ValueError as error:
            raise UnusableError(str(error)) from error
        if encoded is not None:
            return encoded
        if "://" in name:
            raise UnusableError(f"the picture is the address {printable(picture)}; download it and give its path")
        raise UnusableError(fault)

    def _is_outside(self, path: Path) -> bool:
        """Whether the path leads outside the folders once links are resolved."""
        folder, name = os.path.split(path)
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(self._real_folder(folder), name)
        return not real.startswith(self._inside)


def readable(samples: Samples) -> Samples:
    """Decode every image once: keep the samples whose images can be decoded, with their ids, and drop the others.

    Args:
        samples: the samples, for instance from `read_samples`.

    Returns:
        The usable samples with `identities`; the others are added to `dropped`.

    Raises:
        DataError: no sample is usable.
    """
    kept: list[int] = []
    identities: list[tuple[str, ...]] = []
    dropped: list[Dropped] = []
    for index, (name, ids) in enumerate(_all_identities(samples)):
        if isinstance(ids, str):
            dropped.append(Dropped(name, ids))
        else:
            kept.append(index)
            identities.append(ids)
    if not kept:
        got = f"{len(samples)} samples, none with a usable picture; the first, {dropped[0].what}: {dropped[0].reason}"
        raise DataError(got, "at least one usable sample", "repair the pictures")
    table = samples.samples
    chosen = table.select(kept) if isinstance(table, SampleTable) else tuple(table[index] for index in kept)
    return Samples(chosen, samples.dropped + tuple(dropped), samples.outside, tuple(identities))


def _all_identities(samples: Iterable[Sample]) -> Iterator[tuple[str, tuple[str, ...] | str]]:
    """(name, `_identities`) of each sample. A file is decoded once for texts that are not too far apart."""
    known: dict[Any, tuple[str, ...] | str] = {}
    numbered = enumerate(samples)
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        while part := list(islice(numbered, _AT_ONCE)):
            keys = [
                sample.sources if sample.sources and all(isinstance(one, Path) for one in sample.sources) else index
                for index, sample in part
            ]
            new = {key: sample for key, (_, sample) in zip(keys, part, strict=True) if key not in known}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as load_image does, whose filters all threads share
                known |= zip(new, pool.map(_identities, new.values()), strict=True)
            yield from [(sample.name, known[key]) for key, (_, sample) in zip(keys, part, strict=True)]
            for key in list(islice(known, max(0, len(known) - _REMEMBERED))):
                del known[key]


def _identities(sample: Sample) -> tuple[str, ...] | str:
    """The `image_id` of each image, or why one cannot be used."""
    try:
        return tuple(image_id(picture) for picture in sample.load())
    except DataError as error:
        return str(error)
