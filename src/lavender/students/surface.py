"""The characters that tokens stand for, and where the pieces of a rendered conversation lie among them.

Pieces and sequence are compared by these characters, the *surface*, see `lavender.students.locate`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from lavender.errors import DataError
from lavender.words import token_span

_BLANKS = " \t\n\r▁ĠĊĉč"  # white space, and what stands for it in tokens
_BLANK_BYTES = ("<0x09>", "<0x0A>", "<0x0D>", "<0x20>")


class Vocabulary:
    """What each token of a tokenizer stands for: a picture, or characters."""

    def __init__(self, tokenizer: Any, picture: int):
        self._tokenizer, self._picture = tokenizer, picture
        self._is_special = {key: token.special for key, token in tokenizer.added_tokens_decoder.items()}
        self._surfaces: dict[int, str] = {}
        self.picture_width = len(self._surface(picture))

    def surfaces(self, ids: list[int]) -> list[str]:
        """The characters that each token stands for. Those of special tokens cannot be mistaken for text."""
        self._surfaces |= {token: self._surface(token) for token in set(ids) - self._surfaces.keys()}
        return [self._surfaces[token] for token in ids]

    def _surface(self, token: int) -> str:
        return f"\0{token}\0" if self._is_special.get(token) else self._tokenizer.convert_ids_to_tokens(token)

    def is_picture(self, token: int) -> bool:
        return token == self._picture

    def is_blank(self, token: int, surface: str) -> bool:
        """Whether a processor may put a token after a picture that is no text: a marker or white space."""
        if token == self._picture:
            return False
        return token in self._is_special or not surface.strip(_BLANKS) or surface in _BLANK_BYTES

    def is_start(self, token: int) -> bool:
        """Whether the tokenizer adds a token at the start of a text."""
        return token == self._tokenizer.bos_token_id


class Piece:
    """Text between two placeholders: the character offsets of its tokens in the rendered text, and its surface."""

    def __init__(self, offsets: list[tuple[int, int]], surfaces: list[str]):
        self._offsets, self.surface = offsets, "".join(surfaces)
        self.edges = [0, *accumulate(map(len, surfaces))]
        self._real = [index for index, (start, end) in enumerate(offsets) if end > start]
        self._starts, self._ends = ([offsets[index][side] for index in self._real] for side in (0, 1))
        self._is_sorted = self._starts == sorted(self._starts) and self._ends == sorted(self._ends)

    def tokens_of(self, start: int, end: int) -> list[int]:
        """Indices of the tokens that overlap the characters [start, end): a fast `token_span` for long texts."""
        if not self._is_sorted:  # some normalisers reorder combining marks
            return token_span(self._offsets, start, end)
        return self._real[bisect_right(self._ends, start) : bisect_left(self._starts, end)]


class _Run(NamedTuple):
    """Consecutive picture tokens, as characters [start, end) of the surface. Blanks follow until `blank`."""

    start: int
    end: int
    blank: int


@dataclass(frozen=True)
class TokenSequence:
    """One sample of a batch without its padding.

    Attributes:
        surface: the characters of all tokens.
        edges: where each token begins in `surface`, and the end of the last one.
        runs: the picture tokens.
        head: where the text may begin in `surface`: after a start token.
        tail: where the blanks at the end of `surface` begin.
        width: number of characters of a picture token.
    """

    surface: str
    edges: list[int]
    runs: list[_Run]
    head: int
    tail: int
    width: int

    @classmethod
    def of(cls, vocabulary: Vocabulary, tokens: list[int]) -> TokenSequence:
        surfaces = vocabulary.surfaces(tokens)
        edges = [0, *accumulate(map(len, surfaces))]
        is_blank = [vocabulary.is_blank(*pair) for pair in zip(tokens, surfaces, strict=True)]
        runs, index = [], 0
        for is_picture, group in groupby(tokens, vocabulary.is_picture):
            first, index = index, index + len(list(group))
            if is_picture:
                blank = next((at for at in range(index, len(tokens)) if not is_blank[at]), len(tokens))
                runs.append(_Run(edges[first], edges[index], edges[blank]))
        tail = next((at + 1 for at in reversed(range(len(tokens))) if not is_blank[at]), 0)
        head = edges[1] if tokens and vocabulary.is_start(tokens[0]) else 0
        return cls("".join(surfaces), edges, runs, head, edges[tail], vocabulary.picture_width)

    def between(self, first: int, last: int) -> range:
        """The tokens that overlap the characters [first, last) of the surface."""
        return range(bisect_right(self.edges, first) - 1, bisect_left(self.edges, last))

    def place(self, pieces: list[str]) -> list[int]:
        """Where each piece begins in the surface. Fewer pieces are returned if the sequence was cut.

        The first piece begins the sequence. Every other piece follows picture tokens, with nothing but markers and
        white space between. The last piece ends the sequence, unless it was cut.

        Raises:
            DataError: a piece is not where it should be.
        """
        first, rest = pieces[0], pieces[1:]
        begin = 0 if self.surface.startswith(first) else self.head
        if not self.surface.startswith(first, begin):
            if first.startswith(self.surface):  # cut before the first picture
                return [0]
            raise _mismatch(self.surface[begin:], first)
        placed, end = [begin], begin + len(first)
        for number, piece in enumerate(rest, start=1):
            later = [run for run in self.runs if run.end > end]
            if not later:  # cut before this picture
                break
            if piece or number == len(rest):
                placed.append(self._after_picture(piece, later[-1:] if number == len(rest) else later))
            else:  # between pictures side by side: the next begins after one token at the earliest
                placed.append(max(end, later[0].start) + self.width)
            end = min(placed[-1] + len(piece), len(self.surface))
        if len(placed) == len(pieces) and end < len(self.surface):
            raise _mismatch(self.surface[end:], "")
        if len(placed) < len(pieces) and max([end, *(run.end for run in self.runs)]) < self.tail:
            raise _mismatch(self.surface[end:], pieces[len(placed)])
        return placed

    def _after_picture(self, piece: str, runs: list[_Run]) -> int:
        """Where a piece begins: after the first of the runs that it follows. After the last run it may be cut."""
        last = runs[-1]
        at = len(self.surface) - len(piece)
        if len(runs) == 1 and last.end <= at <= last.blank and self.surface.endswith(piece):
            return at
        for run in runs:
            at = self.surface.find(piece, run.end, run.blank + len(piece))
            if at >= 0:
                return at
        for at in range(last.end, last.blank + 1):
            if piece.startswith(self.surface[at:]):
                return at
        raise _mismatch(self.surface[last.end :], piece)


def _mismatch(got: str, expected: str) -> DataError:
    """The error that shows two surfaces, from where they differ."""
    same = next((at for at, (left, right) in enumerate(zip(got, expected, strict=False)) if left != right), 0)
    shown = [text[same : same + 40].replace("\0", "|") or "nothing more" for text in (got, expected)]
    return DataError(
        f"a batch whose tokens differ from the tokenized conversation: {shown[0]!r} where it has {shown[1]!r}",
        "the tokens of `messages`, rendered by the processor's own chat template and cut at the end at most",
        "pass the data as `images` and `messages`, without a chat template of your own, and truncate on the right",
    )
