"""Which samples a model refuses, found from their text and the headers of their pictures, without decoding them."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from lavender.data.about import Link, entries_of, links_of
from lavender.data.conversations import UnusableError, text_of
from lavender.data.images import picture_size
from lavender.errors import ConfigError, DataError
from lavender.students.base import VlmAdapter

HOLDS_TOKEN = "sample whose text holds the model's own token for a picture"
TEMPLATE = "sample that the chat template refuses"
UNREADABLE = "sample whose picture cannot be read"
SIZE = "sample whose picture has a size that the model refuses"
CUT = "sample whose picture max_length cuts"
REFUSED = "sample that the model's processor refuses"
ABOUT = "sample whose column about does not fit its texts"
REFUSALS = (HOLDS_TOKEN, TEMPLATE, UNREADABLE, SIZE, CUT, REFUSED, ABOUT)
"""Reasons why the model refuses a sample."""

_SHOWN_TEXT = 60  # characters
_LONG, _SHORT = 20, 32  # pictures with a larger aspect ratio, or a shorter side in pixels, are processed to test them
_MARGIN = 16  # possible error of the estimated length, in tokens
_MARKERS = 4  # the most tokens around a picture that its number does not count


class SampleError(DataError):
    """One sample cannot be used; `reason` is one of `REFUSALS`."""

    def __init__(self, got: str, expected: str | None = None, do: str | None = None, *, reason: str = REFUSED):
        super().__init__(got, expected, do)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.got, self.expected, self.do), {"reason": self.reason}


class Screen:
    """Finds the samples that a model will refuse. It renders the chat template; no picture is decoded.

    Args:
        template: the chat template, if it is not the processor's.
        max_length: length to which sequences are cut, in tokens; None for no cut.

    Raises:
        ConfigError: there is no chat template.
    """

    def __init__(
        self, processor: ProcessorMixin, adapter: VlmAdapter, template: str | None = None, max_length: int | None = None
    ):
        if not (template or getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
            raise ConfigError(
                "a processor without a chat template, as base models have",
                "one that renders conversations",
                "take the instruction-tuned model, or set processor.chat_template",
            )
        self._processor, self._adapter, self._template, self._max_length = processor, adapter, template, max_length
        token = processor.tokenizer.convert_ids_to_tokens(adapter.image_token_id())
        named = [getattr(processor, name, None) for name in ("image_token", "video_token", "boi_token")]
        self._tokens = sorted({name for name in (token, *named) if isinstance(name, str) and name})
        self._placeholder = named[0] or token
        self._size_fault = cache(self._fault_of_size)
        self._num_tokens = cache(self._counted)

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise SampleError if the model refuses the sample, DataError if the whole data set cannot be used."""
        images, name = images_of(example), describe(example)
        messages = self.messages(dict(example) | {"images": [_BLANK] * len(images)}, name)
        self._rendered(messages, name)
        links_in(example, messages, name)
        for image in images:
            try:
                height, width = picture_size(image, f"{name}: its picture")
            except DataError as error:
                raise SampleError(error.got, error.expected, error.do, reason=UNREADABLE) from error
            is_odd = max(height, width) > _LONG * min(height, width) or min(height, width) < _SHORT
            fault = self._size_fault(height, width) if is_odd else None
            if fault is not None:
                raise SampleError(
                    f"{name}, with a picture of {width} × {height} pixels: {fault}",
                    "a size that the model's image processor takes",
                    "crop it, or leave the sample out",
                    reason=SIZE,
                )

    def is_long(self, example: Mapping[str, Any]) -> bool:
        """Whether `max_length` may cut a picture of a checked sample, so that it must be processed in full."""
        images = images_of(example)
        if self._max_length is None or not images:
            return False
        rendered = self._rendered(messages_of(dict(example) | {"images": [_BLANK] * len(images)}), "the sample")
        end = rendered.rfind(self._placeholder) + len(self._placeholder)
        before = self._processor.tokenizer(rendered[:end], add_special_tokens=False)
        pictures = sum(self._num_tokens(*picture_size(image, "its picture")) for image in images)
        return len(before["input_ids"]) + pictures + _MARKERS * len(images) + _MARGIN > self._max_length

    def messages(self, example: Mapping[str, Any], name: str) -> list[dict]:
        """`messages_of`; raises SampleError for a text that contains the model's image token."""
        messages = messages_of(example)
        for text in (text_of(message.get("content")) for message in messages):
            held = [token for token in self._tokens if token in text]
            if held:
                raise SampleError(
                    f"{name}, whose text holds {held[0]!r}, the model's token for a picture",
                    "pictures beside the text",
                    "take it out of the text, or put a part {'type': 'image'} there",
                    reason=HOLDS_TOKEN,
                )
        return messages

    def _rendered(self, messages: list[dict], name: str) -> str:
        conversation: list[Any] = messages
        try:
            return self._processor.apply_chat_template(conversation, chat_template=self._template, tokenize=False)
        except Exception as error:  # a template may raise any type
            raise SampleError(
                f"{name}, which the chat template refuses: {line_of(error)}",
                "turns as the template wants them",
                "change their roles or order, or leave the sample out",
                reason=TEMPLATE,
            ) from error

    def _counted(self, height: int, width: int) -> int:
        """Number of tokens of a picture in the sequence."""
        processor: Any = self._processor
        if self._adapter.counts_tokens(processor):
            with contextlib.suppress(Exception):  # some families cannot tell
                counted = processor._get_num_multimodal_tokens(image_sizes=[[height, width]])
                return int(counted.num_image_tokens[0])
        conversation: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
        text = processor.apply_chat_template(conversation, chat_template=self._template, tokenize=False)
        blank = Image.new("RGB", (width, height))
        inputs = processor(images=[[blank]], text=[text], add_special_tokens=False, return_tensors="pt")
        return inputs["input_ids"].shape[1]

    def _fault_of_size(self, height: int, width: int) -> str | None:
        """The image processor's error for a blank picture of this size; None if it accepts it."""
        if self._fault_of(224, 224) is not None:
            return None  # it must be called in another way; the collator will find the fault
        return self._fault_of(height, width)

    def _fault_of(self, height: int, width: int) -> str | None:
        try:
            self._processor.image_processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")
        except Exception as error:
            return line_of(error)
        return None


_BLANK = Image.new("RGB", (8, 8))


def images_of(example: Mapping[str, Any]) -> list[Any]:
    """A sample's pictures, not loaded; [] if it has none."""
    images = [example["image"]] if "image" in example else example.get("images") or []
    return [image for image in images if image is not None]


def messages_of(example: Mapping[str, Any]) -> list[dict]:
    """The conversation with its picture parts, as TRL renders it. The example must have `images`.

    Raises:
        DataError: there are no `messages`.
        SampleError: the messages have another form than TRL and transformers know, or another number of pictures.
    """
    if "messages" not in example:
        raise DataError(
            f"an example with the columns {sorted(example)}",
            "`images` and `messages`",
            "convert it with lavender.data.read_samples and to_dataset",
        )
    images = example["images"]
    try:
        places = sum(part["type"] == "image" for message in example["messages"] for part in _parts(message))
        return prepare_multimodal_messages(example["messages"], images=images)
    except ValueError as error:
        if places == len(images):
            raise SampleError(
                f"{describe(example)}: {line_of(error)}",
                "turns of user, assistant, system and tool",
                "rename the roles, or leave the sample out",
                reason=TEMPLATE,
            ) from error
        raise SampleError(
            f"{describe(example)}, messages with {places} place{'' if places == 1 else 's'} for a picture, and "
            f"{len(images)} pictures",
            "a place for each picture",
            "put a part {'type': 'image'} where each picture belongs, or leave the content plain text",
        ) from error
    except (AttributeError, KeyError, TypeError) as error:
        raise SampleError(
            f"{describe(example)}, whose messages are no conversation: {type(error).__name__} {line_of(error)}",
            "a list of {'role': …, 'content': text or parts}",
            "repair it, or leave the sample out",
            reason=TEMPLATE,
        ) from error


def links_in(example: Mapping[str, Any], messages: list[dict], name: str) -> list[Link]:
    """The example's words that are about others, from its column `about`. Raises SampleError if it does not fit."""
    try:
        return links_of(entries_of(example.get("about")), messages)
    except UnusableError as error:
        raise SampleError(
            f"{name}: {error}",
            "words that are in the conversation",
            "correct its column about, or leave the sample out",
            reason=ABOUT,
        ) from error


def describe(example: Mapping[str, Any]) -> str:
    """A name by which a user finds a sample: the beginning of its answer, and its pictures."""
    try:
        texts = [text for message in example["messages"] if (text := text_of(message.get("content")))]
    except (AttributeError, KeyError, TypeError):
        texts = []
    text = textwrap.shorten(" ".join(texts[-1:]), _SHOWN_TEXT, placeholder=" …")
    return f"the sample {text!r} with {', '.join(map(_picture, images_of(example))) or 'no picture'}"


def _picture(image: Any) -> str:
    path = image.get("path") if isinstance(image, Mapping) else getattr(image, "filename", None) or image
    if isinstance(path, (str, Path)):
        return f"the picture {path}"
    return f"a picture of {image.width} × {image.height} pixels" if isinstance(image, Image.Image) else "a picture"


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [] if content is None or isinstance(content, str) else list(content)


def line_of(error: Exception) -> str:
    """An error's message as one line of at most 300 characters, or its type."""
    return textwrap.shorten(" ".join(str(error).split()), 300, placeholder=" …").rstrip(".") or type(error).__name__
