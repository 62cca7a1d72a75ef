"""What a model refuses in a sample, told from its text and the headers of its pictures, before anything is computed."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from lavender.data.conversations import text_of
from lavender.data.images import picture_size
from lavender.errors import ConfigError, DataError
from lavender.students.base import VlmAdapter

HOLDS_TOKEN = "sample whose text holds the model's own token for a picture"
TEMPLATE = "sample that the chat template refuses"
UNREADABLE = "sample whose picture cannot be read"
SIZE = "sample whose picture has a size that the model refuses"
CUT = "sample whose picture max_length cuts"
REFUSED = "sample that the model's processor refuses"
REFUSALS = (HOLDS_TOKEN, TEMPLATE, UNREADABLE, SIZE, CUT, REFUSED)
"""Why a sample cannot be trained on."""

_SHOWN_TEXT = 60  # characters
_LONG, _SHORT = 20, 32  # pictures longer than this ratio, or with a shorter side in pixels, are tried
_MARGIN = 16  # tokens by which the estimate of a sample's length may be wrong


class SampleError(DataError):
    """One sample cannot be used; `reason` is one of `REFUSALS`."""

    def __init__(self, got: str, expected: str | None = None, do: str | None = None, *, reason: str = REFUSED):
        super().__init__(got, expected, do)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.got, self.expected, self.do), {"reason": self.reason}


class Screen:
    """Says what a model will refuse, at the cost of rendering a template: no picture is decoded.

    Args:
        template: the chat template, where it is not the processor's own.
        max_length: where sequences are cut, in tokens.

    Raises:
        ConfigError: there is no chat template.
    """

    def __init__(
        self, processor: ProcessorMixin, adapter: VlmAdapter, template: str | None = None, max_length: int | None = None
    ):
        own = template or getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
        if not own:
            raise ConfigError(
                "a processor without a chat template, as base models have",
                "one that renders conversations",
                "take the instruction-tuned model, or set processor.chat_template",
            )
        self._processor, self._template, self._max_length = processor, template, max_length
        token = processor.tokenizer.convert_ids_to_tokens(adapter.image_token_id())
        named = [getattr(processor, name, None) for name in ("image_token", "video_token", "boi_token")]
        self._tokens = sorted({one for one in (token, *named) if isinstance(one, str) and one})
        self._placeholder = next((one for one in named[:1] if one), token)
        self._size_fault = cache(self._tried)
        self._num_tokens = cache(self._counted)

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise SampleError for what is refused; DataError where the data set is of another kind altogether."""
        images, name = images_of(example), describe(example)
        self._rendered(self.messages(dict(example) | {"images": [_BLANK] * len(images)}, name), name)
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
        """Whether `max_length` may cut a picture of a sample that `check` has passed: to be tried in full."""
        images = images_of(example)
        if self._max_length is None or not images:
            return False
        rendered = self._rendered(messages_of(dict(example) | {"images": [_BLANK] * len(images)}), "the sample")
        end = rendered.rfind(self._placeholder) + len(self._placeholder)
        before = self._processor.tokenizer(rendered[:end], add_special_tokens=False)
        pictures = sum(self._num_tokens(*picture_size(image, "its picture")) for image in images)
        return len(before["input_ids"]) + pictures + _MARGIN > self._max_length

    def messages(self, example: Mapping[str, Any], name: str) -> list[dict]:
        """`messages_of`, without a text that the model would take for a picture."""
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
        except Exception as error:  # a template may raise whatever it likes
            raise SampleError(
                f"{name}, which the chat template refuses: {line_of(error)}",
                "turns as the template wants them",
                "change their roles or order, or leave the sample out",
                reason=TEMPLATE,
            ) from error

    def _counted(self, height: int, width: int) -> int:
        """How many tokens a picture takes in the sequence."""
        try:
            processor: Any = self._processor
            counted = processor._get_num_multimodal_tokens(image_sizes=[[height, width]])
            return int(counted.num_image_tokens[0])
        except Exception:  # some families cannot say; then the picture itself
            conversation: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
            text = self._processor.apply_chat_template(conversation, chat_template=self._template, tokenize=False)
            blank = Image.new("RGB", (width, height))
            inputs = self._processor(images=[[blank]], text=[text], add_special_tokens=False, return_tensors="pt")
            return inputs["input_ids"].shape[1]

    def _tried(self, height: int, width: int) -> str | None:
        """What the image processor says to a blank picture of this size; None if it takes it."""
        if self._fault_of(224, 224) is not None:
            return None  # it wants to be called in another way: the collator will find out
        return self._fault_of(height, width)

    def _fault_of(self, height: int, width: int) -> str | None:
        try:
            self._processor.image_processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")
        except Exception as error:
            return line_of(error)
        return None


_BLANK = Image.new("RGB", (8, 8))


def images_of(example: Mapping[str, Any]) -> list[Any]:
    """A sample's pictures as they came; [] where there are none."""
    images = [example["image"]] if "image" in example else example.get("images") or []
    return [one for one in images if one is not None]


def messages_of(example: Mapping[str, Any]) -> list[dict]:
    """The conversation with its picture parts, as TRL renders it. `images` are in the example.

    Raises:
        DataError: there are no `messages`.
        SampleError: they are not what TRL and transformers know, or have other places than pictures.
    """
    if "messages" not in example:
        raise DataError(
            f"an example with the columns {sorted(example)}",
            "`images` and `messages`",
            "convert it with lavender.data.read_samples and to_dataset",
        )
    images = example["images"]
    try:
        places = sum(part["type"] == "image" for one in example["messages"] for part in _parts(one))
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


def describe(example: Mapping[str, Any]) -> str:
    """A sample's name for a person: how its answer begins, and its pictures."""
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
    return textwrap.shorten(" ".join(str(error).split()), 300, placeholder=" …").rstrip(".") or type(error).__name__
