"""What a run changed, to look at: one self-contained HTML page, and one figure of the same pictures.

The page has no script and asks nothing of a network: pictures are inside it, and a content security
policy forbids everything else. Every text in it is escaped; it may come from a user's data set.

Frame: maps and masks cover the whole picture, row 0 at the top. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import base64
import math
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

from lavender.drawing import heat_layer, peak_of, reduced, veil
from lavender.errors import DataError
from lavender.files import write_whole

_PIXELATED_BELOW = 200  # pictures with a shorter longest side are shown with their pixels
TRUE_MASK = "true mask"

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
    template = environment.from_string(
        files("lavender.evaluation.report").joinpath("templates/report.html").read_text(encoding="utf-8")
    )
    sources = sources_of(report.panels)
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


def sources_of(panels: Sequence[Panel]) -> list[str]:
    """The columns of maps, the same for every panel: the true mask if one is known, then sources as first met."""
    rows = [row for panel in panels for row in panel.rows]
    masked = [TRUE_MASK] if any(row.mask is not None for row in rows) else []
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
    view: dict[str, Any] = {"peak": None, "verdict": "", "heated": source != TRUE_MASK}
    if source == TRUE_MASK:
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
