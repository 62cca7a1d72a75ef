"""Write what a segmenter or detector found in COCO's panoptic format, which `CocoPanoptic` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lavender.data.images import load_image
from lavender.errors import DataError
from lavender.files import expanded, printable
from lavender.teachers.annotations.base import is_name
from lavender.teachers.annotations.regions import PixelBox, Size


@dataclass(frozen=True, eq=False)
class Segment:
    """One thing found on a picture.

    Attributes:
        label: its name as a text would say it, singular: "dog", "fire hydrant".
        score: where segments overlap, a pixel belongs to the one with the highest score.
        region: a mask, bool (height, width), or a box in pixels, of the upright picture.
    """

    label: str
    score: float
    region: np.ndarray | PixelBox


def write_panoptic(
    folder: str | Path,
    pictures: str | Path,
    found: Mapping[str, Sequence[Segment]],
    captions: Mapping[str, Sequence[str]],
    name: str = "found",
) -> Path:
    """Write segments of pictures, and texts on them, for `lavender extract --annotations coco-panoptic`.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from PIL import Image
        >>> from lavender.teachers.annotations.coco import CocoPanoptic
        >>> folder = Path(mkdtemp())
        >>> Image.new("RGB", (40, 30)).save(folder / "a.png")
        >>> segments = [Segment("dog", 0.9, (0, 0, 15, 20)), Segment("cat", 0.5, (0, 0, 30, 40))]
        >>> path = write_panoptic(folder / "boxes", folder, {"a.png": segments}, {"a.png": ["a dog"]})
        >>> annotations = CocoPanoptic(path, pictures=folder)
        >>> [word.text for word, region in annotations.read("a").find("a cat and two dogs").words]
        ['cat', 'dogs']

    Args:
        folder: a new or empty folder for the files.
        pictures: the folder of the pictures.
        found: the segments of each picture, by its file name in `pictures`. A picture may have none.
        captions: the texts on each picture, by its file name.
        name: a part of the names of the files.

    Returns:
        The JSON file. A segment of which others leave no pixel stays in it, and reading it reports that.

    Raises:
        DataError: the folder is not empty, a label or file name cannot be used, a picture cannot be read, a mask has
            another size than its picture, or two pictures have one name but for the ending.
    """
    folder, pictures = expanded(folder), expanded(pictures)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{printable(folder)}, which is not empty", "a new folder", "remove it or choose another")
    labels = _checked_labels(found)
    masks = folder / f"panoptic_{name}"
    masks.mkdir(parents=True)
    images, annotations, texts = [], [], []
    for number, (file, segments) in enumerate(found.items(), start=1):
        width, height = load_image(pictures / file, printable(file)).size
        mask = f"{Path(file).stem}.png"
        _save(_painted(file, segments, (height, width)), masks / mask)
        images.append({"id": number, "file_name": file, "width": width, "height": height})
        annotations.append({"image_id": number, "file_name": mask, "segments_info": _entries(segments, labels)})
        texts += [{"image_id": number, "caption": text} for text in captions.get(file, ())]
    rows = [{"id": number, **text} for number, text in enumerate(texts, start=1)]
    kinds = [{"id": number, "name": label, "isthing": 1} for number, label in enumerate(labels, start=1)]
    content = {"images": images, "annotations": annotations, "categories": kinds}
    path = folder / f"panoptic_{name}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    (folder / f"captions_{name}.json").write_text(json.dumps({"annotations": rows}), encoding="utf-8")
    return path


def _entries(segments: Sequence[Segment], labels: Sequence[str]) -> list[dict[str, int]]:
    """The segments' numbers and categories, both from 1."""
    return [
        {"id": number, "category_id": labels.index(segment.label) + 1}
        for number, segment in enumerate(segments, start=1)
    ]


def _checked_labels(found: Mapping[str, Sequence[Segment]]) -> list[str]:
    stems = {Path(file).stem for file in found}
    if len(stems) < len(found):
        raise DataError("two pictures whose names differ only in the ending", "pictures of different names", "rename")
    labels = sorted({segment.label for segments in found.values() for segment in segments})
    for label in [*labels, *found]:
        if not is_name(label):
            raise DataError(f"the label or file name {printable(label)!r}", "a name that can be printed", "change it")
    return labels


def _painted(file: str, segments: Sequence[Segment], size: Size) -> np.ndarray:
    """The number of the segment that each pixel belongs to, from 1; 0 where there is none."""
    ids = np.zeros(size, dtype=np.int32)
    for number, segment in sorted(enumerate(segments, start=1), key=lambda pair: pair[1].score):
        if isinstance(segment.region, np.ndarray):
            if segment.region.shape != size:
                got = f"a mask of {segment.region.shape} on {printable(file)}"
                raise DataError(got, f"(height, width) {size}", "resize masks to the upright picture")
            ids[segment.region.astype(bool)] = number
        else:
            top, left, bottom, right = (max(0, round(edge)) for edge in segment.region)
            ids[top:bottom, left:right] = number
    return ids


def _save(ids: np.ndarray, path: Path) -> None:
    """Write ids as R + 256·G + 256²·B."""
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)).save(path)
