"""How well `lavender data overlap` tells the same picture from another one, on scenes of the built-in world.

    python benchmarks/overlap.py --json overlap.json
    python benchmarks/overlap.py --quick --json overlap.json    # smoke test: 20 scenes

`unrelated`: of all pairs of different scenes, how many have hashes that differ in at most so many bits, and the
smallest difference. `changed`: of all scenes, the share that is near after a change, at the default threshold, and the
largest difference. `captions`: of all pairs of captions of different scenes, how many have equal words, and how many
others are near by their word triples. The world's captions come from few patterns, so they are more alike than those of
people.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from lavender.evaluation.data_checks.hashes import hash_picture, near_pictures, similarity, words_of_text
from lavender.evaluation.data_checks.overlap import Thresholds
from lavender.world.language import caption_scene
from lavender.world.scenes import scenes

DISTANCES = (32, 48, 64, 80, 96, 112)


def encoded(image: Image.Image, kind: str, quality: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, kind, quality=quality)
    return Image.open(buffer).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half as large": lambda image: resized(image, 0.5),
    "a third as large": lambda image: resized(image, 1 / 3),
    "twice as large": lambda image: resized(image, 2),
    "squashed to a square": lambda image: image.resize((96, 96)),
    "JPEG, quality 75": lambda image: encoded(image, "JPEG", 75),
    "JPEG, quality 50": lambda image: encoded(image, "JPEG", 50),
    "WebP, quality 50": lambda image: encoded(image, "WEBP", 50),
    "half as large, then JPEG of quality 50": lambda image: encoded(resized(image, 0.5), "JPEG", 50),
    "a margin of 5 % cut off": lambda image: image.crop(
        (image.width // 20, image.height // 20, image.width - image.width // 20, image.height - image.height // 20)
    ),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def hashes_of(images: list[Image.Image]) -> np.ndarray:
    return np.stack([bits for image in images if (bits := hash_picture(image).bits) is not None])


def found(changed: list[Image.Image], images: list[Image.Image], distance: int) -> float:
    """The share of changed pictures that are near to their original."""
    originals = [hash_picture(image) for image in images]
    hashes = [hash_picture(image) for image in changed]
    near = near_pictures(hashes, originals, distance)
    pairs = zip(hashes, originals, strict=True)
    return sum(one.identity in dict(near.get(other.identity, ())) for other, one in pairs) / len(images)


def bits_that_differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.bitwise_count(one ^ other).sum(axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: 20 scenes")
    parser.add_argument("--scenes", type=int, default=400, help="development scenes (400)")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    drawn = list(scenes("development", 20 if options.quick else options.scenes))
    thresholds = Thresholds()
    images = [scene.image.convert("RGB") for scene in drawn]
    hashes = hashes_of(images)
    rows, cols = np.triu_indices(len(images), 1)
    unrelated = bits_that_differ(hashes[rows], hashes[cols])
    changed = {}
    for name, change in CHANGES.items():
        copies = [change(image) for image in images]
        bits = bits_that_differ(hashes, hashes_of(copies))
        changed[name] = {"found": found(copies, images, thresholds.distance), "largest": int(bits.max())}
    texts = [words_of_text(caption_scene(scene).text) for scene in drawn]
    alike = [similarity(one, other) for one, other in combinations(texts, 2) if one != other]
    numbers = {
        "scenes": len(drawn),
        "pairs": len(unrelated),
        "unrelated": {
            "smallest": int(unrelated.min()),
            "near": {str(distance): int((unrelated <= distance).sum()) for distance in DISTANCES},
        },
        "changed": changed,
        "captions": {
            "equal": len(unrelated) - len(alike),
            "near": sum(one >= thresholds.similarity for one in alike),
        },
    }
    options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
