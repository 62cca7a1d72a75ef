"""Pictures with conversations, in one form whatever the columns they come in.

`lavender.data.tables` finds the rows and `lavender.data.conversations` their texts; here a row becomes samples.
A row that cannot be used is dropped with its name and a reason, never silently.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lavender.data.conversations import (
    UnusableError,
    check_columns,
    conversations_of,
    mismatch,
    num_places,
    pictures_of,
    text_of,
)
from lavender.data.images import embedded, image_id, load_image
from lavender.data.tables import CAPTION_COLUMNS, PICTURE_COLUMNS, TEXT_COLUMNS, Row, find_rows, unknown_layout
from lavender.errors import DataError
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

Source = Path | bytes | Image.Image

_PIECE_ROWS, _PIECE_BYTES = 1000, 10**9  # the most of a table: one Arrow array of bytes holds 2 GB
_COLUMN = re.compile(r"\w[\w .\-]{0,39}")
_MAX_THREADS = 8  # that decode at once: a picture of the largest size takes up to 1 GB


@dataclass(frozen=True)
class Sample:
    """One conversation about one picture, several or none.

    Attributes:
        name: for people: the file and the row or line in it.
        sources: the pictures in the order of their places, not yet decoded: each a path, an encoded file, or a
            picture in memory. () for text alone.
        messages: [{"role": …, "content": [{"type": "image"} or {"type": "text", "text": …}, …]}, …], with a part
            of type "image" for each picture, in the user's turns.

    Raises:
        DataError: another number of places than of pictures.
    """

    name: str
    sources: tuple[Source, ...]
    messages: list[dict[str, Any]]

    def __post_init__(self) -> None:
        if (places := num_places(self.messages)) != len(self.sources):
            got = f"{self.name} with {mismatch(len(self.sources), places)}"
            raise DataError(got, "a place for each picture", 'put a part {"type": "image"} where each picture belongs')

    @property
    def source(self) -> Source | None:
        """The picture of a sample that has exactly one; None for others."""
        return self.sources[0] if len(self.sources) == 1 else None

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts of the assistant's turns: what is learnt."""
        turns = [message["content"] for message in self.messages if message["role"] == "assistant"]
        return tuple(text_of(content) for content in turns)

    @property
    def pairs(self) -> tuple[tuple[int, str], ...]:
        """What has maps: (index of a picture, answer), each answer on each picture before it, picture by picture."""
        found: list[tuple[int, str]] = []
        for turn, message in enumerate(self.messages):
            if message["role"] == "assistant":
                before = range(num_places(self.messages[:turn]))
                found += [(index, text_of(message["content"])) for index in before]
        return tuple(sorted(found, key=lambda pair: pair[0]))

    def load(self) -> tuple[Image.Image, ...]:
        """The decoded pictures; see `load_image`. Raises DataError naming the sample."""
        return tuple(self.load_picture(index) for index in range(len(self.sources)))

    def load_picture(self, index: int) -> Image.Image:
        """One of the pictures, decoded. Raises DataError naming the sample."""
        which = f"picture {index + 1}" if len(self.sources) > 1 else "the picture"
        return load_image(self.sources[index], f"{which} of {self.name}")


@dataclass(frozen=True)
class Samples:
    """The samples of a data set in its order, and what was dropped from it.

    Attributes:
        outside: the pictures that are read although they lie outside the folder of the data: by an absolute path,
            by "..", or by a link.
        identities: of each sample the `image_id` of each of its pictures; known after `readable`, () before.
    """

    samples: tuple[Sample, ...]
    dropped: tuple[Dropped, ...] = ()
    outside: tuple[Dropped, ...] = ()
    identities: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def check_strict(self) -> None:
        """Refuse what `strict` refuses before anything is decoded. Raises DataError."""
        for drop in (*self.dropped, *self.outside):
            do = "move the pictures there, or leave strict out" if drop in self.outside else "mend or remove it"
            raise DataError(f"{drop.what}: {drop.reason}", "every sample to be usable, as strict asks", do)


def read_samples(path: str | Path | datasets.Dataset, prompt: str = "Describe the image.") -> Samples:
    """Read a data set of pictures with text, in any of `lavender.data.tables.LAYOUTS`.

    No picture is decoded; that a file exists is checked. Paths are relative to the data file (in a
    `datasets.Dataset`, to the working directory), and may lead out of its folder; see `Samples.outside`. Encoded
    pictures inside parquet or a Dataset, and base64 inside a text file, are held in memory.
    Columns are tried in the order messages, conversations, prompt + completion, text, caption. A caption that is a
    list of texts gives one sample each. A conversation may have several pictures, each with its place in a user's
    turn, or none; a single picture without a place stands in the first user turn.

    Args:
        path: a file, a folder, or a dataset.
        prompt: the user's turn where the data have only captions.

    Raises:
        DataError: no such path, no known layout, a missing shard, a file that cannot be read, no usable row, or none
            with a picture.
    """
    rows, root = find_rows(path)
    label = printable(path) if isinstance(path, (str, Path)) else "a dataset"
    folder = _Folder(root)
    samples: list[Sample] = []
    dropped: list[Dropped] = []
    columns: dict[str, None] = {}  # an ordered set
    for row in rows:
        columns |= dict.fromkeys(row.values)
        try:
            samples += _samples_of_row(row, folder, prompt)
        except UnusableError as error:
            dropped.append(Dropped(row.name, str(error)))
    if not any(sample.sources for sample in samples):
        raise _without_pictures(label, samples, dropped, columns)
    return Samples(tuple(samples), tuple(dropped), outside=tuple(folder.outside))


def _without_pictures(label: str, samples: list[Sample], dropped: list[Dropped], columns: dict[str, None]) -> DataError:
    """Why a data set without a picture is none."""
    if not columns and not dropped:
        return DataError(f"{label}, which has no row", "at least one usable row", "check the file")
    if columns and not (columns.keys() & set(PICTURE_COLUMNS) and columns.keys() & set(TEXT_COLUMNS)):
        # What looks like no name of a column may be the content of a file that is no table.
        names = [name if _COLUMN.fullmatch(name) else "…" for name in columns]
        return unknown_layout(f"{label} with the columns {shown(names)}")
    first = f"; the first, {dropped[0].what}: {dropped[0].reason}" if dropped else ""
    if samples:
        got = f"{label} with {len(samples)} samples, none with a picture, and {len(dropped)} rows dropped{first}"
        return DataError(got, "a sample with a picture", f"name pictures in a column {' or '.join(PICTURE_COLUMNS)}")
    return DataError(f"{label} with {len(dropped)} rows, none usable{first}", "at least one usable row", "repair them")


def to_dataset(samples: Iterable[Sample]) -> datasets.Dataset:
    """A dataset with the columns `images` (a list, empty for text alone) and `messages`, ready for TRL's SFTTrainer.

    Files stay paths and encoded pictures stay encoded; a picture in memory is stored as PNG, so its pixels and
    with them its `image_id` stay the same.
    """
    import datasets

    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": datasets.List(turn)})
    pieces = [datasets.Dataset.from_dict(piece, features=features) for piece in _pieces(samples)]
    return datasets.concatenate_datasets(pieces)


def _pieces(samples: Iterable[Sample]) -> Iterator[dict[str, list[Any]]]:
    """Columns of some samples at a time, at least once."""
    piece: dict[str, list[Any]] = {"images": [], "messages": []}
    size = 0
    for sample in samples:
        images = [_encoded(sample, index) for index in range(len(sample.sources))]
        more = sum(len(image["bytes"] or b"") for image in images)
        if len(piece["images"]) == _PIECE_ROWS or (piece["images"] and size + more > _PIECE_BYTES):
            yield piece
            piece, size = {"images": [], "messages": []}, 0
        piece["images"].append(images)
        piece["messages"].append(sample.messages)
        size += more
    yield piece


def _encoded(sample: Sample, index: int) -> dict[str, Any]:
    source = sample.sources[index]
    if isinstance(source, Path):
        return {"bytes": None, "path": str(source.absolute())}
    if isinstance(source, bytes):
        return {"bytes": source, "path": None}
    buffer = BytesIO()
    sample.load_picture(index).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _samples_of_row(row: Row, folder: _Folder, prompt: str) -> list[Sample]:
    if row.fault:
        raise UnusableError(row.fault)
    check_columns(row.values)
    pictures = pictures_of(row.values)
    conversations = conversations_of(row.values, prompt, len(pictures))
    sources = tuple(folder.source(picture, row.name) for picture in pictures)
    if len(conversations) == 1:
        return [Sample(row.name, sources, conversations[0])]
    return [Sample(f"{row.name} caption {index}", sources, one) for index, one in enumerate(conversations)]


class _Folder:
    """The folder to which the paths of pictures are relative."""

    def __init__(self, path: Path):
        self._path, self._real = path, os.path.realpath(path)
        self._real_folder = lru_cache(maxsize=1000)(os.path.realpath)
        self.outside: list[Dropped] = []

    def source(self, picture: Any, row: str) -> Source:
        """A picture as it is written in a row. Raises UnusableError."""
        if isinstance(picture, dict):
            picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
        if isinstance(picture, bytes):
            return picture
        if not isinstance(picture, str):
            raise UnusableError(f"the picture is a {type(picture).__name__}, not a path or an encoded picture")
        if fault := half_character(picture):
            raise UnusableError(f"the picture's name has {fault}")
        path = self._path / (expanded(picture) if picture.startswith("~") else picture)
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
        if "://" in picture:
            raise UnusableError(f"the picture is the address {printable(picture)}; download it and give its path")
        raise UnusableError(fault)

    def _is_outside(self, path: Path) -> bool:
        folder, name = os.path.split(path)
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(self._real_folder(folder), name)
        return not real.startswith(os.path.join(self._real, ""))


def readable(samples: Samples) -> Samples:
    """The samples whose pictures can be decoded, and what identifies these; the others are dropped before training."""
    places = [
        one.sources if one.sources and all(isinstance(source, Path) for source in one.sources) else index
        for index, one in enumerate(samples)
    ]
    pictures = dict(zip(places, samples, strict=True))  # each file once, however many texts it has
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # load_image does so too, but the filters are shared by all threads
        found = dict(zip(pictures, pool.map(_identities, pictures.values()), strict=True))
    seen = [(one, found[place]) for place, one in zip(places, samples, strict=True)]
    kept = tuple(one for one, ids in seen if not isinstance(ids, str))
    identities = tuple(ids for _, ids in seen if not isinstance(ids, str))
    dropped = tuple(Dropped(one.name, reason) for one, reason in seen if isinstance(reason, str))
    if not kept:
        got = f"{len(samples)} samples, none with a usable picture; the first, {dropped[0].what}: {dropped[0].reason}"
        raise DataError(got, "at least one usable sample", "repair the pictures")
    return Samples(kept, samples.dropped + dropped, samples.outside, identities)


def _identities(sample: Sample) -> tuple[str, ...] | str:
    """Of each of its pictures, or why one cannot be used."""
    try:
        return tuple(image_id(picture) for picture in sample.load())
    except DataError as error:
        return str(error)
