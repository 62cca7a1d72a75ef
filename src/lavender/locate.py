"""Where the words of an answer stand in a model's token sequence, and which rows predict them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from lavender.errors import DataError
from lavender.maps import Word
from lavender.vlm.base import VlmAdapter
from lavender.words import token_span


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message whose content is a string or a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


class WordLocator:
    """Finds the rows of words in conversations that a processor has rendered and tokenized.

    Works on the finished token sequence, whoever made it: padding side, truncation and repeated
    placeholders do not matter. A sequence that does not match its conversation is an error.
    """

    def __init__(self, processor: ProcessorMixin, adapter: VlmAdapter):
        if not processor.tokenizer.is_fast:
            raise DataError(
                f"the slow tokenizer {type(processor.tokenizer).__name__}",
                "a fast tokenizer, which knows where in the text a token stands",
                "load the processor with use_fast=True",
            )
        self._processor, self._image_token = processor, adapter.image_token_id()

    def rows(
        self,
        messages: Sequence[Mapping[str, Any]],
        answers: Iterable[tuple[int, str, Sequence[Word]]],
        ids: Tensor,
        attention_mask: Tensor,
        dropped: Counter[str],
    ) -> list[tuple[Word, tuple[int, ...]]]:
        """Each word with the positions of the rows that predict its tokens.

        Args:
            answers: (turn, text, words) of the assistant's turns to look at.
            ids, attention_mask: (token,), one sample of the batch.
            dropped: counts the words that have no row, by reason.
        """
        rendered = self._render(messages)
        offsets, positions = self._match(rendered, ids, attention_mask)
        pictures = (ids == self._image_token).nonzero().flatten()
        found = []
        for turn, text, words in answers:
            start = self._answer_start(rendered, messages, turn, text)
            for word in words:
                span = token_span(offsets, start + word.start, start + word.end)
                if not span or span[-1] >= len(positions):
                    dropped["word beyond max_length"] += 1
                    continue
                rows = tuple(positions[index] - 1 for index in span)  # the row before a token predicts it
                if not len(pictures) or rows[0] < int(pictures[0]):
                    dropped["word before the picture, which its row cannot see"] += 1
                    continue
                found.append((word, rows))
        return found

    def _render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        conversation: list[Any] = list(messages)
        return self._processor.apply_chat_template(conversation, add_generation_prompt=prompt, tokenize=False)

    def _answer_start(self, rendered: str, messages: Sequence[Mapping[str, Any]], turn: int, answer: str) -> int:
        """Where an answer begins in the rendered conversation."""
        prefix = self._render(messages[:turn], prompt=True)
        after = len(prefix) if rendered.startswith(prefix) else len(self._render(messages[:turn]))
        start = rendered.find(answer.strip(), after)  # some templates strip
        if start < 0:
            raise DataError(
                f"a chat template that does not print the answer {answer!r}",
                "a template that prints the assistant's text as it is",
                "use the model's own chat template",
            )
        return start - (len(answer) - len(answer.lstrip()))

    def _match(self, rendered: str, ids: Tensor, attention_mask: Tensor) -> tuple[list[tuple[int, int]], list[int]]:
        """Character offsets of the text's tokens, and where each stands in the padded sequence.

        Picture tokens are left out on both sides: a processor may repeat the placeholder.
        """
        encoded = self._processor.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        expected = [(token, offset) for token, offset in pairs if token != self._image_token]
        present = [(int(ids[place]), place) for place in attention_mask.nonzero().flatten().tolist()]
        present = [(token, place) for token, place in present if token != self._image_token]
        if [token for token, _ in expected[: len(present)]] != [token for token, _ in present]:
            raise DataError(
                "a batch whose tokens differ from the tokenized conversation",
                "the tokens of `messages`, rendered by the processor's own chat template",
                "pass the data as `images` and `messages`, without a chat template of your own",
            )
        return [offset for _, offset in expected], [place for _, place in present]
