"""The column `about`: which words of the answers take the map of which words of the conversation.

A data set of questions often says what an answer is about: GQA, that "red" answers for "dog" in "what color is the
dog?". The answer's word alone may have no place, but the words that it is about have one. So a row may have

    {"image": …, "messages": […], "about": [{"word": "red", "about": "dog"}]}

or, shorter, {"red": "dog"}. Nothing is guessed where the column is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from lavender.data.conversations import UnusableError, text_of
from lavender.files import JsonError, parse_json, shown

_FORM = 'a list of {"word": …, "about": …}, or an object of such words'


class About(NamedTuple):
    """An entry: a word or phrase of an answer, and the word or phrase that it is about."""

    word: str
    about: str


class Place(NamedTuple):
    """A phrase in a conversation: the index of its turn, and its characters in the turn's text, half-open."""

    turn: int
    start: int
    end: int


class Link(NamedTuple):
    """A phrase of an answer and the phrase that it is about."""

    word: Place
    about: Place


def entries_of(value: Any) -> tuple[About, ...]:
    """The entries of a cell of the column.

    Examples:
        >>> from lavender.data.about import entries_of
        >>> entries_of({"red": "dog"}) == entries_of([{"word": "red", "about": "dog"}])
        True

    Args:
        value: a list of objects, or an object, as a value or as JSON text. Arrow gives the objects of a column the
            same keys, so keys with None are left out. None is no entry.

    Raises:
        UnusableError: another form.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else None
        except JsonError as error:
            raise UnusableError(f"about is no JSON: {error}") from error
    if value is None:
        return ()
    if isinstance(value, Mapping):
        pairs = [(word, about) for word, about in value.items() if about is not None]
    elif isinstance(value, Sequence):
        pairs = [item if isinstance(item, About) else _pair(item) for item in value]
    else:
        raise UnusableError(f"about is a {type(value).__name__}, not {_FORM}")
    if wrong := [part for pair in pairs for part in pair if not isinstance(part, str) or not part.strip()]:
        raise UnusableError(f"about holds {shown(wrong[0])}, not a word or a phrase")
    return tuple(About(*pair) for pair in pairs)


def _pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, Mapping) or not {"word", "about"} <= item.keys():
        raise UnusableError(f"about holds {shown(item)}, which is not {_FORM}")
    return item["word"], item["about"]


def links_of(entries: Iterable[About], messages: Sequence[Mapping[str, Any]]) -> list[Link]:
    """Find the entries in a conversation: one link for each occurrence of a word in the answers.

    The n-th entry of a word that repeats is of its n-th occurrence; a single entry is of all. What it is about is
    looked up in the same answer, then in the user's turns before it, the nearest first. Of several occurrences in a
    text, the last one before the word counts; in the same answer, if there is none before it, the first after it.
    Upper and lower case are the same.

    Args:
        entries: from `entries_of`.
        messages: the conversation, as in `Sample`.

    Returns:
        The links, in the order of the conversation.

    Raises:
        UnusableError: a word is in no answer, or there less often than it has entries; what it is about is neither in
            its answer nor in a question before it; or two entries' words overlap.
    """
    texts = [text_of(message["content"]) for message in messages]
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    entries_of_word: dict[str, list[About]] = {}
    for entry in entries:
        entries_of_word.setdefault(" ".join(entry.word.casefold().split()), []).append(entry)
    links = []
    for same in entries_of_word.values():
        places = [place for turn in answers for place in _places(same[0].word, texts[turn], turn)]
        if len(places) < len(same):
            times = f"{len(places)} times, for {len(same)} entries" if places else "in no answer"
            raise UnusableError(f"about names {shown(same[0].word)}, which is there {times}")
        every = same * len(places) if len(same) == 1 else same
        links += [
            Link(place, _subject(entry.about, place, texts, messages))
            for place, entry in zip(places, every, strict=False)
        ]
    links.sort()
    for first, second in pairwise(links):
        if first.word.turn == second.word.turn and second.word.start < first.word.end:
            text = texts[first.word.turn]
            both = [shown(text[link.word.start : link.word.end]) for link in (first, second)]
            raise UnusableError(f"about names {both[0]} and {both[1]}, which overlap")
    return links


def _places(phrase: str, text: str, turn: int) -> list[Place]:
    """The occurrences of a phrase in a text, as whole words; any white space separates its words."""
    pattern = r"\s+".join(map(re.escape, phrase.split()))
    return [Place(turn, *match.span()) for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)]


def _subject(phrase: str, word: Place, texts: Sequence[str], messages: Sequence[Mapping[str, Any]]) -> Place:
    """Where the phrase is that a word of an answer is about. Raises UnusableError if it is nowhere."""
    same_answer = _places(phrase, texts[word.turn], word.turn)
    if before := [place for place in same_answer if place.end <= word.start]:
        return before[-1]
    if after := [place for place in same_answer if place.start >= word.end]:
        return after[0]
    for turn in reversed(range(word.turn)):
        if messages[turn]["role"] == "user" and (asked := _places(phrase, texts[turn], turn)):
            return asked[-1]
    named = shown(texts[word.turn][word.start : word.end])
    raise UnusableError(f"about says that {named} is about {shown(phrase)}, which is in no text before or around it")
