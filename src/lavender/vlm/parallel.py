"""The learned parallel attention (Eq. 15–16): new query and key projections beside the pretrained ones.

Only alignment sees them; the main path is untouched. They live inside the attention module, so that
sharded training keeps them with their layer, and are removed on export.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from lavender.vlm.capture import PARALLEL_NAME, AttentionRequest, select_rows


class ParallelProjections(nn.Module):
    """W′_Q and W′_K of one layer, started as copies of its own. The layer's head norms are reused."""

    def __init__(self, attention: MllamaTextCrossAttention):
        super().__init__()
        self.query = nn.Linear(attention.q_proj.in_features, attention.q_proj.out_features, bias=False)
        self.key = nn.Linear(attention.k_proj.in_features, attention.k_proj.out_features, bias=False)
        with torch.no_grad():
            self.query.weight.copy_(attention.q_proj.weight)
            self.key.weight.copy_(attention.k_proj.weight)
        self.to(attention.q_proj.weight.dtype)

    def forward(self, attention: MllamaTextCrossAttention, hidden: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (sample, head, row, width) of selected rows and keys (sample, group, key, width).

        Args:
            hidden: (sample, row, hidden size).
            image: cross-attention states; the model keeps tiles in the first axis, so any leading shape.
        """
        samples, width = hidden.shape[0], attention.head_dim
        query = self.query(hidden).unflatten(-1, (-1, width)).transpose(1, 2)
        key = self.key(image).reshape(samples, -1, attention.num_key_value_heads, width).transpose(1, 2)
        return attention.q_norm(query), attention.k_norm(key)


def attach(attention: MllamaTextCrossAttention) -> torch.utils.hooks.RemovableHandle:
    """Give a cross-attention module its parallel projections; each forward with a request captures them."""
    attention.add_module(PARALLEL_NAME, ParallelProjections(attention))
    return attention.register_forward_pre_hook(_capture, with_kwargs=True)


def _capture(attention: MllamaTextCrossAttention, args: tuple, kwargs: dict) -> None:
    request: AttentionRequest | None = kwargs.get("attention_request")
    if request is None or attention.layer_idx not in request.layers or not request.answered_by_parallel(attention):
        return
    hidden = select_rows(kwargs["hidden_states"][:, None], request.rows_BR)[:, 0]
    query, key = attention.get_submodule(PARALLEL_NAME)(attention, hidden, kwargs["cross_attention_states"])
    request.capture_rows(attention, query, key, kwargs["attention_mask"], attention.scaling)
