"""Score against the number of fine-tuning samples, plain and aligned, and the loss on held-out captions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from lavender.world.studies.cells import Arm
from lavender.world.studies.study import METRICS, Finding, Scores, Study, compare

SIZES, QUICK_SIZES = (200, 400, 800, 1600), (100, 200)
METRICS_SHOWN = ("in_domain", "other_backgrounds", "held_out_loss")


def arms(quick: bool) -> dict[str, Arm]:
    sizes = QUICK_SIZES if quick else SIZES
    plain = {f"plain {size}": Arm("mllama", "full", num_scenes=size) for size in sizes}
    return plain | {f"aligned {size}": Arm("mllama", "full", "teacher", num_scenes=size) for size in sizes}


def judge(scores: Scores) -> list[Finding]:
    sizes = [arm.split()[1] for arm in scores if arm.startswith("plain")]
    findings = [
        compare(scores, metric, f"aligned {size}", f"plain {size}")
        for metric in ("in_domain", "other_backgrounds", "held_out_loss")
        for size in sizes
    ]
    halves = [(small, large) for small, large in pairwise(sizes) if 2 * int(small) == int(large)]
    return findings + [
        compare(scores, metric, f"aligned {small}", f"plain {large}")
        for metric in ("in_domain", "other_backgrounds")
        for small, large in halves
    ]


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(METRICS_SHOWN), 3.4), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(METRICS_SHOWN)), METRICS_SHOWN, strict=True):
        for kind, colour in (("plain", "#777777"), ("aligned", "#4b2e83")):
            found = {int(arm.split()[1]): scores[metric] for arm, scores in results["arms"].items() if kind in arm}
            panel.plot(list(found), [fmean(values) for values in found.values()], "-", color=colour, label=kind)
            for size, values in found.items():
                panel.plot([size] * len(values), values, ".", color=colour)
        panel.set(xscale="log", xlabel="fine-tuning scenes", title=METRICS[metric])
        panel.set_xticks(sorted(found), [str(size) for size in sorted(found)])
        panel.set_xticks([], minor=True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


STUDY = Study(
    title="How many samples?",
    question="Plain and aligned fine-tuning on 200 to 1,600 scenes, the same number of steps: fewer scenes are seen "
    "more often, so the left of each curve shows overfitting.",
    paper="with larger fine-tuning sets the aligned model keeps improving while the autoregressive one overfits (§7.4, "
    "Fig. 27).",
    arms=arms,
    judge=judge,
    draw=draw,
)
