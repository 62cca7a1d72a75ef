"""Import of the maps of the paper's authors: one JPEG per word, in a folder per image.

    MAPS/36979.jpg/lpm_attention/36979/attention_dog.jpg

The folder has the name of the image file, with or without its ending; the folders inside may have any name. A file is
an 8-bit grey map. Its name has only the word, so the maps are of all texts on the image, and of every occurrence of the
word in them.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavender.config import CONTENT_WORDS
from lavender.data.images import image_id, load_image
from lavender.data.samples import Sample, Samples
from lavender.data.store import StoreWriter
from lavender.errors import DataError
from lavender.files import expanded
from lavender.maps import Dropped, Word, WordMaps, to_heat
from lavender.teachers.diffusion.views import resample_to_picture
from lavender.teachers.extraction_loop import Step, write_maps
from lavender.teachers.summary import Summary
from lavender.words import words_of

LAYOUT = "attention_WORD.jpg"
_BEGIN = "attention_"
_ENDINGS = (".jpg", ".jpeg", ".png")


def import_jpeg_maps(
    samples: Samples,
    source: str | Path,
    out: str | Path,
    geometry: Literal["crop", "squash"] = "crop",
    strict: bool = False,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> Summary:
    """Write the maps of every answer on every image before it to a store. The same call continues where it stopped.

    Args:
        samples: the data set that the maps are of. Images must be files, by whose names the maps are found.
        source: the folder with a folder per image.
        out: the folder of the store.
        geometry: what the maps cover: the central square of the image ("crop", as the authors' teacher saw it), or the
            whole image squashed to a square.
        strict: raise DataError at the first sample or map that cannot be used, instead of counting it as dropped.
        on_progress: called with the number of texts done since the last call.

    Returns:
        The counts. Its `dropped` names samples without maps, files that cannot be used, and files whose word is in no
        text of their image. Content words without a file are in the store's records.

    Raises:
        DataError: no map at all in the folder; with `strict`, what cannot be used.
        StoreError: `out` holds another store, or cannot be written.
    """
    source = expanded(source)
    work = _Work(source, geometry, strict)
    return write_maps(
        samples,
        out,
        lambda writer: work.steps(samples, writer),
        identity={"teacher": LAYOUT, "geometry": geometry, "grid": list(work.grid), "texts": "answers"},
        info={"lavender-vlm": version("lavender-vlm"), "maps": source.absolute().name},
        grid=work.grid,
        strict=strict,
        on_progress=on_progress,
    )


class _Work:
    """Reads the maps of one image at a time.

    Attributes:
        grid: (rows, cols) of the first map that can be read, which all others must have.
    """

    def __init__(self, source: Path, geometry: str, strict: bool):
        self._source, self._geometry, self._strict = source, geometry, strict
        first = next((pixels for folder in _folders(source) for pixels in _readable(_files(folder))), None)
        if first is None:
            got = f"{source}, in which no folder of an image has a file {LAYOUT} that can be read"
            raise DataError(got, "a folder per image, with a JPEG per word", "check the path")
        rows, cols = first.shape
        self.grid = rows, cols

    def steps(self, samples: Samples, writer: StoreWriter) -> Generator[Step, None, None]:
        """A step for each image of the data set, with the records of all of its texts."""
        writer.note_source("import", [str(self._source.absolute())])
        texts: dict[Path, list[str]] = {}
        places: dict[Path, tuple[int, int]] = {}  # a sample of the image, and which of its images it is
        for place, sample in enumerate(samples):
            for index, text in sample.pairs:
                path = sample.sources[index]
                if isinstance(path, Path):
                    texts.setdefault(path, []).append(text)
                    places.setdefault(path, (place, index))
                else:
                    got = f"{sample.name}, whose image is no file"
                    yield self._without(sample, 1, DataError(got, "a file, by whose name maps are found", "save it"))
        owners: defaultdict[Path, set[str]] = defaultdict(set)
        for path in texts:
            owners[self._folder_of(path)].add(os.path.realpath(path))
        for path, named in texts.items():
            place, index = places[path]
            sample = samples.samples[place]
            try:
                self._check_folder(path, len(owners[self._folder_of(path)]))
                yield self._of_image(sample.load_picture(index), self._folder_of(path), named, writer)
            except DataError as error:
                yield self._without(sample, len(named), error)

    def _without(self, sample: Sample, texts: int, error: DataError) -> Step:
        """The step of texts on an image without maps. Raises the error if strict."""
        if self._strict:
            raise error
        return Step(texts, dropped=[Dropped(sample.name, error.got)])

    def _folder_of(self, image: Path) -> Path:
        """The folder with the maps of an image file, which need not be there."""
        whole = self._source / image.name
        return whole if whole.is_dir() else self._source / image.stem

    def _check_folder(self, image: Path, owners: int) -> None:
        """Raises DataError if the folder of an image is not there, or is that of several images."""
        folder = self._folder_of(image)
        if not folder.is_dir():
            got = f"{image.name} without a folder in {self._source}"
            raise DataError(got, "its maps", "check the path of the maps")
        if owners > 1:
            got = f"{image}, one of {owners} images that would take the maps in {folder.name}"
            raise DataError(got, "a folder per image", "give each image and its folder a name of its own")

    def _of_image(self, image: Image.Image, folder: Path, texts: list[str], writer: StoreWriter) -> Step:
        """The records of the texts on an image. What is dropped of it is named again where a run was stopped.

        Raises:
            DataError: with strict, a file that cannot be used.
        """
        identity, box = image_id(image), _box(image, self._geometry)
        heat, dropped = self._read_all(folder, box)
        records = [_record(identity, text, heat, self.grid) for text in dict.fromkeys(texts)]
        new = [record for record in records if (identity, record.text) not in writer]
        used = {_key(word.text) for record in records for word in record.words}
        dropped += [
            Dropped(f"{folder.name}: {word!r}", "a map of a word that is in no text of the image")
            for word in heat
            if word not in used
        ]
        self._check(dropped)
        return Step(len(texts), maps=new, dropped=dropped, already_there=len(texts) - len(new))

    def _read_all(
        self, folder: Path, box: tuple[float, float, float, float]
    ) -> tuple[dict[str, Tensor], list[Dropped]]:
        """The maps by the `_key` of their word, over the whole image; and the files that cannot be used."""
        heat: dict[str, Tensor] = {}
        dropped = []
        for file in _files(folder):
            word, where = _key(file.stem.removeprefix(_BEGIN)), str(file.relative_to(self._source))
            try:
                pixels = _read(file)
            except DataError as error:
                dropped.append(Dropped(where, error.got))
                continue
            if pixels.shape != self.grid:
                rows, cols = pixels.shape
                dropped.append(Dropped(where, f"a map of {rows} × {cols} cells, not {self.grid[0]} × {self.grid[1]}"))
            elif word in heat:
                dropped.append(Dropped(where, f"a second map of {word!r}; the first is taken"))
            else:
                heat[word] = to_heat(resample_to_picture(pixels[None, None], [box], self.grid))[0, 0]
        return heat, dropped

    def _check(self, dropped: list[Dropped]) -> None:
        if self._strict and dropped:
            do = "repair or remove it, or leave strict out"
            raise DataError(f"{dropped[0].what}: {dropped[0].reason}", "every map to be usable, as strict asks", do)


def _record(identity: str, text: str, heat: dict[str, Tensor], grid: tuple[int, int]) -> WordMaps:
    """The record of a text: each of its words with a map, in any case of its letters."""
    words: list[Word] = [word for word in words_of(text) if _key(word.text) in heat]
    without = [word for word in words_of(text) if word.part_of_speech in CONTENT_WORDS and word not in words]
    maps = torch.stack([heat[_key(word.text)] for word in words]) if words else torch.zeros(0, *grid)
    dropped = tuple(Dropped(word.text, "no file of this word") for word in without)
    return WordMaps(identity, text, tuple(words), maps, dropped)


def _key(word: str) -> str:
    """A word as it is compared: in lower case, a letter with its accent as one character. macOS may write two."""
    return unicodedata.normalize("NFC", word).lower()


def _folders(source: Path) -> Iterator[Path]:
    if not source.is_dir():
        raise DataError(f"{source}, which is no folder", "a folder with a folder per image", "check the path")
    return (path for path in sorted(source.iterdir()) if path.is_dir())


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob(f"{_BEGIN}*") if file.suffix.lower() in _ENDINGS)


def _readable(files: list[Path]) -> Iterator[Tensor]:
    for file in files:
        with suppress(DataError):
            yield _read(file)


def _read(file: Path) -> Tensor:
    """A map of a file, (rows, cols) in [0, 1]. Raises DataError."""
    pixels = np.asarray(load_image(file, f"the map {file.name}").convert("L"))
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def _box(image: Image.Image, geometry: str) -> tuple[float, float, float, float]:
    """The part of the image that its maps cover: (top, left, bottom, right) in shares of its height and width."""
    if geometry == "squash":
        return 0.0, 0.0, 1.0, 1.0
    side = min(image.size)
    down, across = side / image.height, side / image.width
    return (1 - down) / 2, (1 - across) / 2, (1 + down) / 2, (1 + across) / 2
