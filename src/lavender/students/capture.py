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
from lavender.students.rows import Heads, attention_rows, select_rows

BASE_KERNELS = ("sdpa",)
PARALLEL_NAME = "alignment_parallel"  # the child of an attention module that holds its parallel projections


class AttentionRequest:
    """Which rows of which layers are wanted, and what was captured.

    A plain class on purpose: mixed-precision wrappers copy dicts and dataclasses, and the captures
    would land in the copy.

    Attributes:
        rows_BR: long (sample, row), the query positions; padded with 0.
        layers: indices of decoder layers.
        keys_BK: long (sample, key), the pictures' keys in the sequence of a self-attending layer, ascending, then
            -1 where a sample has fewer; None where a layer attends to pictures alone.
        rows: layer → attention (sample, head, row, key): softmax over all of the layer's keys, of which
            the pictures' are kept, and 0 at padding of keys. One head where `heads` pools them.
        heads: "all", or "mean" or "max": how a layer's heads are pooled as they are captured.
        padded: whether the batch has padding, so that every layer must get a mask.
        mixing: where keys are a resampler's latents, their attention on patches, (view, latent, patch); else None.
        learned: whether a layer's parallel projections, where it has them, answer instead of the layer.
    """

    learned: ClassVar[bool] = False

    def __init__(self, rows_BR: Tensor, layers: Sequence[int], keys_BK: Tensor | None = None):
        self.rows_BR, self.layers, self.keys_BK = rows_BR, tuple(layers), keys_BK
        self.rows: dict[int, Tensor] = {}
        self.mixing: Tensor | None = None
        self.heads: Heads = "all"
        self.padded = False

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
        self._check(layer, mask, key_BGKD.shape[2])
        rows = attention_rows(query_BHRD, key_BGKD, self.rows_BR, self.keys_BK, mask, scaling, self.heads)
        self.rows.setdefault(layer, rows)

    def _check(self, layer: int, mask: Tensor | None, num_keys: int) -> None:
        """What would be silently wrong. No mask is right for a self-attending layer whose batch has no padding."""
        if mask is None and (self.keys_BK is None or self.padded):
            raise CaptureError(
                f"no attention mask in layer {layer}" + (", of a batch with padding" if self.padded else ""),
                "the mask the processor makes (cross_attention_mask for Mllama)",
                "pass everything the processor returns to the model, and let nothing replace its attention",
            )
        if not self.rows and self.keys_BK is not None and self.keys_BK.numel() and self.keys_BK.max() >= num_keys:
            raise CaptureError(
                f"a picture's key at position {int(self.keys_BK.max())} of a layer with {num_keys} keys",
                "keys of the same batch",
                "make a request for each batch from its own inputs, and use no key-value cache",
            )

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


def real_keys(keys_BK: Tensor) -> Tensor:
    """Which keys are a picture's, bool (sample, key): padding is -1."""
    return keys_BK >= 0


def _capturing(base: str):
    def attention(module: nn.Module, query, key, value, attention_mask, attention_request=None, **kwargs):
        output = ALL_ATTENTION_FUNCTIONS[base](module, query, key, value, attention_mask, **kwargs)
        request = attention_request
        if request is not None and module.layer_idx in request.layers and not request.answered_by_parallel(module):
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal  # as the kernel decides it
            if kwargs.get("position_bias") is not None or (attention_mask is None and not causal):
                raise CaptureError(
                    f"a position bias, or attention to later tokens without a mask, in layer {module.layer_idx}",
                    "attention by scores and a mask alone",
                    "report this model class",
                )
            request.capture(module, query, key, attention_mask, kwargs["scaling"])
        return output

    return attention


def kernel_name(base: str) -> str:
    """The name our capturing version of a kernel is registered under."""
    return f"lavender_{base}"


def is_ours(kernel: str) -> bool:
    """Whether a kernel is a capturing one."""
    return kernel in {kernel_name(one) for one in BASE_KERNELS}


def install(model: PreTrainedModel) -> str:
    """Let a model's language layers use the capturing kernel; the name of the kernel they used before.

    Give that name to `set_kernel` to undo it. Logits do not change to the bit: the base kernel still
    makes the output.
    """
    base = model.config.get_text_config()._attn_implementation
    if is_ours(base):
        return base
    if base not in BASE_KERNELS:
        raise UnsupportedModelError(
            f"attn_implementation={base!r}",
            f"one of {BASE_KERNELS}",
            "load the model with attn_implementation='sdpa'",
        )
    if kernel_name(base) not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise CaptureError(
            f"no form of mask for the kernel {kernel_name(base)!r}, which would then get none",
            "the one lavender registers",
            "let nothing remove it from transformers' AttentionMaskInterface",
        )
    set_kernel(model, kernel_name(base))
    return base


def set_kernel(model: PreTrainedModel, name: str) -> None:
    """Set the attention kernel of the language layers alone, and check that it took."""
    # in IDEFICS and MiniCPM-V the language model has no config of its own
    if model.config.get_text_config() is model.config:
        model.get_decoder().set_attn_implementation({"": name})
    else:
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


def row_tensors(
    words: Sequence[Sequence[tuple[int, ...]]], pictures: Sequence[Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """Pad ragged words (their row positions) to `rows`, `shares`, `present`, `weights`, `word_pictures` of a request.

    A row that several words share is there once. Each word weighs 1. `pictures`: the index of each word's picture
    within its sample; None where all words are of the first.
    """
    every = [list(dict.fromkeys(position for rows in own for position in rows)) for own in words]
    num_words, num_rows = max([1, *map(len, words)]), max([1, *map(len, every)])
    tensors = {
        "rows": torch.zeros(len(words), num_rows, dtype=torch.long),
        "shares": torch.zeros(len(words), num_words, num_rows),
        "present": torch.zeros(len(words), num_words, dtype=torch.bool),
        "word_pictures": torch.zeros(len(words), num_words, dtype=torch.long),
    }
    for sample, (own, positions) in enumerate(zip(words, every, strict=True)):
        tensors["rows"][sample, : len(positions)] = torch.tensor(positions, dtype=torch.long)
        tensors["present"][sample, : len(own)] = True
        for index, rows in enumerate(own):
            tensors["shares"][sample, index, [positions.index(position) for position in rows]] = 1 / len(rows)
            if pictures is not None:
                tensors["word_pictures"][sample, index] = pictures[sample][index]
    return tensors | {"weights": tensors["present"].float()}
