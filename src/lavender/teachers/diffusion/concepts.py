"""Concept vectors: where the outputs of attention at an image cell and at a word agree (ConceptAttention, 2025).

Each word is a token in a side stream that goes through the text's half of every joint block. It attends to the image
and to the text's other words; neither image nor text attends to it. In a block that is read, a word's map is the dot
product of its attention output with that of each image cell, over all heads.

The paper encodes each concept by itself. Here a word's token is the mean of its tokens in the text, so each occurrence
has its own.

Axis suffixes: B batch row, H head, C cell, K key, T text token, N word, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lavender.errors import CaptureError
from lavender.teachers.diffusion.base import Layer
from lavender.teachers.diffusion.capture import ARGUMENTS, StopForward


@dataclass(frozen=True)
class _ImageAttention:
    """The image's keys, values and outputs of a block's joint attention, each (B, H, C, D)."""

    key: Tensor
    value: Tensor
    output: Tensor


class _FirstAttention(TorchFunctionMode):
    """Hands the first attention call to a function; later calls run as they are."""

    def __init__(self, handle: Callable[[Callable, dict[str, Any]], Tensor]):
        super().__init__()
        self._handle, self._waiting = handle, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._waiting:
            self._waiting = False
            return self._handle(func, dict(zip(ARGUMENTS, args, strict=False)) | kwargs)
        return func(*args, **kwargs)


class ConceptCapture:
    """What is read in one forward of a backbone.

    Args:
        layers: all joint blocks up to the last one that is read, in the order in which they run.
        read: names of the blocks that are read.
        indicator_BTN: (row, token, word); 1/n at the n tokens of a word, else 0. A column of zeros is no word.
        num_text_keys: how many keys the text has; the first of them are the indicator's tokens.
        on_maps: called per block that is read with float32 (row, 1, cell, word + 1), of any sign. The last column is
            the mean over the row's words.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        read: Sequence[str],
        indicator_BTN: Tensor,
        num_text_keys: int,
        on_maps: Callable[[Layer, Tensor], None],
    ):
        self.layers, self._read = tuple(layers), frozenset(read)
        self._indicator, self._num_text_keys, self._on_maps = indicator_BTN, num_text_keys, on_maps
        self._is_word_BN = indicator_BTN.sum(dim=1) > 0
        self._concepts: Tensor | None = None
        self._image: _ImageAttention | None = None
        self.done: set[str] = set()

    def before(self, options: dict[str, Any]) -> None:
        """Take the words from the text's tokens as the first block gets them; call it before each block."""
        self._image = None
        if self._concepts is None:
            states_BTD = options["encoder_hidden_states"]
            used = self._indicator.shape[1]
            self._concepts = self._indicator.to(states_BTD.dtype).transpose(1, 2) @ states_BTD[:, :used]

    def watch(self, layer: Layer) -> _FirstAttention:
        """A mode that keeps what the block's joint attention does with the image."""

        def keep(func: Callable, given: dict[str, Any]) -> Tensor:
            output = func(**given)
            cells = layer.grid[0] * layer.grid[1]
            if output.shape[2] - self._num_text_keys != cells:
                raise CaptureError(
                    f"{output.shape[2] - self._num_text_keys} image queries in layer {layer.name!r}",
                    f"{cells}, a grid of {layer.grid}",
                    "report this model: its resolutions are not those of its family",
                )
            first = self._num_text_keys if layer.text_first else 0
            image = slice(first, first + cells)
            self._image = _ImageAttention(*(one[:, :, image] for one in (given["key"], given["value"], output)))
            return output

        return _FirstAttention(keep)

    def after(self, layer: Layer, options: dict[str, Any]) -> None:
        """Take the words through the block, and read it if asked.

        Raises:
            CaptureError: the block made no call of torch's attention.
        """
        if self._image is None or self._concepts is None:
            raise CaptureError(
                f"no attention in layer {layer.name!r}",
                "every block to call torch's scaled_dot_product_attention",
                "remove custom attention processors and attention backends: load the pipeline again",
            )
        image, found = self._image, []
        num_words = self._concepts.shape[1]
        keys_BK = F.pad(self._is_word_BN, (image.key.shape[2], 0), value=True)
        words = slice(0, num_words) if layer.text_first else slice(1, 1 + num_words)

        def attend(func: Callable, given: dict[str, Any]) -> Tensor:
            """The words attend to the image and each other; the one image token of this call has no use."""
            key, value = (
                torch.cat([seen, given[name][:, :, words]], dim=2)
                for name, seen in (("key", image.key), ("value", image.value))
            )
            scale = {"scale": given["scale"]} if "scale" in given else {}
            output = func(given["query"][:, :, words], key, value, attn_mask=keys_BK[:, None, None], **scale)
            found.append(output)
            return F.pad(output, (0, 0, 0, 1) if layer.text_first else (0, 0, 1, 0))

        with _FirstAttention(attend):
            self._concepts = layer.module.forward(**self._side_options(options))[0]
        if layer.name in self._read:
            self._on_maps(layer, self._maps(image.output, found[0]))
        self.done.add(layer.name)

    def _side_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The block's arguments with the words as its text and one token of the image."""
        assert self._concepts is not None
        side = options | {
            "encoder_hidden_states": self._concepts,
            "hidden_states": options["hidden_states"][:, :1],
        }
        if options.get("image_rotary_emb") is not None:
            # every text token has the same position
            num_words, first = self._concepts.shape[1], self._num_text_keys
            side["image_rotary_emb"] = tuple(
                torch.cat([one[:1].expand(num_words, -1), one[first : first + 1]])
                for one in options["image_rotary_emb"]
            )
        return side

    def _maps(self, image_BHCD: Tensor, words_BHND: Tensor) -> Tensor:
        dot_BCN = torch.einsum("bhcd,bhnd->bcn", image_BHCD.float(), words_BHND.float()) * self._is_word_BN[:, None]
        mean_BC1 = dot_BCN.sum(dim=-1, keepdim=True) / self._is_word_BN.sum(dim=-1)[:, None, None]
        return torch.cat([dot_BCN, mean_BC1], dim=-1)[:, None]


@contextlib.contextmanager
def capture_concepts(capture: ConceptCapture, stop: bool = False) -> Iterator[None]:
    """Inside the block, one forward of the backbone fills the capture; as `capture.capture_words`.

    Raises:
        CaptureError: a block made no call of torch's attention, ran twice or not at all.
    """
    watching = contextlib.ExitStack()

    def enter(layer: Layer):
        def hook(module, args, options):
            if layer.name in capture.done:
                raise CaptureError(
                    f"two passes through layer {layer.name!r}",
                    "one forward of the backbone per capture",
                    "open a new capture for each forward",
                )
            capture.before(options)
            watching.enter_context(capture.watch(layer))

        return hook

    def leave(layer: Layer):
        def hook(module, args, options, output):
            watching.close()
            capture.after(layer, options)
            if stop and layer is capture.layers[-1]:
                raise StopForward

        return hook

    handles = []
    try:
        for layer in capture.layers:
            handles.append(layer.module.register_forward_pre_hook(enter(layer), with_kwargs=True))
            handles.append(layer.module.register_forward_hook(leave(layer), with_kwargs=True))
        with watching, contextlib.suppress(StopForward):
            yield
        missing = [layer.name for layer in capture.layers if layer.name not in capture.done]
        if missing:
            raise CaptureError(
                f"{len(missing)} of {len(capture.layers)} blocks not run, the first {missing[0]!r}",
                "one forward of the backbone",
                "report this model: its blocks are not those of its family",
            )
    finally:
        for handle in handles:
            handle.remove()
