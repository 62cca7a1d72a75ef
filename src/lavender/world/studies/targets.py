"""Map stores to compare the teacher's with: the same words, other maps. Is it the knowledge or the regulariser?"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lavender.data.images import image_id
from lavender.data.store import MapStore
from lavender.maps import Word, WordMaps, to_heat
from lavender.world.language import caption_scene
from lavender.world.scenes import Scene

Target = Literal["teacher", "wrong-word", "wrong-image", "uniform", "centre", "masks", "maps"]
EVERY_WORD: Target = "maps"  # the extraction itself: adjectives and verbs too, each map with its confidence
TARGETS: dict[Target, str] = {
    "teacher": "the teacher's map of the word",
    "wrong-word": "the teacher's map of another thing in the picture; of another picture where there is none",
    "wrong-image": "the teacher's map of a thing in another picture",
    "uniform": "a constant, which min–max turns into zero everywhere",
    "centre": "a round blob in the middle, the same for every word",
    "masks": "the thing's true mask",
}
BLOB_WIDTH = 0.2  # standard deviation of the blob, in shares of the picture's side


@dataclass(frozen=True, eq=False)
class _Named:
    """A scene's mapped words, each with the thing it names, and the teacher's map of each thing."""

    scene: Scene
    text: str
    words: tuple[tuple[Word, str], ...]
    own: dict[Word, Tensor]
    things: dict[str, Tensor]


def write_target(path: Path, target: Target, store: MapStore, scenes: Sequence[Scene]) -> Path:
    """A store of the words that name things, each with the maps of `target`; kept if it is there already.

    Every target has exactly the same words, so that stores differ in the maps alone.
    """
    if path.is_dir():
        return path
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    named = [one for one in (_named(scene, store) for scene in scenes) if one.words]
    with MapStore.writer(partial, dict(store.identity) | {"target": target}, {}, store.grid) as writer:
        for index, one in enumerate(named):
            other = next(iter(named[(index + 1) % len(named)].things.values()))
            maps = torch.stack([_map(target, one, word, name, other, store.grid) for word, name in one.words])
            writer.add(WordMaps(image_id(one.scene.image), one.text, tuple(word for word, _ in one.words), maps))
    partial.rename(path)
    return path


def _named(scene: Scene, store: MapStore) -> _Named:
    caption = caption_scene(scene)
    maps = store.get(image_id(scene.image), caption.text)
    if maps is None:
        raise ValueError(f"Got no maps of scene {scene.seed}; expected a store of these scenes' captions.")
    words = tuple(
        (word, mention.name)
        for word in maps.words
        for mention in caption.mentions
        if mention.start <= word.start < mention.end
    )
    found = {mention.name: maps.map_of(mention.start, mention.end) for mention in caption.mentions}
    things = {name: own for name, own in found.items() if own is not None}
    return _Named(scene, caption.text, words, dict(zip(maps.words, maps.maps, strict=True)), things)


def _map(target: Target, one: _Named, word: Word, name: str, other: Tensor, grid: tuple[int, int]) -> Tensor:
    if target == "teacher":
        return one.own[word]
    if target == "wrong-word":
        names = list(one.things)
        return one.things[names[(names.index(name) + 1) % len(names)]] if len(names) > 1 else other
    if target == "wrong-image":
        return other
    if target == "uniform":
        return torch.ones(grid)
    if target == "centre":
        rows, cols = ((torch.arange(count) + 0.5) / count - 0.5 for count in grid)
        return to_heat(torch.exp(-(rows[:, None] ** 2 + cols**2) / (2 * BLOB_WIDTH**2)))
    mask = torch.from_numpy(one.scene.mask_of(name)).float()
    return to_heat(F.adaptive_avg_pool2d(mask[None, None], grid)[0, 0])
