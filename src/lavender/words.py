"""Find the words of a text: spans of characters, lemmas and parts of speech; and the tokens of a span.

Words are tagged offline by HanTa, a hidden-Markov tagger for English. Other languages in Latin letters are tagged as
well as an English tagger can. A text without Latin letters has no content word. Spans and texts of words are those of
the text as written, although tags, addresses, file names and the like are left out before tagging.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from lavender.maps import Dropped, Word

if TYPE_CHECKING:
    from HanTa.HanoverTagger import HanoverTagger

LONGEST = 64
"""The most characters of a word: the tagger's cost grows with their square."""
GAP = "\ufffc"
"""Stands for letters that are not a word, or that belong to a script without spaces between words."""

_CACHED = 500  # characters: longer texts are not cached, so that the cache stays small
_SENTENCE = 64  # words that are tagged together: the tagger's cost grows with their number
_WORD = re.compile(r"(?<![^\W_])[^\W\d_]+(?:['\-][^\W\d_]+)*")  # "20th" and "50mm" have none
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_CLAUSE_END = re.compile(r"[.;:!?]")
_PARTS = {"NN": "noun", "NP": "noun", "UN": "noun", "AJ": "adjective", "VV": "verb"}  # the tagger's BNC C5 tags
_VERBS = ("VB", "VD", "VH", "VM", "VV")

# The tagger has learned "is" and "n't", "dog" and "'s" as separate words. Some texts are written so too: "dog 's".
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

_APOSTROPHES = "\u2018\u2019\u201b\u02bb\u02bc\u02bd\u02be\u02bf\u02b9\u2032\uff07\u00b4`"
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
# ASCII without these characters, and without a dot inside a word, needs no preparation.
_ORDINARY = re.compile(r"[^&<@/\\`\[]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_DOT_INSIDE = re.compile(r"\w\.\w")


def words_of(text: str) -> tuple[Word, ...]:
    """Every word of a text, in order. Numbers and punctuation are not words.

    A possessive is one word with the lemma of its noun: the lemma of "dog's" is "dog". A contraction such as "isn't" is
    one word with the part of speech "other". Words of more than `LONGEST` characters are left out, see `too_long`.

    Examples:
        >>> from lavender.words import words_of
        >>> [(word.text, word.lemma, word.part_of_speech) for word in words_of("two red dogs")]
        [('two', 'two', 'other'), ('red', 'red', 'adjective'), ('dogs', 'dog', 'noun')]

    Args:
        text: any text; the tagger knows English.

    Returns:
        The words with their span of characters, lemma and part of speech.
    """
    return tuple(tagged.word for tagged in tagged_words(text))


def too_long(text: str) -> tuple[Dropped, ...]:
    """The words that `words_of` leaves out: runs of letters that are too long to be words of a language."""
    return tuple(
        Dropped(f"{span.group()[:20]}…", f"a word of more than {LONGEST} characters")
        for span in _spans(plain(text).text)
        if span.end() - span.start() > LONGEST
    )


def content_words(text: str, parts_of_speech: Sequence[str]) -> tuple[Word, ...]:
    """The words of a text that have one of the given parts of speech.

    Examples:
        >>> from lavender.words import content_words
        >>> [word.text for word in content_words("two red dogs run", ("noun", "verb"))]
        ['dogs', 'run']

    Args:
        text: any text; the tagger knows English.
        parts_of_speech: some of "noun", "adjective", "verb" and "other".
    """
    return tuple(word for word in words_of(text) if word.part_of_speech in parts_of_speech)


def subjects_and_objects(text: str) -> frozenset[int]:
    """The first characters of subjects and objects: the heads of noun phrases that no preposition governs.

    This approximates a parser by parts of speech. The head is the last noun of a run of nouns. A preposition governs
    all nouns up to the next verb or the end of the clause: in "a photo of a cat" only the photo counts.
    """
    heads: list[int] = []
    is_governed = follows_noun = False
    for word, tag, clitic, begins_clause in tagged_words(text):
        if begins_clause:
            is_governed = follows_noun = False
        if tag == "POS":  # the "'s" of "dog 's", written apart from its noun
            continue
        is_noun = word.part_of_speech == "noun"
        if tag[:2] == "PR":
            is_governed = True
        elif tag[:2] in _VERBS:
            is_governed = False
        is_head = is_noun and not is_governed
        if is_head:
            if follows_noun:  # in a compound the last noun is the head
                heads.pop()
            heads.append(word.start)
        follows_noun = is_head
        if clitic[:2] in _VERBS:  # "there's a dog"
            is_governed = follows_noun = False
    return frozenset(heads)


def same_root(first: str, second: str) -> bool:
    """Whether the first words of two texts have the same lemma, as "dogs" and "Dog." do."""
    first_root, second_root = (_cached_root(text) if len(text) <= _CACHED else _root(text) for text in (first, second))
    return first_root is not None and first_root == second_root


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Positions of the tokens that overlap the characters [start, end).

    Overlap counts, not containment, because a byte-level token such as " dog" begins before its word. Tokens without
    characters, such as special tokens, overlap nothing.

    Args:
        offsets: (first, last) characters of each token, half-open, as tokenizers return them.
        start, end: a half-open span of characters.
    """
    return [index for index, (first, last) in enumerate(offsets) if first < end and last > start and last > first]


# Tagging


class TaggedWord(NamedTuple):
    """A word, its C5 tag, the tag of its clitic or "", and whether a clause ended before it."""

    word: Word
    tag: str
    clitic: str
    begins_clause: bool


@lru_cache(maxsize=1)
def _tagger() -> HanoverTagger:
    from HanTa import HanoverTagger as hanta

    return hanta.HanoverTagger("morphmodel_en.pgz")


def tagged_words(text: str) -> tuple[TaggedWord, ...]:
    """Every word of a text, in order."""
    return _cached_tags(text) if len(text) <= _CACHED else _tag(text)


def _tag(text: str) -> tuple[TaggedWord, ...]:
    read = plain(text)
    spans = [span for span in _spans(read.text) if span.end() - span.start() <= LONGEST]
    pieces = [_pieces(read.text, span) for span in spans]
    tags: list[tuple[str, str, str]] = []  # (piece, lemma, tag)
    for start in range(0, len(spans), _SENTENCE):
        tags += _tagger().tag_sent(list(chain(*pieces[start : start + _SENTENCE])))
    tagged, index, last_end = [], 0, 0
    for span, word_pieces in zip(spans, pieces, strict=True):
        _, lemma, tag = tags[index]
        clitic = tags[index + 1][2] if len(word_pieces) > 1 else ""
        start, end = read.written(*span.span())
        word = Word(text[start:end], start, end, lemma.lower(), _part_of_speech(word_pieces, tag))
        begins_clause = _CLAUSE_END.search(read.text, last_end, span.start()) is not None
        tagged.append(TaggedWord(word, tag, clitic, begins_clause))
        index, last_end = index + len(word_pieces), span.end()
    return tuple(tagged)


_cached_tags = lru_cache(maxsize=1024)(_tag)


def _root(text: str) -> str | None:
    """The lemma of a text's first word."""
    first = next(iter(_tag(text)), None)
    return first.word.lemma if first else None


_cached_root = lru_cache(maxsize=16384)(_root)  # its own cache: predictions of models would displace the captions


def _spans(read: str) -> Iterator[re.Match[str]]:
    """Runs of letters of a plain text with at least one Latin letter."""
    return (match for match in _WORD.finditer(read) if _LATIN.search(match.group()))


def _pieces(read: str, span: re.Match[str]) -> tuple[str, ...]:
    """A word as the tagger expects it: its clitic apart."""
    word = span.group()
    if match := _CONTRACTION.fullmatch(word) or _WITHOUT_APOSTROPHE.fullmatch(word):
        base, clitic = (piece for piece in match.groups() if piece is not None)
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


# Preparing a text


class Plain(NamedTuple):
    """A prepared text, and for each of its characters the half-open span of the text as written."""

    text: str
    starts: Sequence[int]
    ends: Sequence[int]

    def written(self, start: int, end: int) -> tuple[int, int]:
        """The span of the text as written for a non-empty span of the plain text."""
        return self.starts[start], self.ends[end - 1]


def plain(text: str) -> Plain:
    """Prepare a text: compose letters, use ASCII apostrophes and hyphens, decode entities, leave out what is no word.

    Tags and special tokens become spaces, addresses and file names become `GAP`. Zero-width characters are removed.
    """
    if text.isascii() and _ORDINARY.fullmatch(text) and not _DOT_INSIDE.search(text):
        return Plain(text, range(len(text)), range(1, len(text) + 1))
    characters, starts, ends = _characters(text)
    return Plain(_NO_WORD.sub(_replacement, "".join(characters)), starts, ends)


def encodable(text: str) -> str:
    """A text of the same length that every tokenizer accepts: lone surrogates become U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def _characters(text: str) -> tuple[list[str], list[int], list[int]]:
    """The characters of the plain text before anything is left out, and where each begins and ends as written."""
    characters: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    place = 0
    while place < len(text):
        shown, end = _decoded(text, place) if text[place] == "&" else (text[place], place + 1)
        for character in shown:
            spelling = _spelling(character)
            if spelling is None:  # a mark belongs to the letter before it
                if characters:
                    composed = unicodedata.normalize("NFC", characters[-1] + character)
                    characters[-1] = composed if len(composed) == 1 else characters[-1]
                    ends[-1] = end
                continue
            characters += spelling
            starts += [place] * len(spelling)
            ends += [end] * len(spelling)
        place = end
    return characters, starts, ends


def _decoded(text: str, place: int) -> tuple[str, int]:
    """The text of the entity at a place, also if escaped twice ("&amp;nbsp;"), and its end. Unknown ones stay."""
    if match := _ENTITY.match(text, place):
        name = match[1] or f"{match[2]};"
        if (shown := html.unescape(f"&{name}")) != f"&{name}":
            return shown, match.end()
    return "&", place + 1


@lru_cache(maxsize=4096)
def _spelling(character: str) -> str | None:
    """How a character is read: "" for one without a width, None for a mark, which belongs to a letter."""
    if character in _APOSTROPHES:
        return "'"
    if character in _HYPHENS:
        return "-"
    if character.isascii():
        return character
    category = unicodedata.category(character)
    if category[0] == "M":
        return None
    if category == "Cf":  # a soft hyphen, a zero-width space or joiner, a direction mark
        return ""
    apart = unicodedata.normalize("NFKC", character)
    if category == "Lo" or (category == "Lm" and not _LATIN.search(apart)):  # the second in "スーパー"
        return GAP
    if category[0] == "N":
        return "0"
    if category[0] != "L":
        return character
    composed = unicodedata.normalize("NFC", character)
    is_letters = unicodedata.decomposition(character).startswith(_SPELLED_OUT) and apart.isalpha()
    return apart if is_letters else composed


def _replacement(match: re.Match[str]) -> str:
    """What stands in place of something that is no word, in the same length."""
    if match["markup"] is None:
        return GAP * len(match.group())
    return " " * len(match.group()) if _is_markup(match["markup"]) else match.group()


def _is_markup(text: str) -> bool:
    """Whether a text in angle brackets is a tag or a special token: "<b>", "<br />", "<|end|>", "<a href=…>"."""
    inside = text[1:-1]
    if inside[0].isspace():
        return False
    return inside[0] in "!?|" or "=" in inside or not re.search(r"\s", inside.rstrip("/ "))
