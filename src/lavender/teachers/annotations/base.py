"""What a layout of annotations has to know: its samples, and which words of a text lie where."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavender.config import ExtractionConfig, from_mapping
from lavender.data.samples import Sample, Samples
from lavender.errors import DataError
from lavender.files import JsonError, expanded, half_character, parse_json, printable, read_plain
from lavender.maps import Dropped, Word
from lavender.teachers.annotations.regions import Region, Size


@dataclass(frozen=True)
class Found:
    """The words of a text that have a region, in order, and those that should have one and have none."""

    words: Sequence[tuple[Word, Region]]
    dropped: Sequence[Dropped] = ()


class PictureAnnotations(ABC):
    """The annotations of one picture.

    Attributes:
        size: (height, width) in pixels of the picture that was annotated.
        faults: annotations that cannot be used.
    """

    size: Size
    faults: Sequence[Dropped] = ()

    @abstractmethod
    def find(self, text: str) -> Found:
        """Where the words of a text on this picture are. Raises DataError if the text has no annotations."""


class Layout(ABC):
    """A data set of annotations on disk.

    Attributes:
        name: of the layout, as in `LAYOUTS`.
        label: of this data set, good as a file's name.
    """

    name: str
    label: str

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The rules that change a map. Two stores with the same identity can be joined."""

    @abstractmethod
    def samples(self) -> Samples:
        """The pictures and texts of the data set itself. Raises DataError if it has none."""

    @abstractmethod
    def key(self, picture: Path) -> str:
        """By what this picture's annotations are found. Raises DataError if it has none; reads nothing large."""

    @abstractmethod
    def read(self, key: str) -> PictureAnnotations:
        """The annotations of one picture. Raises DataError if they cannot be read."""


def caption_sample(name: str, picture: Path, text: str) -> Sample:
    """A sample of one caption; what it asks is of no matter to its maps."""
    question = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    answer = [{"type": "text", "text": text}]
    return Sample(name, (picture,), [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def checked_parts(parts_of_speech: Sequence[str]) -> tuple[str, ...]:
    """Parts of speech, each one known. Raises ConfigError."""
    return from_mapping(ExtractionConfig, {"parts_of_speech": parts_of_speech}, "parts of speech").parts_of_speech


MAX_BYTES = 2**33
"""The most bytes of a file of annotations, which is held in memory whole."""


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """A file in UTF-8, with or without a byte order mark. Raises DataError."""
    try:
        return read_plain(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"{printable(path)}, which is not UTF-8 at byte {error.start}"
        raise DataError(got, "a text in UTF-8", "unpack it again, or save it as UTF-8") from error


def read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object with these lists. Raises DataError."""
    try:
        content = parse_json(read_text(path))
    except JsonError as error:
        got = f"{printable(path)}, which cannot be read: {error}"
        raise DataError(got, "a valid JSON file", "replace it") from error
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            found = printable(sorted(content)) if isinstance(content, dict) else f"a JSON {type(content).__name__}"
            raise DataError(f"{path} without a list {key!r}: {found}", f"the lists {', '.join(keys)}", "check the file")
    return content


def is_name(name: object) -> bool:
    """Whether this names a file inside a folder, or of a folder in it, and can be written in a message."""
    if not isinstance(name, str) or not name or half_character(name) or "\0" in name:
        return False
    return not os.path.isabs(name) and ".." not in Path(name).parts


def is_outside(path: Path, folder: Path) -> bool:
    """Whether links lead from a path to somewhere outside a folder."""
    return not os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


def first_folder(candidates: Sequence[Path], what: str, do: str) -> Path:
    """The first of these folders that exists. Raises DataError that names them all."""
    for folder in map(expanded, candidates):
        if os.path.isdir(folder):
            return folder
    tried = ", ".join(printable(folder) for folder in candidates)
    raise DataError(f"no folder of {what}: none of {tried} exists", f"a folder of {what}", do)
