"""Wide batches: 64 times the usual words, 16 pictures, 8,192 tokens. Nothing grows with a square."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavender.alignment.objective import AlignmentHead, AlignmentRequest
from lavender.config import AlignmentConfig
from lavender.students.capture import row_tensors
from lavender.students.image_keys import grid_boxes, key_layout, on_keys, to_grid
from lavender.students.latents import latent_layout
from lavender.students.rows import MOST_SCORES

WORDS, TOKENS, PICTURES, SIDE, GRID = 64 * 8, 8192, 16, 20, (5, 7)
HEADS, GROUPS, WIDTH = 8, 2, 4
MODULE: Any = SimpleNamespace(layer_idx=0, named_children=tuple)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returned inside the context, and that operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()  # a view of little is little
                if stored > self.elements:
                    self.elements, self.operation = stored, str(func)
        return result


def wide_request() -> AlignmentRequest:
    """Words at the end of the text, each of one row, spread over the pictures."""
    keys = torch.arange(7, 7 + PICTURES * SIDE**2)[None]
    first = TOKENS - 1 - WORDS
    assert keys.max() < first
    layout = key_layout([[grid_boxes(SIDE, SIDE)] * PICTURES])
    tensors = row_tensors(
        [[(row,) for row in range(first, first + WORDS)]], [[word % PICTURES for word in range(WORDS)]]
    )
    targets = torch.rand(1, WORDS, *GRID)
    return AlignmentRequest(
        (0,), tensors | {"boxes": layout.boxes, "pictures": layout.pictures, "keys": keys, "targets": targets}
    )


@pytest.mark.parametrize("base", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("loss", ["mass", "kl"])
def test_nothing_is_quadratic(base, loss):
    query = torch.randn(1, HEADS, TOKENS, WIDTH, requires_grad=True)
    key = torch.randn(1, GROUPS, TOKENS, WIDTH, requires_grad=True)
    arguments: dict[str, Any] = {"scaling": 0.5}
    if base == "flash_attention_2":  # one row of two samples, the second from token 5 on
        arguments["position_ids"] = torch.cat([torch.arange(5), torch.arange(TOKENS - 5)])[None]
    assert HEADS * WORDS * TOKENS > MOST_SCORES  # all rows at once would be more than what is allowed below
    assert TOKENS**2 > 2 * MOST_SCORES
    head = AlignmentHead(HEADS, (0,), AlignmentConfig(attention_loss=loss)).train()
    with Largest() as largest:
        request = wide_request()
        request.heads = "mean"
        request.capture(base, MODULE, query, key, None, arguments)
        head(request).backward()
    assert request.losses.shape == (WORDS,)
    assert query.grad is not None
    assert query.grad[..., -WORDS - 1 : -1, :].abs().amax(dim=-1).min() > 0
    assert largest.elements <= MOST_SCORES, largest.operation


def test_no_tensor_has_a_place_for_each_key_and_cell():
    samples, words, side, cells = 3, 5, 40, 32
    layout = key_layout([[grid_boxes(side, side)]] * samples)
    attention = torch.rand(1, samples, 1, words, side**2, requires_grad=True)
    first, grid = torch.zeros(samples, words, dtype=torch.long), (cells, cells)
    with Largest() as largest:
        to_grid(attention, layout, first, grid).sum().backward()
        on_keys(torch.rand(samples, words, *grid), layout, first)
    assert largest.elements <= samples * side**2 * cells, largest.operation  # of the keys' shares of rows or columns


def test_no_tensor_has_a_place_for_each_latent_and_view():
    samples, words, views, latents, patches, grid = 2, 3, 60, 16, 4, (3, 2)
    boxes = grid_boxes(2, 2).expand(samples * views, -1, -1)
    layout = latent_layout(
        boxes, [[(sample * views + view, 0) for view in range(views)] for sample in range(samples)], latents
    )
    mixing = torch.rand(samples * views, latents, patches)
    attention, first = torch.rand(1, samples, 1, words, views * latents), torch.zeros(samples, words, dtype=torch.long)
    with Largest() as largest:
        to_grid(attention, layout, first, grid, mixing)
    assert largest.elements <= samples * views * latents * grid[0] * grid[1], largest.operation
