"""The main study: plain fine-tuning, the published loss and the recipe, of both kinds of model, full and with LoRA."""

from __future__ import annotations

from functools import partial
from typing import Literal

from lavender.world.studies.cells import STUDENT_NAMES, Arm
from lavender.world.studies.forms import RECIPE
from lavender.world.studies.page import draw_differences
from lavender.world.studies.study import CAPTIONS, Finding, Promised, Scores, Study, compare, compare_pairs

TUNINGS: tuple[Literal["full", "lora"], ...] = ("full", "lora")
SHOWN = (*CAPTIONS, "pointing", "attention_mass")


def arms(quick: bool) -> dict[str, Arm]:
    """Base, plain and both forms of each student and tuning; the quick study leaves LoRA out."""
    arms = {}
    for student in STUDENT_NAMES:
        arms[f"{student} base"] = Arm(student, "none")
        for tuning in TUNINGS[:1] if quick else TUNINGS:
            arms[f"{student} {tuning} plain"] = Arm(student, tuning)
            arms[f"{student} {tuning} published"] = Arm(student, tuning, "teacher")
            arms[f"{student} {tuning} recipe"] = Arm(student, tuning, "teacher", settings=RECIPE)
    return arms


def judge(scores: Scores) -> list[Finding]:
    """Each form against plain fine-tuning, and plain fine-tuning against the base."""
    findings = []
    for plain in [arm for arm in scores if arm.endswith("plain")]:
        forms = [plain.replace("plain", form) for form in ("published", "recipe")]
        findings += compare_pairs(scores, SHOWN, [(form, plain) for form in forms])
        findings.append(compare(scores, "in_domain", plain, f"{plain.split()[0]} base"))
    return findings


def promised(scores: Scores) -> list[Promised]:
    """The arms of the recipe; captions decide."""
    return [Promised(arm, arm.replace("recipe", "plain"), "in_domain") for arm in scores if arm.endswith("recipe")]


STUDY = Study(
    title="Does alignment help?",
    question="A base is fine-tuned with the same data, steps and seed as usual, with the authors' loss (*published*, "
    "λ = 5, words that the student predicts exactly), and with *recipe*: attention mass on the teacher's squared map, "
    "λ = 0.2, with attention forcing. Every name in the captions is known to the base. The bases are a cross-attending "
    "student (Mllama) and a self-attending one (LLaVA). All weights are tuned, or LoRA weights only.",
    paper="with LoRA, better than autoregressive fine-tuning on 15 of the 16 benchmarks of Table 1, by up to 30 %; "
    "with full fine-tuning, mixed results; up to 68 % better on out-of-domain medical questions (§7, Table 1).",
    arms=arms,
    judge=judge,
    draw=partial(draw_differences, metrics=SHOWN),
    metrics=SHOWN,
    promised=promised,
)
