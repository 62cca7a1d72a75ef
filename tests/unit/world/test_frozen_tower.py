"""A frozen tower runs once per picture, and gives what it gives without the memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from lavender.students.loading import load_run
from lavender.world import STUDENT_PATHS
from lavender.world.studies.frozen_tower import each_picture_once

TOLERANCE = 1e-4  # float32 sums in batches of another size; the states are of the order of 1


@pytest.fixture
def tower() -> MllamaVisionModel:
    tower = load_run(STUDENT_PATHS["mllama"])[0].model.vision_model
    assert isinstance(tower, MllamaVisionModel)
    return tower


@pytest.fixture
def seen(tower: MllamaVisionModel) -> Iterator[list[int]]:
    """How many pictures pass the tower, per run of it."""
    seen: list[int] = []
    hook = tower.patch_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]) // 2))
    yield seen
    hook.remove()


def _batch(*pictures: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of random pictures of one tile beside an empty one; equal numbers give equal pictures."""
    pixels = torch.stack([torch.randn(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(n)) for n in pictures])
    mask = torch.tensor([[[1, 0]]] * len(pictures))
    return pixels, torch.ones(len(pictures), 1, dtype=torch.int64), mask


def _run(tower: MllamaVisionModel, *pictures: int) -> Tensor:
    return tower(*_batch(*pictures)).last_hidden_state


def test_frozen_tower_sees_each_picture_once(tower: MllamaVisionModel, seen: list[int]) -> None:
    tower.requires_grad_(False)
    expected = _run(tower, 1, 2, 3, 2)
    seen.clear()
    with each_picture_once():
        torch.testing.assert_close(_run(tower, 2, 1), expected[[1, 0]], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(_run(tower, 1, 2, 3, 2), expected, atol=TOLERANCE, rtol=0)
    assert seen == [2, 1]
    _run(tower, 1)
    assert seen == [2, 1, 1]  # outside the context, nothing is remembered


def test_tower_that_trains_gets_gradients(tower: MllamaVisionModel, seen: list[int]) -> None:
    with each_picture_once():
        for _ in range(2):
            _run(tower, 1).square().mean().backward()
    assert seen == [1, 1]
    assert tower.patch_embedding.weight.grad is not None
    assert float(tower.patch_embedding.weight.grad.abs().max()) > 0


def test_changed_weights_are_seen(tower: MllamaVisionModel) -> None:
    with each_picture_once(), torch.no_grad():
        before = _run(tower, 1)
        tower.patch_embedding.weight.mul_(2)
        after = _run(tower, 1)
    torch.testing.assert_close(after, _run(tower, 1).detach(), atol=TOLERANCE, rtol=0)
    assert float((after - before).abs().max()) > 0.1


def test_other_pictures_and_towers_are_not_mixed_up(tower: MllamaVisionModel) -> None:
    other = load_run(STUDENT_PATHS["mllama_new_words"])[0].model.vision_model
    with torch.no_grad():
        expected = [_run(tower, 1), _run(tower, 2), _run(other, 1)]
        with each_picture_once():
            got = [_run(tower, 1), _run(tower, 2), _run(other, 1)]
    for one, another in zip(got, expected, strict=True):
        torch.testing.assert_close(one, another, atol=TOLERANCE, rtol=0)
    assert float((expected[0] - expected[1]).abs().max()) > 0.1
