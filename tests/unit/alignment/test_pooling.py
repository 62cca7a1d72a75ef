"""Many layers and heads to one map, by hand; attention flow at the edge of the number formats; the head's settings."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from lavender.alignment.aligner import Aligner
from lavender.alignment.losses import per_word_loss
from lavender.alignment.objective import AlignmentHead, AlignmentRequest
from lavender.alignment.pooling import POOLINGS, flow, num_channels, pooled
from lavender.config import DIRECT_LOSSES, AlignmentConfig, AttentionLoss, Pooling
from lavender.students.capture import row_tensors

KEYS, DEPTH = 577, 40  # a row of 577 keys in 40 layers: about 577⁻⁴⁰ = 10⁻¹¹⁰
TWO_LAYERS = torch.tensor(
    [
        [[[0.5, 0.25, 0.25], [0.125, 0.5, 0.375]]],
        [[[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]],
    ]
)[:, None]
"""(layer 2, sample 1, head 1, row 2, key 3)."""


def squares(maps: Tensor) -> Tensor:
    """An Aligner that is easy to compute, and not linear: the order of steps matters."""
    return maps.square().sum(dim=1)


def deep_rows(dtype: torch.dtype = torch.float32) -> Tensor:
    """(layer 40, sample 2, head 3, row 5, key 577)."""
    return (torch.randn(DEPTH, 2, 3, 5, KEYS) * 0.1).softmax(dim=-1).to(dtype)


def product(rows: Tensor, weights: Tensor) -> Tensor:
    """Eq. 42 as written, each row summing to 1 before its weight; float64 goes down to 10⁻³⁰⁸."""
    whole = rows.double().prod(dim=0)
    return (whole / whole.sum(dim=-1, keepdim=True) * weights[:, None, :, None])[None]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        # the Aligner on each layer: 1 + 25, 4 + 0, 9 + 1 and 4 + 16, 4 + 36, 0 + 4
        ("layer-mean", [23, 22, 7]),
        ("learn", [23, 22, 7]),
        ("layer-max", [26, 40, 10]),
        # mean of heads 3, 1, 2 and 3, 4, 1; then of layers 3, 2.5, 1.5, or the maximum 3, 4, 2
        ("mean-mean", [9, 6.25, 2.25]),
        ("mean-max", [9, 16, 4]),
        # maximum of heads 5, 2, 3 and 4, 6, 2; then the mean of layers 4.5, 4, 2.5, or the maximum 5, 6, 3
        ("max-mean", [20.25, 16, 6.25]),
        ("max-max", [25, 36, 9]),
        # a flow has one layer; here two, whose mean is taken: of 3, 1, 2 and 3, 4, 1 squared, of 5, 2, 3 and 4, 6, 2
        ("mean-flow-sum", [9, 8.5, 2.5]),
        ("mean-flow-multi", [9, 8.5, 2.5]),
        ("max-flow-sum", [20.5, 20, 6.5]),
        ("max-flow-multi", [20.5, 20, 6.5]),
    ],
)
def test_poolings_by_hand(pooling, expected):
    """Two layers of two heads, one word, one row of three cells."""
    attention = torch.tensor([[[1.0, 2, 3], [5, 0, 1]], [[2, 2, 0], [4, 6, 2]]])
    assert pooled(attention[:, None, :, None], pooling, squares).tolist() == [[expected]]


@pytest.mark.parametrize("pooling", ["flow-sum", "flow-multi"])
def test_the_one_layer_of_a_flow_goes_through_the_aligner(pooling):
    attention = torch.tensor([[1.0, 2, 3], [5, 0, 1]])
    assert pooled(attention[None, None, :, None], pooling, squares).tolist() == [[[26, 4, 10]]]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_words_do_not_see_each_other(pooling):
    attention, shapes = torch.rand(1 if POOLINGS[pooling].flow else 3, 5, 2, 7, 11), []

    def aligner(maps: Tensor) -> Tensor:
        shapes.append(tuple(maps.shape))
        return squares(maps)

    maps = pooled(attention, pooling, aligner)
    num_maps = 15 if pooling in ("layer-mean", "layer-max", "learn") else 5
    assert shapes == [(num_maps, num_channels(pooling, 2), 7, 11)]
    assert maps.shape == (5, 7, 11)
    for word in range(5):
        torch.testing.assert_close(pooled(attention[:, word : word + 1], pooling, aligner)[0], maps[word])


def test_maps_are_float32_whatever_the_aligner_computes_in():
    attention = torch.rand(3, 5, 2, 7, 11).bfloat16()
    assert {pooled(attention, pooling, squares).dtype for pooling in POOLINGS} == {torch.float32}


def test_channels_are_heads_unless_these_are_pooled_first():
    assert {pooling: num_channels(pooling, 7) for pooling in POOLINGS} == {
        "layer-mean": 7,
        "layer-max": 7,
        "mean-mean": 1,
        "max-mean": 1,
        "mean-max": 1,
        "max-max": 1,
        "flow-sum": 7,
        "flow-multi": 7,
        "learn": 7,
        "mean-flow-sum": 1,
        "max-flow-sum": 1,
        "mean-flow-multi": 1,
        "max-flow-multi": 1,
    }
    assert [pooling for pooling in POOLINGS if POOLINGS[pooling].flow] == [
        "flow-sum",
        "flow-multi",
        "mean-flow-sum",
        "max-flow-sum",
        "mean-flow-multi",
        "max-flow-multi",
    ]


@pytest.mark.parametrize(
    ("pooling", "rows"),
    [
        # means: of 0.5 and 0.25, 0.25 and 0.5, 0.25 and 0.25, by a half; of 0.125 and 0.5, 0.5 and 0.25, 0.375 and 0.25
        ("flow-sum", [[0.1875, 0.1875, 0.125], [0.3125, 0.375, 0.3125]]),
        # 2/16, 2/16, 1/16 of their sum, by a half; 2/32, 4/32, 3/32 of theirs
        ("flow-multi", [[0.2, 0.2, 0.1], [2 / 9, 4 / 9, 3 / 9]]),
    ],
)
def test_flow_by_hand(pooling, rows):
    """Rows 1 and 3 of a sequence are its second and fourth: r = 2/4 and 4/4."""
    torch.testing.assert_close(flow(TWO_LAYERS, torch.tensor([[1, 3]]), pooling), torch.tensor([[[rows]]]))


@pytest.mark.parametrize(
    ("pooling", "row"),
    [
        # heads 1, 2 and 3, 2; 4, 0 and 2, 4 by tenths: means 2, 2 and 3, 2; maxima 3, 2 and 4, 4
        ("mean-flow-sum", [0.25, 0.2]),
        ("max-flow-sum", [0.35, 0.3]),
        ("mean-flow-multi", [0.6, 0.4]),
        ("max-flow-multi", [0.6, 0.4]),
    ],
)
def test_heads_are_pooled_before_they_flow(pooling, row):
    """In each layer: the product of maxima, 12 : 8, is not the maximum of products."""
    rows = torch.tensor([[[0.1, 0.2], [0.3, 0.2]], [[0.4, 0.0], [0.2, 0.4]]])[:, None, :, None]
    found = flow(rows, torch.tensor([[0]]), pooling)
    assert found.shape == (1, 1, 1, 1, 2)
    torch.testing.assert_close(found.flatten(), torch.tensor(row))


@pytest.mark.parametrize("pooling", ["flow-sum", "flow-multi"])
def test_weights_are_relative_to_the_last_row_of_each_sample(pooling):
    """In any order, with padding in place 0; a sample without a row keeps its finite numbers."""
    positions = torch.tensor([[2, 11, 5], [10, 0, 0], [0, 0, 0]])
    weights = flow(torch.full((1, 3, 2, 3, 5), 0.2), positions, pooling)[0, :, 1, :, 3] * 5
    expected = torch.tensor([[3 / 12, 1, 6 / 12], [1, 1 / 11, 1 / 11], [1, 1, 1]])
    torch.testing.assert_close(weights, expected)


def test_one_layer_flows_as_it_is():
    rows, positions = deep_rows()[:1], torch.tensor([[2, 3, 5, 7, 11], [0, 6, 9, 1, 4]])
    weighted = rows * ((positions + 1) / torch.tensor([[12], [10]]))[None, :, None, :, None]
    torch.testing.assert_close(flow(rows, positions, "flow-sum"), weighted)
    total = rows.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(flow(rows, positions, "flow-multi"), weighted / total, rtol=1e-5, atol=0)


def test_a_flow_sums_layers():
    rows, positions = deep_rows(), torch.full((2, 5), 6)
    torch.testing.assert_close(flow(rows, positions, "flow-sum"), rows.double().mean(0)[None].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_forty_layers_is_a_map(dtype):
    """Without logarithms nothing is left of it."""
    rows, positions = deep_rows(dtype), torch.tensor([[2, 3, 5, 7, 11], [0, 6, 9, 1, 4]])
    assert rows.prod(dim=0).count_nonzero() == 0
    found = flow(rows, positions, "flow-multi")
    weights = (positions.double() + 1) / torch.tensor([[12], [10]])
    torch.testing.assert_close(found.double(), product(rows, weights), rtol=1e-3, atol=0)
    heat = found / found.amax(dim=-1, keepdim=True)
    assert (heat.quantile(0.1, dim=-1) > 0.01).all()
    assert (heat.quantile(0.9, dim=-1) < 0.9).all()


def test_the_gradient_of_a_product_is_its_derivative():
    rows, positions = deep_rows(), torch.tensor([[2, 3, 5, 7, 11], [0, 6, 9, 1, 4]])
    weights, asked = (positions.double() + 1) / torch.tensor([[12], [10]]), torch.rand(2, 3, 5, KEYS)
    found, expected = rows.clone().requires_grad_(), rows.double().requires_grad_()
    (flow(found, positions, "flow-multi") * asked).sum().backward()
    (product(expected, weights) * asked).sum().backward()
    assert found.grad is not None
    assert expected.grad is not None
    assert found.grad.abs().amax(dim=-1).min() > 0.1
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("masked_layers", [[7], [3, 7, 31], list(range(DEPTH))])
def test_a_masked_key_stays_masked(masked_layers):
    """By one layer: at most 10⁻¹² where others have about 1/577, in a row that sums to 1. No gradient flows."""
    rows, positions = deep_rows(), torch.tensor([[2, 3, 5, 7, 11], [0, 6, 9, 1, 4]])
    rows[masked_layers, ..., 11:101] = 0
    rows.requires_grad_()
    found = flow(rows, positions, "flow-multi")
    assert 0 <= found[..., 11:101].min() <= found[..., 11:101].max() < 1e-8
    assert found[..., 101:].sum(dim=-1).min() > 0.1 / 12
    found.square().sum().backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()
    assert rows.grad[masked_layers][..., 11:101].count_nonzero() == 0
    kept = torch.cat([found[..., :11], found[..., 101:]], dim=-1)
    bare = torch.cat([rows[..., :11], rows[..., 101:]], dim=-1)
    torch.testing.assert_close(kept, flow(bare, positions, "flow-multi"))


@pytest.mark.parametrize("pooling", ["flow-sum", "flow-multi"])
def test_samples_heads_and_rows_flow_apart(pooling: Pooling):
    rows, positions = torch.rand(3, 2, 5, 7, 11), torch.full((2, 7), 4)
    whole = flow(rows, positions, pooling)
    assert whole.shape == (1, 2, 5, 7, 11)
    one = flow(rows[:, 1:, 3:4, 2:3], positions[1:, 2:3], pooling)
    torch.testing.assert_close(whole[:, 1:, 3:4, 2:3], one)


@pytest.mark.parametrize("kind", [kind for kind in get_args(AttentionLoss) if kind not in DIRECT_LOSSES])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_head_goes_by_its_settings(pooling, kind):
    """Three layers, five heads, six keys that are 2 × 3 cells; two samples with two words and one."""
    tensors = row_tensors([[(3, 4), (6,)], [(9, 10)]])
    edges = torch.tensor([(row / 2, col / 3, (row + 1) / 2, (col + 1) / 3) for row in range(2) for col in range(3)])
    targets, rows = torch.rand(2, 2, 2, 3), torch.rand(3, 2, 5, 3, 6).softmax(dim=-1)
    keys = {"boxes": edges.expand(2, -1, -1), "pictures": torch.zeros(2, 6, dtype=torch.long)}
    request = AlignmentRequest((1, 4, 7), tensors | keys | {"targets": targets})
    request.rows = dict(zip((1, 4, 7), rows, strict=True))
    config = AlignmentConfig(
        pooling=pooling,
        attention_loss=kind,
        aligner="light",
        aligner_kind="mlp",
        aligner_norm="none",
        aligner_activation="leaky-relu",
        aligner_width=7,
    )
    head = AlignmentHead(5, (1, 4, 7), config).eval()
    assert head.aligner is not None
    assert [str(layer) for layer in head.aligner] == [
        str(layer)
        for layer in Aligner(
            num_channels(pooling, 5), width=7, form="light", kind="mlp", norm="none", activation="leaky-relu"
        )
    ]
    flown = flow(rows, torch.tensor([[3, 4, 6], [9, 10, 0]]), pooling) if "flow" in pooling else rows
    # (layer, word, head, key): the means of two rows, one row
    words = torch.stack([flown[:, 0, :, :2].mean(2), flown[:, 0, :, 2], flown[:, 1, :, :2].mean(2)], dim=1)
    maps = pooled(words.unflatten(-1, (2, 3)) * 6, pooling, head.aligner)
    torch.testing.assert_close(head.maps(request), maps, rtol=1e-4, atol=1e-4)
    expected = per_word_loss(head.maps(request), torch.stack([targets[0, 0], targets[0, 1], targets[1, 0]]), kind).sum()
    torch.testing.assert_close(head(request), expected)


def two_words(config: AlignmentConfig) -> tuple[AlignmentHead, AlignmentRequest]:
    """Three layers of five heads, one sample with two words, six keys that are 2 × 3 cells."""
    torch.manual_seed(7)
    edges = torch.tensor([(row / 2, col / 3, (row + 1) / 2, (col + 1) / 3) for row in range(2) for col in range(3)])
    keys = {"boxes": edges[None], "pictures": torch.zeros(1, 6, dtype=torch.long)}
    request = AlignmentRequest((1, 4, 7), row_tensors([[(3,), (6,)]]) | keys | {"targets": torch.rand(1, 2, 2, 3)})
    request.rows = {layer: torch.rand(1, 5, 2, 6).softmax(dim=-1) for layer in (1, 4, 7)}
    return AlignmentHead(5, (1, 4, 7), config).eval(), request


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_the_chosen_heads_count(pooling):
    head, request = two_words(AlignmentConfig(attention_loss="published", pooling=pooling, heads=(4, 1)))
    maps = head.maps(request)
    for layer in request.rows.values():
        layer[:, [0, 2, 3]] = torch.rand(1, 3, 2, 6)
    torch.testing.assert_close(head.maps(request), maps)
    request.rows[4][:, 1] = torch.rand(1, 2, 6)
    assert not torch.allclose(head.maps(request), maps)


@pytest.mark.parametrize("kind", [*DIRECT_LOSSES, "published"])
def test_words_count_by_their_weight(kind):
    head, request = two_words(AlignmentConfig(attention_loss=kind))
    request.weights = torch.tensor([[1.0, 0.0]])
    first = head(request)
    request.weights = torch.tensor([[0.0, 1.0]])
    second = head(request)
    request.weights = torch.tensor([[0.5, 0.25]])
    torch.testing.assert_close(head(request), 0.5 * first + 0.25 * second)
    assert abs(first - second) > 0.01
