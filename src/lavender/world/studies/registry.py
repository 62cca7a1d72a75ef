"""The studies by name, and what `lavender study` does: run the cells, judge, write the folder."""

from __future__ import annotations

import difflib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lavender.errors import ConfigError
from lavender.world.scenes import SPLITS, Split
from lavender.world.studies import controls, entropy, main_study, scaling
from lavender.world.studies.cells import SCENES_A_SEED, Cell, Scoring
from lavender.world.studies.page import page
from lavender.world.studies.runner import run_cells
from lavender.world.studies.study import Study
from lavender.world.studies.variants import VARIANTS

STUDIES: dict[str, Study] = {
    "main": main_study.STUDY,
    "teacher-controls": controls.STUDY,
    "entropy": entropy.STUDY,
    "scaling": scaling.STUDY,
    **VARIANTS,
}
SEALED_START = 2000  # the demo looks at sealed scenes before this one
NUM_HELD_OUT = 300
MOST_SEEDS = len(SPLITS["finetune"]) // SCENES_A_SEED
BLIND = ("uniform_pointing", "centre_pointing")  # what maps that have seen nothing score on the same scenes


@dataclass(frozen=True)
class Scale:
    """How large a study is run: its seeds, the scenes of its scores, and shares of scenes and steps."""

    seeds: tuple[int, ...]
    scoring: Scoring
    quick: bool = False

    @classmethod
    def of(cls, quick: bool, split: Split | None, seeds: tuple[int, ...] | None) -> Scale:
        """The full study on sealed scenes with three seeds; the quick one on development scenes with one."""
        if quick and split == "sealed":
            raise ConfigError("--quick on sealed scenes", "development scenes", "leave --split out")
        if seeds and (len(set(seeds)) < len(seeds) or not all(0 <= seed < MOST_SEEDS for seed in seeds)):
            raise ConfigError(f"--seeds {list(seeds)}", f"different numbers from 0 to {MOST_SEEDS - 1}", "change them")
        split = split or ("development" if quick else "sealed")
        scoring = Scoring(split, SEALED_START if split == "sealed" else 0, 100 if quick else NUM_HELD_OUT)
        return cls(seeds or ((40,) if quick else (1, 2, 3)), scoring, quick)


def run_study(name: str, out: Path, scale: Scale, jobs: int, command: str) -> dict[str, Any]:
    """Run a study and write `OUT/NAME/results.json`, `page.md` and `plot.png`. Stopped and started again, it goes on.

    Studies in one `out` share their runs: an arm that two of them have is trained once.
    """
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1)
        hint = f"write {near[0]!r} instead" if near else "name one of them"
        raise ConfigError(f"the study {name!r}", f"one of {', '.join(STUDIES)}", hint)
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}", "at least 1", "leave it out to use every core")
    began, study = time.monotonic(), STUDIES[name]
    arms = study.arms(scale.quick)
    if scale.quick:
        arms = {name: replace(arm, num_scenes=min(200, arm.num_scenes), steps=60) for name, arm in arms.items()}
    cells = {arm: [Cell(arms[arm], seed, scale.scoring) for seed in scale.seeds] for arm in arms}
    found = run_cells(out, [cell for own in cells.values() for cell in own], jobs)
    results = {arm: [found[cell.key] for cell in own] for arm, own in cells.items()}
    scores = {arm: _by_metric([one["scores"] for one in own]) for arm, own in results.items()}
    entropies = {arm: own.pop("entropies") for arm, own in scores.items()}
    blind = {metric: [own.pop(metric)[0] for own in scores.values()].pop() for metric in BLIND}
    summary: dict[str, Any] = {
        "study": name,
        "command": command,
        "quick": scale.quick,
        "seeds": list(scale.seeds),
        "arms": scores,
        "controls": blind,
        "verdict": [str(one) for one in study.judge(scores)],
        "settings": {"scoring": asdict(scale.scoring), "arms": {arm: asdict(own) for arm, own in arms.items()}},
        "seconds": round(time.monotonic() - began),
    }
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    study.draw(summary | {"entropies": entropies}, folder / "plot.png")
    (folder / "page.md").write_text(page(study, summary))
    (folder / "results.json").write_text(json.dumps(summary, indent=1))
    return summary


def _by_metric(scores: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {metric: [one[metric] for one in scores] for metric in scores[0]}
