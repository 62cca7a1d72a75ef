"""Write the maps of annotated pictures to a store: the same records that a diffusion teacher would write."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.data.images import image_id, stored_frame
from lavender.data.samples import Sample, Samples
from lavender.data.store import MapStore, StoreWriter
from lavender.errors import ConfigError, DataError
from lavender.files import expanded, write_whole
from lavender.maps import Dropped, Word, WordMaps, to_heat
from lavender.teachers.annotations.base import Found, Layout, PictureAnnotations
from lavender.teachers.annotations.coco import CocoPanoptic
from lavender.teachers.annotations.flickr import Flickr30kEntities
from lavender.teachers.annotations.regions import Region, cell_shares, turn_upright
from lavender.teachers.summary import FLUSH_SECONDS, History, Summary
from lavender.words import too_long

LAYOUTS = (CocoPanoptic.name, Flickr30kEntities.name)
_FLAT = 1e-6


def open_layout(
    name: str,
    path: str | Path,
    *,
    pictures: str | Path | None = None,
    captions: str | Path | None = None,
    split: str | None = None,
    parts_of_speech: tuple[str, ...] | None = None,
) -> Layout:
    """A layout by its name; see `CocoPanoptic` and `Flickr30kEntities` for where things are looked for.

    Args:
        name: one of `LAYOUTS`.
        captions: of "coco-panoptic" only.
        split: of "flickr30k-entities" only; COCO has a file a split.
        parts_of_speech: None is the layout's own.

    Raises:
        ConfigError: an unknown layout, or a setting of the other one.
        DataError: files are missing or of another layout.
    """
    if name == CocoPanoptic.name:
        _refuse_setting("split", split, name)
        return CocoPanoptic(path, pictures=pictures, captions=captions, parts_of_speech=parts_of_speech)
    if name == Flickr30kEntities.name:
        _refuse_setting("captions", captions, name)
        return Flickr30kEntities(path, pictures=pictures, split=split, parts_of_speech=parts_of_speech)
    raise ConfigError(f"the layout {name!r}", f"one of {LAYOUTS}", "choose one of them")


def extract_annotations(
    samples: Samples,
    layout: Layout,
    out: str | Path,
    *,
    grid: tuple[int, int] = (32, 32),
    data_file: str | Path | None = None,
    strict: bool = False,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> Summary:
    """Write the maps of every answer on every picture before it to the store at `out`.

    A map is the share of each cell's area that the word's region covers, divided by the largest. Stopped at any
    moment and started again, it goes on where it was, and ends with the same records.

    Args:
        samples: the layout's own, or any data set on the same pictures; pictures must be files.
        grid: (rows, cols) of the stored maps.
        data_file: a .jsonl file to write with a row for each text that has a record, as `data` of a training run.
        strict: raise DataError at the first sample that cannot be used, instead of counting it.
        on_progress: called with the number of texts done since the last call.

    Returns:
        Its `dropped` names each sample and annotation that could not be used. Words without a region are named in
        their record in the store, and counted here by word and reason.

    Raises:
        ConfigError: a grid out of range.
        StoreError: the folder holds another store.
    """
    began, summary = time.monotonic(), Summary(dropped=list(samples.dropped))
    summary.without_picture = sum(not sample.sources for sample in samples)
    grid = ExtractionConfig(grid=grid).grid  # its check
    if strict:
        samples.check_strict()
    identity = {"teacher": "annotations", "layout": layout.name, "grid": list(grid), **layout.identity()}
    info = {"lavender-vlm": version("lavender-vlm"), "annotations": layout.label}
    with MapStore.writer(out, identity, info, grid) as writer:
        history = History(out)
        work = _Work(layout, writer, summary, grid)
        flushed = time.monotonic()
        for sample in samples:
            for index, text in sample.pairs:
                try:
                    work.do(sample, index, text)
                except DataError as error:
                    if strict:
                        raise
                    summary.dropped.append(Dropped(f"{sample.name}: {text[:60]!r}", str(error)))
            on_progress(len(sample.pairs))
            if time.monotonic() - flushed > FLUSH_SECONDS:
                writer.flush()
                flushed = time.monotonic()
        in_store = len(writer)
    summary.dropped += work.counted()
    if data_file is not None:
        _write_rows(expanded(data_file), work.texts)
    summary.seconds = time.monotonic() - began
    history.add(summary, in_store)
    return summary


class _Work:
    """The samples of one run, one at a time. The last picture stays open: its texts follow one another."""

    def __init__(self, layout: Layout, writer: StoreWriter, summary: Summary, grid: tuple[int, int]):
        self._layout, self._writer, self._summary, self._grid = layout, writer, summary, grid
        self.texts: dict[tuple[str, str], Path] = {}  # (image_id, text) → picture
        self._words: Counter[tuple[str, str]] = Counter()
        self._mapless = 0
        self._picture: _Picture | None = None

    def do(self, sample: Sample, index: int, text: str) -> None:
        """One of a sample's answers on one of its pictures. Raises DataError if it cannot be used."""
        path = sample.sources[index]
        if not isinstance(path, Path):
            got = f"{sample.name}, whose picture is no file"
            raise DataError(got, "a file, by whose name annotations are found", "save the pictures as files")
        if self._picture is None or self._picture.path != path:
            self._picture = None
            self._picture = _Picture(path, lambda: sample.load_picture(index), self._layout)
        picture = self._picture
        key = (picture.image_id, text)
        if key in self._writer:
            self._summary.already_there += 1
        else:
            self._add(picture, text)
        self.texts.setdefault(key, picture.path)

    def _add(self, picture: _Picture, text: str) -> None:
        annotations, new = picture.annotations()
        if new:
            self._summary.dropped += annotations.faults
        maps = picture.maps(annotations.find(text), text, self._grid)
        self._writer.add(maps)
        self._summary.records += 1
        self._summary.words += len(maps.words)
        self._mapless += not maps.words
        self._words.update((one.what.lower(), one.reason) for one in maps.dropped)

    def counted(self) -> list[Dropped]:
        """Texts and words without a map, most frequent first: one by one they would be millions."""
        texts = [Dropped(f"{self._mapless} texts", "no word with a map; stored without")] if self._mapless else []
        words = [Dropped(f"{word!r}, {count} times", reason) for (word, reason), count in self._words.most_common()]
        return texts + words


class _Picture:
    """A picture with its annotations, each read when first needed."""

    def __init__(self, path: Path, load: Callable[[], Image.Image], layout: Layout):
        self.path = path
        self._layout, self._key = layout, layout.key(path)  # before the picture is decoded, which takes longer
        image = load()
        self.image_id = image_id(image)
        self._size = image.height, image.width
        self._annotations: PictureAnnotations | None = None
        self._orientation = 1
        self._heat: dict[Region, Tensor] = {}  # captions of a picture name the same things

    def annotations(self) -> tuple[PictureAnnotations, bool]:
        """They, and whether they are new."""
        if self._annotations is not None:
            return self._annotations, False
        read = self._layout.read(self._key)
        self._orientation = _frame(self.path, self._size, read.size)
        self._annotations = read
        return read, True

    def maps(self, found: Found, text: str, grid: tuple[int, int]) -> WordMaps:
        words: list[Word] = []
        maps = []
        dropped = [*found.dropped, *too_long(text)]
        for word, region in found.words:
            heat = self._heat_of(region, grid)
            if heat.min() > 1 - _FLAT:
                dropped.append(Dropped(word.text, "its region is the whole picture, which is no place"))
                continue
            words.append(word)
            maps.append(heat)
        stacked = torch.stack(maps) if maps else torch.zeros(0, *grid)
        return WordMaps(self.image_id, text, tuple(words), stacked, tuple(dropped))

    def _heat_of(self, region: Region, grid: tuple[int, int]) -> Tensor:
        """(rows, cols), in the frame of the upright picture."""
        assert self._annotations is not None
        if region not in self._heat:
            upright = turn_upright(region, self._annotations.size, self._orientation)
            self._heat[region] = to_heat(cell_shares(upright, self._size, grid))
        return self._heat[region]


def _frame(path: Path, upright: tuple[int, int], annotated: tuple[int, int]) -> int:
    """The EXIF orientation that brings annotations upright: 1 if they are.

    Tools differ in whether they show a picture as it is stored or upright, and no file says which it was; its size
    does, unless both have the same.
    """
    orientation, stored = stored_frame(path, str(path))
    is_turned = orientation in range(2, 9)
    if annotated == upright and (not is_turned or annotated != stored):
        return 1
    if annotated == stored and annotated != upright:
        return orientation
    if annotated == upright:
        got = f"{path} with the EXIF orientation {orientation}, which may or may not be in its annotations"
        raise DataError(got, "a picture without orientation", "turn it the way it was annotated and remove the EXIF")
    got = f"{path} of {upright[1]} × {upright[0]} pixels, annotated at {annotated[1]} × {annotated[0]}"
    raise DataError(got, "the picture that was annotated", "take the picture in its published size")


def _write_rows(path: Path, texts: dict[tuple[str, str], Path]) -> None:
    """A row for each text, with paths relative to the file; there whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.parent.resolve()
        rows = [
            {"image": os.path.relpath(picture.absolute(), folder), "text": text} for (_, text), picture in texts.items()
        ]
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    except OSError as error:
        got = f"{path}, which cannot be written: {error.strerror or error}; the maps are all written"
        raise DataError(got, "space and the right to write", "free space or choose another path") from error


def _refuse_setting(setting: str, value: object, layout: str) -> None:
    if value is not None:
        raise ConfigError(f"{setting}={value!r} with {layout}", "no such setting there", f"leave {setting} out")
