"""New words from 100 captions with the maps of a small Stable Diffusion 3, beside those of the shipped UNet.

    make weights-joint    # trains weights-work/joint_teacher
    python benchmarks/joint_teacher_student.py weights-work/joint_teacher --json joint_teacher_student.json
    python benchmarks/joint_teacher_student.py --quick --json smoke.json    # smoke test: 2 steps, random weights

The runs are those of `lavender study new-words` with 100 captions: the same scenes and seeds, scored on 300 sealed
scenes. Arms: plain fine-tuning; the recipe with the UNet's maps; the recipe with the joint teacher's; as a control, the
recipe with the joint teacher's maps of another word.
Results of the runs are kept in `--work`, and a later call continues from them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from joint_teacher import random_teacher

from lavender.config import ExtractionConfig
from lavender.data.fingerprints import digest_of_folder
from lavender.teachers.diffusion.teacher import Teacher
from lavender.world.studies import cells
from lavender.world.studies.cells import Cell, prepare, result_path, run_cell
from lavender.world.studies.examples import Scoring, TaskName
from lavender.world.studies.forms import PLAIN, RECIPE, Settings
from lavender.world.studies.new_words import METRICS_SHOWN, fine_tuned
from lavender.world.studies.registry import NUM_HELD_OUT, SEALED_START
from lavender.world.studies.targets import Target
from lavender.world.tuning import GRID

CAPTIONS = 100
ARMS: dict[str, tuple[Settings, Target, bool]] = {
    "plain": (PLAIN, "teacher", False),
    "recipe, UNet": (RECIPE, "teacher", False),
    "recipe, joint teacher": (RECIPE, "teacher", True),
    "recipe, joint teacher, wrong word": (RECIPE, "wrong-word", True),
}
"""Arm → its form, which maps it gets, and whether the joint teacher makes them."""


def scores_of(folder: Path, cell: Cell) -> dict[str, float]:
    """The scores of a cell, which is run if they are missing."""
    path = result_path(folder, cell)
    if not path.is_file():
        prepare(folder, cell)
        run_cell(folder, cell)
    scores = json.loads(path.read_text())["scores"]
    return {name: scores[name] for name in METRICS_SHOWN}


def with_teacher(joint: Path, settings: dict[str, Any]) -> Any:
    """In this context, cells extract maps with the joint teacher."""

    def load_teacher(**more: Any) -> Teacher:
        config = ExtractionConfig(grid=GRID, geometry="squash", batch_size=16, **settings, **more)
        return Teacher.from_pretrained(joint, config, name="joint")

    digest = hashlib.sha256(repr((digest_of_folder(joint), settings)).encode()).hexdigest()[:16]
    return mock.patch.multiple(cells, load_teacher=load_teacher, _teacher_digest=lambda: digest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, nargs="?", help="folder of the joint teacher; not with --quick")
    parser.add_argument("--quick", action="store_true", help="smoke test: one seed, 2 steps, no replay, random weights")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="settings of its extraction")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--work", type=Path, default=None, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--json", type=Path, default=None, help="where to write the numbers")
    options = parser.parse_args()
    if options.quick == (options.teacher is not None):
        parser.error("give the folder of the joint teacher, or --quick, which has random weights")
    torch.set_num_threads(1)
    settings = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in options.set)}
    scoring = Scoring("sealed", SEALED_START, NUM_HELD_OUT)
    task: TaskName = "new-words"
    if options.quick:
        task, scoring, options.seeds = "new-words-alone", Scoring("development", 0, 40), [40]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary) / "work"
        joint = options.teacher or random_teacher(Path(temporary) / "joint")
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for seed in options.seeds:
            for arm, (form, target, is_joint) in ARMS.items():
                form = (*form, ("max_steps", 2)) if options.quick else form
                cell = Cell(fine_tuned(CAPTIONS, form, target, task), seed, scoring)
                with with_teacher(joint, settings) if is_joint else nullcontext():
                    found[arm].append(scores_of(folder, cell))
            print(seed, {arm: scores[-1]["new_names"] for arm, scores in found.items()}, flush=True)
    arms = {arm: {name: [one[name] for one in scores] for name in METRICS_SHOWN} for arm, scores in found.items()}
    numbers = {"seeds": options.seeds, "captions": CAPTIONS, "settings": settings, "arms": arms}
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
