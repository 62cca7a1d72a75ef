"""Variants of the method, one study each: aligned fine-tuning with other settings, beside the plain one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from lavender.config import POOLINGS, AlignerForm, AlignerKind, AlignerNorm, AlignmentConfig, Match
from lavender.world.studies.cells import Arm
from lavender.world.studies.page import draw_bars
from lavender.world.studies.study import Finding, Scores, Study, compare
from lavender.world.studies.targets import EVERY_WORD
from lavender.world.tuning import ALIGNMENT

SHOWN = ("in_domain", "other_backgrounds", "pointing")
LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3)


def _judge(scores: Scores) -> list[Finding]:
    """Each arm against plain fine-tuning; where the plain one varies too, against the one of the same setting."""
    findings = []
    for arm in scores:
        if not arm.startswith("plain"):
            other = arm.replace("aligned", "plain") if "aligned" in arm else "plain"
            findings += [compare(scores, metric, arm, other) for metric in SHOWN]
    return findings


def _draw(results: dict[str, Any], path: Path) -> None:
    draw_bars(results, SHOWN, path)


def _study(title: str, question: str, paper: str, variants: Mapping[str, Mapping[str, Any]]) -> Study:
    def arms(quick: bool) -> dict[str, Arm]:
        aligned = {
            name: Arm("mllama", "full", "teacher", settings=tuple(settings.items()))
            for name, settings in variants.items()
        }
        return {"plain": Arm("mllama", "full")} | aligned

    return Study(title, question, paper, arms, _judge, _draw)


def _setting(name: str, value: str) -> dict[str, str]:
    """Nothing where it is the default: the arm is then the same as another study's, and runs once."""
    return {} if getattr(AlignmentConfig, name) == value else {name: value}


def _words(quick: bool) -> dict[str, Arm]:
    things = {match: Arm("mllama", "full", "teacher", settings=(("match", match),)) for match in get_args(Match)}
    every = {
        name: Arm("mllama", "full", EVERY_WORD, settings=settings)
        for name, settings in (
            ("every word", ()),
            ("every subject and object", (("subjects_and_objects", True),)),
            ("every word, by confidence", (("weight_by_confidence", True),)),
        )
    }
    return {"plain": Arm("mllama", "full")} | things | every


def _learning_rates(quick: bool) -> dict[str, Arm]:
    found = {}
    for rate in LEARNING_RATES[1:3] if quick else LEARNING_RATES:
        setting = (("learning_rate", rate),)
        found[f"plain {rate:g}"] = Arm("mllama", "full", settings=setting)
        found[f"aligned {rate:g}"] = Arm("mllama", "full", "teacher", settings=setting)
    return found


VARIANTS: dict[str, Study] = {
    "pooling": _study(
        "Which pooling?",
        "Aligned fine-tuning with each way to make one map of many layers and heads.",
        "learned parallel attention is best and scales best; flow-multi is worst (§8.1, Fig. 19, 20).",
        {pooling: _setting("pooling", pooling) for pooling in POOLINGS if "-flow-" not in pooling},
    ),
    "aligner": _study(
        "Which Aligner?",
        "The Aligner's depth, layers and normalisation; the default is sim, convolution, instance.",
        "convolutions are better than an MLP (§7.1, App. F.1).",
        {f"form {form}": _setting("aligner", form) for form in get_args(AlignerForm)}
        | {f"kind {kind}": _setting("aligner_kind", kind) for kind in get_args(AlignerKind)}
        | {f"norm {norm}": _setting("aligner_norm", norm) for norm in get_args(AlignerNorm)},
    ),
    "words": Study(
        "Which words?",
        "Of the words that name things: those that the student predicts itself, or in another form, or "
        "all. Then of every mapped word, adjectives and verbs too: all, subjects and objects, or by confidence.",
        "exact matches are better than root matches (§7.1).",
        _words,
        _judge,
        _draw,
    ),
    "layers": _study(
        "Which layers?",
        "Alignment of both cross-attention layers, or of one.",
        "all eight are better than the first, middle or last ones (§8, Fig. 22).",
        {"all": {}, "first": {"layers": (1,)}, "last": {"layers": (3,)}},
    ),
    "pretraining": _study(
        "Does the Aligner need a stage of its own?",
        "A share of the steps in which the VLM is frozen and the Aligner "
        "learns alone, within the same number of steps.",
        "less than a third of the epochs prevents forgetting in full fine-tuning (§8.1.1, Fig. 21).",
        {"none": {}, "a tenth": {"aligner_pretraining": 0.1}, "a third": {"aligner_pretraining": 0.33}},
    ),
    "lambda": _study(
        "How much alignment?",
        "The weight λ of the alignment loss.",
        "λ = 1/(2σ²), the confidence in the teacher (§3); the authors' code has 10.",
        {f"λ = {weight:g}": {"align_weight": weight} for weight in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)}
        | {"λ estimated": {"align_weight": "estimated"}},
    ),
    "switching": _study(
        "Does switching between strategies hurt?",
        "Alignment is switched off and on again over the run, in equal "
        "parts; “half the weight” is aligned throughout and gets the same total of λ.",
        "frequent switching of strategy harms (§9).",
        {"always on": {}, "half the weight": {"align_weight": ALIGNMENT["align_weight"] / 2}}
        | {f"{count} switch{'es' * (count > 1)}": {"align_switches": count} for count in (1, 5, 19)},
    ),
    "learning-rate": Study(
        "Does the gain depend on the learning rate?",
        "Plain and aligned fine-tuning at each of four learning rates.",
        "moderate learning rates align best (§7.1).",
        _learning_rates,
        _judge,
        _draw,
    ),
}
