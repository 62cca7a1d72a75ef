"""The teacher's maps against other maps of the same words: does their content matter, or only the added loss?"""

from __future__ import annotations

from functools import partial

from lavender.world.studies.cells import Arm
from lavender.world.studies.forms import RECIPE
from lavender.world.studies.page import draw_differences
from lavender.world.studies.study import CAPTIONS, Finding, Scores, Study, compare_pairs
from lavender.world.studies.targets import TARGETS

SHOWN = (*CAPTIONS, "pointing", "attention_mass")


def arms(quick: bool) -> dict[str, Arm]:
    """Plain fine-tuning, and the recipe with each target."""
    recipes = {target: Arm("mllama", "full", target, settings=RECIPE) for target in TARGETS}
    return {"plain": Arm("mllama", "full")} | recipes


def judge(scores: Scores) -> list[Finding]:
    """The teacher's maps against plain fine-tuning and every other target, and true masks against plain fine-tuning."""
    controls = [target for target in TARGETS if target != "teacher"]
    pairs = [("teacher", baseline) for baseline in ("plain", *controls)]
    return compare_pairs(scores, SHOWN, [*pairs, ("masks", "plain")])


STUDY = Study(
    title="Is it the teacher's knowledge?",
    question="The same fine-tuning, with attention mass and attention forcing, is aligned to the teacher's maps, to "
    "maps without information about the word, and to the true masks. The words and all other settings are the same in "
    "every arm. " + "; ".join(f"*{target}*: {description}" for target, description in TARGETS.items()) + ".",
    paper="attributes the gain to the diffusion model's attention (§4, §7), without such a control.",
    arms=arms,
    judge=judge,
    draw=partial(draw_differences, metrics=SHOWN),
    metrics=SHOWN,
)
