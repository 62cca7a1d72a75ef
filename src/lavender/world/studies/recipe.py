"""What of the recipe matters: new words from 100 captions with other weights, rows, maps, forcing, and with LoRA."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lavender.world.studies.cells import Arm
from lavender.world.studies.forms import MASS, PLAIN, RECIPE, Settings
from lavender.world.studies.new_words import CONTROLLED, METRICS_SHOWN, fine_tuned
from lavender.world.studies.page import draw_differences
from lavender.world.studies.study import Finding, Scores, Study, compare_pairs

CHANGES: dict[str, dict[str, Any]] = {
    "λ = 0.05": {"align_weight": 0.05},
    "λ = 0.5": {"align_weight": 0.5},
    "λ = 1": {"align_weight": 1.0},
    "no forcing": {"attention_forcing": 0.0},
    "no forcing, λ = 0.5": {"attention_forcing": 0.0, "align_weight": 0.5},
    "no forcing, λ = 1": {"attention_forcing": 0.0, "align_weight": 1.0},
    "maps as they are": {"sharpen": 1.0},
    "rows both": {"rows": "both"},
    "kl": {"attention_loss": "kl"},
}
"""Arm → the settings that differ from the recipe."""
LORA_RATE: Settings = (("learning_rate", 2e-3),)
SHOWN = METRICS_SHOWN[:3]


def arms(quick: bool) -> dict[str, Arm]:
    """Plain, the recipe, each change of it, and both with two kinds of LoRA."""
    arms = {"plain": fine_tuned(CONTROLLED), "recipe": fine_tuned(CONTROLLED, RECIPE)}
    for label, change in CHANGES.items():
        arms[f"recipe, {label}"] = fine_tuned(CONTROLLED, (*RECIPE, *change.items()))
    for label, form in (("plain", PLAIN), ("recipe", RECIPE), ("no forcing", MASS)):
        arms[f"LoRA {label}"] = _with_lora(form, "lora")
    for label, form in (("plain", PLAIN), ("recipe", RECIPE)):
        arms[f"LoRA of all {label}"] = _with_lora(form, "lora-all")
    return arms


def _with_lora(form: Settings, tuning: Literal["lora", "lora-all"]) -> Arm:
    return replace(fine_tuned(CONTROLLED, form), tuning=tuning, settings=(*LORA_RATE, *form))


def judge(scores: Scores) -> list[Finding]:
    """The recipe against plain fine-tuning, each change against the recipe, and LoRA against LoRA."""
    pairs = [("recipe", "plain"), *((arm, "recipe") for arm in scores if arm.startswith("recipe, "))]
    pairs += [(arm, "LoRA plain") for arm in ("LoRA recipe", "LoRA no forcing")]
    pairs.append(("LoRA of all recipe", "LoRA of all plain"))
    return compare_pairs(scores, SHOWN, pairs)


STUDY = Study(
    title="What of the recipe matters?",
    question=f"New words from {CONTROLLED} captions, as in the study `new-words`. *recipe*: attention mass on the "
    "teacher's squared map, λ = 0.2, attention forcing from 1 to 0. Each other arm changes one thing. *maps as "
    "they are*: not squared. *rows both*: the rows that read a name are aligned too. *LoRA*: rank 8 on queries and "
    "values of the language model, learning rate 2e-3; *LoRA of all*: rank 16 on all linear layers of its blocks.",
    paper="studies λ, layers and words for its own loss (§7, §8).",
    arms=arms,
    judge=judge,
    draw=partial(draw_differences, metrics=SHOWN),
    metrics=METRICS_SHOWN,
    quick_steps=None,
    quick_seeds=(40, 41),
)
