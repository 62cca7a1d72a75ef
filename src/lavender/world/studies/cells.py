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

from lavender.data.samples import Samples, read_samples
from lavender.data.store import MapStore
from lavender.students.loading import load_run
from lavender.teachers.extract import Summary, extract
from lavender.training.run_config import Part
from lavender.world import STUDENT_PATHS, TEACHER_PATH
from lavender.world.student_models import CAPTION_PROMPT, new_beside_tower
from lavender.world.studies.over_time import at_step
from lavender.world.studies.targets import Target, write_target
from lavender.world.studies.tasks import (
    TASKS,
    WARM_UP_START,
    Example,
    Scoring,
    TaskName,
    Unconnected,
    WarmUp,
    write_examples,
)
from lavender.world.tuning import TRAINING, load_teacher, run_paths, training_settings

SCENES_PER_SEED = 20_000  # distance between the first fine-tuning scenes of two seeds
FROZEN: tuple[Part, ...] = ("vision_tower", "connector")
"""What the studies of new words and attributes freeze: the tower shows the things and colours already."""
_ALL_LINEAR = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
STUDENT_NAMES: tuple[Literal["mllama", "llava"], ...] = ("mllama", "llava")


@dataclass(frozen=True)
class Arm:
    """How a student is made.

    Attributes:
        student: family of the base; "teacher" scores the teacher's own maps.
        tuning: "none" leaves the base as it is; "lora" has the paper's rank 8 on queries and values, "lora-all" rank 16
            on all linear layers of the language model's blocks.
        target: the maps that attention is aligned to; None is plain fine-tuning.
        num_scenes: fine-tuning scenes.
        steps: optimizer steps, of 16 samples each.
        settings: (name, value) of LavenderConfig, where they differ from `training_settings`.
        task: what is learned and scored.
        freeze: parts of the model that do not train, as in `RunConfig`.
        scorings: how often the student is scored while it is tuned, after equal numbers of steps; the last time at the
            end. Only for full fine-tuning.
    """

    student: Literal["mllama", "llava", "teacher"]
    tuning: Literal["none", "full", "lora", "lora-all"]
    target: Target | None = None
    num_scenes: int = 800
    steps: int = 200
    settings: tuple[tuple[str, Any], ...] = ()
    task: TaskName = "captions"
    freeze: tuple[Part, ...] = ()
    scorings: int = 1

    def training(self, seed: int) -> dict[str, Any]:
        """The settings of `LavenderConfig` at a seed."""
        is_aligned = self.target is not None
        settings = dict(TASKS[self.task].settings) | dict(self.settings)
        if self.scorings > 1:
            every = self.scored_steps[0]
            settings |= {"save_strategy": "steps", "save_steps": every, "save_only_model": True}
            settings |= {"logging_steps": min(every, TRAINING["logging_steps"])}  # a loss for every scored step
        return training_settings(self.student, self.tuning, seed, self.steps, is_aligned) | settings

    @property
    def scored_steps(self) -> tuple[int, ...]:
        """The optimizer steps after which the student is scored, the last one included."""
        every = self.steps // self.scorings
        return (*range(every, every * self.scorings, every), self.steps)

    @property
    def base(self) -> str:
        """The name of the base in `STUDENT_PATHS`, before a warm-up of the task."""
        return TASKS[self.task].base or self.student


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
        if self.arm.scorings == 1:  # of before there were several
            del facts["arm"]["scorings"]
        if self.arm.tuning == "none":  # a base is the same at every seed
            facts["seed"] = None
        else:
            del facts["arm"]["settings"]  # part of "training"
            facts["training"] = self.arm.training(self.seed)
        if self.arm.tuning != "none" or self.arm.student == "teacher":
            facts["teacher"] = _teacher_digest()
        if self.arm.student != "teacher":
            facts["weights"] = _digest(STUDENT_PATHS[self.arm.base] / "model.safetensors")
            facts["warm_up"] = str(TASKS[self.arm.task].warm_up)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def result_path(folder: Path, cell: Cell) -> Path:
    """Where the cell's result is stored."""
    return folder / "cells" / f"{cell.key}.json"


def prepare(folder: Path, cell: Cell) -> None:
    """Write what a cell needs, if it is missing: its base, samples and maps.

    Only one process at a time may do this for cells of one `data_path`; the base must be there if others do it too.
    """
    prepare_base(folder, cell.arm)
    if cell.arm.tuning == "none":
        return
    task, data, target = TASKS[cell.arm.task], data_path(folder, cell), _target(cell)
    is_extracted = (data / "maps" / "extraction.json").is_file()
    if is_extracted and (data / target).is_dir():
        return  # nothing is missing, so the scenes need not be drawn
    start = cell.seed * SCENES_PER_SEED
    examples, replayed = task.examples(start, cell.arm.num_scenes), task.replayed(start)
    if not is_extracted:
        write_samples(data, examples, replayed)
    write_target(data / target, target, MapStore.open(data / "maps"), examples + replayed)


def write_samples(data: Path, examples: list[Example], replayed: list[Example]) -> Summary:
    """Write samples, those that are replayed, and the teacher's maps of both, to folders in `data`.

    The folders are "pictures", "replayed" (if there are any) and "maps".
    """
    samples = []
    for folder, part in (("pictures", examples), ("replayed", replayed)):
        if part:
            write_examples(data / folder, part)
            samples += read_samples(data / folder, CAPTION_PROMPT)
    texts = "all" if any(example.mapped == example.prompt for example in examples) else "answers"
    return extract(Samples(tuple(samples)), load_teacher(texts=texts), data / "maps")


def base_path(folder: Path, arm: Arm) -> Path:
    """The checkpoint that an arm starts from."""
    warm_up = TASKS[arm.task].warm_up
    if warm_up is None:
        return STUDENT_PATHS[arm.base]
    facts = json.dumps([asdict(warm_up), _digest(STUDENT_PATHS[arm.base] / "model.safetensors")])
    made = "unconnected" if isinstance(warm_up, Unconnected) else warm_up.task
    return folder / "bases" / f"{arm.base}-{made}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


def prepare_base(folder: Path, arm: Arm) -> None:
    """Make the task's base, if it has a warm-up and the base is missing."""
    warm_up, path = TASKS[arm.task].warm_up, base_path(folder, arm)
    if warm_up is None or path.is_dir():
        return
    if isinstance(warm_up, Unconnected):
        _disconnect(path, arm.base, warm_up)
    else:
        _warm_up(path, arm, warm_up)


def _disconnect(path: Path, base: str, new: Unconnected) -> None:
    """Save the base with new weights in all but its vision tower."""
    model, processor = load_run(STUDENT_PATHS[base])
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    new_beside_tower(model, processor, new.seed).save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(path)


def _warm_up(path: Path, arm: Arm, warm_up: WarmUp) -> None:
    """Make a base by plain fine-tuning."""
    from lavender.training.exporting import export
    from lavender.training.run import RunConfig, train

    task, run, data = TASKS[warm_up.task], path.with_suffix(".run"), path.with_suffix(".data")
    for leftover in (run, data):
        shutil.rmtree(leftover, ignore_errors=True)
    write_samples(data, task.examples(WARM_UP_START, warm_up.num_scenes), [])
    settings = training_settings(arm.student, "full", 0, warm_up.steps, align=False) | {"probe_size": 0}
    paths = run_paths(arm.base, data / "pictures", data / "maps", run)
    train(RunConfig(**paths, training=settings))
    export(run, path)
    for leftover in (run, data):
        shutil.rmtree(leftover, ignore_errors=True)


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

    from lavender.world.judging import held_out_scenes, judge_teacher, score_attention
    from lavender.world.studies.frozen_tower import each_picture_once

    torch.set_num_threads(1)
    scoring, run, curves, earlier = cell.scoring, folder / "runs" / cell.key, [], {}
    if cell.arm.student == "teacher":
        held_out = held_out_scenes(scoring.split, scoring.count, scoring.start, ("in_domain",))
        return {"scores": score_attention(judge_teacher(load_teacher(), held_out["in_domain"])), "curves": curves}
    path = base_path(folder, cell.arm)
    with each_picture_once():
        if cell.arm.tuning != "none":
            _train(folder, cell, run)
            path, curves = run, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        scores = TASKS[cell.arm.task].score(path, scoring)
        for step in cell.arm.scored_steps[:-1]:
            checkpoint = at_step(run, step, base_path(folder, cell.arm))
            earlier[str(step)] = TASKS[cell.arm.task].score(checkpoint, scoring)
    shutil.rmtree(run, ignore_errors=True)
    return {"scores": scores, "curves": curves} | ({"earlier": earlier} if earlier else {})


def _train(folder: Path, cell: Cell, run: Path) -> None:
    from lavender.training.run import LoraSettings, RunConfig, train

    lora = {"lora": LoraSettings(), "lora-all": LoraSettings(r=16, target_modules=_ALL_LINEAR)}
    shutil.rmtree(run, ignore_errors=True)
    data = data_path(folder, cell)
    model: dict[str, Any] = {"model": str(base_path(folder, cell.arm))}
    train(
        RunConfig(
            **(run_paths(cell.arm.base, data / "pictures", data / _target(cell), run) | model),
            replay_data=str(data / "replayed") if TASKS[cell.arm.task].num_replayed else None,
            lora=lora.get(cell.arm.tuning),
            freeze=cell.arm.freeze,
            training=cell.arm.training(cell.seed) | {"probe_size": 0},
        )
    )


def _target(cell: Cell) -> Target:
    """The maps that the cell's run is given; plain fine-tuning does not use them."""
    return cell.arm.target or "teacher"


def data_path(folder: Path, cell: Cell) -> Path:
    """The folder of the cell's samples and maps."""
    named = TASKS[cell.arm.task].data or cell.arm.task
    return folder / "data" / f"{named}-{cell.seed}-{cell.arm.num_scenes}-{_teacher_digest()}"


def _teacher_digest() -> str:
    return _digest(TEACHER_PATH / "unet" / "diffusion_pytorch_model.safetensors")


def _digest(weights: Path) -> str:
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
