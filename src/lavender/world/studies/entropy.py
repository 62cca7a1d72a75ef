"""Entropy of the teacher's and the students' maps, and what it is taken for: closeness to the truth (App. B.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavender.world.studies.cells import Arm
from lavender.world.studies.study import Finding, Scores, Study, compare

METRICS_SHOWN = ("entropy", "mask_kl", "pointing")
TEACHER, STUDENTS = "teacher", ("mllama", "llava")


def arms(quick: bool) -> dict[str, Arm]:
    found = {TEACHER: Arm("teacher", "none")}
    for student in STUDENTS:
        found |= {
            f"{student} base": Arm(student, "none"),
            f"{student} plain": Arm(student, "full"),
            f"{student} aligned": Arm(student, "full", "teacher"),
        }
    return found


def judge(scores: Scores) -> list[Finding]:
    pairs = [(TEACHER, f"{student} base") for student in STUDENTS]
    pairs += [(f"{student} aligned", f"{student} plain") for student in STUDENTS]
    return [compare(scores, metric, *pair) for metric in METRICS_SHOWN for pair in pairs]


def draw(results: dict[str, Any], path: Path) -> None:
    """Histograms of the entropy of each word's map, as in the paper's Figure 7."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    for panel, student in zip(figure.subplots(1, 2, sharey=True), STUDENTS, strict=True):
        for arm, colour in ((TEACHER, "#e08214"), (f"{student} base", "#777777"), (f"{student} aligned", "#4b2e83")):
            values = [value for seed in results["entropies"][arm] for value in seed]
            panel.hist(values, bins=40, range=(5.4, 7.0), density=True, histtype="step", color=colour, label=arm)
        panel.axvline(6.931, color="#cccccc", linewidth=0.8)
        panel.set(xlabel="entropy of a word's map, nats (32 × 32; a flat map has 6.93)", title=student)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


STUDY = Study(
    title="Is the teacher's attention more concentrated, and nearer to the truth?",
    question="Entropy of each word's map (one grid of 32 × 32, sum 1, before any Aligner) of the teacher and the "
    "students; and what the paper concludes from it, tested directly: the KL divergence from the true mask to the map.",
    paper="the diffusion model's attention has lower entropy than every VLM's on every data set (§7.1, Fig. 7), "
    "therefore it is nearer to the ideal attention (App. B.4, a heuristic argument).",
    arms=arms,
    judge=judge,
    draw=draw,
    metrics=METRICS_SHOWN,
)
