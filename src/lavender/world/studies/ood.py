"""Does what alignment teaches hold far from the data of fine-tuning? (Fig. 16)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavender.world.studies import attributes, new_words
from lavender.world.studies.cells import FROZEN, Arm
from lavender.world.studies.forms import PLAIN, PUBLISHED, RECIPE, Settings
from lavender.world.studies.page import draw_panel
from lavender.world.studies.study import METRICS, Finding, Promised, Scores, Study, compare_pairs
from lavender.world.studies.targets import Target
from lavender.world.studies.tasks import OTHER_STYLES, TaskName

NEW_WORDS, QUESTIONS = "new words", "questions"
TASK: dict[str, TaskName] = {NEW_WORDS: "new-words-ood", QUESTIONS: "questions-ood"}
FORMS: dict[str, dict[str, Settings]] = {
    NEW_WORDS: {"plain": PLAIN, "published": PUBLISHED, "recipe": RECIPE},
    QUESTIONS: attributes.FORMS,
}
"""Part → its forms. Plain fine-tuning is the form of the recipe with λ = 0."""
SIZES = {NEW_WORDS: new_words.CONTROLLED, QUESTIONS: attributes.CONTROLLED}
STEPS = {NEW_WORDS: new_words.STEPS, QUESTIONS: attributes.STEPS["questions"]}
CONTROLS: tuple[Target, ...] = ("masks", "wrong-word")
JUDGED: dict[str, tuple[str, ...]] = {
    NEW_WORDS: ("new_names", *(f"new_names_{style}" for style in OTHER_STYLES), "known_names_openmoji"),
    QUESTIONS: ("answers", "answers_withheld", "answers_reworded"),
}
"""Part → its metrics, from like the data of fine-tuning to far from it."""


def _tuned(part: str, form: str, size: int, target: Target = "teacher") -> Arm:
    settings = (*new_words.RATE, *FORMS[part][form])
    maps = None if form == "plain" else target
    return Arm("mllama", "full", maps, size, STEPS[part], settings, TASK[part], FROZEN)


def arms(quick: bool) -> dict[str, Arm]:
    """Of each part the base, plain, the published loss, the recipe, and controls of the recipe."""
    arms: dict[str, Arm] = {}
    for part, task in TASK.items():
        size = attributes.QUICK_SIZE if quick and part == QUESTIONS else SIZES[part]
        arms[f"{part} base"] = Arm("mllama", "none", task=task)
        arms |= {f"{part} {form}": _tuned(part, form, size) for form in FORMS[part]}
        for target in () if quick else CONTROLS:
            arms[f"{part} recipe, {target}"] = _tuned(part, "recipe", size, target)
    return arms


def judge(scores: Scores) -> list[Finding]:
    """Every form and control against plain fine-tuning of the same part; plain against the base."""
    findings: list[Finding] = []
    for part, metrics in JUDGED.items():
        plain, base = f"{part} plain", f"{part} base"
        others = [arm for arm in scores if arm.startswith(f"{part} ") and arm not in (plain, base)]
        findings += compare_pairs(scores, metrics, [*((arm, plain) for arm in others), (plain, base)])
    return findings


def kept(scores: Scores) -> list[str]:
    """How much of the recipe's gain over plain is left far from the data: differences of means."""
    lines = []
    for part, (near, *far) in JUDGED.items():
        gains = {
            metric: _mean(scores, f"{part} recipe", metric) - _mean(scores, f"{part} plain", metric)
            for metric in (near, *far)
        }
        shown = ", ".join(f"{METRICS[metric]} {gain:+.3f}" for metric, gain in gains.items())
        lines.append(f"{part}, gain of the recipe: {shown}")
    return lines


def _mean(scores: Scores, arm: str, metric: str) -> float:
    values = scores[arm][metric]
    return sum(values) / len(values)


def promised(scores: Scores) -> list[Promised]:
    """The recipe and its controls, by the metric that is farthest from the data."""
    far = {NEW_WORDS: "new_names_openmoji", QUESTIONS: "answers_withheld"}
    return [
        Promised(arm, f"{part} plain", metric)
        for part, metric in far.items()
        for arm in scores
        if arm.startswith(f"{part} recipe")
    ]


def draw(results: dict[str, Any], path: Path) -> None:
    """A row of panels per part: its metrics, with an arm per row."""
    from matplotlib.figure import Figure

    scores, columns = results["arms"], max(map(len, JUDGED.values()))
    figure = Figure(figsize=(2.9 * columns, 5.6), layout="constrained")
    for panels, (part, metrics) in zip(figure.subplots(2, columns, squeeze=False), JUDGED.items(), strict=True):
        of_part = {arm: scores[arm] for arm in scores if arm.startswith(f"{part} ")}
        for panel, metric in zip(panels, metrics, strict=False):
            draw_panel(panel, of_part, metric)
            panel.tick_params(axis="y", labelleft=panel is panels[0])
        for panel in panels[len(metrics) :]:
            panel.set_axis_off()
    figure.savefig(path, dpi=150)


STUDY = Study(
    title="Does it hold severely out of domain?",
    question="*new words*: as in the study `new-words`, from 100 captions; scored on pictures of the same things in "
    "front of photographs, in a hand that no model was trained on, and as black outlines. *questions*: about the "
    "colour around a thing, as in `attributes`. A sixth of the pairs of name and colour are withheld from all texts of "
    "fine-tuning (*withheld pairs*: an unseen combination), and the same questions are asked in a form that was never "
    "trained (*reworded*). The controls get other maps of the same words.",
    paper="answers on WorldMedQA-V, medical pictures in four languages, are up to 68 % better (§7.5, Fig. 16).",
    arms=arms,
    judge=judge,
    draw=draw,
    metrics=(*JUDGED[NEW_WORDS], *JUDGED[QUESTIONS], "attention_mass"),
    promised=promised,
    extra=kept,
    seeds=(1, 2, 3, 4, 5),
    quick_steps=None,
)
