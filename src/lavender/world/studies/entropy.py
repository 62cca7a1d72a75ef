"""Entropy of the teacher's and the students' maps, and their KL divergence from the true masks (App. B.4)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lavender.evaluation.map_scores import ENTROPY_GRID
from lavender.world.studies.cells import STUDENT_NAMES, Arm
from lavender.world.studies.study import Finding, Scores, Study, compare_pairs

SHOWN = ("entropy", "mask_kl", "pointing")
TEACHER = "teacher"


def arms(quick: bool) -> dict[str, Arm]:
    """The teacher, and base, plain and aligned of each student."""
    arms = {TEACHER: Arm("teacher", "none")}
    for student in STUDENT_NAMES:
        arms |= {
            f"{student} base": Arm(student, "none"),
            f"{student} plain": Arm(student, "full"),
            f"{student} aligned": Arm(student, "full", "teacher"),
        }
    return arms


def judge(scores: Scores) -> list[Finding]:
    """The teacher against each base, and aligned against plain fine-tuning."""
    pairs = [(TEACHER, f"{student} base") for student in STUDENT_NAMES]
    pairs += [(f"{student} aligned", f"{student} plain") for student in STUDENT_NAMES]
    return compare_pairs(scores, SHOWN, pairs)


def draw(results: dict[str, Any], path: Path) -> None:
    """Histograms of the entropy of each word's map, as in the paper's Figure 7."""
    from matplotlib.figure import Figure

    highest = math.log(math.prod(ENTROPY_GRID))
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    for panel, student in zip(figure.subplots(1, 2, sharey=True), STUDENT_NAMES, strict=True):
        for arm, colour in ((TEACHER, "#e08214"), (f"{student} base", "#777777"), (f"{student} aligned", "#4b2e83")):
            values = [value for seed_values in results["entropies"][arm] for value in seed_values]
            panel.hist(values, bins=40, range=(5.4, 7.0), density=True, histtype="step", color=colour, label=arm)
        panel.axvline(highest, color="#cccccc", linewidth=0.8)
        panel.set(xlabel=f"entropy of a word's map, nats (32 × 32; uniform: {highest:.2f})", title=student)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


STUDY = Study(
    title="Is the teacher's attention more concentrated, and nearer to the truth?",
    question="Entropy of each word's map, of the teacher and of the students (on one grid of 32 × 32, normalised to "
    "sum 1, before the Aligner). The paper concludes from it that the maps are near the truth. The KL divergence "
    "from the true mask to the map tests this directly.",
    paper="the diffusion model's attention has lower entropy than every VLM's on every data set (§7.1, Fig. 7), "
    "therefore it is nearer to the ideal attention (App. B.4, a heuristic argument).",
    arms=arms,
    judge=judge,
    draw=draw,
    metrics=SHOWN,
)
