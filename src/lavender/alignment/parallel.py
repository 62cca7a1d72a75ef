"""The learned parallel attention (Eq. 15–16): new query and key projections beside the pretrained ones.

Only alignment sees them; the main path is untouched. They live inside the attention module, so that
sharded training keeps them with their layer, and are removed on export.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.llama.modeling_llama import rotate_half

from lavender.config import ParallelInit
from lavender.students.capture import PARALLEL_NAME, AttentionRequest, select_rows

CROSS_STATES = ("cross_attention_states", "key_value_states")  # what a cross-attention layer's keys are made of
HEAD_NORMS = (("q_norm", "k_norm"), ("q_layer_norm", "k_layer_norm"))  # Mllama, Qwen3 and Gemma 3; IDEFICS


class ParallelProjections(nn.Module):
    """W′_Q and W′_K of one layer, started as copies of its own or random; with bias where it has one (Qwen).

    In float32, whatever the layer's own are, as adapters of PEFT: in 16 bits small steps would be rounded away.
    """

    def __init__(self, attention: nn.Module, init: ParallelInit):
        super().__init__()
        own_query, own_key = cast(nn.Linear, attention.q_proj), cast(nn.Linear, attention.k_proj)
        dtype = torch.promote_types(own_query.weight.dtype, torch.float32)  # of quantised weights float32 too
        self.query, self.key = (
            nn.Linear(own.in_features, own.out_features, bias=own.bias is not None, dtype=dtype)
            for own in (own_query, own_key)
        )
        copied = ((self.query, own_query), (self.key, own_key)) if init == "pretrained" else ()
        with _whole([*own_query.parameters(), *own_key.parameters()]), torch.no_grad():
            for new, own in copied:
                new.weight.copy_(dequantize_module_weight(own))
                if own.bias is not None:
                    new.bias.copy_(own.bias)

    def forward(self, hidden: Tensor, context: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Queries (sample, head, row, width) of selected rows and keys (sample, group, key, width).

        Args:
            hidden: (sample, row, hidden size).
            context: what keys are made of; Mllama keeps tiles in the first axis, so any leading shape.
            width: of a head.
        """
        dtype = self.query.weight.dtype
        query, key = self.query(hidden.to(dtype)), self.key(context.to(dtype))
        key = key.reshape(hidden.shape[0], -1, self.key.out_features // width, width)
        return query.unflatten(-1, (-1, width)).transpose(1, 2), key.transpose(1, 2)


def _whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Within it, weights that ZeRO-3 has shared out among the processes as they were read are there."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def attach(attention: nn.Module, init: ParallelInit = "pretrained") -> torch.utils.hooks.RemovableHandle:
    """Give an attention module its parallel projections; each forward with a request captures them."""
    attention.add_module(PARALLEL_NAME, ParallelProjections(attention, init))
    return attention.register_forward_pre_hook(_capture, with_kwargs=True)


def _capture(attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    request: AttentionRequest | None = kwargs.get("attention_request")
    if request is None or attention.layer_idx not in request.layers or not request.answered_by_parallel(attention):
        return
    states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    hidden = select_rows(states[:, None], request.rows_BR)[:, 0]
    project = attention.get_submodule(PARALLEL_NAME)
    others = [kwargs[name] for name in CROSS_STATES if kwargs.get(name) is not None]
    query, key = project(hidden, others[0] if others else states, attention.head_dim)
    norms = dict(attention.named_children())
    for own_query, own_key in HEAD_NORMS:
        if own_query in norms:  # of each head, before rotation: the layer's own are reused
            query, key = norms[own_query](query), norms[own_key](key)
    if not others:
        cos, sin = (table.expand(len(states), -1, -1)[:, None] for table in kwargs["position_embeddings"])
        query = _rotated(query, *(select_rows(table, request.rows_BR) for table in (cos, sin)))
        key = _rotated(key, cos, sin)
    request.capture_rows(attention, query, key, kwargs["attention_mask"], attention.scaling)


def _rotated(states_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, its tables (sample, 1, token, width); Qwen-VL's are laid out by time, row, column."""
    return states_BHTD * cos + rotate_half(states_BHTD) * sin
