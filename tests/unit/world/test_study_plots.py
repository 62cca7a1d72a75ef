"""Plots of studies: differences from plain fine-tuning with their ranges, and which plain arm an arm belongs to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lavender.errors import DataError
from lavender.world.studies.page import draw_differences, draw_panel, plain_of
from lavender.world.studies.redraw import main, redraw
from lavender.world.studies.registry import STUDIES
from lavender.world.studies.study import METRICS

EVIDENCE = Path(__file__).parents[3] / "docs" / "evidence"
DRAWN = [path.parent.name for path in sorted(EVIDENCE.glob("*/results.json")) if path.parent.name != "entropy"]


def test_an_arm_is_compared_with_the_plain_arm_of_its_kind():
    arms = ["base", "plain", "recipe", "recipe, kl", "LoRA plain", "LoRA recipe"]
    assert plain_of(arms) == {"base": "plain", "recipe": "plain", "recipe, kl": "plain", "LoRA recipe": "LoRA plain"}
    assert plain_of(["plain 25", "plain 100", "recipe, masks 100"]) == {"recipe, masks 100": "plain 100"}
    assert plain_of(["teacher", "uniform"]) == {}


DIFFERENCES = [name for name, study in STUDIES.items() if getattr(study.draw, "func", None) is draw_differences]


@pytest.mark.parametrize("name", [*DIFFERENCES, "attributes"])
def test_a_plot_compares_what_the_study_compares(name):
    """Where a finding of a study is of an arm against plain fine-tuning, the plot has the same plain arm."""
    study = STUDIES[name]
    arms = study.arms(False)
    scores = {arm: {key: [0.0, 1.0] for key in METRICS} for arm in arms}
    compared = plain_of(arms)
    num_compared = 0
    for finding in study.judge(scores):
        arm, _, baseline = finding.what.rpartition(" against ")
        plain = [one for one in set(compared.values()) if baseline.startswith(f"{one}, ")]
        if arm in compared and plain:
            assert compared[arm] == max(plain, key=len), finding.what
            num_compared += 1
    assert num_compared > 0


def test_a_row_is_the_difference_with_its_range():
    scores = {
        "plain": {"in_domain": [0.5, 0.25]},
        "one": {"in_domain": [0.75, 0.25]},
        "other": {"in_domain": [0.25, 0.125]},
    }
    axes = Figure().subplots()
    draw_panel(axes, scores, "in_domain")
    zero, *lines = axes.lines
    assert np.asarray(zero.get_xdata()).tolist() == [0, 0]
    drawn = [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in lines]
    # range, seeds and mean of each arm minus plain of the same seed
    assert drawn[:3] == [([0, 0.25], [0, 0]), ([0.25, 0], [0, 0]), ([0.125], [0])]
    assert drawn[3:] == [([-0.25, -0.125], [1, 1]), ([-0.25, -0.125], [1, 1]), ([-0.1875], [1])]
    assert len(axes.patches) == 0  # no bar
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "other"]
    assert axes.get_xlabel() == "difference from plain 0.375 (0.250–0.500)"


def test_a_label_names_the_plain_arm_that_is_not_told():
    arms = ["mllama base", "mllama full plain", "mllama lora plain", "mllama lora recipe"]
    axes = Figure().subplots()
    draw_panel(axes, {arm: {"in_domain": [0.5, 0.25]} for arm in arms}, "in_domain")
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["mllama base (from mllama full plain)", "mllama lora recipe"]
    assert axes.get_xlabel() == "difference from plain of the same kind"


def test_finished_studies_are_drawn_again_from_their_results(tmp_path):
    assert "main" in DRAWN
    assert "new-words" in DRAWN
    for name in ("lambda-development", "new-words"):
        (tmp_path / name).mkdir()
        shutil.copy(EVIDENCE / name / "results.json", tmp_path / name)
        assert redraw(tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "results.json").write_text(json.dumps({"study": "entropy", "arms": {}}))
    with pytest.raises(DataError, match="without the entropy of each map"):
        redraw(tmp_path)
    with pytest.raises(DataError, match="no results of a study"):
        redraw(tmp_path / "none")


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main([]) == 2
    assert "usage: " in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"Got no results of a study in {tmp_path}. Expected ")
