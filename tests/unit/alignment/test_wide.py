"""Wide batches: 64 times the usual words, 16 pictures, 8,192 tokens, packed samples. Nothing grows with a square."""

from __future__ import annotations

from collections.abc import Callable
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
from lavender.students.forcing import Forcing
from lavender.students.image_keys import grid_boxes, key_layout, on_keys, to_grid
from lavender.students.latents import latent_layout
from lavender.students.rows import MOST_SCORES, Scoring

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


def kept(step: Callable[[], Any], *given: Tensor) -> int:
    """Bytes that autograd keeps for the backward of a step, each storage once, without those of the given tensors."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = step()  # keeps the graph alive, so that no address is used twice
    del result
    return sum(size for at, size in storages.items() if at not in {one.untyped_storage().data_ptr() for one in given})


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


@pytest.mark.parametrize("words", [1, WORDS])
def test_forced_rows_keep_their_queries_alone(words):
    """The scores of one row are 32 times as large as its queries; all at once they would be more than is allowed."""
    request = wide_request()
    query, key, value = (torch.randn(1, heads, TOKENS, WIDTH, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS))
    output = torch.randn(1, TOKENS, HEADS, WIDTH, requires_grad=True)
    forced = (torch.arange(WORDS) < words)[None]
    forcing = Forcing(request.targets, request.shares, forced, request.layout, request.word_pictures)
    given, results = (output, query, key, value, Scoring(0.5), request.rows_BR, request.keys_BK, None), []
    forcing.output(*given)  # what all layers share
    shared = (request.rows_BR, *forcing._placed_targets(1, TOKENS, request.keys_BK, None))
    size = kept(lambda: results.append(forcing.output(*given)), query, key, value, *shared)
    # the queries, and the places in the output: sample, position and head of each number's head
    assert size <= words * HEADS * (WIDTH * 4 + 3 * 8)
    with Largest() as largest:
        results[0].square().sum().backward()
    assert largest.elements <= MOST_SCORES, largest.operation
    assert query.grad is not None
    assert (query.grad.abs().amax(dim=(0, 1, 3)) > 0).sum() == words


@pytest.mark.parametrize("loss", ["mass", "published"])
def test_packed_samples_keep_as_much_as_a_row_each(loss):
    """But for the mask of the rows, a byte for each row and token, which all layers share."""
    samples, tokens, words, side = 8, 64, 6, 6
    keys = torch.arange(3, 3 + side**2).expand(samples, -1)
    layout = key_layout([[grid_boxes(side, side)]] * samples)
    tensors = row_tensors([[(tokens - 2 - word,) for word in range(words)]] * samples, [[0] * words] * samples)
    tensors |= {"boxes": layout.boxes, "pictures": layout.pictures, "targets": torch.rand(samples, words, *GRID)}
    starts = tokens * torch.arange(samples)[:, None]
    sizes, losses = [], []
    for batch, given, arguments in (
        (samples, {"keys": keys}, {}),
        (
            1,
            {"keys": keys + starts, "rows": tensors["rows"] + starts, "is_packed": torch.tensor(True)},
            {"position_ids": torch.arange(tokens).repeat(samples)[None]},
        ),
    ):
        torch.manual_seed(5)
        query, key = (
            torch.randn(samples, tokens, heads, WIDTH).reshape(batch, -1, heads, WIDTH).transpose(1, 2)
            for heads in (HEADS, GROUPS)
        )
        query, key = query.requires_grad_(), key.requires_grad_()
        head = AlignmentHead(HEADS, (0,), AlignmentConfig(attention_loss=loss)).train()

        def step(given=given, arguments=arguments, query=query, key=key, head=head) -> Tensor:
            request = AlignmentRequest((0,), tensors | given)
            request.heads = "mean" if loss == "mass" else "all"
            request.capture("flash_attention_2", MODULE, query, key, None, {"scaling": 0.5} | arguments)
            losses.append(head(request))  # kept, so that no address is used twice
            return losses[-1]

        sizes.append(kept(step, query, key))
    torch.testing.assert_close(losses[1], losses[0])
    mask = samples * words * samples * tokens
    # beside the mask a packed row keeps one more copy: the rows of all samples, put together
    assert sizes[1] - mask <= 1.2 * sizes[0]
