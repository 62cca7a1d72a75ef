"""Which noun an adjective describes, by the order of words. A parser would know more; this one is not to be wrong."""

from __future__ import annotations

from collections.abc import Sequence

from lavender.maps import Word
from lavender.words import TaggedWord, tagged_words

# Beginnings of the tagger's C5 tags
_DETERMINERS = ("AT", "DP", "DT")
_OF_A_NOUN_PHRASE = (*_DETERMINERS, "CR", "OR", "AJ", "NN", "NP", "UN")
_PREPOSITIONS = ("PR",)
_VERBS = ("VD", "VH", "VV")  # not "be", which the caller looks for
_RELATIVE = ("PNQ", "DTQ")  # who, which, that
_BEFORE_A_VERB = ("AV", "VM", "VH", "VD", "XX")  # often, can, has, did, not
_AND = "CJC"


def described_nouns(text: str) -> dict[Word, Word | None]:
    """For each adjective of a text the noun that it describes; None where the order of words does not tell.

    - Before a noun it describes that noun: in "a small, red fire truck" the truck. Between them may be other
      adjectives, with commas, "and" or "or".
    - After a form of "be" it describes the noun directly before that: in "the dog is very small and red" the dog. Not
      if a preposition or a verb governs this noun ("the dog on the mat is red", "a man riding a horse is old"), or if
      it is one of several ("a dog and a cat are red").
    - In a question it describes the noun directly before it: in "is the dog red or brown?" the dog.

    Examples:
        >>> from lavender.alignment.attributes import described_nouns
        >>> {a.text: noun and noun.text for a, noun in described_nouns("the big dog is red, on green").items()}
        {'big': 'dog', 'red': 'dog', 'green': None}
    """
    words = [word for word in tagged_words(text) if word.tag != "POS"]  # the "'s" of "dog 's"
    return {
        tagged.word: _noun_after(text, words, index) or _noun_before(words, index)
        for index, tagged in enumerate(words)
        if _is_adjective(tagged)
    }


def _is_adjective(tagged: TaggedWord) -> bool:
    return tagged.word.part_of_speech == "adjective"


def _is_noun(tagged: TaggedWord) -> bool:
    return tagged.word.part_of_speech == "noun"


def _is_be(tagged: TaggedWord) -> bool:
    return tagged.tag.startswith("VB")


def _noun_after(text: str, words: Sequence[TaggedWord], index: int) -> Word | None:
    """The noun of the phrase in which an adjective stands before its noun."""
    before = _before_adjectives(words, index)
    may_list = before < 0 or not _is_be(words[before])  # "the dog is red and small cats run"
    at, following = index, index
    while following is not None:
        at, following = following, _next_adjective(text, words, following, may_list)
    at += 1
    if not (at < len(words) and _is_noun(words[at]) and _gap(text, words, at) == ""):
        return None
    while at + 1 < len(words) and _is_noun(words[at + 1]) and not words[at].clitic and not _gap(text, words, at + 1):
        at += 1  # of a compound the last noun is the head
    return words[at].word


def _next_adjective(text: str, words: Sequence[TaggedWord], at: int, may_list: bool) -> int | None:
    """The place of the adjective that follows one, directly or, in a list, after a comma, "and" or "or"."""
    at += 1
    if may_list and at < len(words) - 1 and words[at].tag == _AND:
        at += 1
    if at >= len(words) or not _is_adjective(words[at]):
        return None
    return at if _gap(text, words, at) == "" or (may_list and _gap(text, words, at) == ",") else None


def _gap(text: str, words: Sequence[TaggedWord], at: int) -> str:
    """What stands between a word and the one before it, without white space."""
    return text[words[at - 1].word.end : words[at].word.start].strip()


def _noun_before(words: Sequence[TaggedWord], index: int) -> Word | None:
    """The subject of an adjective after a form of "be", or at the end of a question that begins with one."""
    at = _before_adjectives(words, index)
    if at < 0:
        return None
    if _is_be(words[at]):
        subject = at - 1
        if words[at].begins_clause or subject < 0 or not _is_noun(words[subject]):
            return None
        first = _phrase_start(words, subject)
        return None if _continues(words, first) else words[subject].word
    if _is_noun(words[at]):
        first = _phrase_start(words, at)
        asks = first > 0 and not words[first].begins_clause and _is_be(words[first - 1])
        if asks and (first == 1 or words[first - 1].begins_clause):
            return words[at].word
    return None


def _before_adjectives(words: Sequence[TaggedWord], index: int) -> int:
    """The place of the last word before an adjective and what it is listed with: "is" in "is very small and red"."""
    at = index
    while at >= 0 and (_is_adjective(words[at]) or words[at].tag in (_AND, "AV0")):
        if words[at].begins_clause:
            return -1
        at -= 1
    return at


def _phrase_start(words: Sequence[TaggedWord], at: int) -> int:
    """The first word of the noun phrase that ends with a noun."""
    while at > 0 and not words[at].begins_clause and words[at - 1].tag[:2] in _OF_A_NOUN_PHRASE:
        at -= 1
        if words[at].tag[:2] in _DETERMINERS:
            break
    return at


def _continues(words: Sequence[TaggedWord], first: int) -> bool:
    """Whether a noun phrase is governed by a preposition or a verb, or is joined to a noun before it."""
    if first == 0 or words[first].begins_clause:
        return False
    before = words[first - 1]
    if before.tag[:2] in _VERBS:
        return _is_inside_a_phrase(words, first - 1)
    return before.tag[:2] in _PREPOSITIONS or (before.tag == _AND and first > 1 and _is_noun(words[first - 2]))


def _is_inside_a_phrase(words: Sequence[TaggedWord], at: int) -> bool:
    """Whether a verb belongs to a noun before it, as in "riding a horse" or "who rides a horse".

    Another verb takes the whole clause after it: in "I think the dog is red" the dog is red.
    """
    if words[at].tag.endswith("G"):
        return True
    at -= 1
    while at >= 0 and words[at].tag[:2] in _BEFORE_A_VERB:
        at -= 1
    return at >= 0 and words[at].tag in _RELATIVE
