"""What a run changed, to look at: one self-contained HTML page, and one figure of the same pictures.

The page has no script and asks nothing of a network: pictures are inside it, and a content security
policy forbids everything else. Every text in it is escaped; it may come from a user's data set.

Frame: maps and masks cover the whole picture, row 0 at the top. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import base64
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from io import BytesIO
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lavender.drawing import faded, heat_layer, peak_of, reduced, veil
from lavender.errors import DataError
from lavender.files import write_whole

_PIXELATED_BELOW = 200  # pictures with a shorter longest side are shown with their pixels
_TRUE_MASK = "true mask"
_CELL_HEIGHT, _GAP, _MARGIN, _LINE = 1.18, 0.1, 0.2, 0.175  # of the figure, in inches
_FIRST_COLUMN, _WORD_COLUMN = 2.4, 0.95  # of the figure, in inches: the picture and what is said of it; the word

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """Numbers with a caption. The first column heads its row.

    Raises:
        DataError: a row has more or fewer cells than there are columns.
    """

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise DataError(
                    f"{len(row)} cells in a row of table {self.caption!r}",
                    f"{len(self.columns)}",
                    "use None for no value",
                )

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether it holds only numbers and None and is not the first: it is aligned to the right."""
        columns = [[row[index] for row in self.rows if row[index] is not None] for index in range(len(self.columns))]
        return [index > 0 and all(isinstance(cell, Real) for cell in column) for index, column in enumerate(columns)]


@dataclass(frozen=True, eq=False)
class WordRow:
    """A word's maps: source name → non-negative heat (rows, cols) of any grid and scale, or None for no map.

    `mask` is the word's true mask, bool (height, width) of the picture, where it is known.
    """

    word: str
    maps: dict[str, Tensor | None]
    mask: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture with its words' maps, and what each arm says about it (arm → answer).

    Raises:
        DataError: a true mask has another size than the picture.
    """

    image: Image.Image
    title: str
    rows: list[WordRow]
    answers: dict[str, str] = field(default_factory=dict)
    truth: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if row.mask is not None and row.mask.shape != self.size:
                raise DataError(
                    f"a mask {row.mask.shape} of {row.word!r}", f"the picture's {self.size}", "resize the mask"
                )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image.height, self.image.width


@dataclass(frozen=True)
class Curve:
    """Lines over a common axis: series name → points (x, y), in order of x. Points that are not finite are left out."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True, eq=False)
class Report:
    """Everything on the page, in the order it is read: lead, tables, curves, panels, notes, settings."""

    title: str
    lead: str
    tables: list[Table]
    panels: list[Panel]
    notes: list[str]
    settings: dict[str, Any]
    curves: list[Curve] = field(default_factory=list)


def render_report(report: Report) -> str:
    """The page as HTML. The same report gives the same page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["show"] = show_number
    template = environment.from_string(files("lavender").joinpath("templates/report.html").read_text(encoding="utf-8"))
    sources = _sources(report.panels)
    return template.render(
        report=report,
        sources=sources,
        panels=[_panel_view(panel, sources) for panel in report.panels],
        curves=[_curve_view(curve) for curve in report.curves],
        settings=_flat(report.settings),
    )


def write_report(report: Report, path: Path) -> None:
    """Write the page to `path`, in UTF-8."""
    write_whole(path, render_report(report))


def draw_figure(panels: list[Panel], path: Path) -> None:
    """Draw the panels as one PNG on white: a row a word, with the picture, its true mask and each source's map.

    Raises:
        DataError: there is no panel.
    """
    if not panels:
        raise DataError("no panel", "at least one", "choose pictures to draw")
    from matplotlib.figure import Figure

    columns = _sources(panels)
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


def show_number(value: Cell) -> str:
    """A cell as text: three decimals, small numbers with three digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral) or not isinstance(value, Real):
        return str(value)
    number = float(value)
    return f"{number:.3f}" if number == 0 or abs(number) >= 0.01 else f"{number:.3g}"


def _sources(panels: Sequence[Panel]) -> list[str]:
    """The columns of maps, the same for every panel: the true mask if one is known, then sources as first met."""
    rows = [row for panel in panels for row in panel.rows]
    masked = [_TRUE_MASK] if any(row.mask is not None for row in rows) else []
    return masked + list(dict.fromkeys(source for row in rows for source in row.maps))


def _panel_view(panel: Panel, sources: list[str]) -> dict[str, Any]:
    return {
        "panel": panel,
        "picture": _png(reduced(panel.image)),
        "pixelated": max(panel.size) < _PIXELATED_BELOW,
        "ratio": round(panel.image.width / panel.image.height, 4),
        "rows": [(row.word, [_cell_view(panel, row, source) for source in sources]) for row in panel.rows],
    }


def _cell_view(panel: Panel, row: WordRow, source: str) -> dict[str, Any] | None:
    """The layer that lies over the picture, its description, and where the map's maximum is; None for no map."""
    view: dict[str, Any] = {"peak": None, "verdict": "", "heated": source != _TRUE_MASK}
    if source == _TRUE_MASK:
        if row.mask is None:
            return None
        alt = f"True mask of “{row.word}”, {100 * row.mask.mean():.0f} % of the picture"
        return view | {"layer": _png(Image.fromarray(veil(row.mask))), "alt": alt}
    heat = row.maps.get(source)
    if heat is None:
        return None
    alt, peak = f"Map of “{row.word}” by {source}", peak_of(heat, panel.size)
    if peak is None:
        view["verdict"], alt = "all zero", f"{alt}: zero everywhere"
    else:
        top, left = (100 * (place + 0.5) / side for place, side in zip(peak, panel.size, strict=True))
        view["peak"] = (round(left, 2), round(top, 2))
        alt = f"{alt}: highest {left:.0f} % from left, {top:.0f} % from top"
        if row.mask is not None:
            view["verdict"] = "hit" if row.mask[peak] else "miss"
            alt += f", {'inside' if row.mask[peak] else 'outside'} the true mask"
    return view | {"layer": _png(Image.fromarray(heat_layer(heat, panel.size))), "alt": alt}


def _png(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _curve_view(curve: Curve) -> dict[str, Any]:
    """Lines and ticks in the coordinates of a 480 × 264 drawing."""
    series = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in curve.series.items()
    }
    every = [point for points in series.values() for point in points] or [(0.0, 0.0)]
    x_ticks, y_ticks = (_ticks([point[axis] for point in every]) for axis in (0, 1))

    def at_x(x: float) -> float:
        return round(48 + 416 * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]), 1)

    def at_y(y: float) -> float:
        return round(212 - 182 * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)

    described = [f"{name}: from {show_number(p[0][1])} to {show_number(p[-1][1])}" for name, p in series.items() if p]
    return {
        "curve": curve,
        "x_ticks": [(at_x(tick), f"{tick:g}") for tick in x_ticks],
        "y_ticks": [(at_y(tick), f"{tick:g}") for tick in y_ticks],
        "series": [(name, [(at_x(x), at_y(y)) for x, y in points]) for name, points in series.items()],
        "description": f"{curve.y_label} against {curve.x_label}. {'; '.join(described) or 'No points'}.",
    }


def _ticks(values: Sequence[float]) -> list[float]:
    """Four to eight round numbers that enclose the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    magnitude = 10 ** math.floor(math.log10((high - low) / 4))
    step = magnitude * next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (factor * magnitude) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * index:.10g}") for index in range(first, last + 1)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in settings.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
    return pairs


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
    if column == _TRUE_MASK and row.mask is not None:
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
