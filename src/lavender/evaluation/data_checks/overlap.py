"""`lavender data overlap`: which pictures and texts of benchmarks are in a training set (the paper's §7.3, Fig. 13).

The paper judges overlap by what data sets are made of. Here it is computed: pictures by their pixels and by a
perceptual hash, texts by their words and by their word triples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavender.data.conversations import text_of
from lavender.data.recipes.sources import CAPTION_PROMPT
from lavender.data.samples import Sample, read_samples
from lavender.errors import ConfigError
from lavender.evaluation.data_checks.hashes import (
    BITS,
    PictureHash,
    Words,
    hash_picture,
    near_pictures,
    near_texts,
    sketch_texts,
    words_of_text,
)
from lavender.evaluation.data_checks.scan import extra, look_at_pictures

FEWEST_WORDS = 4
"""Texts of fewer words are not compared: "yes" is in every data set."""
COMMON_SHARE = 0.01
"""A question that more than this share of a data set's samples have, and at least two, is not compared."""
CAPTION_PROMPTS = ("Describe the image.", CAPTION_PROMPT)
"""Questions that captions get from this library. They are not compared."""
FIGURES = ("same_picture", "near_picture", "same_text", "near_text", "picture_and_text", "any")
_EXAMPLES = 20


@dataclass(frozen=True)
class Thresholds:
    """When two things are near.

    Attributes:
        distance: the most bits, of 256, in which the hashes of two pictures differ.
        similarity: the least Jaccard similarity of the word triples of two texts.

    Raises:
        ConfigError: out of range.
    """

    distance: int = 48
    similarity: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.distance < BITS // 2:
            raise ConfigError(f"--distance {self.distance}", f"0 to {BITS // 2 - 1} bits", "change --distance")
        if not 0.5 <= self.similarity <= 1:
            raise ConfigError(f"--similarity {self.similarity}", "a share from 0.5 to 1", "change --similarity")


@dataclass(frozen=True)
class Match:
    """What a training set has of one sample of a benchmark.

    Attributes:
        benchmark, train: the sample, and the training sample that is most like it.
        distance: bits in which the hashes of the most similar pictures differ; 0 with `same_picture`; None if none is
            near.
        same_picture: whether the pixels of a picture are equal.
        similarity: of the most similar text; 1 with `same_text`; None if none is near.
        same_text: whether the words of a text are equal.
        both: whether one training sample has such a picture and such a text.
    """

    benchmark: Sample
    train: Sample
    distance: int | None
    same_picture: bool
    similarity: float | None
    same_text: bool
    both: bool

    def facts(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            "benchmark": self.benchmark.name,
            "train": self.train.name,
            "picture": "same" if self.same_picture else None if self.distance is None else "near",
            "distance": self.distance,
            "text": "same" if self.same_text else None if self.similarity is None else "near",
            "similarity": None if self.similarity is None else round(self.similarity, 3),
            "picture_and_text": self.both,
        }


@dataclass(frozen=True)
class BenchmarkOverlap:
    """The overlap of one benchmark: its numbers, and its samples of which the training set has something."""

    name: str
    numbers: dict[str, Any]
    matches: list[Match]


@dataclass(frozen=True)
class Overlap:
    """The overlap of a training set with benchmarks."""

    train: str
    train_numbers: dict[str, Any]
    thresholds: Thresholds
    benchmarks: list[BenchmarkOverlap] = field(default_factory=list)

    def facts(self, examples: int | None = _EXAMPLES) -> dict[str, Any]:
        """As JSON keeps it, with this many matches per benchmark; None for all."""
        return {
            "train": {"data": self.train, **self.train_numbers},
            "thresholds": {"distance": self.thresholds.distance, "similarity": self.thresholds.similarity},
            "benchmarks": [
                {"data": one.name, **one.numbers, "matches": [match.facts() for match in one.matches[:examples]]}
                for one in self.benchmarks
            ],
        }

    def table(self) -> list[str]:
        """Lines for a terminal: of each benchmark the share of its samples that the training set has, in per cent."""
        titles = ["benchmark", "samples", *(name.replace("_", " ") for name in FIGURES)]
        rows = [
            [
                one.name,
                f"{one.numbers['samples']:,}",
                *(f"{100 * one.numbers['shares'][name]:.1f} %" for name in FIGURES),
            ]
            for one in self.benchmarks
        ]
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        return [
            "  ".join(cell.ljust(width) if not at else cell.rjust(width) for at, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in (titles, *rows))
        ]


class _Side:
    """A data set, ready to compare: its pictures' hashes and its texts' words."""

    def __init__(self, path: Path):
        read = read_samples(path)
        self.samples = read.samples
        looks, broken = look_at_pictures(self.samples, hash_picture)
        self.pictures: dict[str, PictureHash] = {}
        self.samples_of: dict[str, list[int]] = {}
        for index, look in enumerate(looks):
            for one in look or ():
                self.pictures.setdefault(one.identity, one)
                self.samples_of.setdefault(one.identity, []).append(index)
        self.pictures_of = [tuple(one.identity for one in look or ()) for look in looks]
        self.texts_of: list[list[Words]] = []
        self.samples_with: dict[Words, list[int]] = {}
        num_texts = 0
        for index, texts in enumerate(_texts(self.samples)):
            num_texts += len(texts)
            self.texts_of.append([words for words in texts if len(words) >= FEWEST_WORDS])
            for words in self.texts_of[-1]:
                self.samples_with.setdefault(words, []).append(index)
        self.sketches = sketch_texts(self.samples_with)
        self.numbers = {
            "samples": len(self.samples),
            "pictures": len(self.pictures),
            "plain_pictures": sum(one.bits is None for one in self.pictures.values()),
            "texts": sum(map(len, self.texts_of)),
            "short_texts": num_texts - sum(map(len, self.texts_of)),
            "dropped": [asdict(drop) for drop in (*read.dropped, *broken)],
        }


def find_overlap(train: Path, benchmarks: Sequence[Path], thresholds: Thresholds | None = None) -> Overlap:
    """Compare each sample of the benchmarks with all of a training set.

    Pictures are the same if their decoded pixels are, and near if their perceptual hashes (ImageHash's pHash of 16 × 16
    frequencies) differ in few bits: so resized and re-encoded pictures are found, and cropped, mirrored or turned ones
    are not. A picture without contrast has no hash. Texts are a question with its answer, in lower case and without
    punctuation. They are near by the Jaccard similarity of their word triples, which datasketch's MinHash proposes and
    which is then computed exactly.

    Args:
        train: the training data, as `read_samples` takes it.
        benchmarks: one or more data sets.
        thresholds: when two things are near.

    Returns:
        Per benchmark, in `numbers`: the counts of samples, pictures and texts; `dropped`, the rows and pictures that
        cannot be used, with the reason; `found`, the samples with a same or near picture or text, and `shares` of all
        its samples. Near excludes same.

    Raises:
        ConfigError: the extra `data` is not installed.
        DataError: nothing usable in one of the data sets.
    """
    thresholds = thresholds or Thresholds()
    for package in ("imagehash", "datasketch"):
        extra(package)
    side = _Side(train)
    overlap = Overlap(str(train), side.numbers, thresholds)
    for path in benchmarks:
        overlap.benchmarks.append(_compare(str(path), _Side(path), side, thresholds))
    return overlap


def _compare(name: str, bench: _Side, train: _Side, thresholds: Thresholds) -> BenchmarkOverlap:
    pictures = near_pictures(list(bench.pictures.values()), list(train.pictures.values()), thresholds.distance)
    texts = near_texts(bench.sketches, train.sketches, thresholds.similarity)
    matches = []
    for place, sample in enumerate(bench.samples):
        # training sample → (distance, whether pixels differ), and → (1 − similarity, whether words differ): low is near
        by_picture: dict[int, tuple[int, bool]] = {}
        for identity in bench.pictures_of[place]:
            for other, distance in pictures.get(identity, ()):
                _keep_nearest(by_picture, train.samples_of[other], (distance, other != identity))
        by_text: dict[int, tuple[float, bool]] = {}
        for words in bench.texts_of[place]:
            for found, similarity in texts.get(words, ()):
                _keep_nearest(by_text, train.samples_with[found], (1 - similarity, found != words))
        if by_picture or by_text:
            matches.append(_match(sample, train, by_picture, by_text))
    found = _found(matches)
    shares = {name: round(number / len(bench.samples), 4) for name, number in found.items()}
    return BenchmarkOverlap(name, bench.numbers | {"found": found, "shares": shares}, matches)


def _keep_nearest(nearest: dict[int, Any], places: Sequence[int], value: Any) -> None:
    for place in places:
        nearest[place] = min(nearest.get(place, value), value)


def _match(
    sample: Sample, train: _Side, by_picture: dict[int, tuple[int, bool]], by_text: dict[int, tuple[float, bool]]
) -> Match:
    both = by_picture.keys() & by_text.keys()
    best = min(
        both or by_picture.keys() or by_text.keys(),
        key=lambda place: (by_picture.get(place, (BITS, True)), by_text.get(place, (1.0, True)), place),
    )
    distance, pixels_differ = min(by_picture.values(), default=(None, True))
    dissimilarity, words_differ = min(by_text.values(), default=(None, True))
    return Match(
        benchmark=sample,
        train=train.samples[best],
        distance=distance,
        same_picture=not pixels_differ,
        similarity=None if dissimilarity is None else 1 - dissimilarity,
        same_text=not words_differ,
        both=bool(both),
    )


def _found(matches: Sequence[Match]) -> dict[str, int]:
    return {
        "same_picture": sum(one.same_picture for one in matches),
        "near_picture": sum(one.distance is not None and not one.same_picture for one in matches),
        "same_text": sum(one.same_text for one in matches),
        "near_text": sum(one.similarity is not None and not one.same_text for one in matches),
        "picture_and_text": sum(one.both for one in matches),
        "any": len(matches),
    }


def _texts(samples: Sequence[Sample]) -> Iterator[list[Words]]:
    """Of each sample, its answers with the questions right before them, without a question that many samples have."""
    numbers = Counter(question for sample in samples for question in {question for question, _ in _turns(sample)})
    most = max(1, COMMON_SHARE * len(samples))
    common = {*CAPTION_PROMPTS, *(question for question, number in numbers.items() if number > most)}
    for sample in samples:
        turns = _turns(sample)
        yield [words_of_text(answer if question in common else f"{question} {answer}") for question, answer in turns]


def _turns(sample: Sample) -> Iterator[tuple[str, str]]:
    question = ""
    for message in sample.messages:
        text = text_of(message["content"])
        if message["role"] == "user":
            question = f"{question} {text}".strip()
        elif message["role"] == "assistant":
            yield question, text
            question = ""
