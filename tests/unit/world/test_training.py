"""Training of the world's weights: a stopped training continues; the schedule and the averaged weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from lavender.world.student_models import StudentFamily
from lavender.world.training import common
from lavender.world.training.common import Ema, TrainingLoop, warmup_stable_decay
from lavender.world.training.students import paste_loss


class Stopped(Exception):
    """Stands for whatever stops a training."""


def train(folder: Path, steps: int, stop_before: int | None = None) -> tuple[nn.Linear, Ema]:
    """Fit a linear layer to a target that depends on the step, with noise on its input."""
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_stable_decay(steps, warmup=2))
    ema = Ema({"model": model}, decay=0.9)
    loop = TrainingLoop(folder / "model.pt", {"model": model}, optimizer, schedule, steps, ema)
    for step in loop.remaining():
        if step == stop_before:
            raise Stopped
        noise = 0.1 * torch.randn(1, 3)  # as dropout, from PyTorch's random state
        loss = (model(torch.full((1, 3), 0.5 + step) + noise) - 0.25 * step).square().mean()
        loop.update(loss, {"loss": loss.item()})
    return model, ema


def test_a_stopped_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SAVE_STEPS", 2)
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    model, ema = train(tmp_path / "whole", 7)
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", 7, stop_before=5)
    continued, continued_ema = train(tmp_path / "stopped", 7)
    # the same operations on restored tensors; the default tolerance allows for other kernels
    torch.testing.assert_close(continued.state_dict(), model.state_dict())
    torch.testing.assert_close(continued_ema.state_dict(), ema.state_dict())


def test_a_finished_training_has_no_steps_left_and_its_last_metrics_logged(tmp_path):
    model, _ = train(tmp_path, 5)
    again, _ = train(tmp_path, 5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    (line,) = (tmp_path / "model.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 5


def test_averaged_weights_are_held_only_inside_the_context(tmp_path):
    model, ema = train(tmp_path, 5)
    trained = model.weight.detach().clone()
    with ema.applied():
        assert not torch.equal(model.weight, trained)
        averaged = model.weight.detach().clone()
    assert torch.equal(model.weight, trained)
    torch.testing.assert_close(averaged, ema.state_dict()["average"]["model.weight"])


def test_the_learning_rate_warms_up_stays_and_decays_to_zero():
    factor = warmup_stable_decay(100, warmup=10, decay_share=0.2)
    assert [factor(step) for step in (0, 4, 9, 50, 80, 90, 100)] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0])


@pytest.mark.parametrize("looks_around", [False, True])
def test_the_paste_loss_tells_a_tower_that_looks_around_from_one_that_does_not(looks_around):
    def patches(_, inputs):
        cells = torch.nn.functional.unfold(inputs["pixel_values"], 8, stride=8).transpose(1, 2)
        states = cells + looks_around * cells.mean(dim=1, keepdim=True)
        return states, torch.ones(states.shape[:2], dtype=torch.bool)

    family = SimpleNamespace(patches=patches)
    inputs = {"pixel_values": torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))}
    inputs["pixel_values"] += torch.arange(4.0).view(4, 1, 1, 1) * torch.linspace(-1, 1, 48)  # pictures differ
    kept = inputs["pixel_values"].clone()
    states, _ = patches(None, inputs)
    loss = paste_loss(cast(StudentFamily, family), None, inputs, states, np.random.default_rng(0)).item()
    assert torch.equal(inputs["pixel_values"], kept)
    # the rectangle's own patches are the same numbers either way; float32 sums may differ in the last digits
    assert loss > 1e-3 if looks_around else loss < 1e-6
