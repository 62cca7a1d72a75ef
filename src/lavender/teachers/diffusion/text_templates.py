"""Texts as some pipelines change them before encoding: in lower case, stripped, or inside a template."""

from __future__ import annotations

from typing import Any

from lavender.teachers.diffusion.base import tokenized


def lowered(text: str) -> str:
    """A text in lower case, of the same length: a character whose lower case has several characters stays."""
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)


def offsets_in_template(tokenizer: Any, before: str, text: str, after: str, length: int) -> list[tuple[int, int]]:
    """The characters of a text that each token of before + text + after carries.

    Args:
        before, after: what the template puts around the text.
        length: the whole is truncated and padded to this many tokens.

    Returns:
        `length` half-open spans of characters of `text`; (0, 0) for tokens of the template and padding.
    """
    start, end = len(before), len(before) + len(text)
    spans = [
        (max(first, start) - start, min(last, end) - start)
        for first, last in tokenized(tokenizer, before + text + after, length)
    ]
    spans = [(first, last) if last > first else (0, 0) for first, last in spans]
    return spans + [(0, 0)] * (length - len(spans))


def stripped_offsets(tokenizer: Any, before: str, text: str, length: int) -> list[tuple[int, int]]:
    """`offsets_in_template` of before + text.strip(), as spans of the text as given."""
    lead = len(text) - len(text.lstrip())
    spans = offsets_in_template(tokenizer, before, text.strip(), "", length)
    return [(first + lead, last + lead) if last > first else (0, 0) for first, last in spans]
