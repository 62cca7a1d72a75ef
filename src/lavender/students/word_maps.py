"""Word maps of a student: its own attention on the picture, averaged over heads and layers, without an Aligner."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from lavender.data.images import image_id, load_image, named
from lavender.errors import NotFiniteError
from lavender.maps import Dropped, Word, WordMaps, to_heat
from lavender.students.base import VlmAdapter
from lavender.students.capture import AttentionRequest, capturing, row_tensors
from lavender.students.image_keys import KeyLayout, to_grid, word_attention
from lavender.students.locate import WordLocator
from lavender.students.logits import last_row
from lavender.students.registry import adapter_for


@dataclass(frozen=True, eq=False)
class AnsweredPicture:
    """A picture with a question and its answer, as the model reads them (teacher-forced).

    Args:
        image: the picture, or what `lavender.data.images.load_image` takes, such as a path. Stored upright, in RGB.
        prompt: the question.
        answer: the answer.
        words: the words of the answer to map. Their positions count characters from the start of the answer.
        asked: the messages before the answer as chat templates take them, with one picture, such as a system prompt and
            a question that names the picture in its middle. None for the picture and then the prompt.

    Raises:
        DataError: `image` cannot be loaded.

    Examples:
        >>> from PIL import Image
        >>> from lavender import AnsweredPicture
        >>> from lavender.words import content_words
        >>> image, words = Image.new("RGB", (96, 64), "red"), content_words("a red dog", ("noun",))
        >>> AnsweredPicture(image, "what is it?", "a red dog", words).messages()[1]["content"]
        [{'type': 'text', 'text': 'a red dog'}]
    """

    image: Image.Image
    prompt: str
    answer: str
    words: tuple[Word, ...]
    asked: Sequence[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", load_image(self.image, named(self.image, "the picture")))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture in pixels."""
        return self.image.height, self.image.width

    @property
    def turn(self) -> int:
        """The place of the answer among the messages."""
        return 1 if self.asked is None else len(self.asked)

    def messages(self) -> list[dict]:
        """The conversation as chat templates take it."""
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.prompt}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": self.answer}]}
        return [*([question] if self.asked is None else self.asked), answer]

    def question(self) -> list[dict]:
        """The messages before the answer, with the picture itself in its part."""
        found = []
        for message in self.messages()[: self.turn]:
            content = message["content"]
            if not isinstance(content, str):
                content = [part | {"image": self.image} if part["type"] == "image" else part for part in content]
            found.append({"role": message["role"], "content": content})
        return found


def finite(values: Tensor, model: PreTrainedModel, what: str = "the attention") -> Tensor:
    """The values themselves.

    Raises:
        NotFiniteError: one is NaN or infinite.
    """
    if not values.isfinite().all():
        raise NotFiniteError(
            f"NaN or infinity in {what} of {model.config.name_or_path or type(model).__name__}",
            "finite numbers",
            "use bfloat16 or float32 (--dtype): float16 overflows in some models"
            if model.dtype == torch.float16
            else "check the model's weights; one that was trained to NaN is of no use",
        )
    return values


def processor_inputs(processor: ProcessorMixin, pictures: Sequence[AnsweredPicture]) -> BatchFeature:
    """The model's inputs for whole conversations: input_ids, attention_mask and the tensors of the pictures.

    Padded on the right, on the CPU. Tokens are those of the chat template alone; none are added.
    """
    texts = [processor.apply_chat_template(picture.messages(), tokenize=False) for picture in pictures]
    return processor(
        images=[[picture.image] for picture in pictures],
        text=texts,
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    )


def word_rows(
    locator: WordLocator, pictures: Sequence[AnsweredPicture], inputs: BatchFeature, dropped: Sequence[Counter[str]]
) -> list[list[tuple[Word, tuple[int, ...]]]]:
    """For each picture its words that are found, each with the positions of the rows that predict its tokens.

    Args:
        locator: of the model's processor.
        pictures: what `inputs` were made of.
        inputs: result of `processor_inputs`.
        dropped: for each picture a counter of the reasons why words have no rows.
    """
    return [
        locator.rows(picture.messages(), [(picture.turn, picture.answer, picture.words)], ids, mask, reasons)
        for picture, ids, mask, reasons in zip(
            pictures, inputs["input_ids"], inputs["attention_mask"], dropped, strict=True
        )
    ]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context. Restores the mode of each module: a frozen tower may be in it already."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch when the context ends."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@torch.inference_mode()
def student_maps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[AnsweredPicture],
    grid: tuple[int, int] = (32, 32),
    batch_size: int = 16,
) -> list[WordMaps]:
    """Heat maps of where a model looks when it predicts each word: mean over heads and all usable layers.

    The model runs in evaluation mode and is afterwards as it was before.

    Args:
        model: a model of a supported family.
        processor: its processor.
        pictures: the pictures with their questions and answers, and the words to map.
        grid: (rows, cols) of the maps.
        batch_size: pictures per forward.

    Returns:
        One `WordMaps` per picture. Its maps are float32 (word, rows, cols) with maximum 1; words without a map are in
        `dropped`, with the reason.

    Raises:
        UnsupportedModelError: the model's family or attention kernel is not supported.
        DataError: the processor does not print an answer as it is.

    Examples:
        >>> from PIL import Image
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from lavender import AnsweredPicture, student_maps
        >>> from lavender.words import content_words
        >>> from lavender.world import STUDENT_PATH
        >>> model = AutoModelForImageTextToText.from_pretrained(STUDENT_PATH)
        >>> processor = AutoProcessor.from_pretrained(STUDENT_PATH)
        >>> image, words = Image.new("RGB", (96, 64), "red"), content_words("a red dog", ("noun",))
        >>> picture = AnsweredPicture(image, "what is it?", "a red dog", words)
        >>> student_maps(model, processor, [picture])[0].grid
        (32, 32)
    """
    adapter = adapter_for(model.config)
    locator = WordLocator(processor, adapter)
    maps: list[WordMaps] = []
    with evaluating(model), capturing(model):
        for start in range(0, len(pictures), batch_size):
            maps += _map_batch(model, processor, adapter, locator, pictures[start : start + batch_size], grid)
    return maps


def _map_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    adapter: VlmAdapter,
    locator: WordLocator,
    pictures: Sequence[AnsweredPicture],
    grid: tuple[int, int],
) -> list[WordMaps]:
    inputs = processor_inputs(processor, pictures).to(model.device, model.dtype)
    dropped: list[Counter[str]] = [Counter() for _ in pictures]
    located = word_rows(locator, pictures, inputs, dropped)
    tensors = row_tensors([[rows for _, rows in words] for words in located])
    keys = adapter.key_tensors(inputs, [[picture.size] for picture in pictures], processor)
    request = AttentionRequest(tensors["rows"].to(model.device), adapter.usable_layers(), keys.get("keys"))
    model(**inputs, attention_request=request, **last_row(model))
    rows = request.stacked()
    layout = KeyLayout(keys["boxes"], keys["pictures"], keys.get("views"))
    attention = word_attention(rows, tensors["shares"].to(rows))
    on_grid = to_grid(attention, layout, tensors["word_pictures"], grid, request.mixing)
    maps = to_heat(finite(on_grid.mean(dim=(0, 2)).float().cpu(), model))
    return [
        WordMaps(
            image_id(picture.image),
            picture.answer,
            tuple(word for word, _ in words),
            picture_maps[: len(words)],
            tuple(Dropped(picture.answer, reason) for reason in reasons),
        )
        for picture, words, picture_maps, reasons in zip(pictures, located, maps, dropped, strict=True)
    ]
