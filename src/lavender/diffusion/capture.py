"""Capture of a UNet's cross-attention, averaged over the tokens of each word (Eq. 13–14).

The trick: attention with an indicator as its values. With E (tokens × words) holding 1/n at the n
tokens of a word, softmax(QKᵀ/√d)·E is the word's mean attention, so one more call of the same fused
kernel gives the maps and the softmax itself is never materialised.

Axis suffixes: B batch row, H head, C cell (query of the UNet), T text token, W word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lavender.errors import CaptureError


class WordCapture(TorchFunctionMode):
    """Watches the attention calls of marked modules. Use it through `capture_words`."""

    def __init__(self, indicator_BTW: Tensor):
        super().__init__()
        self._indicator = indicator_BTW
        self.current: str | None = None
        self.maps: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self.current is not None:
            query, key = args[0], args[1]
            if self.current in self.maps:
                raise CaptureError(
                    f"two attention calls in layer {self.current!r} during one pass",
                    "one call a cross-attention layer",
                    "open a new capture for each call of the UNet",
                )
            self.maps[self.current] = self._word_attention(query, key, kwargs)
        return output

    def _word_attention(self, query_BHCD: Tensor, key_BHTD: Tensor, kwargs: dict) -> Tensor:
        """Mean over heads of softmax(QKᵀ/√d)·E, fp32 (B, C, W)."""
        heads, width = query_BHCD.shape[1], query_BHCD.shape[-1]
        words = self._indicator.shape[-1]
        # values as wide as the queries keep the call on the fused kernels
        indicator = F.pad(self._indicator.to(query_BHCD.dtype), (0, -words % width))[:, None].expand(-1, heads, -1, -1)
        options = {name: kwargs[name] for name in ("attn_mask", "scale") if name in kwargs}
        chunks = [
            F.scaled_dot_product_attention(query_BHCD, key_BHTD, chunk, **options).float().mean(dim=1)
            for chunk in indicator.split(width, dim=-1)
        ]
        return torch.cat(chunks, dim=-1)[..., :words]


@contextlib.contextmanager
def capture_words(unet: UNet2DConditionModel, indicator_BTW: Tensor) -> Iterator[dict[str, Tensor]]:
    """Inside, one call of `unet` fills the yielded dict: layer name → (row, cell, word), fp32.

    The UNet's outputs are unchanged to the bit, and it is left as it was, also after an exception.

    Args:
        unet: any UNet2DConditionModel whose attention runs through `scaled_dot_product_attention`.
        indicator_BTW: (row, token, word); 1/n at the n tokens of a word, else 0.

    Raises:
        CaptureError: a cross-attention layer was not seen (another attention kernel is installed).
    """
    layers = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and module.is_cross_attention
    }
    if not layers:
        raise CaptureError(
            f"a {type(unet).__name__} without cross-attention", "a text-conditioned UNet", "choose another teacher"
        )
    recorder = WordCapture(indicator_BTW)

    def enter(name: str):
        def hook(module, args):
            recorder.current = name

        return hook

    def leave(module, args, output):
        recorder.current = None

    handles = []
    try:
        for name, module in layers.items():
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        with recorder:
            yield recorder.maps
        missing = [name for name in layers if name not in recorder.maps]
        if missing:
            raise CaptureError(
                f"{len(missing)} of {len(layers)} cross-attention layers not seen, the first {missing[0]!r}",
                "every layer to call torch's scaled_dot_product_attention",
                "remove custom attention processors: unet.set_default_attn_processor()",
            )
    finally:
        for handle in handles:
            handle.remove()


def layer_grid(cells: int, height: int, width: int) -> tuple[int, int]:
    """(rows, cols) of a layer that sees `cells` positions of a latent of (height, width).

    Follows the UNet's own halving (rounding up), so non-square latents come out right.
    """
    rows, cols = height, width
    while rows * cols > cells:
        rows, cols = (rows + 1) // 2, (cols + 1) // 2
    if rows * cols != cells:
        raise CaptureError(
            f"a layer with {cells} cells on a {height}×{width} latent",
            "a layer reached by halving",
            "report this UNet: its resolutions are not powers of two apart",
        )
    return rows, cols
