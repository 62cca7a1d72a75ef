"""Find the words of a turn in a model's token sequence, and the rows that predict them.

A processor writes more than the chat template. Where the template prints one placeholder for a picture, the sequence
has hundreds of tokens, with markers, newlines or whole sentences around them. So the rendered text is cut at its
placeholders, and the pieces are searched in the token sequence. Pieces and sequence are compared by the characters
that their tokens stand for, here called the *surface*: at the border of a piece, its newline and one of the processor
may have become a single token.
"""

from __future__ import annotations

import hashlib
import unicodedata
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import ProcessorMixin

from lavender.data.conversations import text_parts
from lavender.errors import DataError
from lavender.maps import Word
from lavender.students.base import VlmAdapter
from lavender.students.surface import Piece, TokenSequence, Vocabulary
from lavender.words import encodable

BEYOND = "word beyond max_length"
UNSEEN = "word before the picture, which its row cannot see"
UNKNOWN = "word that the tokenizer does not know"
CHANGED = "word that the tokenizer spells otherwise"  # such as without its accents
PRIVATE = range(0xE000, 0xF900)  # private-use characters, which no template changes
_REMEMBERED = 250_000  # words that are not searched again, about 0.2 kB each


class WordLocator:
    """Finds the rows that predict words, in conversations that a processor has rendered and tokenized.

    It works on the finished token sequence. Padding side, truncation at the end, and what the processor writes in the
    place of a picture do not matter. A sequence that does not match its conversation is an error, never a guess.

    Args:
        processor: the model's processor, with a fast tokenizer and a chat template.
        adapter: the adapter of the model's family.
        chat_template: the template that the sequences were rendered with; None for the processor's own.

    Raises:
        DataError: the tokenizer is a slow one, which does not return the characters of its tokens.
    """

    def __init__(self, processor: ProcessorMixin, adapter: VlmAdapter, chat_template: str | None = None):
        if not processor.tokenizer.is_fast:
            raise DataError(
                f"the slow tokenizer {type(processor.tokenizer).__name__}",
                "a fast tokenizer, which knows where in the text a token stands",
                "load the processor with use_fast=True",
            )
        self._processor, self._tokenizer, self._template = processor, processor.tokenizer, chat_template
        self._known: OrderedDict[bytes, _Located] = OrderedDict()  # a sample has the same tokens in every epoch
        self._num_known = 0  # words
        self._vocabulary = Vocabulary(processor.tokenizer, adapter.image_token_id())
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
        pictures = [0] * len(texts) if pictures is None else list(pictures)
        positions = attention_mask.nonzero().flatten().tolist()
        tokens = ids[positions].tolist()
        key = _key(messages, texts, tokens, pictures)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._locate(messages, texts, tokens, pictures)
            self._num_known += found.size
            while self._num_known > _REMEMBERED:
                self._num_known -= self._known.popitem(last=False)[1].size
        dropped.update(found.dropped)
        return [
            [(words[number], tuple(positions[index] - 1 for index in indices)) for number, indices in places]
            for (_, _, words), places in zip(texts, found.places, strict=True)
        ]

    def rows_to_end(
        self, messages: Sequence[Mapping[str, Any]], turn: int, ids: Tensor, attention_mask: Tensor
    ) -> tuple[int, ...]:
        """The positions of the rows that predict a turn's text and all that follows it, such as the end token.

        Args:
            messages: the conversation, with a part of type "image" for each picture.
            turn: index of the message. The tokens from the first that has a character of its text are predicted.
            ids, attention_mask: (token,), of one sample of the batch, not truncated.

        Returns:
            () if the text is empty, or no tokenizer takes it as it is: it has lone surrogates.

        Raises:
            DataError: as `rows_by_text`.
        """
        positions = attention_mask.nonzero().flatten().tolist()
        rendered = self._render(messages)
        if encodable(rendered) != rendered:
            return ()
        sequence = TokenSequence.of(self._vocabulary, ids[positions].tolist())
        pieces = self._pieces(rendered)
        placed = sequence.place([piece.surface for piece in pieces])
        first = min((shift + begin for shift, begin, _ in self._starts(rendered, messages, turn)), default=None)
        for place, piece in zip(placed, pieces, strict=False):
            following = piece.tokens_of(first, len(rendered)) if first is not None else []
            if following:
                predicted = sequence.between(place + piece.edges[following[0]], len(sequence.surface))
                return tuple(positions[index] - 1 for index in predicted)
        return ()

    def _locate(
        self,
        messages: Sequence[Mapping[str, Any]],
        texts: Sequence[tuple[int, str, Sequence[Word]]],
        tokens: list[int],
        pictures: Sequence[int],
    ) -> _Located:
        """As `rows_by_text`, in a sequence without padding."""
        located = _Located([[] for _ in texts], Counter())
        rendered = self._render(messages)
        if encodable(rendered) != rendered:  # no tokenizer takes this text as it is
            located.dropped[CHANGED] += sum(len(words) for _, _, words in texts)
            return located
        sequence = TokenSequence.of(self._vocabulary, tokens)
        pieces = self._pieces(rendered)
        placed = sequence.place([piece.surface for piece in pieces])
        starts_of: dict[int, list[tuple[int, int, int]]] = {}  # a text may be mapped on several pictures
        for places, (turn, _, words), picture in zip(located.places, texts, pictures, strict=True):
            if words and turn not in starts_of:
                starts_of[turn] = self._starts(rendered, messages, turn)
            for number, word in enumerate(words):
                spans = [
                    (start + max(word.start, first), start + min(word.end, last))
                    for start, first, last in starts_of[turn]
                    if word.start < last and word.end > first
                ]
                reason, indices = self._tokens(pieces, placed, sequence, spans, picture)
                if not reason:
                    reason = self._reason_to_drop(word, [tokens[index] for index in indices])
                if reason:
                    located.dropped[reason] += 1
                else:
                    places.append((number, tuple(indices)))
        return located

    def _tokens(
        self,
        pieces: list[Piece],
        placed: list[int],
        sequence: TokenSequence,
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
        settings: dict[str, Any] = {} if self._template is None else {"chat_template": self._template}
        settings |= {"add_generation_prompt": False, "tokenize": False}
        return self._processor.apply_chat_template(conversation, **settings)

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

    def _pieces(self, rendered: str) -> list[Piece]:
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
            Piece([offset for _, offset in piece], self._vocabulary.surfaces([token for token, _ in piece]))
            for piece in tokens
        ]


class _Located(NamedTuple):
    """For each text its words' numbers with the indices of their tokens, without padding; why others have none."""

    places: list[list[tuple[int, tuple[int, ...]]]]
    dropped: Counter[str]

    @property
    def size(self) -> int:
        """The number of words with tokens, and one for the rest."""
        return 1 + sum(map(len, self.places))


def _key(
    messages: Sequence[Mapping[str, Any]],
    texts: Sequence[tuple[int, str, Sequence[Word]]],
    tokens: list[int],
    pictures: Sequence[int],
) -> bytes:
    """A digest of all that decides where words are, without the pictures."""
    turns = [
        (message["role"], [(part.index, part.text) for part in text_parts(message["content"])]) for message in messages
    ]
    spans = [(turn, [(word.start, word.end) for word in words]) for turn, _, words in texts]
    return hashlib.blake2b(
        repr((turns, spans, tokens, pictures)).encode(errors="surrogatepass"), digest_size=16
    ).digest()


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
