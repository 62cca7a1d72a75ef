"""Maps of a small Stable Diffusion 3 beside those of the shipped UNet: layers, concept vectors, amounts of noise.

    make weights-joint    # trains weights-work/joint_teacher
    python benchmarks/joint_teacher.py weights-work/joint_teacher --json PATH    # 3 × 100 development scenes
    python benchmarks/joint_teacher.py weights-work/joint_teacher --split sealed --arms UNet "attention, layer 2"
    python benchmarks/joint_teacher.py --quick --json smoke.json    # smoke test: four scenes, random weights

Both teachers saw as many pictures of the same kind, and their maps are read with one forward pass. Captions name every
thing of a scene, and a thing's map is compared with its true mask. Each seed has its own scenes and noise; all arms get
the same ones. Controls: maps of another word (wrong word), of a name that is not in the picture (absent word), of the
same caption on another picture (wrong image), a uniform map, and the picture's centre. `text_rows` has, per layer, the
pointing accuracy of the words' own attention to the picture.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from teacher_quality import FIRST_SCENE, NUM_CALIBRATION, absent_word, wrong_image
from torch.overrides import TorchFunctionMode

from lavender.config import ExtractionConfig
from lavender.evaluation.map_scores import JudgedMap, best_threshold, score_maps
from lavender.teachers.diffusion.teacher import Teacher
from lavender.world import TEACHER_PATH
from lavender.world.judging import CALIBRATION_START, judge_teacher
from lavender.world.language import caption_scene
from lavender.world.scenes import scenes

if TYPE_CHECKING:
    from lavender.world.scenes import Split

UNET = "UNet"
NUM_LAYERS = 6
ALL = {"transformer_blocks": 1.0}
# the layers that point best alone
SOME = {"transformer_blocks": 0.0} | {f"transformer_blocks.{layer}.": 1.0 for layer in (0, 3, 5)}
ATTENTION: dict[str, dict[str, Any]] = {
    "attention, all layers": {"layer_weights": ALL},
    "attention, layers 0, 3 and 5": {"layer_weights": SOME},
    **{f"attention, layer {layer}": {"expert_layer": layer} for layer in range(NUM_LAYERS)},
    "attention, all layers, contrast": {"layer_weights": ALL, "competition": "contrast"},
}
CONCEPTS: dict[str, dict[str, Any]] = {
    "concepts, second half": {"space": "output"},
    "concepts, share": {"space": "output", "competition": "share"},
    "concepts, contrast": {"space": "output", "competition": "contrast"},
    **{f"concepts, layer {layer}": {"space": "output", "expert_layer": layer} for layer in range(NUM_LAYERS)},
}
NOISE: dict[str, dict[str, Any]] = {
    f"{name}, t = {timestep}": {"timesteps": (timestep,), **settings}
    for name, settings in (
        ("attention, layer 2", {"expert_layer": 2}),
        ("attention, all layers", {"layer_weights": ALL}),
        ("attention, layers 0, 3 and 5", {"layer_weights": SOME}),
        ("concepts, second half", {"space": "output"}),
    )
    for timestep in (10, 100, 200, 300, 500, 700)
}
ARMS = {UNET: {}} | ATTENTION | CONCEPTS | NOISE
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


class TextRows(TorchFunctionMode):
    """In this context: the attention of all text tokens to the picture in each joint layer, mean over heads.

    Args:
        cells: cells of the picture, whose keys come before the text's.

    Attributes:
        rows: per layer (row, text token, cell).
    """

    def __init__(self, cells: int):
        super().__init__()
        self.cells, self.rows = cells, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            scores = query[:, :, self.cells :] @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            self.rows.append(scores.softmax(dim=-1)[..., : self.cells].mean(dim=1))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def judge_text_rows(path: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Do the words look for their things? Per layer: pointing accuracy of the words' own attention to the picture.

    Maps, by contrast, are of the picture's attention to the words.
    """
    teacher = _teacher(path, {}, options.seeds[0])
    family, (timestep,) = teacher.family, teacher.config.timesteps
    size = family.latent_size((family.side, family.side))
    rows, cols = family.layers(size)[0].grid
    judged: list[list[JudgedMap]] = [[] for _ in family.layers(size)]
    for scene in scenes(options.split, options.scenes, start=FIRST_SCENE + 1000 * options.seeds[0]):
        caption, side = caption_scene(scene), (family.side, family.side)
        pixels = torch.tensor(np.asarray(scene.image.resize(side))).permute(2, 0, 1)[None] / 127.5 - 1
        latents = family.encode_pixels(pixels)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(scene.seed))
        t, condition = torch.tensor([timestep]), family.encode_texts([caption.text])
        with TextRows(rows * cols) as watched:
            family.predict(family.add_noise(latents, noise, t), t, condition, side)
        offsets = family.token_offsets(caption.text)
        for layer, text_rows in enumerate(watched.rows):
            heats = []
            for mention in caption.mentions:
                tokens = [i for i, (a, b) in enumerate(offsets) if a < b and a < mention.end and b > mention.start]
                heats.append(text_rows[0, tokens].mean(dim=0).view(rows, cols))
            for order, (mention, heat) in enumerate(zip(caption.mentions, heats, strict=True)):
                wrong = heats[(order + 1) % len(heats)] if len(heats) > 1 else None
                judged[layer].append(JudgedMap(heat, scene.mask_of(mention.name), mention.order, wrong))
    scored = [score_maps(of_layer, 0.5).to_dict() for of_layer in judged]
    return [{name: scores[name] for name in ("pointing", "wrong_word_pointing")} for scores in scored]


def random_teacher(folder: Path) -> Path:
    """A joint teacher before its training."""
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
        options.arms = [UNET, "attention, layer 2", "concepts, second half", "attention, layer 2, t = 500"]
        options.split, options.seeds, options.scenes, options.controls = "development", [40], 4, 2
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        joint = options.teacher or random_teacher(Path(folder))
        for arm in options.arms:
            results[arm] = run_arm(TEACHER_PATH if arm == UNET else joint, ARMS[arm], options)
            print(f"{arm:24s} " + "  ".join(f"{name} {results[arm][name]:.3f}" for name in SHOWN), flush=True)
        text_rows = judge_text_rows(joint, options)
    for layer, scores in enumerate(text_rows):
        print(f"the words' attention to the picture, layer {layer}: pointing {scores['pointing']:.3f}")
    numbers = {
        "split": options.split,
        "seeds": options.seeds,
        "scenes_per_seed": options.scenes,
        "arms": results,
        "text_rows": text_rows,
    }
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
