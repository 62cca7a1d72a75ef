"""Maps of a small Stable Diffusion 3 beside those of the shipped UNet: layers, concept vectors, amounts of noise.

    make weights-joint    # trains weights-work/joint_teacher
    python benchmarks/joint_teacher.py weights-work/joint_teacher --json PATH    # 3 × 100 development scenes
    python benchmarks/joint_teacher.py weights-work/joint_teacher --split sealed --arms UNet "attention, one layer"
    python benchmarks/joint_teacher.py --quick --json smoke.json    # smoke test: four scenes, random weights

Both teachers saw as many pictures of the same kind, and their maps are read with one forward pass. Captions name every
thing of a scene, and a thing's map is compared with its true mask. Each seed has its own scenes and noise; all arms get
the same ones. Controls: maps of another word (wrong word), of a name that is not in the picture (absent word), of the
same caption on another picture (wrong image), a uniform map, and the picture's centre.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from teacher_quality import FIRST_SCENE, NUM_CALIBRATION, absent_word, wrong_image

from lavender.config import ExtractionConfig
from lavender.evaluation.map_scores import best_threshold, score_maps
from lavender.teachers.diffusion.teacher import Teacher
from lavender.world import TEACHER_PATH
from lavender.world.judging import CALIBRATION_START, judge_teacher
from lavender.world.scenes import scenes

if TYPE_CHECKING:
    from lavender.world.scenes import Split

UNET = "UNet"
NUM_LAYERS = 6
ALL = {"transformer_blocks": 1.0}
SOME = {"transformer_blocks": 0.0} | {f"transformer_blocks.{layer}.": 1.0 for layer in (0, 3, 5)}
ATTENTION: dict[str, dict[str, Any]] = {
    "attention, one layer": {},
    "attention, all layers": {"layer_weights": ALL},
    **{f"attention, layer {layer}": {"expert_layer": layer} for layer in range(NUM_LAYERS)},
    "attention, contrast": {"competition": "contrast"},
}
CONCEPTS: dict[str, dict[str, Any]] = {
    "concepts, second half": {"space": "output"},
    "concepts, share": {"space": "output", "competition": "share"},
    "concepts, contrast": {"space": "output", "competition": "contrast"},
    **{f"concepts, layer {layer}": {"space": "output", "expert_layer": layer} for layer in range(NUM_LAYERS)},
}
NOISE: dict[str, dict[str, Any]] = {
    f"{name}, t = {timestep}": {"timesteps": (timestep,), **settings}
    for name, settings in (("attention", {}), ("concepts", {"space": "output"}))
    for timestep in (10, 100, 200, 300, 500, 700)
}
BEST: dict[str, dict[str, Any]] = {
    f"attention, {name}, t = {timestep}": {"layer_weights": weights, "timesteps": (timestep,)}
    for name, weights in (("all layers", ALL), ("layers 0, 3 and 5", SOME))
    for timestep in (50, 200, 300)
}
"""The layers that point best alone, together."""
ARMS = {UNET: {}} | ATTENTION | CONCEPTS | NOISE | BEST
"""Arm → its settings. They are of the joint teacher, but for the shipped UNet's. By default t is 50."""
SHOWN = ("pointing", "iou_fixed", "ap", "mass", "wrong_word_pointing")


def run_arm(path: Path, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The scores of an arm: of all seeds together, of each one, and its controls."""
    calibrated = _teacher(path, settings, 0)
    calibration = list(scenes("development", min(NUM_CALIBRATION, options.scenes), start=CALIBRATION_START))
    threshold, _ = best_threshold(judge_teacher(calibrated, calibration))
    judged, controls = [], {"wrong_image": [], "absent_word": []}
    for seed in options.seeds:
        teacher = _teacher(path, settings, seed)
        drawn = list(scenes(options.split, options.scenes, start=FIRST_SCENE + 1000 * seed))
        judged.append(judge_teacher(teacher, drawn))
        controls["wrong_image"] += wrong_image(teacher, drawn[: options.controls])
        controls["absent_word"] += absent_word(teacher, drawn[: options.controls])
    overall = score_maps([one for of_seed in judged for one in of_seed], threshold).to_dict()
    of_seeds = [score_maps(of_seed, threshold).to_dict() for of_seed in judged]
    return overall | {
        "seeds": [{name: scores[name] for name in SHOWN} for scores in of_seeds],
        **{f"{name}_pointing": fmean(points) for name, points in controls.items() if points},
    }


def random_teacher(folder: Path) -> Path:
    """A joint teacher before its training."""
    from lavender.world.language import caption_scene
    from lavender.world.training import joint_teacher
    from lavender.world.training.teacher import build_vae, train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer([caption_scene(scene).text for scene in scenes("development", 50)])
    encoders = torch.nn.ModuleList([joint_teacher.build_text_encoder(tokenizer, width) for width in (96, 32)])
    joint_teacher.save_pipeline(folder, build_vae(), joint_teacher.build_transformer(NUM_LAYERS), encoders, tokenizer)
    return folder


def _teacher(path: Path, settings: dict[str, Any], seed: int) -> Teacher:
    return Teacher.from_pretrained(path, ExtractionConfig(batch_size=10, seed=seed, **settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, nargs="?", help="folder of the joint teacher; not with --quick")
    parser.add_argument("--quick", action="store_true", help="smoke test: four arms, four scenes, random weights")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--split", choices=("development", "sealed"), default="development", help="split of the scenes")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default: 40 41 42; sealed 1 2 3")
    parser.add_argument("--scenes", type=int, default=100, help="scenes per seed (100)")
    parser.add_argument("--controls", type=int, default=30, help="scenes per seed for the costly controls (30)")
    parser.add_argument("--json", type=Path, default=None, help="where to write the numbers")
    options = parser.parse_args()
    if options.quick == (options.teacher is not None):
        parser.error("give the folder of the joint teacher, or --quick, which has random weights")
    torch.set_num_threads(1)
    split: Split = options.split
    options.seeds = options.seeds or ([1, 2, 3] if split == "sealed" else [40, 41, 42])
    if options.quick:
        options.arms = [UNET, "attention, one layer", "concepts, second half", "attention, t = 500"]
        options.split, options.seeds, options.scenes, options.controls = "development", [40], 4, 2
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        joint = options.teacher or random_teacher(Path(folder))
        for arm in options.arms:
            results[arm] = run_arm(TEACHER_PATH if arm == UNET else joint, ARMS[arm], options)
            print(f"{arm:24s} " + "  ".join(f"{name} {results[arm][name]:.3f}" for name in SHOWN), flush=True)
    numbers = {"split": options.split, "seeds": options.seeds, "scenes_per_seed": options.scenes, "arms": results}
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
