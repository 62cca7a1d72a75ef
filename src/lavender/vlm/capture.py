"""Capture of selected attention rows, with the model's own kernel untouched.

One attention function is registered with transformers. It calls the base kernel for the output, then
recomputes softmax(q·kᵀ) for the wanted rows alone. The request travels as a forward keyword argument:
a global would be gone when activation checkpointing runs the forward again inside backward.

Axis suffixes: B sample, H head, R row (a query that predicts a token), K key, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lavender.errors import CaptureError, UnsupportedModelError

BASE_KERNELS = ("sdpa",)
PARALLEL_NAME = "alignment_parallel"  # the child of an attention module that holds its parallel projections


class AttentionRequest:
    """Which rows of which layers are wanted, and what was captured.

    A plain class on purpose: mixed-precision wrappers copy dicts and dataclasses, and the captures
    would land in the copy.

    Attributes:
        rows_BR: long (sample, row), the query positions; padded with 0.
        layers: indices of decoder layers.
        keys_BK: long (sample, key), the picture's keys in the sequence of a self-attending layer, ascending, then
            0 where a sample has fewer; None where a layer attends to the picture alone.
        rows: layer → attention (sample, head, row, key): softmax over all of the layer's keys, of which
            the picture's are kept, and 0 at padding of keys.
        learned: whether a layer's parallel projections, where it has them, answer instead of the layer.
    """

    learned: ClassVar[bool] = False

    def __init__(self, rows_BR: Tensor, layers: Sequence[int], keys_BK: Tensor | None = None):
        self.rows_BR, self.layers, self.keys_BK = rows_BR, tuple(layers), keys_BK
        self.rows: dict[int, Tensor] = {}

    def answered_by_parallel(self, module: nn.Module) -> bool:
        """Whether a layer's rows come from its parallel projections (Eq. 15) and not from the layer itself."""
        return self.learned and PARALLEL_NAME in dict(module.named_children())

    def capture(self, module: nn.Module, query_BHTD: Tensor, key_BGKD: Tensor, mask: Tensor | None, scaling: float):
        """Take a layer's queries and keys, all of them; called inside its forward."""
        self.capture_rows(module, select_rows(query_BHTD, self.rows_BR), key_BGKD, mask, scaling)

    def capture_rows(
        self, module: nn.Module, query_BHRD: Tensor, key_BGKD: Tensor, mask: Tensor | None, scaling: float
    ):
        """Take a layer's queries of the wanted rows.

        Checkpointing runs the layer again during backward. Then the same must be computed again, but
        the first capture is kept: it is the one in the graph.
        """
        layer = cast(int, module.layer_idx)
        mask = self._mask_of_rows(mask, layer, query_BHRD.shape[0], key_BGKD.shape[2])
        rows = attention_rows(query_BHRD, key_BGKD, mask, scaling)
        if self.keys_BK is not None:
            index = self.keys_BK.to(rows.device)[:, None, None]
            padding = ~real_keys(self.keys_BK).to(rows.device)[:, None, None]
            rows = rows.gather(3, index.expand(-1, *rows.shape[1:3], -1)).masked_fill(padding, 0)
        self.rows.setdefault(layer, rows)

    def _mask_of_rows(self, mask: Tensor | None, layer: int, samples: int, keys: int) -> Tensor:
        """The wanted rows of a layer's mask: (sample, 1, row, key)."""
        if mask is not None:
            return select_rows(mask.expand(samples, -1, -1, -1), self.rows_BR)[..., :keys]
        if self.keys_BK is None:
            raise CaptureError(
                f"no attention mask in layer {layer}",
                "the mask the processor makes (cross_attention_mask for Mllama)",
                "pass everything the processor returns to the model",
            )
        # a self-attending layer whose batch has no padding: the kernel was told "causal" instead
        return torch.arange(keys, device=self.rows_BR.device) <= self.rows_BR[:, None, :, None]

    def stacked(self) -> Tensor:
        """All layers' rows: (layer, sample, head, row, key). Raises CaptureError if one is missing."""
        missing = [layer for layer in self.layers if layer not in self.rows]
        if missing:
            raise CaptureError(
                f"no attention from layers {missing}",
                "a capture from every requested layer",
                "check that the batch has pictures and that nothing else replaces the model's attention",
            )
        return torch.stack([self.rows[layer] for layer in self.layers])


def attention_rows(query_BHRD: Tensor, key_BGKD: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(q·kᵀ·scaling + mask), fp32 (sample, head, row, key).

    Grouped-query attention groups the queries; keys are never repeated.
    """
    heads, groups = query_BHRD.shape[1], key_BGKD.shape[1]
    query = query_BHRD.unflatten(1, (groups, heads // groups))
    scores = torch.einsum("bgsrd,bgkd->bgsrk", query.float(), key_BGKD.float()).flatten(1, 2) * scaling
    if mask is not None:
        # the least number and not -inf: a row of padding sees nothing, and must not become NaN
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(dim=-1)


def real_keys(keys_BK: Tensor) -> Tensor:
    """Which keys are a picture's, bool (sample, key): a 0 after the first is padding."""
    real = keys_BK > 0
    real[:, 0] = True
    return real


def select_rows(tensor_BHTD: Tensor, rows_BR: Tensor) -> Tensor:
    """The chosen rows of each sample: (sample, head, token, width) → (sample, head, row, width)."""
    index = rows_BR.to(tensor_BHTD.device)[:, None, :, None]
    return tensor_BHTD.gather(2, index.expand(-1, tensor_BHTD.shape[1], -1, tensor_BHTD.shape[-1]))


def _capturing(base: str):
    def attention(module: nn.Module, query, key, value, attention_mask, attention_request=None, **kwargs):
        output = ALL_ATTENTION_FUNCTIONS[base](module, query, key, value, attention_mask, **kwargs)
        request = attention_request
        if request is not None and module.layer_idx in request.layers and not request.answered_by_parallel(module):
            request.capture(module, query, key, attention_mask, kwargs["scaling"])
        return output

    return attention


def kernel_name(base: str) -> str:
    """The name our capturing version of a kernel is registered under."""
    return f"lavender_{base}"


def install(model: PreTrainedModel) -> str:
    """Let a model's language layers use the capturing kernel; the name of the kernel they used before.

    Give that name to `set_kernel` to undo it. Logits do not change to the bit: the base kernel still
    makes the output.
    """
    base = model.config.get_text_config()._attn_implementation
    if base in {kernel_name(one) for one in BASE_KERNELS}:
        return base
    if base not in BASE_KERNELS:
        raise UnsupportedModelError(
            f"attn_implementation={base!r}",
            f"one of {BASE_KERNELS}",
            "load the model with attn_implementation='sdpa'",
        )
    set_kernel(model, kernel_name(base))
    return base


def set_kernel(model: PreTrainedModel, name: str) -> None:
    """Set the attention kernel of the language layers alone, and check that it took."""
    model.set_attn_implementation({"text_config": name})
    if model.config.get_text_config()._attn_implementation != name:
        raise CaptureError(
            f"attn_implementation={model.config.get_text_config()._attn_implementation!r} after setting it",
            repr(name),
            "report this model class",
        )


# both registries, or masks vanish silently: the mask's form follows the kernel's name
for _base in BASE_KERNELS:
    AttentionInterface.register(kernel_name(_base), _capturing(_base))
    AttentionMaskInterface.register(kernel_name(_base), ALL_MASK_ATTENTION_FUNCTIONS[_base])
