"""Selected attention rows: numbers and gradients of softmax written out, and next to nothing kept for backward.

Shapes are primes: 2 samples, 3 key heads of 2 query heads, 5 rows, 11 keys (also tokens), 7 wide.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lavender.students import rows as rows_module
from lavender.students.rows import Heads, Scoring, attention_rows, select_rows

SAMPLES, GROUPS, SHARED, ROWS, TOKENS, WIDTH = 2, 3, 2, 5, 11, 7
POSITIONS = torch.tensor([[2, 10, 7, 3, 0], [9, 4, 4, 0, 0]])
KEPT = torch.tensor([[1, 2, 5, 6], [0, 3, -1, -1]])
SCALING = 0.3
HEADS = pytest.mark.parametrize("heads", ["all", "mean", "max"])
MASKS = pytest.mark.parametrize("kind", ["none", "bool", "additive", "of each head"])


def mask_of(kind: str, dtype: torch.dtype) -> Tensor | None:
    """Causal, and the second sample has two tokens of padding at the left."""
    seen = (torch.ones(TOKENS, TOKENS).tril() > 0).expand(SAMPLES, 1, -1, -1).clone()
    seen[1, ..., :2] = False
    if kind == "of each head":
        seen = seen & (torch.rand(SAMPLES, GROUPS * SHARED, TOKENS, TOKENS) > 0.2)
        seen[..., 3] = True
    additive = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {"none": None, "bool": seen, "additive": additive, "of each head": seen}[kind]


def scoring_of(mask: Tensor | None, softcap: float | None = None) -> Scoring:
    """The mask at the rows, as the layers' kernels are asked for it."""
    return Scoring(SCALING, None if mask is None else select_rows(mask, POSITIONS), softcap)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    query = torch.randn(SAMPLES, GROUPS * SHARED, ROWS, WIDTH, dtype=dtype, requires_grad=True)
    key = torch.randn(SAMPLES, GROUPS, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    return query, key


def written_out(query: Tensor, key: Tensor, keys: Tensor | None, mask: Tensor | None, heads: Heads) -> Tensor:
    """Row by row, as the definition says."""
    rows = []
    for sample in range(SAMPLES):
        for head in range(GROUPS * SHARED):
            for row, position in enumerate(POSITIONS[sample].tolist()):
                scores = key[sample, head // SHARED] @ query[sample, head, row] * SCALING
                if mask is None:
                    scores = torch.where(torch.arange(TOKENS) <= position, scores, torch.finfo(scores.dtype).min)
                else:
                    own = mask[sample, head if mask.shape[1] > 1 else 0, position]
                    least = torch.finfo(scores.dtype).min
                    scores = torch.where(own if own.dtype == torch.bool else own == 0, scores, least)
                share = scores.softmax(dim=0)
                kept = share if keys is None else torch.where(keys[sample] < 0, 0, share[keys[sample].clamp_min(0)])
                rows.append(kept)
    found = torch.stack(rows).view(SAMPLES, GROUPS * SHARED, ROWS, -1)
    if heads == "all":
        return found
    return found.mean(1, keepdim=True) if heads == "mean" else found.amax(1, keepdim=True)


@HEADS
@MASKS
@pytest.mark.parametrize("keys", [KEPT, None], ids=["kept", "every"])
def test_rows_and_gradients_are_those_of_softmax(kind, keys, heads):
    query, key = inputs()
    mask = mask_of(kind, torch.float64)
    found = attention_rows(query, key, POSITIONS, keys, scoring_of(mask), heads)
    expected = written_out(query, key, keys, mask, heads)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), (query, key))
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@HEADS
@MASKS
def test_rows_in_parts_are_those_of_one_part(kind, heads, monkeypatch):
    """Two rows at a time, as for a batch whose scores would not fit in memory."""
    (query, key), mask, results = inputs(), mask_of(kind, torch.float64), []
    for most in (rows_module.MOST_SCORES, 2 * SAMPLES * GROUPS * SHARED * TOKENS):
        monkeypatch.setattr(rows_module, "MOST_SCORES", most)
        assert len(list(rows_module.row_parts(query, key))) == (3 if results else 1)
        found = attention_rows(query, key, POSITIONS, KEPT, scoring_of(mask), heads)
        results.append([found, *torch.autograd.grad(found.square().sum(), (query, key))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@HEADS
@MASKS
def test_a_softcap_bends_scores_before_the_mask(kind, heads):
    query, key = inputs()
    mask, cap = mask_of(kind, torch.float64), 0.7
    repeated = key.repeat_interleave(SHARED, 1)
    scores = cap * torch.tanh(query @ repeated.mT * SCALING / cap)
    if mask is None:
        seen = torch.arange(TOKENS) <= POSITIONS[:, None, :, None]
    else:
        seen = select_rows(mask, POSITIONS)
        seen = seen if seen.dtype == torch.bool else seen == 0
    shares = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    expected = torch.where(
        KEPT[:, None, None] < 0, 0, shares.gather(3, KEPT.clamp_min(0)[:, None, None].expand(-1, 6, 5, -1))
    )
    if heads != "all":
        expected = expected.mean(1, keepdim=True) if heads == "mean" else expected.amax(1, keepdim=True)
    found = attention_rows(query, key, POSITIONS, KEPT, scoring_of(mask, cap), heads)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), (query, key))
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@HEADS
@MASKS
def test_gradients_are_those_of_finite_differences(kind, heads):
    mask = mask_of(kind, torch.float64)

    def rows(query: Tensor, key: Tensor) -> Tensor:
        return attention_rows(query, key, POSITIONS, KEPT, scoring_of(mask), heads)

    assert torch.autograd.gradcheck(rows, inputs())


@HEADS
def test_half_precision_is_computed_in_float32(heads):
    query, key = inputs(torch.bfloat16)
    mask = mask_of("additive", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_rows(query, key, POSITIONS, KEPT, scoring_of(mask), heads)
    assert found.dtype == torch.float32
    wide = [one.detach().float().requires_grad_() for one in (query, key)]
    expected = attention_rows(*wide, POSITIONS, KEPT, scoring_of(mask_of("additive", torch.float32)), heads)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(found.square().sum(), (query, key))
    theirs = torch.autograd.grad(expected.square().sum(), wide)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other.bfloat16())


def test_a_row_that_sees_nothing_is_finite_and_has_no_gradient():
    """A row of padding: the kernel gives it every key alike, or nothing; nobody asks for it."""
    query, key = inputs(torch.float32)
    mask = mask_of("bool", torch.float32)
    assert mask is not None
    mask[1] = False
    found = attention_rows(query, key, POSITIONS, KEPT, scoring_of(mask))
    torch.testing.assert_close(found[1, ..., :2], torch.full((6, 5, 2), 1 / TOKENS))
    (grad_query, grad_key) = torch.autograd.grad(found.square().sum(), (query, key))
    assert grad_query[1].abs().sum() == grad_key[1].abs().sum() == 0
    assert grad_query[0].abs().sum() > 0


@HEADS
def test_autograd_keeps_no_row_of_all_keys(heads):
    tokens, kept = 1009, []
    query = torch.randn(1, 4, 5, 7, requires_grad=True)
    key = torch.randn(1, 2, tokens, 7, requires_grad=True)
    positions, keys = torch.full((1, 5), 1000), torch.arange(3, 500)[None]
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        attention_rows(query, key, positions, keys, Scoring(SCALING), heads)
    given = {one.untyped_storage().data_ptr() for one in (query, key, positions, keys)}
    others = [one for one in kept if one.untyped_storage().data_ptr() not in given]
    assert sum(one.nbytes for one in others) == 2 * 4 * 5 * 4  # the most and the total of a head's row


@HEADS
def test_checkpointing_changes_no_gradient(heads):
    query, key = inputs()

    def gradients(run) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(query * 2, key * 3).square().sum(), (query, key))

    def rows(query: Tensor, key: Tensor) -> Tensor:
        return attention_rows(query, key, POSITIONS, KEPT, Scoring(SCALING), heads)

    plain = gradients(rows)
    again = gradients(lambda *args: checkpoint(rows, *args, use_reentrant=False))
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_no_keys_no_attention():
    query, key = inputs()
    found = attention_rows(query, key, POSITIONS, torch.zeros(SAMPLES, 0, dtype=torch.long), Scoring(SCALING))
    assert found.shape == (SAMPLES, 6, ROWS, 0)
    found.sum().backward()
    assert query.grad is not None
    assert query.grad.abs().sum() == 0
