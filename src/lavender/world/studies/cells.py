"""One arm of a study at one seed: fine-tune a world student as `lavender train` does, then score it.

Arms of one seed share data, order of samples and number of steps. Each seed brings other fine-tuning
scenes, so that the spread over seeds is that of the data too.
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

from lavender.world import STUDENT_PATHS, TEACHER_PATH
from lavender.world.scenes import Split, Style, scenes
from lavender.world.studies.targets import Target, write_target

SCENES_A_SEED = 20_000  # distance between the fine-tuning scenes of two seeds
HELD_OUT: dict[str, Style] = {"in_domain": "plain", "out_of_domain": "openmoji", "other_backgrounds": "photograph"}


@dataclass(frozen=True)
class Arm:
    """What is done to a student.

    Attributes:
        student: family of the base; "teacher" scores the teacher's own maps.
        tuning: "none" leaves the base as it is.
        target: whose maps attention is aligned to; None is plain fine-tuning.
        num_scenes: fine-tuning scenes.
        steps: of the optimiser, 16 samples each.
        settings: (name, value) of LavenderConfig that differ from the studies' own.
    """

    student: Literal["mllama", "llava", "teacher"]
    tuning: Literal["none", "full", "lora"]
    target: Target | None = None
    num_scenes: int = 800
    steps: int = 200
    settings: tuple[tuple[str, Any], ...] = ()

    def training(self, seed: int) -> dict[str, Any]:
        """All settings of LavenderConfig."""
        from lavender.world.tuning import ALIGNMENT, LEARNING_RATES, TRAINING

        chosen = (
            TRAINING | ALIGNMENT | {"learning_rate": LEARNING_RATES[self.student, self.tuning], "max_steps": self.steps}
        )
        if self.target is None:
            chosen["align_weight"] = 0.0
        return chosen | dict(self.settings) | {"seed": seed}


@dataclass(frozen=True)
class Scoring:
    """Which scenes a student is scored on: `count` of a split from its `start`-th seed."""

    split: Split
    start: int
    count: int


@dataclass(frozen=True)
class Cell:
    """An arm at a seed, and how it is scored.

    Its `key` is the name of its file. Equal cells are run once; other settings or other base weights give another key.
    """

    arm: Arm
    seed: int
    scoring: Scoring

    @property
    def key(self) -> str:
        facts = asdict(self)
        if self.arm.tuning == "none":  # a base is the same at every seed
            facts["seed"] = None
        else:
            del facts["arm"]["settings"]  # they are in what follows, resolved
            facts["training"] = self.arm.training(self.seed)
            facts["teacher"] = _digest(TEACHER_PATH / "unet" / "diffusion_pytorch_model.safetensors")
        if self.arm.student != "teacher":
            facts["weights"] = _digest(STUDENT_PATHS[self.arm.student] / "model.safetensors")
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _digest(weights: Path) -> str:
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def result_path(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.key}.json"


def prepare(folder: Path, cell: Cell) -> None:
    """Write the scenes and maps that a cell trains on, unless they are there. Not for two processes at once."""
    if cell.arm.tuning == "none":
        return
    from lavender.data.samples import read_samples
    from lavender.data.store import MapStore
    from lavender.teachers.extract import extract
    from lavender.world.language import write_scenes
    from lavender.world.student_models import CAPTION_PROMPT
    from lavender.world.tuning import load_teacher

    data = _data_path(folder, cell)
    drawn = list(scenes("finetune", cell.arm.num_scenes, start=cell.seed * SCENES_A_SEED))
    if not (data / "maps" / "extraction.json").is_file():
        write_scenes(data / "pictures", drawn)
        extract(read_samples(data / "pictures", CAPTION_PROMPT), load_teacher(), data / "maps")
    target = cell.arm.target or "teacher"
    write_target(data / target, target, MapStore.open(data / "maps"), drawn)


def run_cell(folder: Path, cell: Cell) -> None:
    """Train and score; writes the cell's result. What training prints goes to a log beside it."""
    path = result_path(folder, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        scores = _train_and_score(folder, cell)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"cell": asdict(cell)} | scores, indent=1))
    partial.replace(path)


def _train_and_score(folder: Path, cell: Cell) -> dict[str, Any]:
    import torch

    from lavender.world.judging import judge_teacher, score_attention, score_student
    from lavender.world.tuning import load_teacher

    torch.set_num_threads(1)
    where, run = cell.scoring, folder / "runs" / cell.key
    held_out = {
        domain: list(scenes(where.split, where.count, style, where.start)) for domain, style in HELD_OUT.items()
    }
    if cell.arm.student == "teacher":
        return {"scores": score_attention(judge_teacher(load_teacher(), held_out["in_domain"])), "curves": []}
    path, curves = STUDENT_PATHS[cell.arm.student], []
    if cell.arm.tuning != "none":
        _train(folder, cell, run)
        curves, path = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()], run
    scores, _ = score_student(path, held_out)
    shutil.rmtree(run, ignore_errors=True)
    return {"scores": scores, "curves": curves}


def _train(folder: Path, cell: Cell, run: Path) -> None:
    from lavender.training.run import LoraSettings, RunConfig, train
    from lavender.world.student_models import CAPTION_PROMPT

    shutil.rmtree(run, ignore_errors=True)
    arm, data = cell.arm, _data_path(folder, cell)
    train(
        RunConfig(
            model=str(STUDENT_PATHS[arm.student]),
            data=str(data / "pictures"),
            out=str(run),
            dtype="float32",
            maps=str(data / (arm.target or "teacher")),
            prompt=CAPTION_PROMPT,
            lora=LoraSettings() if arm.tuning == "lora" else None,
            training=arm.training(cell.seed) | {"probe_size": 0},
        )
    )


def _data_path(folder: Path, cell: Cell) -> Path:
    teacher = _digest(TEACHER_PATH / "unet" / "diffusion_pytorch_model.safetensors")
    return folder / "data" / f"{cell.seed}-{cell.arm.num_scenes}-{teacher}"
