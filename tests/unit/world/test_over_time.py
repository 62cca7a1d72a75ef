"""Scores over time, and the studies that compare them: worked out by hand from made-up scores."""

from __future__ import annotations

import json
from itertools import filterfalse, pairwise
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lavender.alignment.objective import is_alignment_part
from lavender.students.loading import load_run
from lavender.world.studies import cells, loss_vs_score, overfitting, pooling_over_training
from lavender.world.studies.cells import Arm, Cell, base_path, prepare
from lavender.world.studies.over_time import at_each_step, at_step, row_of, scores_by_step, steps_of
from lavender.world.studies.registry import STUDIES
from lavender.world.studies.study import METRICS
from lavender.world.studies.tasks import Scoring


def lines(*steps_and_losses: tuple[int, float, float]) -> list[dict[str, float]]:
    return [{"step": step, "vlm_loss": vlm, "attention_loss": att} for step, vlm, att in steps_and_losses]


def rows(arm: str, **metrics: dict[int, list[float]]) -> dict[str, dict[str, list[float]]]:
    """The rows of an arm: metric → step → one number per seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for metric, by_step in metrics.items():
        for step, values in by_step.items():
            found.setdefault(row_of(arm, step), {})[metric] = values
    return found


def test_losses_are_means_since_the_step_before():
    result = {
        "scores": {"in_domain": 0.75},
        "earlier": {"20": {"in_domain": 0.5}},
        "curves": [*lines((10, 2.0, 0.5), (20, 1.0, 0.25), (30, 0.5, 0.125), (40, 0.25, 0.125)), {"step": 40}],
    }
    assert scores_by_step(result, (20, 40)) == {
        20: {"in_domain": 0.5, "training_loss": 1.5, "training_attention_loss": 0.375},
        40: {"in_domain": 0.75, "training_loss": 0.375, "training_attention_loss": 0.125},
    }


def test_steps_of_an_arm_are_not_those_of_another_with_a_longer_name():
    scores = rows("recipe", in_domain={20: [0.5], 40: [0.25]}) | rows("recipe, masks", in_domain={30: [0.75]})
    assert steps_of(scores, "recipe") == [20, 40]
    assert at_each_step(scores, "recipe, masks", "in_domain") == {30: [0.75]}


def test_attention_is_drawn_on_the_pictures_of_each_step(tmp_path):
    """With maps the figure has pictures below the curves; without, the curves alone."""
    study = STUDIES["alignment-over-time"]
    arms = study.arms(False)
    scores = {
        row: {metric: [0.25 + step / 1000] for metric in METRICS}
        for arm in arms
        for step in arms["plain"].scored_steps
        for row in (row_of(arm, step),)
    }
    heat = [[0.0, 0.5], [1.0, 0.25]]
    maps = {row: [[heat, heat]] for row in scores}
    results = {"arms": scores, "settings": {"scoring": {"split": "development", "start": 40, "count": 20}}}
    study.draw(results | {"maps": maps}, tmp_path / "with.png")
    study.draw(results, tmp_path / "without.png")
    with Image.open(tmp_path / "with.png") as pictures, Image.open(tmp_path / "without.png") as curves:
        assert pictures.width == curves.width
        assert pictures.height > 2 * curves.height


@pytest.mark.parametrize("pooling", ["layer-mean", "learn"])
def test_a_student_of_each_step_is_an_ordinary_checkpoint(pooling, tmp_path):
    """Of a real run of the published loss: it has the step's weights, and none of what alignment trained."""
    settings = (("pooling", pooling), ("match", "label"))
    arm = Arm("mllama", "full", "teacher", 4, 3, settings, "captions-in-domain", scorings=3)
    cell = Cell(arm, 7, Scoring("development", 0, 2))
    prepare(tmp_path, cell)
    run = tmp_path / "run"
    cells._train(tmp_path, cell, run)
    base = base_path(tmp_path, arm)
    states = {0: load_run(base)[0].state_dict(), 3: load_run(run)[0].state_dict()}
    for step in arm.scored_steps[:-1]:
        path = at_step(run, step, base)
        model, processor = load_run(path)
        assert processor.chat_template
        assert type(model) is type(load_run(base)[0])
        states[step] = model.state_dict()
        saved = load_file(run / "trainer" / f"checkpoint-{step}" / "model.safetensors")
        assert states[step].keys() == states[0].keys() == set(filterfalse(is_alignment_part, saved)) < saved.keys()
        assert all(torch.equal(value, saved[name]) for name, value in states[step].items())
    weights = [states[step]["lm_head.weight"] for step in (1, 2, 3)]  # the first step of the warm-up changes nothing
    assert not any(torch.equal(first, second) for first, second in pairwise(weights))
    curves = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = {"scores": {}, "earlier": {"1": {}, "2": {}}, "curves": curves}
    losses = scores_by_step(result, arm.scored_steps)
    assert all(loss["training_loss"] > 0 and loss["training_attention_loss"] > 0 for loss in losses.values())


# loss against score


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([3, 1, 2], [30, 10, 20], 1),
        ([1, 2, 3], [9, 5, 1], -1),
        ([1, 2, 3], [2, 2, 2], 0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
    ],
)
def test_rank_correlations_by_hand(first, second, expected):
    assert loss_vs_score.rank_correlation(first, second) == pytest.approx(expected)


def test_time_alone_is_a_control_of_loss_and_score():
    """In a run the score rises as the loss falls; plain's score rises too, so the loss explains nothing."""
    steps = (20, 40, 60)

    def both(values: tuple[float, ...]) -> dict[str, Any]:
        by_step = {step: [value] for step, value in zip(steps, values, strict=True)}
        return {"in_domain": by_step, "cider": by_step}

    losses = {step: [loss] for step, loss in zip(steps, (0.3, 0.2, 0.1), strict=True)}
    lower = {step: [loss] for step, loss in zip(steps, (0.2, 0.1, 0.05), strict=True)}
    scores = rows("plain", **both((0.5, 0.6, 0.7)))
    scores |= rows("λ = 1", training_attention_loss=losses, **both((0.4, 0.5, 0.6)))
    scores |= rows("λ = 20", training_attention_loss=lower, **both((0.3, 0.4, 0.3)))
    found = {finding.what: finding for finding in loss_vs_score.judge(scores)}
    of = f"rank correlation of {METRICS['in_domain']} with the alignment loss"
    assert found[f"λ = 1, {of} over the steps, against 0"].mean == pytest.approx(-1)
    assert found[f"λ = 1, {of} over the steps, against plain's scores"].mean == pytest.approx(0)
    assert found[f"λ = 20, {of} over the steps, against 0"].mean == pytest.approx(0)
    # over λ the lower loss has the lower score
    assert found[f"{of} over λ, after 60 steps, against 0"].mean == pytest.approx(1)


# overfitting


def test_signs_of_overfitting_by_hand():
    scores = rows(
        "plain",
        in_domain={20: [0.5, 0.5], 40: [0.75, 0.5], 60: [0.625, 0.625]},
        held_out_loss={20: [1.0, 2.0], 40: [0.75, 1.5], 60: [1.25, 1.0]},
        training_loss={20: [1.0, 1.0], 40: [0.5, 0.5], 60: [0.25, 0.125]},
    )
    assert overfitting.lost(scores, "plain") == [0.125, 0]
    assert overfitting.risen(scores, "plain") == [0.5, 0]
    assert overfitting.gap(scores, "plain") == [1.0, 0.875]


# poolings


def test_the_place_of_the_learned_pooling():
    def scored(arm: str, first: float, last: float) -> dict[str, Any]:
        by_step = {100: [first], 400: [last]}
        return rows(arm, in_domain=by_step, cider=by_step, pointing=by_step)

    scores = scored("plain", 0.9, 0.9) | scored("learn", 0.5, 0.8)
    scores |= scored("layer-mean", 0.6, 0.7) | scored("flow-multi", 0.4, 0.75)
    assert pooling_over_training.ranks(scores)[0] == (
        f"place of learn among 3 poolings by {METRICS['in_domain']}: 2 after 100 steps, 1 after 400 steps"
    )
