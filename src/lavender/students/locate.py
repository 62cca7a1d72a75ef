"""Where the words of an answer stand in a model's token sequence, and which rows predict them.

A processor writes more than the chat template: where the template has one placeholder for a picture, the
sequence has hundreds of tokens, with markers, newlines or sentences of the processor's own. So the rendered
text is cut at its placeholders, and its pieces are looked for in the finished sequence. They are compared as
the characters that tokens stand for ("surfaces"), since at a piece's border its newline and the processor's
may have become one token.
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

from lavender.errors import DataError
from lavender.maps import Word
from lavender.students.base import VlmAdapter
from lavender.words import encodable, token_span

BEYOND = "word beyond max_length"
UNSEEN = "word before the picture, which its row cannot see"
UNKNOWN = "word that the tokenizer does not know"
CHANGED = "word that the tokenizer spells otherwise"  # without its accents, say
PRIVATE = range(0xE000, 0xF900)  # characters of private use, which no template changes
_BLANKS = " \t\n\r▁ĠĊĉč"  # white space, and what stands for it in the surfaces of tokens
_BLANK_BYTES = ("<0x09>", "<0x0A>", "<0x0D>", "<0x20>")


class WordLocator:
    """Finds the rows of words in conversations that a processor has rendered and tokenized.

    Works on the finished token sequence, whoever made it: padding side, truncation at the end and what the
    processor writes in the place of a picture do not matter. A sequence that does not match its conversation
    is an error, never a guess.

    Raises:
        DataError: the tokenizer is a slow one, which does not know where in the text its tokens stand.
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
        # what the template prints for a picture; a processor that has no name for it prints the picture's own token
        named = getattr(processor, "image_token", None)
        self._placeholder = named or processor.tokenizer.convert_ids_to_tokens(adapter.image_token_id())

    def rows(
        self,
        messages: Sequence[Mapping[str, Any]],
        answers: Iterable[tuple[int, str, Sequence[Word]]],
        ids: Tensor,
        attention_mask: Tensor,
        dropped: Counter[str],
        pictures: Iterable[int] | None = None,
    ) -> list[tuple[Word, tuple[int, ...]]]:
        """`rows_by_answer`, those of all answers in one list."""
        found = self.rows_by_answer(messages, answers, ids, attention_mask, dropped, pictures)
        return [one for own in found for one in own]

    def rows_by_answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        answers: Iterable[tuple[int, str, Sequence[Word]]],
        ids: Tensor,
        attention_mask: Tensor,
        dropped: Counter[str],
        pictures: Iterable[int] | None = None,
    ) -> list[list[tuple[Word, tuple[int, ...]]]]:
        """Of each answer its words, each with the positions of the rows that predict its tokens.

        Args:
            messages: the conversation, with a part of type "image" where a picture is.
            answers: (turn, text, words) of the assistant's turns to look at; the words' characters count from the
                start of that text.
            ids, attention_mask: (token,), one sample of the batch.
            dropped: counts the words that have no row, by reason.
            pictures: for each of the answers the index of the picture, among the conversation's, that its words are
                to be looked for in; the first by default. Words before the end of their picture are dropped.

        Raises:
            DataError: the sequence is not this conversation's, or the template does not print an answer as it is.
        """
        answers = list(answers)
        for _, text, words in answers:
            _check_words(text, words)
        rendered = self._render(messages)
        if encodable(rendered) != rendered:  # no tokenizer takes it, so whose tokens these are is not known
            dropped[CHANGED] += sum(len(words) for _, _, words in answers)
            return [[] for _ in answers]
        sequence = _Sequence.of(self._vocabulary, ids, attention_mask)
        pieces = self._pieces(rendered)
        placed = sequence.place([piece.surface for piece in pieces])
        found: list[list[tuple[Word, tuple[int, ...]]]] = [[] for _ in answers]
        pictures = [0] * len(answers) if pictures is None else pictures
        starts_of: dict[tuple[int, str], list[tuple[int, int, int]]] = {}  # the same for all pictures
        for own, (turn, text, words), picture in zip(found, answers, pictures, strict=True):
            if words and (turn, text) not in starts_of:
                starts_of[turn, text] = self._starts(rendered, messages, turn, text)
            for word in words:
                spans = [
                    (start + max(word.start, first), start + min(word.end, last))
                    for start, first, last in starts_of[turn, text]
                    if word.start < last and word.end > first
                ]
                reason, tokens = self._tokens(pieces, placed, sequence, spans, picture)
                if not reason:
                    reason = self._doubt(word, [sequence.ids[index] for index in tokens])
                if reason:
                    dropped[reason] += 1
                else:  # the row before a token predicts it
                    own.append((word, tuple(sequence.positions[index] - 1 for index in tokens)))
        return found

    def _tokens(
        self,
        pieces: list[_Piece],
        placed: list[int],
        sequence: _Sequence,
        spans: list[tuple[int, int]],
        picture: int,
    ) -> tuple[str, list[int]]:
        """The reason why a word has no row, or "" and the indices of its tokens in the sequence."""
        tokens: list[int] = []
        for number, piece in enumerate(pieces):
            for start, end in spans:
                own = piece.tokens_of(start, end)
                if not own:
                    continue
                if number <= picture:
                    return UNSEEN, []
                if number >= len(placed):
                    return BEYOND, []
                first, last = placed[number] + piece.edges[own[0]], placed[number] + piece.edges[own[-1] + 1]
                if last > len(sequence.surface):
                    return BEYOND, []
                tokens += sequence.between(first, last)
        return ("", list(dict.fromkeys(tokens))) if tokens else (UNKNOWN, [])

    def _doubt(self, word: Word, ids: list[int]) -> str:
        """Why a word is left out although its tokens are known: they are not its text."""
        if _folded(word.text) in _folded(self._tokenizer.decode(ids)):
            return ""
        return UNKNOWN if self._tokenizer.unk_token_id in ids else CHANGED

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        conversation: list[Any] = list(messages)
        return self._processor.apply_chat_template(conversation, add_generation_prompt=False, tokenize=False)

    def _starts(
        self, rendered: str, messages: Sequence[Mapping[str, Any]], turn: int, answer: str
    ) -> list[tuple[int, int, int]]:
        """Where an answer is in the rendered conversation: (shift, first, last) for each of its text parts.

        Characters first to last of the answer stand `shift` later in the rendered text. Each part is found by
        rendering the conversation once more with a probe in its place: whatever else is said, and how often, the
        part is where the two differ.
        """
        content = messages[turn]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        probe = 3 * next(sign for sign in map(chr, PRIVATE) if sign not in rendered)
        starts, first = [], 0
        for index, part in enumerate(parts):
            if part["type"] != "text":
                continue
            probes = [*parts[:index], {**part, "text": probe}, *parts[index + 1 :]]
            other = {**messages[turn], "content": probe if isinstance(content, str) else probes}
            before, *rest = self._render([*messages[:turn], other, *messages[turn + 1 :]]).split(probe)
            after = rest[0] if len(rest) == 1 else None
            printed = rendered[len(before) : len(rendered) - len(after)] if after is not None else ""
            if after is None or rendered != before + printed + after or printed.strip() != part["text"].strip():
                raise DataError(
                    f"a chat template that does not print the answer {answer!r}",
                    "a template that prints the assistant's text as it is, and once",
                    "use the model's own chat template",
                )
            stripped = part["text"].find(printed)  # some templates strip
            starts.append((len(before) - stripped - first, first, first + len(part["text"])))
            first += len(part["text"])
        return starts

    def _pieces(self, rendered: str) -> list[_Piece]:
        """The rendered text between its placeholders, tokenized in its place."""
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
            _Piece([offset for _, offset in own], self._vocabulary.surfaces([token for token, _ in own]))
            for own in tokens
        ]


class _Vocabulary:
    """What single tokens are: a picture's, or characters."""

    def __init__(self, tokenizer: Any, picture: int):
        self._tokenizer, self._picture = tokenizer, picture
        self._is_special = {key: token.special for key, token in tokenizer.added_tokens_decoder.items()}
        self._surfaces: dict[int, str] = {}
        self.picture_width = len(self._surface(picture))

    def surfaces(self, ids: list[int]) -> list[str]:
        """The characters that each token stands for. Special tokens are no text, and cannot be mistaken for it."""
        self._surfaces |= {one: self._surface(one) for one in set(ids) - self._surfaces.keys()}
        return [self._surfaces[one] for one in ids]

    def _surface(self, token: int) -> str:
        return f"\0{token}\0" if self._is_special.get(token) else self._tokenizer.convert_ids_to_tokens(token)

    def is_picture(self, token: int) -> bool:
        return token == self._picture

    def is_blank(self, token: int, surface: str) -> bool:
        """Whether a processor may put a token after a picture without saying anything: markers and white space."""
        if token == self._picture:
            return False
        return token in self._is_special or not surface.strip(_BLANKS) or surface in _BLANK_BYTES

    def is_start(self, token: int) -> bool:
        """Whether a tokenizer puts a token before a text of its own accord."""
        return token == self._tokenizer.bos_token_id


class _Piece:
    """Text between two placeholders: its tokens' characters in the rendered text, and their surfaces."""

    def __init__(self, offsets: list[tuple[int, int]], surfaces: list[str]):
        self._offsets, self.surface = offsets, "".join(surfaces)
        self.edges = [0, *accumulate(map(len, surfaces))]
        self._real = [index for index, (start, end) in enumerate(offsets) if end > start]
        self._starts, self._ends = ([offsets[index][side] for index in self._real] for side in (0, 1))
        self._is_sorted = self._starts == sorted(self._starts) and self._ends == sorted(self._ends)

    def tokens_of(self, start: int, end: int) -> list[int]:
        """`token_span` of the characters [start, end), fast where a text is long."""
        if not self._is_sorted:  # a normaliser put marks in another order
            return token_span(self._offsets, start, end)
        return self._real[bisect_right(self._ends, start) : bisect_left(self._starts, end)]


class _Run(NamedTuple):
    """Tokens of pictures in a row, as characters of a sequence's surface; `blank` is how far blanks go on after."""

    start: int
    end: int
    blank: int


@dataclass(frozen=True)
class _Sequence:
    """One sample of a batch without its padding.

    Attributes:
        ids: its tokens.
        positions: where each stands in the padded sequence.
        surface: their characters.
        edges: where in `surface` each token begins, and the end.
        runs: the pictures' tokens.
        head: where the text may begin: the end of a starting token.
        tail: where blanks begin that go on to the end.
        width: of a picture's token.
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
        is_blank = [vocabulary.is_blank(*one) for one in zip(tokens, surfaces, strict=True)]
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
        """Where in the surface the pieces begin; fewer than were given where the sequence was cut.

        The first piece begins the sequence. Each other follows a picture's tokens, with no more than markers and
        white space between, and the last ends the sequence, unless that was cut.
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
        """Where a piece begins: after the first of the runs that it follows; after the last one it may be cut."""
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
    """Surfaces, from where they differ."""
    same = next((at for at, (one, other) in enumerate(zip(got, expected, strict=False)) if one != other), 0)
    shown = [text[same : same + 40].replace("\0", "|") or "nothing more" for text in (got, expected)]
    return DataError(
        f"a batch whose tokens differ from the tokenized conversation: {shown[0]!r} where it has {shown[1]!r}",
        "the tokens of `messages`, rendered by the processor's own chat template and cut at the end at most",
        "pass the data as `images` and `messages`, without a chat template of your own, and truncate on the right",
    )


def _check_words(text: str, words: Sequence[Word]) -> None:
    for word in words:
        if (found := text[word.start : word.end]) != word.text:
            raise DataError(
                f"{found!r} where the word {word.text!r} should be in {text[:60]!r}",
                "words whose characters count from the start of their answer",
                "find the words in that same text",
            )


def _folded(text: str) -> str:
    """A text without what tokenizers may change and still spell the word: case, white space, signs without a width."""
    shown = (sign for sign in unicodedata.normalize("NFKC", text) if unicodedata.category(sign) != "Cf")
    return "".join("".join(shown).casefold().split())
