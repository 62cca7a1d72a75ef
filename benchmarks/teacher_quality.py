"""How good are the teacher's maps, by mode, by lever and by amount of noise, against truth and controls?

    python benchmarks/teacher_quality.py --arms modes --scenes 70 --json quality.json   # 210 development scenes
    python benchmarks/teacher_quality.py --arms levers --json levers.json    # every lever and a sweep of t, 900 scenes
    python benchmarks/teacher_quality.py --split sealed --arms modes --json sealed.json
    python benchmarks/teacher_quality.py --arms null-text --scenes 6 --jobs 1 --keep parts --json null_text.json
    python benchmarks/teacher_quality.py --quick --json smoke.json       # that it runs: one seed, one scene
    python benchmarks/teacher_quality.py --draw levers.json sealed.json --plot quality.png

The built-in world's teacher on the built-in world's scenes. A seed has its own scenes and its own noise; all
arms see the same ones, so they are compared in pairs. The threshold of `iou_fixed` is chosen for each arm on
other development scenes. Captions name every thing of a scene; a thing's map is judged by its true mask.

Controls: another word of the caption (wrong word), a word added to the caption whose thing is not in the picture
(absent word), the same caption on another picture (wrong image), a uniform map, the picture's centre.

Null-text also says how well its way back reconstructs: the latents' mean squared error, and the PSNR of the decoded
picture against the one that was encoded. `vae_psnr` is that of the clean latents: no inversion can do better.
"""

from __future__ import annotations

import argparse
import hashlib
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
NULL_TEXTS: dict[str, dict[str, Any]] = {
    "null-text, 5 inversion steps": NULL_TEXT | {"inversion_steps": 5},
    "null-text, 10 steps × 50 iterations": NULL_TEXT | {"null_text_iterations": 50},
    "null-text, 50 steps × 10 iterations": NULL_TEXT | {"num_steps": 50, "null_text_iterations": 10},
}
"""The other reading of the paper's steps, and those with as many iterations as the tuning needs to converge."""
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


def arm(keep: Path | None, *settings: Any) -> bytes:
    """`run_arm` in another process: as bytes, for each tensor that is sent holds an open file.

    What `keep` holds of an earlier run with the same settings is not measured again.
    """
    kept = keep and keep / f"{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}.pickle"
    if kept and kept.is_file():
        return kept.read_bytes()
    found = pickle.dumps(run_arm(*settings))
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.with_suffix(".part").write_bytes(found)
        kept.with_suffix(".part").rename(kept)
    return found


def run_arm(settings: dict[str, Any], split: str, start: int, count: int, seed: int, controls: int) -> dict[str, Any]:
    """One arm on one seed's scenes. `controls` is on how many of them the costly controls are measured."""
    import torch

    torch.set_num_threads(1)
    from lavender.config import ExtractionConfig
    from lavender.world import TEACHER_PATH
    from lavender.world.scenes import scenes

    config = ExtractionConfig(seed=seed, batch_size=10, **settings)
    teacher = watched_teacher().from_pretrained(TEACHER_PATH, config)
    drawn = list(scenes(split, count, start=start))
    judged, right, confident = judged_maps(teacher, drawn)
    forwards = teacher.family.forwards / len(drawn)
    found = {"judged": judged, "forwards": forwards, "confidence": list(zip(confident, right, strict=True))}
    found |= {
        "latent_mse": list(teacher.reconstruction),
        "psnr": list(teacher.psnr),
        "vae_psnr": list(teacher.vae_psnr),
    }
    if controls:
        found["wrong_image"] = wrong_image(teacher, drawn[:controls])
        found["absent_word"] = absent_word(teacher, drawn[:controls])
    return found


def watched_teacher() -> type:
    """A teacher that also decodes what null-text's way back ends with."""
    import torch

    from lavender.teachers.diffusion.teacher import Teacher

    class Watched(Teacher):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            self.pixels, self.psnr, self.vae_psnr = {}, [], []

        def __call__(self, jobs):
            self.pixels = {job.image_id: torch.from_numpy(self.view(job.image).pixels.copy()) for job in jobs}
            return super().__call__(jobs)

        def record_reconstruction(self, batch, reconstruction, image_ids):
            super().record_reconstruction(batch, reconstruction, image_ids)
            vae = self.pipeline.vae
            for latents, found in ((reconstruction, self.psnr), (batch.latents, self.vae_psnr)):
                decoded = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1).permute(0, 2, 3, 1)
                for name, picture in zip(image_ids, decoded, strict=True):
                    error = (picture - (self.pixels[name] / 127.5 - 1)).square().mean()
                    found.append(float(10 * torch.log10(4 / error)))

    return Watched


def judged_maps(teacher, drawn) -> tuple[list, list[bool], list[float]]:
    """Judged maps of all things, whether each points right, and its confidence."""
    from lavender.evaluation.map_scores import pointing
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
                inside = [place for place, word in enumerate(maps.words) if mention.start <= word.start < mention.end]
                if inside:
                    right.append(pointing(maps.map_of(mention.start, mention.end), scene.mask_of(mention.name)))
                    confident.append(float(maps.confidence[inside].mean()))
    return judged, right, confident


def wrong_image(teacher, drawn) -> list[bool]:
    """Whether a thing's map points at it when the teacher saw the next scene's picture instead."""
    from lavender.data.images import image_id
    from lavender.evaluation.map_scores import pointing
    from lavender.teachers.diffusion.teacher import Job
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
    from lavender.data.images import image_id
    from lavender.evaluation.map_scores import pointing
    from lavender.teachers.diffusion.teacher import Job
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
    from lavender.evaluation.map_scores import score_maps

    every = score_maps([one for run in runs for one in run["judged"]], threshold).to_dict()
    seeds = [score_maps(run["judged"], threshold).to_dict() for run in runs]
    shown = ("pointing", "iou_fixed", "iou_best", "ap", "auroc", "wrong_word_pointing")
    scores = every | {
        "unet_forwards": fmean(run["forwards"] for run in runs),
        "seeds": [{name: one[name] for name in shown} for one in seeds],
        "confidence_auroc": ranking([pair for run in runs for pair in run["confidence"]]),
    }
    for name in ("latent_mse", "psnr", "vae_psnr"):
        if all(run.get(name) for run in runs):
            scores[name] = fmean(one for run in runs for one in run[name])
            for one, run in zip(scores["seeds"], runs, strict=True):
                one[name] = fmean(run[name])
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
    arms: dict[str, dict[str, Any]],
    split: str,
    seeds: Sequence[int],
    count: int,
    jobs: int,
    controls: bool,
    keep: Path | None,
) -> dict[str, Any]:
    """All arms' scores; seed by seed, and of each seed the costly arms first, so that no core waits at the end.

    The longer null-text arms take the threshold of the default null-text: calibrating each would double their cost.
    """
    from lavender.evaluation.map_scores import best_threshold

    os.environ["OMP_NUM_THREADS"] = "1"
    order = sorted(arms, key=lambda name: arms[name].get("mode") != "null-text")
    num_calibration = min(NUM_CALIBRATION, count)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        calibrations = {
            name: pool.submit(arm, keep, arms[name], "development", 500_000, num_calibration, 0, 0)
            for name in order
            if name not in NULL_TEXTS
        }
        runs = {
            (name, seed): pool.submit(
                arm,
                keep,
                arms[name],
                split,
                FIRST_SCENE + 1000 * seed,
                count,
                seed,
                num_controls(name, count) if controls else 0,
            )
            for seed in seeds
            for name in order
        }
        done = {}
        for name in order:
            done[name] = [pickle.loads(runs[name, seed].result()) for seed in seeds]
            print(f"{name}: done", flush=True)
        thresholds = {
            name: best_threshold(pickle.loads(one.result())["judged"])[0] for name, one in calibrations.items()
        }
    reference = done.get("null-text")
    return {
        name: scores_of(
            done[name],
            thresholds["null-text" if name in NULL_TEXTS else name],
            None if "word_share" in arms[name] else reference,
        )
        for name in arms
    }


def num_controls(name: str, count: int) -> int:
    """On how many of a seed's scenes the controls are measured, which cost as much as the arm itself."""
    if name == "null-text":
        return count // 3
    return count if name in MODES else 0


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
    parser.add_argument("--quick", action="store_true", help="that it runs: the modes alone, one seed, one scene")
    parser.add_argument(
        "--arms",
        choices=("modes", "null-text", "levers", "all"),
        default="all",
        help="levers: they and the sweep beside the default mode; null-text: its settings beside the "
        "other modes, without the controls (minutes for each scene)",
    )
    parser.add_argument("--split", choices=("development", "sealed"), default="development")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default: 40 41 42; sealed 1 2 3")
    parser.add_argument("--scenes", type=int, default=None, help="a seed; default 300, with --quick 1")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread")
    parser.add_argument(
        "--keep",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="write each arm's part here as it is done; a later run goes on from there",
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument(
        "--draw",
        type=Path,
        nargs="+",
        default=None,
        metavar="JSON",
        help="measure nothing: --plot of what --json wrote",
    )
    options = parser.parse_args()
    if options.quick and options.split == "sealed":
        parser.error("--quick uses development scenes; the sealed ones are for the number that is reported")
    if options.draw:
        found = [json.loads(path.read_text()) for path in options.draw]
        found.sort(key=lambda one: len(one["modes"]))
        draw({name: value for one in found for name, value in one.items() if value}, options.plot)
        return
    from lavender.config import ExtractionConfig

    seeds = options.seeds or ((1, 2, 3) if options.split == "sealed" else (40,) if options.quick else (40, 41, 42))
    count = options.scenes or (1 if options.quick else 300)
    levers = {"noise": MODES["noise"]} | LEVERS | SWEEP
    wanted = "modes" if options.quick else options.arms
    arms = {"modes": MODES, "null-text": MODES | NULL_TEXTS, "levers": levers, "all": MODES | levers}[wanted]
    scores = measure(arms, options.split, seeds, count, options.jobs, wanted != "null-text", options.keep)
    modes = {name: one for name, one in scores.items() if name.split(",")[0] in MODES}
    found = {
        "default": asdict(ExtractionConfig()),
        "split": options.split,
        "seeds": list(seeds),
        "scenes_a_seed": count,
        "cheapest": cheapest(modes) if "null-text" in modes else None,
        "modes": modes,
        "controls": {name: modes["noise"][name] for name in ("uniform_pointing", "centre_pointing")},
        "levers": {name: scores[name] for name in LEVERS if name in scores},
        "sweep": {name: scores[name] for name in SWEEP if name in scores},
    }
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
