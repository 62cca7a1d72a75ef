"""How good are the teacher's maps, by mode, by lever and by amount of noise, against truth and controls?

    python benchmarks/teacher_quality.py --quick --json quality.json     # the modes, 210 development scenes
    python benchmarks/teacher_quality.py --arms levers --json levers.json    # every lever and a sweep of t, 900 scenes
    python benchmarks/teacher_quality.py --split sealed --arms modes --json sealed.json
    python benchmarks/teacher_quality.py --draw levers.json sealed.json --plot quality.png

The built-in world's teacher on the built-in world's scenes. A seed has its own scenes and its own noise; all
arms see the same ones, so they are compared in pairs. The threshold of `iou_fixed` is chosen for each arm on
other development scenes. Captions name every thing of a scene; a thing's map is judged by its true mask.

Controls: another word of the caption (wrong word), a word added to the caption whose thing is not in the picture
(absent word), the same caption on another picture (wrong image), a uniform map, the picture's centre.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

NULL_TEXT = {"mode": "null-text", "num_steps": 10, "null_text_iterations": 5}
MODES: dict[str, dict[str, Any]] = {
    "noise": {},
    "noise, 4 noises": {"num_noises": 4},
    "ddim": {"mode": "ddim", "num_steps": 10},
    "null-text": NULL_TEXT,
}
SECOND_READING = {"null-text, 5 inversion steps": NULL_TEXT | {"inversion_steps": 5}}
LEVERS: dict[str, dict[str, Any]] = {
    "geometry squash": {"geometry": "squash"},
    "geometry letterbox": {"geometry": "letterbox"},
    "geometry crop": {"geometry": "crop"},
    "layers of 16 × 16 alone": {"layer_weights": {"mid_block": 0.0, "down_blocks.1": 0.0, "up_blocks.0": 0.0}},
    "layers of 8 × 8 alone": {"layer_weights": {"down_blocks.0": 0.0, "up_blocks.1": 0.0}},
    "half of the heads": {"head_share": 0.5},
    "competition share": {"competition": "share"},
    "competition contrast": {"competition": "contrast"},
    "carrier own+next": {"carrier": "own+next"},
    "refine 1": {"refine": 1},
    "refine 2": {"refine": 2},
    "flip": {"flip": True},
    "half of the words": {"word_share": 0.5},
}
SWEEP = {f"t = {t}": {"timesteps": (t,)} for t in (1, 10, 25, 50, 75, 100, 200, 300, 500)}
NUM_CALIBRATION = 40
FIRST_SCENE = 10_000  # of a split, for seed 0; each seed has 1,000 scenes of its own


def arm(*settings: Any) -> bytes:
    """`run_arm` in another process: as bytes, for each tensor that is sent holds an open file."""
    return pickle.dumps(run_arm(*settings))


def run_arm(settings: dict[str, Any], split: str, start: int, count: int, seed: int, controls: int) -> dict[str, Any]:
    """One arm on one seed's scenes. `controls` is on how many of them the costly controls are measured."""
    import torch

    torch.set_num_threads(1)
    from lavender.config import ExtractionConfig
    from lavender.diffusion.teacher import Teacher
    from lavender.world import TEACHER_PATH
    from lavender.world.scenes import scenes

    config = ExtractionConfig(seed=seed, batch_size=10, **settings)
    teacher = Teacher.from_pretrained(TEACHER_PATH, config)
    drawn = list(scenes(split, count, start=start))
    judged, right, confident = judged_maps(teacher, drawn)
    forwards = teacher.family.forwards / len(drawn)
    found = {"judged": judged, "forwards": forwards, "confidence": list(zip(confident, right, strict=True))}
    if controls:
        found["wrong_image"] = wrong_image(teacher, drawn[:controls])
        found["absent_word"] = absent_word(teacher, drawn[:controls])
    return found


def judged_maps(teacher, drawn) -> tuple[list, list[bool], list[float]]:
    """Judged maps of all things, whether each points right, and its confidence."""
    from lavender.evaluation.maps import pointing
    from lavender.world.judging import job_of, judge
    from lavender.world.language import caption_scene

    judged, right, confident = [], [], []
    size = teacher.config.batch_size
    for first in range(0, len(drawn), size):
        group = [(scene, caption_scene(scene)) for scene in drawn[first : first + size]]
        found = teacher([job_of(scene, caption.text, teacher.config) for scene, caption in group])
        for (scene, caption), maps in zip(group, found, strict=True):
            judged += judge(scene, caption, maps)
            for mention in caption.mentions:
                inside = [
                    place for place, word in enumerate(maps.words) if mention.start <= word.start < mention.end
                ]  # fmt: skip
                if inside:
                    right.append(pointing(maps.map_of(mention.start, mention.end), scene.mask_of(mention.name)))
                    confident.append(float(maps.confidence[inside].mean()))
    return judged, right, confident


def wrong_image(teacher, drawn) -> list[bool]:
    """Whether a thing's map points at it when the teacher saw the next scene's picture instead."""
    from lavender.diffusion.teacher import Job
    from lavender.evaluation.maps import pointing
    from lavender.images import image_id
    from lavender.words import content_words
    from lavender.world.language import caption_scene

    points, jobs = [], []
    for scene, other in zip(drawn, [*drawn[1:], drawn[0]], strict=True):
        text = caption_scene(scene).text
        words = content_words(text, teacher.config.parts_of_speech)
        jobs.append(Job(other.image, image_id(other.image), text, words))
    size = teacher.config.batch_size
    found = [maps for first in range(0, len(jobs), size) for maps in teacher(jobs[first : first + size])]
    for scene, maps in zip(drawn, found, strict=True):
        for mention in caption_scene(scene).mentions:
            own = maps.map_of(mention.start, mention.end)
            points += [] if own is None else [pointing(own, scene.mask_of(mention.name))]
    return points


def absent_word(teacher, drawn) -> list[bool]:
    """Whether the map of a name that was added to the caption, its thing in no place, points at a thing named."""
    from lavender.diffusion.teacher import Job
    from lavender.evaluation.maps import pointing
    from lavender.images import image_id
    from lavender.words import content_words
    from lavender.world.language import caption_scene
    from lavender.world.sprites import NAMES

    points, jobs, starts = [], [], []
    for scene in drawn:
        absent = [name for name in NAMES if name not in scene.names]
        name = absent[scene.seed % len(absent)]
        text = caption_scene(scene).text.rstrip(".") + f" and a {name}."
        starts.append(text.rindex(name))
        jobs.append(Job(scene.image, image_id(scene.image), text, content_words(text, teacher.config.parts_of_speech)))
    size = teacher.config.batch_size
    found = [maps for first in range(0, len(jobs), size) for maps in teacher(jobs[first : first + size])]
    for scene, maps, start in zip(drawn, found, starts, strict=True):
        own = maps.map_of(start, len(maps.text))
        points += [] if own is None else [pointing(own, thing.mask) for thing in scene.things]
    return points


def scores_of(runs: Sequence[dict[str, Any]], threshold: float, reference: Sequence[dict] | None) -> dict[str, Any]:
    """An arm's scores: over all of its seeds, and each seed's own."""
    from lavender.evaluation.maps import score_maps

    every = score_maps([one for run in runs for one in run["judged"]], threshold).to_dict()
    seeds = [score_maps(run["judged"], threshold).to_dict() for run in runs]
    shown = ("pointing", "iou_fixed", "iou_best", "ap", "auroc", "wrong_word_pointing")
    scores = every | {
        "unet_forwards": fmean(run["forwards"] for run in runs),
        "seeds": [{name: one[name] for name in shown} for one in seeds],
        "confidence_auroc": ranking([pair for run in runs for pair in run["confidence"]]),
    }
    for control in ("wrong_image", "absent_word"):
        points = [point for run in runs for point in run.get(control, [])]
        scores |= {f"{control}_pointing": fmean(points), f"num_{control}": len(points)} if points else {}
    if reference is not None:
        pairs = [
            correlation(one.map, other.map)
            for run, same in zip(runs, reference, strict=True)
            for one, other in zip(run["judged"], same["judged"], strict=True)
        ]
        scores["correlation_with_null_text"] = fmean(pairs)
    return scores


def ranking(pairs: Sequence[tuple[float, bool]]) -> float | None:
    """Chance that a map that points right has the higher confidence, ties half; None where all do, or none."""
    right = [confidence for confidence, points in pairs if points]
    wrong = [confidence for confidence, points in pairs if not points]
    if not right or not wrong:
        return None
    return fmean((one > other) + (one == other) / 2 for one in right for other in wrong)


def correlation(one, other) -> float:
    import torch

    return float(torch.corrcoef(torch.stack([one.flatten().double(), other.flatten().double()]))[0, 1].nan_to_num())


def cheapest(modes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The cheapest mode that is not below null-text's mean by more than null-text's spread over seeds."""
    reference, shown = modes["null-text"], ("pointing", "ap", "iou_fixed")
    floor = {}
    for name in shown:
        values = [one[name] for one in reference["seeds"]]
        floor[name] = reference[name] - (max(values) - min(values))
    fit = [mode for mode, scores in modes.items() if all(scores[name] >= floor[name] for name in shown)]
    return {"mode": min(fit, key=lambda mode: modes[mode]["unet_forwards"]), "floor": floor, "not_below": fit}


def measure(
    arms: dict[str, dict[str, Any]], split: str, seeds: Sequence[int], count: int, jobs: int, quick: bool
) -> dict[str, Any]:
    """All arms' scores. Costly arms first, so that no core waits at the end."""
    from lavender.evaluation.maps import best_threshold

    os.environ["OMP_NUM_THREADS"] = "1"
    order = sorted(arms, key=lambda name: arms[name].get("mode") != "null-text")
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        calibrations = {
            name: pool.submit(arm, arms[name], "development", 500_000, NUM_CALIBRATION, 0, 0) for name in order
        }
        runs = {
            name: [
                pool.submit(
                    arm, arms[name], split, FIRST_SCENE + 1000 * seed, count, seed,
                    count // (7 if quick else 3) if name.startswith("null-text") else count if name in MODES else 0,
                )
                for seed in seeds
            ]
            for name in order
        }  # fmt: skip
        done = {}
        for name in order:
            done[name] = [pickle.loads(run.result()) for run in runs[name]]
            print(f"{name}: done", flush=True)
        thresholds = {
            name: best_threshold(pickle.loads(one.result())["judged"])[0] for name, one in calibrations.items()
        }
    reference = done.get("null-text")
    return {
        name: scores_of(done[name], thresholds[name], None if "word_share" in arms[name] else reference)
        for name in arms
    }  # fmt: skip


def draw(found: dict[str, Any], path: Path) -> None:
    """Quality against cost by mode, and against the amount of noise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name, scores in found["modes"].items():
        values = [seed["pointing"] for seed in scores["seeds"]]
        low, high = scores["pointing"] - min(values), max(values) - scores["pointing"]
        axes[0].errorbar(
            scores["unet_forwards"], scores["pointing"], yerr=[[max(low, 0)], [max(high, 0)]], fmt="o", label=name
        )
    axes[0].set(xscale="log", xlabel="UNet forwards an image", ylabel="pointing (range over seeds)")
    axes[0].legend(frameon=False, fontsize=8)
    sweep = {int(name.removeprefix("t = ")): scores for name, scores in found.get("sweep", {}).items()}
    for score in ("pointing", "ap", "iou_fixed"):
        axes[1].plot(list(sweep), [one[score] for one in sweep.values()], "o-", label=score)
    axes[1].set(xlabel="timestep of the one noising, of 1000", ylabel="mean over seeds")
    axes[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the modes alone, 70 scenes a seed")
    parser.add_argument("--arms", choices=("modes", "levers", "all"), default="all",
                        help="levers: they and the sweep beside the default mode; --quick is modes")  # fmt: skip
    parser.add_argument("--split", choices=("development", "sealed"), default="development")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default: 40 41 42; sealed 1 2 3")
    parser.add_argument("--scenes", type=int, default=None, help="a seed; default 300, with --quick 70")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--draw", type=Path, nargs="+", default=None, metavar="JSON",
                        help="measure nothing: --plot of what --json wrote")  # fmt: skip
    options = parser.parse_args()
    if options.quick and options.split == "sealed":
        parser.error("--quick uses development scenes; the sealed ones are for the number that is reported")
    if options.draw:
        found = [json.loads(path.read_text()) for path in options.draw]
        found.sort(key=lambda one: len(one["modes"]))
        draw({name: value for one in found for name, value in one.items() if value}, options.plot)
        return
    from lavender.config import ExtractionConfig

    seeds = options.seeds or ((1, 2, 3) if options.split == "sealed" else (40, 41, 42))
    count = options.scenes or (70 if options.quick else 300)
    levers = {"noise": MODES["noise"]} | LEVERS | SWEEP
    wanted = "modes" if options.quick else options.arms
    arms = {"modes": MODES, "levers": levers, "all": MODES | SECOND_READING | levers}[wanted]
    scores = measure(arms, options.split, seeds, count, options.jobs, options.quick)
    modes = {name: one for name, one in scores.items() if name.split(",")[0] in MODES}
    found = {
        "default": asdict(ExtractionConfig()), "split": options.split, "seeds": list(seeds), "scenes_a_seed": count,
        "cheapest": cheapest(modes) if "null-text" in modes else None, "modes": modes,
        "controls": {name: modes["noise"][name] for name in ("uniform_pointing", "centre_pointing")},
        "levers": {name: scores[name] for name in LEVERS if name in scores},
        "sweep": {name: scores[name] for name in SWEEP if name in scores},
    }  # fmt: skip
    for name, one in scores.items():
        print(
            f"{name:30s} forwards {one['unet_forwards']:6.1f}  pointing {one['pointing']:.3f}  "
            f"iou_fixed {one['iou_fixed']:.3f}  ap {one['ap']:.3f}  wrong word {one['wrong_word_pointing']:.3f}"
        )
    if found["cheapest"]:
        print(f"cheapest mode not below null-text: {found['cheapest']['mode']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
