"""Read data sets of images with conversations into samples.

`lavender.data.tables` reads rows and `lavender.data.conversations` their texts; here rows become samples. A row that
cannot be used is dropped, and reported with its name and a reason.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lavender.config import ROLES, Texts
from lavender.data.about import About, entries_of, links_of
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
from lavender.data.tables import CAPTION_COLUMNS, PICTURE_COLUMNS, TEXT_COLUMNS, Row, find_rows, unknown_format
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

_PIECE_ROWS, _PIECE_BYTES = 1000, 10**9  # limits of a table: an Arrow array of bytes holds 2 GB
_NEEDED = ("images", "messages")  # columns that every dataset has
_COLUMN = re.compile(r"\w[\w .\-]{0,39}")
_MAX_THREADS = 8  # that decode at once: an image of the largest size takes up to 1 GB


@dataclass(frozen=True)
class Sample:
    """A conversation with any number of images.

    Attributes:
        name: the file and the row or line in it, for messages.
        sources: the images in the order of their places, not yet decoded: each a path, the bytes of a file, or an
            image in memory. () for a text-only sample.
        messages: [{"role": …, "content": [{"type": "image"} or {"type": "text", "text": …}, …]}, …]. The user's turns
            have a part of type "image" for each image.
        about: which words of the answers take the map of which other words, see `lavender.data.about`.

    Raises:
        DataError: the numbers of places and images differ.
    """

    name: str
    sources: tuple[Source, ...]
    messages: list[dict[str, Any]]
    about: tuple[About, ...] = ()

    def __post_init__(self) -> None:
        if (places := num_places(self.messages)) != len(self.sources):
            got = f"{self.name} with {mismatch(len(self.sources), places)}"
            raise DataError(got, "a place for each picture", 'put a part {"type": "image"} where each picture belongs')

    @property
    def source(self) -> Source | None:
        """The image of a sample that has exactly one, else None."""
        return self.sources[0] if len(self.sources) == 1 else None

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts of the assistant's turns, which the model learns."""
        turns = [message["content"] for message in self.messages if message["role"] == "assistant"]
        return tuple(text_of(content) for content in turns)

    @property
    def pairs(self) -> tuple[tuple[int, str], ...]:
        """(index of an image, answer) of each answer on each image before it, image by image."""
        return self.pairs_of("answers")

    def pairs_of(self, texts: Texts) -> tuple[tuple[int, str], ...]:
        """(index of an image, text) of each turn on each image before or in it, image by image: what gets maps.

        Args:
            texts: the turns: "answers" of the assistant, "questions" of the user, or "all". Never the system's.
        """
        pairs: list[tuple[int, str]] = []
        for turn, message in enumerate(self.messages):
            text = text_of(message["content"])
            if message["role"] in ROLES[texts] and (text.strip() or message["role"] == "assistant"):
                pairs += [(index, text) for index in range(num_places(self.messages[: turn + 1]))]
        return tuple(sorted(pairs, key=lambda pair: pair[0]))

    def load(self) -> tuple[Image.Image, ...]:
        """The decoded images; see `load_image`. Raises a DataError that names the sample."""
        return tuple(self.load_picture(index) for index in range(len(self.sources)))

    def load_picture(self, index: int) -> Image.Image:
        """The image of an index, decoded. Raises a DataError that names the sample."""
        which = f"picture {index + 1}" if len(self.sources) > 1 else "the picture"
        return load_image(self.sources[index], f"{which} of {self.name}")


@dataclass(frozen=True)
class Samples:
    """The samples of a data set in its order, and what was dropped from it.

    Attributes:
        samples: the usable samples.
        dropped: the rows that cannot be used, with the reason.
        outside: the images that are read although they lie outside the folder of the data, by an absolute path, "..",
            or a link.
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


def read_samples(path: str | Path | datasets.Dataset, prompt: str = "Describe the image.") -> Samples:
    """Read a data set of images with text, in any of `lavender.data.tables.DATA_FORMATS`.

    Image files must exist and are not decoded. Their paths are relative to the data file, or to the working directory
    for a `datasets.Dataset`. They may lead out of its folder, see `Samples.outside`. Encoded images in parquet files
    and datasets, and base64 in text files, are held in memory.

    Columns are tried in the order messages, conversations, prompt + completion, text, caption. A list of captions
    gives one sample per caption. A conversation may have any number of images, each with its place in a user's turn.
    A single image without a place is put at the beginning of the first user turn. A column `about` may say which words
    of the answers take the map of which other words, see `lavender.data.about`.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (40, 30)).save(f"{folder}/dog.png")
        ...     _ = Path(folder, "metadata.jsonl").write_text('{"file_name": "dog.png", "text": "a red dog"}')
        ...     print([sample.answers for sample in read_samples(folder)])
        [('a red dog',)]

    Args:
        path: a file, a folder, or a `datasets.Dataset`.
        prompt: the user's turn for data that have only captions.

    Returns:
        The usable samples, and the dropped rows with the reason.

    Raises:
        DataError: no such path, an unknown format, a missing shard, a file that cannot be read, no usable row, or no
            row with an image.
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
    """The error of a data set without an image."""
    if not columns and not dropped:
        return DataError(f"{label}, which has no row", "at least one usable row", "check the file")
    if columns and not (columns.keys() & set(PICTURE_COLUMNS) and columns.keys() & set(TEXT_COLUMNS)):
        # What does not look like a column name may be the content of a file that is not a table.
        names = [name if _COLUMN.fullmatch(name) else "…" for name in columns]
        return unknown_format(f"{label} with the columns {shown(names)}")
    first = f"; the first, {dropped[0].what}: {dropped[0].reason}" if dropped else ""
    if samples:
        got = f"{label} with {len(samples)} samples, none with a picture, and {len(dropped)} rows dropped{first}"
        return DataError(got, "a sample with a picture", f"name pictures in a column {' or '.join(PICTURE_COLUMNS)}")
    return DataError(f"{label} with {len(dropped)} rows, none usable{first}", "at least one usable row", "repair them")


def to_dataset(samples: Iterable[Sample]) -> datasets.Dataset:
    """Convert samples to a dataset with the columns `images` and `messages`, as TRL's SFTTrainer takes it.

    If a sample has `about`, the dataset has this column too; an `AlignmentCollator` reads it. Paths stay paths, and
    encoded images stay encoded. An image in memory is stored as PNG, which keeps its pixels and its `image_id`.

    Example:
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
    """
    import datasets

    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    columns = {"images": datasets.List(datasets.Image()), "messages": datasets.List(turn)}
    samples = list(samples)
    if any(sample.about for sample in samples):
        columns["about"] = datasets.List(dict.fromkeys(About._fields, datasets.Value("string")))
    features = datasets.Features(columns)
    pieces = [datasets.Dataset.from_dict(piece, features=features) for piece in _pieces(samples, columns)]
    return datasets.concatenate_datasets(pieces)


def _pieces(samples: Iterable[Sample], columns: Iterable[str] = _NEEDED) -> Iterator[dict[str, list[Any]]]:
    """The columns of some samples at a time; of no samples, once."""
    piece: dict[str, list[Any]] = {column: [] for column in columns}
    size = 0
    for sample in samples:
        images = [_encoded(sample, index) for index in range(len(sample.sources))]
        num_bytes = sum(len(image["bytes"] or b"") for image in images)
        if len(piece["images"]) == _PIECE_ROWS or (piece["images"] and size + num_bytes > _PIECE_BYTES):
            yield piece
            piece, size = {column: [] for column in columns}, 0
        piece["images"].append(images)
        piece["messages"].append(sample.messages)
        if "about" in piece:
            piece["about"].append([entry._asdict() for entry in sample.about])
        size += num_bytes
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
    about = entries_of(row.values.get("about"))
    if about and len(conversations) > 1:
        raise UnusableError("about with several captions; write a row for each caption")
    links_of(about, conversations[0])
    sources = tuple(folder.source(picture, row.name) for picture in pictures)
    if len(conversations) == 1:
        return [Sample(row.name, sources, conversations[0], about)]
    return [Sample(f"{row.name} caption {index}", sources, turns) for index, turns in enumerate(conversations)]


class _Folder:
    """The folder to which the paths of images are relative."""

    def __init__(self, path: Path):
        self._path, self._real = path, os.path.realpath(path)
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
        """Whether the path leads outside the folder once links are resolved."""
        folder, name = os.path.split(path)
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(self._real_folder(folder), name)
        return not real.startswith(os.path.join(self._real, ""))


def readable(samples: Samples) -> Samples:
    """Decode every image once: keep the samples whose images can be decoded, with their ids, and drop the others.

    Args:
        samples: the samples, for instance from `read_samples`.

    Returns:
        The usable samples with `identities`; the others are added to `dropped`.

    Raises:
        DataError: no sample is usable.
    """
    keys = [
        sample.sources if sample.sources and all(isinstance(source, Path) for source in sample.sources) else index
        for index, sample in enumerate(samples)
    ]
    distinct = dict(zip(keys, samples, strict=True))  # each file once, however many texts it has
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # as load_image does, whose filters all threads share
        results = dict(zip(distinct, pool.map(_identities, distinct.values()), strict=True))
    checked = [(sample, results[key]) for key, sample in zip(keys, samples, strict=True)]
    kept = tuple(sample for sample, ids in checked if not isinstance(ids, str))
    identities = tuple(ids for _, ids in checked if not isinstance(ids, str))
    dropped = tuple(Dropped(sample.name, reason) for sample, reason in checked if isinstance(reason, str))
    if not kept:
        got = f"{len(samples)} samples, none with a usable picture; the first, {dropped[0].what}: {dropped[0].reason}"
        raise DataError(got, "at least one usable sample", "repair the pictures")
    return Samples(kept, samples.dropped + dropped, samples.outside, identities)


def _identities(sample: Sample) -> tuple[str, ...] | str:
    """The `image_id` of each image, or why one cannot be used."""
    try:
        return tuple(image_id(picture) for picture in sample.load())
    except DataError as error:
        return str(error)
