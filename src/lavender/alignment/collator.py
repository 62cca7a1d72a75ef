"""From examples to alignment tensors: which rows predict which word, and the teacher's map of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from lavender.alignment.examples import (
    CUT,
    REFUSALS,
    REFUSED,
    UNREADABLE,
    SampleError,
    Screen,
    describe,
    images_of,
    line_of,
)
from lavender.config import AlignmentConfig
from lavender.data.conversations import text_of
from lavender.data.images import image_id, load_image
from lavender.data.store import MapStore
from lavender.errors import DataError, LavenderError, StoreError
from lavender.maps import Word, WordMaps
from lavender.students.base import VlmAdapter
from lavender.students.capture import row_tensors
from lavender.students.image_keys import KeyLayout
from lavender.students.locate import BEYOND, CHANGED, UNKNOWN, UNSEEN, WordLocator
from lavender.words import same_root, subjects_and_objects

NO_PICTURE = "sample without a picture"
NO_MAPS = "sample without maps in the store"
NO_WORDS = "sample none of whose mapped words is aligned"
UNPLACED = "sample whose answer is not found in its tokens"
WITHOUT = (NO_PICTURE, NO_MAPS, NO_WORDS, UNPLACED)
"""Why a sample that is trained on has no mapped word."""
REASONS = (NO_PICTURE, NO_MAPS, UNSEEN, BEYOND, UNKNOWN, CHANGED, NO_WORDS, UNPLACED, *REFUSALS)
"""Why a sample or a word has no map; the order in which a batch carries their counts.

Every sample is mapped or has one reason of `WITHOUT` or `REFUSALS`; the others are of words.
"""


class MappedWord(NamedTuple):
    """The rows that predict a word, which of its sample's pictures it is mapped on, the map, and what it counts."""

    rows: tuple[int, ...]
    picture: int
    map: Tensor
    weight: float


class _Sample(NamedTuple):
    """A sample with its pictures loaded, the conversation as TRL renders it, and its pictures' ids and (h, w)."""

    example: dict[str, Any]
    messages: list[dict]
    identities: list[str]
    sizes: list[tuple[int, int]]

    @property
    def name(self) -> str:
        """What a person can find it by, without its text."""
        own = [
            f"picture {one[:12]} of {h} × {w} pixels" for one, (h, w) in zip(self.identities, self.sizes, strict=True)
        ]
        return ", ".join(own) or "no picture"


class _Made(NamedTuple):
    """The base collator's batch, what an adapter says of its pictures' keys, and which token sees which picture."""

    batch: dict[str, Any]
    keys: dict[str, Tensor]
    seen: Tensor


@dataclass
class Coverage:
    """What alignment found and what it had to leave out, counted."""

    samples: int = 0
    mapped_samples: int = 0
    words: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of the samples with a picture, of those that the model takes, that have at least one mapped word."""
        with_picture = self.samples - sum(self.dropped[reason] for reason in (NO_PICTURE, *REFUSALS))
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
                "maps of one size",
                "extract them with the same --grid",
            )
        self._stores, self.grid = stores, grids[0]

    def get(self, image_id: str, text: str) -> WordMaps | None:
        """The record of a picture and a text; None if no store has it."""
        found = (store.get(image_id, text) for store in self._stores)
        return next((maps for maps in found if maps is not None), None)


class AlignmentCollator:
    """Wraps the collator of plain fine-tuning: its batch unchanged, plus `alignment`.

    That is a dict: the tensors of an `AlignmentRequest`; `counts`, this batch's `Coverage` as a tensor; `names`, a text
    for each sample by which a person can find it: content and size of its pictures; and `faults`, a text for each
    sample that was left out of the batch or of alignment. All of it travels with the batch, so it is right with data
    loader workers, several processes and read-ahead.

    The base collator gets the pictures as `load_image` makes them, so the student sees the pixels that the teacher saw.

    Attributes:
        drops: whether a sample that the model refuses is left out and counted, as a stream needs, instead of an error
            that names it. Where a whole batch is refused, the last good sample stands in for it.

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
        self.screen = Screen(
            processor, adapter, getattr(base, "chat_template", None), getattr(base, "max_length", None)
        )
        self.drops = False
        self._stand_in: Mapping[str, Any] | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        samples, (batch, keys, seen), refused = self._taken(examples)
        coverage = Coverage(len(refused), dropped=Counter(error.reason for error in refused))
        faults = [error.got for error in refused]
        words = [
            self._mapped_words(
                one, batch["input_ids"][index], batch["attention_mask"][index], seen[index], coverage, faults
            )
            for index, one in enumerate(samples)
        ]
        rows = row_tensors(
            [[one.rows for one in own] for own in words], [[one.picture for one in own] for own in words]
        )
        rows["weights"][rows["present"]] = torch.tensor([one.weight for own in words for one in own])
        targets = _pad_targets([[one.map for one in own] for own in words], rows["present"], self._store.grid)
        found = {"targets": targets, "counts": coverage.counts(), "names": [one.name for one in samples]}
        batch["alignment"] = rows | keys | found | {"faults": faults}
        return batch

    def fault_of(self, example: Mapping[str, Any]) -> SampleError | None:
        """Why the model refuses a sample, tried in full; None if it takes it."""
        try:
            if self.drops:
                self.screen.check(example)
            sample = self._read(example)
        except SampleError as error:
            return error
        try:
            self._made([sample])
        except Exception as error:  # a processor may raise whatever it likes
            if not _is_of_a_sample(error):
                raise
            said = (
                (error.got, error.expected, error.do)
                if isinstance(error, DataError)
                else (
                    line_of(error),
                    "what the model's processor takes",
                    "repair it, or leave the sample out",
                )
            )
            return SampleError(
                f"{describe(example)}: {said[0]}", *said[1:], reason=CUT if self.screen.is_long(example) else REFUSED
            )
        return None

    def _taken(self, examples: Sequence[Mapping[str, Any]]) -> tuple[list[_Sample], _Made, list[SampleError]]:
        """The samples, read and as a batch, and why others were refused."""
        refused: list[SampleError] = []
        try:
            if self.drops:
                for example in examples:
                    self.screen.check(example)
            samples = [self._read(example) for example in examples]
            made = self._made(samples)
        except Exception as error:
            if not _is_of_a_sample(error):
                raise
            faults = [self.fault_of(example) for example in examples]
            refused = [fault for fault in faults if fault is not None]
            if not refused:
                raise
            examples = [example for example, fault in zip(examples, faults, strict=True) if fault is None]
            examples = examples or ([] if self._stand_in is None else [self._stand_in])
            if not self.drops or not examples:
                raise refused[0] from error
            samples = [self._read(example) for example in examples]
            made = self._made(samples)
        if self.drops:
            self._stand_in = examples[-1]
        return samples, made, refused

    def _read(self, example: Mapping[str, Any]) -> _Sample:
        """A sample with its pictures loaded. Raises SampleError if it is not one that can be read."""
        images, name = images_of(example), describe(example)
        try:
            images = [load_image(one, f"{name}: its picture") for one in images]
        except DataError as error:
            raise SampleError(error.got, error.expected, error.do, reason=UNREADABLE) from error
        own = {key: value for key, value in example.items() if key != "image"} | {"images": images}
        sizes = [(one.height, one.width) for one in images]
        return _Sample(own, self.screen.messages(own, name), [image_id(one) for one in images], sizes)

    def _made(self, samples: Sequence[_Sample]) -> _Made:
        batch = self._base([dict(one.example) for one in samples])
        keys = self._adapter.key_tensors(batch, [one.sizes for one in samples], self._processor)
        seen = self._adapter.seen_from(batch, KeyLayout(keys["boxes"], keys["pictures"], keys.get("views")))
        return _Made(batch, keys, seen)

    def _mapped_words(
        self,
        sample: _Sample,
        ids: Tensor,
        attention_mask: Tensor,
        seen: Tensor,
        coverage: Coverage,
        faults: list[str],
    ) -> list[MappedWord]:
        """One sample's words that have both rows and a map, picture by picture. `seen`: bool (picture, token)."""
        coverage.samples += 1
        if not sample.identities:
            coverage.dropped[NO_PICTURE] += 1
            return []
        texts = [text_of(message["content"]) if message["role"] == "assistant" else None for message in sample.messages]
        known = [
            (index, turn, maps)
            for index, identity in enumerate(sample.identities)
            for turn, text in enumerate(texts)
            if text is not None and (maps := self._store.get(identity, text)) is not None
        ]
        if not known:
            coverage.dropped[NO_MAPS] += 1
            return []
        answers = [(turn, maps.text, self._wanted(maps)) for _, turn, maps in known]
        dropped: Counter[str] = Counter()
        try:
            located = self._locator.rows_by_answer(
                sample.messages, answers, ids, attention_mask, dropped, [index for index, _, _ in known]
            )
        except DataError as error:
            coverage.dropped[UNPLACED] += 1
            faults.append(f"{describe(sample.example)}: {error.got}")
            return []
        found = []
        for (index, _, maps), own in zip(known, located, strict=True):
            places = {word.start: place for place, word in enumerate(maps.words)}
            for word, rows in own:
                if seen[index, list(rows)].all():
                    found.append(MappedWord(rows, index, *self._target(maps, places[word.start], sample)))
                else:
                    dropped[UNSEEN] += 1
        coverage.dropped += dropped
        coverage.dropped[NO_WORDS] += int(not found)
        coverage.mapped_samples += bool(found)
        coverage.words += len(found)
        return found

    def _target(self, maps: WordMaps, place: int, sample: _Sample) -> tuple[Tensor, float]:
        """A word's map and weight. Raises StoreError for numbers that would spoil the loss."""
        confidence = float(maps.confidence[place])
        is_sure = 0 <= confidence <= 1  # NaN is not
        if not (is_sure and maps.maps[place].isfinite().all()):
            raise StoreError(
                f"{'a map that is not finite' if is_sure else f'a confidence of {confidence}'} for "
                f"{maps.words[place].text!r} in the map store, of {describe(sample.example)}",
                "finite maps, and confidences from 0 to 1",
                "run `lavender inspect` on the store, and extract what is damaged anew",
            )
        return maps.maps[place], confidence if self._config.weight_by_confidence else 1.0

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


def _is_of_a_sample(error: Exception) -> bool:
    """Whether an error may come of one sample, and not of memory, settings or the map store."""
    if isinstance(error, LavenderError):
        return isinstance(error, DataError)
    return not isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _pad_targets(targets: Sequence[Sequence[Tensor]], present: Tensor, grid: tuple[int, int]) -> Tensor:
    padded = torch.zeros(*present.shape, *grid)
    for sample, own in enumerate(targets):
        for index, one in enumerate(own):
            padded[sample, index] = one
    return padded
