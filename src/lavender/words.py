"""The words of a text: spans of characters, lemmas and parts of speech; and spans of tokens.

Offline, by HanTa (a hidden-Markov tagger). English; other languages in Latin letters are tagged as
well as an English tagger can, and text without Latin letters has no content word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from lavender.maps import Word

if TYPE_CHECKING:
    from HanTa.HanoverTagger import HanoverTagger

_WORD = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*")
_LATIN = re.compile(r"[A-Za-zÀ-ɏ]")
_CLAUSE_END = re.compile(r"[.;:!?]")
_PARTS = {"NN": "noun", "NP": "noun", "UN": "noun", "AJ": "adjective", "VV": "verb"}  # the tagger's BNC C5 tags


@lru_cache(maxsize=1)
def _tagger() -> HanoverTagger:
    from HanTa import HanoverTagger as hanta

    return hanta.HanoverTagger("morphmodel_en.pgz")


@lru_cache(maxsize=65536)
def _tagged(text: str) -> tuple[tuple[Word, str], ...]:
    """Every word of a text, in order, and its C5 tag."""
    spans = [match for match in _WORD.finditer(text) if _LATIN.search(match.group())]
    if not spans:
        return ()
    found = []
    for start in range(0, len(spans), 64):  # the tagger's cost grows with the length of a sentence
        found += _tagger().tag_sent([span.group() for span in spans[start : start + 64]])
    return tuple(
        (Word(span.group(), span.start(), span.end(), lemma.lower(), _PARTS.get(tag[:2], "other")), tag)
        for span, (_, lemma, tag) in zip(spans, found, strict=True)
    )


def words_of(text: str) -> tuple[Word, ...]:
    """Every word of a text, in order, with lemma and part of speech. Numbers and signs are not words."""
    return tuple(word for word, _ in _tagged(text))


def content_words(text: str, parts_of_speech: Sequence[str]) -> tuple[Word, ...]:
    """The words of a text that name something: those with one of the given parts of speech."""
    return tuple(word for word in words_of(text) if word.part_of_speech in parts_of_speech)


def subjects_and_objects(text: str) -> frozenset[int]:
    """Where subjects and objects of a text begin, in characters: heads of noun phrases that no preposition governs.

    An approximation by parts of speech, without a parser: a head is the last noun of a row of nouns; a preposition
    governs all nouns up to the next verb or sign that ends a clause. In "a photo of a cat" that is the photo alone.
    """
    heads: list[int] = []
    governed, noun_before, end_before = False, False, 0
    for word, tag in _tagged(text):
        if _CLAUSE_END.search(text, end_before, word.start):
            governed = noun_before = False
        is_noun = word.part_of_speech == "noun"
        if tag[:2] == "PR":
            governed = True
        elif tag[:2] in ("VB", "VD", "VH", "VM", "VV"):
            governed = False
        if is_noun and not governed:
            if noun_before:  # of a compound, the last noun is the head
                heads.pop()
            heads.append(word.start)
        noun_before, end_before = is_noun and not governed, word.end
    return frozenset(heads)


@lru_cache(maxsize=65536)
def same_root(one: str, other: str) -> bool:
    """Whether the first words of two texts are forms of one word: "dogs" and "Dog." are."""
    first, second = words_of(one)[:1], words_of(other)[:1]
    return bool(first and second) and first[0].lemma == second[0].lemma


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Positions of the tokens that overlap the characters [start, end).

    Overlap, not containment: a byte-level token such as " dog" begins before its word. Tokens of no
    characters (special tokens) overlap nothing.
    """
    return [index for index, (first, last) in enumerate(offsets) if first < end and last > start and last > first]
