"""COCO panoptic: a category for every pixel; a word lies where the categories lie that it names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lavender.data.images import MAX_BYTES, decoding, open_encoded
from lavender.data.samples import Sample, Samples
from lavender.errors import DataError
from lavender.files import expanded, fault_of, half_character, printable, read_plain, shown
from lavender.maps import Dropped, Word
from lavender.teachers.annotations.base import (
    Found,
    Layout,
    PictureAnnotations,
    caption_sample,
    checked_parts,
    first_folder,
    is_name,
    is_outside,
    read_json,
)
from lavender.teachers.annotations.category_names import COCO_SYNONYMS, CategoryNames, digest
from lavender.teachers.annotations.regions import Region, mask_region
from lavender.words import words_of

_NAME_2014 = re.compile(r"COCO_(?:train|val|test)\d{4}_(\d{12})")  # the same picture in the releases before 2017


class _Entry(NamedTuple):
    """What the JSON file says of one picture."""

    picture: str
    mask: str
    image_id: int
    segments: tuple[tuple[int, int], ...]  # (segment id, category id)


class CocoPanoptic(Layout):
    """`panoptic_*.json` with its folder of PNG files, in which a pixel's segment is R + 256·G + 256²·B.

    The map of a word is the union of all segments of the categories that it names, crowds included: it says where
    such things are, not which one is meant. Only nouns and names of several words ("fire hydrant") have maps.

    Args:
        path: the JSON file, or a folder that holds one of them (or whose `annotations` does).
        pictures: folder of the pictures. Default: the first that exists of ../val2017, ../images/val2017, val2017 and
            images/val2017, seen from the file panoptic_val2017.json.
        masks: folder of the PNG files. Default: panoptic_val2017 beside the file or beside its folder.
        captions: COCO's captions file, for `samples`. Default: captions_val2017.json beside the file, if it is there.
        parts_of_speech: words that are looked up, and named where they have no map; None is nouns.
        synonyms: further words, by the category's spoken name.

    Raises:
        DataError: a file or folder is missing, or is not of this layout.
        ConfigError: an unknown part of speech.
    """

    name = "coco-panoptic"

    def __init__(
        self,
        path: str | Path,
        *,
        pictures: str | Path | None = None,
        masks: str | Path | None = None,
        captions: str | Path | None = None,
        parts_of_speech: Sequence[str] | None = None,
        synonyms: Mapping[str, Sequence[str]] = COCO_SYNONYMS,
    ):
        self.path = _panoptic_file(expanded(path))
        self.label = self.path.stem
        content = read_json(self.path, ("images", "annotations", "categories"))
        split, folder = self.path.stem.removeprefix("panoptic_"), self.path.parent
        beside = [folder.parent / split, folder.parent / "images" / split, folder / split, folder / "images" / split]
        self.pictures = first_folder(
            beside if pictures is None else [Path(pictures)], "pictures", "give the folder of the pictures"
        )
        beside = [folder / self.path.stem, folder.parent / self.path.stem]
        self.masks = first_folder(
            beside if masks is None else [Path(masks)], "PNG masks", f"unpack {self.path.stem}.zip beside {self.path}"
        )
        beside_file = folder / f"captions_{split}.json"
        beside_file = beside_file if os.path.isfile(beside_file) else None
        self.captions = beside_file if captions is None else expanded(captions)
        self._parts = checked_parts(("noun",) if parts_of_speech is None else parts_of_speech)
        self._synonyms = synonyms
        self._categories, things = _categories(content, self.path)
        entries = _entries(content, self.path)
        self._names = CategoryNames(things, synonyms)
        self._entries: dict[str, _Entry] = {}
        for entry in entries:
            if (other := self._entries.setdefault(Path(entry.picture).stem, entry)) is not entry:
                got = f"{self.path} with {other.picture} and {entry.picture}"
                raise DataError(got, "pictures of different names", "rename them: a picture is known by its name")

    def identity(self) -> dict[str, Any]:
        """See `Layout.identity`."""
        rules = {"region": "all segments of the named categories, crowds included", "match": "longest name, nouns"}
        return {**rules, "parts_of_speech": list(self._parts), "synonyms": digest(self._synonyms)}

    def samples(self) -> Samples:
        """The captions of the pictures that are annotated, in the order of the annotations."""
        if self.captions is None:
            got = f"no captions_*.json beside {self.path}"
            raise DataError(got, "texts on the pictures", "give COCO's captions file, or a data set of your own")
        captions = _captions(self.captions)
        samples: list[Sample] = []
        dropped: list[Dropped] = []
        outside: list[Dropped] = []
        for entry in self._entries.values():
            picture, own = self.pictures / entry.picture, captions.pop(entry.image_id, [])
            fault = fault_of(picture) if own else f"no caption in {self.captions.name}"
            if fault:
                dropped.append(Dropped(printable(entry.picture), fault))
                continue
            if is_outside(picture, self.pictures):
                outside.append(Dropped(entry.picture, f"it lies outside the folder {self.pictures}"))
            for number, caption in own:
                text = caption.strip() if isinstance(caption, str) else ""
                name = f"{printable(entry.picture)} caption {number}"
                fault = half_character(text) if text else f"empty caption: {shown(caption)}"
                if fault:
                    dropped.append(Dropped(name, fault))
                else:
                    samples.append(caption_sample(name, picture, text))
        for image_id, own in captions.items():
            reason = f"its picture {image_id} has no annotation in {self.path.name}"
            dropped += [Dropped(f"{self.captions.name} caption {number}", reason) for number, _ in own]
        if not samples:
            first = f"; the first, {dropped[0].what}: {dropped[0].reason}" if dropped else ""
            raise DataError(f"{self.path} with no usable picture and caption{first}", "at least one", "check the paths")
        return Samples(tuple(samples), tuple(dropped), outside=tuple(outside))

    def key(self, picture: Path) -> str:
        """The picture's file name; the names of the releases of 2014 and 2015 serve too."""
        old = _NAME_2014.fullmatch(picture.stem)
        key = old[1] if old else picture.stem
        if key not in self._entries:
            raise DataError(f"{picture.name}, which is not in {self.path.name}", "a picture of that file", "remove it")
        return key

    def read(self, key: str) -> PictureAnnotations:
        """The segments of one picture. Raises DataError if its PNG is missing or no panoptic PNG."""
        entry = self._entries[key]
        return _Panoptic(entry, _segment_ids(self.masks / entry.mask), self._categories, self._names, self._parts)


class _Panoptic(PictureAnnotations):
    """The segments of one picture."""

    def __init__(
        self,
        entry: _Entry,
        ids: np.ndarray,
        categories: Mapping[int, str],
        names: CategoryNames,
        parts_of_speech: Sequence[str],
    ):
        self.size = ids.shape[0], ids.shape[1]
        self._ids, self._names, self._parts = ids, names, parts_of_speech
        self._segments: dict[str, list[int]] = {}
        self._regions: dict[tuple[str, ...], Region] = {}
        drawn, faults = set(np.unique(ids).tolist()) - {0}, []
        for segment, category in entry.segments:
            if category not in categories:
                faults.append(f"segment {segment} has the unknown category {category}")
            elif segment not in drawn:
                faults.append(f"segment {segment} ({categories[category]!r}) has no pixel in {entry.mask}")
            else:
                self._segments.setdefault(categories[category], []).append(segment)
        strange = sorted(drawn - {segment for segment, _ in entry.segments})
        faults += [f"{entry.mask} has pixels of the segments {strange}, which the JSON lacks"] if strange else []
        self.faults = tuple(Dropped(entry.picture, fault) for fault in faults)

    def find(self, text: str) -> Found:
        """See `PictureAnnotations.find`; any text will do."""
        words = words_of(text)
        categories: dict[Word, tuple[str, ...]] = {}
        for run, names in self._names.match(text, words):
            if len(run) > 1 or "-" in run[0].text or run[0].part_of_speech in self._parts:
                categories |= dict.fromkeys(run, names)
        found: list[tuple[Word, Region]] = []
        dropped: list[Dropped] = []
        for word in words:
            here = tuple(name for name in categories.get(word, ()) if name in self._segments)
            if here:
                found.append((word, self._region(here)))
            elif word in categories:
                named = " or ".join(repr(name) for name in categories[word])
                dropped.append(Dropped(word.text, f"no segment of {named} on the picture"))
            elif word.part_of_speech in self._parts:
                dropped.append(Dropped(word.text, "no category has this name"))
        return Found(found, dropped)

    def _region(self, names: tuple[str, ...]) -> Region:
        if names not in self._regions:
            segments = [segment for name in names for segment in self._segments[name]]
            self._regions[names] = mask_region(np.isin(self._ids, segments))
        return self._regions[names]


def _panoptic_file(path: Path) -> Path:
    """The file itself, or the one panoptic_*.json of a folder or of its folder `annotations`."""
    if not os.path.isdir(path):
        return path
    found = sorted([*path.glob("panoptic_*.json"), *(path / "annotations").glob("panoptic_*.json")])
    if len(found) != 1:
        names = " and ".join(str(one.relative_to(path)) for one in found)
        raise DataError(f"{path} with {names or 'no panoptic_*.json'}", "one", "give the path of the JSON file itself")
    return found[0]


def _captions(path: Path) -> dict[int, list[tuple[str, Any]]]:
    """(number, caption) of each picture by its id."""
    captions: dict[int, list[tuple[str, Any]]] = {}
    for one in read_json(path, ("annotations",))["annotations"]:
        if not isinstance(one, dict) or not {"image_id", "id", "caption"} <= one.keys() or not _is_id(one["image_id"]):
            got = f"{path} with the annotation {shown(one)}"
            raise DataError(got, "image_id, id and caption", "give a captions_*.json, not instances or keypoints")
        captions.setdefault(one["image_id"], []).append((shown(one["id"]), one["caption"]))
    return captions


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(path: Path, entry: object) -> DataError:
    got = f"{printable(path)} with the entry {shown(entry)}"
    do = "check that it is COCO's panoptic format, not its instances or stuff"
    return DataError(got, "images, annotations with segments_info, and categories", do)


def _twice(path: Path, what: str) -> DataError:
    return DataError(f"{printable(path)} with {what} twice", "each once", "remove one of them")


def _categories(content: Mapping[str, Any], path: Path) -> tuple[dict[int, str], list[tuple[str, bool]]]:
    """Names by id, and (name, whether it is a thing)."""
    names: dict[int, str] = {}
    things = []
    for one in content["categories"]:
        if not isinstance(one, dict) or not _is_id(one.get("id")) or not is_name(one.get("name")):
            raise _wrong(path, one)
        if one["id"] in names:
            raise _twice(path, f"the category {one['id']}")
        names[one["id"]] = one["name"]
        things.append((one["name"], bool(one.get("isthing", 1))))
    return names, things


def _entries(content: Mapping[str, Any], path: Path) -> list[_Entry]:
    pictures: dict[int, str] = {}
    for one in content["images"]:
        if not isinstance(one, dict) or not _is_id(one.get("id")) or not is_name(one.get("file_name")):
            raise _wrong(path, one)
        if pictures.setdefault(one["id"], one["file_name"]) != one["file_name"]:
            raise _twice(path, f"the picture {one['id']}")
    return [_entry(one, pictures, path) for one in content["annotations"]]


def _entry(one: Any, pictures: Mapping[int, str], path: Path) -> _Entry:
    if not isinstance(one, dict) or not _is_id(one.get("image_id")) or not is_name(one.get("file_name")):
        raise _wrong(path, one)
    found = one.get("segments_info")
    if one["image_id"] not in pictures or not isinstance(found, list):
        raise _wrong(path, one)
    for segment in found:
        if not isinstance(segment, dict) or not _is_id(segment.get("id")) or not _is_id(segment.get("category_id")):
            raise _wrong(path, segment)
    segments = tuple((segment["id"], segment["category_id"]) for segment in found)
    return _Entry(pictures[one["image_id"]], one["file_name"], one["image_id"], segments)


def _segment_ids(path: Path) -> np.ndarray:
    """int32 (height, width)."""
    if fault := fault_of(path):
        raise DataError(f"no mask: {fault}", "a PNG for each annotation", "unpack all of the masks")
    with decoding(printable(path)):
        image = open_encoded(read_plain(path, MAX_BYTES), printable(path), ("PNG",))
        mode, colours = image.mode, np.asarray(image)
    if mode != "RGB":
        got = f"{path} in the mode {mode!r}"
        raise DataError(got, "a panoptic PNG in RGB", "take the panoptic masks, not the semantic ones")
    red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 256**2 * blue
