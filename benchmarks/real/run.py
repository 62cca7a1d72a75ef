"""New words from few captions with real weights: plain fine-tuning against alignment.

    python benchmarks/real/run.py --folder FOLDER            # 3 seeds, all arms; run it again to go on
    python benchmarks/real/run.py --folder FOLDER --quick    # 1 seed, 2 arms, few steps

Stage 1 connects the untrained projector on captions of 40 known names. Stage 2 starts from that base and learns 20 new
names from few captions, each arm with the same captions and steps. README.md says what is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from models import save_llava
from scenes import KNOWN_NAMES, NAMES, NEW_NAMES, PROMPT, Scene, draw_scene

from lavender import export
from lavender.data.images import image_id
from lavender.data.store import MapStore
from lavender.evaluation.answers import generate_answers, micro_f1, names_said
from lavender.evaluation.map_scores import JudgedMap, best_threshold, score_maps
from lavender.maps import WordMaps, to_heat
from lavender.students.word_maps import AnsweredPicture, student_maps
from lavender.training.run import RunConfig, load_run, train

Target = Literal["masks", "wrong-word"]
GRID = (16, 16)
STAGE_1, STAGE_2, HELD_OUT = 1, 2, 3
"""The first number of a scene's seed."""
LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)",
    "modules_to_save": ["multi_modal_projector"],
}
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 10,
    "save_strategy": "no",
    "activation_checkpointing": False,
    "max_length": None,
    "probe_size": 0,
}
MASS: dict[str, Any] = {"attention_loss": "mass", "align_weight": 0.5, "match": "label", "sharpen": 2.0}
PLAIN: dict[str, Any] = MASS | {"align_weight": 0.0}
FORCED: dict[str, Any] = MASS | {"attention_forcing": 1.0}
ARMS: dict[str, tuple[Target, dict[str, Any]]] = {
    "plain": ("masks", PLAIN),
    "forced": ("masks", FORCED),
    "mass": ("masks", MASS),
    "forced, wrong word": ("wrong-word", FORCED),
}
"""Arm → the maps and the settings of `LavenderConfig`. Plain fine-tuning is the same run with λ = 0."""


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        side: pixels per side of a picture; a patch has 14.
        stage_1_scenes, stage_1_steps: scenes and optimizer steps of stage 1.
        captions, steps: captions and optimizer steps of stage 2.
        held_out, unseen: held-out scenes of the photographs of training, and of photographs that are in no training.
        bf16: compute in bfloat16 (autocast).
        use_cpu: do not use an accelerator.
    """

    side: int
    stage_1_scenes: int
    stage_1_steps: int
    captions: int
    steps: int
    held_out: int
    unseen: int
    bf16: bool
    use_cpu: bool

    def training(self, steps: int, seed: int) -> dict[str, Any]:
        """The settings that both stages share."""
        return TRAINING | {"max_steps": steps, "seed": seed, "bf16": self.bf16, "use_cpu": self.use_cpu}


def main() -> None:
    options = _options()
    size, folder = _size(options), options.folder
    folder.mkdir(parents=True, exist_ok=True)
    base = connect(folder, size)
    seeds, arms = ((0,), ("plain", "forced")) if options.quick else (options.seeds, tuple(ARMS))
    results = {"base": [score_once(folder / "cells" / f"base-{_key(base.name, size)}.json", base, size)]}
    for seed in seeds:
        for arm in options.arms or arms:
            results.setdefault(arm, []).append(run_cell(folder, base, size, arm, seed))
    summary = {"size": asdict(size), "seeds": list(seeds), "arms": results}
    (options.json or folder / "results.json").write_text(json.dumps(summary, indent=1))
    print(table(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where everything is written")
    parser.add_argument("--quick", action="store_true", help="one seed, two arms, few steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=None)
    parser.add_argument("--captions", type=int, default=100, help="captions of stage 2 (100)")
    parser.add_argument("--side", type=int, default=112, help="pixels per side of a picture (112: 8 × 8 patches)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of stage 2 (100)")
    parser.add_argument("--stage-1-steps", type=int, default=600, help="optimizer steps of stage 1 (600)")
    parser.add_argument("--float32", action="store_true", help="compute in float32 instead of bfloat16")
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument("--json", type=Path, default=None, help="where to write the numbers (FOLDER/results.json)")
    return parser.parse_args()


def _size(options: argparse.Namespace) -> Size:
    stage_1_steps = 20 if options.quick else options.stage_1_steps
    steps, held_out, unseen = (10, 16, 8) if options.quick else (options.steps, 120, 60)
    on_cpu = options.cpu or not torch.accelerator.is_available()
    return Size(
        side=options.side,
        stage_1_scenes=8 * stage_1_steps,
        stage_1_steps=stage_1_steps,
        captions=options.captions,
        steps=steps,
        held_out=held_out,
        unseen=unseen,
        bf16=not options.float32,
        use_cpu=on_cpu,
    )


def _key(*facts: Any) -> str:
    return hashlib.sha256(json.dumps([str(fact) for fact in facts]).encode()).hexdigest()[:12]


def connect(folder: Path, size: Size) -> Path:
    """Stage 1: train the projector and LoRA on scenes of one to three known names; the merged checkpoint."""
    settings = size.training(size.stage_1_steps, 0) | PLAIN | {"save_strategy": "steps", "save_steps": 50}
    settings |= {"save_total_limit": 2}
    name = f"stage-1-{_key(size.side, LORA, settings)}"
    base = folder / name
    if base.is_dir():
        return base
    drawn = [
        draw_scene((STAGE_1, index), (1, 2, 3), KNOWN_NAMES, side=size.side) for index in range(size.stage_1_scenes)
    ]
    data = write_data(folder / f"{name}.data", drawn, "masks")
    untrained = save_llava(folder / f"untrained-{size.side}", size.side)
    run = _train(untrained, data, "masks", folder / f"{name}.run", settings)
    partial = base.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    export(run, partial)
    return partial.rename(base)


def run_cell(folder: Path, base: Path, size: Size, arm: str, seed: int) -> dict[str, Any]:
    """Stage 2: one arm at one seed, trained and scored unless its result is there."""
    target, settings = ARMS[arm]
    settings = size.training(size.steps, seed) | settings
    key = _key(base.name, size, LORA, arm, target, settings)
    path = folder / "cells" / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}-{key}.json"
    if path.is_file():
        return json.loads(path.read_text())
    drawn = [
        draw_scene((STAGE_2, seed, index), (2, 3), (*NEW_NAMES, *KNOWN_NAMES), side=size.side)
        for index in range(size.captions)
    ]
    data = write_data(folder / f"stage-2-{_key(size.side, size.captions, seed)}.data", drawn, target)
    run = _train(base, data, target, folder / "runs" / path.stem, settings)
    scores = score_once(path, run, size)
    shutil.rmtree(run)
    return scores


def _train(model: Path, data: Path, target: Target, out: Path, settings: dict[str, Any]) -> Path:
    """`lavender train`: it goes on from the last checkpoint of an interrupted run."""
    run = RunConfig(
        model=str(model),
        data=str(data / "pictures"),
        maps=str(data / target),
        out=str(out),
        prompt=PROMPT,
        peft=LORA,
        freeze=("vision_tower",),
        dtype="float32",
        training=settings,
    )
    return train(run)


def write_data(folder: Path, drawn: Sequence[Scene], target: Target) -> Path:
    """Write pictures and captions as an image folder, and the map store of `target`, unless they are there."""
    pictures = folder / "pictures"
    if not (pictures / "metadata.jsonl").is_file():
        pictures.mkdir(parents=True, exist_ok=True)
        rows = []
        for index, scene in enumerate(drawn):
            scene.image.save(pictures / f"{index}.png")
            rows.append(json.dumps({"file_name": f"{index}.png", "prompt": PROMPT, "completion": scene.caption}))
        (pictures / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    if not (folder / target).is_dir():
        partial = folder / f"{target}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with MapStore.writer(partial, {"teacher": target, "texts": "answers"}, {}, GRID) as writer:
            for scene, following in zip(drawn, [*drawn[1:], drawn[0]], strict=True):
                maps = torch.stack([_map(target, scene, following, index) for index in range(len(scene.words))])
                writer.add(WordMaps(image_id(scene.image), scene.caption, scene.words, maps))
        partial.rename(folder / target)
    return folder


def _map(target: Target, scene: Scene, following: Scene, index: int) -> torch.Tensor:
    """The map of a caption's word: its true mask; or that of another thing, in the next scene if it is alone."""
    masks = list(scene.masks.values())
    if target == "wrong-word":
        masks = masks if len(masks) > 1 else [masks[0], next(iter(following.masks.values()))]
        index = (index + 1) % len(masks)
    mask = torch.from_numpy(masks[index]).float()[None, None]
    return to_heat(F.adaptive_avg_pool2d(mask, GRID)[0, 0])


def score_once(path: Path, model: Path, size: Size) -> dict[str, Any]:
    """The scores of a checkpoint or run, from the file of its cell if that is there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(score(model, size), indent=1))
        partial.rename(path)
    return json.loads(path.read_text())


def score(path: Path, size: Size) -> dict[str, Any]:
    """F1 of new, known and all names, with photographs of training and with others; attention on new and known things.

    Half of the held-out things have new names, as in stage 2.
    """
    model, processor = load_run(path)
    model.to("cpu" if size.use_cpu else torch.accelerator.current_accelerator())
    both = (*NEW_NAMES, *KNOWN_NAMES)
    held_out = [draw_scene((HELD_OUT, index), (2, 3), both, side=size.side) for index in range(size.held_out)]
    unseen = [draw_scene((HELD_OUT, index), (2, 3), both, "unseen", size.side) for index in range(size.unseen)]
    answers = {"": _answers(model, processor, held_out), "unseen_": _answers(model, processor, unseen)}
    scores: dict[str, Any] = {}
    for prefix, drawn in (("", held_out), ("unseen_", unseen)):
        said = [names_said(text, NAMES) for text in answers[prefix]]
        for group, names in (("new", set(NEW_NAMES)), ("known", set(KNOWN_NAMES)), ("all", set(NAMES))):
            present = [set(scene.masks) & names for scene in drawn]
            scores[f"{prefix}{group}_names"] = micro_f1([words & names for words in said], present)
    captioned = [AnsweredPicture(scene.image, PROMPT, scene.caption, scene.words) for scene in held_out]
    judged: dict[str, list[JudgedMap]] = {"new": [], "known": []}
    for scene, maps in zip(held_out, student_maps(model, processor, captioned, batch_size=16), strict=True):
        for order, (word, heat) in enumerate(zip(maps.words, maps.maps, strict=True)):
            group = "new" if word.text in NEW_NAMES else "known"
            judged[group].append(JudgedMap(heat, scene.masks[word.text], order))
    for group, of_group in judged.items():
        attention = score_maps(of_group, best_threshold(of_group)[0])
        scores |= {f"{group}_attention_mass": attention.mass, f"{group}_pointing": attention.pointing}
        scores["uniform_mass"] = attention.uniform_pointing
    return scores | {"answers": answers[""][:20]}


def _answers(model: Any, processor: Any, drawn: Sequence[Scene]) -> list[str]:
    images = [scene.image for scene in drawn]
    return generate_answers(model, processor, images, [PROMPT] * len(drawn), max_new_tokens=24, batch_size=30)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and range over seeds of each arm's scores, as a Markdown table."""
    metrics = [name for name, value in results["base"][0].items() if isinstance(value, float)]
    lines = [f"| arm | {' | '.join(metrics)} |", f"|---{'|---' * len(metrics)}|"]
    for arm, of_seeds in results.items():
        values = np.array([[scores[metric] for metric in metrics] for scores in of_seeds])
        shown = [
            f"{fmean(column):.3f}" + (f" ({min(column):.3f}–{max(column):.3f})" if len(column) > 1 else "")
            for column in values.T.tolist()
        ]
        lines.append(f"| {arm} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
