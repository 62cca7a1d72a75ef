"""`lavender demo`: a student learns new words from few captions, plain and aligned, on this computer in some minutes.

Scenes → the teacher's word maps → plain and aligned fine-tuning from one base, with the same data, steps and seed →
scores on held-out scenes → one HTML page. The two runs are arms of `lavender study new-words`, at a seed of their own.
Training is the command that a user runs, `lavender train`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lavender.data.store import MapStore
from lavender.evaluation.answers import names_said
from lavender.evaluation.compare import Observed, Phrase, panels_of
from lavender.evaluation.map_scores import MapScores
from lavender.evaluation.report.figure import draw_figure
from lavender.evaluation.report.page import Curve, Panel, Report, Table, write_report
from lavender.files import write_whole
from lavender.teachers.diffusion.teacher import Teacher
from lavender.world import STUDENT_PATHS
from lavender.world.judging import captioned_picture, job_of, score_new_words, score_teacher
from lavender.world.language import caption_scene
from lavender.world.scenes import Scene, Split, scenes
from lavender.world.sprites import NAMES, NEW_NAMES
from lavender.world.studies import new_words
from lavender.world.studies.cells import SCENES_PER_SEED, write_samples
from lavender.world.studies.study import METRICS
from lavender.world.studies.targets import write_target
from lavender.world.studies.tasks import TASKS
from lavender.world.tuning import ONE_THREAD, load_teacher, run_paths, stop_processes

NUM_CAPTIONS, NUM_HELD_OUT, NUM_PANELS, NUM_IN_FIGURE = new_words.CONTROLLED, 200, 6, 3
SEED = 0
"""No study has this seed, so the demo has captions of its own."""
_STUDY_ARMS = new_words.arms(quick=False)
ARMS = {"plain": _STUDY_ARMS[f"plain {NUM_CAPTIONS}"], "aligned": _STUDY_ARMS[f"recipe {NUM_CAPTIONS}"]}
"""Arm → how it is fine-tuned. The arms differ in the settings of alignment alone."""
BASE, TASK = ARMS["plain"].base, TASKS[ARMS["plain"].task]
PROBE = {"probe_size": 16, "probe_steps": 20}
"""Measures attention in both runs, for the page's curves. Training is the same without it."""
CHOICE = (
    "the first held-out scenes of two or three things in which one of the two fine-tuned students names a new thing "
    "rightly, and the other does not"
)
"""The rule by which the page's pictures are chosen. It does not say which of the two students is right."""
NEW_MARK = " (new)"
"""After a new name, on the page and in the figure."""


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
    with stages(
        "scenes",
        f"drawing {NUM_CAPTIONS} captioned scenes, {TASK.num_replayed} to replay, and {NUM_HELD_OUT} held-out scenes",
    ):
        first_caption = SEED * SCENES_PER_SEED
        examples, replayed = TASK.examples(first_caption, NUM_CAPTIONS), TASK.replayed(first_caption)
        held_out = list(scenes(split, NUM_HELD_OUT, start=start))
    with stages("maps", "extracting the teacher's word maps"):
        teacher, summary = load_teacher(), write_samples(out, examples, replayed)
        shutil.rmtree(out / "name_maps", ignore_errors=True)
        write_target(out / "name_maps", "teacher", MapStore.open(out / "maps"), examples + replayed)
        print(f"  {summary.records} captions, {summary.words} word maps, {len(summary.dropped)} dropped")
    with stages("teacher scores", "scoring the teacher's maps"):
        teacher_scores = score_teacher(teacher, held_out)
    with stages("training", f"fine-tuning the student twice: {' and '.join(ARMS)}"):
        print(f"  logs: {', '.join(f'{arm}.log' for arm in ARMS)}", flush=True)
        train_arms(out)
    students, observed = {}, {}
    with stages("student scores", "scoring the base and both fine-tuned students"):
        for arm, path in {"base": STUDENT_PATHS[BASE], **{arm: out / arm for arm in ARMS}}.items():
            students[arm], observed[arm] = score_new_words(path, held_out)
    with stages("report", "writing the report"):
        results = _results(teacher_scores, students, stages.seconds)
        panels = _panels(held_out, teacher, observed)
        draw_figure([_of_new_names(panel) for panel in panels[:NUM_IN_FIGURE]], out / "figure.png")
        write_report(_report(results, panels, out), out / "report.html")
    results["seconds"] = stages.seconds
    write_whole(out / "results.json", json.dumps(results, indent=1))
    print(f"\n{summary_of(students)}\n\nOpen {out / 'report.html'}")
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
    write_whole(out / f"{arm}.yaml", yaml.safe_dump(run_settings(out, arm), sort_keys=False))
    command = [sys.executable, "-m", "lavender.cli", "train", str(out / f"{arm}.yaml"), "--restart"]
    with (out / f"{arm}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD)


def run_settings(out: Path, arm: str) -> dict[str, Any]:
    """The run file of an arm, as `lavender train` reads it."""
    paths = run_paths(BASE, out / "pictures", out / "name_maps", out / arm) | {"replay_data": str(out / "replayed")}
    return paths | {"freeze": list(ARMS[arm].freeze)} | ARMS[arm].training(SEED) | PROBE


def summary_of(students: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores as a table of at most 80 columns, and a sentence that says what they mean.

    Args:
        students: "base", "plain" and "aligned" → scores of `score_new_words`.
    """
    arms = ("base", *ARMS)
    lines = [f"{'':44}" + "".join(f"{arm:>9}" for arm in arms)]
    for key in new_words.METRICS_SHOWN:
        lines.append(f"{METRICS[key]:44}" + "".join(f"{students[arm][key]:>9.3f}" for arm in arms))
    study = "`lavender study new-words` compares several seeds, with controls."
    return "\n".join([*lines, "", *textwrap.wrap(f"{meaning_of(students)} {study}", 80)])


def meaning_of(students: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence on how aligned compares with plain."""

    def compared(key: str) -> str:
        plain, aligned = (round(students[arm][key], 3) for arm in ("plain", "aligned"))
        outcome = "better" if aligned > plain else "worse" if aligned < plain else "equally well"
        return f"{outcome} (F1 {aligned:.3f}, plain {plain:.3f})"

    return (
        f"From the same {NUM_CAPTIONS} captions, compared with the plain student, the aligned one names new things "
        f"{compared('new_names')}, known things {compared('known_names')}, and all things together "
        f"{compared('all_names')}. This is one seed."
    )


def _results(teacher: MapScores, students: dict[str, dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """The content of `results.json`: each arm's scores are lists with one number per seed."""
    keys = [key for key in students["base"] if key != "entropies"]
    return {
        "teacher": teacher.to_dict(),
        "students": {BASE: {key: {arm: [scores[key]] for arm, scores in students.items()} for key in keys}},
        "seconds": seconds,
        "seeds": [SEED],
        "settings": _settings(),
    }


def _settings() -> dict[str, Any]:
    """What both runs share, then what is different in each."""
    runs = {arm: {"freeze": list(ARMS[arm].freeze)} | ARMS[arm].training(SEED) for arm in ARMS}
    plain, aligned = runs.values()
    shared = {key: value for key, value in plain.items() if key in aligned and aligned[key] == value}
    return {
        "num_captions": NUM_CAPTIONS,
        "num_replayed": TASK.num_replayed,
        "num_held_out": NUM_HELD_OUT,
        **shared,
        **{arm: {key: value for key, value in run.items() if key not in shared} for arm, run in runs.items()},
    }


def chosen_scenes(held_out: list[Scene], plain: Sequence[str], aligned: Sequence[str]) -> list[int]:
    """The indices of the pictures on the page, by the rule `CHOICE`, from the answers of both students."""
    return [
        index
        for index, (scene, *answers) in enumerate(zip(held_out, plain, aligned, strict=True))
        if 2 <= len(scene.things) <= 3
        and len({frozenset(names_said(answer, NEW_NAMES) & set(scene.names)) for answer in answers}) > 1
    ][:NUM_PANELS]


def _panels(held_out: list[Scene], teacher: Teacher, observed: dict[str, Observed]) -> list[Panel]:
    """For each name of the chosen scenes its true mask, the teacher's map and the students'."""
    chosen = chosen_scenes(held_out, *(observed[arm].answers for arm in ARMS))
    shown = [held_out[index] for index in chosen]
    teacher_maps = teacher([job_of(scene, caption_scene(scene).text, teacher.config) for scene in shown])
    shown_by_arm = {
        arm: Observed([student.answers[i] for i in chosen], [student.maps[i] for i in chosen])
        for arm, student in observed.items()
    }
    phrases = [
        [
            Phrase(
                mention.name + (NEW_MARK if mention.name in NEW_NAMES else ""),
                mention.start,
                mention.end,
                scene.mask_of(mention.name),
            )
            for mention in caption_scene(scene).mentions
        ]
        for scene in shown
    ]
    titles = [f"scene {scene.seed}" for scene in shown]
    return panels_of([captioned_picture(scene) for scene in shown], phrases, teacher_maps, shown_by_arm, titles)


def _of_new_names(panel: Panel) -> Panel:
    """The panel with its new names alone, and without the base."""
    rows = [
        replace(row, maps={source: heat for source, heat in row.maps.items() if source != "base"})
        for row in panel.rows
        if row.word.endswith(NEW_MARK)
    ]
    return replace(panel, rows=rows, answers={arm: panel.answers[arm] for arm in ARMS})


def _report(results: dict[str, Any], panels: list[Panel], out: Path) -> Report:
    students = results["students"][BASE]
    rows = [[METRICS[key], *(students[key][arm][0] for arm in ("base", *ARMS))] for key in new_words.METRICS_SHOWN]
    scores = {arm: {key: values[arm][0] for key, values in students.items()} for arm in ("base", *ARMS)}
    note = f"Each score is over {NUM_HELD_OUT} held-out scenes. One seed."
    return Report(
        title=f"New words from {NUM_CAPTIONS} captions, on the built-in world",
        lead=f"A small vision-language model learns new words. Its vision tower has seen {len(NAMES)} kinds of things; "
        f"its language side never heard the names of {len(NEW_NAMES)} of them. It is fine-tuned twice on the same "
        f"{NUM_CAPTIONS} captions: plain, and aligned, where word maps of a small diffusion model guide its "
        f"attention.\n\n{meaning_of(scores)}",
        tables=[
            Table("The student", ["score", "base", *ARMS], rows, note),
            Table("The teacher's maps", ["score", "value"], _teacher_rows(results["teacher"]), note),
        ],
        panels=panels,
        notes=[
            f"The pictures are {CHOICE}. The rule does not say which of the two. A new name is marked.",
            "One seed. Both fine-tuned students start from the same base, with the same captions, steps and seed; only "
            "the settings of alignment differ. `lavender study new-words` shows whether the difference holds over "
            "several seeds.",
            "F1 compares the names in a caption with the things in the scene. A map points correctly if its maximum "
            "lies in the thing's true mask. The share of attention on the thing is the share of the map that lies in "
            "this mask.",
            "A student's map is its own attention to the picture where it predicts the word, the mean over heads and "
            "layers. Words of the true caption are mapped, whether the student says them or not.",
            "The words that are aligned are the names of things, as in the study.",
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
        ["share of the map on the thing", teacher["mass"]],
        ["IoU with the true mask, at one threshold", teacher["iou_fixed"]],
        ["entropy, nats", teacher["entropy"]],
    ]


def _curves(out: Path) -> list[Curve]:
    logs = {arm: [json.loads(line) for line in (out / arm / "metrics.jsonl").read_text().splitlines()] for arm in ARMS}
    return [
        Curve(title, "step", unit, {arm: [(row["step"], row[key]) for row in logs[arm] if key in row] for arm in ARMS})
        for key, title, unit in (
            ("vlm_loss", "L_VLM in training", "nats per token"),
            ("probe_attention_mass", "Attention on the teacher's map, training scenes", "share"),
        )
    ]
