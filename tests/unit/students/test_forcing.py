"""Attention forcing against the formula by hand, for layers that see pictures alone and for self-attention."""

from __future__ import annotations

import pytest
import torch

from lavender.students.forcing import Forcing
from lavender.students.image_keys import grid_boxes, key_layout, on_keys
from lavender.students.rows import Scoring, select_rows

SAMPLES, HEADS, GROUPS, TOKENS, WIDTH = 2, 4, 2, 9, 5


@pytest.mark.parametrize("heads", [None, (1, 2)])
@pytest.mark.parametrize("cross", [True, False])
def test_a_forced_row_attends_as_its_map_says(cross, heads):
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    layout = key_layout([[grid_boxes(2, 2)]] * SAMPLES)
    keys_BI = None if cross else torch.tensor([[1, 2, 3, 4], [0, 1, 2, 3]])
    num_keys = 4 if cross else TOKENS
    query, key, value = (
        random(SAMPLES, heads, num, WIDTH) for heads, num in ((HEADS, TOKENS), (GROUPS, num_keys), (GROUPS, num_keys))
    )
    mask = torch.ones(SAMPLES, 1, TOKENS, num_keys, dtype=torch.bool)
    if not cross:
        mask = mask.tril()
    heat = random(SAMPLES, 2, 4, 4)
    rows = torch.tensor([[5, 7, 8], [6, 8, 0]])
    shares = torch.tensor([[[0.5, 0.5, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0]]])
    forced = torch.tensor([[True, False], [False, True]])
    own = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    forcing = Forcing(heat, shares, forced, layout, torch.zeros(SAMPLES, 2, dtype=torch.long), heads)
    output = forcing.output(
        own.transpose(1, 2), query, key, value, Scoring(0.3, select_rows(mask, rows)), rows, keys_BI, None
    )
    repeat = HEADS // GROUPS
    scores = (query @ key.repeat_interleave(repeat, 1).mT * 0.3).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = own.transpose(1, 2).clone()
    quarters = on_keys(heat, layout, torch.zeros(SAMPLES, 2, dtype=torch.long))
    torch.testing.assert_close(quarters[0, 0, 0], heat[0, 0, :2, :2].mean().to(quarters))
    for sample, row, word in ((0, 5, 0), (0, 7, 0), (1, 8, 1)):
        spread = (quarters[sample, word] / quarters[sample, word].sum()).double()
        weights = scores[sample, :, row].clone()
        places = torch.arange(4) if keys_BI is None else keys_BI[sample]
        weights[:, places] = weights[:, places].sum(-1, keepdim=True) * spread
        mixed = torch.einsum("hk,hkd->hd", weights, value[sample].repeat_interleave(repeat, 0))
        for head in range(HEADS) if heads is None else heads:
            expected[sample, row, head] = mixed[head]
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    untouched = [(0, 8), (1, 6), (1, 0)]
    assert all(torch.equal(output[place], own.transpose(1, 2)[place]) for place in untouched)
    others = [head for head in range(HEADS) if heads is not None and head not in heads]
    assert torch.equal(output[:, :, others], own.transpose(1, 2)[:, :, others])


def forced_by(heat, mask, values):
    """The output of one forced row, the last of six, for image keys 0 to 3 (a row of four cells) and equal scores."""
    layout = key_layout([[grid_boxes(1, 4)]])
    forcing = Forcing(
        torch.tensor([[[heat]]]),
        torch.ones(1, 1, 1),
        torch.ones(1, 1, dtype=torch.bool),
        layout,
        torch.zeros(1, 1).long(),
    )
    query, key = torch.zeros(1, 1, 6, 1), torch.zeros(1, 1, 6, 1)
    value = torch.tensor(values).view(1, 1, 6, 1)
    own = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    rows, keys = torch.tensor([[5]]), torch.tensor([[0, 1, 2, 3]])
    return own[0, 0, 5].item(), forcing.output(
        own.transpose(1, 2), query, key, value, Scoring(1.0, select_rows(mask, rows)), rows, keys, None
    )[0, 5]


@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
def test_a_forced_row_attends_to_what_it_sees_alone(kind):
    """Its window shows the keys 2 to 5: each has a quarter of its attention, so 0.5 goes to image keys 2 and 3."""
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2:] = True
    if kind != "bool":
        dtype = getattr(torch, kind)
        mask = torch.zeros(1, 1, 6, 6, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min).float()
    values = [100.0, 100.0, 1.0, 2.0, 0.0, 0.0]
    _, forced = forced_by([1.0, 0.0, 0.25, 0.75], mask, values)
    assert forced.item() == pytest.approx(0.5 * (0.25 * 1 + 0.75 * 2))
    own, forced = forced_by([1.0, 1.0, 0.0, 0.0], mask, values)  # nothing of the map is in the window
    assert forced.item() == pytest.approx(own) == pytest.approx(0.75)


def test_a_row_whose_map_no_key_shows_keeps_its_attention():
    """The picture is cropped to its right half, and the thing is in the left one."""
    layout = key_layout([[grid_boxes(1, 2, (0.0, 0.5, 1.0, 1.0))]])
    forcing = Forcing(
        torch.tensor([[[[1.0, 0.0]]]]),
        torch.ones(1, 1, 1),
        torch.ones(1, 1, dtype=torch.bool),
        layout,
        torch.zeros(1, 1).long(),
    )
    query, key, value = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 2, 1)
    own = torch.ones(1, 1, 1, 1)
    output = forcing.output(own, query, key, value, Scoring(1.0), torch.tensor([[1]]) * 0, None, None)
    torch.testing.assert_close(output, own)
