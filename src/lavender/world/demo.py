"""`lavender demo`: the whole method on the built-in world, on this computer, in some minutes.

Scenes → the teacher's word maps → plain and aligned fine-tuning from one base, with the same data, steps and seed →
scores in and out of domain → one HTML page. Training is the command that a user runs, `lavender train`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lavender.data.samples import read_samples
from lavender.evaluation.compare import Observed, Phrase, panels_of
from lavender.evaluation.map_scores import MapScores
from lavender.evaluation.report.figure import draw_figure
from lavender.evaluation.report.page import Curve, Panel, Report, Table, write_report
from lavender.files import write_whole
from lavender.teachers.diffusion.teacher import Teacher
from lavender.teachers.extract import extract
from lavender.world import STUDENT_PATH
from lavender.world.judging import captioned_picture, held_out_scenes, job_of, score_student, score_teacher
from lavender.world.language import caption_scene, write_scenes
from lavender.world.scenes import Scene, Split, scenes
from lavender.world.student_models import CAPTION_PROMPT
from lavender.world.tuning import ONE_THREAD, load_teacher, run_paths, stop_processes, training_settings

NUM_TRAINING, NUM_HELD_OUT, NUM_PANELS = 800, 200, 6
TUNING = training_settings("mllama", "full", seed=0)
ARMS = {"plain": 0.0, "aligned": TUNING["align_weight"]}
"""Arm → its `align_weight`. The arms differ in nothing else."""


def run_demo(out: Path, split: Split = "sealed", start: int = 1000) -> dict[str, Any]:
    """Run the demo. Writes `report.html`, `figure.png`, `results.json`, the data, the maps and both runs to `out`.

    Args:
        out: the folder to write.
        split: the split of the held-out scenes.
        start: index of the first held-out scene in the split.

    Returns:
        The content of `results.json`.
    """
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    with stages("scenes", f"drawing {NUM_TRAINING} training scenes and {NUM_HELD_OUT} held-out scenes per domain"):
        write_scenes(out / "data", list(scenes("finetune", NUM_TRAINING)))
        held_out = held_out_scenes(split, NUM_HELD_OUT, start)
    with stages("maps", "extracting the teacher's word maps"):
        teacher = load_teacher()
        summary = extract(read_samples(out / "data", CAPTION_PROMPT), teacher, out / "maps")
        print(f"  {summary.records} captions, {summary.words} word maps, {len(summary.dropped)} dropped")
    with stages("teacher scores", "scoring the teacher's maps"):
        teacher_scores = score_teacher(teacher, held_out["in_domain"])
    with stages("training", f"fine-tuning the student twice: {' and '.join(ARMS)}"):
        print(f"  logs: {', '.join(f'{arm}.log' for arm in ARMS)}", flush=True)
        train_arms(out)
    students, observed = {}, {}
    with stages("student scores", "scoring the base and both fine-tuned students"):
        for arm, path in {"base": STUDENT_PATH, **{arm: out / arm for arm in ARMS}}.items():
            students[arm], observed[arm] = score_student(path, held_out)
    with stages("report", "writing the report"):
        results = _results(teacher_scores, students, stages.seconds)
        panels = _panels(held_out["in_domain"], teacher, observed)
        draw_figure(panels[:3], out / "figure.png")
        write_report(_report(results, panels, out), out / "report.html")
    results["seconds"] = stages.seconds
    write_whole(out / "results.json", json.dumps(results, indent=1))
    print(f"\nOpen {out / 'report.html'}\nThese are results of one seed. `lavender study main` compares several seeds.")
    return results


class Stages:
    """Prints each stage of the demo, and keeps how many seconds it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, description: str) -> Iterator[None]:
        print(f"{description} …", flush=True)
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f"  done in {self.seconds[name]:.0f} s", flush=True)


def train_arms(out: Path) -> None:
    """Run `lavender train` for both arms, side by side, on one core each.

    Raises:
        RuntimeError: a training failed. The message holds the end of its log.
    """
    running: dict[str, subprocess.Popen] = {}
    try:
        for arm in ARMS:
            running[arm] = _start_training(out, arm)
        failed = [arm for arm, process in running.items() if process.wait() != 0]
    finally:
        stop_processes([*running.values()])
    if failed:
        tail = (out / f"{failed[0]}.log").read_text()[-2000:]
        raise RuntimeError(f"training of {failed} failed; the end of its log:\n{tail}")


def _start_training(out: Path, arm: str) -> subprocess.Popen:
    settings = run_paths("mllama", out / "data", out / "maps", out / arm) | TUNING | {"align_weight": ARMS[arm]}
    write_whole(out / f"{arm}.yaml", yaml.safe_dump(settings, sort_keys=False))
    command = [sys.executable, "-m", "lavender.cli", "train", str(out / f"{arm}.yaml"), "--restart"]
    with (out / f"{arm}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD)


def _results(teacher: MapScores, students: dict[str, dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """The content of `results.json`: each arm's scores are lists with one number per seed."""
    keys = list(next(iter(students.values())))
    return {
        "teacher": teacher.to_dict(),
        "students": {"mllama": {key: {arm: [scores[key]] for arm, scores in students.items()} for key in keys}},
        "seconds": seconds,
        "seeds": [TUNING["seed"]],
        "settings": {"num_training": NUM_TRAINING, "num_held_out": NUM_HELD_OUT, **TUNING, "align_weight": ARMS},
    }


def _panels(held_out: list[Scene], teacher: Teacher, observed: dict[str, Observed]) -> list[Panel]:
    """The first scenes with two or three things: for each name its true mask, the teacher's map and the students'."""
    chosen = [index for index, scene in enumerate(held_out) if 2 <= len(scene.things) <= 3][:NUM_PANELS]
    shown = [held_out[index] for index in chosen]
    teacher_maps = teacher([job_of(scene, caption_scene(scene).text, teacher.config) for scene in shown])
    shown_by_arm = {
        arm: Observed([student.answers[i] for i in chosen], [student.maps[i] for i in chosen], {})
        for arm, student in observed.items()
    }
    phrases = [
        [
            Phrase(mention.name, mention.start, mention.end, scene.mask_of(mention.name))
            for mention in caption_scene(scene).mentions
        ]
        for scene in shown
    ]
    titles = [f"scene {scene.seed}" for scene in shown]
    return panels_of([captioned_picture(scene) for scene in shown], phrases, teacher_maps, shown_by_arm, titles)


def _report(results: dict[str, Any], panels: list[Panel], out: Path) -> Report:
    students = results["students"]["mllama"]
    rows = [
        [label, *(students[key][arm][0] for arm in ("base", *ARMS))]
        for key, label in (
            ("in_domain", "captions, object F1"),
            ("out_of_domain", "captions of OpenMoji drawings, object F1"),
            ("pointing", "pointing accuracy of attention"),
            ("entropy", "entropy of attention, nats"),
        )
    ]
    note = f"Each score is over {NUM_HELD_OUT} held-out scenes. One seed."
    return Report(
        title="Diffusion Instruction Tuning on the built-in world",
        lead="The attention of a diffusion model shows where each word of a caption is in the picture. Here, a small "
        "trained diffusion model guides the attention of a small vision-language model during fine-tuning.",
        tables=[
            Table("The student", ["score", "base", *ARMS], rows, note),
            Table("The teacher's maps", ["score", "value"], _teacher_rows(results["teacher"]), note),
        ],
        panels=panels,
        notes=[
            "One seed. Both fine-tuned students start from the same base, with the same data, steps and seed; only "
            "align_weight differs. `lavender study main` shows whether the difference holds over several seeds.",
            "Object F1 compares the things that a caption names with the things in the scene. A map points correctly "
            "if its maximum lies in the thing's true mask.",
            "Attention is pooled over heads and layers, before the Aligner. The Aligner is not part of the tuned "
            "model.",
        ],
        settings=results["settings"],
        curves=_curves(out),
    )


def _teacher_rows(teacher: dict[str, Any]) -> list[list[Any]]:
    by_mention = [
        [f"… of the thing that the caption names {place}", teacher["pointing_by_mention"].get(str(order))]
        for order, place in enumerate(("first", "second", "third", "fourth"))
    ]
    return [
        ["pointing accuracy", teacher["pointing"]],
        *by_mention,
        ["control: pointing accuracy of another word's map", teacher["wrong_word_pointing"]],
        ["control: pointing accuracy of a uniform map", teacher["uniform_pointing"]],
        ["control: pointing accuracy of the picture's centre", teacher["centre_pointing"]],
        ["IoU with the true mask, at one threshold", teacher["iou_fixed"]],
        ["entropy, nats", teacher["entropy"]],
    ]


def _curves(out: Path) -> list[Curve]:
    logs = {arm: [json.loads(line) for line in (out / arm / "metrics.jsonl").read_text().splitlines()] for arm in ARMS}
    return [
        Curve(title, "step", unit, {arm: [(row["step"], row[key]) for row in logs[arm] if key in row] for arm in ARMS})
        for key, title, unit in (
            ("vlm_loss", "L_VLM in training", "nats per token"),
            ("attention_loss", "L_att in training", "mean squared error"),
        )
    ]
