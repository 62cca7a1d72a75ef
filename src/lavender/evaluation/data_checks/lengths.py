"""How long texts are: in words, in tokens of the teacher's CLIP text encoder, and in tokens of a student."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lavender.data.samples import Sample
from lavender.errors import ModelError
from lavender.evaluation.data_checks.scan import SIGNS
from lavender.maps import Dropped
from lavender.model_files import loading, one_line

CLIP_LIMIT = 77
"""Tokens of a text that CLIP's text encoder takes, its two special ones included."""

_WORD = re.compile(rf"[{SIGNS}]|[^\W{SIGNS}]+(?:['’\-][^\W{SIGNS}]+)*")
# What CLIP's tokenizer splits a text into before it splits words further: each of these is at least one token.
_CLIP_PIECE = re.compile(r"<\|(?:start|end)oftext\|>|'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


def num_words(text: str) -> int:
    """The number of words of a text. Numbers count; a Chinese or Japanese character is a word."""
    return len(_WORD.findall(unicodedata.normalize("NFC", text)))


def fewest_clip_tokens(text: str) -> int:
    """The fewest tokens that CLIP's tokenizer can make of a text, its two special ones included.

    Examples:
        >>> from lavender.evaluation.data_checks.lengths import fewest_clip_tokens
        >>> fewest_clip_tokens("the dog's ball")  # the | dog | 's | ball
        6
    """
    return len(_CLIP_PIECE.findall(unicodedata.normalize("NFC", text))) + 2


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, mean, 95th percentile and maximum; {} of no values."""
    if not len(values):
        return {}
    found = (*np.quantile(values, [0, 0.5, 0.95, 1]), np.mean(values))
    return dict(zip(("min", "median", "p95", "max", "mean"), (round(float(value), 3) for value in found), strict=True))


def teacher_counter(path: str) -> tuple[Callable[[str], int], int]:
    """(how many tokens a text has, how many the text encoder takes) of the tokenizer in a pipeline's folder.

    Raises:
        ModelError: no tokenizer there.
    """
    from transformers import AutoTokenizer

    with loading("teacher", path):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
    return lambda text: len(tokenizer(text, truncation=False, verbose=False)["input_ids"]), tokenizer.model_max_length


class StudentCounter:
    """Counts the tokens of whole samples as a student's processor makes them, those of the pictures included.

    Pictures are counted once per size, with a blank picture.

    Attributes:
        context: the most tokens that the model's positions reach; None if its config does not say.

    Raises:
        ModelError: no such model, or it has no chat template.
        UnsupportedModelError: no adapter for it.
    """

    def __init__(self, path: str, trust_remote_code: bool = False):
        from lavender.students.loading import load_config, load_processor, places_of
        from lavender.students.registry import adapter_for

        with loading("model", path):
            folder, base, revision = places_of(path)
            config = load_config(base, trust_remote_code, revision)
            self._processor: Any = load_processor(adapter_for(config), folder, trust_remote_code)
        if not self._processor.chat_template:
            do = "use a chat model, or add chat_template.jinja to its folder"
            raise ModelError(f"{path} without a chat template", "one, to count the tokens of conversations", do)
        self.context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._of_pictures: dict[tuple[tuple[int, int], ...], int] = {}

    def tokens(self, sample: Sample, sizes: tuple[tuple[int, int], ...]) -> int:
        """The tokens of a sample.

        Args:
            sample: the sample.
            sizes: (height, width) of its pictures in pixels.

        Raises:
            ValueError: the processor refuses it.
        """
        if sizes and sizes not in self._of_pictures:
            self._of_pictures[sizes] = self._tokens_of_pictures(sizes)
        return len(self._ids(self._rendered(sample.messages))) + (self._of_pictures[sizes] if sizes else 0)

    def _tokens_of_pictures(self, sizes: tuple[tuple[int, int], ...]) -> int:
        """What pictures of these sizes add to the tokens of their text."""
        question = [*({"type": "image"} for _ in sizes), {"type": "text", "text": "?"}]
        answer = [{"type": "text", "text": "."}]
        text = self._rendered([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        blank = [Image.new("RGB", (width, height)) for height, width in sizes]
        inputs = self._processor(images=[blank], text=[text], add_special_tokens=False, return_tensors="pt")
        return int(inputs["input_ids"].shape[1]) - len(self._ids(text))

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        return self._processor.apply_chat_template(messages, tokenize=False)

    def _ids(self, text: str) -> list[int]:
        return self._processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def student_lengths(
    counter: StudentCounter, samples: Sequence[Sample], sizes: Sequence[tuple[tuple[int, int], ...] | None]
) -> tuple[list[int], list[Dropped]]:
    """The tokens of each sample whose pictures are known, and the samples that the processor refuses."""
    lengths: list[int] = []
    refused: list[Dropped] = []
    for sample, of in zip(samples, sizes, strict=True):
        if of is None:
            continue
        try:
            lengths.append(counter.tokens(sample, of))
        except Exception as error:  # a processor may raise anything on a picture of an odd shape
            refused.append(Dropped(sample.name, f"the student's processor refuses it: {one_line(error)}"))
    return lengths, refused
