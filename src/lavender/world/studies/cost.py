"""What a study costs, for `lavender study --list`: the number of its runs, and an estimate of their time.

The estimate is for a free core of a current server processor. A busy machine takes longer; several cores share the
runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lavender.world.studies.cells import Arm, Cell
from lavender.world.studies.examples import WarmUp
from lavender.world.studies.registry import Scale, cells_of
from lavender.world.studies.study import Study
from lavender.world.studies.tasks import TASKS, TaskName

STEP_SECONDS = {"full": 0.5, "frozen": 0.25}
"""Seconds of an optimizer step of 16 captions: with the tower in training, and with its states kept from epoch to
epoch. From the times of `new-words` and `teacher-controls` on two cores."""
ANSWER_SECONDS, EXTRACTION_SECONDS, LOADING_SECONDS = 0.05, 0.1, 10.0
"""Seconds per picture that is answered and whose attention is scored, per sample of extraction, and per run."""
SCORED_SETS: dict[TaskName, int] = {
    "captions": 3,
    "edged-captions": 3,
    "captions-without-signs": 4,
    "captions-and-signs": 4,
    "captions-and-signs-unmapped": 4,
    "new-words-ood": 4,
    "questions-ood": 3,
}
"""Task → how many sets of pictures its score has answers about, where there are several."""


class Cost(NamedTuple):
    """Runs of training or scoring, and minutes of one core."""

    runs: int
    minutes: float


def cost_of(study: Study, quick: bool) -> Cost:
    """The cost of a study that has no finished run, with its own seeds."""
    scale = Scale.of(quick, None, None)
    cells = {cell.key: cell for of_arm in cells_of(study, scale).values() for cell in of_arm}.values()
    data_sets = {
        (TASKS[cell.arm.task].data or cell.arm.task, cell.seed, cell.arm.num_scenes): cell.arm
        for cell in cells
        if cell.arm.tuning != "none"
    }
    extracted = sum(arm.num_scenes + TASKS[arm.task].num_replayed for arm in data_sets.values())
    bases = {(cell.arm.base, TASKS[cell.arm.task].warm_up) for cell in cells}
    warm_ups = [warm_up for _, warm_up in bases if isinstance(warm_up, WarmUp)]
    extracted += sum(warm_up.num_scenes for warm_up in warm_ups)
    seconds = sum(map(_seconds, cells)) + EXTRACTION_SECONDS * extracted
    seconds += STEP_SECONDS["full"] * sum(warm_up.steps for warm_up in warm_ups)
    return Cost(len(cells), seconds / 60)


def _seconds(cell: Cell) -> float:
    arm: Arm = cell.arm
    answered = cell.scoring.count * SCORED_SETS.get(arm.task, 1) * arm.scorings
    trained = (
        0.0 if arm.tuning == "none" else arm.steps * STEP_SECONDS["frozen" if "vision_tower" in arm.freeze else "full"]
    )
    return trained + ANSWER_SECONDS * answered + LOADING_SECONDS


def facts_of(studies: dict[str, Study]) -> list[dict[str, Any]]:
    """What `listed` says, as JSON values."""
    return [
        {"name": name, "question": study.title}
        | {"full": cost_of(study, False)._asdict(), "quick": cost_of(study, True)._asdict()}
        for name, study in studies.items()
    ]


def listed(studies: dict[str, Study]) -> str:
    """A table of at most 80 columns: each study with its cost, full and quick, and its question in the next line."""
    lines = [f"{'study':<23}{'full':>18}{'--quick':>18}"]
    for name, study in studies.items():
        lines.append(f"{name:<23}{_text(cost_of(study, False)):>18}{_text(cost_of(study, True)):>18}")
        lines.append(f"    {study.title}")
    return "\n".join([*lines, "", "Runs, and about how long they take on one free core. Finished ones are kept."])


def _text(cost: Cost) -> str:
    return f"{cost.runs} runs, " + (f"{cost.minutes:.0f} min" if cost.minutes < 90 else f"{cost.minutes / 60:.1f} h")
