"""What `lavender check` says before training, beside what happened: the hit rate of its verdicts."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavender.evaluation.check import check_model
from lavender.evaluation.promise import hits
from lavender.files import write_whole
from lavender.world.studies.cells import Cell, base_path, data_path, prepare, prepare_base
from lavender.world.studies.study import Promised, Scores, compare

LIMIT = 128
"""Samples per check."""
PAID = ("above", "higher on average")
"""Outcomes of a comparison with plain fine-tuning that count as a gain."""


def promises(
    folder: Path, cells: Mapping[str, Sequence[Cell]], scores: Scores, promised: Sequence[Promised]
) -> dict[str, Any]:
    """Check the base of each arm on the data and maps of its first seed, and compare with the outcome over all seeds.

    Args:
        folder: the folder of all studies. A check is made once and kept in its folder `checks`.
        cells: arm → its cells.
        scores: those of all arms.
        promised: the aligned arms, with the plain arm and the metric that decide whether alignment paid.

    Returns:
        `arms`: arm → verdict, reasons and outcome; and the numbers of `lavender.evaluation.promise.hits`.
    """
    arms: dict[str, dict[str, Any]] = {}
    for arm, plain, metric in promised:
        found, outcome = _checked(folder, cells[arm][0]), compare(scores, metric, arm, plain).outcome
        arms[arm] = {"verdict": found["verdict"], "reasons": found["reasons"], "metric": metric, "outcome": outcome}
    return {"arms": arms} | hits((arm["verdict"], arm["outcome"] in PAID) for arm in arms.values())


def _checked(folder: Path, cell: Cell) -> dict[str, Any]:
    """The result of `check_model` on the cell's base, data and maps. They may be missing where results were kept."""
    prepare_base(folder, cell.arm)
    base, data, target = base_path(folder, cell.arm), data_path(folder, cell), cell.arm.target or "teacher"
    weights = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    key = hashlib.sha256(json.dumps([weights, data.name, target, LIMIT]).encode()).hexdigest()[:16]
    path = folder / "checks" / f"{key}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".log").open("w") as log, contextlib.redirect_stderr(log):
            prepare(folder, cell)
            result = check_model(base, data / "pictures", data / target, LIMIT)
        write_whole(path, json.dumps(result, indent=1))
    return json.loads(path.read_text())


def table_of_promises(found: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """A Markdown table of the arms, and a line with the hit rate.

    Args:
        found: from `promises`.
        labels: metric → its label.
    """
    lines = ["| arm | `lavender check` before training | what happened |", "| --- | --- | --- |"]
    for arm, entry in found["arms"].items():
        lines.append(f"| {arm} | {entry['verdict']} | {labels[entry['metric']]}: {entry['outcome']} |")
    judged = found["right"] + found["wrong"]
    return (
        "\n".join(lines) + f"\n\nRight in {found['right']} of {judged} verdicts; {found['open']} times it cannot say."
    )
