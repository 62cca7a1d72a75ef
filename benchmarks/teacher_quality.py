"""Quality of the teacher's maps by extraction mode, by setting and by amount of noise, with controls.

    python benchmarks/teacher_quality.py --arms modes --scenes 70 --json quality.json   # 210 development scenes
    python benchmarks/teacher_quality.py --arms levers --json levers.json    # settings and timesteps, 900 scenes
    python benchmarks/teacher_quality.py --split sealed --arms modes --json sealed.json
    python benchmarks/teacher_quality.py --arms null-text --scenes 6 --jobs 1 --keep parts --json null_text.json
    python benchmarks/teacher_quality.py --quick --json smoke.json       # smoke test: one seed, one scene
    python benchmarks/teacher_quality.py --draw levers.json sealed.json --plot quality.png

The teacher is the built-in world's, on the world's scenes. Each seed has its own scenes and noise, and all arms get the
same ones, so arms can be compared in pairs. The threshold of `iou_fixed` is chosen per arm on other development scenes.
Captions name every thing of a scene. A thing's map is compared with its true mask.

Controls: the map of another word of the caption (wrong word), of an added word whose thing is not in the picture
(absent word), of the same caption on another picture (wrong image), a uniform map, and the picture's centre.

For null-text inversion the reconstruction is measured too: the mean squared error of the latents, and the PSNR of the
decoded picture against the encoded one. `vae_psnr` is the PSNR of the clean latents, an upper bound of any inversion.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavender.world.scenes import Split

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
"""Another reading of the paper's steps, and settings with enough iterations for the null-text to converge."""
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
TIMESTEPS = {f"t = {t}": {"timesteps": (t,)} for t in (1, 10, 25, 50, 75, 100, 200, 300, 500)}
NUM_CALIBRATION = 40
FIRST_SCENE = 10_000  # in a split, for seed 0; each seed has its own 1,000 scenes


def pickled_arm(keep: Path | None, *settings: Any) -> bytes:
    """The result of `run_arm(*settings)`, pickled; tensors sent between processes would each hold an open file.

    Args:
        keep: a folder of results. A result that is in it is read instead of measured again.
    """
    path = keep and keep / f"{_key_of(*settings)}.pickle"
    if path and path.is_file():
        return path.read_bytes()
    result = pickle.dumps(run_arm(*settings))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_bytes(result)
        path.with_suffix(".part").rename(path)
    return result


def _key_of(settings: dict[str, Any], *more: Any) -> str:
    """The name of a result: of all settings, the defaults too, and of the teacher's weights."""
    from lavender.config import ExtractionConfig
    from lavender.data.fingerprints import digest_of_folder
    from lavender.world import TEACHER_PATH

    facts = asdict(ExtractionConfig(**settings)), digest_of_folder(TEACHER_PATH), more
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def run_arm(settings: dict[str, Any], split: Split, start: int, count: int, seed: int, controls: int) -> dict[str, Any]:
    """One arm on one seed's scenes; the costly controls are measured on the first `controls` of them."""
    import torch

    torch.set_num_threads(1)
    from lavender.config import ExtractionConfig
    from lavender.world import TEACHER_PATH
    from lavender.world.scenes import scenes

    seeded = {"seed": seed} if settings.get("mode", "noise") == "noise" else {}  # other modes draw no noise
    config = ExtractionConfig(batch_size=10, **settings, **seeded)
    teacher = decoding_teacher().from_pretrained(TEACHER_PATH, config)
    drawn = list(scenes(split, count, start=start))
    judged, confidence = judged_maps(teacher, drawn)
    result = {
        "judged": judged,
        "confidence": confidence,
        "forwards": teacher.family.forwards / len(drawn),
        "latent_mse": list(teacher.reconstruction),
        "psnr": list(teacher.psnr),
        "vae_psnr": list(teacher.vae_psnr),
    }
    if controls:
        result["wrong_image"] = wrong_image(teacher, drawn[:controls])
        result["absent_word"] = absent_word(teacher, drawn[:controls])
    return result


def decoding_teacher() -> Any:
    """A teacher class that also decodes the latents of null-text inversion, to measure their PSNR."""
    import torch

    from lavender.teachers.diffusion.teacher import Teacher

    class DecodingTeacher(Teacher):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.pixels, self.psnr, self.vae_psnr = {}, [], []

        def __call__(self, jobs):
            self.pixels = {job.image_id: torch.from_numpy(self.view(job.image).pixels.copy()) for job in jobs}
            return super().__call__(jobs)

        def record_reconstruction(self, batch, reconstruction, image_ids):
            super().record_reconstruction(batch, reconstruction, image_ids)
            vae = self.pipeline.vae
            for latents, psnr in ((reconstruction, self.psnr), (batch.latents, self.vae_psnr)):
                decoded = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1).permute(0, 2, 3, 1)
                for image_id, picture in zip(image_ids, decoded, strict=True):
                    error = (picture - (self.pixels[image_id] / 127.5 - 1)).square().mean()
                    psnr.append(float(10 * torch.log10(4 / error)))

    return DecodingTeacher


def judged_maps(teacher, drawn) -> tuple[list, list[tuple[float, bool]]]:
    """The judged maps of all things; and of each thing its map's confidence, and whether the map points at it."""
    from lavender.evaluation.map_scores import pointing
    from lavender.world.judging import job_of, judge
    from lavender.world.language import caption_scene

    judged, confidence = [], []
    captions = [caption_scene(scene) for scene in drawn]
    jobs = [job_of(scene, caption.text, teacher.config) for scene, caption in zip(drawn, captions, strict=True)]
    for scene, caption, maps in zip(drawn, captions, maps_of(teacher, jobs), strict=True):
        judged += judge(scene, caption, maps)
        for mention in caption.mentions:
            inside = [index for index, word in enumerate(maps.words) if mention.start <= word.start < mention.end]
            if inside:
                points = pointing(maps.map_of(mention.start, mention.end), scene.mask_of(mention.name))
                confidence.append((float(maps.confidence[inside].mean()), points))
    return judged, confidence


def maps_of(teacher, jobs: Sequence[Any]) -> list[Any]:
    """The teacher's word maps of the jobs, computed in batches."""
    size = teacher.config.batch_size
    return [maps for start in range(0, len(jobs), size) for maps in teacher(jobs[start : start + size])]


def wrong_image(teacher, drawn) -> list[bool]:
    """Of each thing, whether its map points at it although the teacher was given the next scene's picture."""
    from dataclasses import replace

    from lavender.data.images import image_id
    from lavender.evaluation.map_scores import pointing
    from lavender.world.judging import job_of
    from lavender.world.language import caption_scene

    points, captions = [], [caption_scene(scene) for scene in drawn]
    jobs = [
        replace(job_of(scene, caption.text, teacher.config), image=other.image, image_id=image_id(other.image))
        for scene, caption, other in zip(drawn, captions, [*drawn[1:], drawn[0]], strict=True)
    ]
    for scene, caption, maps in zip(drawn, captions, maps_of(teacher, jobs), strict=True):
        for mention in caption.mentions:
            heat = maps.map_of(mention.start, mention.end)
            points += [] if heat is None else [pointing(heat, scene.mask_of(mention.name))]
    return points


def absent_word(teacher, drawn) -> list[bool]:
    """Of each thing, whether the map of a name that was added to the caption, but is not in the scene, points at it."""
    from lavender.evaluation.map_scores import pointing
    from lavender.world.judging import job_of
    from lavender.world.language import caption_scene
    from lavender.world.sprites import NAMES

    points, jobs, starts = [], [], []
    for scene in drawn:
        absent = [name for name in NAMES if name not in scene.names]
        name = absent[scene.seed % len(absent)]
        text = caption_scene(scene).text.rstrip(".") + f" and a {name}."
        starts.append(text.rindex(name))
        jobs.append(job_of(scene, text, teacher.config))
    for scene, maps, start in zip(drawn, maps_of(teacher, jobs), starts, strict=True):
        heat = maps.map_of(start, len(maps.text))
        points += [] if heat is None else [pointing(heat, thing.mask) for thing in scene.things]
    return points


def scores_of(runs: Sequence[dict[str, Any]], threshold: float, reference: Sequence[dict] | None) -> dict[str, Any]:
    """An arm's scores: over all seeds together, and of each seed."""
    from lavender.evaluation.map_scores import score_maps

    overall = score_maps([judged for run in runs for judged in run["judged"]], threshold).to_dict()
    seeds = [score_maps(run["judged"], threshold).to_dict() for run in runs]
    shown = ("pointing", "iou_fixed", "iou_best", "ap", "auroc", "wrong_word_pointing")
    scores: dict[str, Any] = overall | {
        "unet_forwards": fmean(run["forwards"] for run in runs),
        "seeds": [{name: seed[name] for name in shown} for seed in seeds],
        "confidence_auroc": confidence_auroc([pair for run in runs for pair in run["confidence"]]),
    }
    for name in ("latent_mse", "psnr", "vae_psnr"):
        if all(run.get(name) for run in runs):
            scores[name] = fmean(value for run in runs for value in run[name])
            for seed_scores, run in zip(scores["seeds"], runs, strict=True):
                seed_scores[name] = fmean(run[name])
    for control in ("wrong_image", "absent_word"):
        points = [point for run in runs for point in run.get(control, [])]
        scores |= {f"{control}_pointing": fmean(points), f"num_{control}": len(points)} if points else {}
    if reference is not None:
        pairs = [
            correlation(judged.map, same_word.map)
            for run, reference_run in zip(runs, reference, strict=True)
            for judged, same_word in zip(run["judged"], reference_run["judged"], strict=True)
        ]
        scores["correlation_with_null_text"] = fmean(pairs)
    return scores


def confidence_auroc(pairs: Sequence[tuple[float, bool]]) -> float | None:
    """Probability that a correct map has a higher confidence than a wrong one; None if there are not both.

    Args:
        pairs: of each map its confidence, and whether it points at its thing.
    """
    right = [confidence for confidence, points in pairs if points]
    wrong = [confidence for confidence, points in pairs if not points]
    if not right or not wrong:
        return None
    return fmean((good > bad) + (good == bad) / 2 for good in right for bad in wrong)


def correlation(first, second) -> float:
    """Pearson correlation of two maps."""
    import torch

    values = torch.stack([first.flatten().double(), second.flatten().double()])
    return float(torch.corrcoef(values)[0, 1].nan_to_num())


def cheapest(modes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The cheapest mode whose scores are at most null-text's spread over seeds below null-text's mean."""
    reference, shown = modes["null-text"], ("pointing", "ap", "iou_fixed")
    floor = {}
    for name in shown:
        values = [seed[name] for seed in reference["seeds"]]
        floor[name] = reference[name] - (max(values) - min(values))
    as_good = [mode for mode, scores in modes.items() if all(scores[name] >= floor[name] for name in shown)]
    return {"mode": min(as_good, key=lambda mode: modes[mode]["unet_forwards"]), "floor": floor, "not_below": as_good}


def measure(
    arms: dict[str, dict[str, Any]],
    split: str,
    seeds: Sequence[int],
    count: int,
    jobs: int,
    controls: bool,
    keep: Path | None,
) -> dict[str, Any]:
    """The scores of all arms, measured in parallel. Costly arms start first, so that no core idles at the end.

    The longer null-text arms use the threshold of the default null-text, because each calibration costs as much as the
    arm itself.
    """
    from lavender.evaluation.map_scores import best_threshold

    os.environ["OMP_NUM_THREADS"] = "1"
    order = sorted(arms, key=lambda name: arms[name].get("mode") != "null-text")
    num_calibration = min(NUM_CALIBRATION, count)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        calibrations = {
            name: pool.submit(pickled_arm, keep, arms[name], "development", 500_000, num_calibration, 0, 0)
            for name in order
            if name not in NULL_TEXTS
        }
        runs = {
            (name, seed): pool.submit(
                pickled_arm,
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
        results = {}
        for name in order:
            results[name] = [pickle.loads(runs[name, seed].result()) for seed in seeds]
            print(f"{name}: done", flush=True)
        thresholds = {
            name: best_threshold(pickle.loads(future.result())["judged"])[0] for name, future in calibrations.items()
        }
    reference = results.get("null-text")
    return {
        name: scores_of(
            results[name],
            thresholds["null-text" if name in NULL_TEXTS else name],
            None if "word_share" in arms[name] else reference,
        )
        for name in arms
    }


def num_controls(name: str, count: int) -> int:
    """The number of a seed's scenes with controls. Controls cost as much as the arm itself."""
    if name == "null-text":
        return count // 3
    return count if name in MODES else 0


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Plot quality against cost, one point per mode, and against the timestep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name, scores in numbers["modes"].items():
        values = [seed["pointing"] for seed in scores["seeds"]]
        low, high = scores["pointing"] - min(values), max(values) - scores["pointing"]
        axes[0].errorbar(
            scores["unet_forwards"], scores["pointing"], yerr=[[max(low, 0)], [max(high, 0)]], fmt="o", label=name
        )
    axes[0].set(xscale="log", xlabel="UNet forwards per image", ylabel="pointing (range over seeds)")
    axes[0].legend(frameon=False, fontsize=8)
    sweep = {int(name.removeprefix("t = ")): scores for name, scores in numbers.get("sweep", {}).items()}
    for score in ("pointing", "ap", "iou_fixed"):
        axes[1].plot(list(sweep), [scores[score] for scores in sweep.values()], "o-", label=score)
    axes[1].set(xlabel="timestep of the noise, of 1000", ylabel="mean over seeds")
    axes[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: the modes only, one seed, one scene")
    parser.add_argument(
        "--arms",
        choices=("modes", "null-text", "levers", "all"),
        default="all",
        help="modes; null-text: the modes and more null-text settings, without controls (minutes per scene); "
        "levers: the default mode, other settings and timesteps (default: all)",
    )
    parser.add_argument("--split", choices=("development", "sealed"), default="development", help="split of the scenes")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default: 40 41 42; sealed 1 2 3")
    parser.add_argument("--scenes", type=int, default=None, help="scenes per seed; default 300, with --quick 1")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, with one thread each")
    parser.add_argument(
        "--keep",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="folder of finished parts; a later run continues from them",
    )
    parser.add_argument("--json", type=Path, default=None, help="where to write the numbers")
    parser.add_argument("--plot", type=Path, default=None, help="where to write the plot")
    parser.add_argument(
        "--draw",
        type=Path,
        nargs="+",
        default=None,
        metavar="JSON",
        help="only write --plot, from files that --json wrote",
    )
    options = parser.parse_args()
    if options.quick and options.split == "sealed":
        parser.error("--quick uses development scenes; sealed scenes are only for reported numbers")
    if options.draw:
        files = [json.loads(path.read_text()) for path in options.draw]
        files.sort(key=lambda numbers: len(numbers["modes"]))
        draw({name: value for numbers in files for name, value in numbers.items() if value}, options.plot)
        return
    from lavender.config import ExtractionConfig

    seeds = options.seeds or ((1, 2, 3) if options.split == "sealed" else (40,) if options.quick else (40, 41, 42))
    count = options.scenes or (1 if options.quick else 300)
    levers = {"noise": MODES["noise"]} | LEVERS | TIMESTEPS
    chosen = "modes" if options.quick else options.arms
    arms = {"modes": MODES, "null-text": MODES | NULL_TEXTS, "levers": levers, "all": MODES | levers}[chosen]
    scores = measure(arms, options.split, seeds, count, options.jobs, chosen != "null-text", options.keep)
    modes = {name: arm for name, arm in scores.items() if name.split(",")[0] in MODES}
    numbers = {
        "default": asdict(ExtractionConfig()),
        "split": options.split,
        "seeds": list(seeds),
        "scenes_a_seed": count,
        "cheapest": cheapest(modes) if "null-text" in modes else None,
        "modes": modes,
        "controls": {name: modes["noise"][name] for name in ("uniform_pointing", "centre_pointing")},
        "levers": {name: scores[name] for name in LEVERS if name in scores},
        "sweep": {name: scores[name] for name in TIMESTEPS if name in scores},
    }
    for name, arm in scores.items():
        print(
            f"{name:30s} forwards {arm['unet_forwards']:6.1f}  pointing {arm['pointing']:.3f}  "
            f"iou_fixed {arm['iou_fixed']:.3f}  ap {arm['ap']:.3f}  wrong word {arm['wrong_word_pointing']:.3f}"
        )
    if numbers["cheapest"]:
        print(f"cheapest mode as good as null-text: {numbers['cheapest']['mode']}")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    if options.plot:
        draw(numbers, options.plot)


if __name__ == "__main__":
    main()
