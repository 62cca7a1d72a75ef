"""Capture of attention on the words of a text, averaged over the tokens of each word (Eq. 13–14).

The trick: attention with an indicator as its values. With E (tokens × words) holding 1/n at the n
tokens of a word, softmax(QKᵀ/√d)·E is the word's mean attention, so one more call of the same fused
kernel gives the maps and the softmax itself is never materialised.

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

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class _Enough(Exception):
    """Raised inside the backbone after the last wanted layer; never leaves `capture_words`."""


class _Watch(TorchFunctionMode):
    """Shows the attention calls of marked modules to `seen`."""

    def __init__(self, seen: Callable[[Layer, Tensor, Tensor, dict], None]):
        super().__init__()
        self._seen = seen
        self.current: Layer | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self.current is not None:
            layer, self.current = self.current, None
            given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs  # by place or by name, as the processor likes
            self._seen(layer, given["query"], given["key"], given)
        return output


class WordCapture:
    """What one pass of a backbone shows of the words.

    Args:
        layers: the wanted layers, in the order in which they run.
        indicator_BTW: (row, token, word); 1/n at the n tokens of a word, else 0.
        num_text_keys: how many keys the text has in a layer; the indicator's tokens are the first of them.
        take: called with a layer and its words' attention, fp32 (row, head, cell, word).
        watched: layers whose queries and keys on the image are kept in `image_attention`.

    Attributes:
        image_attention: layer name → (queries, keys) of the image, (row, head, cell, width).
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        indicator_BTW: Tensor,
        num_text_keys: int,
        take: Callable[[Layer, Tensor], None],
        watched: Sequence[Layer] = (),
    ):
        self.layers, self.watched = tuple(layers), tuple(watched)
        self._indicator, self._num_text_keys, self._take = indicator_BTW, num_text_keys, take
        self.image_attention: dict[str, tuple[Tensor, Tensor]] = {}
        self._missing = {layer.name for layer in (*layers, *watched)}

    def see(self, layer: Layer, query_BHKD: Tensor, key_BHKD: Tensor, options: dict) -> None:
        """An attention call of a marked layer."""
        cells = layer.grid[0] * layer.grid[1]
        found = query_BHKD.shape[2] - (self._num_text_keys if layer.joint else 0)
        if found != cells:
            raise CaptureError(
                f"{found} image queries in layer {layer.name!r}",
                f"{cells}, a grid of {layer.grid}",
                "report this model: its resolutions are not those of its family",
            )
        query_BHCD = query_BHKD[:, :, :cells]
        if layer.name in {one.name for one in self.watched}:
            self.image_attention[layer.name] = query_BHCD, key_BHKD[:, :, :cells]
        if layer.name in {one.name for one in self.layers}:
            before = cells if layer.joint else 0
            self._take(layer, self._word_attention(query_BHCD, key_BHKD, before, options))
        self._missing.discard(layer.name)

    @property
    def missing(self) -> list[str]:
        """Layers that were not seen yet."""
        return sorted(self._missing)

    def _word_attention(self, query_BHCD: Tensor, key_BHKD: Tensor, before: int, options: dict) -> Tensor:
        """softmax(QKᵀ/√d)·E over all keys, of which the text's begin at `before`: fp32 (row, head, cell, word)."""
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
        # joining copies, and most texts have fewer words than a head is wide
        maps_BHCW = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-1)
        return maps_BHCW[..., :words].float()


@contextlib.contextmanager
def capture_words(capture: WordCapture, stop: bool = False) -> Iterator[None]:
    """Inside, one forward of the backbone fills the capture.

    The backbone's outputs are unchanged to the bit, and it is left as it was, also after an exception.

    Args:
        stop: leave the block after the last wanted layer has run; the backbone then has no output.

    Raises:
        CaptureError: a layer was not seen (another attention kernel is installed), or ran twice.
    """
    marked = {layer.name: layer for layer in (*capture.watched, *capture.layers)}
    left = set(marked)
    watch = _Watch(capture.see)
    watching = contextlib.ExitStack()  # only while a marked layer runs: the mode slows every function of torch

    def enter(layer: Layer):
        def hook(module, args):
            if layer.name not in left:
                raise CaptureError(
                    f"two passes through layer {layer.name!r}",
                    "one forward of the backbone a capture",
                    "open a new capture for each forward",
                )
            watch.current = layer
            watching.enter_context(watch)

        return hook

    def leave(layer: Layer):
        def hook(module, args, output):
            watch.current = None
            watching.close()
            left.discard(layer.name)
            if stop and not left:
                raise _Enough

        return hook

    handles = []
    try:
        for layer in marked.values():
            handles.append(layer.module.register_forward_pre_hook(enter(layer)))
            handles.append(layer.module.register_forward_hook(leave(layer)))
        with watching, contextlib.suppress(_Enough):
            yield
        if capture.missing:
            raise CaptureError(
                f"{len(capture.missing)} of {len(marked)} attention layers not seen, the first {capture.missing[0]!r}",
                "every layer to call torch's scaled_dot_product_attention",
                "remove custom attention processors: set_default_attn_processor()",
            )
    finally:
        for handle in handles:
            handle.remove()
