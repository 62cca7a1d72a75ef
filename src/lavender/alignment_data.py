"""From examples to alignment tensors: which rows predict which word, and the teacher's map of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from lavender.errors import DataError
from lavender.images import image_id, load_image
from lavender.locate import WordLocator, text_of
from lavender.maps import Word
from lavender.store import MapStore
from lavender.vlm.base import VlmAdapter


@dataclass
class Coverage:
    """What alignment found and what it had to leave out, counted since the start."""

    samples: int = 0
    mapped_samples: int = 0
    words: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of samples with at least one mapped word."""
        return self.mapped_samples / self.samples if self.samples else 0.0


class AlignmentCollator:
    """Wraps the collator of plain fine-tuning: its batch unchanged, plus `alignment`, a dict of tensors.

    Args:
        base: the trainer's collator, for examples with `images` (or `image`) and `messages`.
        processor: the model's processor; its tokenizer must know character offsets.
        adapter: the model's family.
        store: the teacher's maps, joined by content: picture and answer.
        parts_of_speech: which words to align; None takes all that have a map.
    """

    def __init__(
        self,
        base: Callable,
        processor: ProcessorMixin,
        adapter: VlmAdapter,
        store: MapStore,
        parts_of_speech: tuple[str, ...] | None = None,
    ):
        self._base, self._processor, self._adapter, self._store = base, processor, adapter, store
        self._parts_of_speech = parts_of_speech
        self._locator = WordLocator(processor, adapter)
        self.coverage = Coverage()

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        pictures = [_picture_of(example) for example in examples]
        conversations = [_messages_of(example) for example in examples]
        batch = self._base([dict(example) for example in examples])
        words = [
            self._mapped_words(picture, messages, batch["input_ids"][index], batch["attention_mask"][index])
            for index, (picture, messages) in enumerate(zip(pictures, conversations, strict=True))
        ]
        sizes = [(picture.height, picture.width) for picture in pictures]
        keys = self._adapter.image_keys(batch)
        boxes = self._adapter.image_boxes(batch, sizes, self._processor)
        targets = [torch.stack([target for _, target in own]) if own else None for own in words]
        batch["alignment"] = row_tensors([[rows for rows, _ in own] for own in words]) | {"boxes": boxes}
        batch["alignment"] |= {"keys": keys} if keys is not None else {}
        batch["alignment"]["targets"] = _pad_targets(targets, batch["alignment"]["present"], self._store.grid)
        return batch

    def _mapped_words(
        self, picture: Image.Image, messages: list[dict], ids: Tensor, attention_mask: Tensor
    ) -> list[tuple[tuple[int, ...], Tensor]]:
        """(rows, map) of one sample's words that have both."""
        self.coverage.samples += 1
        identity, answers, map_of = image_id(picture), [], {}
        for turn, message in enumerate(messages):
            maps = self._store.get(identity, text_of(message)) if message["role"] == "assistant" else None
            if maps is not None:
                wanted = [word for word in maps.words if self._wants(word)]
                answers.append((turn, maps.text, wanted))
                map_of |= {(turn, word.start): one for word, one in zip(maps.words, maps.maps, strict=True)}
        if not answers:
            self.coverage.dropped["sample without maps in the store"] += 1
            return []
        found = []
        for turn, text, words in answers:
            located = self._locator.rows(messages, [(turn, text, words)], ids, attention_mask, self.coverage.dropped)
            found += [(rows, map_of[turn, word.start]) for word, rows in located]
        self.coverage.mapped_samples += bool(found)
        self.coverage.words += len(found)
        return found

    def _wants(self, word: Word) -> bool:
        return self._parts_of_speech is None or word.part_of_speech in self._parts_of_speech


def _picture_of(example: Mapping[str, Any]) -> Image.Image:
    images = [example["image"]] if "image" in example else example.get("images") or []
    if len(images) != 1:
        raise DataError(f"{len(images)} pictures in a sample", "exactly one", "split or drop such samples")
    return load_image(images[0], "a training picture")


def _messages_of(example: Mapping[str, Any]) -> list[dict]:
    """The conversation with its picture part, as TRL renders it."""
    if "messages" not in example:
        raise DataError(
            f"an example with the columns {sorted(example)}",
            "`images` and `messages`",
            "convert it with lavender.data.read_samples and to_dataset",
        )
    images = [example["image"]] if "image" in example else example["images"]
    return prepare_multimodal_messages(example["messages"], images=images)


def row_tensors(words: Sequence[Sequence[tuple[int, ...]]]) -> dict[str, Tensor]:
    """Pad ragged words (their row positions) to `rows`, `shares` and `present` of an AlignmentRequest."""
    num_words = max([1, *(len(own) for own in words)])
    num_rows = max([1, *(sum(len(rows) for rows in own) for own in words)])
    tensors = {
        "rows": torch.zeros(len(words), num_rows, dtype=torch.long),
        "shares": torch.zeros(len(words), num_words, num_rows),
        "present": torch.zeros(len(words), num_words, dtype=torch.bool),
    }
    for sample, own in enumerate(words):
        slot = 0
        for index, rows in enumerate(own):
            tensors["rows"][sample, slot : slot + len(rows)] = torch.tensor(rows)
            tensors["shares"][sample, index, slot : slot + len(rows)] = 1 / len(rows)
            tensors["present"][sample, index] = True
            slot += len(rows)
    return tensors


def _pad_targets(targets: Sequence[Tensor | None], present: Tensor, grid: tuple[int, int]) -> Tensor:
    padded = torch.zeros(*present.shape, *grid)
    for sample, own in enumerate(targets):
        if own is not None:
            padded[sample, : len(own)] = own
    return padded
