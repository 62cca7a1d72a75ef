"""Which words are forced at which step: with the probability of the step, by sample, word and step alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import TrainerState

from lavender.config import AlignmentConfig
from lavender.training.schedule import forced_words

NAMES = [f"picture {index}" for index in range(100)]
PRESENT = torch.ones(100, 20, dtype=torch.bool)


def forced(
    step: int,
    names: list[str] = NAMES,
    present: torch.Tensor = PRESENT,
    attention_forcing: float = 0.6,
    forcing_share: float = 0.5,
    max_steps: int = 40,
) -> torch.Tensor | None:
    config = AlignmentConfig(attention_loss="mass", attention_forcing=attention_forcing, forcing_share=forcing_share)
    return forced_words(config, TrainerState(global_step=step, max_steps=max_steps), names, present)


@pytest.mark.parametrize(("step", "probability"), [(0, 0.6), (5, 0.45), (10, 0.3), (15, 0.15), (19, 0.03)])
def test_the_probability_falls_in_a_line(step, probability):
    """From `attention_forcing` to 0 over `forcing_share` of the steps. 2,000 words: three standard errors are 0.033."""
    chosen = forced(step)
    assert chosen is not None
    assert chosen.dtype == torch.bool
    assert chosen.float().mean().item() == pytest.approx(probability, abs=0.035)


@pytest.mark.parametrize("step", [20, 21, 39])
def test_after_its_share_of_the_steps_nothing_is_forced(step):
    assert forced(step) is None


def test_it_is_off_by_default():
    assert AlignmentConfig().attention_forcing == 0
    assert forced_words(AlignmentConfig(), TrainerState(global_step=0, max_steps=40), NAMES, PRESENT) is None


def test_without_lambda_the_run_is_plain_fine_tuning():
    config = AlignmentConfig(attention_loss="mass", attention_forcing=1.0, align_weight=0.0)
    assert forced_words(config, TrainerState(global_step=0, max_steps=40), NAMES, PRESENT) is None


@pytest.mark.parametrize(
    ("step", "is_forced"), [(0, True), (9, True), (10, False), (19, False), (20, True), (30, False)]
)
def test_it_is_off_where_alignment_is_switched_off(step, is_forced):
    config = AlignmentConfig(attention_loss="mass", attention_forcing=1.0, forcing_share=1.0, align_switches=3)
    chosen = forced_words(config, TrainerState(global_step=step, max_steps=40), NAMES, PRESENT)
    assert (chosen is not None) == is_forced


def test_a_probability_of_1_forces_every_word():
    chosen = forced(0, attention_forcing=1.0)
    assert chosen is not None
    assert chosen.all()


def test_padding_is_never_forced():
    present = torch.arange(20) < torch.arange(100)[:, None] % 5
    chosen = forced(0, present=present, attention_forcing=1.0)
    assert chosen is not None
    assert torch.equal(chosen, present)


def test_batches_make_no_difference():
    """Nor does their order, nor how far they are padded."""
    whole = forced(7)
    assert whole is not None
    for start, stop, width in ((0, 1, 20), (17, 40, 20), (99, 100, 3)):
        part = forced(7, NAMES[start:stop], PRESENT[start:stop, :width])
        assert part is not None
        assert torch.equal(part, whole[start:stop, :width])
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    shuffled = forced(7, [NAMES[index] for index in order])
    assert shuffled is not None
    assert torch.equal(shuffled, whole[order])


def test_samples_words_and_steps_draw_apart():
    first, second = forced(0), forced(1)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first}) == 100
    assert len({tuple(column.tolist()) for column in first.T}) == 20


def test_every_word_is_forced_about_equally_often():
    """Over 400 steps of which 200 force with 1 to 0: 100 times each. Draws that know nothing of each other would have a
    standard deviation of 5.8; a word's own follow each other evenly.
    """
    times = torch.zeros(100, 20)
    for step in range(200):
        chosen = forced(step, attention_forcing=1.0, max_steps=400)
        assert chosen is not None
        times += chosen
    assert times.mean().item() == pytest.approx(100.5, abs=0.5)
    assert (times - 100.5).abs().max() <= 5


def test_no_random_number_is_drawn():
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    forced(3)
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
