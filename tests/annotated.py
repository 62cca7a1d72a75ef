"""Annotated pictures on disk in their published formats, and what is read from their maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lavender.data.store import MapStore
from lavender.maps import WordMaps
from lavender.teachers.annotations.base import Annotations
from lavender.teachers.annotations.coco import CocoPanoptic
from lavender.teachers.annotations.extract import extract_annotations

GRID = (3, 5)
WIDTH, HEIGHT = 14, 10
CATEGORIES: list[dict[str, Any]] = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 18, "name": "dog", "isthing": 1},
    {"id": 11, "name": "fire hydrant", "isthing": 1},
    {"id": 58, "name": "hot dog", "isthing": 1},
    {"id": 55, "name": "orange", "isthing": 1},
    {"id": 35, "name": "skis", "isthing": 1},
    {"id": 171, "name": "wall-brick", "isthing": 0},
    {"id": 176, "name": "wall-tile", "isthing": 0},
    {"id": 187, "name": "sky-other-merged", "isthing": 0},
    {"id": 193, "name": "grass-merged", "isthing": 0},
]


def near(maps: torch.Tensor, expected: Any) -> None:
    """Equal but for the store's 8 bits."""
    torch.testing.assert_close(maps, torch.as_tensor(expected, dtype=torch.float32), rtol=0, atol=0.5 / 255 + 1e-6)


def outer(down: list[float], across: list[float]) -> torch.Tensor:
    return torch.tensor(down)[:, None] * torch.tensor(across)


def picture(shade: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    return Image.new("RGB", size, (shade, 40, 200))


def write_mask(path: Path, ids: np.ndarray) -> None:
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)).save(path)


class Coco:
    """COCO's folders with two pictures: `annotations`, `panoptic` and `captions` are the JSON, to be changed."""

    def __init__(self, root: Path):
        self.root = root
        ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
        ids[:4, :3] = 70_001  # a dog, its id in all three channels
        ids[8:, 12:] = 258  # a crowd of dogs
        ids[:, 7] = 9  # a brick wall
        ids[0, 13] = 5  # a tile wall
        self.ids = {"000000000139": ids, "000000000285": np.full((HEIGHT, WIDTH), 3)}
        (root / "val2017").mkdir()
        (root / "annotations" / "panoptic_val2017").mkdir(parents=True)
        for number, name in enumerate(self.ids):
            picture(100 + number).save(root / "val2017" / f"{name}.png")
        segments = {
            "000000000139": [(70_001, 18, 0), (258, 18, 1), (9, 171, 0), (5, 176, 0)],
            "000000000285": [(3, 193, 0)],
        }
        self.panoptic = {
            "images": [
                {"id": int(name), "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT} for name in self.ids
            ],
            "annotations": [
                {
                    "image_id": int(name),
                    "file_name": f"{name}.png",
                    "segments_info": [
                        {"id": one, "category_id": category, "iscrowd": crowd, "bbox": [0, 0, 1, 1], "area": 1}
                        for one, category, crowd in own
                    ],
                }
                for name, own in segments.items()
            ],
            "categories": CATEGORIES,
        }
        captions = [(139, 1, "A dog by a brick wall. \n"), (285, 2, "Grass."), (139, 3, "Nothing but a cat and dogs")]
        self.captions = {
            "images": self.panoptic["images"],
            "annotations": [{"image_id": one, "id": number, "caption": text} for one, number, text in captions],
        }

    def write(self) -> CocoPanoptic:
        folder = self.root / "annotations"
        for name, ids in self.ids.items():
            write_mask(folder / "panoptic_val2017" / f"{name}.png", ids)
        (folder / "panoptic_val2017.json").write_text(json.dumps(self.panoptic))
        (folder / "captions_val2017.json").write_text(json.dumps(self.captions))
        return CocoPanoptic(folder / "panoptic_val2017.json")


def run(annotations: Annotations, out: Path, **more) -> tuple[Any, dict[str, WordMaps]]:
    """The summary, and the records by text."""
    summary = extract_annotations(annotations.samples(), annotations, out, grid=GRID, **more)
    return summary, {one.text: one for one in MapStore.open(out, verify=True)}


def drops(dropped) -> list[tuple[str, str]]:
    return [(one.what, one.reason) for one in dropped]
