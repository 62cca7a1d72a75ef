"""Map stores with the same words as the teacher's, but other maps: the controls of the teacher's maps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lavender.data.images import image_id
from lavender.data.store import MapStore
from lavender.maps import Word, WordMaps, to_heat
from lavender.world.studies.examples import Example
from lavender.world.studies.geometry import FAULTS, faulty

Target = Literal[
    "teacher",
    "wrong-word",
    "wrong-image",
    "uniform",
    "centre",
    "things",
    "masks",
    "other-mask",
    "maps",
    "reshaped",
    "stretched",
    "transposed",
]
EVERY_WORD: Target = "maps"
"""The teacher's store itself: adjectives and verbs too, each map with its confidence."""
OTHER_MASK: Target = "other-mask"
"""The true mask of another thing in the picture, also where the text names one thing alone."""
TARGETS: dict[Target, str] = {
    "teacher": "the teacher's map of the word",
    "wrong-word": "the teacher's map of another thing that the text names; if it names none, of a thing in another "
    "picture",
    "wrong-image": "the teacher's map of a thing in another picture",
    "uniform": "a constant map",
    "centre": "a round blob in the picture's centre, the same for every word",
    "things": "the true masks of all things together, so that the map does not say which one is meant",
    "masks": "the thing's true mask",
}
BLOB_WIDTH = 0.2  # standard deviation of the blob, as a share of the picture's side


@dataclass(frozen=True, eq=False)
class _MappedText:
    """The words of a text that name things, with the teacher's maps.

    Attributes:
        text: one of the example's `texts`.
        words: (word, name of the thing that the word belongs to).
        maps: each word's map, (rows, cols).
        thing_maps: each thing's map, (rows, cols): the mean over its words.
    """

    example: Example
    text: str
    words: tuple[tuple[Word, str], ...]
    maps: dict[Word, Tensor]
    thing_maps: dict[str, Tensor]


def write_target(path: Path, target: Target, store: MapStore, examples: Sequence[Example]) -> Path:
    """Write a map store of the words that name things, with the maps of `target`, unless it exists already.

    Every target has exactly the same words, so that the stores differ in the maps alone.

    Args:
        path: the folder of the new store.
        store: the teacher's maps of the texts of these samples.
        examples: the samples of fine-tuning.

    Raises:
        ValueError: the store has no maps of a scene.
    """
    if path.is_dir():
        return path
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    of_examples = [[mapped for mapped in _map_texts(example, store) if mapped.words] for example in examples]
    mapped = [mapped_texts for mapped_texts in of_examples if mapped_texts]
    with MapStore.writer(partial, dict(store.identity) | {"target": target}, {}, store.grid) as writer:
        for index, mapped_texts in enumerate(mapped):
            next_map = next(iter(mapped[(index + 1) % len(mapped)][0].thing_maps.values()))
            for mapped_text in mapped_texts:
                maps = torch.stack(
                    [_map(target, mapped_text, word, name, next_map, store.grid) for word, name in mapped_text.words]
                )
                words = tuple(word for word, _ in mapped_text.words)
                writer.add(WordMaps(image_id(mapped_text.example.scene.image), mapped_text.text, words, maps))
    partial.rename(path)
    return path


def _map_texts(example: Example, store: MapStore) -> list[_MappedText]:
    mapped = []
    for text, mentions in example.texts:
        maps = store.get(image_id(example.scene.image), text)
        if maps is None:
            raise ValueError(f"Got no maps of scene {example.scene.seed}; expected a store of these samples' texts.")
        words = tuple(
            (word, mention.name)
            for word in maps.words
            for mention in mentions
            if mention.start <= word.start < mention.end
        )
        by_name = {mention.name: maps.map_of(mention.start, mention.end) for mention in mentions}
        thing_maps = {name: heat for name, heat in by_name.items() if heat is not None}
        mapped.append(_MappedText(example, text, words, dict(zip(maps.words, maps.maps, strict=True)), thing_maps))
    return mapped


def _map(target: Target, mapped: _MappedText, word: Word, name: str, next_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """The target's map, (rows, cols), of a word of the thing `name`; `next_map` is of a thing in the next scene."""
    if target == "teacher":
        return mapped.maps[word]
    for fault in FAULTS:
        if target == fault:
            height, width = mapped.example.scene.pixels.shape[:2]
            return faulty(mapped.maps[word], (height, width), fault)
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
    scene = mapped.example.scene
    if target == OTHER_MASK:
        names = list(scene.names)
        if len(names) == 1:
            return next_map
        name = names[(names.index(name) + 1) % len(names)]
    masks = [thing.mask for thing in scene.things] if target == "things" else [scene.mask_of(name)]
    mask = torch.from_numpy(np.any(masks, axis=0)).float()
    return to_heat(F.adaptive_avg_pool2d(mask[None, None], grid)[0, 0])
