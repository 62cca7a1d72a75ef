"""What every format of annotations provides: its samples, and which words of a text lie where."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavender.config import ExtractionConfig
from lavender.data.samples import Sample, Samples
from lavender.errors import DataError
from lavender.files import JsonError, expanded, half_character, parse_json, printable, read_plain
from lavender.maps import Dropped, Word
from lavender.teachers.annotations.regions import Region, Size
from lavender.type_checks import from_mapping


@dataclass(frozen=True)
class Found:
    """The words of a text on one image.

    Attributes:
        words: the words with a region, in order.
        dropped: the words that should have a region and have none.
    """

    words: Sequence[tuple[Word, Region]]
    dropped: Sequence[Dropped] = ()


class PictureAnnotations(ABC):
    """The annotations of one image.

    Attributes:
        size: (height, width) in pixels of the annotated image.
        faults: annotations that cannot be used.
    """

    size: Size
    faults: Sequence[Dropped] = ()

    @abstractmethod
    def find(self, text: str) -> Found:
        """The regions of a text's words on this image. Raises DataError if the text has no annotations."""


class Annotations(ABC):
    """An annotated data set on disk.

    Attributes:
        name: the name of the format, one of `lavender.teachers.annotations.extract.FORMATS`.
        label: the name of this data set, usable as a file name.
        maps_any_text: whether words of any text can be found on an image, or only those of the captions.
    """

    name: str
    label: str
    maps_any_text: bool = False

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The settings that change a map. Two stores with the same identity can be joined."""

    @abstractmethod
    def samples(self) -> Samples:
        """The images and texts of the data set itself. Raises DataError if it has none."""

    @abstractmethod
    def key(self, picture: Path) -> str:
        """The key of an image's annotations, for `read`. Cheap. Raises DataError if the image has none."""

    @abstractmethod
    def read(self, key: str) -> PictureAnnotations:
        """The annotations of one image. Raises DataError if they cannot be read."""


def caption_sample(name: str, picture: Path, text: str) -> Sample:
    """A sample with one caption as its answer. The question does not affect its maps."""
    question = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    answer = [{"type": "text", "text": text}]
    return Sample(name, (picture,), [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def checked_parts(parts_of_speech: Sequence[str]) -> tuple[str, ...]:
    """The same parts of speech as a tuple. Raises ConfigError for an unknown one."""
    return from_mapping(ExtractionConfig, {"parts_of_speech": parts_of_speech}, "parts of speech").parts_of_speech


MAX_BYTES = 2**33
"""The most bytes of an annotation file, which is held in memory."""


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises DataError."""
    try:
        return read_plain(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"{printable(path)}, which is not UTF-8 at byte {error.start}"
        raise DataError(got, "a text in UTF-8", "unpack it again, or save it as UTF-8") from error


def read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The JSON object in a file, which has a list under each of `keys`. Raises DataError."""
    try:
        content = parse_json(read_text(path))
    except JsonError as error:
        got = f"{printable(path)}, which cannot be read: {error}"
        raise DataError(got, "a valid JSON file", "replace it") from error
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            kind = printable(sorted(content)) if isinstance(content, dict) else f"a JSON {type(content).__name__}"
            raise DataError(f"{path} without a list {key!r}: {kind}", f"the lists {', '.join(keys)}", "check the file")
    return content


def is_name(name: object) -> bool:
    """Whether this is a relative path of a file that stays inside its folder and can be printed."""
    if not isinstance(name, str) or not name or half_character(name) or "\0" in name:
        return False
    return not os.path.isabs(name) and ".." not in Path(name).parts


def is_outside(path: Path, folder: Path) -> bool:
    """Whether the path leads outside the folder once links are resolved."""
    return not os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


def first_folder(candidates: Sequence[Path], what: str, do: str) -> Path:
    """The first of these folders that exists. Raises a DataError that names them all."""
    for folder in map(expanded, candidates):
        if os.path.isdir(folder):
            return folder
    tried = ", ".join(printable(folder) for folder in candidates)
    raise DataError(f"no folder of {what}: none of {tried} exists", f"a folder of {what}", do)
