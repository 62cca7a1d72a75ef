"""The teacher's maps against other maps of the same words: is it the knowledge or the regulariser?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavender.world.studies.cells import Arm
from lavender.world.studies.page import draw_bars
from lavender.world.studies.study import Finding, Scores, Study, compare
from lavender.world.studies.targets import TARGETS


def arms(quick: bool) -> dict[str, Arm]:
    return {"plain": Arm("mllama", "full")} | {target: Arm("mllama", "full", target) for target in TARGETS}


def judge(scores: Scores) -> list[Finding]:
    controls = [target for target in TARGETS if target != "teacher"]
    pairs = [("teacher", "plain"), *(("teacher", control) for control in controls), ("masks", "plain")]
    return [
        compare(scores, metric, *pair) for metric in ("in_domain", "other_backgrounds", "pointing") for pair in pairs
    ]


def draw(results: dict[str, Any], path: Path) -> None:
    draw_bars(results, ("in_domain", "other_backgrounds", "pointing"), path)


STUDY = Study(
    title="Is it the teacher's knowledge?",
    question="The same fine-tuning, aligned to the teacher's maps, to maps that know nothing about the word, and to "
    "the true masks. The words and everything else are the same in every arm. "
    + "; ".join(f"*{name}*: {what}" for name, what in TARGETS.items())
    + ".",
    paper="attributes the gain to the diffusion model's attention (§4, §7); it shows no such control.",
    arms=arms,
    judge=judge,
    draw=draw,
)
