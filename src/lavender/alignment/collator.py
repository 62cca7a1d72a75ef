"""The collator: adds to a batch which rows predict which word, and the teacher's map of each word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import ProcessorMixin

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
from lavender.config import AlignmentConfig, Rows, WordTokens
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
"""Reasons why a sample that is trained on has no mapped word."""
REASONS = (NO_PICTURE, NO_MAPS, UNSEEN, BEYOND, UNKNOWN, CHANGED, NO_WORDS, UNPLACED, *REFUSALS)
"""Reasons why a sample or a word has no map, in the order of a batch's counts.

Each sample has a mapped word or one reason of `WITHOUT` or `REFUSALS`; the other reasons are of words.
"""


class MappedWord(NamedTuple):
    """A word with its map.

    Attributes:
        text: the word as written.
        rows: positions of the word's rows.
        reads: whether these rows read the word's tokens, or predict them.
        picture: index of the map's picture in the sample.
        map: the teacher's map, (rows, cols).
        weight: the word's weight in the loss.
    """

    text: str
    rows: tuple[int, ...]
    reads: bool
    picture: int
    map: Tensor
    weight: float


class WordRows(NamedTuple):
    """Rows of a word.

    Attributes:
        rows: their positions.
        reads: whether they read the word's tokens, or predict them.
    """

    rows: tuple[int, ...]
    reads: bool


def rows_of_word(predicting: tuple[int, ...], rows: Rows, tokens: WordTokens) -> list[WordRows]:
    """The rows of a word to align: one entry, or with `rows="both"` two.

    Example:
        >>> from lavender.alignment.collator import rows_of_word
        >>> [tuple(entry) for entry in rows_of_word((7, 8), "both", "first")]
        [((7,), False), ((8,), True)]

    Args:
        predicting: positions of the rows that predict the word's tokens. The next position reads the token.
        rows, tokens: the settings of `AlignmentConfig`.
    """
    predicting = predicting[:1] if tokens == "first" else predicting
    reading = tuple(row + 1 for row in predicting)
    return {
        "predict": [WordRows(predicting, False)],
        "read": [WordRows(reading, True)],
        "both": [WordRows(predicting, False), WordRows(reading, True)],
    }[rows]


class _Sample(NamedTuple):
    """A sample with its pictures loaded, the conversation as TRL renders it, and its pictures' ids and sizes (h, w)."""

    example: dict[str, Any]
    messages: list[dict]
    identities: list[str]
    sizes: list[tuple[int, int]]

    @property
    def name(self) -> str:
        """A name by which a user finds the sample, without its text."""
        pictures = [
            f"picture {identity[:12]} of {height} × {width} pixels"
            for identity, (height, width) in zip(self.identities, self.sizes, strict=True)
        ]
        return ", ".join(pictures) or "no picture"


class _BaseBatch(NamedTuple):
    """The base collator's batch, the adapter's tensors about image keys, and which token sees which picture."""

    batch: dict[str, Any]
    keys: dict[str, Tensor]
    seen: Tensor


@dataclass
class Coverage:
    """How many samples and words have maps, and why the others have none.

    Attributes:
        samples: number of samples.
        mapped_samples: number of samples with at least one mapped word.
        words: number of mapped words.
        dropped: number of samples or words for each of `REASONS`.
    """

    samples: int = 0
    mapped_samples: int = 0
    words: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of samples with at least one mapped word, among those with a picture that the model takes; 0 to 1."""
        with_picture = self.samples - sum(self.dropped[reason] for reason in (NO_PICTURE, *REFUSALS))
        return self.mapped_samples / with_picture if with_picture else 0.0

    def counts(self) -> Tensor:
        """The numbers as a tensor for a batch: long (3 + reasons,)."""
        assert set(self.dropped) <= set(REASONS)
        return torch.tensor(
            [self.samples, self.mapped_samples, self.words, *(self.dropped[reason] for reason in REASONS)]
        )

    @classmethod
    def of(cls, counts: Tensor) -> Coverage:
        """The coverage of a tensor from `counts`, or of a sum of several."""
        samples, mapped, words, *dropped = counts.tolist()
        return cls(samples, mapped, words, +Counter(dict(zip(REASONS, dropped, strict=True))))


class SeveralStores:
    """Several map stores used as one. The first store that has a picture and a text answers.

    Raises:
        DataError: the stores have maps of different sizes.
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
        records = (store.get(image_id, text) for store in self._stores)
        return next((maps for maps in records if maps is not None), None)


class AlignmentCollator:
    """Wraps the collator of plain fine-tuning: its batch is unchanged, with one more entry, `alignment`.

    `alignment` is a dict that holds:
    - the tensors of an `AlignmentRequest`, which lists their shapes;
    - `reads`: bool (sample, word), whether a word's rows read its tokens, or predict them;
    - `words`: for each sample the texts of its words, in the order of the tensors;
    - `counts`: this batch's `Coverage` as a tensor;
    - `names`: a text for each sample by which a user finds it, with content and size of its pictures;
    - `faults`: a text for each sample that was left out of the batch or of alignment.

    All of it is part of the batch, so it is correct with data loader workers, several processes and prefetching.

    The base collator gets pictures from `load_image`, so the student sees the same pixels as the teacher.

    Args:
        base: the trainer's collator, for examples with `messages` and `images` (or `image`), any number per sample.
        processor: the model's processor; its tokenizer must return character offsets.
        adapter: the adapter of the model's family.
        store: the teacher's maps. They are looked up by content: the picture's pixels and the answer's text, for each
            picture of the sample. A word with maps on several pictures counts once for each.
        config: which words to align, and their weights.

    Attributes:
        drops: whether samples that the model refuses are left out and counted, as a stream needs; if False they raise
            an error. If a whole batch is refused, the last good sample replaces it.

    Raises:
        SampleError: on a call, the model refuses a sample and `drops` is False, or no sample is left.
        StoreError: on a call, a map or confidence in the store is not finite or out of range.
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
        samples, (batch, keys, seen), refused = self._accepted(examples)
        coverage = Coverage(len(refused), dropped=Counter(error.reason for error in refused))
        faults = [error.got for error in refused]
        words_of = [
            self._mapped_words(
                sample, batch["input_ids"][index], batch["attention_mask"][index], seen[index], coverage, faults
            )
            for index, sample in enumerate(samples)
        ]
        rows = row_tensors(
            [[word.rows for word in words] for words in words_of],
            [[word.picture for word in words] for words in words_of],
        )
        rows["weights"][rows["present"]] = torch.tensor([word.weight for words in words_of for word in words])
        targets = _pad_targets([[word.map for word in words] for words in words_of], rows["present"], self._store.grid)
        reads = rows["present"].clone()
        reads[rows["present"]] = torch.tensor([word.reads for words in words_of for word in words], dtype=torch.bool)
        described = {
            "words": [[word.text for word in words] for words in words_of],
            "counts": coverage.counts(),
            "names": [sample.name for sample in samples],
            "faults": faults,
        }
        batch["alignment"] = rows | keys | {"targets": targets, "reads": reads} | described
        return batch

    def fault_of(self, example: Mapping[str, Any]) -> SampleError | None:
        """Why the model refuses a sample, after processing it in full; None if the model takes it."""
        try:
            if self.drops:
                self.screen.check(example)
            sample = self._read(example)
        except SampleError as error:
            return error
        try:
            self._base_batch([sample])
        except Exception as error:  # a processor may raise any type
            if not _is_of_a_sample(error):
                raise
            got, expected, do = line_of(error), "what the model's processor takes", "repair it, or leave the sample out"
            if isinstance(error, DataError):
                got, expected, do = error.got, error.expected, error.do
            reason = CUT if self.screen.is_long(example) else REFUSED
            return SampleError(f"{describe(example)}: {got}", expected, do, reason=reason)
        return None

    def _accepted(self, examples: Sequence[Mapping[str, Any]]) -> tuple[list[_Sample], _BaseBatch, list[SampleError]]:
        """The samples that the model takes, read and as a batch; and why the others were refused."""
        refused: list[SampleError] = []
        try:
            if self.drops:
                for example in examples:
                    self.screen.check(example)
            samples = [self._read(example) for example in examples]
            batch = self._base_batch(samples)
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
            batch = self._base_batch(samples)
        if self.drops:
            self._stand_in = examples[-1]
        return samples, batch, refused

    def _read(self, example: Mapping[str, Any]) -> _Sample:
        """Load a sample's pictures. Raises SampleError if the sample cannot be read."""
        images, name = images_of(example), describe(example)
        try:
            images = [load_image(image, f"{name}: its picture") for image in images]
        except DataError as error:
            raise SampleError(error.got, error.expected, error.do, reason=UNREADABLE) from error
        loaded = {key: value for key, value in example.items() if key != "image"} | {"images": images}
        sizes = [(image.height, image.width) for image in images]
        return _Sample(loaded, self.screen.messages(loaded, name), [image_id(image) for image in images], sizes)

    def _base_batch(self, samples: Sequence[_Sample]) -> _BaseBatch:
        batch = self._base([dict(sample.example) for sample in samples])
        keys = self._adapter.key_tensors(batch, [sample.sizes for sample in samples], self._processor)
        seen = self._adapter.seen_from(batch, KeyLayout(keys["boxes"], keys["pictures"], keys.get("views")))
        return _BaseBatch(batch, keys, seen)

    def _mapped_words(
        self,
        sample: _Sample,
        ids: Tensor,
        attention_mask: Tensor,
        seen: Tensor,
        coverage: Coverage,
        faults: list[str],
    ) -> list[MappedWord]:
        """The sample's words that have rows and a map, picture by picture. `seen` is bool (picture, token)."""
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
        answers = [(turn, maps.text, self._chosen_words(maps)) for _, turn, maps in known]
        dropped: Counter[str] = Counter()
        try:
            located = self._locator.rows_by_text(
                sample.messages, answers, ids, attention_mask, dropped, [index for index, _, _ in known]
            )
        except DataError as error:
            coverage.dropped[UNPLACED] += 1
            faults.append(f"{describe(sample.example)}: {error.got}")
            return []
        mapped: list[MappedWord] = []
        for (index, _, maps), located_words in zip(known, located, strict=True):
            places = {word.start: place for place, word in enumerate(maps.words)}
            for word, rows in located_words:
                entries = [
                    entry
                    for entry in rows_of_word(rows, self._config.rows, self._config.tokens)
                    if seen[index, list(entry.rows)].all()
                ]
                if not entries:
                    dropped[UNSEEN] += 1
                    continue
                coverage.words += 1
                heat, weight = self._target(maps, places[word.start], sample)
                mapped += [MappedWord(word.text, *entry, index, heat, weight / len(entries)) for entry in entries]
        coverage.dropped += dropped
        coverage.dropped[NO_WORDS] += int(not mapped)
        coverage.mapped_samples += bool(mapped)
        return mapped

    def _target(self, maps: WordMaps, place: int, sample: _Sample) -> tuple[Tensor, float]:
        """A word's map and weight. Raises StoreError for numbers that would make the loss meaningless."""
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

    def _chosen_words(self, maps: WordMaps) -> list[Word]:
        parts = self._config.parts_of_speech
        words = [word for word in maps.words if parts is None or word.part_of_speech in parts]
        if self._config.subjects_and_objects:
            heads = subjects_and_objects(maps.text)
            words = [word for word in words if word.start in heads]
        return words


def root_matcher(processor: ProcessorMixin) -> Callable[[list[int], list[int]], bool]:
    """A function for `match="root"`: whether predicted and true token ids spell forms of the same word."""
    return lambda predicted, true: same_root(processor.tokenizer.decode(predicted), processor.tokenizer.decode(true))


def _is_of_a_sample(error: Exception) -> bool:
    """Whether a single sample may cause the error, not memory, settings or the map store."""
    if isinstance(error, LavenderError):
        return isinstance(error, DataError)
    return not isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _pad_targets(targets: Sequence[Sequence[Tensor]], present: Tensor, grid: tuple[int, int]) -> Tensor:
    padded = torch.zeros(*present.shape, *grid)
    for sample, maps in enumerate(targets):
        for word, target in enumerate(maps):
            padded[sample, word] = target
    return padded
