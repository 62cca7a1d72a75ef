"""The tables and curves of a report about a run: differences with intervals, scores, settings, training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavender.errors import DataError
from lavender.evaluation.eval_files import EvaluatedSample
from lavender.evaluation.intervals import LEVEL, NUM_RESAMPLES, SEED, Interval, paired_difference
from lavender.evaluation.report.page import Cell, Curve, Table, show_number
from lavender.evaluation.report.pdf import IntervalRow
from lavender.evaluation.runs import shown_setting
from lavender.evaluation.score_help import SCORES, explained, judged
from lavender.training.run_folder import METRICS

FEW_PICTURES = 20
"""Below it an interval covers clearly less than `LEVEL`: 90 % with 10 pictures, 85 % with 5 (measured, normal)."""
MAX_POINTS = 400
"""Points of a curve. Of longer logs, each point is the mean over neighbouring steps."""
CURVES = {
    "vlm_loss": ("L_VLM in training", "nats per token"),
    "attention_loss": ("L_att in training, before λ", "L_att"),
    "attention_mass": ("Attention on the teacher’s map, in training", "share"),
    "student_entropy": ("Entropy of the student’s attention, in training", "nats"),
    "eval_vlm_loss": ("L_VLM on the evaluation data", "nats per token"),
    "eval_attention_loss": ("L_att on the evaluation data", "L_att"),
    "eval_attention_mass": ("Attention on the teacher’s map, evaluation data", "share"),
    "probe_attention_mass": ("Attention on the teacher’s map, probe", "share"),
    "probe_map_agreement": ("Agreement with the teacher’s maps, probe", "correlation"),
}
"""Metric of metrics.jsonl → title and unit of its curve."""


class Difference(NamedTuple):
    """A score of one model minus that of another."""

    first: str
    second: str
    score: str
    interval: Interval | None


def differences_of(samples: Sequence[EvaluatedSample], arms: Mapping[str, Any]) -> list[Difference]:
    """The run against every other model, then each other run against the base; of every score.

    Samples of one picture are drawn together.
    """
    names = list(arms)
    pairs = [(names[-1], other) for other in (*names[1:-1], names[0])] + [(one, names[0]) for one in names[1:-1]]
    pictures = [sample.picture for sample in samples]
    found = []
    for first, second in pairs:
        for score in samples[0].judged[first].tallies:
            sides = ([sample.judged[name].tallies[score] for sample in samples] for name in (first, second))
            found.append(Difference(first, second, score, paired_difference(*sides, pictures)))
    return found


def tables_of(
    scored: Mapping[str, Any],
    samples: Sequence[EvaluatedSample],
    differences: Sequence[Difference],
    differing: Mapping[str, Mapping[str, Any]],
) -> list[Table]:
    """Differences, scores, and the settings in which the models differ."""
    of = f"{scored['samples']} samples of {scored['data']}"
    names = list(next(iter(scored["arms"].values())))
    shown = [name for name in names if any(one.score == name and one.interval for one in differences)]
    pairs = list(dict.fromkeys((one.first, one.second) for one in differences))
    pictures = len({sample.picture for sample in samples})
    by_place = {(one.score, one.first, one.second): one for one in differences}
    rows: list[list[Cell]] = [
        [_with_arrow(name), *(_difference_text(by_place[name, *pair], pictures) for pair in pairs)] for name in shown
    ]
    columns = ["score", *(f"{first} − {second}" for first, second in pairs)]
    note = (
        f"In brackets: {LEVEL:.0%} interval of the paired bootstrap; the {pictures} pictures were drawn again "
        f"{NUM_RESAMPLES:,} times (seed {SEED}), with all of their samples. “Better” and “worse”: the interval does "
        "not contain 0. It covers the choice of the samples. It does not cover the seeds of training: train several."
    )
    counted = [one.interval.num_units for one in differences if one.interval]
    if min(counted, default=pictures) < FEW_PICTURES:
        note += f" With fewer than {FEW_PICTURES} pictures an interval is too narrow: score more."
    tables = [Table(f"Differences, on {of}", columns, rows, note)]
    scores: list[list[Cell]] = [[arm, *(values[name] for name in names)] for arm, values in scored["arms"].items()]
    if teacher := scored.get("teacher"):
        scores.append(["the teacher’s maps", *(teacher.get(name) for name in names)])
    columns = ["model", *map(_with_arrow, names)]
    tables.append(Table(f"Scores, on {of}", columns, scores, "\n".join(explained(names))))
    if differing:
        models = list(next(iter(differing.values())))
        settings: list[list[Cell]] = [[key, *map(shown_setting, values.values())] for key, values in differing.items()]
        tables.append(Table("Settings in which the runs differ", ["setting", *models], settings))
    return tables


def interval_rows(differences: Sequence[Difference]) -> list[IntervalRow]:
    """The differences as the rows of a figure, without those of scores that were not counted."""
    return [
        IntervalRow(
            _with_arrow(one.score),
            f"{one.first} − {one.second}",
            one.interval.difference,
            one.interval.low,
            one.interval.high,
        )
        for one in differences
        if one.interval is not None
    ]


def _with_arrow(name: str) -> str:
    arrow = {"lower": " ↓", "higher": " ↑"}.get(SCORES[name].better if name in SCORES else "", "")
    return f"{name}{arrow}"


def _difference_text(one: Difference, pictures: int) -> str:
    """ "+0.120 (+0.010 to +0.230), better"; the last word only if the interval does not contain 0.

    If the score is counted on some of the pictures alone, their number follows.
    """
    if one.interval is None:
        return "–"
    if math.isnan(one.interval.low):
        counted = "one picture" if one.interval.num_units else "no picture counts for both"
        return f"{_signed(one.interval.difference)} ({counted}: no interval)"
    text = f"{_signed(one.interval.difference)} ({_signed(one.interval.low)} to {_signed(one.interval.high)})"
    text += f", on {one.interval.num_units} pictures" if one.interval.num_units < pictures else ""
    return f"{text}, {judged(one.score, one.interval.difference)}" if one.interval.excludes_zero else text


def _signed(value: float) -> str:
    text = show_number(abs(value))
    return text if value == 0 else f"{'+' if value > 0 else '−'}{text}"


def curves_of(arms: Mapping[str, str | Path]) -> tuple[list[Curve], list[str]]:
    """The curves of all runs that logged them, and a note for each model without any.

    Raises:
        DataError: a metrics.jsonl is damaged.
    """
    logs = {name: _log_of(Path(path)) for name, path in arms.items() if name != "base"}
    notes = [f"{name}: no curves, for there is no {METRICS}" for name, log in logs.items() if not log]
    curves, thinned = [], {}
    for key, (title, unit) in CURVES.items():
        series = {}
        for name, log in logs.items():
            points = [(float(line["step"]), float(line[key])) for line in log if key in line]
            if points:
                series[name] = _thinned(points)
                thinned |= {name: len(points)} if len(points) > MAX_POINTS else {}
        if series:
            curves.append(Curve(title, "step", unit, series))
    notes += [
        f"{name}: {number:,} logged steps; each point of its curves is the mean over {-(-number // MAX_POINTS)}"
        for name, number in thinned.items()
    ]
    return curves, notes


def _log_of(run: Path) -> list[dict[str, Any]]:
    path = run / METRICS
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        for line in lines:
            if not all(isinstance(line[key], int | float) for key in {"step", *CURVES} & line.keys()):
                raise ValueError("a metric that is no number")
            line["step"] = float(line["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} with a damaged line: {error}", "one JSON object per line", "delete the line, or train again"
        ) from error
    return lines


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points: the means over neighbours, without those that are not finite."""
    size = -(-len(points) // MAX_POINTS)
    if size == 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    finite = [[(x, y) for x, y in group if math.isfinite(y)] for group in groups]
    return [(sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)) for some in finite if some]
