"""A study's results for people: Markdown with a table and the verdict, and the plot's drawing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lavender.world.studies.study import METRICS, Study

QUICK = "**Quick version: fewer samples, steps and seeds, on development scenes. Not a result.**"


def show(values: Sequence[float]) -> str:
    """Mean and range over seeds: "0.712 (0.690–0.731)"; one number where seeds change nothing."""
    mean = f"{fmean(values):.3f}"
    return mean if len({*values}) == 1 else f"{mean} ({min(values):.3f}–{max(values):.3f})"


def table(arms: dict[str, dict[str, Any]], metrics: Sequence[str]) -> str:
    """A Markdown table, an arm a row."""
    lines = [f"| | {' | '.join(METRICS[metric] for metric in metrics)} |", "| --- " * (len(metrics) + 1) + "|"]
    for arm, scores in arms.items():
        lines.append(f"| {arm} | {' | '.join(show(scores[one]) if one in scores else '' for one in metrics)} |")
    return "\n".join(lines)


def page(study: Study, results: dict[str, Any]) -> str:
    """The study as Markdown; the plot is `plot.png` beside it."""
    seeds = results["seeds"]
    settings = results["settings"]
    parts = [
        f"# {study.title}",
        *([QUICK] if results["quick"] else []),
        study.question,
        f"**The paper:** {study.paper}",
        f"Command: `{results['command']}`. Seeds {', '.join(map(str, seeds))}; mean and range over seeds. "
        f"{settings['scoring']['count']} {settings['scoring']['split']} scenes a score.",
        table(results["arms"], study.metrics),
        "Pointing of maps that have seen nothing: uniform {uniform_pointing:.3f}, the picture's centre "
        "{centre_pointing:.3f}.".format(**results["controls"]),
        "![plot](plot.png)",
        "## Verdict",
        "\n".join(f"- {line}" for line in results["verdict"]),
        "Differences are paired by seed: mean, least, greatest. “Above” and “below” mean that the ranges over seeds "
        "do not overlap.",
    ]
    return "\n\n".join(parts) + "\n"


def draw_bars(results: dict[str, Any], metrics: Sequence[str], path: Path) -> None:
    """One panel a metric, one row an arm: the mean as a bar, each seed as a dot."""
    from matplotlib.figure import Figure

    arms = results["arms"]
    figure = Figure(figsize=(3.0 * len(metrics) + 2.0, 0.32 * len(arms) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        for row, scores in enumerate(arms.values()):
            panel.barh(row, fmean(scores[metric]), color="#c9b8e8")
            panel.plot(scores[metric], [row] * len(scores[metric]), ".", color="#4b2e83")
        panel.set_title(METRICS[metric], fontsize=9)
        panel.set_yticks(range(len(arms)), list(arms), fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=150)
