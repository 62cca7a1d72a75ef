"""From layers, heads and passes to one map a word. Numbers by hand, on grids of a few cells.

Axis suffixes: B batch row, H head, C cell, W word; r c rows and columns.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lavender.config import ExtractionConfig
from lavender.errors import ConfigError
from lavender.teachers.diffusion.aggregate import NEAR, Aggregate, refine
from lavender.teachers.diffusion.base import Layer
from lavender.teachers.diffusion.layer_weights import head_weights
from lavender.teachers.diffusion.views import WHOLE


def layer(name: str, grid: tuple[int, int] = (2, 2)) -> Layer:
    return Layer(name, nn.Identity(), grid)


def heads(*maps: list[list[float]]) -> Tensor:
    """One row's attention (1, head, cell, word), of each head the words' maps."""
    return torch.tensor([maps], dtype=torch.float32).transpose(2, 3)


def aggregate(weights=None, tokens=((1.0, 1.0),), views=(WHOLE,), grid=(2, 2), **settings) -> Aggregate:
    return Aggregate(ExtractionConfig(grid=grid, **settings), weights or {}, views, torch.tensor(tokens))


def one_hot(place: int, cells: int) -> list[float]:
    return [float(cell == place) for cell in range(cells)]


# weights


def test_the_longest_beginning_of_a_name_counts():
    weights = {"up": 2.0, "up.1": 3.0, "up.1.attn": [1.0, 0.0], "down": 0.5}
    assert head_weights(weights, "up.0.attn", 2) == [2, 2]
    assert head_weights(weights, "up.1.proj", 3) == [3, 3, 3]
    assert head_weights(weights, "up.1.attn", 2) == [1, 0]
    assert head_weights(weights, "down.1.attn", 1) == [0.5]
    assert head_weights(weights, "mid.1.attn", 2) == [1, 1]  # without a weight
    assert head_weights({}, "up.0", 2) == [1, 1]


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_weights_than_heads_is_refused(count):
    with pytest.raises(ConfigError) as caught:
        head_weights({"up": [1.0] * count}, "up.0.attn", 2)
    assert str(caught.value) == (
        f"Got {count} weights for the 2 heads of layer up.0.attn. Expected one number, or one number per head. "
        "Do this: change layer_weights."
    )


def test_a_weighted_mean_by_hand():
    found = aggregate({"a": 3.0, "b": [1.0, 0.0]})
    found.add(layer("a"), heads([[4, 0, 0, 0], [0] * 4], [[0, 8, 0, 0], [0] * 4]))
    found.add(layer("b"), heads([[0, 0, 6, 0], [0] * 4], [[9, 9, 9, 9], [0] * 4]))
    # a: 3 · mean([4, 0], [0, 8]) = (6, 12); b: half of its heads' weights: (6 + 0) / 2 = 3; of 3 + 1/2 in all
    assert found.maps()[0, 0].flatten().tolist() == pytest.approx([6 / 3.5, 12 / 3.5, 3 / 3.5, 0])


def test_every_pass_counts_alike():
    found = aggregate()
    for value in (1.0, 2.0, 6.0):
        found.add(layer("a"), heads([[value, 0, 0, 0], [0] * 4]))
    assert found.maps()[0, 0].flatten().tolist() == [3, 0, 0, 0]


def test_noises_of_a_row_follow_one_another():
    """Two rows with three noises each."""
    found = aggregate(views=(WHOLE, WHOLE), tokens=((1.0, 1.0),) * 2)
    maps_BHCW = torch.zeros(6, 1, 4, 2)
    maps_BHCW[:, 0, 1, 0] = torch.tensor([1.0, 2, 6, 10, 20, 60])
    found.add(layer("a"), maps_BHCW)
    assert found.maps()[:, 0].flatten(1).tolist() == [[0, 3, 0, 0], [0, 30, 0, 0]]


def test_layers_of_different_grids_meet_on_the_last():
    found = aggregate(grid=(2, 4))
    found.add(layer("coarse", (1, 2)), heads([[2, 4], [0, 0]]))
    found.add(layer("fine", (2, 4)), heads([[8, 0, 0, 0, 0, 0, 0, 0], [0] * 8]))
    # the coarse one between cell centres: 2, 2.5, 3.5, 4 in both rows; the mean of both layers
    assert found.maps()[0, 0].tolist() == [[5, 1.25, 1.75, 2], [1, 1.25, 1.75, 2]]


def test_a_crop_is_zero_where_nothing_is_seen():
    found = aggregate(views=((0.0, 0.25, 1.0, 0.75),), grid=(2, 4))
    found.add(layer("a"), heads([[1, 2, 3, 4], [1, 1, 1, 1]]))
    assert found.maps()[0, 0].tolist() == [[0, 1, 2, 0], [0, 3, 4, 0]]


# competition: a text of four tokens; word 0 has one of them, word 1 two

TOKENS = ((1.0, 2.0, 4.0),)
MEANS = [[0.4, 0.1, 0.0, 0.2], [0.1, 0.1, 0.2, 0.0], [0.2, 0.1, 0.2, 0.05]]  # of each word's tokens, and of all


def test_share_by_hand():
    """A word's sum over the sum over all tokens: 0.4 / 0.8, 2 · 0.1 / 0.8 and so on."""
    found = aggregate(tokens=TOKENS, competition="share")
    found.add(layer("a"), heads(MEANS))
    assert found.maps()[0, 0].flatten().tolist() == pytest.approx([0.5, 0.25, 0, 1])
    assert found.maps()[0, 1].flatten().tolist() == pytest.approx([0.25, 0.5, 0.5, 0])


def test_contrast_by_hand():
    """Minus the mean of the other tokens: 0.4 − (0.8 − 0.4) / 3, 0.1 − (0.8 − 0.2) / 2 < 0 and so on."""
    found = aggregate(tokens=TOKENS, competition="contrast")
    found.add(layer("a"), heads(MEANS))
    assert found.maps()[0, 0].flatten().tolist() == pytest.approx([0.4 - 0.4 / 3, 0, 0, 0.2])
    assert found.maps()[0, 1].flatten().tolist() == pytest.approx([0, 0.1 - 0.2 / 2, 0.2 - 0.4 / 2, 0], abs=1e-7)


def test_a_text_of_one_word_has_nothing_to_stand_out_from():
    found = aggregate(competition="contrast", tokens=((3.0, 3.0),))
    found.add(layer("a"), heads([[0.4, 0.1, 0.0, 0.2]] * 2))
    assert found.maps()[0, 0].flatten().tolist() == pytest.approx([0.4, 0.1, 0, 0.2])


@pytest.mark.parametrize("competition", ["share", "contrast"])
def test_competition_where_nothing_is_seen_is_zero(competition):
    found = aggregate(tokens=TOKENS, competition=competition, views=((0.0, 0.25, 1.0, 0.75),), grid=(2, 4))
    found.add(layer("a"), heads(MEANS))
    assert found.maps()[..., [0, 3]].abs().max() == 0
    assert found.maps().isfinite().all()


@pytest.mark.parametrize("competition", ["share", "contrast"])
def test_a_column_without_a_word_is_zero(competition):
    """A row with fewer words than the widest."""
    found = aggregate(tokens=((1.0, 1.0, 4.0),), competition=competition)
    found.add(layer("a"), heads([MEANS[0], [0.0] * 4, MEANS[2]]))
    assert found.maps()[0, 1].abs().max() == 0


# selection of heads


def test_the_most_peaked_heads_of_each_word():
    """Of four maps the half whose peak stands out most from the mean, another half for each word."""
    found = aggregate(head_share=0.5)
    text = [0.25] * 4
    found.add(layer("a"), heads([[4, 0, 0, 0], text], [[1, 1, 1, 1], text]))
    found.add(layer("b"), heads([[0, 3, 1, 0], text], [[0.5, 0.5, 0, 0], text]))
    # contrasts: 3, 0, 2, 0.25
    assert found.maps()[0, 0].flatten().tolist() == [2, 1.5, 0.5, 0]


def test_heads_without_weight_are_not_selected():
    found = aggregate({"a": [0.0, 1.0]}, head_share=0.5)
    found.add(layer("a"), heads([[9, 0, 0, 0], [1] * 4], [[0, 1, 0, 0], [1] * 4]))
    assert found.maps()[0, 0].flatten().tolist() == [0, 1, 0, 0]


def test_at_least_one_head_is_selected():
    found = aggregate(head_share=0.01)
    found.add(layer("a"), heads([[9, 0, 0, 0], [1] * 4], [[0, 1, 0, 0], [1] * 4]))
    assert found.maps()[0, 0].flatten().tolist() == [9, 0, 0, 0]


def test_competition_is_within_the_selected_heads():
    """A share of the text's attention is at most 1: the text's is that of the heads selected for the word."""
    found = aggregate(tokens=((1.0, 2.0),), competition="share", head_share=0.5)
    found.add(layer("a"), heads([[0.8, 0.0, 0.0, 0.0], [0.4, 0.1, 0.1, 0.1]], [[0.1] * 4, [0.05, 0.9, 0.05, 0.05]]))
    assert found.maps()[0, 0].flatten().tolist() == pytest.approx([1, 0, 0, 0])


def test_memory_does_not_grow_with_layers():
    """Kept: sums of one row, word and cell for each grid, and where each head's peak is."""

    def kept(num_layers: int) -> int:
        found = aggregate(grid=(8, 8))
        for index in range(num_layers):
            found.add(layer(f"a.{index}", (16, 16)), torch.rand(1, 4, 256, 2))
        tensors = [*found._sums.values(), *found._heads.values(), *found._peaks]
        peaks = num_layers * 4 * 1 * 2
        assert sum(one.numel() for one in found._peaks) == peaks
        return sum(one.numel() for one in tensors) - peaks

    assert kept(1) == kept(13) == 256 * 2


def test_memory_of_the_selection_is_that_of_the_final_grid():
    found = aggregate(grid=(3, 5), head_share=0.5)
    for _ in range(7):  # passes
        found.add(layer("a", (16, 16)), torch.rand(1, 4, 256, 2))
    assert sum(one.numel() for one in found._heads.values()) == 4 * 2 * 3 * 5


# confidence


def test_agreement_by_hand():
    """Four heads on a grid of 4 × 4: two peaks in the map's own cell, one beside it, one far."""
    found = aggregate(grid=(4, 4))
    text = [1 / 16] * 16
    peaks = (5, 5, 6, 15)
    found.add(layer("a", (4, 4)), heads(*([one_hot(place, 16), text] for place in peaks)))
    assert found.maps()[0, 0].argmax() == 5
    # a neighbour is a quarter of the side away, more than 3/16
    assert NEAR < 1 / 4
    assert found.agreement(found.maps()).tolist() == [[0.5]]


def test_near_is_three_cells_of_sixteen():
    text = [1 / 256] * 256
    for apart, near in ((0, 1.0), (3, 1.0), (4, 2 / 3)):
        found = aggregate(grid=(16, 16))
        own = 16 * 7 + 5
        found.add(layer("a", (16, 16)), heads(*([one_hot(place, 256), text] for place in (own, own, own + apart))))
        assert found.agreement(found.maps()).item() == pytest.approx(near)


def test_agreement_knows_layers_of_other_grids_words_and_passes():
    found = aggregate(grid=(16, 16), tokens=((1.0, 1.0, 1.0),))
    for place in (5, 5, 5, 10):  # four passes of a coarse layer: word 0 wanders once, word 1 never
        found.add(layer("a", (4, 4)), heads([one_hot(place, 16), one_hot(9, 16), [1 / 16] * 16]))
    maps = found.maps()
    assert maps.shape == (1, 2, 16, 16)
    assert found.agreement(maps).tolist() == [[0.75, 1.0]]


def test_agreement_is_of_places_in_the_picture():
    """In a crop of the picture's left half a peak at the crop's middle is at the picture's first quarter."""
    found = aggregate(grid=(8, 8), views=((0.0, 0.0, 1.0, 0.5),))
    found.add(layer("a", (4, 4)), heads([one_hot(6, 16), [1 / 16] * 16]))  # row 1, column 2 of the crop
    maps_BWrc = torch.zeros(1, 1, 8, 8)
    maps_BWrc[0, 0, 3, 2] = 1  # where the layer's peak is: (0.375, 0.3125)
    assert found.agreement(maps_BWrc).item() == 1
    assert found.agreement(maps_BWrc.roll(3, dims=-1)).item() == 0


def test_heads_without_weight_have_no_say():
    found = aggregate({"a": [1.0, 0.0]}, grid=(4, 4))
    found.add(layer("a", (4, 4)), heads([one_hot(5, 16), [0] * 16], [one_hot(15, 16), [0] * 16]))
    assert found.agreement(found.maps()).item() == 1


def test_agreement_is_a_share():
    found = aggregate(grid=(7, 5), views=((0.0, 0.2, 1.0, 0.7), WHOLE), tokens=((1.0,) * 4,) * 2)
    for index in range(5):
        found.add(layer(f"a.{index}", (6, 4)), torch.rand(4, 3, 24, 4))
    confidence = found.agreement(found.maps())
    assert confidence.shape == (2, 3)
    assert ((confidence >= 0) & (confidence <= 1)).all()


# refinement


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("words", [1, 2, 9])  # more words than a head is wide
def test_refinement_is_the_softmax_times_the_map(order, words):
    """softmax(QKᵀ/√d) of each layer and head, written out; two layers, two rows of two noises each."""
    grid, maps_BWrc = (3, 5), torch.rand(2, words, 3, 5)
    attention = [(layer(name, grid), torch.randn(4, 3, 15, 4) * 2, torch.randn(4, 3, 15, 4) * 2) for name in "ab"]
    expected = maps_BWrc.double().flatten(2)
    for _ in range(order):
        probabilities = torch.stack([(query.double() @ key.double().mT / 2).softmax(-1) for _, query, key in attention])
        mean_BCC = probabilities.mean(dim=(0, 2)).unflatten(0, (2, 2)).mean(dim=1)
        expected = (mean_BCC @ expected.mT).mT
    found = refine(maps_BWrc, attention, [WHOLE, WHOLE], order)
    torch.testing.assert_close(found.double(), expected.unflatten(2, grid), rtol=0, atol=1e-6)


def test_refinement_in_a_crop_stays_in_it():
    view = (0.0, 0.25, 1.0, 0.75)
    attention = [(layer("a", (4, 4)), torch.randn(1, 2, 16, 4), torch.randn(1, 2, 16, 4))]
    maps = torch.zeros(1, 1, 4, 8)
    maps[..., 2:6] = torch.rand(4, 4)
    found = refine(maps, attention, [view], 1)
    assert found[..., [0, 1, 6, 7]].abs().max() == 0
    _, query, key = attention[0]
    probabilities = (query @ key.mT / 2).softmax(-1).mean(dim=1)
    expected = (probabilities @ maps[..., 2:6].reshape(1, 16, 1)).reshape(4, 4)
    torch.testing.assert_close(found[0, 0, :, 2:6], expected, rtol=0, atol=1e-5)


def test_refinement_spreads_a_point_over_what_is_alike():
    """Cells of two kinds that attend to their own kind alone: a point becomes its kind's whole region."""
    kind = torch.tensor([0, 0, 1, 1, 0, 1])
    marks = torch.nn.functional.one_hot(kind, 2).float() * 30
    attention = [(layer("a", (2, 3)), marks[None, None], marks[None, None])]
    point = torch.zeros(1, 1, 2, 3)
    point[0, 0, 0, 1] = 3.0
    found = refine(point, attention, [WHOLE], 1)
    torch.testing.assert_close(found.flatten(), (kind == 0).float(), rtol=0, atol=1e-5)
