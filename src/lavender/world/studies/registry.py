"""The studies by name, and `run_study`, which `lavender study` calls."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lavender.errors import ConfigError, nearest
from lavender.world.scenes import SPLITS, Split
from lavender.world.studies import (
    alignment_over_time,
    attributes,
    entropy,
    loss_vs_score,
    main_study,
    mixing,
    new_words,
    ood,
    overfitting,
    pooling_over_training,
    rearrangement,
    recipe,
    scaling,
)
from lavender.world.studies import controls as teacher_controls
from lavender.world.studies.cells import SCENES_PER_SEED, Arm, Cell
from lavender.world.studies.over_time import row_of, scores_by_step
from lavender.world.studies.page import page
from lavender.world.studies.promises import promises
from lavender.world.studies.runner import run_cells
from lavender.world.studies.study import Study
from lavender.world.studies.tasks import Scoring
from lavender.world.studies.variants import VARIANTS

STUDIES: dict[str, Study] = {
    "new-words": new_words.STUDY,
    "recipe": recipe.STUDY,
    "attributes": attributes.STUDY,
    "main": main_study.STUDY,
    "teacher-controls": teacher_controls.STUDY,
    "entropy": entropy.STUDY,
    "scaling": scaling.STUDY,
    **VARIANTS,
    "ood": ood.STUDY,
    "alignment-over-time": alignment_over_time.STUDY,
    "loss-vs-score": loss_vs_score.STUDY,
    "pooling-over-training": pooling_over_training.STUDY,
    "rearrangement": rearrangement.STUDY,
    "mixing": mixing.STUDY,
    "overfitting": overfitting.STUDY,
}
SEALED_START = 2000  # the demo uses sealed scenes before this one
NUM_HELD_OUT = 300
MAX_SEEDS = len(SPLITS["finetune"]) // SCENES_PER_SEED
CONTROLS = ("uniform_pointing", "centre_pointing")  # of maps that do not depend on the picture, on the same scenes


@dataclass(frozen=True)
class Scale:
    """The size of a study: its seeds, the scenes of its scores, and whether it has fewer scenes, steps and arms.

    Attributes:
        seeds: None for those of the study.
    """

    seeds: tuple[int, ...] | None
    scoring: Scoring
    quick: bool = False

    @classmethod
    def of(cls, quick: bool, split: Split | None, seeds: tuple[int, ...] | None) -> Scale:
        """The scale that the options of `lavender study` ask for.

        The full study is scored on sealed scenes, the quick one on development scenes.

        Raises:
            ConfigError: the quick study on sealed scenes, or seeds that repeat or are out of range.
        """
        if quick and split == "sealed":
            raise ConfigError("--quick on sealed scenes", "development scenes", "leave --split out")
        if seeds and (len(set(seeds)) < len(seeds) or not all(0 <= seed < MAX_SEEDS for seed in seeds)):
            raise ConfigError(f"--seeds {list(seeds)}", f"different numbers from 0 to {MAX_SEEDS - 1}", "change them")
        split = split or ("development" if quick else "sealed")
        scoring = Scoring(split, SEALED_START if split == "sealed" else 0, 100 if quick else NUM_HELD_OUT)
        return cls(seeds or None, scoring, quick)


def run_study(name: str, out: Path, scale: Scale, jobs: int, command: str) -> dict[str, Any]:
    """Run a study; write `results.json`, `page.md` and `plot.png` to the folder `out / name`.

    A stopped study continues when it is started again. Studies in one `out` share their runs: an arm that two studies
    have in common is trained once.

    Args:
        name: a key of `STUDIES`.
        out: the folder of all studies.
        scale: see `Scale.of`.
        jobs: how many runs to train at a time, on one core each.
        command: the command, for the page.

    Returns:
        The content of `results.json`.

    Raises:
        ConfigError: there is no such study, or no job.
        LavenderError: some runs failed.
    """
    if name not in STUDIES:
        similar = nearest(name, STUDIES)
        advice = f"write {similar!r} instead" if similar else "name one of them"
        raise ConfigError(f"the study {name!r}", f"one of {', '.join(STUDIES)}", advice)
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}", "at least 1", "leave it out to use every core")
    began, study = time.monotonic(), STUDIES[name]
    cells = cells_of(study, scale)
    arms = {label: arm_cells[0].arm for label, arm_cells in cells.items()}
    seeds = [cell.seed for cell in next(iter(cells.values()))]
    results = run_cells(out, [cell for arm_cells in cells.values() for cell in arm_cells], jobs)
    scores = rows(cells, results)
    entropies = {label: metrics.pop("entropies") for label, metrics in scores.items()}
    maps = {label: metrics.pop("maps") for label, metrics in scores.items() if "maps" in metrics}
    controls = {metric: [metrics.pop(metric)[0] for metrics in scores.values()].pop() for metric in CONTROLS}
    summary: dict[str, Any] = {
        "study": name,
        "command": command,
        "quick": scale.quick,
        "seeds": seeds,
        "arms": scores,
        "controls": controls,
        "verdict": [*map(str, study.judge(scores)), *study.extra(scores)],
        "check": promises(out, cells, scores, study.promised(scores)),
        "settings": {"scoring": asdict(scale.scoring), "arms": {label: asdict(arm) for label, arm in arms.items()}},
        "seconds": round(time.monotonic() - began),
    }
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    study.draw(summary | {"entropies": entropies, "maps": maps}, folder / "plot.png")
    (folder / "page.md").write_text(page(study, summary))
    (folder / "results.json").write_text(json.dumps(summary, indent=1))
    return summary


def _smaller(arm: Arm, steps: int | None) -> Arm:
    """An arm of the quick study; without `steps` it is the arm itself."""
    return arm if steps is None else replace(arm, num_scenes=min(200, arm.num_scenes), steps=steps)


def cells_of(study: Study, scale: Scale) -> dict[str, list[Cell]]:
    """Arm → its cells, one per seed."""
    arms, seeds = study.arms(scale.quick), scale.seeds or (study.quick_seeds if scale.quick else study.seeds)
    if scale.quick:
        arms = {label: _smaller(arm, study.quick_steps) for label, arm in arms.items()}
    return {label: [Cell(arm, seed, scale.scoring) for seed in seeds] for label, arm in arms.items()}


def rows(cells: Mapping[str, Sequence[Cell]], results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Row → metric → one number per seed. An arm that is scored several times has a row per step.

    Args:
        cells: arm → its cells, one per seed.
        results: key of a cell → its result.
    """
    found: dict[str, dict[str, Any]] = {}
    for label, arm_cells in cells.items():
        arm = arm_cells[0].arm
        if arm.scorings == 1:
            found[label] = _by_metric([results[cell.key]["scores"] for cell in arm_cells])
            continue
        of_seeds = [scores_by_step(results[cell.key], arm.scored_steps) for cell in arm_cells]
        found |= {row_of(label, step): _by_metric([seed[step] for seed in of_seeds]) for step in arm.scored_steps}
    return found


def _by_metric(scores: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """One dict per seed → one list per metric."""
    return {metric: [seed_scores[metric] for seed_scores in scores] for metric in scores[0]}
