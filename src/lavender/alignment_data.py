"""From examples to alignment tensors: which rows predict which word, and the teacher's map of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from lavender.config import AlignmentConfig
from lavender.errors import DataError
from lavender.grids import KeyLayout
from lavender.images import image_id, load_image
from lavender.locate import BEYOND, CHANGED, UNKNOWN, UNSEEN, WordLocator, text_of
from lavender.maps import Word, WordMaps
from lavender.store import MapStore
from lavender.vlm.base import VlmAdapter
from lavender.words import same_root, subjects_and_objects

NO_PICTURE = "sample without a picture"
NO_MAPS = "sample without maps in the store"
REASONS = (NO_PICTURE, NO_MAPS, UNSEEN, BEYOND, UNKNOWN, CHANGED)
"""Why a sample or a word has no map; the order in which a batch carries their counts."""


class MappedWord(NamedTuple):
    """The rows that predict a word, which of its sample's pictures it is mapped on, the map, and what it counts."""

    rows: tuple[int, ...]
    picture: int
    map: Tensor
    weight: float


@dataclass
class Coverage:
    """What alignment found and what it had to leave out, counted."""

    samples: int = 0
    mapped_samples: int = 0
    words: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of the samples with a picture that have at least one mapped word."""
        with_picture = self.samples - self.dropped[NO_PICTURE]
        return self.mapped_samples / with_picture if with_picture else 0.0

    def counts(self) -> Tensor:
        """The numbers alone, long (3 + reasons,), as they travel in a batch."""
        assert set(self.dropped) <= set(REASONS)
        return torch.tensor(
            [self.samples, self.mapped_samples, self.words, *(self.dropped[reason] for reason in REASONS)]
        )

    @classmethod
    def of(cls, counts: Tensor) -> Coverage:
        """What `counts`, or a sum of several, says."""
        samples, mapped, words, *dropped = counts.tolist()
        return cls(samples, mapped, words, +Counter(dict(zip(REASONS, dropped, strict=True))))


class SeveralStores:
    """Map stores asked in their order, as one: the first that knows a picture and a text answers.

    Raises:
        DataError: their maps differ in size.
    """

    def __init__(self, *stores: MapStore):
        grids = [store.grid for store in stores]
        if len(set(grids)) != 1:
            raise DataError(
                f"map stores with maps of {' and '.join(f'{rows} × {cols}' for rows, cols in grids)}",
                "maps of one size", "extract them with the same --grid",
            )  # fmt: skip
        self._stores, self.grid = stores, grids[0]

    def get(self, image_id: str, text: str) -> WordMaps | None:
        """The record of a picture and a text; None if no store has it."""
        found = (store.get(image_id, text) for store in self._stores)
        return next((maps for maps in found if maps is not None), None)


class AlignmentCollator:
    """Wraps the collator of plain fine-tuning: its batch unchanged, plus `alignment`.

    That is a dict: the tensors of an `AlignmentRequest`; `counts`, this batch's `Coverage` as a tensor; and `names`,
    a text for each sample by which a person can find it: content and size of its pictures. All of it travels with the
    batch, so it is right with data loader workers, several processes and read-ahead. The collator keeps no state.

    Args:
        base: the trainer's collator, for examples with `messages` and `images` (or `image`): none, one or several.
        processor: the model's processor; its tokenizer must know character offsets.
        adapter: the model's family.
        store: the teacher's maps, joined by content: picture and answer. An answer's words are looked up for each of
            its sample's pictures; a word with maps of several counts once for each.
        config: which words to align, and what they weigh.
    """

    def __init__(
        self,
        base: Callable,
        processor: ProcessorMixin,
        adapter: VlmAdapter,
        store: MapStore | SeveralStores,
        config: AlignmentConfig | None = None,
    ):
        self._base, self._processor, self._adapter, self._store = base, processor, adapter, store
        self._config = config or AlignmentConfig()
        self._locator = WordLocator(processor, adapter)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [dict(example) | {"images": images_of(example)} for example in examples]
        for example in examples:
            example.pop("image", None)
        pictures = [[load_image(one, "a training picture") for one in example["images"]] for example in examples]
        conversations = [_messages_of(example) for example in examples]
        batch = self._base([dict(example) for example in examples])
        sizes = [[(picture.height, picture.width) for picture in own] for own in pictures]
        keys = self._adapter.key_tensors(batch, sizes, self._processor)
        seen = self._adapter.seen_from(batch, KeyLayout(keys["boxes"], keys["pictures"], keys.get("views")))
        identities = [[image_id(picture) for picture in own] for own in pictures]
        coverage = Coverage()
        words = [
            self._mapped_words(
                own, messages, batch["input_ids"][index], batch["attention_mask"][index], seen[index], coverage
            )
            for index, (own, messages) in enumerate(zip(identities, conversations, strict=True))
        ]
        rows = row_tensors(
            [[one.rows for one in own] for own in words], [[one.picture for one in own] for own in words]
        )
        rows["weights"][rows["present"]] = torch.tensor([one.weight for own in words for one in own])
        targets = _pad_targets([[one.map for one in own] for own in words], rows["present"], self._store.grid)
        names = [_name(*one) for one in zip(identities, sizes, strict=True)]
        batch["alignment"] = rows | keys | {"targets": targets, "counts": coverage.counts(), "names": names}
        return batch

    def _mapped_words(
        self,
        identities: list[str],
        messages: list[dict],
        ids: Tensor,
        attention_mask: Tensor,
        seen: Tensor,
        coverage: Coverage,
    ) -> list[MappedWord]:
        """One sample's words that have both rows and a map, picture by picture. `seen`: bool (picture, token)."""
        coverage.samples += 1
        if not identities:
            coverage.dropped[NO_PICTURE] += 1
            return []
        texts = [text_of(message) if message["role"] == "assistant" else None for message in messages]
        known = [
            (index, turn, maps)
            for index, identity in enumerate(identities)
            for turn, text in enumerate(texts)
            if text is not None and (maps := self._store.get(identity, text)) is not None
        ]
        if not known:
            coverage.dropped[NO_MAPS] += 1
            return []
        answers = [(turn, maps.text, self._wanted(maps)) for _, turn, maps in known]
        located = self._locator.rows_by_answer(
            messages, answers, ids, attention_mask, coverage.dropped, [index for index, _, _ in known]
        )
        found = []
        for (index, _, maps), own in zip(known, located, strict=True):
            places = {word.start: place for place, word in enumerate(maps.words)}
            for word, rows in own:
                if seen[index, list(rows)].all():
                    place = places[word.start]
                    weight = float(maps.confidence[place]) if self._config.weight_by_confidence else 1.0
                    found.append(MappedWord(rows, index, maps.maps[place], weight))
                else:
                    coverage.dropped[UNSEEN] += 1
        coverage.mapped_samples += bool(found)
        coverage.words += len(found)
        return found

    def _wanted(self, maps: WordMaps) -> list[Word]:
        parts = self._config.parts_of_speech
        words = [word for word in maps.words if parts is None or word.part_of_speech in parts]
        if self._config.subjects_and_objects:
            heads = subjects_and_objects(maps.text)
            words = [word for word in words if word.start in heads]
        return words


def root_matcher(processor: ProcessorMixin) -> Callable[[list[int], list[int]], bool]:
    """For `match="root"`: whether predicted tokens and true ones spell forms of one word."""
    return lambda predicted, true: same_root(processor.tokenizer.decode(predicted), processor.tokenizer.decode(true))


def word_text(tokenizer: PreTrainedTokenizerBase, ids: Tensor, alignment: Mapping[str, Any], word: int) -> str:
    """A mapped word as the batch spells it. `ids` (token,) and `alignment` are one sample's."""
    rows = alignment["rows"][alignment["shares"][word] > 0]
    return str(tokenizer.decode(ids[rows + 1])).strip()


def _name(identities: list[str], sizes: list[tuple[int, int]]) -> str:
    own = [f"picture {one[:12]} of {h} × {w} pixels" for one, (h, w) in zip(identities, sizes, strict=True)]
    return ", ".join(own) or "no picture"


def images_of(example: Mapping[str, Any]) -> list[Any]:
    """A sample's pictures as they came; [] where there are none."""
    images = [example["image"]] if "image" in example else example.get("images") or []
    return [one for one in images if one is not None]


def _messages_of(example: Mapping[str, Any]) -> list[dict]:
    """The conversation with its picture parts, as TRL renders it."""
    if "messages" not in example:
        raise DataError(
            f"an example with the columns {sorted(example)}",
            "`images` and `messages`",
            "convert it with lavender.data.read_samples and to_dataset",
        )
    try:
        return prepare_multimodal_messages(example["messages"], images=example["images"])
    except ValueError as error:
        places = sum(part["type"] == "image" for one in example["messages"] for part in _parts(one))
        if places == len(example["images"]):
            raise
        raise DataError(
            f"messages with {places} place{'' if places == 1 else 's'} for a picture, and "
            f"{len(example['images'])} pictures",
            "a place for each picture",
            "put a part {'type': 'image'} where each picture belongs, or leave the content plain text",
        ) from error


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [] if content is None or isinstance(content, str) else list(content)


def row_tensors(
    words: Sequence[Sequence[tuple[int, ...]]], pictures: Sequence[Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """Pad ragged words (their row positions) to `rows`, `shares`, `present`, `weights`, `word_pictures` of a request.

    A row that several words share is there once. Each word weighs 1. `pictures`: the index of each word's picture
    within its sample; None where all words are of the first.
    """
    every = [list(dict.fromkeys(position for rows in own for position in rows)) for own in words]
    num_words, num_rows = max([1, *map(len, words)]), max([1, *map(len, every)])
    tensors = {
        "rows": torch.zeros(len(words), num_rows, dtype=torch.long),
        "shares": torch.zeros(len(words), num_words, num_rows),
        "present": torch.zeros(len(words), num_words, dtype=torch.bool),
        "word_pictures": torch.zeros(len(words), num_words, dtype=torch.long),
    }
    for sample, (own, positions) in enumerate(zip(words, every, strict=True)):
        tensors["rows"][sample, : len(positions)] = torch.tensor(positions, dtype=torch.long)
        tensors["present"][sample, : len(own)] = True
        for index, rows in enumerate(own):
            tensors["shares"][sample, index, [positions.index(position) for position in rows]] = 1 / len(rows)
            if pictures is not None:
                tensors["word_pictures"][sample, index] = pictures[sample][index]
    return tensors | {"weights": tensors["present"].float()}


def _pad_targets(targets: Sequence[Sequence[Tensor]], present: Tensor, grid: tuple[int, int]) -> Tensor:
    padded = torch.zeros(*present.shape, *grid)
    for sample, own in enumerate(targets):
        for index, one in enumerate(own):
            padded[sample, index] = one
    return padded
