"""Capture: attention on the words of a text, averaged over the tokens of each word (Eq. 13–14).

The attention is read with an indicator as its values. With E (tokens × words) holding 1/n at the n tokens of a word,
softmax(QKᵀ/√d)·E is the word's mean attention. One more call of the same fused kernel gives the maps, and the softmax
itself is never materialised.

Axis suffixes: B batch row, H head, C cell (query of the image), K key, T text token, W word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lavender.errors import CaptureError
from lavender.teachers.diffusion.base import Layer

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class StopForward(Exception):
    """Raised inside the backbone after the last layer that is read; never leaves the capture's context."""


class _AttentionWatch(TorchFunctionMode):
    """Calls `on_attention` with the first attention call of each marked module."""

    def __init__(self, on_attention: Callable[[Layer, Tensor, Tensor, dict], None]):
        super().__init__()
        self._on_attention = on_attention
        self.current: Layer | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self.current is not None:
            layer, self.current = self.current, None
            given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs  # processors pass them by position or by name
            self._on_attention(layer, given["query"], given["key"], given)
        return output


class WordCapture:
    """What is read in one forward of a backbone.

    Args:
        layers: the layers whose attention on the words is read, in the order in which they run.
        indicator_BTW: (row, token, word); 1/n at the n tokens of a word, else 0.
        num_text_keys: how many keys the text has in a layer; the first of them are the indicator's tokens.
        on_maps: called per layer with its attention on the words, float32 (row, head, cell, word).
        image_layers: layers whose queries and keys of the image are kept in `image_attention`.

    Attributes:
        image_attention: per layer name, the image's (queries, keys), each (row, head, cell, width).
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        indicator_BTW: Tensor,
        num_text_keys: int,
        on_maps: Callable[[Layer, Tensor], None],
        image_layers: Sequence[Layer] = (),
    ):
        self.layers, self.image_layers = tuple(layers), tuple(image_layers)
        self._indicator, self._num_text_keys, self._on_maps = indicator_BTW, num_text_keys, on_maps
        self.image_attention: dict[str, tuple[Tensor, Tensor]] = {}
        self._missing = {layer.name for layer in (*layers, *image_layers)}

    def on_attention(self, layer: Layer, query_BHKD: Tensor, key_BHKD: Tensor, options: dict) -> None:
        """Read one attention call.

        Args:
            layer: the layer that made it.
            query_BHKD, key_BHKD: (row, head, query or key, width).
            options: the call's further arguments, by name.

        Raises:
            CaptureError: the number of image queries is not that of the layer's grid.
        """
        cells = layer.grid[0] * layer.grid[1]
        num_text = self._num_text_keys if layer.joint else 0
        image_queries = query_BHKD.shape[2] - num_text
        if image_queries != cells:
            raise CaptureError(
                f"{image_queries} image queries in layer {layer.name!r}",
                f"{cells}, a grid of {layer.grid}",
                "report this model: its resolutions are not those of its family",
            )
        first = num_text if layer.text_first else 0
        image = slice(first, first + cells)
        query_BHCD = query_BHKD[:, :, image]
        if layer.name in {image_layer.name for image_layer in self.image_layers}:
            self.image_attention[layer.name] = query_BHCD, key_BHKD[:, :, image]
        if layer.name in {word_layer.name for word_layer in self.layers}:
            before = cells if layer.joint and not layer.text_first else 0
            self._on_maps(layer, self._word_attention(query_BHCD, key_BHKD, before, options))
        self._missing.discard(layer.name)

    @property
    def missing(self) -> list[str]:
        """Names of the layers that have not run yet."""
        return sorted(self._missing)

    def _word_attention(self, query_BHCD: Tensor, key_BHKD: Tensor, before: int, options: dict) -> Tensor:
        """softmax(QKᵀ/√d)·E over all keys, the text's keys starting at `before`: float32 (row, head, cell, word)."""
        heads, width = query_BHCD.shape[1], query_BHCD.shape[-1]
        tokens, words = self._indicator.shape[1:]
        after = key_BHKD.shape[2] - before - tokens
        # values as wide as the queries keep the call on the fused kernels
        indicator = F.pad(self._indicator.to(query_BHCD.dtype), (0, -words % width, before, after))
        options = {name: options[name] for name in ("attn_mask", "scale") if name in options}
        chunks = [
            F.scaled_dot_product_attention(query_BHCD, key_BHKD, chunk[:, None].expand(-1, heads, -1, -1), **options)
            for chunk in indicator.split(width, dim=-1)
        ]
        # torch.cat copies, and most texts have fewer words than a head is wide
        maps_BHCW = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-1)
        return maps_BHCW[..., :words].float()


@contextlib.contextmanager
def capture_words(capture: WordCapture, stop: bool = False) -> Iterator[None]:
    """Inside the block, one forward of the backbone fills the capture.

    The backbone's outputs are unchanged to the bit. The backbone is restored afterwards, also after an exception.

    Args:
        stop: leave the block after the last layer that is read; the forward then gives no output.

    Raises:
        CaptureError: a layer did not call torch's attention (another kernel is installed), or ran twice.
    """
    marked = {layer.name: layer for layer in (*capture.image_layers, *capture.layers)}
    waiting = set(marked)
    watch = _AttentionWatch(capture.on_attention)
    watching = contextlib.ExitStack()  # entered only while a marked layer runs: the mode slows every torch function

    def enter(layer: Layer):
        def hook(module, args):
            if layer.name not in waiting:
                raise CaptureError(
                    f"two passes through layer {layer.name!r}",
                    "one forward of the backbone per capture",
                    "open a new capture for each forward",
                )
            watch.current = layer
            watching.enter_context(watch)

        return hook

    def leave(layer: Layer):
        def hook(module, args, output):
            watch.current = None
            watching.close()
            waiting.discard(layer.name)
            if stop and not waiting:
                raise StopForward

        return hook

    handles = []
    try:
        for layer in marked.values():
            handles.append(layer.module.register_forward_pre_hook(enter(layer)))
            handles.append(layer.module.register_forward_hook(leave(layer)))
        with watching, contextlib.suppress(StopForward):
            yield
        if capture.missing:
            raise CaptureError(
                f"{len(capture.missing)} of {len(marked)} attention layers not seen, the first {capture.missing[0]!r}",
                "every layer to call torch's scaled_dot_product_attention",
                "remove custom attention processors and attention backends: load the pipeline again",
            )
    finally:
        for handle in handles:
            handle.remove()
