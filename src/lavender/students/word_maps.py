"""A student's own word maps: its attention on the picture, pooled over heads and layers, no Aligner."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from lavender.data.images import image_id, load_image
from lavender.maps import Dropped, Word, WordMaps, to_heat
from lavender.students.capture import AttentionRequest, install, is_ours, row_tensors, set_kernel
from lavender.students.image_keys import KeyLayout, to_grid, word_attention
from lavender.students.latents import MixingCollector
from lavender.students.locate import WordLocator
from lavender.students.registry import adapter_for


@dataclass(frozen=True, eq=False)
class AnsweredPicture:
    """One picture, the question asked, the answer read teacher-forced, and the words to map.

    The picture becomes what `load_image` makes of it: upright, RGB. So it may also be what that takes, such as a path.

    Example:
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", load_image(self.image, "a picture to read"))

    def messages(self) -> list[dict]:
        return [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": self.answer}]},
        ]


Reading = AnsweredPicture  # the former name


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module's own flag, since a frozen tower may be in evaluation mode already."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Afterwards every generator of random numbers stands where it stood."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def capturing(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's language layers answer an attention request; then the kernel it had is back."""
    before = install(model)
    # one that is in alignment has its hooks already
    hooks = [] if is_ours(before) else MixingCollector(model, adapter_for(model.config)).handles
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        set_kernel(model, before)


@torch.inference_mode()
def student_maps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    readings: Sequence[AnsweredPicture],
    grid: tuple[int, int] = (32, 32),
    batch_size: int = 16,
) -> list[WordMaps]:
    """Heat maps of where a model looks when it predicts each word: mean over heads and all usable layers.

    Example:
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
    locator, layers = WordLocator(processor, adapter), adapter.usable_layers()
    results: list[WordMaps] = []
    with evaluating(model), capturing(model):
        for start in range(0, len(readings), batch_size):
            results += _batch(model, processor, adapter, locator, layers, readings[start : start + batch_size], grid)
    return results


def _batch(model, processor, adapter, locator, layers, readings: Sequence[AnsweredPicture], grid) -> list[WordMaps]:
    conversations = [reading.messages() for reading in readings]
    texts = [processor.apply_chat_template(one, tokenize=False) for one in conversations]
    inputs = processor(
        images=[[reading.image] for reading in readings],
        text=texts,
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    ).to(model.device)
    dropped: list[Counter[str]] = [Counter() for _ in readings]
    located = [
        locator.rows(
            conversations[index],
            [(1, reading.answer, reading.words)],
            inputs["input_ids"][index],
            inputs["attention_mask"][index],
            dropped[index],
        )
        for index, reading in enumerate(readings)
    ]
    tensors = row_tensors([[rows for _, rows in own] for own in located])
    sizes = [[(reading.image.height, reading.image.width)] for reading in readings]
    keys = adapter.key_tensors(inputs, sizes, processor)
    request = AttentionRequest(tensors["rows"].to(model.device), layers, keys.get("keys"))
    model(**inputs, attention_request=request)
    rows = request.stacked()
    layout = KeyLayout(keys["boxes"], keys["pictures"], keys.get("views"))
    words = word_attention(rows, tensors["shares"].to(rows))
    attention = to_grid(words, layout, tensors["word_pictures"], grid, request.mixing)
    maps = to_heat(attention.mean(dim=(0, 2)).float().cpu())
    return [
        WordMaps(
            image_id(reading.image),
            reading.answer,
            tuple(word for word, _ in located[index]),
            maps[index, : len(located[index])],
            tuple(Dropped(reading.answer, reason) for reason in dropped[index]),
        )
        for index, reading in enumerate(readings)
    ]
