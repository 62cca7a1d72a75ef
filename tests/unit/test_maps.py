"""Word maps and the small functions on maps, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lavender.maps import Word, WordMaps, entropy, min_max, to_distribution, to_heat

MAPS = torch.tensor([[[1.0, 2.0, 5.0], [2.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
TEXT = "a red dog"
RED, DOG = Word("red", 2, 5, "red", "adjective"), Word("dog", 6, 9, "dog", "noun")


def test_heat_has_maximum_one_and_zero_stays_zero():
    torch.testing.assert_close(to_heat(MAPS)[0], torch.tensor([[0.2, 0.4, 1.0], [0.4, 0, 0]]))
    assert to_heat(MAPS)[1].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert to_heat(torch.full((2, 3), 1e-30)).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_a_distribution_sums_to_one_and_zero_becomes_uniform():
    torch.testing.assert_close(to_distribution(MAPS)[0], torch.tensor([[0.1, 0.2, 0.5], [0.2, 0, 0]]))
    torch.testing.assert_close(to_distribution(MAPS)[1], torch.full((2, 3), 1 / 6))


def test_min_max_scales_each_map_by_itself_and_a_flat_map_becomes_zero():
    maps = torch.stack([MAPS[0] + 3, torch.full((2, 3), 7.0)])
    expected = torch.stack([torch.tensor([[0.2, 0.4, 1.0], [0.4, 0, 0]]), torch.zeros(2, 3)])
    torch.testing.assert_close(min_max(maps), expected, rtol=0, atol=1e-6)
    assert min_max(maps).max() <= 1


def test_min_max_has_a_gradient_on_a_flat_map():
    flat = torch.full((1, 5, 7), 2.0, requires_grad=True)
    min_max(flat).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_entropy_in_nats():
    assert entropy(torch.ones(5, 7)).item() == pytest.approx(math.log(35))
    assert entropy(torch.tensor([[0.0, 4.0], [0.0, 4.0]])).item() == pytest.approx(math.log(2))
    assert entropy(torch.tensor([[0.0, 0.3]])).item() == 0
    assert entropy(MAPS).tolist() == pytest.approx(
        [-(0.1 * math.log(0.1) + 0.4 * math.log(0.2) + 0.5 * math.log(0.5)), math.log(6)]
    )


def test_any_leading_axes():
    stack = torch.rand(2, 3, 5, 7)
    for function in (to_heat, to_distribution, min_max):
        assert torch.equal(function(stack)[1, 2], function(stack[1, 2]))
    assert entropy(stack).shape == (2, 3)


def test_word_maps_know_their_grid():
    assert WordMaps("ab", TEXT, (RED, DOG), torch.zeros(2, 5, 7)).grid == (5, 7)
    assert WordMaps("ab", TEXT, (), torch.zeros(0, 5, 7)).grid == (5, 7)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 7), (2, 35), (1, 2, 5, 7)])
def test_maps_and_words_must_be_as_many(shape):
    with pytest.raises(ValueError, match=r"for 2 words; expected \(word, rows, cols\)"):
        WordMaps("ab", TEXT, (RED, DOG), torch.zeros(shape))


def test_a_word_must_stand_at_its_span():
    with pytest.raises(ValueError, match="Got word 'dog' at 5:8, which is not in 'a red dog'"):
        WordMaps("ab", TEXT, (Word("dog", 5, 8, "dog", "noun"),), torch.zeros(1, 5, 7))


@pytest.mark.parametrize(("text", "start", "end"), [("", 3, 3), ("do", -3, -1), ("red dog", 2, 99)])
def test_a_span_must_be_of_the_text(text, start, end):
    with pytest.raises(ValueError, match="which is not in 'a red dog'"):
        WordMaps("ab", TEXT, (Word(text, start, end, "dog", "noun"),), torch.zeros(1, 5, 7))


def test_map_of_a_span_is_the_mean_of_its_words():
    maps = torch.stack([torch.full((5, 7), 0.25), torch.full((5, 7), 0.75)])
    word_maps = WordMaps("ab", TEXT, (RED, DOG), maps)

    def value(start: int, end: int) -> float | None:
        found = word_maps.map_of(start, end)
        return None if found is None else found[3, 5].item()

    assert value(2, 5) == 0.25
    assert value(6, 9) == 0.75
    assert value(2, 9) == value(4, 7) == 0.5
    assert value(0, 1) is None
    assert value(5, 6) is None  # the space between
