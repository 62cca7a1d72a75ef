"""The main study: base, plain and aligned fine-tuning, both kinds of model, full and LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lavender.world.studies.cells import Arm
from lavender.world.studies.page import draw_bars
from lavender.world.studies.study import CAPTIONS, Finding, Scores, Study, compare

STUDENTS: tuple[Literal["mllama", "llava"], ...] = ("mllama", "llava")
TUNINGS: tuple[Literal["full", "lora"], ...] = ("full", "lora")


def arms(quick: bool) -> dict[str, Arm]:
    found = {}
    for student in STUDENTS:
        found[f"{student} base"] = Arm(student, "none")
        for tuning in TUNINGS[:1] if quick else TUNINGS:
            found[f"{student} {tuning} plain"] = Arm(student, tuning)
            found[f"{student} {tuning} aligned"] = Arm(student, tuning, "teacher")
    return found


def judge(scores: Scores) -> list[Finding]:
    findings = []
    for arm in [arm for arm in scores if arm.endswith("aligned")]:
        plain, base = arm.replace("aligned", "plain"), f"{arm.split()[0]} base"
        findings += [compare(scores, metric, arm, plain) for metric in (*CAPTIONS, "pointing")]
        findings.append(compare(scores, "in_domain", plain, base))
    return findings


def draw(results: dict[str, Any], path: Path) -> None:
    draw_bars(results, (*CAPTIONS, "pointing"), path)


STUDY = Study(
    title="Does alignment help?",
    question="A base, the same base fine-tuned as usual, and fine-tuned with the alignment loss: same data, steps and "
    "seed. A cross-attending student (Mllama) and a self-attending one (LLaVA), all weights or LoRA.",
    paper="with LoRA, above autoregressive fine-tuning on 15 of the 16 benchmarks of Table 1, by up to 30 %; with full "
    "fine-tuning mixed; up to 68 % on out-of-domain medical questions (§7, Table 1).",
    arms=arms,
    judge=judge,
    draw=draw,
)
