"""A study's page: Markdown with a table and the comparisons, and the bar plot."""

from __future__ import annotations

from collections.abc import Sequence
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


def draw_bars(results: dict[str, Any], path: Path, metrics: Sequence[str]) -> None:
    """Plot one panel per metric and one row per arm: a bar for the mean, a dot per seed."""
    from matplotlib.figure import Figure

    arms = results["arms"]
    figure = Figure(figsize=(3.0 * len(metrics) + 2.0, 0.32 * len(arms) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        draw_panel(panel, arms, metric)
    figure.savefig(path, dpi=150)


def draw_panel(panel: Any, arms: Scores, metric: str) -> None:
    """Plot one metric into Matplotlib axes, one row per arm: a bar for the mean, a dot per seed."""
    for row, scores in enumerate(arms.values()):
        panel.barh(row, fmean(scores[metric]), color="#c9b8e8")
        panel.plot(scores[metric], [row] * len(scores[metric]), ".", color="#4b2e83")
    panel.set_title(METRICS[metric], fontsize=9)
    panel.set_yticks(range(len(arms)), list(arms), fontsize=8)
    panel.set_ylim(len(arms) - 0.5, -0.5)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
