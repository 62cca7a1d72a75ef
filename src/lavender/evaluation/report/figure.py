"""The figure: panels of a report as one PNG."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavender.drawing import faded, heat_layer, peak_of, reduced, veil
from lavender.errors import DataError
from lavender.evaluation.report.page import TRUE_MASK, Panel, WordRow, sources_of

_CELL_HEIGHT, _GAP, _MARGIN, _LINE = 1.18, 0.1, 0.2, 0.175  # inches
_FIRST_COLUMN, _WORD_COLUMN = 2.4, 0.95  # inches: the picture and what is said of it; the word


def draw_figure(panels: list[Panel], path: Path) -> None:
    """Draw the panels as one PNG on white: a row a word, with the picture, its true mask and each source's map.

    Raises:
        DataError: there is no panel.
    """
    if not panels:
        raise DataError("no panel", "at least one", "choose pictures to draw")
    from matplotlib.figure import Figure

    columns = sources_of(panels)
    shapes = [min(2.0, panel.image.width / panel.image.height) for panel in panels]
    layout = _Layout(cell_width=_CELL_HEIGHT * max(0.75, *shapes), num_columns=len(columns))
    said = [_lines_said(panel) for panel in panels]
    heights = [layout.height_of(len(panel.rows), len(lines)) for panel, lines in zip(panels, said, strict=True)]
    figure = Figure(figsize=(layout.width, sum(heights) + 0.3), dpi=120, facecolor="white")
    top = sum(heights) + 0.3
    for left, title in zip(layout.lefts, columns, strict=True):
        _write(figure, left + layout.cell_width / 2, top - 0.15, title, ha="center", weight="bold")
    top -= 0.3
    for panel, lines, height in zip(panels, said, heights, strict=True):
        _draw_block(figure, layout, panel, columns, lines, top)
        top -= height
    figure.savefig(path)


@dataclass(frozen=True)
class _Layout:
    """Where things stand in the figure, in inches."""

    cell_width: float
    num_columns: int

    @property
    def lefts(self) -> list[float]:
        """The left edge of each column of maps."""
        first = _MARGIN + _FIRST_COLUMN + _WORD_COLUMN + _GAP
        return [first + (self.cell_width + _GAP) * index for index in range(self.num_columns)]

    @property
    def width(self) -> float:
        return _MARGIN + _FIRST_COLUMN + _WORD_COLUMN + (self.cell_width + _GAP) * self.num_columns + _MARGIN

    def height_of(self, num_rows: int, num_lines: int) -> float:
        """A panel's height: its rows of maps, or its picture with title and lines where these are taller."""
        return max((_CELL_HEIGHT + _GAP) * num_rows, _LINE * (num_lines + 2) + _CELL_HEIGHT) + 2 * _GAP


def _lines_said(panel: Panel) -> list[tuple[str, str]]:
    """What stands under a panel's picture: (line, colour) pairs."""
    truth = {"truth": panel.truth} if panel.truth else {}
    lines: list[tuple[str, str]] = []
    for arm, answer in (truth | panel.answers).items():
        lines += [(arm, "#6b6676"), *((line, "black") for line in textwrap.wrap(answer or "–", 40))]
    return lines + [(line, "#6b6676") for line in textwrap.wrap(panel.note, 40)]


def _draw_block(
    figure: Any, layout: _Layout, panel: Panel, columns: list[str], lines: list[tuple[str, str]], top: float
) -> None:
    picture = _axes(figure, _MARGIN, top - _LINE - 0.06 - _CELL_HEIGHT, _FIRST_COLUMN)
    picture.set_anchor("W")
    picture.imshow(reduced(panel.image), interpolation="nearest")
    _write(figure, _MARGIN, top - _LINE / 2, textwrap.shorten(panel.title, 42), weight="bold", color="#5b3f8c")
    for index, (text, colour) in enumerate(lines):
        _write(figure, _MARGIN, top - _CELL_HEIGHT - _LINE * (index + 1.5) - 0.12, text, size=8, color=colour)
    for index, row in enumerate(panel.rows):
        bottom = top - (_CELL_HEIGHT + _GAP) * index - _CELL_HEIGHT
        words = textwrap.fill(row.word, 14)
        _write(figure, layout.lefts[0] - _GAP, bottom + _CELL_HEIGHT / 2, words, ha="right", weight="bold")
        for left, column in zip(layout.lefts, columns, strict=True):
            _draw_cell(_axes(figure, left, bottom, layout.cell_width), panel, row, column)


def _draw_cell(axes: Any, panel: Panel, row: WordRow, column: str) -> None:
    height, width = panel.size
    picture, heat = reduced(panel.image), row.maps.get(column)
    if column == TRUE_MASK and row.mask is not None:
        layers, peak = [picture, veil(row.mask)], None
    elif heat is not None:
        layers, peak = [faded(picture), heat_layer(heat, panel.size)], peak_of(heat, panel.size)
    else:
        axes.text(0.5, 0.5, "no map", ha="center", va="center", size=8.5, color="#6b6676")
        return
    for layer in layers:
        axes.imshow(layer, interpolation="nearest", extent=(0, width, height, 0))
    if peak is not None:
        for colour, thickness in (("black", 2.4), ("white", 1.2)):
            axes.plot(peak[1] + 0.5, peak[0] + 0.5, "o", ms=6, mfc="none", mec=colour, mew=thickness)


def _axes(figure: Any, left: float, bottom: float, width: float) -> Any:
    """Axes without a frame, as tall as a cell, at a place in inches."""
    all_width, all_height = figure.get_size_inches()
    axes = figure.add_axes((left / all_width, bottom / all_height, width / all_width, _CELL_HEIGHT / all_height))
    axes.set_axis_off()
    return axes


def _write(figure: Any, left: float, bottom: float, text: str, **style: Any) -> None:
    """Text at a place in inches. `parse_math` is off: a dollar sign in a caption is a dollar sign."""
    width, height = figure.get_size_inches()
    figure.text(left / width, bottom / height, text, **{"size": 9, "va": "center", "parse_math": False} | style)
