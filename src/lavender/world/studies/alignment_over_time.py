"""Does attention go to the teacher's maps while a student is tuned, and when? (Fig. 8 and 26)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavender.world.language import caption_scene
from lavender.world.scenes import scenes
from lavender.world.studies.cells import Arm
from lavender.world.studies.forms import RECIPE
from lavender.world.studies.over_time import draw_legend, draw_over_time, row_of, steps_of
from lavender.world.studies.study import METRICS, Finding, Scores, Study, compare_pairs

STEPS, SCORINGS = 400, 8
SHOWN = ("pointing", "attention_mass", "mask_kl", "in_domain")
PICTURED = ("plain", "published", "recipe")
"""Arms whose attention is shown on pictures."""
COLOURS = {"plain": "#777777", "published": "#e08214", "recipe": "#4b2e83", "recipe, masks": "#2a9d8f"}
"""Arm → its colour."""


def arms(quick: bool) -> dict[str, Arm]:
    """The base; plain, the published loss, the recipe, and the recipe with true masks, each scored several times."""

    def scored(target: Any, settings: Any = ()) -> Arm:
        return Arm("mllama", "full", target, 800, STEPS, settings, "captions-in-domain", scorings=SCORINGS)

    return {
        "base": Arm("mllama", "none", task="captions-in-domain"),
        "plain": scored(None),
        "published": scored("teacher"),
        "recipe": scored("teacher", RECIPE),
        "recipe, masks": scored("masks", RECIPE),
    }


def judge(scores: Scores) -> list[Finding]:
    """Each form of alignment against plain fine-tuning after as many steps."""
    pairs = [
        (row_of(arm, step), row_of("plain", step))
        for arm in ("published", "recipe", "recipe, masks")
        for step in steps_of(scores, arm)
    ]
    return compare_pairs(scores, SHOWN, pairs)


def draw(results: dict[str, Any], path: Path) -> None:
    """Each metric against the steps; below, attention on the first held-out scenes after each step, at the first seed.

    The pictures are left out where there are no maps, as in a results.json.
    """
    from matplotlib.figure import Figure

    maps = results.get("maps", {})
    figure = Figure(figsize=(4.0 * len(SHOWN), 11.0 if maps else 3.4), layout="constrained")
    parts: Any = [figure] if not maps else figure.subfigures(2, 1, height_ratios=(1, 2.2), squeeze=False)[:, 0]
    for panel, metric in zip(parts[0].subplots(1, len(SHOWN)), SHOWN, strict=True):
        draw_over_time(panel, results["arms"], COLOURS, metric, METRICS[metric])
    if maps:
        _draw_maps(parts[1], maps, results["settings"]["scoring"])
    draw_legend(parts[0])
    figure.savefig(path, dpi=150)


def _draw_maps(figure: Any, maps: dict[str, Any], scoring: dict[str, Any]) -> None:
    """A row per scene and arm: the picture, and the map of the caption's first name after each step."""
    steps = steps_of(maps, "plain")
    drawn = list(scenes(scoring["split"], len(maps[row_of("plain", steps[0])][0]), start=scoring["start"]))
    panels = figure.subplots(len(drawn) * len(PICTURED), 1 + len(steps), squeeze=False)
    for index, (scene, arm) in enumerate((scene, arm) for scene in drawn for arm in PICTURED):
        of_scene = drawn.index(scene)
        first, *others = panels[index]
        first.imshow(scene.image)
        first.set_ylabel(f"{arm}\n“{caption_scene(scene).mentions[0].name}”", fontsize=8)
        height, width = scene.pixels.shape[:2]
        for panel, step in zip(others, steps, strict=True):
            panel.imshow(scene.image.convert("L"), cmap="gray")
            heat = maps[row_of(arm, step)][0][of_scene]
            panel.imshow(heat, cmap="inferno", alpha=0.7, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            if index == 0:
                panel.set_title(f"step {step}", fontsize=8)
        for panel in panels[index]:
            panel.set(xticks=[], yticks=[])


STUDY = Study(
    title="When does attention follow the teacher?",
    question="One run per arm and seed, scored several times on the way: captions of known names, all weights. "
    "*published*: the authors' loss, λ = 5, words that the student predicts exactly. *recipe*: attention mass on the "
    "teacher's squared map, λ = 0.2, with attention forcing, which ends after 80 % of the steps. *recipe, masks*: the "
    "same with the true masks. The learning rate falls to 0 at the last step. Pointing shows the place of attention's "
    "maximum, the share its level, and the KL divergence its distance from the true mask.",
    paper="VLM attention comes to look like the diffusion model's over the steps (§7.1, Fig. 8, 26; pictures, without "
    "numbers).",
    arms=arms,
    judge=judge,
    draw=draw,
    metrics=SHOWN,
)
