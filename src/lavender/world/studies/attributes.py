"""Can a student bind attributes to the right thing? In questions about a colour, and in captions that name it.

Two harder cases are parts of the full study: questions that ask for the thing at the side of another one, and captions
that bind while a frozen tower is being connected to a text model with random weights.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lavender.training.run_config import Part
from lavender.world.studies.cells import FROZEN, Arm
from lavender.world.studies.efficiency import draw_sizes, efficiency
from lavender.world.studies.forms import PUBLISHED, Settings
from lavender.world.studies.page import draw_panel
from lavender.world.studies.study import Finding, Promised, Scores, Study, compare_pairs
from lavender.world.studies.targets import Target
from lavender.world.studies.tasks import TaskName

CONTROLLED = 1600
"""The number of samples at which the controls and the published loss are compared, where the model is connected."""
PLAIN_SIZES: dict[TaskName, tuple[int, ...]] = {
    "questions": (400, 800, CONTROLLED, 3200),
    "binding": (CONTROLLED,),
    "places": (CONTROLLED,),
    "binding-connecting": (3200,),
}
RECIPE_SIZES = PLAIN_SIZES | {"questions": (400, CONTROLLED)}
"""Task → numbers of samples. More of plain fine-tuning, to see how many it needs for what the recipe reaches."""
QUICK: tuple[TaskName, ...] = ("questions", "binding")
QUICK_SIZE = 800
METRICS_SHOWN = ("answers", "pairs", "right_colours", "all_names", "pointing", "attention_mass")
RATE: Settings = (("learning_rate", 1e-3),)
RECIPE: Settings = (("attention_loss", "kl"), ("align_weight", 1.0), ("match", "label"), ("sharpen", 2.0))
FORMS: dict[str, Settings] = {
    "plain": (*RECIPE, ("align_weight", 0.0)),
    "published": PUBLISHED,
    "recipe": RECIPE,
}
STEPS: dict[TaskName, int] = {"questions": 600, "binding": 450, "places": 600, "binding-connecting": 1000}
"""Task → optimizer steps."""
CONTROLS: dict[TaskName, tuple[Target, ...]] = {
    "questions": ("masks", "other-mask", "wrong-word", "uniform"),
    "binding": ("masks", "wrong-word"),
    "places": ("masks", "wrong-word"),
    "binding-connecting": ("masks", "wrong-word", "uniform"),
}
"""Task → what else the recipe is aligned to, at the largest number of samples of `RECIPE_SIZES`."""
KINDS = ("questions plain", "questions recipe")
ANSWERS: tuple[str, ...] = ("answers",)
PAIRS: tuple[str, ...] = ("pairs", "right_colours", "all_names")
JUDGED: dict[TaskName, tuple[str, ...]] = {
    "questions": ANSWERS,
    "binding": PAIRS,
    "places": ANSWERS,
    "binding-connecting": PAIRS,
}
"""Task → the metrics of its comparisons. The first one decides whether alignment paid."""


def _arm(task: TaskName, size: int, form: str = "plain", target: Target = "teacher") -> Arm:
    freeze: tuple[Part, ...] = ("vision_tower",) if task == "binding-connecting" else FROZEN
    maps = None if form == "plain" else target
    return Arm("mllama", "full", maps, size, STEPS[task], (*RATE, *FORMS[form]), task, freeze)


def arms(quick: bool) -> dict[str, Arm]:
    """Of each task plain and the recipe at each size, controls at one size; of questions the published loss too."""
    arms: dict[str, Arm] = {}
    for task in QUICK if quick else PLAIN_SIZES:
        plain_sizes, recipe_sizes = ((QUICK_SIZE,),) * 2 if quick else (PLAIN_SIZES[task], RECIPE_SIZES[task])
        controlled = recipe_sizes[-1]
        arms |= {f"{task} plain {size}": _arm(task, size) for size in plain_sizes}
        arms |= {f"{task} recipe {size}": _arm(task, size, "recipe") for size in recipe_sizes}
        if task == "questions" and not quick:
            arms[f"{task} published {controlled}"] = _arm(task, controlled, "published")
        for target in ("wrong-word",) if quick else CONTROLS[task]:
            arms[f"{task} recipe, {target} {controlled}"] = _arm(task, controlled, "recipe", target)
    return arms


def judge(scores: Scores) -> list[Finding]:
    """Every arm against plain fine-tuning on as many samples of the same task."""
    findings: list[Finding] = []
    for task, metrics in JUDGED.items():
        of_task = [arm for arm in scores if arm.startswith(f"{task} ") and f"{task} plain" not in arm]
        pairs = [(arm, f"{task} plain {arm.split()[-1]}") for arm in of_task]
        findings += compare_pairs(scores, metrics, pairs)
    return findings


def promised(scores: Scores) -> list[Promised]:
    """The recipe at each size, and with the maps of controls.

    Of places nothing is asked: the word of an answer has its own map, and `check` has no other place beside it.
    """
    return [
        Promised(arm, f"{task} plain {arm.split()[-1]}", metrics[0])
        for task, metrics in JUDGED.items()
        for arm in scores
        if task != "places" and arm.startswith(f"{task} recipe")
    ]


def draw(results: dict[str, Any], path: Path) -> None:
    """Answers against the number of questions; the first metric of each task, with an arm per row."""
    from matplotlib.figure import Figure

    scores = results["arms"]
    figure = Figure(figsize=(13.0, 6.0), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2), squeeze=False)[0]
    draw_sizes(left.subplots(), scores, "answers", KINDS, "questions")
    arms = {task: {arm: scores[arm] for arm in scores if arm.startswith(f"{task} ")} for task in JUDGED}
    drawn = {task: by_arm for task, by_arm in arms.items() if by_arm}
    heights = [len(by_arm) + 2 for by_arm in drawn.values()]
    panels = right.subplots(len(drawn), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, (task, by_arm) in zip(panels, drawn.items(), strict=True):
        draw_panel(panel, by_arm, JUDGED[task][0])
    figure.savefig(path, dpi=150)


STUDY = Study(
    title="Can it bind attributes to things, and find the thing beside another?",
    question="Each thing has an edge of its own colour. *questions*: “the dog is on”, “red”; the name in the question "
    "and the answer take the map of the name. *binding*: captions such as “a dog on red and a cat on blue”; a colour "
    "takes the map of its thing. *binding-connecting*: the same captions, from a trained tower that stays frozen and "
    "random weights in all other parts. *places*: “the dog is left of”, “the cat”, about scenes of three or four "
    "things; the cat is the next one from left to right, and each name takes its own map. *recipe*: KL of the "
    "attention from the teacher's squared map, λ = 1. *published*: the authors' loss, λ = 5, of the same words. The "
    "controls get other maps of the same words. A question names one thing, so in *questions* and *places* "
    "*wrong-word* is a thing of another picture; *other-mask* is the true mask of another thing in the picture. The "
    "published loss is an arm of questions alone.",
    paper="does not study it.",
    arms=arms,
    judge=judge,
    draw=draw,
    metrics=METRICS_SHOWN,
    promised=promised,
    extra=partial(efficiency, metric="answers", kinds=KINDS, samples="questions"),
    seeds=(1, 2, 3, 4, 5),
    quick_steps=None,
)
