"""`lavender demo`: the whole method on the built-in world, on this machine, in some minutes.

Scenes → the teacher's maps → plain and aligned fine-tuning from one base, same data, steps and seed →
scores in and out of domain → one page. It runs the same code, and for training the same command, as a
user's own data would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lavender.data.samples import read_samples
from lavender.evaluation.compare import Observed, Phrase, panels_of
from lavender.evaluation.map_scores import MapScores, best_threshold, score_maps
from lavender.evaluation.report.figure import draw_figure
from lavender.evaluation.report.page import Curve, Report, Table, write_report
from lavender.files import write_whole
from lavender.teachers.diffusion.teacher import Teacher
from lavender.teachers.extract import extract
from lavender.world import STUDENT_PATH
from lavender.world.judging import job_of, judge_teacher, reading_of, score_student
from lavender.world.language import caption_scene, write_scenes
from lavender.world.scenes import Scene, Split, scenes
from lavender.world.student_models import CAPTION_PROMPT
from lavender.world.tuning import ALIGNMENT, LEARNING_RATES, TRAINING, load_teacher

NUM_TRAINING, NUM_HELD_OUT, NUM_PANELS = 800, 200, 6
TUNING: dict[str, Any] = (
    TRAINING | ALIGNMENT | {"learning_rate": LEARNING_RATES["mllama", "full"], "max_steps": 200, "seed": 0}
)
STOP_SECONDS = 10.0
"""For how long a training may clean up after it was told to end."""
ARMS = {"plain": 0.0, "aligned": TUNING["align_weight"]}


def run_demo(out: Path, split: Split = "sealed", start: int = 1000) -> dict[str, Any]:
    """Run it all; writes `report.html`, `figure.png`, `results.json` and everything between to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch()
    with watch("scenes"):
        write_scenes(out / "data", list(scenes("finetune", NUM_TRAINING)))
        held_out = {
            "in_domain": list(scenes(split, NUM_HELD_OUT, start=start)),
            "out_of_domain": list(scenes(split, NUM_HELD_OUT, "openmoji", start=start)),
        }
    with watch("maps"):
        teacher = load_teacher()
        summary = extract(read_samples(out / "data", CAPTION_PROMPT), teacher, out / "maps")
        print(f"  {summary.records} texts, {summary.words} word maps, {len(summary.dropped)} dropped")
    with watch("teacher scores"):
        teacher_scores = score_teacher(teacher, held_out["in_domain"])
    with watch("training"):
        train_arms(out)
    students, observed = {}, {}
    with watch("student scores"):
        for arm, path in {"base": STUDENT_PATH, **{arm: out / arm for arm in ARMS}}.items():
            students[arm], observed[arm] = score_student(path, held_out)
    with watch("report"):
        results = _results(teacher_scores, students, watch.seconds)
        panels = _panels(held_out["in_domain"], teacher, observed)
        draw_figure(panels[:3], out / "figure.png")
        write_report(_page(results, panels, out), out / "report.html")
    results["seconds"] = watch.seconds
    write_whole(out / "results.json", json.dumps(results, indent=1))
    print(f"\nOpen {out / 'report.html'}. One seed; `lavender study main` tells what holds over seeds.")
    return results


class Stopwatch:
    """Prints each stage and keeps its seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):
        print(f"{stage} …", flush=True)
        began = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - began, 1)
        print(f"{stage}: {self.seconds[stage]:.0f} s", flush=True)


def train_arms(out: Path) -> None:
    """`lavender train` for each arm, side by side, one core each. The arms differ in align_weight alone."""
    running: list[tuple[str, subprocess.Popen]] = []
    try:
        for arm in ARMS:
            running.append((arm, _begin(out, arm)))
        failed = [arm for arm, process in running if process.wait() != 0]
    finally:
        stop([process for _, process in running])
    if failed:
        tail = (out / f"{failed[0]}.log").read_text()[-2000:]
        raise RuntimeError(f"training of {failed} failed; the end of its log:\n{tail}")


def _begin(out: Path, arm: str) -> subprocess.Popen:
    settings = {
        "model": str(STUDENT_PATH),
        "data": str(out / "data"),
        "maps": str(out / "maps"),
        "out": str(out / arm),
        "prompt": CAPTION_PROMPT,
        "dtype": "float32",
        **TUNING,
        "align_weight": ARMS[arm],
    }
    write_whole(out / f"{arm}.yaml", yaml.safe_dump(settings, sort_keys=False))
    command = [sys.executable, "-m", "lavender.cli", "train", str(out / f"{arm}.yaml"), "--restart"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (out / f"{arm}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """End those that still run, as they are when the demo itself is stopped: they would go on without it."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def score_teacher(teacher: Teacher, drawn: Sequence[Scene]) -> MapScores:
    """Map scores on held-out scenes; the IoU threshold is chosen on other, development scenes."""
    chosen = judge_teacher(teacher, list(scenes("development", NUM_HELD_OUT, start=500_000)))
    return score_maps(judge_teacher(teacher, drawn), best_threshold(chosen)[0])


def _results(teacher: MapScores, students: dict[str, dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """The published form: each arm is a list, one number a seed."""
    keys = list(next(iter(students.values())))
    return {
        "teacher": teacher.to_dict(),
        "students": {"mllama": {key: {arm: [scores[key]] for arm, scores in students.items()} for key in keys}},
        "seconds": seconds,
        "seeds": [TUNING["seed"]],
        "settings": {"num_training": NUM_TRAINING, "num_held_out": NUM_HELD_OUT, **TUNING, "align_weight": ARMS},
    }


def _panels(drawn: list[Scene], teacher: Teacher, observed: dict[str, Observed]):
    """Scenes with two or three things, the first few: true mask, teacher and students for each name."""
    chosen = [index for index, scene in enumerate(drawn) if 2 <= len(scene.things) <= 3][:NUM_PANELS]
    picked = [drawn[index] for index in chosen]
    maps = teacher([job_of(scene, caption_scene(scene).text, teacher.config) for scene in picked])
    own = {
        arm: Observed([one.answers[i] for i in chosen], [one.maps[i] for i in chosen], {})
        for arm, one in observed.items()
    }
    phrases = [
        [Phrase(one.name, one.start, one.end, scene.mask_of(one.name)) for one in caption_scene(scene).mentions]
        for scene in picked
    ]
    titles = [f"scene {scene.seed}" for scene in picked]
    return panels_of([reading_of(scene) for scene in picked], phrases, maps, own, titles)


def _page(results: dict[str, Any], panels, out: Path) -> Report:
    students, teacher = results["students"]["mllama"], results["teacher"]
    rows = [
        [label, *(students[key][arm][0] for arm in ("base", *ARMS))]
        for key, label in (
            ("in_domain", "captions, object F1"),
            ("out_of_domain", "captions in another hand, object F1"),
            ("pointing", "attention points at the thing"),
            ("entropy", "entropy of attention, nats"),
        )
    ]
    tables = [
        Table("The student", ["", "base", *ARMS], rows, f"{NUM_HELD_OUT} held-out scenes a row; one seed."),
        Table("The teacher's maps", ["score", "value"], _teacher_rows(teacher)),
    ]
    notes = [
        "One seed. Fine-tuning twice from the same base with the same data, steps and seed; only align_weight "
        "differs. Whether the difference holds over seeds is the question of `lavender study`.",
        "Attention is pooled over heads and layers before the Aligner, which is not part of the tuned model.",
    ]
    lead = (
        "A diffusion model knows where each word of a caption is in the picture. Here a small one, really trained, "
        "taught a small vision-language model while that was fine-tuned as usual."
    )
    return Report(
        "Diffusion Instruction Tuning, computed on this machine",
        lead,
        tables,
        panels,
        notes,
        results["settings"],
        _curves(out),
    )


def _teacher_rows(teacher: dict[str, Any]) -> list[list[Any]]:
    """The teacher's scores with their controls, for people."""
    by_mention = [
        [f"… the thing mentioned {place}", teacher["pointing_by_mention"].get(str(order))]
        for order, place in enumerate(("first", "second", "third", "fourth"))
    ]
    return [
        ["the map's maximum lies in the thing (pointing)", teacher["pointing"]],
        *by_mention,
        ["control: another word's map", teacher["wrong_word_pointing"]],
        ["control: a uniform map", teacher["uniform_pointing"]],
        ["control: a blob in the centre", teacher["centre_pointing"]],
        ["overlap with the true mask at one threshold (IoU)", teacher["iou_fixed"]],
        ["entropy, nats", teacher["entropy"]],
    ]


def _curves(out: Path) -> list[Curve]:
    lines = {arm: [json.loads(line) for line in (out / arm / "metrics.jsonl").read_text().splitlines()] for arm in ARMS}
    return [
        Curve(label, "step", unit, {arm: [(one["step"], one[key]) for one in lines[arm] if key in one] for arm in ARMS})
        for key, label, unit in (
            ("vlm_loss", "L_VLM while training", "nats a token"),
            ("attention_loss", "L_att while training", "mean square"),
        )
    ]
