"""Texts as the teacher's text encoder takes them: windows of a long text, and which tokens carry which word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lavender.config import Carrier
from lavender.maps import Word
from lavender.words import encodable, token_span

_SENTENCE = re.compile(r"[^.!?;\n]*[.!?;\n]+\s*|[^.!?;\n]+$")
_WITH_SPACE = re.compile(r"\s*\S+\s*")


def windows(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> list[tuple[int, int]]:
    """Character spans that each fit the text encoder, cut at the ends of sentences, else between words.

    Args:
        max_tokens: of the encoder, its two special tokens included.
    """
    text, limit = encodable(text), max_tokens - 2
    sentences = [sentence.span() for sentence in _SENTENCE.finditer(text)]
    pieces: list[tuple[int, int]] = []
    for (start, end), tokens in zip(sentences, _counts(tokenizer, text, sentences), strict=True):
        fits = tokens <= limit
        pieces += [(start, end)] if fits else [one.span() for one in _WITH_SPACE.finditer(text, start, end)]
    spans: list[tuple[int, int]] = []
    filled = 0  # tokens of the last span, or a few more: a cut never makes tokens fewer
    for (start, end), tokens in zip(pieces, _counts(tokenizer, text, pieces), strict=True):
        filled += tokens
        if spans and filled > limit:
            filled = next(_counts(tokenizer, text, [(spans[-1][0], end)]))
        if spans and filled <= limit:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
            filled = tokens
    return spans


def _counts(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]) -> Iterator[int]:
    """How many tokens each part of a text has by itself."""
    for first in range(0, len(spans), 1024):
        parts = [text[start:end] for start, end in spans[first : first + 1024]]
        yield from map(len, tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True, eq=False)
class Window:
    """One row of a batch: a part of a job's text with the words in it that have a token.

    Attributes:
        job: the job's index.
        text: the window's own characters, as the text encoder takes them.
        words: its words.
        tokens: the positions of the tokens that carry each word.
        content: the positions of all of the text's tokens, special ones left out.
    """

    job: int
    text: str
    words: tuple[Word, ...]
    tokens: tuple[tuple[int, ...], ...]
    content: tuple[int, ...]


def window_of(
    tokenizer: PreTrainedTokenizerBase,
    job: int,
    text: str,
    start: int,
    words: Sequence[Word],
    carrier: Carrier,
    max_tokens: int,
) -> tuple[Window, list[Word]]:
    """A window and those of its words that have no token.

    Args:
        text: the window's characters, which begin at `start` of the job's text.
        words: the words that begin in the window.
    """
    text = encodable(text)
    encoded = tokenizer(text, truncation=True, max_length=max_tokens, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    content = tuple(index for index, (first, last) in enumerate(offsets) if last > first)
    kept, lost, spans = [], [], []
    for word in words:
        span = token_span(offsets, word.start - start, word.end - start)
        if not span:
            lost.append(word)
            continue
        if carrier == "own+next" and span[-1] + 1 in content:
            span = [*span, span[-1] + 1]
        kept.append(word)
        spans.append(tuple(span))
    return Window(job, text, tuple(kept), tuple(spans), content), lost


def indicator(rows: Sequence[Window], max_tokens: int) -> tuple[Tensor, Tensor]:
    """E (row, token, column): 1/n at the n tokens of a word; the last column is the mean of all the text's tokens.

    Columns count the words of one row alone, so a long text in many windows stays cheap. The second tensor is n,
    (row, column); a column without a word is 0 with n = 1.
    """
    width = max(len(row.words) for row in rows) + 1
    values, counts = torch.zeros(len(rows), max_tokens, width), torch.ones(len(rows), width)
    for index, row in enumerate(rows):
        for column, tokens in [*enumerate(row.tokens), (width - 1, row.content)]:
            if tokens:
                values[index, list(tokens), column] = 1 / len(tokens)
                counts[index, column] = len(tokens)
    return values, counts
