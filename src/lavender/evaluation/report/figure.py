"""Panels as one PNG: a row per word, a column per source of maps."""

from __future__ import annotations

import textwrap
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavender.drawing import desaturated, downscaled
from lavender.errors import DataError
from lavender.evaluation.report.panels import Panel, WordRow, cell_of, sources_of
from lavender.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL_HEIGHT, _LINE, _GAP, _MARGIN = 1.2, 0.175, 0.25, 0.15  # inches: a map, a line of text, between panels, around
_FIRST_COLUMN, _WORDS = 2.5, 1.0  # inches: the picture with its answers; the words beside the maps
_GREY = "#6b6676"
_TEXT: dict[str, Any] = {"size": 9, "parse_math": False}  # a dollar sign in a caption is no formula


def draw_figure(panels: list[Panel], path: Path) -> None:
    """Draw the panels as one PNG, whatever the name of the file ends in. See `figure_of`.

    Raises:
        DataError: there is no panel.
    """
    buffer = BytesIO()
    figure_of(panels).savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())


def figure_of(panels: list[Panel]) -> Figure:
    """The panels on white, one below the other: each picture with its answers, and its words' masks and maps.

    Under each map stands the share of it that lies in the true mask, where the mask is known. Characters that the font
    lacks are question marks.

    Args:
        panels: at least one.

    Raises:
        DataError: there is no panel.
    """
    if not panels:
        raise DataError("no panel", "at least one panel", "choose pictures to draw")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = sources_of(panels)
    shapes = [min(2.0, panel.image.width / panel.image.height) for panel in panels]
    widths = [_FIRST_COLUMN] + [_CELL_HEIGHT * max(0.75, *shapes)] * len(columns)
    answers = [_answer_lines(panel) for panel in panels]
    heights = [_row_heights(len(panel.rows), len(lines)) for panel, lines in zip(panels, answers, strict=True)]
    size = sum(widths) + _WORDS + 2 * _MARGIN, sum(map(sum, heights)) + _LINE * len(panels) + 2 * _MARGIN
    inside = (_MARGIN / size[0], _MARGIN / size[1], 1 - 2 * _MARGIN / size[0], 1 - 2 * _MARGIN / size[1])
    figure = Figure(figsize=size, dpi=120, facecolor="white", layout=ConstrainedLayoutEngine(rect=inside))
    grid = figure.add_gridspec(
        sum(map(len, heights)), len(widths), width_ratios=widths, height_ratios=[h for rows in heights for h in rows]
    )
    top = 0
    for panel, lines, rows in zip(panels, answers, heights, strict=True):
        _draw_picture(figure.add_subplot(grid[top, 0]), panel)
        _draw_lines(figure.add_subplot(grid[top + 1 : top + len(rows), 0]), lines)
        for index, row in enumerate(panel.rows):
            axes = [figure.add_subplot(grid[top + index, 1 + column]) for column in range(len(columns))]
            _draw_row(axes, panel, row, columns, with_titles=index == 0)
        top += len(rows)
    return figure


def _row_heights(num_words: int, num_lines: int) -> list[float]:
    """Heights of a panel's rows: one per word, and one for the answers that are longer than the rows of words."""
    rows = [_CELL_HEIGHT] * max(1, num_words)
    return [*rows, max(0.0, _LINE * num_lines - sum(rows[1:])) + _GAP]


def _answer_lines(panel: Panel) -> list[tuple[str, str]]:
    """The lines under a panel's picture, each with its colour."""
    truth = {"truth": panel.truth} if panel.truth else {}
    lines: list[tuple[str, str]] = []
    for name, answer in (truth | panel.answers).items():
        lines += [(drawable(name), _GREY), *((line, "black") for line in textwrap.wrap(drawable(answer) or "–", 40))]
    return lines + [(line, _GREY) for line in textwrap.wrap(drawable(panel.note), 40)]


def drawable(text: str) -> str:
    """A text in which characters that the font of figures lacks, such as Chinese ones, are question marks."""
    known = _characters()
    return "".join(sign if sign in "\t\n\r " or ord(sign) in known else "?" for sign in text)


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    """The code points that Matplotlib's font has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _draw_picture(axes: Axes, panel: Panel) -> None:
    _hide_frame(axes)
    axes.set_anchor("NW")
    axes.imshow(downscaled(panel.image), interpolation="nearest")
    title = textwrap.shorten(drawable(panel.title), 42, placeholder="…")
    axes.set_title(title, loc="left", weight="bold", color="#5b3f8c", **_TEXT)


def _draw_lines(axes: Axes, lines: list[tuple[str, str]]) -> None:
    _hide_frame(axes)
    for index, (line, colour) in enumerate(lines):
        text = axes.annotate(
            line,
            xy=(0, 1),
            xycoords="axes fraction",
            xytext=(0, -72 * _LINE * index),  # points
            textcoords="offset points",
            va="top",
            color=colour,
            size=8,
            parse_math=False,
        )
        text.set_in_layout(False)  # a long line must not shrink the maps


def _draw_row(axes: list[Axes], panel: Panel, row: WordRow, columns: list[str], with_titles: bool) -> None:
    for cell_axes, column in zip(axes, columns, strict=True):
        _hide_frame(cell_axes)
        if with_titles:
            cell_axes.set_title(textwrap.fill(drawable(column), 12), weight="bold", **_TEXT)
        _draw_cell(cell_axes, panel, row, column)
    label = "\n".join(textwrap.fill(line, 14) for line in drawable(row.word).split("\n"))
    axes[0].set_ylabel(label, rotation=0, ha="right", va="center", weight="bold", **_TEXT)


def _draw_cell(axes: Axes, panel: Panel, row: WordRow, column: str) -> None:
    cell = cell_of(panel, row, column)
    if cell is None:
        axes.text(0.5, 0.5, "no map", ha="center", va="center", color=_GREY, **_TEXT)
        return
    height, width = panel.size
    picture = downscaled(panel.image)
    for layer in (picture if cell.is_mask else desaturated(picture), cell.layer):
        axes.imshow(layer, interpolation="nearest", extent=(0, width, height, 0))
    if cell.share is not None:
        axes.set_xlabel(f"{100 * cell.share:.0f} %", labelpad=2, color=_GREY, size=8)
    if cell.peak is not None:
        for colour, thickness in (("black", 2.4), ("white", 1.2)):
            axes.plot(cell.peak[1] + 0.5, cell.peak[0] + 0.5, "o", ms=6, mfc="none", mec=colour, mew=thickness)


def _hide_frame(axes: Axes) -> None:
    """Hide ticks and frame. `set_axis_off` would hide the label too."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.patch.set_visible(False)
