"""Ways to make one map of many layers and heads (the paper's aggregation)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavender.config import POOLINGS
from lavender.studies.cells import Arm
from lavender.studies.page import draw_bars
from lavender.studies.study import Finding, Scores, Study, compare


def arms(quick: bool) -> dict[str, Arm]:
    return {"plain": Arm("mllama", "full")} | {
        pooling: Arm("mllama", "full", "teacher", settings=(("pooling", pooling),)) for pooling in POOLINGS
    }


def judge(scores: Scores) -> list[Finding]:
    return [
        compare(scores, metric, pooling, "plain")
        for metric in ("in_domain", "other_backgrounds", "pointing") for pooling in scores if pooling != "plain"
    ]  # fmt: skip


def draw(results: dict[str, Any], path: Path) -> None:
    draw_bars(results, ("in_domain", "other_backgrounds", "pointing"), path)


STUDY = Study(
    title="Which pooling?",
    question="Aligned fine-tuning with each pooling that the library has, against plain fine-tuning.",
    paper="learned parallel attention is best, then max-max; flow helps little (§4.2, §8, Fig. 22).",
    arms=arms, judge=judge, draw=draw,
)  # fmt: skip
