"""Draw the plots of finished studies again, from their results.json. Nothing is trained or scored.

    python -m lavender.world.studies.redraw docs/evidence/main docs/evidence/words

The scores and pages stay as they are. The plot of the study `entropy` needs values that results.json does not have.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from lavender.errors import DataError, LavenderError
from lavender.world.studies.page import draw_differences
from lavender.world.studies.registry import STUDIES


def redraw(folder: Path) -> Path:
    """Draw `plot.png` of a study's folder again, and return its path.

    Raises:
        DataError: no results of a study that can be drawn from them.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
        study = STUDIES[results["study"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"no results of a study in {folder}", "a folder that `lavender study` wrote", "name one"
        ) from error
    if results["study"] == "entropy":
        raise DataError(f"{path} without the entropy of each map", "another study", "run `lavender study entropy`")
    if isinstance(study.draw, partial) and study.draw.func is draw_differences:
        known = [metric for metric in study.draw.keywords["metrics"] if _has(results, metric)]
        draw_differences(results, folder / "plot.png", known)
    else:
        study.draw(results, folder / "plot.png")
    return folder / "plot.png"


def _has(results: dict, metric: str) -> bool:
    """Whether every arm has the metric: results of an earlier version may lack one that studies show today."""
    return all(metric in scores for scores in results["arms"].values())


def main(folders: list[str]) -> int:
    """Redraw each folder; 0, or 1 after an error, or 2 without a folder."""
    if not folders:
        print("usage: python -m lavender.world.studies.redraw FOLDER …", file=sys.stderr)
        return 2
    try:
        for name in folders:
            print(redraw(Path(name)))
    except LavenderError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
