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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lavender.errors import CaptureError
from lavender.students.base import Removable, VlmAdapter
from lavender.students.forcing import Forcing
from lavender.students.kernels import Known, install, register, run, scoring_of, set_kernel
from lavender.students.registry import adapter_for
from lavender.students.rows import Heads, Scoring, attention_rows, scoring_at, select_rows

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
        is_packed: whether the model gets all samples in one row, to whose positions `rows_BR` and `keys_BK` refer.

    Attributes:
        rows_BR: as given; of packed samples (1, sample · row), as the model's batch.
        rows: for each layer the attention of the rows on the image keys, float32 (sample, head, row, key): softmax
            over all keys of the layer, 0 at padded keys. One head if `heads` pools them.
        heads: "all"; or "mean" or "max" to pool the heads of a layer during capture, which saves memory.
        padded: whether the batch has padding, so that every layer must get a mask.
        forcing: rows that attend as maps say in the captured layers; None for no row. What is captured is still the
            layer's own attention.
        mixing: attention of a resampler's latents on its patches, (view, latent, patch); None if there is no
            resampler. See `VlmAdapter.latent_attention`.
        learned: whether a layer's parallel projections, if it has them, replace its own queries and keys.
        projected: queries of the rows and keys by a layer's parallel projections, until its kernel runs.
        compare: what compares a layer's own queries of the rows and keys with its projections; in the first forward.
    """

    learned: ClassVar[bool] = False

    def __init__(self, rows_BR: Tensor, layers: Sequence[int], keys_BK: Tensor | None = None, is_packed: bool = False):
        self.rows_BR, self.layers, self.keys_BK = rows_BR, tuple(layers), keys_BK
        self.is_packed = is_packed
        if is_packed:
            self.rows_BR = rows_BR.reshape(1, -1)
        self.rows: dict[int, Tensor] = {}
        self.mixing: Tensor | None = None
        self.heads: Heads = "all"
        self.padded = False
        self.forcing: Forcing | None = None
        self.projected: dict[int, tuple[Tensor, Tensor]] = {}
        self.compare: dict[int, Callable[[Tensor, Tensor], None]] = {}
        self._known: Known = {}

    def answered_by_parallel(self, module: nn.Module) -> bool:
        """Whether the rows of an attention module come from its parallel projections (Eq. 15)."""
        return self.learned and PARALLEL_NAME in dict(module.named_children())

    @torch.compiler.disable
    def capture(
        self,
        base: str,
        module: nn.Module,
        query_BHTD: Tensor,
        key_BGKD: Tensor,
        mask: Any,
        arguments: Mapping[str, Any],
    ) -> Scoring:
        """Store the requested rows of a layer. Called inside the layer's forward, with what its kernel gets.

        Checkpointing runs the layer again during backward. Then the rows are computed again, since the graph must be
        the same, but the first result is kept: the loss depends on that one.

        Returns:
            How the layer scores its keys.
        """
        layer = cast(int, module.layer_idx)
        self._check(layer, mask, key_BGKD.shape[2])
        scoring = scoring_of(base, module, query_BHTD, key_BGKD, mask, self.rows_BR, arguments, self._known)
        query_BHRD = select_rows(query_BHTD, self.rows_BR)
        if layer in self.compare:
            self.compare.pop(layer)(query_BHRD, key_BGKD)
        if self.answered_by_parallel(module):
            query_BHRD, key_BGKD = self.projected.pop(layer)
        self.rows.setdefault(layer, self._attention_rows(query_BHRD, key_BGKD, scoring))
        return scoring

    def _attention_rows(self, query_BHRD: Tensor, key_BGKD: Tensor, scoring: Scoring) -> Tensor:
        """The rows of a layer, of packed samples each on its own keys: (sample, head, row, key)."""
        if not self.is_packed:
            return attention_rows(query_BHRD, key_BGKD, self.rows_BR, self.keys_BK, scoring, self.heads)
        assert self.keys_BK is not None, "only models that see pictures among the text pack"
        num_rows, samples = self.rows_BR.shape[1] // len(self.keys_BK), []
        for sample, keys_1K in enumerate(self.keys_BK.split(1)):
            own = slice(sample * num_rows, (sample + 1) * num_rows)
            given = query_BHRD[:, :, own], key_BGKD, self.rows_BR[:, own], keys_1K
            samples.append(attention_rows(*given, scoring_at(scoring, own), self.heads))
        return torch.cat(samples)

    def _check(self, layer: int, mask: Any, num_keys: int) -> None:
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
        UnsupportedModelError: the model uses another attention kernel than `lavender.students.kernels.BASE_KERNELS`.
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
        UnsupportedModelError: a model of an unknown family, or with a kernel that is not in `BASE_KERNELS`.
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
        output = run(base, module, query, key, value, attention_mask, **kwargs)
        request = attention_request
        if request is None or module.layer_idx not in request.layers:
            return output
        scoring = request.capture(base, module, query, key, attention_mask, kwargs)
        if request.forcing is None or request.answered_by_parallel(module):
            return output
        places = request.rows_BR, request.keys_BK, request.mixing
        return request.forcing.output(output[0], query, key, value, scoring, *places), *output[1:]

    return attention


register(_capturing_kernel)


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
        column = {row: index for index, row in enumerate(sample_positions)}
        for word, rows in enumerate(sample_words):
            tensors["shares"][sample, word, [column[row] for row in rows]] = 1 / len(rows)
            if pictures is not None:
                tensors["word_pictures"][sample, word] = pictures[sample][word]
    return tensors | {"weights": tensors["present"].float()}
