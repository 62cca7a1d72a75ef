"""Can a student learn new words from few captions? With plain fine-tuning, and with each form of alignment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lavender.world.studies.cells import FROZEN, Arm
from lavender.world.studies.efficiency import draw_sizes, efficiency
from lavender.world.studies.forms import DEFAULTS, MASS, PLAIN, PUBLISHED, RECIPE, Settings
from lavender.world.studies.study import Finding, Promised, Scores, Study, compare_pairs
from lavender.world.studies.targets import Target
from lavender.world.studies.tasks import TaskName

SIZES = (25, 50, 100, 200, 400, 800)
CONTROLLED = 100
"""The number of captions at which controls and forms of the loss are compared."""
METRICS_SHOWN = ("new_names", "known_names", "all_names", "single_things", "new_pointing", "new_attention_mass")
RATE: Settings = (("learning_rate", 1e-3),)
FORMS: dict[str, Settings] = {"published": PUBLISHED, "mass": MASS, "defaults": DEFAULTS, "recipe": RECIPE}
STEPS = 400
OTHER_DATA: dict[TaskName, str] = {
    "new-words-alone": "without replay",
    "new-words-one-named": "one thing named",
}
"""Task → its label: the same captions without replay; captions that name one of the things."""
KINDS = ("plain", "recipe")
CONTROLS: tuple[Target, ...] = ("masks", "wrong-word", "uniform", "things")


def fine_tuned(size: int, form: Settings = PLAIN, target: Target = "teacher", task: TaskName = "new-words") -> Arm:
    """A student after `STEPS` steps on `size` captions."""
    return Arm("mllama", "full", None if form == PLAIN else target, size, STEPS, (*RATE, *form), task, FROZEN)


def arms(quick: bool) -> dict[str, Arm]:
    """Base; plain and the recipe at each size; at one size the forms, the controls, and other data."""
    arms = {"base": Arm("mllama", "none", task="new-words")}
    for size in (CONTROLLED,) if quick else SIZES:
        arms |= {f"plain {size}": fine_tuned(size), f"recipe {size}": fine_tuned(size, RECIPE)}
    for form in ("published",) if quick else ("published", "mass", "defaults"):
        arms[f"{form} {CONTROLLED}"] = fine_tuned(CONTROLLED, FORMS[form])
    for target in ("wrong-word",) if quick else CONTROLS:
        arms[f"recipe, {target} {CONTROLLED}"] = fine_tuned(CONTROLLED, RECIPE, target)
    for task, label in () if quick else OTHER_DATA.items():
        arms[f"plain, {label} {CONTROLLED}"] = fine_tuned(CONTROLLED, task=task)
        arms[f"recipe, {label} {CONTROLLED}"] = fine_tuned(CONTROLLED, RECIPE, task=task)
    return arms


def judge(scores: Scores) -> list[Finding]:
    """The recipe against plain on the same data, by every F1; forms and controls against plain at one size."""
    pairs = [(arm.replace("plain", "recipe", 1), arm) for arm in scores if arm.startswith("plain")]
    plain, compared = f"plain {CONTROLLED}", {arm for pair in pairs for arm in pair}
    others = [(arm, plain) for arm in scores if arm.endswith(f" {CONTROLLED}") and arm not in compared]
    return compare_pairs(scores, METRICS_SHOWN[:4], pairs) + compare_pairs(
        scores, ("new_names", "known_names", "all_names"), others
    )


def promised(scores: Scores) -> list[Promised]:
    """The recipe at each size and on other data, and with the maps of controls; new names decide."""
    arms = [arm for arm in scores if arm.startswith("recipe")]
    plain = f"plain {CONTROLLED}"
    matching = {arm: arm.replace("recipe", "plain", 1) for arm in arms}
    return [Promised(arm, same if (same := matching[arm]) in scores else plain, "new_names") for arm in arms]


def draw(results: dict[str, Any], path: Path) -> None:
    """New, known and all names against the number of captions."""
    from matplotlib.figure import Figure

    shown: Sequence[str] = ("new_names", "known_names", "all_names")
    figure = Figure(figsize=(4.2 * len(shown), 3.4), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(shown)), shown, strict=True):
        draw_sizes(panel, results["arms"], metric, KINDS, "captions")
    figure.savefig(path, dpi=150)


STUDY = Study(
    title="Can it learn new words from few captions?",
    question="The base's language side never heard 14 of the 42 names; its vision tower saw them. It is fine-tuned on "
    "captions of scenes with two to four things, 400 steps each, with the tower frozen. Half of the samples are "
    "replayed: captions of 800 other scenes with known names alone. *recipe*: attention mass on the teacher's squared "
    "map, λ = 0.2, with attention forcing. *mass*: the same without forcing. *defaults*: without forcing, λ = 0.5. "
    "*published*: the authors' loss, λ = 5. The controls get other maps of the same words.",
    paper="does not study it.",
    arms=arms,
    judge=judge,
    draw=draw,
    metrics=METRICS_SHOWN,
    promised=promised,
    extra=partial(efficiency, metric="new_names", kinds=KINDS, samples="captions"),
    seeds=(1, 2, 3, 4, 5),
    quick_steps=None,
    quick_seeds=(40, 41),
)
