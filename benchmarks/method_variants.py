"""Does every variant of the method learn? Each trains a built-in student on the world, and must beat two controls.

    python benchmarks/method_variants.py --short --json variants.json     # one seed, about 20 minutes on one core
    python benchmarks/method_variants.py --json variants.json             # three seeds and three times the steps
    python benchmarks/method_variants.py --short --only pooling=learn align_weight=estimated
    python benchmarks/method_variants.py --quick --json variants.json     # that it runs: two steps, one variant

A variant is examples/world.yaml with its overrides, run by the code of `lavender train`. Its bar, on held-out scenes,
under its own loss, over all words with a map: the mean L_att ends below that of

- the Aligner alone: the same run with the VLM frozen throughout (aligner_pretraining=1);
- the best constant map: the mean of the training words' maps (as heat or as distribution, whichever is better). A
  uniform map of the best level is shown too.

Development scenes alone; held-out ones are none of the training's. `SLOW_STARTERS` have twice the short run's steps.
Exits with 1 if a variant fails in any seed; --quick judges none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from lavender.alignment.collator import AlignmentCollator
from lavender.alignment.losses import FLOOR, per_word_loss
from lavender.alignment.objective import AlignmentRequest, attach
from lavender.config import (
    POOLINGS,
    AlignerActivation,
    AlignerForm,
    AlignerKind,
    AlignerNorm,
    AlignmentConfig,
    AttentionLoss,
    LayerChoice,
    Match,
)
from lavender.data.samples import read_samples, to_dataset
from lavender.data.store import MapStore
from lavender.errors import LavenderError
from lavender.maps import min_max
from lavender.students.registry import adapter_for
from lavender.teachers.extract import extract
from lavender.training.run import RunConfig, load_run, read_run, train
from lavender.world import STUDENT_PATH
from lavender.world.language import write_scenes
from lavender.world.scenes import scenes
from lavender.world.student_models import CAPTION_PROMPT
from lavender.world.tuning import load_teacher

RUN = Path(__file__).parents[1] / "examples" / "world.yaml"
ALONE = ("aligner_pretraining=1.0", "align_warmup=0", "align_decay=0", "align_switches=0", "lora=false")
FIRST_SCENE, HELD_OUT_FROM, SCENES_A_SEED = 700_000, 790_000, 1_000  # of the development split


def options(setting: str, values: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """One variant for each value of a setting."""
    return {f"{setting}={value}": (f"{setting}={value}",) for value in values}


# name → what `lavender train examples/world.yaml` gets as --set
VARIANTS: dict[str, tuple[str, ...]] = {
    **options("pooling", POOLINGS),
    "pooling=learn, parallel_init=random": ("pooling=learn", "parallel_init=random"),
    **options("aligner", get_args(AlignerForm)),
    **options("aligner_kind", get_args(AlignerKind)),
    **options("aligner_norm", get_args(AlignerNorm)),
    **options("aligner_activation", get_args(AlignerActivation)),
    **options("attention_loss", get_args(AttentionLoss)),
    **options("match", get_args(Match)),
    **options("layers", [*get_args(LayerChoice), "[3]"]),
    **options("heads", ["[0, 2, 5]"]),
    **options("parts_of_speech", ["[noun]", "[noun, adjective]"]),
    **options("subjects_and_objects", ["true"]),
    **options("weight_by_confidence", ["true"]),
    **options("align_weight", ["estimated"]),
    **options("align_warmup", ["0.5"]),
    **options("align_decay", ["0.5"]),
    **options("aligner_pretraining", ["0.3"]),
    **options("align_switches", ["2"]),
    **options("lora", ["true"]),
}


@dataclass(frozen=True)
class Scale:
    """How long a run is and what it sees."""

    steps: int
    batch: int
    num_training: int
    num_held_out: int
    seeds: tuple[int, ...]


_MAPS: dict[str, Tensor] = {}  # settings of a run → what its student shows
SLOW_STARTERS = ("pooling=max-flow-multi",)  # with the short run's steps still above the constant: twice as many
QUICK, SHORT, FULL = Scale(2, 2, 6, 4, (1,)), Scale(64, 8, 96, 48, (1,)), Scale(200, 8, 400, 200, (1, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="that it runs: two steps of the first variant alone")
    parser.add_argument("--short", action="store_true", help="one seed, few steps")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="some of the variants")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--keep", type=Path, default=None, help="folder for data and runs; default: a temporary one")
    options = parser.parse_args()
    options.only = options.only or list(VARIANTS)[: 1 if options.quick else None]
    if unknown := [name for name in options.only if name not in VARIANTS]:
        parser.error(f"unknown {unknown}; one of {list(VARIANTS)}")
    torch.set_num_threads(1)
    scale = QUICK if options.quick else SHORT if options.short else FULL
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = measure(folder, options.only, scale, options.json)
    failed = [name for name, one in results.items() if not one["ok"]]
    print(f"{len(results) - len(failed)} of {len(results)} variants pass" + (f"; not: {failed}" if failed else ""))
    sys.exit(1 if failed and not options.quick else 0)


def measure(folder: Path, names: Sequence[str], scale: Scale, json_path: Path | None) -> dict[str, dict[str, Any]]:
    """Every variant in every seed; prints a line for each as it ends, and writes what there is."""
    began = time.monotonic()
    prepare(folder, scale)
    print(f"scenes and maps: {time.monotonic() - began:.0f} s\n")
    print(f"{'variant':<40} {'trained':>9} {'Aligner':>9} {'constant':>9} {'uniform':>9} {'seconds':>8}")
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        began, own = time.monotonic(), scale
        if name in SLOW_STARTERS and scale.steps < FULL.steps:
            own = replace(scale, steps=2 * scale.steps)
        by_seed = [arms(folder, VARIANTS[name], own, seed) for seed in own.seeds]
        mean = {key: fmean(one[key] for one in by_seed) for key in by_seed[0]}
        ok = all(one["trained"] < min(one["aligner_only"], one["constant"]) for one in by_seed)  # NaN is not
        results[name] = {
            "overrides": VARIANTS[name],
            "ok": ok,
            **mean,
            "by_seed": by_seed,
            "steps": own.steps,
            "seconds": round(time.monotonic() - began, 1),
        }
        if json_path:
            json_path.write_text(json.dumps({"scale": vars(scale), "variants": results}, indent=1))
        numbers = " ".join(f"{mean[key]:9.4f}" for key in ("trained", "aligner_only", "constant", "uniform"))
        print(f"{name:<40} {numbers} {results[name]['seconds']:8.1f}{'' if ok else '  FAILS'}", flush=True)
    return results


def prepare(folder: Path, scale: Scale) -> None:
    """Pictures and the built-in teacher's maps: of each seed's training, and of the held-out scenes."""
    teacher = load_teacher()
    sets = {f"training-{seed}": (FIRST_SCENE + seed * SCENES_A_SEED, scale.num_training) for seed in scale.seeds}
    for name, (start, count) in (sets | {"held-out": (HELD_OUT_FROM, scale.num_held_out)}).items():
        write_scenes(folder / name / "data", list(scenes("development", count, start=start)))
        with contextlib.redirect_stdout(None):
            extract(read_samples(folder / name / "data", CAPTION_PROMPT), teacher, folder / name / "maps")


def arms(folder: Path, overrides: Sequence[str], scale: Scale, seed: int) -> dict[str, float]:
    """Held-out L_att of a variant at one seed, and of its controls."""
    whole = run_of(folder, overrides, scale, seed)
    alone = run_of(folder, [*overrides, *ALONE], scale, seed)
    (targets, weights), kind = teacher_maps(whole, folder / "held-out"), alignment_of(whole).attention_loss
    training = teacher_maps(whole, folder / f"training-{seed}")
    found = {
        name: weighted(per_word_loss(trained_maps(run, folder / "held-out"), targets, kind), weights)
        for name, run in (("trained", whole), ("aligner_only", alone))
    }
    return found | constants(training, targets, weights, kind)


def trained_maps(run: RunConfig, place: Path) -> Tensor:
    """Train, and the tuned student's maps. A run is trained once: some values of settings are the default."""
    settings = json.dumps([run.peft_settings(), run.training | asdict(alignment_of(run))], sort_keys=True)
    if settings not in _MAPS:
        with Path(f"{run.out}.log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            train(run)
            _MAPS[settings] = student_maps(run, place)
        shutil.rmtree(run.out)
    return _MAPS[settings]


def run_of(folder: Path, overrides: Sequence[str], scale: Scale, seed: int) -> RunConfig:
    """examples/world.yaml as `lavender train --set …` reads it."""
    place = folder / f"training-{seed}"
    own = {
        "model": STUDENT_PATH,
        "data": place / "data",
        "maps": place / "maps",
        "out": folder / "run",
        "seed": seed,
        "max_steps": scale.steps,
        "per_device_train_batch_size": scale.batch,
        "warmup_steps": scale.steps // 20,
        "save_strategy": "'no'",
        "disable_tqdm": "true",
    }
    return read_run(RUN, [*(f"{key}={value}" for key, value in own.items()), *overrides])


def alignment_of(run: RunConfig) -> AlignmentConfig:
    names = [one.name for one in fields(AlignmentConfig)]
    return AlignmentConfig(**{name: run.training[name] for name in names if name in run.training})


@torch.no_grad()
def student_maps(run: RunConfig, place: Path) -> Tensor:
    """The tuned student's maps by its own Aligner, (word, rows, cols)."""
    model, _ = load_run(run.out)
    head = attach(model, replace(alignment_of(run), match="label"))  # the same words whatever it predicts
    saved = load_file(Path(run.out) / "alignment_head.safetensors")
    own = {name.removeprefix("base_model.model."): one for name, one in saved.items()}  # PEFT's beginning of names
    _, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected, unexpected
    maps = []
    for batch in batches(place, words_of(run)):
        request = AlignmentRequest(head.layers, batch["alignment"])
        model(**batch["inputs"], attention_request=request)
        maps.append(head.maps(request))
    return torch.cat(maps)


def teacher_maps(run: RunConfig, place: Path) -> tuple[Tensor, Tensor]:
    """The maps of the words that a run aligns, (word, rows, cols), and what the words count."""
    found = [batch["alignment"] for batch in batches(place, words_of(run))]
    return (
        torch.cat([one["targets"][one["present"]] for one in found]),
        torch.cat([one["weights"][one["present"]] for one in found]),
    )


def words_of(run: RunConfig) -> AlignmentConfig:
    """The settings that choose words and weigh them, alone: variants that share them share batches."""
    config = alignment_of(run)
    return AlignmentConfig(
        parts_of_speech=config.parts_of_speech,
        subjects_and_objects=config.subjects_and_objects,
        weight_by_confidence=config.weight_by_confidence,
    )


@cache
def batches(place: Path, words: AlignmentConfig) -> list[dict[str, Any]]:
    """A data set as the model's inputs and the alignment's tensors, in batches of 16."""
    processor = AutoProcessor.from_pretrained(STUDENT_PATH)
    adapter = adapter_for(AutoConfig.from_pretrained(STUDENT_PATH))
    base = DataCollatorForVisionLanguageModeling(processor)
    collate = AlignmentCollator(base, processor, adapter, MapStore.open(str(place / "maps")), words)
    examples: Any = to_dataset(read_samples(place / "data", CAPTION_PROMPT))
    found = []
    for start in range(0, len(examples), 16):
        batch = collate([examples[index] for index in range(start, min(start + 16, len(examples)))])
        alignment = batch.pop("alignment")
        del batch["labels"]
        found.append({"inputs": dict(batch), "alignment": alignment})
    return found


def constants(training: tuple[Tensor, Tensor], targets: Tensor, weights: Tensor, kind: Any) -> dict[str, float]:
    """Held-out loss of one map for every word: the better mean of the training words' maps; a flat one."""
    heat, counts = min_max(training[0]), training[1][:, None, None]
    shares = heat + FLOOR
    shares = (shares / shares.sum(dim=(-2, -1), keepdim=True) * counts).sum(dim=0) / counts.sum()
    flat = torch.full_like(heat[0], float((heat * counts).mean() / counts.mean()))

    def loss(one: Tensor) -> float:
        return weighted(per_word_loss(one.expand_as(targets), targets, kind), weights)

    return {
        "constant": min(loss((heat * counts).sum(dim=0) / counts.sum()), loss(shares / shares.max())),
        "uniform": loss(flat),
    }


def weighted(losses: Tensor, weights: Tensor) -> float:
    return float((losses * weights).sum() / weights.sum())


if __name__ == "__main__":
    try:
        main()
    except LavenderError as error:
        sys.exit(f"method_variants: {error}")
