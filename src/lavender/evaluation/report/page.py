"""A report as one self-contained HTML page: tables, curves, and panels of pictures with maps.

The page has no script and loads nothing from a network: its pictures are inside it, and a content security policy
forbids everything else. Every text is escaped, since it may come from a user's data set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from lavender.errors import DataError
from lavender.evaluation.inline_code import with_code
from lavender.evaluation.legend import legend
from lavender.evaluation.report.panels import Panel, WordRow, cell_of, sources_of
from lavender.evaluation.report.pixels import (
    bytes_for_pictures,
    layer_address,
    map_address,
    map_detail,
    picture_addresses,
)
from lavender.files import write_whole

_PIXELATED_BELOW = 200  # pixels; of pictures whose longest side is shorter, the single pixels are shown
_MANY = 400  # maps; on pages with more they are backgrounds, which browsers read faster, and decode only if seen

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """Numbers with a caption. The first cell of each row is its heading.

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
                    "fill missing values with None",
                )

    @property
    def numeric(self) -> list[bool]:
        """Per column, whether it is aligned to the right: not the first, and only numbers and None."""
        columns = [[row[index] for row in self.rows if row[index] is not None] for index in range(len(self.columns))]
        return [index > 0 and all(isinstance(cell, Real) for cell in column) for index, column in enumerate(columns)]


@dataclass(frozen=True)
class Curve:
    """Lines over a common axis: series name → points (x, y), in order of x. NaN and infinite points are left out."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True, eq=False)
class Report:
    """The content of a page.

    Attributes:
        title, lead: what the page begins with. The rest stands below it in this order.
        tables: numbers.
        notes: what the reader must know, such as what is missing.
        pictures_note, panels: pictures, and by which rule they were chosen.
        choose_words: whether a panel shows the maps of one word at a time, which the reader chooses in the text of
            the panel's `truth`. Otherwise, and on paper, all are shown.
        curves: numbers over steps.
        settings, commands: of the run, and what makes it all again.
    """

    title: str
    lead: str
    tables: list[Table]
    panels: list[Panel]
    notes: list[str]
    settings: dict[str, Any]
    curves: list[Curve] = field(default_factory=list)
    pictures_note: str = ""
    choose_words: bool = False
    commands: list[str] = field(default_factory=list)


def render_report(report: Report) -> str:
    """The page as HTML. It depends on the report alone."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"show": show_number, "code": with_code}
    template = environment.from_string(
        files("lavender.evaluation.report").joinpath("templates/report.html").read_text(encoding="utf-8")
    )
    sources = sources_of(report.panels)
    number = sum(len(panel.rows) for panel in report.panels) * len(sources)
    views = [_panel_view(panel, sources, map_detail(number)) for panel in report.panels]
    layers = [cell["layer"] for view in views for _, cells in view["rows"] for cell in cells if cell is not None]
    addresses = picture_addresses([panel.image for panel in report.panels], bytes_for_pictures(layers))
    return template.render(
        report=report,
        legend=legend(),
        sources=sources,
        panels=[view | {"picture": address} for view, address in zip(views, addresses, strict=True)],
        are_many=number > _MANY,
        most_words=max([len(view["rows"]) for view in views], default=0),
        curves=[_curve_view(curve, styles_of(report.curves)) for curve in report.curves],
        settings=_flat(report.settings),
    )


def write_report(report: Report, path: Path) -> None:
    """Write the page to `path`, in UTF-8."""
    write_whole(path, render_report(report))


def show_number(value: Cell) -> str:
    """A cell as text: three decimals, or three digits for numbers below 0.01; None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral) or not isinstance(value, Real):
        return str(value)
    number = float(value)
    return f"{number:.3f}" if number == 0 or abs(number) >= 0.01 else f"{number:.3g}"


def _panel_view(panel: Panel, sources: list[str], detail: tuple[int, int]) -> dict[str, Any]:
    return {
        "panel": panel,
        "pixelated": max(panel.size) < _PIXELATED_BELOW,
        "ratio": round(panel.image.width / panel.image.height, 4),
        "rows": [(row.word, [_cell_view(panel, row, source, detail) for source in sources]) for row in panel.rows],
        "text": _text_pieces(panel),
    }


def _text_pieces(panel: Panel) -> list[tuple[str, int | None]]:
    """The panel's `truth` in pieces, each with the number of the row that shows its maps, or None.

    Words without a span in the text, and those that overlap an earlier word, follow after it.
    """
    pieces: list[tuple[str, int | None]] = []
    done, rest = 0, []
    placed = [(row.span, number) for number, row in enumerate(panel.rows) if row.span is not None]
    for (start, end), number in sorted(placed):
        if start < done:
            rest.append(number)
            continue
        pieces += [(panel.truth[done:start], None), (panel.truth[start:end], number)]
        done = end
    pieces.append((panel.truth[done:], None))
    rest += [number for number, row in enumerate(panel.rows) if row.span is None]
    for number in rest:
        pieces += [(" ", None), (panel.rows[number].word, number)]
    return [(text, number) for text, number in pieces if text]


def _cell_view(panel: Panel, row: WordRow, source: str, detail: tuple[int, int]) -> dict[str, Any] | None:
    """A cell's layer as a PNG, its alternative text, its maximum and its share on the thing; None for no map."""
    cell = cell_of(panel, row, source)
    if cell is None:
        return None
    view: dict[str, Any] = {"peak": None, "verdict": "", "share": "", "is_mask": cell.is_mask}
    if cell.heat is None:
        assert cell.mask is not None
        alt = f"True mask of “{row.word}”, {100 * cell.mask.mean():.0f} % of the picture"
        return view | {"layer": layer_address(cell.layer), "alt": alt}
    view["layer"] = map_address(cell.heat, panel.size, detail)
    alt = f"Map of “{row.word}” by {source}"
    if cell.peak is None:
        return view | {"verdict": "all zero", "alt": f"{alt}: zero everywhere"}
    top, left = (100 * (pixel + 0.5) / length for pixel, length in zip(cell.peak, panel.size, strict=True))
    view["peak"] = (round(left, 2), round(top, 2))
    alt = f"{alt}: highest {left:.0f} % from left, {top:.0f} % from top"
    if row.mask is not None:
        is_hit = row.mask[cell.peak]
        view["verdict"] = "hit" if is_hit else "miss"
        alt += f", {'inside' if is_hit else 'outside'} the true mask"
    if cell.share is not None:
        view["share"] = f"{cell.share:.0%}".replace("%", " %")
        alt += f", which holds {view['share']} of the map"
    return view | {"alt": alt}


def styles_of(curves: Sequence[Curve]) -> dict[str, int]:
    """Series → the number of its style, the same in all curves. If no curve has two series, all have the first."""
    names = dict.fromkeys(name for curve in curves for name in curve.series)
    are_compared = any(len(curve.series) > 1 for curve in curves)
    return {name: number if are_compared else 0 for number, name in enumerate(names)}


def _curve_view(curve: Curve, styles: Mapping[str, int]) -> dict[str, Any]:
    """Lines and ticks in the coordinates of a 480 × 264 drawing."""
    series = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in curve.series.items()
    }
    all_points = [point for points in series.values() for point in points] or [(0.0, 0.0)]
    x_ticks, y_ticks = (_ticks([point[axis] for point in all_points]) for axis in (0, 1))

    def at_x(x: float) -> float:
        return round(48 + 416 * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]), 1)

    def at_y(y: float) -> float:
        return round(212 - 182 * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)

    ends = {name: (points[0][1], points[-1][1]) for name, points in series.items() if points}
    described = [f"{name}: from {show_number(first)} to {show_number(last)}" for name, (first, last) in ends.items()]
    return {
        "curve": curve,
        "x_ticks": [(at_x(tick), f"{tick:g}") for tick in x_ticks],
        "y_ticks": [(at_y(tick), f"{tick:g}") for tick in y_ticks],
        "series": [(name, styles[name], [(at_x(x), at_y(y)) for x, y in points]) for name, points in series.items()],
        "description": f"{curve.y_label} against {curve.x_label}. {'; '.join(described) or 'No points'}.",
    }


def _ticks(values: Sequence[float]) -> list[float]:
    """At most eight round numbers that enclose the values."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(f"{tick:.10g}") for tick in ticks]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in settings.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
    return pairs
