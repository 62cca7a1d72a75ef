"""`lavender look MAPS --data DATA`: the word maps of a store on their pictures, worst first.

What "worst" means depends on what there is to compare with, and the page says it:

- `pointing`, with a store of annotated masks: the map's maximum lies outside the mask; of two such, the one with less
  of its map in the mask is worse.
- `disagreement`, with another store: 1 − Pearson correlation of the two stores' maps.
- `entropy`, without one: how far the map is spread out (Eq. 23). A spread map need not be wrong, nor a sharp one right.

A text has the score of its worst word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lavender.data.images import image_id
from lavender.data.samples import Sample, read_samples
from lavender.data.store import MapStore
from lavender.errors import ConfigError, DataError
from lavender.evaluation.look.tiles import MAX_BYTES, coloured, photo_uri, place_of
from lavender.evaluation.sampling import evenly
from lavender.files import printable
from lavender.maps import Word, WordMaps, correlation, entropy

Judge = Literal["pointing", "disagreement", "entropy"]
SCORE_NAMES: dict[Judge, str] = {
    "pointing": "maxima outside the annotated mask",
    "disagreement": "disagreement with the other store",
    "entropy": "entropy of the map",
}
PHOTO_SIDE = 320
"""Longest side of a picture in a gallery, in pixels."""
MAX_TEXTS = 1000
"""The most texts of a gallery; fewer fit into a page if they have many words."""
UNSCORED = -1.0
"""Badness of a text of which no word has a score: below every score."""
_FRAME_BYTES = 60_000  # of a page without records: its style, script and notes
_RECORD_BYTES = 1_500  # of a record's own text in the page
_WORD_BYTES = 500


@dataclass(frozen=True)
class Judged:
    """A word's score. Higher is worse; `None` for a word that the other store does not have.

    Attributes:
        badness: the order of words.
        text: the score as the page shows it.
        verdict: "hit" or "miss" with masks, else "".
    """

    badness: float | None
    text: str
    verdict: str = ""


@dataclass(frozen=True, eq=False)
class Record:
    """A text of a gallery: its maps and their scores, the score by which it is in order, its picture and its sample."""

    maps: WordMaps
    judged: tuple[Judged, ...]
    badness: float
    place: int
    image: Image.Image
    name: str


def judge_of(against: MapStore | None) -> Judge:
    """What the maps of a store are judged by, from the store to compare with."""
    if against is None:
        return "entropy"
    return "pointing" if against.identity.get("teacher") == "annotations" else "disagreement"


def judge(maps: WordMaps, other: WordMaps | None, by: Judge) -> tuple[Judged, ...]:
    """The score of each word of a record.

    Args:
        maps: the record.
        other: the other store's record of the same picture and text, on any grid; None if it has none.
        by: what the words are judged by.
    """
    if by == "entropy":
        values = entropy(maps.maps)
        return tuple(Judged(value, f"entropy {value:.2f} nats") for value in values.tolist())
    known = {} if other is None else dict(zip(_spans(other), other.maps, strict=True))
    return tuple(_compared(heat, known.get(span), by) for span, heat in zip(_spans(maps), maps.maps, strict=True))


def _compared(heat: Tensor, reference: Tensor | None, by: Judge) -> Judged:
    if reference is None:
        return Judged(None, "not in the other store")
    if reference.shape != heat.shape:
        size = heat.shape[0], heat.shape[1]
        reference = F.interpolate(reference[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    if by == "disagreement":
        value = float(correlation(heat, reference))
        if math.isnan(value):
            return Judged(2.0, "a flat map, which has no correlation")
        return Judged(1 - value, f"correlation {value:.2f}")
    inside = reference >= 0.5 * reference.max()
    share = float((heat * inside).sum() / heat.sum().clamp_min(1e-30))
    is_hit = bool(inside.flatten()[heat.argmax()]) and bool(heat.max() > 0)
    verdict = "hit" if is_hit else "miss"
    return Judged(1 - share + (not is_hit), f"{verdict}, {100 * share:.0f} % of the map in the mask", verdict)


def _spans(maps: WordMaps) -> list[tuple[int, int]]:
    return [(word.start, word.end) for word in maps.words]


def _badness(judged: Iterable[Judged]) -> float:
    """Of the worst word."""
    return max((one.badness for one in judged if one.badness is not None), default=UNSCORED)


def is_word(word: Word, wanted: str) -> bool:
    """Whether a word has this form, in any case, or this lemma."""
    return wanted.lower() in (word.text.lower(), word.lemma.lower())


@dataclass(frozen=True, eq=False)
class Gallery:
    """The chosen records of a store, worst first.

    Attributes:
        records: those whose picture is in the data.
        total: number of records in the store, or of those with the wanted word.
        by: what they are judged by.
        without_picture: number of chosen records whose picture is not in the data.
        not_compared: number of words, of all `total` records, that the other store does not have.
    """

    records: list[Record]
    total: int
    by: Judge
    without_picture: int
    not_compared: int = 0


def read_gallery(
    store: MapStore,
    data: str | Path,
    limit: int = 64,
    word: str | None = None,
    against: MapStore | None = None,
    worst: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Gallery:
    """Choose records of a store, judge them, and find their pictures in the data.

    Every record is read; only pictures of samples with a chosen text are decoded.

    Args:
        store: the map store.
        data: the data that it was made of, as `read_samples` takes it.
        limit: the most records.
        word: only texts with this word, see `is_word`. They are then judged by this word alone.
        against: another store of the same texts.
        worst: choose the worst of all records, instead of records spread evenly over the store.
        columns: the data's own names of columns.

    Raises:
        ConfigError: `limit` below 1 or above `MAX_TEXTS`.
        DataError: no record has the word, the other store has none of the words, or the data have no picture of any
            chosen record.
        StoreError: a record is damaged.
    """
    if not 1 <= limit <= MAX_TEXTS:
        raise ConfigError(f"--limit {limit}", f"from 1 to {MAX_TEXTS}", "give the number of texts to show")
    by, (ranked, not_compared) = judge_of(against), _ranked(store, word, against)
    total = len(ranked)
    ranked = sorted(ranked, key=lambda entry: (-entry[0], entry[1]))[:limit] if worst else evenly(ranked, limit)
    keys = {(identity, text): (badness, place) for badness, place, identity, text in ranked}
    found = dict(_pictures(read_samples(data, columns=columns), set(keys)))
    if not found:
        raise DataError(
            f"{printable(data)}, which has the picture and text of none of {len(keys)} records of {store.path}",
            "the data that the store was made of",
            "name the data of `lavender extract`; texts and pixels must be the same",
        )
    order = sorted(found, key=lambda key: (-keys[key][0], keys[key][1]))
    records = []
    for key in order:
        maps = store.get(*key)
        assert maps is not None
        other = against.get(*key) if against is not None else None
        records.append(Record(maps, judge(maps, other, by), *keys[key], *found[key]))
    return Gallery(records, total, by, len(keys) - len(found), not_compared)


def _ranked(
    store: MapStore, word: str | None, against: MapStore | None
) -> tuple[list[tuple[float, int, str, str]], int]:
    """(badness, place in the store, image id, text) of every record with the word, and the number of words without a
    score. Raises DataError if no record has the word, or the other store has no word of these records."""
    by, ranked, num_words, not_compared = judge_of(against), [], 0, 0
    for place, maps in enumerate(store):
        words = [is_word(own, word) for own in maps.words] if word else [True] * len(maps.words)
        if word and not any(words):
            continue
        other = against.get(maps.image_id, maps.text) if against is not None else None
        judged = judge(maps, other, by)
        counted = [one for one, counts in zip(judged, words, strict=True) if counts]
        num_words += len(counted)
        not_compared += sum(one.badness is None for one in counted)
        ranked.append((_badness(counted), place, maps.image_id, maps.text))
    if not ranked:
        got = f"{store.path}, in which no text has the word {word!r}" if word else f"{store.path}, which is empty"
        raise DataError(got, "at least one text", "look for another word" if word else "extract maps into it")
    if against is not None and not_compared == num_words:
        got = f"{against.path}, which has none of the {num_words} words to compare in {store.path}"
        raise DataError(got, "another store of the same pictures and texts", "name another store with --against")
    return ranked, not_compared


def _pictures(
    samples: Iterable[Sample], wanted: set[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], tuple[Image.Image, str]]]:
    """(key, (small picture, name of the sample)) of the wanted keys (image id, text), each once."""
    wanted, texts = set(wanted), {text for _, text in wanted}
    for sample in samples:
        pairs = [(index, text) for index, text in sample.pairs_of("all") if text in texts]
        for index in dict.fromkeys(index for index, _ in pairs):
            try:
                image = sample.load_picture(index)
            except DataError:  # its record, if there is one, counts as one without a picture
                continue
            identity = image_id(image)
            for text in [text for place, text in pairs if place == index]:
                if (identity, text) in wanted:
                    wanted.discard((identity, text))
                    small = image.copy()
                    small.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
                    yield (identity, text), (small, sample.name)
        if not wanted:
            return


def gallery_page(gallery: Gallery) -> tuple[dict[str, Any], int]:
    """The parts of a page that show a gallery, and how many records are in it: as many as fit into `MAX_BYTES`."""
    views: list[dict[str, Any]] = []
    num_bytes = _FRAME_BYTES
    for record in gallery.records:
        view = _view(record)
        num_bytes += len(view["photo"]) + 3 * len(record.maps.text) + _RECORD_BYTES
        num_bytes += sum(len(word["src"]) + _WORD_BYTES for word in view["words"])
        if num_bytes > MAX_BYTES:
            break
        views.append(view)
    shown = gallery.records[: len(views)]
    places = sorted(record.place for record in shown)
    page = {
        "records": views,
        "total": gallery.total,
        "score_name": SCORE_NAMES[gallery.by],
        "data": {
            "store_order": [places.index(record.place) for record in shown],
            "num_scored": sum(record.badness != UNSCORED for record in shown),
        },
    }
    return page, len(views)


def _view(record: Record) -> dict[str, Any]:
    maps = record.maps
    words = []
    for word, heat, judged in zip(maps.words, maps.maps, record.judged, strict=True):
        place = place_of(int(heat.argmax()), maps.grid)
        words.append(
            {
                "word": word.text,
                "find": f"{word.text.lower()} {word.lemma.lower()}",
                "src": coloured(heat),
                "alt": f"Map of “{word.text}”: highest {place}",
                "score": judged.text,
                "verdict": judged.verdict,
            }
        )
    ranked = [
        (one.badness, word.text) for word, one in zip(maps.words, record.judged, strict=True) if one.badness is not None
    ]
    worst = f"worst word: {max(ranked, key=lambda pair: pair[0])[1]}" if len(ranked) > 1 else ""
    return {
        "photo": photo_uri(record.image, PHOTO_SIDE, 80),
        "ratio": round(record.image.width / record.image.height, 4),
        "text": maps.text,
        "name": record.name,
        "score": worst,
        "words": words,
    }
