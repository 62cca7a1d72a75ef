"""The figures of a report as a PDF for papers: intervals of differences, curves, and pictures with maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lavender.evaluation.report.figure import drawable, figure_of
from lavender.evaluation.report.page import Curve, styles_of
from lavender.evaluation.report.panels import Panel
from lavender.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#6a3fb0", "#c2570c", "#0f766e", "#a11d5b", "#1d5fb4", "#6b6a1a")
_STYLES = ("-", "--", ":", "-.")


class IntervalRow(NamedTuple):
    """A difference as a point with its interval.

    Attributes:
        score: what is compared, the title of its axes.
        pair: the models, "aligned − plain".
        difference, low, high: low and high are NaN where there is no interval.
    """

    score: str
    pair: str
    difference: float
    low: float
    high: float


def write_figures(
    path: Path, title: str, intervals: Sequence[IntervalRow], curves: Sequence[Curve], panels: Sequence[Panel]
) -> None:
    """Write a PDF: a page of intervals, a page of curves, and a page per picture. It depends on the content alone."""
    from matplotlib.backends.backend_pdf import PdfPages

    buffer = BytesIO()
    with PdfPages(buffer, metadata={"Title": title, "CreationDate": None}) as pdf:
        for figure in (
            *([interval_figure(intervals)] if intervals else []),
            *([curve_figure(curves)] if curves else []),
        ):
            pdf.savefig(figure)
        for panel in panels:
            pdf.savefig(figure_of([panel]))
    write_whole(path, buffer.getvalue())


def interval_figure(rows: Sequence[IntervalRow]) -> Figure:
    """A panel per score, a row per pair of models: the difference with its interval, and a line at 0."""
    from matplotlib.figure import Figure

    scores, pairs = ([*dict.fromkeys(row[index] for row in rows)] for index in (0, 1))
    figure = Figure(figsize=(2.6 * len(scores) + 1.8, 0.4 * len(pairs) + 1.2), facecolor="white", layout="constrained")
    for axes, score in zip(figure.subplots(1, len(scores), sharey=True, squeeze=False)[0], scores, strict=True):
        axes.axvline(0, color="#999999", linewidth=0.8)
        for row in rows:
            if row.score == score:
                place = pairs.index(row.pair)
                if not math.isnan(row.low):
                    axes.plot([row.low, row.high], [place, place], "-", color=_COLOURS[0], linewidth=2)
                axes.plot(row.difference, place, "o", color=_COLOURS[0])
        axes.set_title(score, fontsize=9, parse_math=False)
        axes.set_yticks(range(len(pairs)), [drawable(pair) for pair in pairs], fontsize=8, parse_math=False)
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=7)
        axes.locator_params(axis="x", nbins=3)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def curve_figure(curves: Sequence[Curve]) -> Figure:
    """The curves of training, two in a row."""
    from matplotlib.figure import Figure

    rows, styles = -(-len(curves) // 2), styles_of(curves)
    figure = Figure(figsize=(9.0, 2.8 * rows), facecolor="white", layout="constrained")
    places = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, curve in zip(places, curves, strict=False):
        for name, points in curve.series.items():
            x, y = zip(*points, strict=True) if points else ((), ())
            number = styles[name]
            style = _STYLES[number % len(_STYLES)]
            axes.plot(x, y, style, color=_COLOURS[number % len(_COLOURS)], label=_plain(name), linewidth=1.5)
        axes.set_title(curve.title, fontsize=9, parse_math=False)
        axes.set(xlabel=curve.x_label, ylabel=curve.y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in places[len(curves) :]:
        axes.set_visible(False)
    return figure


def _plain(name: str) -> str:
    """A label in which a dollar sign is no formula, and an underscore at the beginning does not hide it."""
    return f" {drawable(name)}".replace("$", r"\$")
