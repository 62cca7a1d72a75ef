"""A model's attention on one picture, per word, layer and head: how much there is, and where.

Axis suffixes: W word, L layer, H head; rows and cols are those of a grid over the whole picture.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lavender.errors import DataError, ModelError
from lavender.maps import Dropped, Word
from lavender.students.capture import AttentionRequest, capturing, row_tensors
from lavender.students.image_keys import KeyLayout, to_grid, word_attention
from lavender.students.locate import WordLocator
from lavender.students.logits import last_row
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture, evaluating, finite, processor_inputs
from lavender.words import words_of

QUESTION, ANSWER = 0, 1  # the turns of a reading


class ReadWord(NamedTuple):
    """A word of a reading: its turn, 0 for the question and 1 for the answer, and its place in that turn's text."""

    turn: int
    word: Word


@dataclass(frozen=True, eq=False)
class WordAttention:
    """The attention of words on one picture, in every layer and head that sees it.

    A word's attention is the mean of the rows that predict its tokens. A row sums to 1 over all keys of a layer.

    Attributes:
        words: the words that were found, those of the answer first.
        layers: the indices of the layers.
        maps_WLH: float32 (word, layer, head, rows, cols): the share of the row's attention in each cell of the picture.
        on_picture_WLH: float32 (word, layer, head): the share on all image keys. It is larger than the sum of the map
            where keys show no part of the picture, such as class tokens and padding.
        sees_picture_alone: whether the layers attend to image keys alone, so that `on_picture_WLH` is 1 everywhere.
        dropped: words without a map, with the reason and the number of words.
    """

    words: tuple[ReadWord, ...]
    layers: tuple[int, ...]
    maps_WLH: Tensor
    on_picture_WLH: Tensor
    sees_picture_alone: bool
    dropped: tuple[Dropped, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of every map."""
        return self.maps_WLH.shape[3], self.maps_WLH.shape[4]


def require_template(processor: Any, model: Any) -> None:
    """Raise ModelError if the processor has no chat template: then nobody knows how the model takes a question."""
    if not processor.chat_template:
        raise ModelError(
            f"the processor of {model}, which has no chat template",
            "a template that says how the model takes a picture, a question and an answer",
            "take a checkpoint that was tuned for conversations, or write chat_template.jinja into its folder",
        )


@torch.inference_mode()
def read_attention(
    model: Any,
    processor: Any,
    reading: AnsweredPicture,
    question_words: tuple[Word, ...] = (),
    grid: tuple[int, int] = (32, 32),
) -> WordAttention:
    """Where a model looks when it predicts each word of an answer, and each of the given words of its question.

    The mean over layers and heads is the map of `lavender.student_maps`, but for the scale.

    Args:
        model: a model of a supported family.
        processor: its processor.
        reading: a picture with a question, an answer, and the words of the answer.
        question_words: words of the question to map too.
        grid: (rows, cols) of the maps.

    Raises:
        DataError: no word was found, or the processor does not print a text as it is.
        UnsupportedModelError: the model's family or attention kernel is not supported.

    Examples:
        >>> from PIL import Image
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from lavender import AnsweredPicture
        >>> from lavender.words import content_words
        >>> from lavender.world import STUDENT_PATH
        >>> model = AutoModelForImageTextToText.from_pretrained(STUDENT_PATH)
        >>> processor = AutoProcessor.from_pretrained(STUDENT_PATH)
        >>> image, words = Image.new("RGB", (96, 64), "red"), content_words("a red dog", ("noun",))
        >>> seen = read_attention(model, processor, AnsweredPicture(image, "what is it?", "a red dog", words))
        >>> [entry.word.text for entry in seen.words], seen.grid, len(seen.layers)
        (['dog'], (32, 32), 2)
    """
    adapter = adapter_for(model.config)
    inputs = processor_inputs(processor, [reading]).to(model.device, model.dtype)
    words, word_rows, left_out = _located(WordLocator(processor, adapter), reading, question_words, inputs)
    tensors = row_tensors([word_rows])
    keys = adapter.key_tensors(inputs, [[reading.size]], processor)
    request = AttentionRequest(tensors["rows"].to(model.device), adapter.usable_layers(), keys.get("keys"))
    with evaluating(model), capturing(model):
        model(**inputs, attention_request=request, **last_row(model))
    layout = KeyLayout(keys["boxes"], keys["pictures"], keys.get("views"))
    rows_LBHRK = request.stacked()
    attention_LBHWK = word_attention(rows_LBHRK, tensors["shares"].to(rows_LBHRK))
    cells = grid[0] * grid[1]
    maps = [  # a layer at a time: all of them on the grid could take gigabytes
        to_grid(layer[None], layout, tensors["word_pictures"], grid, request.mixing)[0, 0].float().cpu() / cells
        for layer in attention_LBHWK
    ]
    return WordAttention(
        words,
        request.layers,
        finite(torch.stack(maps), model).permute(2, 0, 1, 3, 4).contiguous(),
        attention_LBHWK.sum(dim=-1)[:, 0].permute(2, 0, 1).float().cpu(),
        "keys" not in keys,
        left_out,
    )


def _located(
    locator: WordLocator, reading: AnsweredPicture, question_words: tuple[Word, ...], inputs: Any
) -> tuple[tuple[ReadWord, ...], list[tuple[int, ...]], tuple[Dropped, ...]]:
    """The words that are found, the rows of each, and those that are not. Raises DataError if none is."""
    dropped = Counter[str]()
    texts = [(ANSWER, reading.answer, reading.words), (QUESTION, reading.prompt, question_words)]
    found = locator.rows_by_text(
        reading.messages(), texts, inputs["input_ids"][0], inputs["attention_mask"][0], dropped
    )
    words = tuple(
        ReadWord(turn, word) for (turn, _, _), located in zip(texts, found, strict=True) for word, _ in located
    )
    rows = [rows for located in found for _, rows in located]
    left_out = tuple(Dropped(f"{count} word{'s' * (count > 1)}", reason) for reason, count in dropped.items() if count)
    if not words:
        reasons = "; ".join(f"{drop.what}: {drop.reason}" for drop in left_out)
        raise no_word(f"the answer {reading.answer!r}", reading.answer, reasons)
    return words, rows, left_out


def no_word(named: str, text: str, reasons: str = "") -> DataError:
    """The error for a text of which no word has a map.

    Args:
        named: what the message calls the text.
        text: the text.
        reasons: why its words have none; "" if it has no such words.
    """
    if not words_of(text):
        do = "give another text: the tagger of words knows English"
        return DataError(
            f"{named}, of which no word has a map (it has no word in Latin letters)", "an English text", do
        )
    return DataError(
        f"{named}, of which no word has a map ({reasons or 'it has no word of these parts of speech'})",
        "a noun, an adjective or a verb" + (" that the model's tokenizer knows" if reasons else ""),
        "give another text, or choose the parts of speech with --words",
    )
