"""COCO panoptic: a category for every pixel. A word's region is the union of the categories it names."""

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
    Annotations,
    Found,
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

_NAME_2014 = re.compile(r"COCO_(?:train|val|test)\d{4}_(\d{12})")  # the same image in the releases before 2017


class _Entry(NamedTuple):
    """The entry of one image in the JSON file."""

    picture: str
    mask: str
    image_id: int
    segments: tuple[tuple[int, int], ...]  # (segment id, category id)


class CocoPanoptic(Annotations):
    """`panoptic_*.json` with its folder of PNG files, in which a pixel's segment id is R + 256·G + 256²·B.

    The region of a word is the union of all segments of the categories that it names, crowds included. It shows where
    such things are, not which one the text means. Only nouns and names of several words ("fire hydrant") have maps.

    Args:
        path: the JSON file, or a folder that holds one such file, directly or in `annotations`.
        pictures: folder of the images. Default, for panoptic_val2017.json: the first of ../val2017,
            ../images/val2017, val2017 and images/val2017 that exists, relative to the file's folder.
        masks: folder of the PNG files. Default: panoptic_val2017 beside the file or beside its folder.
        captions: COCO's captions file, for `samples`. Default: captions_val2017.json beside the file, if it exists.
        parts_of_speech: the words that are looked up, and reported if they have no map. Default: nouns.
        synonyms: additional words of a category, by its spoken name.

    Raises:
        DataError: a file or folder is missing, or is not of this format.
        ConfigError: an unknown part of speech.
    """

    name = "coco-panoptic"
    maps_any_text = True

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
            first = self._entries.setdefault(Path(entry.picture).stem, entry)
            if first is not entry:
                got = f"{self.path} with {first.picture} and {entry.picture}"
                raise DataError(got, "pictures of different names", "rename them: a picture is known by its name")

    def identity(self) -> dict[str, Any]:
        """See `Annotations.identity`."""
        rules = {"region": "all segments of the named categories, crowds included", "match": "longest name, nouns"}
        return {**rules, "parts_of_speech": list(self._parts), "synonyms": digest(self._synonyms)}

    def samples(self) -> Samples:
        """The captions of the annotated images, in the order of the annotations."""
        if self.captions is None:
            got = f"no captions_*.json beside {self.path}"
            raise DataError(got, "texts on the pictures", "give COCO's captions file, or a data set of your own")
        captions = _captions(self.captions)
        samples: list[Sample] = []
        dropped: list[Dropped] = []
        outside: list[Dropped] = []
        for entry in self._entries.values():
            picture, texts = self.pictures / entry.picture, captions.pop(entry.image_id, [])
            fault = fault_of(picture) if texts else f"no caption in {self.captions.name}"
            if fault:
                dropped.append(Dropped(printable(entry.picture), fault))
                continue
            if is_outside(picture, self.pictures):
                outside.append(Dropped(entry.picture, f"it lies outside the folder {self.pictures}"))
            for number, caption in texts:
                text = caption.strip() if isinstance(caption, str) else ""
                name = f"{printable(entry.picture)} caption {number}"
                fault = half_character(text) if text else f"empty caption: {shown(caption)}"
                if fault:
                    dropped.append(Dropped(name, fault))
                else:
                    samples.append(caption_sample(name, picture, text))
        for image_id, texts in captions.items():
            reason = f"its picture {image_id} has no annotation in {self.path.name}"
            dropped += [Dropped(f"{self.captions.name} caption {number}", reason) for number, _ in texts]
        if not samples:
            first = f"; the first, {dropped[0].what}: {dropped[0].reason}" if dropped else ""
            raise DataError(f"{self.path} with no usable picture and caption{first}", "at least one", "check the paths")
        return Samples(tuple(samples), tuple(dropped), outside=tuple(outside))

    def key(self, picture: Path) -> str:
        """The image's file name without its ending; the names of the releases of 2014 and 2015 work too."""
        old = _NAME_2014.fullmatch(picture.stem)
        key = old[1] if old else picture.stem
        if key not in self._entries:
            raise DataError(f"{picture.name}, which is not in {self.path.name}", "a picture of that file", "remove it")
        return key

    def read(self, key: str) -> PictureAnnotations:
        """The segments of one image. Raises DataError if its PNG is missing or not a panoptic PNG."""
        entry = self._entries[key]
        return _Panoptic(entry, _segment_ids(self.masks / entry.mask), self._categories, self._names, self._parts)


class _Panoptic(PictureAnnotations):
    """The segments of one image."""

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
        """See `PictureAnnotations.find`. Works for any text."""
        words = words_of(text)
        categories: dict[Word, tuple[str, ...]] = {}
        for run, names in self._names.match(text, words):
            if len(run) > 1 or "-" in run[0].text or run[0].part_of_speech in self._parts:
                categories |= dict.fromkeys(run, names)
        mapped: list[tuple[Word, Region]] = []
        dropped: list[Dropped] = []
        for word in words:
            present = tuple(name for name in categories.get(word, ()) if name in self._segments)
            if present:
                mapped.append((word, self._region(present)))
            elif word in categories:
                names = " or ".join(repr(name) for name in categories[word])
                dropped.append(Dropped(word.text, f"no segment of {names} on the picture"))
            elif word.part_of_speech in self._parts:
                dropped.append(Dropped(word.text, "no category has this name"))
        return Found(mapped, dropped)

    def _region(self, names: tuple[str, ...]) -> Region:
        if names not in self._regions:
            segments = [segment for name in names for segment in self._segments[name]]
            self._regions[names] = mask_region(np.isin(self._ids, segments))
        return self._regions[names]


def _panoptic_file(path: Path) -> Path:
    """The file itself, or the only panoptic_*.json in a folder and its folder `annotations`."""
    if not os.path.isdir(path):
        return path
    files = sorted([*path.glob("panoptic_*.json"), *(path / "annotations").glob("panoptic_*.json")])
    if len(files) != 1:
        names = " and ".join(str(file.relative_to(path)) for file in files)
        raise DataError(f"{path} with {names or 'no panoptic_*.json'}", "one", "give the path of the JSON file itself")
    return files[0]


def _captions(path: Path) -> dict[int, list[tuple[str, Any]]]:
    """Image id → (id, text) of its captions."""
    captions: dict[int, list[tuple[str, Any]]] = {}
    for entry in read_json(path, ("annotations",))["annotations"]:
        has_keys = isinstance(entry, dict) and {"image_id", "id", "caption"} <= entry.keys()
        if not has_keys or not _is_id(entry["image_id"]):
            got = f"{path} with the annotation {shown(entry)}"
            raise DataError(got, "image_id, id and caption", "give a captions_*.json, not instances or keypoints")
        captions.setdefault(entry["image_id"], []).append((shown(entry["id"]), entry["caption"]))
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
    """Category id → name, and (name, whether it is a thing) of each category."""
    names: dict[int, str] = {}
    things = []
    for category in content["categories"]:
        if not isinstance(category, dict) or not _is_id(category.get("id")) or not is_name(category.get("name")):
            raise _wrong(path, category)
        if category["id"] in names:
            raise _twice(path, f"the category {category['id']}")
        names[category["id"]] = category["name"]
        things.append((category["name"], bool(category.get("isthing", 1))))
    return names, things


def _entries(content: Mapping[str, Any], path: Path) -> list[_Entry]:
    pictures: dict[int, str] = {}
    for image in content["images"]:
        if not isinstance(image, dict) or not _is_id(image.get("id")) or not is_name(image.get("file_name")):
            raise _wrong(path, image)
        if pictures.setdefault(image["id"], image["file_name"]) != image["file_name"]:
            raise _twice(path, f"the picture {image['id']}")
    return [_entry(annotation, pictures, path) for annotation in content["annotations"]]


def _entry(annotation: Any, pictures: Mapping[int, str], path: Path) -> _Entry:
    is_object = isinstance(annotation, dict)
    if not is_object or not _is_id(annotation.get("image_id")) or not is_name(annotation.get("file_name")):
        raise _wrong(path, annotation)
    image_id, segments = annotation["image_id"], annotation.get("segments_info")
    if image_id not in pictures or not isinstance(segments, list):
        raise _wrong(path, annotation)
    for segment in segments:
        if not isinstance(segment, dict) or not _is_id(segment.get("id")) or not _is_id(segment.get("category_id")):
            raise _wrong(path, segment)
    pairs = tuple((segment["id"], segment["category_id"]) for segment in segments)
    return _Entry(pictures[image_id], annotation["file_name"], image_id, pairs)


def _segment_ids(path: Path) -> np.ndarray:
    """The segment id of each pixel, int32 (height, width)."""
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
