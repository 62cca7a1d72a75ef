"""Studies of the method's variants: aligned fine-tuning with other settings, and plain fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from lavender.alignment.pooling import POOLINGS
from lavender.config import AlignerForm, AlignerKind, AlignerNorm, AlignmentConfig, Match
from lavender.world.studies.cells import Arm
from lavender.world.studies.page import draw_differences
from lavender.world.studies.study import MAIN_METRICS, Finding, Scores, Study, compare_pairs
from lavender.world.studies.targets import EVERY_WORD, Target
from lavender.world.tuning import ALIGNMENT

COMPARED_RATES = (1e-4, 2e-4, 5e-4, 1e-3)
PLAIN = Arm("mllama", "full")
_draw = partial(draw_differences, metrics=MAIN_METRICS)


def _aligned(settings: Mapping[str, Any], target: Target = "teacher") -> Arm:
    return Arm("mllama", "full", target, settings=tuple(settings.items()))


def _judge(scores: Scores) -> list[Finding]:
    """Each arm against plain fine-tuning; of the same setting, if plain fine-tuning has several."""
    findings = []
    for arm in scores:
        if not arm.startswith("plain"):
            baseline = arm.replace("aligned", "plain") if "aligned" in arm else "plain"
            findings += compare_pairs(scores, MAIN_METRICS, [(arm, baseline)])
    return findings


def _study(title: str, question: str, paper: str, variants: Mapping[str, Mapping[str, Any]]) -> Study:
    def arms(quick: bool) -> dict[str, Arm]:
        return {"plain": PLAIN} | {name: _aligned(settings) for name, settings in variants.items()}

    return Study(title, question, paper, arms, _judge, _draw)


def _setting(name: str, value: str) -> dict[str, str]:
    """The setting; nothing if the value is the default, so that the arm equals other studies' arm and runs once."""
    return {} if getattr(AlignmentConfig, name) == value else {name: value}


def _words(quick: bool) -> dict[str, Arm]:
    names_of_things = {match: _aligned({"match": match}) for match in get_args(Match)}
    every_word = {
        "every word": _aligned({}, EVERY_WORD),
        "every subject and object": _aligned({"subjects_and_objects": True}, EVERY_WORD),
        "every word, by confidence": _aligned({"weight_by_confidence": True}, EVERY_WORD),
    }
    return {"plain": PLAIN} | names_of_things | every_word


def _learning_rates(quick: bool) -> dict[str, Arm]:
    arms = {}
    for rate in COMPARED_RATES[1:3] if quick else COMPARED_RATES:
        aligned = _aligned({"learning_rate": rate})
        arms |= {f"plain {rate:g}": replace(PLAIN, settings=aligned.settings), f"aligned {rate:g}": aligned}
    return arms


VARIANTS: dict[str, Study] = {
    "pooling": _study(
        "Which pooling?",
        "Aligned fine-tuning with each way to pool the maps of all layers and heads into one.",
        "learned parallel attention is best and scales best; flow-multi is worst (§8.1, Fig. 19, 20).",
        {
            pooling: _setting("pooling", pooling)
            for pooling, steps in POOLINGS.items()
            if not (steps.flow and steps.heads != "all")
        },
    ),
    "aligner": _study(
        "Which Aligner?",
        "The Aligner's depth, layers and normalisation. The default is sim, convolution, instance.",
        "convolutions are better than an MLP (§7.1, App. F.1).",
        {f"form {form}": _setting("aligner", form) for form in get_args(AlignerForm)}
        | {f"kind {kind}": _setting("aligner_kind", kind) for kind in get_args(AlignerKind)}
        | {f"norm {norm}": _setting("aligner_norm", norm) for norm in get_args(AlignerNorm)},
    ),
    "words": Study(
        "Which words?",
        "Which of the words that name things are aligned: the words that the student predicts exactly, also those that "
        "it predicts in another form, or all. Then which of all mapped words, adjectives and verbs included: all, "
        "subjects and objects only, or all weighted by confidence.",
        "exact matches are better than root matches (§7.1).",
        _words,
        _judge,
        _draw,
    ),
    "layers": _study(
        "Which layers?",
        "Both cross-attention layers are aligned, or one of them.",
        "aligning all eight layers is better than the first, middle or last ones (§8, Fig. 22).",
        {"all": {}, "first": {"layers": (1,)}, "last": {"layers": (3,)}},
    ),
    "pretraining": _study(
        "Does the Aligner need a separate stage?",
        "For the first share of the steps the VLM is frozen and the Aligner is trained alone. The number of steps is "
        "the same in every arm.",
        "such a stage of less than a third of the epochs prevents forgetting in full fine-tuning (§8.1.1, Fig. 21).",
        {"none": {}, "a tenth": {"aligner_pretraining": 0.1}, "a third": {"aligner_pretraining": 0.33}},
    ),
    "lambda": _study(
        "How much alignment?",
        "Fine-tuning with different weights λ of the alignment loss.",
        "λ = 1/(2σ²), the confidence in the teacher (§3); the authors' code uses 10.",
        {f"λ = {weight:g}": {"align_weight": weight} for weight in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)}
        | {"λ estimated": {"align_weight": "estimated"}},
    ),
    "switching": _study(
        "Does switching between strategies hurt?",
        "Alignment is switched off and on during the run, in equal parts. “Half the weight” is always on, with half of "
        "λ, so that its sum of λ over the steps is the same.",
        "frequent switching between strategies is harmful (§9).",
        {"always on": {}, "half the weight": {"align_weight": ALIGNMENT["align_weight"] / 2}}
        | {f"{count} switch{'es' * (count > 1)}": {"align_switches": count} for count in (1, 5, 19)},
    ),
    "learning-rate": Study(
        "Does the gain depend on the learning rate?",
        "Plain and aligned fine-tuning at four learning rates.",
        "moderate learning rates align best (§7.1).",
        _learning_rates,
        _judge,
        _draw,
    ),
}
