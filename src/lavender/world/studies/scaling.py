"""Scores against the number of fine-tuning samples, plain and aligned."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from lavender.world.studies.cells import Arm
from lavender.world.studies.study import CAPTIONS, METRICS, Finding, Scores, Study, compare_pairs

SIZES, QUICK_SIZES = (200, 400, 800, 1600), (100, 200)
SHOWN = ("in_domain", "other_backgrounds", "held_out_loss")


def arms(quick: bool) -> dict[str, Arm]:
    """Plain and aligned fine-tuning on each number of scenes."""
    sizes = QUICK_SIZES if quick else SIZES
    plain = {f"plain {size}": Arm("mllama", "full", num_scenes=size) for size in sizes}
    return plain | {f"aligned {size}": Arm("mllama", "full", "teacher", num_scenes=size) for size in sizes}


def judge(scores: Scores) -> list[Finding]:
    """Aligned against plain on as many scenes, and against plain on twice as many."""
    sizes = [arm.split()[1] for arm in scores if arm.startswith("plain")]
    doubled = [(small, large) for small, large in pairwise(sizes) if 2 * int(small) == int(large)]
    return compare_pairs(scores, SHOWN, [(f"aligned {size}", f"plain {size}") for size in sizes]) + compare_pairs(
        scores, CAPTIONS[:2], [(f"aligned {small}", f"plain {large}") for small, large in doubled]
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel per metric: a line through the means and a dot per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(SHOWN), 3.4), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        for kind, colour in (("plain", "#777777"), ("aligned", "#4b2e83")):
            by_size = {int(arm.split()[1]): scores[metric] for arm, scores in results["arms"].items() if kind in arm}
            panel.plot(list(by_size), [fmean(values) for values in by_size.values()], "-", color=colour, label=kind)
            for size, values in by_size.items():
                panel.plot([size] * len(values), values, ".", color=colour)
        panel.set(xscale="log", xlabel="fine-tuning scenes", title=METRICS[metric])
        panel.set_xticks(sorted(by_size), [str(size) for size in sorted(by_size)])
        panel.set_xticks([], minor=True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


STUDY = Study(
    title="How many samples?",
    question="Fine-tuning on 200 to 1,600 scenes with the same number of steps: plain, and aligned with the published "
    "loss, λ = 5. Fewer scenes are repeated more often, so overfitting shows at the left of each curve.",
    paper="with larger fine-tuning sets the aligned model keeps improving while the autoregressive one overfits (§7.4, "
    "Fig. 27).",
    arms=arms,
    judge=judge,
    draw=draw,
)
