"""Helpers for processors that a family brings itself, since the published one does not take rendered conversations.

Such a processor is called with `images`, the pictures of each text, and `text`, conversations that the chat template
has rendered. It must:

- return `input_ids` and `attention_mask`, long (sample, token), and the model's other inputs, in a `BatchFeature`;
- have the attributes `image_processor`, `tokenizer` (a fast one) and `chat_template`, and `image_token`: what the
  template prints for a picture, unless that is the text of `VlmAdapter.image_token_id`;
- refuse texts with another number of pictures (`check_placeholders`).

A template may mark the assistant's turns with `{% generation %}`. Then TRL's `assistant_only_loss` works, and the
processor must also return what transformers needs to find the marked tokens:

- `offset_mapping` if called with `return_offsets_mapping=True`: (sample, token, 2), the characters of each token in
  the text that was tokenized;
- `text_replacement_offsets` if called with `return_text_replacement_offsets=True`: for each text a list of
  {"span": (start, end), "new_span": (start, end)}, one per placeholder that the processor replaced by another text:
  its characters in the rendered text, and those of the replacement in the tokenized text.

`tokenize` returns all of these; `check_offsets` finds a processor that does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from lavender.errors import DataError, ModelError

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\b")


def texts_and_pictures(
    images: Sequence[Sequence[Any]] | None, text: str | Sequence[str] | None
) -> tuple[list[str], list[list[Any]]]:
    """The arguments of a processor as lists: the texts, and the pictures of each. One string counts as a batch."""
    texts = [text] if isinstance(text, str) else list(text or ())
    pictures = [list(sample) for sample in images] if images is not None else [[] for _ in texts]
    return texts, pictures


def check_placeholders(
    found: Sequence[int], pictures: Sequence[Sequence[Any]], placeholder: str, cut: bool = True
) -> None:
    """Check that each text names its pictures.

    Args:
        found: number of placeholders of each text.
        pictures: pictures of each text.
        placeholder: what stands for a picture.
        cut: whether `found` was counted after `max_length` cut the texts.

    Raises:
        DataError: the numbers differ.
    """
    given = [len(sample) for sample in pictures]
    if list(found) != given:
        raise DataError(
            f"{list(found)} {placeholder} in texts of {given} pictures",
            "one for each picture",
            f"let the chat template print {placeholder} for each"
            + (", and set max_length=None if it cuts them" if cut else ""),
        )


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: Mapping[str, Any],
    replacements: list[list[dict[str, tuple[int, int]]]] | None = None,
) -> dict[str, Any]:
    """Token tensors of rendered texts, padded, without further special tokens.

    Args:
        tokenizer: the processor's.
        texts: rendered texts, with placeholders replaced.
        settings: keyword arguments of the processor's call; those of the tokenizer.
        replacements: `text_replacement_offsets`; by default no placeholder was replaced.
    """
    settings = {"add_special_tokens": False, "padding": True} | dict(settings) | {"return_tensors": "pt"}
    needs_replacements = settings.pop("return_text_replacement_offsets", False)
    encoded = tokenizer(list(texts), **settings)
    names = ["input_ids", "attention_mask", *(["offset_mapping"] if settings.get("return_offsets_mapping") else [])]
    outputs = {name: encoded[name] for name in names}
    if needs_replacements:
        outputs["text_replacement_offsets"] = [[] for _ in texts] if replacements is None else replacements
    return outputs


def replace_placeholders(
    text: str, placeholder: str, replacements: Sequence[str]
) -> tuple[str, list[dict[str, tuple[int, int]]]]:
    """Replace each placeholder of a text in turn: the new text, and its entry of `text_replacement_offsets`."""
    first, *rest = text.split(placeholder)
    written, read, spans = first, len(first), []
    for replacement, piece in zip(replacements, rest, strict=True):
        end, new_end = read + len(placeholder), len(written) + len(replacement)
        spans.append({"span": (read, end), "new_span": (len(written), new_end)})
        written, read = written + replacement + piece, end + len(piece)
    return written, spans


def check_offsets(processor: Any, rendered: str) -> None:
    """Check that a processor whose template marks the assistant's turns returns what finds their tokens.

    Args:
        processor: any processor.
        rendered: a conversation with one picture, as its chat template renders it.

    Raises:
        ModelError: `offset_mapping` is missing, or `text_replacement_offsets` of a text that the processor changed.
    """
    if not isinstance(processor.chat_template, str) or not GENERATION_MARKER.search(processor.chat_template):
        return
    offsets = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
    blank = Image.new("RGB", (64, 48))
    inputs = processor(images=[[blank]], text=[rendered], add_special_tokens=False, return_tensors="pt", **offsets)
    missing = [name for name in ("offset_mapping", "text_replacement_offsets") if name not in inputs]
    if missing == ["text_replacement_offsets"] and int(torch.as_tensor(inputs["offset_mapping"]).max()) <= len(
        rendered
    ):
        return  # the text did not grow
    if missing:
        raise ModelError(
            f"a {type(processor).__name__} that does not return {' and '.join(missing)}",
            "both, since its chat template marks the assistant's turns",
            "return them as lavender.students.chat_processor says, or take {% generation %} out of the template",
        )
