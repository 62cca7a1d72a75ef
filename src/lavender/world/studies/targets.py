"""Map stores with the same words as the teacher's, but other maps: the controls of the teacher's maps."""

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
EVERY_WORD: Target = "maps"
"""The teacher's store itself: adjectives and verbs too, each map with its confidence."""
TARGETS: dict[Target, str] = {
    "teacher": "the teacher's map of the word",
    "wrong-word": "the teacher's map of another thing in the picture; if there is none, of a thing in another picture",
    "wrong-image": "the teacher's map of a thing in another picture",
    "uniform": "a constant map, which min–max normalisation turns into zeros",
    "centre": "a round blob in the picture's centre, the same for every word",
    "masks": "the thing's true mask",
}
BLOB_WIDTH = 0.2  # standard deviation of the blob, as a share of the picture's side


@dataclass(frozen=True, eq=False)
class _MappedScene:
    """A scene's words that name things, with the teacher's maps.

    Attributes:
        words: (word, name of the thing that the word belongs to).
        maps: each word's map, (rows, cols).
        thing_maps: each thing's map, (rows, cols): the mean over its words.
    """

    scene: Scene
    text: str
    words: tuple[tuple[Word, str], ...]
    maps: dict[Word, Tensor]
    thing_maps: dict[str, Tensor]


def write_target(path: Path, target: Target, store: MapStore, scenes: Sequence[Scene]) -> Path:
    """Write a map store of the words that name things, with the maps of `target`, unless it exists already.

    Every target has exactly the same words, so that the stores differ in the maps alone.

    Args:
        path: the folder of the new store.
        store: the teacher's maps of these scenes' captions.

    Raises:
        ValueError: the store has no maps of a scene.
    """
    if path.is_dir():
        return path
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    mapped = [mapped_scene for scene in scenes if (mapped_scene := _map_scene(scene, store)).words]
    with MapStore.writer(partial, dict(store.identity) | {"target": target}, {}, store.grid) as writer:
        for index, mapped_scene in enumerate(mapped):
            next_map = next(iter(mapped[(index + 1) % len(mapped)].thing_maps.values()))
            maps = torch.stack(
                [_map(target, mapped_scene, word, name, next_map, store.grid) for word, name in mapped_scene.words]
            )
            words = tuple(word for word, _ in mapped_scene.words)
            writer.add(WordMaps(image_id(mapped_scene.scene.image), mapped_scene.text, words, maps))
    partial.rename(path)
    return path


def _map_scene(scene: Scene, store: MapStore) -> _MappedScene:
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
    by_name = {mention.name: maps.map_of(mention.start, mention.end) for mention in caption.mentions}
    thing_maps = {name: heat for name, heat in by_name.items() if heat is not None}
    return _MappedScene(scene, caption.text, words, dict(zip(maps.words, maps.maps, strict=True)), thing_maps)


def _map(
    target: Target, mapped: _MappedScene, word: Word, name: str, next_map: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The target's map, (rows, cols), of a word of the thing `name`; `next_map` is of a thing in the next scene."""
    if target == "teacher":
        return mapped.maps[word]
    if target == "wrong-word":
        names = list(mapped.thing_maps)
        return mapped.thing_maps[names[(names.index(name) + 1) % len(names)]] if len(names) > 1 else next_map
    if target == "wrong-image":
        return next_map
    if target == "uniform":
        return torch.ones(grid)
    if target == "centre":
        rows, cols = ((torch.arange(count) + 0.5) / count - 0.5 for count in grid)
        return to_heat(torch.exp(-(rows[:, None] ** 2 + cols**2) / (2 * BLOB_WIDTH**2)))
    mask = torch.from_numpy(mapped.scene.mask_of(name)).float()
    return to_heat(F.adaptive_avg_pool2d(mask[None, None], grid)[0, 0])
