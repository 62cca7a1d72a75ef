"""Text windows: parts of a long text that each fit the text encoder, and the tokens that carry each word."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
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
    """Cut a text into windows that each fit the text encoder, at the ends of sentences, else between words.

    Args:
        max_tokens: tokens that the encoder takes, its two special tokens included.

    Returns:
        Half-open spans of characters, which cover the text.
    """
    text, limit = encodable(text), max_tokens - 2
    sentences = [sentence.span() for sentence in _SENTENCE.finditer(text)]
    pieces: list[tuple[int, int]] = []
    for (start, end), tokens in zip(sentences, _token_counts(tokenizer, text, sentences), strict=True):
        fits = tokens <= limit
        pieces += [(start, end)] if fits else [piece.span() for piece in _WITH_SPACE.finditer(text, start, end)]
    spans: list[tuple[int, int]] = []
    filled = 0  # an upper bound on the tokens of the last span: joining two pieces never adds tokens
    for (start, end), tokens in zip(pieces, _token_counts(tokenizer, text, pieces), strict=True):
        filled += tokens
        if spans and filled > limit:
            filled = next(_token_counts(tokenizer, text, [(spans[-1][0], end)]))
        if spans and filled <= limit:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
            filled = tokens
    return spans


def _token_counts(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]) -> Iterator[int]:
    """The number of tokens of each part of a text, encoded by itself."""
    for first in range(0, len(spans), 1024):
        parts = [text[start:end] for start, end in spans[first : first + 1024]]
        yield from map(len, tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True, eq=False)
class Window:
    """One row of a batch: a part of a job's text, with those of its words that have a token.

    Attributes:
        job: the job's index.
        text: the window's characters, as the text encoder takes them.
        words: the words that begin in the window and have a token.
        tokens: per word, the positions of the tokens that carry it.
        content: the positions of all tokens of the text, without special tokens.
    """

    job: int
    text: str
    words: tuple[Word, ...]
    tokens: tuple[tuple[int, ...], ...]
    content: tuple[int, ...]


def window_of(
    token_offsets: Callable[[str], Sequence[tuple[int, int]]],
    job: int,
    text: str,
    start: int,
    words: Sequence[Word],
    carrier: Carrier,
) -> tuple[Window, list[Word]]:
    """Find the tokens of a window's words.

    Args:
        token_offsets: see `TeacherFamily.token_offsets`. A word can have tokens of several text encoders.
        job: the job's index.
        text: the window's characters.
        start: where the window begins in the job's text.
        words: the words that begin in the window.
        carrier: see `ExtractionConfig`.

    Returns:
        The window, and the words without a token.
    """
    text = encodable(text)
    offsets = token_offsets(text)
    content = tuple(index for index, (first, last) in enumerate(offsets) if last > first)
    kept, without_token, spans = [], [], []
    for word in words:
        span = token_span(offsets, word.start - start, word.end - start)
        if not span:
            without_token.append(word)
            continue
        if carrier == "own+next":
            span = sorted({*span, *(index + 1 for index in span if index + 1 in content)})
        kept.append(word)
        spans.append(tuple(span))
    return Window(job, text, tuple(kept), tuple(spans), content), without_token


def indicator(rows: Sequence[Window], word_keys: int) -> tuple[Tensor, Tensor]:
    """The values with which attention on words is read, see `lavender.teachers.diffusion.capture`.

    Columns are the words of each row, so a long text in many windows stays cheap. The last column is the mean of all
    tokens of the text. A column without a word is 0, with n = 1.

    Args:
        word_keys: see `TeacherFamily.word_keys`.

    Returns:
        E (row, token, column), 1/n at the n tokens of a word; and n (row, column).
    """
    width = max(len(row.words) for row in rows) + 1
    values, counts = torch.zeros(len(rows), word_keys, width), torch.ones(len(rows), width)
    for index, row in enumerate(rows):
        for column, tokens in [*enumerate(row.tokens), (width - 1, row.content)]:
            if tokens:
                values[index, list(tokens), column] = 1 / len(tokens)
                counts[index, column] = len(tokens)
    return values, counts
