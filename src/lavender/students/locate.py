"""Find the words of a turn in a model's token sequence, and the rows that predict them.

A processor writes more than the chat template. Where the template prints one placeholder for a picture, the sequence
has hundreds of tokens, with markers, newlines or whole sentences around them. So the rendered text is cut at its
placeholders, and the pieces are searched in the token sequence. Pieces and sequence are compared by the characters
that their tokens stand for, here called the *surface*: at the border of a piece, its newline and one of the processor
may have become a single token.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from torch import Tensor
from transformers import ProcessorMixin

from lavender.data.conversations import text_parts
from lavender.errors import DataError
from lavender.maps import Word
from lavender.students.base import VlmAdapter
from lavender.words import encodable, token_span

BEYOND = "word beyond max_length"
UNSEEN = "word before the picture, which its row cannot see"
UNKNOWN = "word that the tokenizer does not know"
CHANGED = "word that the tokenizer spells otherwise"  # such as without its accents
PRIVATE = range(0xE000, 0xF900)  # private-use characters, which no template changes
_BLANKS = " \t\n\r▁ĠĊĉč"  # white space, and what stands for it in tokens
_BLANK_BYTES = ("<0x09>", "<0x0A>", "<0x0D>", "<0x20>")


class WordLocator:
    """Finds the rows that predict words, in conversations that a processor has rendered and tokenized.

    It works on the finished token sequence. Padding side, truncation at the end, and what the processor writes in the
    place of a picture do not matter. A sequence that does not match its conversation is an error, never a guess.

    Args:
        processor: the model's processor, with a fast tokenizer and a chat template.
        adapter: the adapter of the model's family.

    Raises:
        DataError: the tokenizer is a slow one, which does not return the characters of its tokens.
    """

    def __init__(self, processor: ProcessorMixin, adapter: VlmAdapter):
        if not processor.tokenizer.is_fast:
            raise DataError(
                f"the slow tokenizer {type(processor.tokenizer).__name__}",
                "a fast tokenizer, which knows where in the text a token stands",
                "load the processor with use_fast=True",
            )
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._vocabulary = _Vocabulary(processor.tokenizer, adapter.image_token_id())
        # What the template prints for a picture. Without `image_token` that is the picture's token itself.
        image_token = getattr(processor, "image_token", None)
        self._placeholder = image_token or processor.tokenizer.convert_ids_to_tokens(adapter.image_token_id())

    def rows(
        self,
        messages: Sequence[Mapping[str, Any]],
        texts: Iterable[tuple[int, str, Sequence[Word]]],
        ids: Tensor,
        attention_mask: Tensor,
        dropped: Counter[str],
        pictures: Iterable[int] | None = None,
    ) -> list[tuple[Word, tuple[int, ...]]]:
        """As `rows_by_text`, with the words of all texts in one list."""
        by_text = self.rows_by_text(messages, texts, ids, attention_mask, dropped, pictures)
        return [word_and_rows for words in by_text for word_and_rows in words]

    def rows_by_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        texts: Iterable[tuple[int, str, Sequence[Word]]],
        ids: Tensor,
        attention_mask: Tensor,
        dropped: Counter[str],
        pictures: Iterable[int] | None = None,
    ) -> list[list[tuple[Word, tuple[int, ...]]]]:
        """For each text its words, each with the positions of the rows that predict its tokens.

        The row before a token predicts it; the row at the token's own position reads it.

        Args:
            messages: the conversation, with a part of type "image" for each picture.
            texts: (index of the message, its text, words) for each turn to search, of the user or the assistant. The
                positions of the words count characters from the start of that text, which is `text_of` the message.
            ids, attention_mask: (token,), of one sample of the batch.
            dropped: counter of the reasons why words have no rows. It is updated.
            pictures: for each text the index of the picture in the conversation that its words are mapped on. By
                default the first. Words before the end of their picture are dropped.

        Returns:
            For each text the words that were found, in their order.

        Raises:
            DataError: the sequence does not match the conversation, or the template does not print a text as it is.
        """
        texts = list(texts)
        for _, text, words in texts:
            _check_words(text, words)
        rendered = self._render(messages)
        if encodable(rendered) != rendered:  # no tokenizer takes this text as it is
            dropped[CHANGED] += sum(len(words) for _, _, words in texts)
            return [[] for _ in texts]
        sequence = _Sequence.of(self._vocabulary, ids, attention_mask)
        pieces = self._pieces(rendered)
        placed = sequence.place([piece.surface for piece in pieces])
        located: list[list[tuple[Word, tuple[int, ...]]]] = [[] for _ in texts]
        pictures = [0] * len(texts) if pictures is None else pictures
        starts_of: dict[int, list[tuple[int, int, int]]] = {}  # a text may be mapped on several pictures
        for text_rows, (turn, _, words), picture in zip(located, texts, pictures, strict=True):
            if words and turn not in starts_of:
                starts_of[turn] = self._starts(rendered, messages, turn)
            for word in words:
                spans = [
                    (start + max(word.start, first), start + min(word.end, last))
                    for start, first, last in starts_of[turn]
                    if word.start < last and word.end > first
                ]
                reason, tokens = self._tokens(pieces, placed, sequence, spans, picture)
                if not reason:
                    reason = self._reason_to_drop(word, [sequence.ids[index] for index in tokens])
                if reason:
                    dropped[reason] += 1
                else:
                    text_rows.append((word, tuple(sequence.positions[index] - 1 for index in tokens)))
        return located

    def _tokens(
        self,
        pieces: list[_Piece],
        placed: list[int],
        sequence: _Sequence,
        spans: list[tuple[int, int]],
        picture: int,
    ) -> tuple[str, list[int]]:
        """The tokens of a word: ("", their indices in the sequence), or (the reason why there are none, [])."""
        tokens: list[int] = []
        for number, piece in enumerate(pieces):
            for start, end in spans:
                in_piece = piece.tokens_of(start, end)
                if not in_piece:
                    continue
                if number <= picture:
                    return UNSEEN, []
                if number >= len(placed):
                    return BEYOND, []
                first, last = (placed[number] + piece.edges[at] for at in (in_piece[0], in_piece[-1] + 1))
                if last > len(sequence.surface):
                    return BEYOND, []
                tokens += sequence.between(first, last)
        return ("", list(dict.fromkeys(tokens))) if tokens else (UNKNOWN, [])

    def _reason_to_drop(self, word: Word, ids: list[int]) -> str:
        """Why a word is dropped although its tokens are known: they decode to another text. "" if they do not."""
        if _folded(word.text) in _folded(self._tokenizer.decode(ids)):
            return ""
        return UNKNOWN if self._tokenizer.unk_token_id in ids else CHANGED

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        conversation: list[Any] = list(messages)
        return self._processor.apply_chat_template(conversation, add_generation_prompt=False, tokenize=False)

    def _starts(self, rendered: str, messages: Sequence[Mapping[str, Any]], turn: int) -> list[tuple[int, int, int]]:
        """The place of a turn's text in the rendered conversation: (shift, first, last) for each of its text parts.

        Characters first to last of the text are `shift` characters later in the rendered text. To find a part, the
        conversation is rendered once more with a probe in its place: the part is where the two texts differ. That
        holds even if the same text occurs elsewhere in the conversation.
        """
        content, role = messages[turn]["content"], messages[turn]["role"]
        probe = 3 * next(sign for sign in map(chr, PRIVATE) if sign not in rendered)
        starts = []
        for index, first, text in text_parts(content):
            probed: Any = probe
            if not isinstance(content, str):
                probed = [*content[:index], {**content[index], "text": probe}, *content[index + 1 :]]
            changed = [*messages[:turn], {**messages[turn], "content": probed}, *messages[turn + 1 :]]
            before, *rest = self._render(changed).split(probe)
            after = rest[0] if len(rest) == 1 else None
            printed = rendered[len(before) : len(rendered) - len(after)] if after is not None else ""
            if after is None or rendered != before + printed + after or printed.strip() != text.strip():
                raise DataError(
                    f"a chat template that does not print the {role}'s text {text!r}",
                    "a template that prints each turn's text as it is, and once",
                    "use the model's own chat template",
                )
            stripped = text.find(printed)  # some templates strip white space
            starts.append((len(before) - stripped - first, first, first + len(text)))
        return starts

    def _pieces(self, rendered: str) -> list[_Piece]:
        """The pieces of the rendered text between its placeholders. The text is tokenized as a whole."""
        encoded = self._tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        cuts, at = [], rendered.find(self._placeholder)
        while at >= 0:
            cuts.append(at)
            at = rendered.find(self._placeholder, at + len(self._placeholder))
        tokens: list[list[tuple[int, tuple[int, int]]]] = [[] for _ in range(len(cuts) + 1)]
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            piece = bisect_right(cuts, start)
            inside = piece and start < cuts[piece - 1] + len(self._placeholder)
            if not inside or start == end:
                tokens[piece].append((token, (start, end)))
        return [
            _Piece([offset for _, offset in piece], self._vocabulary.surfaces([token for token, _ in piece]))
            for piece in tokens
        ]


class _Vocabulary:
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


class _Piece:
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
class _Sequence:
    """One sample of a batch without its padding.

    Attributes:
        ids: the token ids.
        positions: position of each token in the padded sequence.
        surface: the characters of all tokens.
        edges: where each token begins in `surface`, and the end of the last one.
        runs: the picture tokens.
        head: where the text may begin in `surface`: after a start token.
        tail: where the blanks at the end of `surface` begin.
        width: number of characters of a picture token.
    """

    ids: list[int]
    positions: list[int]
    surface: str
    edges: list[int]
    runs: list[_Run]
    head: int
    tail: int
    width: int

    @classmethod
    def of(cls, vocabulary: _Vocabulary, ids: Tensor, attention_mask: Tensor) -> _Sequence:
        positions = attention_mask.nonzero().flatten().tolist()
        tokens = ids[positions].tolist()
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
        return cls(tokens, positions, "".join(surfaces), edges, runs, head, edges[tail], vocabulary.picture_width)

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


def _check_words(text: str, words: Sequence[Word]) -> None:
    for word in words:
        if (characters := text[word.start : word.end]) != word.text:
            raise DataError(
                f"{characters!r} where the word {word.text!r} should be in {text[:60]!r}",
                "words whose characters count from the start of their turn's text",
                "find the words in that same text",
            )


def _folded(text: str) -> str:
    """A text without what a tokenizer may change although it spells the word: case, white space, format characters."""
    visible = (sign for sign in unicodedata.normalize("NFKC", text) if unicodedata.category(sign) != "Cf")
    return "".join("".join(visible).casefold().split())
