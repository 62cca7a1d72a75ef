"""Scores of a student while it is tuned: its checkpoints, and a row of scores per arm and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

LOSSES = {"attention_loss": "training_attention_loss", "vlm_loss": "training_loss"}
"""Metric of a training's log → its name among the scores of a step."""


def at_step(run: Path, step: int, base: Path) -> Path:
    """Write the student as it was after a step, without what alignment trained beside it: an ordinary checkpoint.

    Args:
        run: the folder of a run of full fine-tuning, with a checkpoint of this step.
        base: the checkpoint that the run started from.

    Returns:
        The folder of the checkpoint, in the run's folder.
    """
    from safetensors.torch import load_file

    from lavender.alignment.objective import is_alignment_part
    from lavender.students.loading import load_run

    model, processor = load_run(base)
    saved = load_file(run / "trainer" / f"checkpoint-{step}" / "model.safetensors")
    found = model.load_state_dict({k: v for k, v in saved.items() if not is_alignment_part(k)}, strict=False)
    assert not found.unexpected_keys, found
    assert set(found.missing_keys) <= set(model._tied_weights_keys or ()), found
    path = run / "scored" / str(step)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def row_of(arm: str, step: int) -> str:
    """The name of the row with an arm's scores after a step."""
    return f"{arm}, step {step}"


def steps_of(scores: Mapping[str, Any], arm: str) -> list[int]:
    """The steps after which an arm was scored."""
    start = row_of(arm, 0)[:-1]
    return [int(row.removeprefix(start)) for row in scores if row.startswith(start)]


def at_each_step(scores: Mapping[str, Mapping[str, Sequence[float]]], arm: str, metric: str) -> dict[int, list[float]]:
    """Step → one number per seed."""
    return {step: list(scores[row_of(arm, step)][metric]) for step in steps_of(scores, arm)}


def scores_by_step(result: Mapping[str, Any], steps: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The scores of a cell after each of its scored steps, with the losses of training up to there.

    A loss is the mean of the log since the step before: the batches differ, so one line of the log says little.
    """
    by_step = {int(step): scores for step, scores in result.get("earlier", {}).items()} | {steps[-1]: result["scores"]}
    after = 0
    for step in steps:
        lines = [line for line in result["curves"] if after < line["step"] <= step]
        for logged, metric in LOSSES.items():
            values = [line[logged] for line in lines if logged in line]
            if values:
                by_step[step] = by_step[step] | {metric: fmean(values)}
        after = step
    return {step: by_step[step] for step in steps}


def draw_over_time(panel: Any, scores: Mapping[str, Any], arms: Mapping[str, str], metric: str, title: str) -> None:
    """Plot a metric against the steps into Matplotlib axes: per arm a line through the means, and a dot per seed.

    Args:
        scores: those of the study, with a row per arm and step.
        arms: arm → colour.
    """
    for arm, colour in arms.items():
        by_step = at_each_step(scores, arm, metric)
        panel.plot(list(by_step), [fmean(values) for values in by_step.values()], "-", color=colour, label=arm)
        for step, values in by_step.items():
            panel.plot([step] * len(values), values, ".", color=colour)
    panel.set(xlabel="optimizer steps", title=title)
    panel.spines[["top", "right"]].set_visible(False)


def draw_legend(figure: Any) -> None:
    """Name the arms once, beside the panels, which all have the same ones. For a figure with a constrained layout."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
