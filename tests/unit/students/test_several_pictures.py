"""Attention laid on several pictures of a sample, and through latents; and how a resampler's attention is caught."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lavender.errors import CaptureError, DataError
from lavender.students.base import VlmAdapter, padded_keys
from lavender.students.capture import AttentionRequest, CaptureSession
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout, to_grid

TOP, BOTTOM = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])[:, None]  # boxes (1, 4)


def test_a_layout_counts_pictures_and_pads():
    layout = key_layout([[grid_boxes(2, 1), grid_boxes(1, 3)], [], [grid_boxes(1, 1)]])
    assert layout.pictures.tolist() == [[0, 0, 1, 1, 1], [-1] * 5, [0, -1, -1, -1, -1]]
    assert layout.boxes.shape == (3, 5, 4)
    assert layout.boxes.dtype == torch.float32
    assert layout.boxes[0, 1].tolist() == [0.5, 0, 1, 1]
    assert layout.boxes[2, 1:].abs().sum() == 0
    assert layout.views is None
    assert key_layout([[], []]).boxes.shape == (2, 0, 4)


def test_keys_are_positions_padded_with_minus_one():
    """The first token may be a picture's."""
    places = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert padded_keys(places).tolist() == [[0, 2, 3], [-1, -1, -1], [3, -1, -1]]


def test_a_word_is_laid_from_its_own_picture():
    """Two pictures of two keys each, upper and lower half; two words of the same attention."""
    halves = torch.cat([TOP, BOTTOM])
    layout = key_layout([[halves, halves]])
    attention = torch.tensor([0.1, 0.2, 0.3, 0.4])[None, None, None, None].expand(1, 1, 1, 3, 4)
    maps = to_grid(attention, layout, torch.tensor([[1, 0, 1]]), (2, 1))[0, 0, 0, ..., 0]
    # two cells: uniform attention of 1 on one picture would be 1 in each
    torch.testing.assert_close(maps, torch.tensor([[0.6, 0.8], [0.2, 0.4], [0.6, 0.8]]))


def test_latents_are_laid_where_they_look():
    """Two samples: one of two views of the same picture (the whole, the lower half), one of another picture."""
    whole, lower = torch.cat([TOP, BOTTOM]), torch.tensor([[0.5, 0, 0.75, 1], [0.75, 0, 1, 1]])
    views = torch.tensor([[0, 0, 1, 1], [2, 2, -1, -1]])
    pictures = torch.tensor([[0, 0, 0, 0], [0, 0, -1, -1]])
    layout = KeyLayout(torch.stack([whole, lower, whole]), pictures, views)
    mixing = torch.tensor([[[1, 0], [0.5, 0.5]], [[0.25, 0.75], [0, 1]], [[0, 1], [0, 1]]], requires_grad=True)
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 9, 9]])[None, :, None, None]
    maps = to_grid(attention, layout, torch.zeros(2, 1, dtype=torch.long), (4, 1), mixing)[0, :, 0, 0, :, 0]
    first = [(0.1 + 0.2 / 2) / 2] * 2 + [0.2 / 4 + 0.3 / 4, 0.2 / 4 + 0.3 * 0.75 + 0.4]
    torch.testing.assert_close(maps[0], torch.tensor(first) * 4)
    torch.testing.assert_close(maps[1], torch.tensor([0, 0, 0.375, 0.375]) * 4)
    maps[0, 3].backward()
    assert mixing.grad is not None
    assert mixing.grad[1, 1].tolist() == pytest.approx([0, 1.6])  # 0.4 · 4 cells, of its second patch alone
    assert mixing.grad[2].abs().sum() == 0


def test_attention_that_does_not_fit_its_layout_is_refused():
    boxes, words = torch.zeros(1, 3, 4), torch.zeros(1, 1, dtype=torch.long)
    keys, attention = torch.zeros(1, 3, dtype=torch.long), torch.rand(1, 1, 1, 1, 3)
    for wrong in (
        (attention[..., :2], KeyLayout(boxes, keys)),
        (attention, KeyLayout(boxes[:, :2], keys)),
        (attention, KeyLayout(boxes, keys[:, :2])),
    ):
        with pytest.raises(CaptureError, match=r"Expected a box for each key\."):
            to_grid(*wrong, words, (2, 2))
    views = KeyLayout(torch.zeros(1, 5, 4), keys, torch.zeros(1, 3, dtype=torch.long))
    for mixing in (None, torch.rand(1, 3, 4), torch.rand(1, 2, 5), torch.rand(2, 3, 5)):
        with pytest.raises(CaptureError, match=r"Expected \(view, latent, patch\) = \(1, 3, 5\), captured"):
            to_grid(attention, views, words, (2, 2), mixing)
    assert to_grid(attention, views, words, (2, 2), torch.rand(1, 3, 5)).shape == (1, 1, 1, 1, 2, 2)


class Resampling(nn.Module):
    """A model whose resampler runs `times`, and which may fail afterwards."""

    def __init__(self):
        super().__init__()
        self.resampler, self.times, self.fails = nn.Linear(3, 3), 1, False
        self.config = PreTrainedConfig()
        self.config._attn_implementation = "sdpa"

    def forward(self, states: Tensor, attention_mask: Tensor | None = None, attention_request: Any = None) -> Tensor:
        for _ in range(self.times):
            states = self.resampler(states)
        if self.fails:
            raise KeyError("mine")
        return states


class Adapter:
    """Of the family of `Resampling`."""

    def hooks(self, model: Resampling) -> list:
        return []

    def resampler(self, model: Resampling) -> nn.Module:
        return model.resampler

    def latent_attention(self, resampler: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return args[0] + output


@pytest.fixture
def resampling() -> tuple[Any, Any]:
    """A model with its hooks, and how to make a request."""
    model = Resampling()
    CaptureSession(cast(Any, model), cast(VlmAdapter, Adapter()))
    return model, lambda: AttentionRequest(torch.zeros(1, 1, dtype=torch.long), (0,))


def test_a_request_gets_the_attention_of_its_own_forward(resampling):
    model, make = resampling
    first, second, states = make(), make(), torch.rand(2, 5, 3)
    model(states, attention_request=first)
    model(states * 2, attention_request=second)
    torch.testing.assert_close(first.mixing, states + model.resampler(states))
    torch.testing.assert_close(second.mixing, 2 * states + model.resampler(2 * states))
    assert first.mixing.requires_grad


def test_nothing_is_stored_when_no_request_is_under_way(resampling):
    """As when checkpointing runs the resampler again, during backward; also after a forward that failed."""
    model, make = resampling
    request, states = make(), torch.rand(2, 5, 3)
    model(states, attention_request=request)
    kept = request.mixing
    model.resampler(states * 3)
    model(states * 3)
    assert request.mixing is kept
    model.fails, failed = True, make()
    with pytest.raises(KeyError, match="mine"):
        model(states, attention_request=failed)
    kept = failed.mixing
    model.resampler(states * 3)
    assert failed.mixing is kept


def test_a_second_run_in_one_forward_is_refused(resampling):
    model, make = resampling
    model.times = 2
    with pytest.raises(CaptureError, match="Got a second run of Linear in one forward"):
        model(torch.rand(2, 5, 3), attention_request=make())


def test_padding_is_told(resampling):
    model, make = resampling
    for mask, padded in ((torch.ones(2, 5), False), (torch.tensor([[1, 1], [0, 1]]), True), (None, False)):
        request = make()
        model(torch.rand(2, 5, 3), attention_mask=mask, attention_request=request)
        assert request.padded is padded


def test_keys_and_boxes_are_checked_against_each_other():
    class Family(VlmAdapter):
        keys, layout = torch.tensor([[3, 4, -1]]), key_layout([[grid_boxes(1, 2)]])

        def image_keys(self, inputs):
            return self.keys

        def image_boxes(self, inputs, image_sizes, processor):
            return self.layout

    Family.__abstractmethods__ = frozenset()
    family, processor = cast(Any, Family)(None), cast(Any, None)
    with pytest.raises(DataError, match=r"Got \[2\] image keys per sample and boxes for \[2\]\. Expected a box"):
        family.key_tensors({}, [[(4, 4)]], processor)
    family.keys = torch.tensor([[3, 4]])
    assert set(family.key_tensors({}, [[(4, 4)]], processor)) == {"boxes", "pictures", "keys"}
    with pytest.raises(DataError, match=r"Got boxes of \[1\] pictures for samples of \[2\]\."):
        family.key_tensors({}, [[(4, 4), (5, 5)]], processor)
    seen = family.seen_from({"input_ids": torch.zeros(1, 6)}, key_layout([[grid_boxes(1, 1), grid_boxes(1, 1)]]))
    assert seen.tolist() == [[[False] * 3 + [True] * 3, [False] * 4 + [True] * 2]]
