"""Learned parallel attention (Eq. 15–16): trainable query and key projections beside the pretrained ones.

Alignment alone uses them; the model's output does not change. They are children of the attention modules, so that
sharded training keeps them with their layer. Exports leave them out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from lavender.config import ParallelInit
from lavender.students.capture import PARALLEL_NAME, AttentionRequest, select_rows

CROSS_STATES = ("cross_attention_states", "key_value_states")
"""Names under which cross-attention modules get the states that their keys are made of."""


class ParallelProjections(nn.Module):
    """W′_Q and W′_K of one layer (Eq. 15), with a bias where the layer's own projections have one.

    In float32 even if the layer is not, as PEFT's adapters are: 16 bits round small steps away.

    Args:
        attention: attention module with `q_proj` and `k_proj`.
        init: "pretrained" copies the layer's own projections; "random" keeps torch's initialisation.
    """

    def __init__(self, attention: nn.Module, init: ParallelInit):
        super().__init__()
        pretrained = cast(nn.Linear, attention.q_proj), cast(nn.Linear, attention.k_proj)
        dtype = torch.promote_types(pretrained[0].weight.dtype, torch.float32)  # float32 for quantised weights too
        self.query, self.key = (
            nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=dtype)
            for linear in pretrained
        )
        if init != "pretrained":
            return
        with _gathered([parameter for linear in pretrained for parameter in linear.parameters()]), torch.no_grad():
            for copy, linear in zip((self.query, self.key), pretrained, strict=True):
                copy.weight.copy_(dequantize_module_weight(linear))
                if linear.bias is not None:
                    copy.bias.copy_(linear.bias)

    def forward(self, hidden: Tensor, context: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """Project the rows and all keys.

        Args:
            hidden: hidden states of the requested rows, (sample, row, hidden size).
            context: states that the keys are made of, (…, hidden size). The leading axes are those of the sample and
                the key, in any split, such as (sample · tile, token).
            head_dim: width of a head.

        Returns:
            Queries (sample, head, row, head_dim) and keys (sample, key head, key, head_dim).
        """
        dtype = self.query.weight.dtype
        query, key = self.query(hidden.to(dtype)), self.key(context.to(dtype))
        key = key.reshape(hidden.shape[0], -1, self.key.out_features // head_dim, head_dim)
        return query.unflatten(-1, (-1, head_dim)).transpose(1, 2), key.transpose(1, 2)


def _gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Inside the context every process holds the whole parameters, which ZeRO-3 shards while it loads a model."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def attach(
    attention: nn.Module,
    init: ParallelInit = "pretrained",
    head_norms: tuple[str, str] = ("q_norm", "k_norm"),
    rotates: bool = True,
) -> torch.utils.hooks.RemovableHandle:
    """Add parallel projections to an attention module. They answer every request whose `learned` is True.

    Args:
        attention: attention module of a usable layer.
        init: see `ParallelProjections`.
        head_norms: names of its children that normalise query and key heads; see `VlmAdapter.head_norms`.
        rotates: whether it rotates queries and keys by their positions; see `VlmAdapter.rotates`.

    Returns:
        The handle of the hook that captures. `detach` removes the projections themselves.
    """
    attention.add_module(PARALLEL_NAME, ParallelProjections(attention, init))
    return attention.register_forward_pre_hook(partial(_capture, head_norms, rotates), with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Remove the parallel projections of all layers of a model."""
    for module in list(model.modules()):
        if PARALLEL_NAME in dict(module.named_children()):
            delattr(module, PARALLEL_NAME)


def _capture(head_norms: tuple[str, str], rotates: bool, attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    request: AttentionRequest | None = kwargs.get("attention_request")
    if request is None or attention.layer_idx not in request.layers or not request.answered_by_parallel(attention):
        return
    states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    hidden = select_rows(states[:, None], request.rows_BR)[:, 0]
    project = attention.get_submodule(PARALLEL_NAME)
    cross_states = [kwargs[name] for name in CROSS_STATES if kwargs.get(name) is not None]
    query, key = project(hidden, cross_states[0] if cross_states else states, attention.head_dim)
    norms = dict(attention.named_children())
    if head_norms[0] in norms:  # the layer's own, of each head, before rotation
        query, key = norms[head_norms[0]](query), norms[head_norms[1]](key)
    if rotates and not cross_states:
        cos, sin = (table.expand(len(states), -1, -1)[:, None] for table in kwargs["position_embeddings"])
        query = _rotated(attention, query, *(select_rows(table, request.rows_BR) for table in (cos, sin)))
        key = _rotated(attention, key, cos, sin)
    request.capture_rows(attention, query, key, kwargs["attention_mask"], attention.scaling)


def _rotated(attention: nn.Module, states_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding. The tables are (sample, 1, token, head width).

    The halves are those of the attention's own model: Cohere's alternate.
    """
    own = sys.modules[type(attention).__module__]
    return states_BHTD * cos + own.rotate_half(states_BHTD) * sin
