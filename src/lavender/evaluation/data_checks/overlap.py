"""`lavender data overlap`: which pictures and texts of benchmarks are in a training set (the paper's §7.3, Fig. 13).

The paper judges overlap by what data sets are made of. Here it is computed: pictures by their pixels and by a
perceptual hash, texts by their words and by their word triples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from heapq import nsmallest
from pathlib import Path
from typing import Any, NamedTuple

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
NAMED = 20
"""The most training samples that a match names per kind, the nearest; it counts all."""
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


class Near(NamedTuple):
    """The picture or text of a training set that is most like one of a benchmark's sample.

    Attributes:
        sample: index of the training sample that has it.
        is_same: whether the pixels of the pictures, or the words of the texts, are equal.
        distance: bits in which the hashes of the pictures differ, or 1 − similarity of the texts.
        places: index of the picture in the benchmark's sample, and in the training sample.
    """

    sample: int
    is_same: bool
    distance: float
    places: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Match:
    """What a training set has of one sample of a benchmark.

    Attributes:
        sample: index of the benchmark's sample.
        pictures: training samples with a same or near picture, by its nearest one: the nearest sample first, at most
            `NAMED`.
        texts: the same of texts.
        both: indices of the training samples with a same or near picture and a same or near text: the nearest first,
            at most `NAMED`.
        num_pictures, num_texts, num_both: how many there are of each.
    """

    sample: int
    pictures: tuple[Near, ...]
    texts: tuple[Near, ...]
    both: tuple[int, ...]
    num_pictures: int
    num_texts: int
    num_both: int

    @property
    def picture(self) -> Near | None:
        """The nearest picture; None if none is near."""
        return next(iter(self.pictures), None)

    @property
    def text(self) -> Near | None:
        """The nearest text; None if none is near."""
        return next(iter(self.texts), None)

    def facts(self, benchmark: Side, train: Side) -> dict[str, Any]:
        """As JSON keeps it, with names of samples: the nearest, then up to `NAMED` of each kind and their number."""
        names = train.names
        pictures = [
            {"sample": names[near.sample], "picture": kind_of(near), "distance": near.distance}
            for near in self.pictures
        ]
        texts = [
            {"sample": names[near.sample], "text": kind_of(near), "similarity": round(1 - near.distance, 3)}
            for near in self.texts
        ]
        none = {"sample": None, "picture": None, "distance": None, "text": None, "similarity": None}
        picture, text = (next(iter(found), none) for found in (pictures, texts))
        return {
            "benchmark": benchmark.names[self.sample],
            "picture": picture["picture"],
            "picture_in": picture["sample"],
            "distance": picture["distance"],
            "text": text["text"],
            "text_in": text["sample"],
            "similarity": text["similarity"],
            "picture_and_text_in": names[self.both[0]] if self.both else None,
            "pictures_in": pictures,
            "texts_in": texts,
            "both_in": [names[sample] for sample in self.both],
            "num_pictures_in": self.num_pictures,
            "num_texts_in": self.num_texts,
            "num_both_in": self.num_both,
        }


def kind_of(near: Near | None) -> str | None:
    """ "same" or "near"; None without a picture or text."""
    return None if near is None else "same" if near.is_same else "near"


@dataclass(frozen=True)
class BenchmarkOverlap:
    """The overlap of one benchmark: its samples, the numbers, and what the training set has of its samples.

    `train_samples` are the indices of all training samples with a picture or a text of the benchmark, each once.
    """

    side: Side
    numbers: dict[str, Any]
    matches: list[Match]
    train_samples: list[int]


@dataclass(frozen=True)
class Overlap:
    """The overlap of a training set with benchmarks."""

    train: Side
    thresholds: Thresholds
    benchmarks: list[BenchmarkOverlap] = field(default_factory=list)

    def facts(self, examples: int | None = _EXAMPLES) -> dict[str, Any]:
        """As JSON keeps it.

        Args:
            examples: the number of matches per benchmark; None for all, and for the names of all `train_samples`.
        """
        return {
            "train": {"data": self.train.path, **self.train.numbers},
            "thresholds": {"distance": self.thresholds.distance, "similarity": self.thresholds.similarity},
            "named_per_match": NAMED,
            "benchmarks": [
                {
                    "data": one.side.path,
                    **one.numbers,
                    "num_train_samples": len(one.train_samples),
                    "matches": [match.facts(one.side, self.train) for match in one.matches[:examples]],
                    **({"train_samples": self._names(one)} if examples is None else {}),
                }
                for one in self.benchmarks
            ],
        }

    def _names(self, one: BenchmarkOverlap) -> list[str]:
        return [self.train.names[sample] for sample in one.train_samples]

    def rows(self) -> list[list[str]]:
        """Rows of a table: per benchmark the share of its samples that the training set has, in per cent."""
        head = ["benchmark", "samples", *(name.replace("_", " ") for name in FIGURES)]
        shares = [
            [one.side.path, f"{one.numbers['samples']:,}"]
            + [f"{100 * one.numbers['shares'][name]:.1f} %" for name in FIGURES]
            for one in self.benchmarks
        ]
        return [head, *shares]


class Side:
    """A data set, ready to compare: its pictures' hashes and its texts' words.

    Attributes:
        path: the data set, as given.
        samples, names: the samples and their names.
        pictures: `image_id` → hash.
        pictures_of: per sample the `image_id` of its pictures; () if one is broken.
        places: `image_id` → (index of a sample, index of the picture in it), of all samples that have it.
        turns: per sample its questions and answers.
        texts_of, samples_with, sketches: per sample the words of its texts; these words → samples, → MinHash. Filled by
            `read_texts`.
        numbers: how many samples, pictures and texts there are, and what was dropped.
    """

    def __init__(self, path: Path, columns: Mapping[str, str] | None):
        read = read_samples(path, columns=columns)
        self.path, self.samples = str(path), read.samples
        self.names = [sample.name for sample in self.samples]
        self.turns = [list(_turns(sample)) for sample in self.samples]
        looks, broken = look_at_pictures(self.samples, hash_picture)
        self.pictures: dict[str, PictureHash] = {}
        self.places: dict[str, list[tuple[int, int]]] = {}
        for index, look in enumerate(looks):
            for place, one in enumerate(look or ()):
                self.pictures.setdefault(one.identity, one)
                self.places.setdefault(one.identity, []).append((index, place))
        self.pictures_of = [tuple(one.identity for one in look or ()) for look in looks]
        self.texts_of: list[list[Words]] = []
        self.samples_with: dict[Words, list[int]] = {}
        self.sketches: dict[Words, Any] = {}
        self.numbers: dict[str, Any] = {
            "samples": len(self.samples),
            "pictures": len(self.pictures),
            "plain_pictures": sum(one.bits is None for one in self.pictures.values()),
            "texts": 0,
            "short_texts": 0,
            "dropped": [asdict(drop) for drop in (*read.dropped, *broken)],
        }

    def common_questions(self) -> set[str]:
        """The questions that many samples have."""
        numbers = Counter(question for turns in self.turns for question in {question for question, _ in turns})
        most = max(1, COMMON_SHARE * len(self.turns))
        return {question for question, number in numbers.items() if number > most}

    def read_texts(self, common: Set[str]) -> None:
        """Fill what is known of texts: answers with the questions right before them, without the common questions."""
        num_texts = 0
        for index, turns in enumerate(self.turns):
            texts = [
                words_of_text(answer if question in common else f"{question} {answer}") for question, answer in turns
            ]
            num_texts += len(texts)
            self.texts_of.append([words for words in texts if len(words) >= FEWEST_WORDS])
            for words in self.texts_of[-1]:
                self.samples_with.setdefault(words, []).append(index)
        self.sketches = sketch_texts(self.samples_with)
        compared = sum(map(len, self.texts_of))
        self.numbers |= {"texts": compared, "short_texts": num_texts - compared}


def find_overlap(
    train: Path,
    benchmarks: Sequence[Path],
    thresholds: Thresholds | None = None,
    columns: Mapping[str, str] | None = None,
    benchmark_columns: Mapping[str, str] | None = None,
) -> Overlap:
    """Compare each sample of the benchmarks with all of a training set.

    Pictures are the same if their decoded pixels are. They are near if their perceptual hashes (ImageHash's pHash of
    16 × 16 frequencies) differ in few bits, and if the colours of their thumbnails are about the same. So resized and
    re-encoded pictures are found; cropped, mirrored, turned and recoloured ones are not. A picture without contrast has
    no hash. Texts are a question with its answer, in lower case and without punctuation. They are near by the Jaccard
    similarity of their word triples, which datasketch's MinHash proposes and which is then computed exactly.

    Args:
        train: the training data, as `read_samples` takes it.
        benchmarks: one or more data sets.
        thresholds: when two things are near.
        columns: the training data's own names of columns, as `read_samples` takes them.
        benchmark_columns: those of the benchmarks.

    Returns:
        Per benchmark, in `numbers`: the counts of samples, pictures and texts; `dropped`, the rows and pictures that
        cannot be used, with the reason; `found`, the samples with a same or near picture or text, and `shares` of all
        its samples. Near excludes same.

    Raises:
        ConfigError: the extra `data` is not installed; columns that the data do not have.
        DataError: nothing usable in one of the data sets.
    """
    thresholds = thresholds or Thresholds()
    for package in ("imagehash", "datasketch"):
        extra(package)
    overlap = Overlap(Side(train, columns), thresholds)
    sides = [Side(path, benchmark_columns) for path in benchmarks]
    # of all data sets: a text must have the same words on both sides
    common = set(CAPTION_PROMPTS).union(*(side.common_questions() for side in (overlap.train, *sides)))
    for side in (overlap.train, *sides):
        side.read_texts(common)
    for side in sides:
        overlap.benchmarks.append(_compare(side, overlap.train, thresholds))
    return overlap


def _compare(bench: Side, train: Side, thresholds: Thresholds) -> BenchmarkOverlap:
    pictures = near_pictures(list(bench.pictures.values()), list(train.pictures.values()), thresholds.distance)
    texts = near_texts(bench.sketches, train.sketches, thresholds.similarity)
    matches, train_samples = [], set[int]()
    for index in range(len(bench.samples)):
        by_picture: dict[int, Near] = {}
        for place, identity in enumerate(bench.pictures_of[index]):
            for other, distance in pictures.get(identity, ()):
                for sample, its_place in train.places[other]:
                    _keep_nearest(by_picture, Near(sample, other == identity, distance, (place, its_place)))
        by_text: dict[int, Near] = {}
        for words in bench.texts_of[index]:
            for found, similarity in texts.get(words, ()):
                for sample in train.samples_with[found]:
                    _keep_nearest(by_text, Near(sample, found == words, 1 - similarity))
        if by_picture or by_text:
            matches.append(_match(index, by_picture, by_text))
            train_samples |= by_picture.keys() | by_text.keys()
    numbers = _found(matches)
    shares = {name: round(number / len(bench.samples), 4) for name, number in numbers.items()}
    return BenchmarkOverlap(bench, bench.numbers | {"found": numbers, "shares": shares}, matches, sorted(train_samples))


def _keep_nearest(nearest: dict[int, Near], near: Near) -> None:
    known = nearest.get(near.sample)
    if known is None or _order(near) < _order(known):
        nearest[near.sample] = near


def _order(near: Near) -> tuple[float, bool]:
    return near.distance, not near.is_same


def _match(index: int, by_picture: dict[int, Near], by_text: dict[int, Near]) -> Match:
    """Of equally near training samples, those that have both come first, then in the order of the data."""
    both = by_picture.keys() & by_text.keys()

    def nearest_first(of: dict[int, Near]) -> tuple[Near, ...]:
        return tuple(nsmallest(NAMED, of.values(), lambda near: (*_order(near), near.sample not in both, near.sample)))

    have_both = nsmallest(NAMED, both, lambda sample: (_order(by_picture[sample]), _order(by_text[sample]), sample))
    numbers = len(by_picture), len(by_text), len(both)
    return Match(index, nearest_first(by_picture), nearest_first(by_text), tuple(have_both), *numbers)


def _found(matches: Sequence[Match]) -> dict[str, int]:
    kinds = [(kind_of(one.picture), kind_of(one.text)) for one in matches]
    return {
        "same_picture": sum(picture == "same" for picture, _ in kinds),
        "near_picture": sum(picture == "near" for picture, _ in kinds),
        "same_text": sum(text == "same" for _, text in kinds),
        "near_text": sum(text == "near" for _, text in kinds),
        "picture_and_text": sum(bool(one.both) for one in matches),
        "any": len(matches),
    }


def _turns(sample: Sample) -> Iterator[tuple[str, str]]:
    question = ""
    for message in sample.messages:
        text = text_of(message["content"])
        if message["role"] == "user":
            question = f"{question} {text}".strip()
        elif message["role"] == "assistant":
            yield question, text
            question = ""
