"""One arm of a study at one seed: fine-tune a world student as `lavender train` does, then score it.

The arms of one seed share data, order of samples and number of steps. Each seed has its own fine-tuning scenes, so the
spread over seeds includes that of the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lavender.data.samples import read_samples
from lavender.data.store import MapStore
from lavender.teachers.extract import extract
from lavender.world import STUDENT_PATHS, TEACHER_PATH
from lavender.world.language import write_scenes
from lavender.world.scenes import Scene, Split, scenes
from lavender.world.student_models import CAPTION_PROMPT
from lavender.world.studies.targets import Target, write_target
from lavender.world.tuning import load_teacher, run_paths, training_settings

SCENES_PER_SEED = 20_000  # distance between the first fine-tuning scenes of two seeds
STUDENT_NAMES: tuple[Literal["mllama", "llava"], ...] = ("mllama", "llava")


@dataclass(frozen=True)
class Arm:
    """How a student is made.

    Attributes:
        student: family of the base; "teacher" scores the teacher's own maps.
        tuning: "none" leaves the base as it is.
        target: the maps that attention is aligned to; None is plain fine-tuning.
        num_scenes: fine-tuning scenes.
        steps: optimizer steps, of 16 samples each.
        settings: (name, value) of LavenderConfig, where they differ from `training_settings`.
    """

    student: Literal["mllama", "llava", "teacher"]
    tuning: Literal["none", "full", "lora"]
    target: Target | None = None
    num_scenes: int = 800
    steps: int = 200
    settings: tuple[tuple[str, Any], ...] = ()

    def training(self, seed: int) -> dict[str, Any]:
        """The settings of `LavenderConfig` at a seed."""
        is_aligned = self.target is not None
        return training_settings(self.student, self.tuning, seed, self.steps, is_aligned) | dict(self.settings)


@dataclass(frozen=True)
class Scoring:
    """The held-out scenes of the scores: `count` per domain, from the `start`-th seed of a split on."""

    split: Split
    start: int
    count: int


@dataclass(frozen=True)
class Cell:
    """An arm at a seed, and how it is scored."""

    arm: Arm
    seed: int
    scoring: Scoring

    @property
    def key(self) -> str:
        """The name of the result's file. Equal cells are run once; other settings or weights give another key."""
        facts = asdict(self)
        if self.arm.tuning == "none":  # a base is the same at every seed
            facts["seed"] = None
        else:
            del facts["arm"]["settings"]  # part of "training"
            facts["training"] = self.arm.training(self.seed)
            facts["teacher"] = _teacher_digest()
        if self.arm.student != "teacher":
            facts["weights"] = _digest(STUDENT_PATHS[self.arm.student] / "model.safetensors")
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def result_path(folder: Path, cell: Cell) -> Path:
    """Where the cell's result is stored."""
    return folder / "cells" / f"{cell.key}.json"


def prepare(folder: Path, cell: Cell) -> None:
    """Write the scenes and maps that a cell trains on, if they are missing. Only one process at a time may do this."""
    if cell.arm.tuning == "none":
        return
    data = _data_path(folder, cell)
    drawn = list(scenes("finetune", cell.arm.num_scenes, start=cell.seed * SCENES_PER_SEED))
    if not (data / "maps" / "extraction.json").is_file():
        write_scenes(data / "pictures", drawn)
        extract(read_samples(data / "pictures", CAPTION_PROMPT), load_teacher(), data / "maps")
    target = _target(cell)
    write_target(data / target, target, MapStore.open(data / "maps"), drawn)


def run_cell(folder: Path, cell: Cell) -> None:
    """Train and score; writes the cell's result, and a log beside it."""
    path = result_path(folder, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        scores = _train_and_score(folder, cell)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"cell": asdict(cell)} | scores, indent=1))
    partial.replace(path)


def _train_and_score(folder: Path, cell: Cell) -> dict[str, Any]:
    import torch

    from lavender.world.judging import DOMAINS, held_out_scenes, judge_teacher, score_attention, score_student

    torch.set_num_threads(1)
    scoring, run, curves = cell.scoring, folder / "runs" / cell.key, []
    held_out: dict[str, list[Scene]] = held_out_scenes(scoring.split, scoring.count, scoring.start, tuple(DOMAINS))
    if cell.arm.student == "teacher":
        return {"scores": score_attention(judge_teacher(load_teacher(), held_out["in_domain"])), "curves": curves}
    path = STUDENT_PATHS[cell.arm.student]
    if cell.arm.tuning != "none":
        _train(folder, cell, run)
        path, curves = run, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores, _ = score_student(path, held_out)
    shutil.rmtree(run, ignore_errors=True)
    return {"scores": scores, "curves": curves}


def _train(folder: Path, cell: Cell, run: Path) -> None:
    from lavender.training.run import LoraSettings, RunConfig, train

    shutil.rmtree(run, ignore_errors=True)
    data = _data_path(folder, cell)
    train(
        RunConfig(
            **run_paths(cell.arm.student, data / "pictures", data / _target(cell), run),
            lora=LoraSettings() if cell.arm.tuning == "lora" else None,
            training=cell.arm.training(cell.seed) | {"probe_size": 0},
        )
    )


def _target(cell: Cell) -> Target:
    """The maps that the cell's run is given; plain fine-tuning does not use them."""
    return cell.arm.target or "teacher"


def _data_path(folder: Path, cell: Cell) -> Path:
    return folder / "data" / f"{cell.seed}-{cell.arm.num_scenes}-{_teacher_digest()}"


def _teacher_digest() -> str:
    return _digest(TEACHER_PATH / "unet" / "diffusion_pytorch_model.safetensors")


def _digest(weights: Path) -> str:
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
