"""The main study: base, plain and aligned fine-tuning, of both kinds of model, full and with LoRA."""

from __future__ import annotations

from functools import partial
from typing import Literal

from lavender.world.studies.cells import STUDENT_NAMES, Arm
from lavender.world.studies.page import draw_bars
from lavender.world.studies.study import CAPTIONS, Finding, Promised, Scores, Study, compare

TUNINGS: tuple[Literal["full", "lora"], ...] = ("full", "lora")
SHOWN = (*CAPTIONS, "pointing")


def arms(quick: bool) -> dict[str, Arm]:
    """Base, plain and aligned of each student and tuning; the quick study leaves LoRA out."""
    arms = {}
    for student in STUDENT_NAMES:
        arms[f"{student} base"] = Arm(student, "none")
        for tuning in TUNINGS[:1] if quick else TUNINGS:
            arms[f"{student} {tuning} plain"] = Arm(student, tuning)
            arms[f"{student} {tuning} aligned"] = Arm(student, tuning, "teacher")
    return arms


def judge(scores: Scores) -> list[Finding]:
    """Aligned against plain fine-tuning, and plain fine-tuning against the base."""
    findings = []
    for arm in [arm for arm in scores if arm.endswith("aligned")]:
        plain, base = arm.replace("aligned", "plain"), f"{arm.split()[0]} base"
        findings += [compare(scores, metric, arm, plain) for metric in SHOWN]
        findings.append(compare(scores, "in_domain", plain, base))
    return findings


def promised(scores: Scores) -> list[Promised]:
    """The aligned arms; captions decide."""
    return [Promised(arm, arm.replace("aligned", "plain"), "in_domain") for arm in scores if arm.endswith("aligned")]


STUDY = Study(
    title="Does alignment help?",
    question="A base is fine-tuned twice, as usual and with the alignment loss, with the same data, steps and seed. "
    "The bases are a cross-attending student (Mllama) and a self-attending one (LLaVA). All weights are tuned, or LoRA "
    "weights only.",
    paper="with LoRA, better than autoregressive fine-tuning on 15 of the 16 benchmarks of Table 1, by up to 30 %; "
    "with full fine-tuning, mixed results; up to 68 % better on out-of-domain medical questions (§7, Table 1).",
    arms=arms,
    judge=judge,
    draw=partial(draw_bars, metrics=SHOWN),
    promised=promised,
)
