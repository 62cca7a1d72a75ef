"""Read each of the paper's four data sets in the layout in which it is published."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lavender.data.published import img2dataset_rows, is_img2dataset
from lavender.data.samples import read_samples
from lavender.data.tables import Row, Wanted, parquet_rows, unreadable
from lavender.errors import DataError
from lavender.files import JsonError, parse_json, printable, read_plain
from lavender.maps import Dropped

CAPTION_PROMPT = "Describe the image in a single sentence as a caption."
"""The authors' prompt for Flickr30k, from their published code. The paper names none for LAION, which gets it too."""

_MAX_JSON = 2**31  # bytes: dataset.json of OCR-VQA has 0.1 GB


class Found(NamedTuple):
    """A row of a source: its name, its picture, and pairs of (question, answer). Nothing in it is checked yet."""

    name: str
    picture: Path | bytes
    turns: Sequence[tuple[Any, Any]]


@dataclass(frozen=True)
class Recipe:
    """How a data set becomes samples.

    Attributes:
        expected: how many usable items the paper counts.
        counted: what it counts: "pictures" or "rows".
        layout: the files that `read` expects, for messages.
        read: (source, prompt) → rows, and what cannot be used with the reason. The prompt is the question of captions.
        has_captions: whether the texts are captions, which get the prompt as their question.
        stops: whether to stop reading when `expected` usable items are there.
    """

    expected: int
    counted: str
    layout: str
    read: Callable[[Path, str], Iterator[Found | Dropped]]
    has_captions: bool = False
    stops: bool = False


def _flickr30k(source: Path, prompt: str) -> Iterator[Found | Dropped]:
    samples = read_samples(source, prompt)
    yield from samples.dropped
    for sample in samples:
        if len(sample.sources) != 1 or len(sample.answers) != 1 or not isinstance(sample.sources[0], (Path, bytes)):
            yield Dropped(sample.name, "not one picture with one caption")
            continue
        yield Found(sample.name, sample.sources[0], [(prompt, sample.answers[0])])


def _rlaif_v(source: Path, prompt: str) -> Iterator[Found | Dropped]:
    for path, row in _parquet_rows(_parquet_files(source, "rlaif-v"), ("image", "question", "chosen"), "rlaif-v"):
        yield _with_picture(row, row.values["image"], [(row.values["question"], row.values["chosen"])], path.parent)


def _ocrvqa30k(source: Path, prompt: str) -> Iterator[Found | Dropped]:
    path = source / "dataset.json" if source.is_dir() else source
    rows = _ocrvqa_json(path) if path.suffix == ".json" and path.is_file() else _ocrvqa_parquet(source)
    return islice(rows, RECIPES["ocrvqa30k"].expected)


def _ocrvqa_parquet(source: Path) -> Iterator[Found | Dropped]:
    """The first rows of `ocrvqa` in The Cauldron, which the authors used."""
    files = _parquet_files(source, "ocrvqa30k")
    numbers = [int(match[1]) for path in files if (match := re.search(r"-(\d+)-of-\d+", path.name))]
    if numbers != list(range(len(numbers))):
        got = f"{printable(source)} with the shards {', '.join(map(str, numbers))}"
        raise DataError(got, "the first shards of one split, without a gap", "download the missing ones")
    for path, row in _parquet_rows(files, ("images", "texts"), "ocrvqa30k"):
        pictures = row.values["images"]
        if row.fault or not isinstance(pictures, list) or len(pictures) != 1:
            number = len(pictures) if isinstance(pictures, list) else "no"
            yield Dropped(row.name, row.fault or f"{number} pictures, not one")
            continue
        pairs = [text if isinstance(text, dict) else {} for text in row.values["texts"] or ()]
        turns = [(pair.get("user"), pair.get("assistant")) for pair in pairs]
        yield _with_picture(row, pictures[0], turns, path.parent)


def _ocrvqa_json(path: Path) -> Iterator[Found | Dropped]:
    """OCR-VQA's own dataset.json, its training split, with the pictures in a folder images beside it."""
    try:
        books = parse_json(read_plain(path, _MAX_JSON).decode("utf-8-sig"))
    except (UnicodeDecodeError, JsonError) as error:
        raise unreadable(path, error) from error
    if not isinstance(books, dict):
        raise _other_layout(path, "ocrvqa30k")
    for key, book in books.items():
        name = f"{path.name} {printable(key)}"
        if not isinstance(book, dict):
            yield Dropped(name, "not an object")
        elif book.get("split") == 1:
            questions, answers = book.get("questions"), book.get("answers")
            if not (isinstance(questions, list) and isinstance(answers, list)) or len(questions) != len(answers):
                yield Dropped(name, "not one answer for each question")
                continue
            suffix = Path(str(book.get("imageURL", ""))).suffix or ".jpg"
            picture = path.parent / "images" / f"{key}{suffix}"
            yield Found(name, picture, list(zip(questions, answers, strict=True)))


def _laion50k(source: Path, prompt: str) -> Iterator[Found | Dropped]:
    """The folder that img2dataset wrote, in any of its output formats with pictures."""
    names = sorted(os.listdir(source)) if source.is_dir() else []
    if not is_img2dataset(source, names):
        raise _other_layout(source, "laion50k")
    for row in img2dataset_rows(source, names, Wanted()):
        captions = row.values.get("text") or row.values.get("caption")
        caption = captions[0] if isinstance(captions, list) else captions
        yield _with_picture(row, row.values.get("image"), [(prompt, caption)], source)


def _with_picture(row: Row, picture: Any, turns: list[tuple[Any, Any]], folder: Path) -> Found | Dropped:
    """A row whose picture is a struct {bytes, path} of `datasets`, encoded bytes, or a path."""
    if isinstance(picture, dict):
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, str) and picture:
        picture = folder / picture
    if row.fault or not isinstance(picture, (bytes, Path)):
        return Dropped(row.name, row.fault or "no picture")
    return Found(row.name, picture, turns)


def _parquet_files(source: Path, recipe: str) -> list[Path]:
    if source.is_file():
        return [source]
    if files := sorted(source.glob("*.parquet")) or sorted(source.glob("data/*.parquet")):
        return files
    raise _other_layout(source, recipe)


def _parquet_rows(files: Sequence[Path], columns: tuple[str, ...], recipe: str) -> Iterator[tuple[Path, Row]]:
    """Each row with its file."""
    for path in files:
        for row in parquet_rows(path, Wanted(frozenset(columns))):
            if missing := [column for column in columns if column not in row.values]:
                raise _other_layout(path, recipe, f", without the columns {', '.join(missing)}")
            yield path, row


def _other_layout(path: Path, recipe: str, what: str = "") -> DataError:
    got = f"{printable(path)}{what}" if path.exists() else f"{printable(path)}, which does not exist"
    return DataError(got, RECIPES[recipe].layout, "check --source; docs/data.md says where each data set is")


RECIPES: dict[str, Recipe] = {
    "flickr30k": Recipe(
        31_783,
        "pictures",
        "Flickr30k's folder with results.csv and the pictures, or any data of pictures and captions that "
        "`lavender extract --data` reads",
        _flickr30k,
        has_captions=True,
    ),
    "laion50k": Recipe(
        50_000,
        "rows",
        "the folder that img2dataset wrote: 00000.parquet … with key, caption and status, and the pictures",
        _laion50k,
        has_captions=True,
        stops=True,
    ),
    "rlaif-v": Recipe(83_132, "rows", "RLAIF-V's parquet files, with image, question and chosen", _rlaif_v),
    "ocrvqa30k": Recipe(
        30_000,
        "rows",
        "the parquet files of ocrvqa in The Cauldron, with images and texts, or OCR-VQA's dataset.json with the "
        "pictures in a folder images beside it",
        _ocrvqa30k,
    ),
}
"""Name → recipe."""
