"""The words of a text: spans of characters, lemmas and parts of speech; and spans of tokens.

Offline, by HanTa (a hidden-Markov tagger). English; other languages in Latin letters are tagged as
well as an English tagger can, and text without Latin letters has no content word. What is read as one
word, and what is none, is settled by `lavender.words`; spans and texts of words are those of
the text as written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from lavender.maps import Dropped, Word

if TYPE_CHECKING:
    from HanTa.HanoverTagger import HanoverTagger
import html
import unicodedata

LONGEST = 64  # characters of a word: the tagger's cost grows with their square
_CACHED = 500  # characters: longer texts are tagged anew each time, so that the cache stays small
_WORD = re.compile(r"[^\W\d_]+(?:['\-][^\W\d_]+)*")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_CLAUSE_END = re.compile(r"[.;:!?]")
_PARTS = {"NN": "noun", "NP": "noun", "UN": "noun", "AJ": "adjective", "VV": "verb"}  # the tagger's BNC C5 tags
_VERBS = ("VB", "VD", "VH", "VM", "VV")

# The tagger has learned "is" and "n't", "dog" and "'s" as words of their own. So are some texts written: "dog 's".
_CONTRACTION = re.compile(r"(.*?)(n't|'(?:s|m|d|re|ve|ll))", re.IGNORECASE)
_CLITIC = re.compile(r"(?:s|m|d|re|ve|ll|t)(?![\w'])", re.IGNORECASE)
_NAMELESS = re.compile(  # what the tagger may take for a noun before "'s" or "'ll"
    r"(?:any|every|no|some)(?:body|one|thing)|each|else|he|here|how|i|it|let|one|other|she|th(?:at|ere|ese|ey|is|ose)|we"
    r"|wh(?:at|en|ere|ich|o|y)|you",
    re.IGNORECASE,
)
_WITHOUT_APOSTROPHE = re.compile(
    r"(ai|are|ca|could|did|do|does|had|has|have|is|must|need|should|was|were|wo|would)(nt)|(can)(not)"
    r"|(he|here|she|that|there|what|where|who)(s)|(i)(m)|(they|you)(re)|(i|they|we|you)(ve)|(it|that|they|you)(ll)"
    r"|(gon|wan)(na)|(got)(ta)|(y')(all)|(c')(mon)",
    re.IGNORECASE,
)
_APART = {"nt": "n't", "s": "'s", "m": "'m", "re": "'re", "ve": "'ve", "ll": "'ll"}


@lru_cache(maxsize=1)
def _tagger() -> HanoverTagger:
    from HanTa import HanoverTagger as hanta

    return hanta.HanoverTagger("morphmodel_en.pgz")


class _Tagged(NamedTuple):
    """A word, its C5 tag, that of its clitic ("" without one), and whether a clause ended before it."""

    word: Word
    tag: str
    clitic: str
    begins_clause: bool


def _tagged(text: str) -> tuple[_Tagged, ...]:
    """Every word of a text, in order."""
    return _remembered(text) if len(text) <= _CACHED else _tag(text)


def _tag(text: str) -> tuple[_Tagged, ...]:
    read = plain(text)
    spans = [span for span in _spans(read.text) if span.end() - span.start() <= LONGEST]
    pieces = [_pieces(read.text, span) for span in spans]
    found: list[tuple[str, str, str]] = []
    for start in range(0, len(spans), 64):  # the tagger's cost grows with the length of a sentence
        found += _tagger().tag_sent([piece for own in pieces[start : start + 64] for piece in own])
    tagged, at, end_before = [], 0, 0
    for span, own in zip(spans, pieces, strict=True):
        _, lemma, tag = found[at]
        clitic = found[at + 1][2] if len(own) > 1 else ""
        start, end = read.written(*span.span())
        word = Word(text[start:end], start, end, lemma.lower(), _part_of_speech(own, tag))
        begins = _CLAUSE_END.search(read.text, end_before, span.start()) is not None
        tagged.append(_Tagged(word, tag, clitic, begins))
        at, end_before = at + len(own), span.end()
    return tuple(tagged)


_remembered = lru_cache(maxsize=1024)(_tag)


def _spans(read: str) -> Iterator[re.Match[str]]:
    """Runs of letters of a plain text, some of them Latin."""
    return (match for match in _WORD.finditer(read) if _LATIN.search(match.group()))


def _pieces(read: str, span: re.Match[str]) -> tuple[str, ...]:
    """A word as the tagger takes it: its clitic apart."""
    word = span.group()
    if found := _CONTRACTION.fullmatch(word) or _WITHOUT_APOSTROPHE.fullmatch(word):
        base, clitic = (piece for piece in found.groups() if piece is not None)
        clitic = clitic.lower()
        return (base, _APART.get(clitic, clitic)) if base else (clitic,)
    start = span.start()
    stands_alone = read[start - 1 : start] == "'" and (start == 1 or read[start - 2].isspace())
    return (f"'{word.lower()}",) if stands_alone and _CLITIC.match(read, start) else (word,)


def _part_of_speech(pieces: tuple[str, ...], tag: str) -> str:
    part = _PARTS.get(tag[:2], "other")
    if len(pieces) > 1:  # "dog's" names a dog; "isn't", "let's" and "there's" name nothing
        is_named = part == "noun" and pieces[1].startswith("'") and not _NAMELESS.fullmatch(pieces[0])
        return "noun" if is_named else "other"
    return "other" if pieces[0].startswith(("'", "n't")) else part


def words_of(text: str) -> tuple[Word, ...]:
    """Every word of a text, in order, with lemma and part of speech. Numbers and signs are not words.

    A possessive is one word, with the lemma of its noun: "dog's" is of "dog". A contraction such as "isn't" is one word
    and no content word. A word of more than `LONGEST` characters is left out, see `too_long`.
    """
    return tuple(one.word for one in _tagged(text))


def too_long(text: str) -> tuple[Dropped, ...]:
    """The words that `words_of` leaves out, as runs of letters of such a length are not words of a language."""
    return tuple(
        Dropped(f"{span.group()[:20]}…", f"a word of more than {LONGEST} characters")
        for span in _spans(plain(text).text)
        if span.end() - span.start() > LONGEST
    )


def content_words(text: str, parts_of_speech: Sequence[str]) -> tuple[Word, ...]:
    """The words of a text that name something: those with one of the given parts of speech."""
    return tuple(word for word in words_of(text) if word.part_of_speech in parts_of_speech)


def subjects_and_objects(text: str) -> frozenset[int]:
    """Where subjects and objects of a text begin, in characters: heads of noun phrases that no preposition governs.

    An approximation by parts of speech, without a parser: a head is the last noun of a row of nouns; a preposition
    governs all nouns up to the next verb or sign that ends a clause. In "a photo of a cat" that is the photo alone.
    """
    heads: list[int] = []
    governed = noun_before = False
    for word, tag, clitic, begins_clause in _tagged(text):
        if begins_clause:
            governed = noun_before = False
        if tag == "POS":  # the "'s" of "dog 's", apart from its noun
            continue
        is_noun = word.part_of_speech == "noun"
        if tag[:2] == "PR":
            governed = True
        elif tag[:2] in _VERBS:
            governed = False
        if is_noun and not governed:
            if noun_before:  # of a compound, the last noun is the head
                heads.pop()
            heads.append(word.start)
        noun_before = is_noun and not governed
        if clitic[:2] in _VERBS:  # "there's a dog"
            governed = noun_before = False
    return frozenset(heads)


def same_root(one: str, other: str) -> bool:
    """Whether the first words of two texts are forms of one word: "dogs" and "Dog." are."""
    first, second = (_remembered_root(text) if len(text) <= _CACHED else _root(text) for text in (one, other))
    return first is not None and first == second


def _root(text: str) -> str | None:
    """The lemma of a text's first word."""
    first = next(iter(_tag(text)), None)
    return first.word.lemma if first else None


_remembered_root = lru_cache(maxsize=16384)(_root)  # apart from captions, which what models predict would crowd out


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Positions of the tokens that overlap the characters [start, end).

    Overlap, not containment: a byte-level token such as " dog" begins before its word. Tokens of no
    characters (special tokens) overlap nothing.
    """
    return [index for index, (first, last) in enumerate(offsets) if first < end and last > start and last > first]


GAP = "\ufffc"  # stands for letters that are no word, or of a script that does not set spaces
_APOSTROPHES = "\u2018\u2019\u201b\u02bc\u02b9\u2032\uff07\u00b4`"
_HYPHENS = "\u2010\u2011\ufe63\uff0d"
_SPELLED_OUT = ("<compat>", "<wide>", "<narrow>", "<font>")  # not <super>: "m²" is no "m2"

_ENTITY = re.compile(
    r"&(?:amp;)*(#[0-9]{1,7};|#[xX][0-9a-fA-F]{1,6};|[A-Za-z][A-Za-z0-9]{1,31};)"
    r"|&(amp|apos|gt|lt|nbsp|quot)(?![A-Za-z0-9;])"
)
_ENDINGS = "avi bmp csv gif heic htm html jpeg jpg json mov mp4 pdf png svg tif tiff txt webp xml zip"
_NO_WORD = re.compile(
    rf"""
    (?P<markup> <[^<>]{{1,500}}> | \[/?(?:BOS|CLS|EOS|IMG|INST|MASK|PAD|SEP|UNK)\] )
    | \b(?:[A-Za-z][A-Za-z0-9+.\-]{{1,20}}://|www\.|data:[a-z]+/)\S+                             # an address
    | (?<![\w.+\-])[\w.+\-]{{1,64}}@[\w\-]+(?:\.[\w\-]+)+                                        # of e-mail
    | (?<![\w@])@\w+                                                                             # an account
    | (?<!\S)(?:\.{{1,2}}/|~/|/[^\s/]+/|[A-Za-z]:[\\/])\S+                                       # a path
    | (?<![\w.\-/\\])[\w.\-/\\]+\.(?:{"|".join([*_ENDINGS.split(), *_ENDINGS.upper().split()])})\b  # a file
    | (?<![\w.\-])(?:[\w\-]+\.)+(?:com|edu|gov|net|org)\b(?:/\S*)?                               # a host
    """,
    re.VERBOSE,
)
_ORDINARY = re.compile(r"[^&<@/\\`\[]*")  # ASCII without these and without a dot inside a word is read as it is
_SURROGATE = re.compile("[\ud800-\udfff]")
_DOT_INSIDE = re.compile(r"\w\.\w")


class Plain(NamedTuple):
    """A text as it is read, and for each of its characters where the text as written has it: from, and up to."""

    text: str
    starts: Sequence[int]
    ends: Sequence[int]

    def written(self, start: int, end: int) -> tuple[int, int]:
        """The half-open span of the text as written for one of the plain text that is not empty."""
        return self.starts[start], self.ends[end - 1]


def plain(text: str) -> Plain:
    """Read a text: letters composed, ASCII apostrophes and hyphens, entities decoded, what is no word left out.

    Tags and special tokens become spaces, other things that are no words `GAP`. Signs without a width are gone.
    """
    if text.isascii() and _ORDINARY.fullmatch(text) and not _DOT_INSIDE.search(text):
        return Plain(text, range(len(text)), range(1, len(text) + 1))
    signs, starts, ends = _spelled(text)
    return Plain(_NO_WORD.sub(_left_out, "".join(signs)), starts, ends)


def encodable(text: str) -> str:
    """A text of the same length that every tokenizer takes: lone surrogates are no characters and become U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def _spelled(text: str) -> tuple[list[str], list[int], list[int]]:
    """The characters of the plain text, before anything is left out, and their places."""
    signs: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    place = 0
    while place < len(text):
        shown, end = _decoded(text, place) if text[place] == "&" else (text[place], place + 1)
        for sign in shown:
            spelling = _spelling(sign)
            if spelling is None:  # a mark belongs to the letter before it
                if signs:
                    composed = unicodedata.normalize("NFC", signs[-1] + sign)
                    signs[-1] = composed if len(composed) == 1 else signs[-1]
                    ends[-1] = end
                continue
            signs += spelling
            starts += [place] * len(spelling)
            ends += [end] * len(spelling)
        place = end
    return signs, starts, ends


def _decoded(text: str, place: int) -> tuple[str, int]:
    """What the entity at a place shows, also one escaped twice ("&amp;nbsp;"), and its end. Unknown ones are text."""
    if found := _ENTITY.match(text, place):
        name = found[1] or f"{found[2]};"
        if (shown := html.unescape(f"&{name}")) != f"&{name}":
            return shown, found.end()
    return "&", place + 1


@lru_cache(maxsize=4096)
def _spelling(sign: str) -> str | None:
    """How a character is read; None for a mark, which has no place of its own."""
    if sign in _APOSTROPHES:
        return "'"
    if sign in _HYPHENS:
        return "-"
    if sign.isascii():
        return sign
    category = unicodedata.category(sign)
    if category[0] == "M":
        return None
    if category == "Cf":  # a soft hyphen, a space or joiner without a width, a mark of direction
        return ""
    if category == "Lo":
        return GAP
    if category[0] == "N":
        return "0"
    if category[0] != "L":
        return sign
    composed = unicodedata.normalize("NFC", sign)
    apart = unicodedata.normalize("NFKC", sign)
    is_letters = unicodedata.decomposition(sign).startswith(_SPELLED_OUT) and apart.isalpha()
    return apart if is_letters else composed


def _left_out(found: re.Match[str]) -> str:
    if found["markup"] is None:
        return GAP * len(found.group())
    return " " * len(found.group()) if _is_markup(found["markup"]) else found.group()


def _is_markup(text: str) -> bool:
    """Whether what stands in angle brackets is a tag or a special token: "<b>", "<br />", "<|end|>", "<a href=…>"."""
    inside = text[1:-1]
    if inside[0].isspace():
        return False
    return inside[0] in "!?|" or "=" in inside or not re.search(r"\s", inside.rstrip("/ "))
