"""Rotary position embedding of queries and keys, as language models apply it. See `VlmAdapter.rotate`.

States are (sample, head, token, head width); the tables `cos` and `sin` are (sample, 1, token, rotated width). What a
head has beyond the rotated width stays as it is (`partial_rotary_factor`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_halves(states_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each number of the first half with the number at the same place in the second half."""
    first, second = states_BHTD[..., : cos.shape[-1]].chunk(2, dim=-1)
    return _rotated(states_BHTD, torch.cat([-second, first], dim=-1), cos, sin)


def by_neighbours(states_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate numbers 0 and 1, 2 and 3, and so on."""
    even, odd = states_BHTD[..., : cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
    return _rotated(states_BHTD, torch.stack([-odd, even], dim=-1).flatten(-2), cos, sin)


def _rotated(states: Tensor, quarter_turn: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    return torch.cat([states[..., :width] * cos + quarter_turn * sin, states[..., width:]], dim=-1)
