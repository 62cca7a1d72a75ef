"""Extract word maps from people's annotations into a store: the same records that a diffusion teacher writes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lavender.config import ExtractionConfig, Texts
from lavender.data.images import image_id, stored_orientation
from lavender.data.left_out import LeftOut
from lavender.data.samples import Sample, Samples
from lavender.data.store import StoreWriter
from lavender.data.store_format import key_of
from lavender.errors import ConfigError, DataError
from lavender.files import expanded, write_whole
from lavender.maps import Dropped, Word, WordMaps, to_heat
from lavender.teachers.annotations.base import Annotations, Found, PictureAnnotations
from lavender.teachers.annotations.coco import CocoPanoptic
from lavender.teachers.annotations.flickr import Flickr30kEntities
from lavender.teachers.annotations.regions import Region, cell_shares, turn_upright
from lavender.teachers.extraction_loop import Step, write_maps
from lavender.teachers.summary import Summary
from lavender.words import too_long

FORMATS = (CocoPanoptic.name, Flickr30kEntities.name)
"""Names of the annotation formats that can be read."""
_FLAT = 1e-6


def open_annotations(
    format_name: str,
    path: str | Path,
    *,
    pictures: str | Path | None = None,
    captions: str | Path | None = None,
    split: str | None = None,
    parts_of_speech: tuple[str, ...] | None = None,
) -> Annotations:
    """Open annotations on disk; `CocoPanoptic` and `Flickr30kEntities` say where each file is looked for.

    Args:
        format_name: one of `FORMATS`.
        path: the panoptic JSON file, or the folder of Flickr30k Entities.
        pictures: folder of the images. Default: the usual places.
        captions: of "coco-panoptic" only: the file of COCO's captions.
        split: of "flickr30k-entities" only: COCO has one file per split.
        parts_of_speech: the words that get a map. Default: that of the format.

    Raises:
        ConfigError: an unknown format, or a setting of the other format.
        DataError: files are missing or of another format.
    """
    if format_name == CocoPanoptic.name:
        _refuse_setting("split", split, format_name)
        return CocoPanoptic(path, pictures=pictures, captions=captions, parts_of_speech=parts_of_speech)
    if format_name == Flickr30kEntities.name:
        _refuse_setting("captions", captions, format_name)
        return Flickr30kEntities(path, pictures=pictures, split=split, parts_of_speech=parts_of_speech)
    raise ConfigError(f"the annotation format {format_name!r}", f"one of {FORMATS}", "choose one of them")


def extract_annotations(
    samples: Samples,
    annotations: Annotations,
    out: str | Path,
    *,
    grid: tuple[int, int] = (32, 32),
    texts: Texts = "answers",
    data_file: str | Path | None = None,
    strict: bool = False,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> Summary:
    """Write the maps of every text, on every image before it, to the store at `out`.

    A map is the share of each cell's area that the word's region covers, divided by the largest share. After an
    interruption the same call continues where it stopped and ends with the same records.

    Args:
        samples: those of the annotations, or any data set on the same images. Images must be files.
        annotations: from `open_annotations`.
        out: folder of the store.
        grid: (rows, cols) of the stored maps.
        texts: the turns to map: "answers", "questions" or "all". Questions need annotations of any text, as those of
            "coco-panoptic" are.
        data_file: a .jsonl file to write, one row per text that has a record; it can be the `data` of a training run.
        strict: raise DataError at the first sample that cannot be used, instead of counting it as dropped.
        on_progress: called with the number of texts done since the last call.

    Returns:
        The counts of this run. Its `dropped` names each sample and annotation that could not be used. Words without a
        region are named in their record in the store, and counted here by word and reason.

    Raises:
        ConfigError: a grid out of range; `texts` with questions, and annotations of captions alone.
        DataError: with `strict`, a sample that cannot be used; or `data_file` cannot be written.
        StoreError: the folder holds another store, or cannot be written.
    """
    grid = ExtractionConfig(grid=grid, texts=texts).grid  # checks them
    _check_texts(annotations, texts)
    work = _Work(annotations, grid, texts)
    summary = write_maps(
        samples,
        out,
        lambda writer: work.steps(samples, writer, strict),
        identity={
            "teacher": "annotations",
            "layout": annotations.name,
            "grid": list(grid),
            "texts": texts,
            **annotations.identity(),
        },
        info={"lavender-vlm": version("lavender-vlm"), "annotations": annotations.label},
        grid=grid,
        strict=strict,
        on_progress=on_progress,
    )
    if data_file is not None:
        _write_rows(expanded(data_file), work.texts)
    return summary


class _Work:
    """Makes the maps of one run. The last image stays open, because its texts follow one another.

    Attributes:
        texts: (image_id, text) of every answer with a record, and the path of its image.
    """

    def __init__(self, annotations: Annotations, grid: tuple[int, int], texts: Texts):
        self._annotations, self._grid, self._texts = annotations, grid, texts
        self.texts: dict[tuple[str, str], Path] = {}
        self._seen: set[tuple[str, str]] = set()
        self._dropped_words: Counter[tuple[str, str]] = Counter()
        self._num_mapless = 0
        self._picture: _Picture | None = None

    def steps(self, samples: Samples, writer: StoreWriter, strict: bool) -> Generator[Step, None, None]:
        """A step for each pair of each sample, then the counts of words without a map."""
        for sample in samples:
            for index, text in sample.pairs_of(self._texts):
                try:
                    yield from self._map(sample, index, text, writer)
                except DataError as error:
                    if strict:
                        raise
                    yield Step(dropped=[Dropped(f"{sample.name}: {text[:60]!r}", str(error))])
        yield Step(0, dropped=self._counted())

    def _map(self, sample: Sample, index: int, text: str, writer: StoreWriter) -> Iterator[Step]:
        """The maps of one text on one image, after the faults of its annotations. Raises DataError."""
        path = sample.sources[index]
        if not isinstance(path, Path):
            got = f"{sample.name}, whose picture is no file"
            raise DataError(got, "a file, by whose name annotations are found", "save the pictures as files")
        if self._picture is None or self._picture.path != path:
            self._picture = None
            self._picture = _Picture(path, lambda: sample.load_picture(index), self._annotations)
        picture = self._picture
        key = (picture.image_id, text)
        if key in self._seen:
            yield Step(already_there=1)
        else:
            annotations, is_new = picture.annotations()
            if is_new:
                yield Step(0, dropped=annotations.faults)
            if key in writer:  # a run that was stopped has not told what it left out
                self._count(writer.left_out.get(key_of(*key), LeftOut(True, ())))
                yield Step(already_there=1)
            else:
                maps = picture.maps(annotations.find(text), text, self._grid)
                self._count(LeftOut(bool(maps.words), maps.dropped))
                yield Step(maps=[maps])
            self._seen.add(key)
        if text in sample.answers:  # a row of data is an answer; a question alone is none
            self.texts.setdefault(key, path)

    def _count(self, record: LeftOut) -> None:
        self._num_mapless += not record.has_words
        self._dropped_words.update((drop.what.lower(), drop.reason) for drop in record.dropped)

    def _counted(self) -> list[Dropped]:
        """Texts and words without a map, most frequent first. They are counted, because there may be millions."""
        texts = [Dropped(f"{self._num_mapless} texts", "no word with a map; stored without")]
        counts = self._dropped_words.most_common()
        words = [Dropped(f"{word!r}, {count} times", reason) for (word, reason), count in counts]
        return (texts if self._num_mapless else []) + words


class _Picture:
    """An image with its annotations, which are read when first needed."""

    def __init__(self, path: Path, load: Callable[[], Image.Image], annotations: Annotations):
        self.path = path
        self._source, self._key = annotations, annotations.key(path)  # before decoding, which takes longer
        image = load()
        self.image_id = image_id(image)
        self._size = image.height, image.width
        self._annotations: PictureAnnotations | None = None
        self._orientation = 1
        self._heat: dict[Region, Tensor] = {}  # captions of one image name the same things

    def annotations(self) -> tuple[PictureAnnotations, bool]:
        """The annotations, and whether this call read them."""
        if self._annotations is not None:
            return self._annotations, False
        annotations = self._source.read(self._key)
        self._orientation = _orientation_of(self.path, self._size, annotations.size)
        self._annotations = annotations
        return annotations, True

    def maps(self, found: Found, text: str, grid: tuple[int, int]) -> WordMaps:
        """The record of a text, without the words whose region is the whole image."""
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
        """(rows, cols) over the upright image."""
        assert self._annotations is not None
        if region not in self._heat:
            upright = turn_upright(region, self._annotations.size, self._orientation)
            self._heat[region] = to_heat(cell_shares(upright, self._size, grid))
        return self._heat[region]


def _orientation_of(path: Path, upright: tuple[int, int], annotated: tuple[int, int]) -> int:
    """The EXIF orientation that turns the annotations upright: 1 if they already are.

    Annotation tools show an image either as it is stored or upright, and no file says which. The annotated size tells
    them apart, unless both sizes are the same.
    """
    orientation, stored = stored_orientation(path, str(path))
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
    """Write a JSON Lines row per text, with image paths relative to the file."""
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


def _refuse_setting(setting: str, value: object, format_name: str) -> None:
    if value is not None:
        raise ConfigError(f"{setting}={value!r} with {format_name}", "no such setting there", f"leave {setting} out")


def _check_texts(annotations: Annotations, texts: Texts) -> None:
    if texts != "answers" and not annotations.maps_any_text:
        raise ConfigError(
            f"texts={texts!r} with {annotations.name}, whose captions alone are annotated",
            "texts: answers",
            f"leave texts out, or map questions with a diffusion teacher or {CocoPanoptic.name}",
        )
