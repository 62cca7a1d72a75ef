"""A study's page: Markdown with a table and the comparisons, and the plot of differences from plain fine-tuning."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from lavender.world.studies.promises import table_of_promises
from lavender.world.studies.study import METRICS, Scores, Study

QUICK = "**Quick version: fewer samples, steps and seeds, scored on development scenes. This is not a result.**"


def show(values: Sequence[float]) -> str:
    """Mean and range over seeds, "0.712 (0.690–0.731)"; one number if all seeds have the same value."""
    mean = f"{fmean(values):.3f}"
    return mean if len({*values}) == 1 else f"{mean} ({min(values):.3f}–{max(values):.3f})"


def table(arms: dict[str, dict[str, Any]], metrics: Sequence[str]) -> str:
    """A Markdown table with one row per arm and one column per metric; the cells are those of `show`."""
    lines = [f"| | {' | '.join(METRICS[metric] for metric in metrics)} |", "| --- " * (len(metrics) + 1) + "|"]
    for arm, scores in arms.items():
        cells = [show(scores[metric]) if metric in scores else "" for metric in metrics]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(study: Study, results: dict[str, Any]) -> str:
    """The study's page as Markdown, from the content of `results.json`. The plot is `plot.png` beside it."""
    seeds, scoring = ", ".join(map(str, results["seeds"])), results["settings"]["scoring"]
    parts = [
        f"# {study.title}",
        *([QUICK] if results["quick"] else []),
        study.question,
        f"**The paper:** {study.paper}",
        f"Command: `{results['command']}`. Seeds {seeds}; mean and range over seeds. Each score is over "
        f"{scoring['count']} {scoring['split']} scenes.",
        table(results["arms"], study.metrics),
        "Pointing accuracy of maps that do not depend on the picture: uniform map {uniform_pointing:.3f}, picture's "
        "centre {centre_pointing:.3f}.".format(**results["controls"]),
        "![plot](plot.png)",
        "## Comparisons",
        "\n".join(f"- {finding}" for finding in (*study.judge(results["arms"]), *study.extra(results["arms"]))),
        "Differences are between arms of the same seed: mean, smallest and largest. “Above” and “below”: the ranges "
        "over seeds do not overlap. “Higher” and “lower on average”: they overlap, but all differences have one sign.",
    ]
    if results["check"]["arms"]:
        parts += ["## Did `lavender check` know?", table_of_promises(results["check"], METRICS)]
    return "\n\n".join(parts) + "\n"


def plain_of(arms: Iterable[str]) -> dict[str, str]:
    """Arm → the arm of plain fine-tuning that it is compared with, for every arm but the plain ones.

    Of several plain arms it is the one whose name shares the most words with the arm's, then the one with the fewest
    other words, then the first: "LoRA recipe" → "LoRA plain", "recipe, kl" → "plain".
    """
    arms = list(arms)
    plain = [arm for arm in arms if "plain" in _words_of(arm)]
    return {arm: max(plain, key=partial(_closeness, arm)) for arm in arms if plain and arm not in plain}


def _words_of(arm: str) -> list[str]:
    return arm.replace(",", " ").split()


def _closeness(arm: str, plain: str) -> tuple[int, int]:
    own, other = set(_words_of(arm)), set(_words_of(plain))
    return len(own & other), -len(other - own)


def _labels(compared: Mapping[str, str]) -> list[str]:
    """The arms, each with its plain arm where its name does not tell which of several that is."""
    plain = set(compared.values())
    labels = []
    for arm, own in compared.items():
        is_told = all(_closeness(arm, other) < _closeness(arm, own) for other in plain - {own})
        labels.append(arm if is_told else f"{arm} (from {own})")
    return labels


def draw_differences(results: dict[str, Any], path: Path, metrics: Sequence[str]) -> None:
    """Plot one panel per metric and one row per arm: by how much it differs from plain fine-tuning."""
    from matplotlib.figure import Figure

    arms = results["arms"]
    num_rows = len(plain_of(arms))
    figure = Figure(figsize=(3.0 * len(metrics) + 2.0, 0.32 * num_rows + 1.5), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        draw_panel(panel, arms, metric)
    figure.savefig(path, dpi=150)


def draw_panel(panel: Any, arms: Scores, metric: str) -> None:
    """Plot one metric into Matplotlib axes, one row per arm: its difference from the plain arm of the same seed.

    A large dot is the mean over seeds, a line the range, a small dot a seed; the line at 0 is plain fine-tuning.
    """
    compared = plain_of(arms)
    panel.axvline(0, color="#999999", linewidth=0.8)
    for row, (arm, plain) in enumerate(compared.items()):
        pairs = zip(arms[arm][metric], arms[plain][metric], strict=True)
        differences = [value - baseline for value, baseline in pairs]
        panel.plot([min(differences), max(differences)], [row, row], "-", color="#c9b8e8", linewidth=4)
        panel.plot(differences, [row] * len(differences), ".", color="#4b2e83", markersize=4)
        panel.plot(fmean(differences), row, "o", color="#4b2e83", markersize=6)
    baselines = list(dict.fromkeys(compared.values()))
    level = f" {show(arms[baselines[0]][metric])}" if len(baselines) == 1 else " of the same kind"
    panel.set_title(textwrap.fill(METRICS[metric], 36), fontsize=9)
    panel.set_xlabel(f"difference from plain{level}", fontsize=8)
    panel.set_yticks(range(len(compared)), _labels(compared), fontsize=8)
    panel.set_ylim(max(1, len(compared)) - 0.5, -0.5)
    panel.tick_params(axis="x", labelsize=8)
    panel.locator_params(axis="x", nbins=5)
    panel.spines[["top", "right"]].set_visible(False)
