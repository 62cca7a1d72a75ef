"""Capture selected attention rows while the model's own kernel makes the output.

`CaptureSession` prepares a model, and an `AttentionRequest` says what to capture in one forward call. An attention
function is registered with transformers. It calls the base kernel for the output, then computes softmax(q·kᵀ) once
more for the requested rows alone. The request is a keyword argument of the model's forward, not a global: activation
checkpointing runs the forward again inside backward, when a global may have changed.

Axis suffixes: B sample, H head, G key head, R row (a query that predicts a token), T token, K key, D head width,
W word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lavender.errors import CaptureError, UnsupportedModelError
from lavender.students.base import Removable, VlmAdapter
from lavender.students.forcing import Forcing
from lavender.students.registry import adapter_for
from lavender.students.rows import Heads, attention_rows, select_rows

BASE_KERNELS = ("sdpa",)
PARALLEL_NAME = "alignment_parallel"
"""Name of the child of an attention module that holds its parallel projections; see `lavender.alignment.parallel`."""
_SESSION_NAME = "_lavender_capture"


class AttentionRequest:
    """Which attention rows to capture in one forward call, and the captured rows.

    Make a new request for every forward, and pass it as `attention_request=`. This is a plain class on purpose:
    mixed-precision wrappers copy dicts and dataclasses, and the rows would be stored in the copy.

    Args:
        rows_BR: long (sample, row), positions of the queries in the sequence; padded with 0.
        layers: indices of the decoder layers to capture.
        keys_BK: long (sample, key), positions of the image keys in the sequence, ascending, padded with -1. None if
            the layers attend to pictures alone. See `VlmAdapter.image_keys`.

    Attributes:
        rows: for each layer the attention of the rows on the image keys, float32 (sample, head, row, key): softmax
            over all keys of the layer, 0 at padded keys. One head if `heads` pools them.
        heads: "all"; or "mean" or "max" to pool the heads of a layer during capture, which saves memory.
        padded: whether the batch has padding, so that every layer must get a mask.
        forcing: rows that attend as maps say in the captured layers; None for no row. What is captured is still the
            layer's own attention.
        mixing: attention of a resampler's latents on its patches, (view, latent, patch); None if there is no
            resampler. See `VlmAdapter.latent_attention`.
        learned: whether a layer's parallel projections, if it has them, replace its own queries and keys.
    """

    learned: ClassVar[bool] = False

    def __init__(self, rows_BR: Tensor, layers: Sequence[int], keys_BK: Tensor | None = None):
        self.rows_BR, self.layers, self.keys_BK = rows_BR, tuple(layers), keys_BK
        self.rows: dict[int, Tensor] = {}
        self.mixing: Tensor | None = None
        self.heads: Heads = "all"
        self.padded = False
        self.forcing: Forcing | None = None

    def answered_by_parallel(self, module: nn.Module) -> bool:
        """Whether the rows of an attention module come from its parallel projections (Eq. 15)."""
        return self.learned and PARALLEL_NAME in dict(module.named_children())

    def capture(self, module: nn.Module, query_BHTD: Tensor, key_BGKD: Tensor, mask: Tensor | None, scaling: float):
        """Store the requested rows of a layer, from its queries and keys. Called inside the layer's forward."""
        self.capture_rows(module, select_rows(query_BHTD, self.rows_BR), key_BGKD, mask, scaling)

    def capture_rows(
        self, module: nn.Module, query_BHRD: Tensor, key_BGKD: Tensor, mask: Tensor | None, scaling: float
    ):
        """Store the rows of a layer, from the queries of these rows and all keys.

        Checkpointing runs the layer again during backward. Then the rows are computed again, since the graph must be
        the same, but the first result is kept: the loss depends on that one.
        """
        layer = cast(int, module.layer_idx)
        self._check(layer, mask, key_BGKD.shape[2])
        rows = attention_rows(query_BHRD, key_BGKD, self.rows_BR, self.keys_BK, mask, scaling, self.heads)
        self.rows.setdefault(layer, rows)

    def _check(self, layer: int, mask: Tensor | None, num_keys: int) -> None:
        """Raise where the rows would be wrong without a word. No mask is right for self-attention without padding."""
        if mask is None and (self.keys_BK is None or self.padded):
            raise CaptureError(
                f"no attention mask in layer {layer}" + (", of a batch with padding" if self.padded else ""),
                "the mask the processor makes (cross_attention_mask for cross-attention)",
                "pass everything the processor returns to the model, and let nothing replace its attention",
            )
        if not self.rows and self.keys_BK is not None and self.keys_BK.numel() and self.keys_BK.max() >= num_keys:
            raise CaptureError(
                f"an image key at position {int(self.keys_BK.max())} of a layer with {num_keys} keys",
                "keys of the same batch",
                "make a request for each batch from its own inputs, and use no key-value cache",
            )

    def stacked(self) -> Tensor:
        """The rows of all requested layers: (layer, sample, head, row, key).

        Raises:
            CaptureError: a layer captured nothing.
        """
        missing = [layer for layer in self.layers if layer not in self.rows]
        if missing:
            raise CaptureError(
                f"no attention from layers {missing}",
                "a capture from every requested layer",
                "check that the batch has pictures and that nothing else replaces the model's attention",
            )
        return torch.stack([self.rows[layer] for layer in self.layers])


class CaptureSession:
    """Makes a model answer attention requests, until `close`: the capturing kernel and the hooks of a forward.

    The session is an attribute of the model. So a copy of the model (`copy.deepcopy`, `torch.save`) has a session of
    its own, which `CaptureSession.of` returns.

    Args:
        model: a model of transformers. Its logits do not change by one bit.
        adapter: the adapter of the model's family.

    Attributes:
        adapter: as given.
        handles: all changes that `close` undoes. Append to it what must go with the session.

    Raises:
        UnsupportedModelError: the model uses another attention kernel than `BASE_KERNELS`.
        CaptureError: the model has a session already.
    """

    def __init__(self, model: PreTrainedModel, adapter: VlmAdapter):
        if CaptureSession.of(model) is not None:
            raise CaptureError(
                "a model that answers attention requests already",
                "one session per model",
                "leave `capturing`, or call lavender.alignment.objective.detach, before you start another",
            )
        self.adapter = adapter
        self._request: AttentionRequest | None = None
        resampler = adapter.resampler(model)  # may refuse the model, before anything is changed
        self._has_resampler = resampler is not None
        self._kernel = install(model)
        begin = model.register_forward_pre_hook(self._begin_forward, with_kwargs=True)
        self.handles: list[Removable] = [begin, *adapter.hooks(model)]
        if resampler is not None:
            self.handles += [
                model.register_forward_hook(self._end_forward, always_call=True),
                resampler.register_forward_hook(self._store_mixing, with_kwargs=True),
            ]
        setattr(model, _SESSION_NAME, self)

    @staticmethod
    def of(model: nn.Module) -> CaptureSession | None:
        """The session of a model; None if it has none."""
        return getattr(model, _SESSION_NAME, None)

    def close(self, model: PreTrainedModel) -> None:
        """Leave the model, whose session this is, as it was before."""
        for handle in self.handles:
            handle.remove()
        set_kernel(model, self._kernel)
        delattr(model, _SESSION_NAME)

    # The vision tower does not get the model's keyword arguments. So a hook of the model keeps the request for the
    # hook of the resampler. Checkpointing runs the resampler again during backward: then there is no request, nothing
    # is stored, and the first result stays the one in the graph.

    def _begin_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        request, mask = kwargs.get("attention_request"), kwargs.get("attention_mask")
        if request is not None and isinstance(mask, Tensor):
            request.padded = not bool(mask.all())
        if self._has_resampler:  # only then `_end_forward` lets go of it
            self._request = request

    def _end_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._request = None

    def _store_mixing(self, resampler: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        request = self._request
        if request is None:
            return
        if request.mixing is not None:
            raise CaptureError(
                f"a second run of {type(resampler).__name__} in one forward",
                "all pictures of a batch in one run",
                "make a new request for each forward; else report this model class",
            )
        request.mixing = self.adapter.latent_attention(resampler, args, kwargs, output)


@contextlib.contextmanager
def capturing(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context the model answers attention requests. A model with a session keeps that one.

    Raises:
        UnsupportedModelError: a model of an unknown family, or with another attention kernel than `BASE_KERNELS`.
    """
    session = CaptureSession(model, adapter_for(model.config)) if CaptureSession.of(model) is None else None
    try:
        yield
    finally:
        if session is not None:
            session.close(model)


def real_keys(keys_BK: Tensor) -> Tensor:
    """Which keys are image keys and not padding: bool (sample, key)."""
    return keys_BK >= 0


def _capturing_kernel(base: str):
    """The attention function that calls the base kernel and answers the request of the forward call."""

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
            if request.forcing is not None:
                places = request.rows_BR, request.keys_BK, request.mixing
                forced = request.forcing.output(
                    output[0], query, key, value, attention_mask, kwargs["scaling"], *places
                )
                return forced, *output[1:]
        return output

    return attention


def kernel_name(base: str) -> str:
    """Name of the capturing version of a base kernel, as registered with transformers."""
    return f"lavender_{base}"


def install(model: PreTrainedModel) -> str:
    """Switch the decoder to the capturing kernel. Part of `CaptureSession`.

    Returns:
        The name of the kernel before. Pass it to `set_kernel` to undo the switch.

    Raises:
        UnsupportedModelError: the model uses another kernel than `BASE_KERNELS`.
        CaptureError: the registration with transformers is missing.
    """
    base = model.config.get_text_config()._attn_implementation
    if base in {kernel_name(kernel) for kernel in BASE_KERNELS}:
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
    """Set the attention kernel of the decoder alone, not of the vision tower.

    Raises:
        CaptureError: the model class ignores the setting.
    """
    # some models have one config for all parts; then the decoder alone is told
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


# Register with both interfaces: the form of the mask follows the kernel's name, and an unknown name gets no mask.
for _base in BASE_KERNELS:
    AttentionInterface.register(kernel_name(_base), _capturing_kernel(_base))
    AttentionMaskInterface.register(kernel_name(_base), ALL_MASK_ATTENTION_FUNCTIONS[_base])


def row_tensors(
    words: Sequence[Sequence[tuple[int, ...]]], pictures: Sequence[Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """Pad the words' row positions to the tensors of an `AlignmentRequest`. Each word weighs 1.

    Args:
        words: for each sample, for each word, the positions of the rows that predict its tokens.
        pictures: for each sample, for each word, the index of its picture within the sample. By default the first.

    Returns:
        `rows` long (sample, row), each position once even if words share it; `shares` float (sample, word, row), 1/n
        at the n rows of a word; `present` bool (sample, word); `weights` float (sample, word); `word_pictures` long
        (sample, word).
    """
    positions = [list(dict.fromkeys(row for rows in sample_words for row in rows)) for sample_words in words]
    num_words, num_rows = max([1, *map(len, words)]), max([1, *map(len, positions)])
    tensors = {
        "rows": torch.zeros(len(words), num_rows, dtype=torch.long),
        "shares": torch.zeros(len(words), num_words, num_rows),
        "present": torch.zeros(len(words), num_words, dtype=torch.bool),
        "word_pictures": torch.zeros(len(words), num_words, dtype=torch.long),
    }
    for sample, (sample_words, sample_positions) in enumerate(zip(words, positions, strict=True)):
        tensors["rows"][sample, : len(sample_positions)] = torch.tensor(sample_positions, dtype=torch.long)
        tensors["present"][sample, : len(sample_words)] = True
        for word, rows in enumerate(sample_words):
            tensors["shares"][sample, word, [sample_positions.index(row) for row in rows]] = 1 / len(rows)
            if pictures is not None:
                tensors["word_pictures"][sample, word] = pictures[sample][word]
    return tensors | {"weights": tensors["present"].float()}
