"""The collator: adds to a batch which rows predict which word, and the teacher's map of each word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import ProcessorMixin

from lavender.alignment.augment import DRAW, Augment, View
from lavender.alignment.coverage import CROPPED, NO_MAPS, NO_PICTURE, NO_WORDS, OUTSIDE, UNPLACED, Coverage
from lavender.alignment.examples import (
    CUT,
    REFUSED,
    UNREADABLE,
    SampleError,
    Screen,
    describe,
    images_of,
    line_of,
    links_in,
)
from lavender.alignment.losses import prepared
from lavender.alignment.word_targets import Target, WordTargets, rows_of_word
from lavender.config import AlignmentConfig
from lavender.data.about import Link
from lavender.data.images import image_id, load_image
from lavender.data.store import MapStore, SeveralStores
from lavender.errors import DataError, LavenderError
from lavender.students.base import VlmAdapter
from lavender.students.capture import row_tensors
from lavender.students.image_keys import KeyLayout, seen_cells
from lavender.students.locate import UNSEEN, WordLocator
from lavender.words import same_root


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


class _Sample(NamedTuple):
    """A sample that was read.

    Attributes:
        example: for the base collator, with the pictures loaded.
        messages: the conversation as TRL renders it.
        identities: the `image_id` of each whole picture.
        sizes: (height, width) of each picture as the student gets it.
        links: the words of the answers that are about others.
        views: what `Augment` made of each picture; () without it.
    """

    example: dict[str, Any]
    messages: list[dict]
    identities: list[str]
    sizes: list[tuple[int, int]]
    links: list[Link]
    views: Sequence[View]

    @property
    def name(self) -> str:
        """A name by which a user finds the sample, without its text."""
        sizes = [view.whole for view in self.views] or self.sizes  # those of the files
        pictures = [
            f"picture {identity[:12]} of {height} × {width} pixels"
            for identity, (height, width) in zip(self.identities, sizes, strict=True)
        ]
        return ", ".join(pictures) or "no picture"


class _Sight(NamedTuple):
    """What a sample's tokens see.

    Attributes:
        pictures: bool (picture, token), whether a token sees a picture.
        cells: for each picture, bool (rows, cols): whether some image key shows a part of the cell.
    """

    pictures: Tensor
    cells: list[Tensor]


class _BaseBatch(NamedTuple):
    """The base collator's batch, the adapter's tensors about image keys, and what each sample sees."""

    batch: dict[str, Any]
    keys: dict[str, Tensor]
    sights: list[_Sight]


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
            Examples may also have `about`, see `lavender.data.about`; the base collator does not get it.
        processor: the model's processor; its tokenizer must return character offsets.
        adapter: the adapter of the model's family.
        store: the teacher's maps. They are looked up by content: the picture's pixels and the turn's text, for each
            picture of the sample. A word with maps on several pictures counts once for each.
        config: which words to align, in which rows, and their weights.

    Attributes:
        drops: whether samples that the model refuses are left out and counted, as a stream needs; if False they raise
            an error. If a whole batch is refused, the last good sample replaces it.
        augment: changes pictures and their maps; None for whole pictures. Samples that the model refuses are then left
            out as with `drops`: `max_length` may cut a picture that has more tokens than the whole one.

    Raises:
        ConfigError: the map store was made without maps of the turns that are to be aligned.
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
        self._base, self._processor, self._adapter, self._grid = base, processor, adapter, store.grid
        self._config = config or AlignmentConfig()
        self._targets = WordTargets(store, self._config)
        template = getattr(base, "chat_template", None)  # TRL's own of some families, which marks the answers
        self._locator = WordLocator(processor, adapter, template)
        self.screen = Screen(processor, adapter, template, getattr(base, "max_length", None))
        self.drops = False
        self.augment: Augment | None = None
        self._stand_in: Mapping[str, Any] | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        samples, (batch, keys, sights), refused = self._accepted(examples)
        coverage = Coverage(len(refused), dropped=Counter(error.reason for error in refused))
        faults = [error.got for error in refused]
        words_of, counts = [], [coverage.counts()]
        for sample, ids, mask, sight in zip(samples, batch["input_ids"], batch["attention_mask"], sights, strict=True):
            words_of.append(self._mapped_words(sample, ids, mask, sight, coverage, faults))
            counts.append(coverage.counts())
        rows = row_tensors(
            [[word.rows for word in words] for words in words_of],
            [[word.picture for word in words] for words in words_of],
        )
        rows["weights"][rows["present"]] = torch.tensor([word.weight for words in words_of for word in words])
        targets = _pad_targets([[word.map for word in words] for words in words_of], rows["present"], self._grid)
        reads = rows["present"].clone()
        reads[rows["present"]] = torch.tensor([word.reads for words in words_of for word in words], dtype=torch.bool)
        described = {
            "words": [[word.text for word in words] for words in words_of],
            "counts": counts[-1],
            "sample_counts": torch.stack(counts).diff(dim=0),  # (sample, …)
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
            if not (self.drops or self.augment) or not examples:
                raise refused[0] from error
            samples = [self._read(example) for example in examples]
            batch = self._base_batch(samples)
        if self.drops or self.augment:
            self._stand_in = examples[-1]
        return samples, batch, refused

    def _read(self, example: Mapping[str, Any]) -> _Sample:
        """Load a sample's pictures. Raises SampleError if the sample cannot be read."""
        images, name = images_of(example), describe(example)
        try:
            images = [load_image(image, f"{name}: its picture") for image in images]
        except DataError as error:
            raise SampleError(error.got, error.expected, error.do, reason=UNREADABLE) from error
        identities, views = [image_id(image) for image in images], ()
        kept = {key: value for key, value in example.items() if key not in ("image", "about", DRAW)}
        messages = self.screen.messages(loaded := kept | {"images": images}, name)
        if self.augment is not None:
            views = self.augment.views(images, identities, messages, example.get(DRAW))
            images = [view.picture(image) for view, image in zip(views, images, strict=True)]
            messages = self.screen.messages(loaded := kept | {"images": images}, name)
        links = links_in(example, messages, name)
        sizes = [(image.height, image.width) for image in images]
        return _Sample(loaded, messages, identities, sizes, links, views)

    def _base_batch(self, samples: Sequence[_Sample]) -> _BaseBatch:
        batch = self._base([dict(sample.example) for sample in samples])
        keys = self._adapter.key_tensors(batch, [sample.sizes for sample in samples], self._processor)
        layout = KeyLayout(keys["boxes"], keys["pictures"], keys.get("views"))
        sights = [
            _Sight(seen, [seen_cells(layout, index, picture, self._grid) for picture in range(len(sample.sizes))])
            for index, (sample, seen) in enumerate(zip(samples, self._adapter.seen_from(batch, layout), strict=True))
        ]
        return _BaseBatch(batch, keys, sights)

    def _mapped_words(
        self,
        sample: _Sample,
        ids: Tensor,
        attention_mask: Tensor,
        sight: _Sight,
        coverage: Coverage,
        faults: list[str],
    ) -> list[MappedWord]:
        """The sample's words that have rows and a map, picture by picture."""
        coverage.samples += 1
        if not sample.identities:
            coverage.dropped[NO_PICTURE] += 1
            return []
        dropped: Counter[str] = Counter()
        turns = self._targets.of(sample.example, sample.messages, sample.identities, sample.links, dropped)
        if turns is None:
            coverage.dropped += dropped + Counter({NO_MAPS: 1})
            return []
        try:
            located = self._locator.rows_by_text(
                sample.messages,
                [(turn, text, [target.word for target in targets]) for _, turn, text, targets in turns],
                ids,
                attention_mask,
                dropped,
                [turn.picture for turn in turns],
            )
        except DataError as error:
            coverage.dropped[UNPLACED] += 1
            faults.append(f"{describe(sample.example)}: {error.got}")
            return []
        mapped: list[MappedWord] = []
        for (picture, turn, _, targets), located_words in zip(turns, located, strict=True):
            if sample.views:
                targets = _in_view(targets, sample.views[picture])
            target_of = {target.word.start: target for target in targets}
            which = "read" if sample.messages[turn]["role"] == "user" else self._config.rows
            sees, shown_of = sight.pictures[picture].tolist(), self._shown(targets, sight.cells[picture])
            for word, rows in located_words:
                if word.start not in target_of:
                    dropped[CROPPED] += 1
                    continue
                _, heat, confidence = target_of[word.start]
                entries = [
                    entry
                    for entry in rows_of_word(rows, which, self._config.tokens)
                    if all(sees[row] for row in entry.rows)
                ]
                if not entries or not shown_of[word.start]:
                    dropped[OUTSIDE if entries else UNSEEN] += 1
                    continue
                coverage.words += 1
                weight = (confidence if self._config.weight_by_confidence else 1.0) / len(entries)
                mapped += [MappedWord(word.text, *entry, picture, heat, weight) for entry in entries]
        coverage.dropped += dropped
        coverage.dropped[NO_WORDS] += int(not mapped)
        coverage.mapped_samples += bool(mapped)
        return mapped

    def _shown(self, targets: Sequence[Target], cells: Tensor) -> dict[int, bool]:
        """Whether each word's map has heat in the cells that some image key shows, by the word's first character."""
        if not targets:
            return {}
        maps = torch.stack([target.map for target in targets])
        heat = prepared(maps, subtract_background=self._config.subtract_background)
        shown = heat[:, cells].any(dim=-1).tolist()
        return {target.word.start: is_shown for target, is_shown in zip(targets, shown, strict=True)}


def _in_view(targets: Sequence[Target], view: View) -> list[Target]:
    """The targets that the view shows, with their maps of it."""
    return [target._replace(map=view.map(target.map)) for target in targets if view.shows(target.map)]


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
