"""Flickr30k Entities: phrases of captions, linked to boxes drawn by people."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from lavender.config import CONTENT_WORDS
from lavender.data.samples import Sample, Samples
from lavender.errors import DataError
from lavender.files import expanded, fault_of, printable
from lavender.maps import Dropped, Word
from lavender.teachers.annotations.base import (
    Annotations,
    Found,
    PictureAnnotations,
    caption_sample,
    checked_parts,
    first_folder,
    is_name,
    is_outside,
    read_text,
)
from lavender.teachers.annotations.regions import PixelBox, Region, Size, box_region
from lavender.words import content_words

_PHRASE = re.compile(r"\[/EN#(\d+)(?:/[^\s\]/]+)*\s+([^\[\]]*)\]")
_NOT_VISUAL = "0"
_MARK = "[/EN#"
_MAX_SENTENCE = 10_000  # characters; this and the next are far above the published ones
_MAX_BOXES = 1000  # per entity
_MAX_FILE = 2**22  # bytes per file of one image
_PICTURE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images", "Images")


class Phrase(NamedTuple):
    """A phrase of a sentence: its half-open span of characters and the id of the entity it names."""

    start: int
    end: int
    entity: str


@dataclass(frozen=True)
class Sentence:
    """A caption without its markup, and its phrases."""

    text: str
    phrases: tuple[Phrase, ...]


def parse_sentence(line: str) -> Sentence:
    """The plain text and phrases of a line such as "[/EN#283585/people A girl] sings .".

    Raises:
        DataError: unclosed markup, an empty text, or more than 10,000 characters.
    """
    if len(line) > _MAX_SENTENCE:
        got = f"a sentence of {len(line):,} characters"
        raise DataError(got, f"at most {_MAX_SENTENCE:,}", "take the file from the published archive")
    text, phrases, end = "", [], 0
    line = line.strip()
    for match in _PHRASE.finditer(line):
        text += line[end : match.start()]
        phrase = match[2].rstrip()
        phrases.append(Phrase(len(text), len(text) + len(phrase), match[1]))
        text, end = text + phrase, match.end()
    text = text + line[end:]
    if _MARK in text or not text.strip():
        do = "take the file from the published archive"
        raise DataError(f"the sentence {line[:80]!r}", "text with phrases as [/EN#12/people A girl]", do)
    return Sentence(text, tuple(phrases))


class Flickr30kEntities(Annotations):
    """The folder of Flickr30k Entities, with `Sentences/*.txt` and `Annotations/*.xml`.

    The region of a word is the union of the boxes of its phrase. Words outside all phrases have no map. Phrases that
    are not visual, have no box, or mean the scene as a whole have none either.

    Args:
        path: the folder.
        pictures: folder of the images, such as 36979.jpg. Default: the first of flickr30k-images, flickr30k_images,
            images and Images that exists, in the folder or beside it.
        split: use only the images that `{split}.txt` in the folder lists, such as "train".
        parts_of_speech: words of a phrase that get a map. Default: nouns, adjectives and verbs.

    Raises:
        DataError: a folder or file is missing.
        ConfigError: an unknown part of speech.
    """

    name = "flickr30k-entities"

    def __init__(
        self,
        path: str | Path,
        *,
        pictures: str | Path | None = None,
        split: str | None = None,
        parts_of_speech: Sequence[str] | None = None,
    ):
        self.path = expanded(path)
        for folder in ("Sentences", "Annotations"):
            if not os.path.isdir(self.path / folder):
                got = f"{self.path} without the folder {folder}"
                raise DataError(got, "Flickr30k Entities, unpacked", "unpack annotations.zip there, or check the path")
        near = [root / name for root in (self.path, self.path.absolute().parent) for name in _PICTURE_FOLDERS]
        self.pictures = first_folder(
            near if pictures is None else [Path(pictures)], "pictures", "give the folder of the pictures"
        )
        self.label = self.name if split is None else f"{self.name}-{split}"
        self._keys = self._listed(split)
        self._known = frozenset(self._keys)
        self._parts = checked_parts(CONTENT_WORDS if parts_of_speech is None else parts_of_speech)

    def _listed(self, split: str | None) -> tuple[str, ...]:
        """The names of the images of a split, or of all images."""
        if split is None:
            names = [name.removesuffix(".txt") for name in _listdir(self.path / "Sentences") if name.endswith(".txt")]
            return tuple(sorted(names, key=lambda name: (len(name), name)))  # numeric order
        file = self.path / f"{split}.txt"
        if not os.path.isfile(file):
            splits = ", ".join(sorted(list_file.stem for list_file in self.path.glob("*.txt"))) or "none"
            raise DataError(f"no {file}", "a list of picture names, one per line", f"use an existing split: {splits}")
        return tuple(dict.fromkeys(read_text(file).split()))

    def identity(self) -> dict[str, Any]:
        """See `Annotations.identity`."""
        return {"region": "all boxes of the phrase, no scenes", "parts_of_speech": list(self._parts)}

    def samples(self) -> Samples:
        """The sentences of each image, in the order of the images' numbers or of the split."""
        samples: list[Sample] = []
        dropped: list[Dropped] = []
        outside: list[Dropped] = []
        for key in self._keys:
            picture = self.pictures / f"{key}.jpg"
            fault = fault_of(picture) if is_name(key) else "no name of a picture"
            if fault:
                dropped.append(Dropped(printable(key), fault))
                continue
            if is_outside(picture, self.pictures):
                outside.append(Dropped(key, f"it lies outside the folder {self.pictures}"))
            try:
                lines = self._lines(key)
            except DataError as error:
                dropped.append(Dropped(key, str(error)))
                continue
            for number, line in lines:
                try:
                    samples.append(caption_sample(f"{key}.txt line {number}", picture, parse_sentence(line).text))
                except DataError as error:
                    dropped.append(Dropped(f"{key}.txt line {number}", str(error)))
        if not samples:
            first = f"; the first, {dropped[0].what}: {dropped[0].reason}" if dropped else ""
            raise DataError(f"{self.path} with no usable sentence{first}", "at least one", "check the paths")
        return Samples(tuple(samples), tuple(dropped), outside=tuple(outside))

    def key(self, picture: Path) -> str:
        """The image's file name without its ending."""
        if picture.stem not in self._known:
            got = f"{picture.name}, which is not in {self.label}"
            raise DataError(got, "a picture with sentences there", "remove it, or choose another split")
        return picture.stem

    def read(self, key: str) -> PictureAnnotations:
        """The sentences and boxes of one image. Raises DataError if a file is missing or damaged."""
        sentences, faults = [], []
        for number, line in self._lines(key):
            try:
                sentences.append(parse_sentence(line))
            except DataError as error:
                faults.append(Dropped(f"{key}.txt line {number}", str(error)))
        return _Entities(key, sentences, _boxes(self.path / "Annotations" / f"{key}.xml"), self._parts, faults)

    def _lines(self, key: str) -> list[tuple[int, str]]:
        """(number from 1, line) of each non-empty line. Only a line feed ends one: sentences hold other separators."""
        lines = read_text(self.path / "Sentences" / f"{key}.txt", _MAX_FILE).split("\n")
        return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _listdir(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        got = f"{printable(folder)}, which cannot be read: {error.strerror}"
        raise DataError(got, "a folder that you may read", "change its permissions") from error


class _Marked(NamedTuple):
    """The content of an XML file: boxes by entity, and why the other entities have none."""

    size: Size
    boxes: Mapping[str, list[PixelBox]]
    boxless: Mapping[str, str]


class _Entities(PictureAnnotations):
    """The sentences and boxes of one image."""

    def __init__(
        self, key: str, sentences: Sequence[Sentence], marked: _Marked, parts: Sequence[str], faults: Sequence[Dropped]
    ):
        self.size = marked.size
        self._sentences = {_without_spaces(sentence.text): sentence for sentence in sentences}
        self._parts, self._boxless, self._boxes = parts, dict(marked.boxless), {}
        all_faults = list(faults)
        for entity, boxes in marked.boxes.items():
            inside = [box for box in boxes if _is_inside(box, self.size)]
            outside = [box for box in boxes if box not in inside]
            all_faults += [Dropped(f"{key}.xml", f"the box {box} of {entity} is empty or outside") for box in outside]
            if inside:
                self._boxes[entity] = inside
            else:
                self._boxless[entity] = "its boxes are empty or outside the picture"
        self.faults = tuple(all_faults)

    def find(self, text: str) -> Found:
        """See `PictureAnnotations.find`. The text must be one of the sentences; spaces may differ."""
        sentence = self._sentences.get(_without_spaces(text))
        if sentence is None:
            got = f"the text {text[:60]!r}, which is none of the picture's sentences"
            raise DataError(got, "a caption of Flickr30k, spaces aside", "use the captions as published")
        phrases = _phrases_in(sentence, text)
        mapped: list[tuple[Word, Region]] = []
        dropped: list[Dropped] = []
        for word in content_words(text, self._parts):
            entities = [phrase.entity for phrase in phrases if phrase.start < word.end and phrase.end > word.start]
            boxes = [box for entity in entities for box in self._boxes.get(entity, ())]
            if boxes:
                mapped.append((word, box_region(boxes, self.size)))
            else:
                dropped.append(Dropped(word.text, self._reason(entities)))
        return Found(mapped, dropped)

    def _reason(self, entities: Sequence[str]) -> str:
        """Why a word of these entities has no map."""
        if not entities:
            return "in no phrase"
        if entities[0] == _NOT_VISUAL:
            return "its phrase is marked as not visual"
        return self._boxless.get(entities[0], "its phrase is not in the XML file")


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _phrases_in(sentence: Sentence, text: str) -> list[Phrase]:
    """The phrases of a sentence in the same text with other spaces."""
    places = [place for place, character in enumerate(text) if not character.isspace()]
    count, before = 0, []  # the number of non-space characters before each place of the sentence
    for character in sentence.text:
        before.append(count)
        count += not character.isspace()
    return [
        Phrase(places[before[phrase.start]], places[before[phrase.end - 1]] + 1, phrase.entity)
        for phrase in sentence.phrases
        if phrase.end > phrase.start
    ]


def _is_inside(box: PixelBox, size: Size) -> bool:
    """Whether a part of the box lies in an image of (height, width)."""
    top, left, bottom, right = box
    return max(left, 0) < min(right, size[1]) and max(top, 0) < min(bottom, size[0])


def _boxes(path: Path) -> _Marked:
    """Read an XML file. VOC counts pixels from 1, the last one included: xmin 1, xmax 2 is two pixels wide."""
    if fault := fault_of(path):
        raise DataError(f"no {path.name}: {fault}", "an XML file for each picture", "unpack all of the annotations")
    text = read_text(path, _MAX_FILE)
    try:
        if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities may expand without end, or name other files
            raise ValueError("it has a document type, which may define entities")
        root = ElementTree.fromstring(text)
        boxes: dict[str, list[PixelBox]] = {}
        boxless: dict[str, str] = {}
        for thing in root.iter("object"):
            box = thing.find("bndbox")
            for name in thing.findall("name"):
                entity = (name.text or "").strip()
                if box is not None:
                    top, left, bottom, right = (_number(box, tag) for tag in ("ymin", "xmin", "ymax", "xmax"))
                    boxes.setdefault(entity, []).append((top - 1, left - 1, bottom, right))
                elif thing.findtext("scene", "0").strip() == "1":
                    boxless[entity] = "its phrase is the scene as a whole"
                else:
                    boxless[entity] = "its phrase has no box"
        if any(len(entity_boxes) > _MAX_BOXES for entity_boxes in boxes.values()):
            raise ValueError(f"more than {_MAX_BOXES:,} boxes of one entity")
        size = root.find("size")
        if size is None:
            raise ValueError("no <size>")
        return _Marked((int(_number(size, "height")), int(_number(size, "width"))), boxes, boxless)
    except (ElementTree.ParseError, ValueError) as error:
        got = f"{path}, which cannot be read: {printable(error)}"
        raise DataError(got, "the XML of Flickr30k Entities", "unpack it again") from error


def _number(parent: ElementTree.Element, tag: str) -> float:
    value = parent.findtext(tag)
    if value is None:
        raise ValueError(f"<{parent.tag}> has no <{tag}>")
    if not math.isfinite(number := float(value)):
        raise ValueError(f"<{tag}> of {number}")
    return number
