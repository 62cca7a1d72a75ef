"""Perceptual hashes of pictures and sketches of texts, and which of them are near to each other."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lavender.data.images import image_id
from lavender.evaluation.data_checks.scan import SIGNS, extra

BITS = 256
"""Bits of a picture's hash."""

Words = tuple[str, ...]

_SIDE = 16  # rows and columns of frequencies in a hash
_LEAST_CONTRAST = 2.0  # standard deviation of grey, of 255: below it a hash is noise
_THUMB = 4  # pixels of a side
_MOST_OF_CONTRAST = 1.0  # of the contrast of two thumbnails, by which they may differ; scaled noise needs that much
_MOST_LEVELS = 2.0  # of 255, by which they may differ in any case
_AT_ONCE = 2**20  # pairs of pictures that are compared at once
_TRIPLE = 3  # words
_PERMUTATIONS = 128
_WORD = re.compile(rf"[{SIGNS}]|[^\W{SIGNS}]+")


class PictureHash(NamedTuple):
    """What identifies a picture.

    Attributes:
        identity: its `image_id`.
        bits: its perceptual hash, uint64 (4,). None for a picture without contrast, which only its pixels identify.
        thumbnail: its colours, uint8 (4, 4, RGB). The hash sees only grey, and nothing of how bright it is.
    """

    identity: str
    bits: np.ndarray | None
    thumbnail: np.ndarray


def hash_picture(image: Image.Image) -> PictureHash:
    """The hash of a decoded RGB picture."""
    imagehash = extra("imagehash")
    thumbnail = np.asarray(image.resize((_THUMB, _THUMB), Image.Resampling.BOX))
    if np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX)).std() < _LEAST_CONTRAST:
        return PictureHash(image_id(image), None, thumbnail)
    bits = imagehash.phash(image, hash_size=_SIDE).hash
    return PictureHash(image_id(image), np.packbits(bits).view(np.uint64), thumbnail)


def near_pictures(
    pictures: Sequence[PictureHash], others: Sequence[PictureHash], distance: int
) -> dict[str, list[tuple[str, int]]]:
    """Which other pictures are near.

    Args:
        pictures: distinct ones.
        others: distinct ones, to search in.
        distance: the most bits in which two hashes differ.

    Returns:
        `image_id` of a picture → (`image_id` of another, bits that differ), of those that are near and have about the
        same colours; the nearest first. Equal pixels are at distance 0, also without contrast.
    """
    known = {one.identity for one in others}
    near = {one.identity: [(one.identity, 0)] for one in pictures if one.identity in known}
    hashed = [one for one in others if one.bits is not None]
    searched = [one for one in pictures if one.bits is not None]
    if not hashed or not searched:
        return near
    table = np.stack([one.bits for one in hashed if one.bits is not None])
    step = max(1, _AT_ONCE // len(table))
    for start in range(0, len(searched), step):
        some = searched[start : start + step]
        bits = np.stack([one.bits for one in some if one.bits is not None])
        differ = np.bitwise_count(bits[:, None] ^ table[None]).sum(axis=2, dtype=np.uint16)
        for row, column in zip(*np.nonzero(differ <= distance), strict=True):
            if some[row].identity != hashed[column].identity and _same_colours(some[row], hashed[column]):
                found = near.setdefault(some[row].identity, [])
                found.append((hashed[column].identity, int(differ[row, column])))
    return {identity: sorted(found, key=lambda one: one[1]) for identity, found in near.items()}


def _same_colours(one: PictureHash, other: PictureHash) -> bool:
    """Whether two thumbnails differ by less than their contrast: gradients and frames of any colour share a hash."""
    first, second = one.thumbnail.astype(np.float32), other.thumbnail.astype(np.float32)
    contrast = min(np.abs(colours - colours.mean((0, 1))).mean() for colours in (first, second))
    return bool(np.abs(first - second).mean() <= max(_MOST_LEVELS, _MOST_OF_CONTRAST * contrast))


def words_of_text(text: str) -> Words:
    """The words of a text in lower case, without punctuation. A Chinese or Japanese character is a word."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text.casefold())))


def sketch_texts(texts: Iterable[Words]) -> dict[Words, Any]:
    """The MinHash of each distinct text's word triples."""
    empty = extra("datasketch").MinHash(_PERMUTATIONS)
    sketches: dict[Words, Any] = {}
    for words in texts:
        if words not in sketches:
            sketches[words] = empty.copy()
            sketches[words].update_batch([" ".join(triple).encode("utf-8", "replace") for triple in _triples(words)])
    return sketches


def near_texts(
    texts: Mapping[Words, Any], others: Mapping[Words, Any], least: float
) -> dict[Words, list[tuple[Words, float]]]:
    """Which other texts are near.

    Args:
        texts: from `sketch_texts`. They are indexed, so these should be the fewer.
        others: the texts to search in.
        least: the least `similarity` that counts as near.

    Returns:
        A text → (another, similarity) of those that are near. The index proposes pairs, of which some that are just
        similar enough may be missing; their similarity is then computed exactly.
    """
    # an index for less similar texts, so that few are missed
    index = extra("datasketch").MinHashLSH(least - 0.2, _PERMUTATIONS, weights=(0.1, 0.9))
    for words, sketch in texts.items():
        index.insert(words, sketch, check_duplication=False)
    near: dict[Words, list[tuple[Words, float]]] = {}
    for other, sketch in others.items():
        for words in index.query(sketch):
            if (share := similarity(words, other)) >= least:
                near.setdefault(words, []).append((other, share))
    return near


def similarity(one: Words, other: Words) -> float:
    """The Jaccard similarity of the word triples of two texts: triples of both, as a share of those of either."""
    first, second = _triples(one), _triples(other)
    return len(first & second) / len(first | second)


def _triples(words: Words) -> set[Words]:
    """The word triples of a text; a shorter text is one."""
    return {words[start : start + _TRIPLE] for start in range(max(1, len(words) - _TRIPLE + 1))}
