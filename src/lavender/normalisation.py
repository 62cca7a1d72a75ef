"""Texts as they are read for words: one spelling for what looks the same, and nothing that is no word.

People and programs write the same word in several ways: accents apart from their letters, ligatures, fullwidth
letters, other hyphens and apostrophes, signs without a width, HTML entities. Addresses, file names, tags and a
model's special tokens have letters but are no words. All of this is settled here, once. Every place of the plain text
is known in the text as written, which stays what pictures, maps and models know.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

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
