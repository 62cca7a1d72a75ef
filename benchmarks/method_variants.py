"""Whether every variant of the method learns: each one trains a built-in student and must beat two controls.

    python benchmarks/method_variants.py --short --json variants.json     # one seed, about 20 minutes on one core
    python benchmarks/method_variants.py --json variants.json             # three seeds and three times the steps
    python benchmarks/method_variants.py --short --only pooling=learn align_weight=estimated
    python benchmarks/method_variants.py --quick --json variants.json     # smoke test: two steps, one variant

A variant is examples/world.yaml with the published loss and overrides, trained by the code of `lavender train`. It
passes if its mean L_att on held-out scenes, under its own attention loss and over all words with a map, is below that
of both controls:

- the Aligner alone: the same run with the VLM frozen throughout (aligner_pretraining=1);
- the best constant map: the mean of the training words' maps, as heat or as distribution, whichever is better.

The loss of the best uniform map is reported as well. All scenes are development scenes; held-out scenes are not in the
training data. The direct losses are left out, since they have no Aligner: the studies new-words and attributes measure
them. `SLOW_STARTERS` get twice the steps in short runs. The exit code is 1 if a variant fails at any seed; --quick does
not judge.
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
from collections.abc import Iterable, Sequence
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
from lavender.alignment.pooling import POOLINGS
from lavender.config import (
    DIRECT_LOSSES,
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
ALIGNER_ONLY = ("aligner_pretraining=1.0", "align_warmup=0", "align_decay=0", "align_switches=0", "lora=false")
PUBLISHED = {"attention_loss": "published", "align_weight": 5, "match": "exact"}
"""What every variant has unless it overrides it: the loss with an Aligner, with the weight of the first studies."""
FIRST_SCENE, HELD_OUT_FROM, SCENES_PER_SEED = 700_000, 790_000, 1_000  # in the development split


def variants_of(setting: str, values: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """One variant per value of a setting."""
    return {f"{setting}={value}": (f"{setting}={value}",) for value in values}


VARIANTS: dict[str, tuple[str, ...]] = {
    **variants_of("pooling", POOLINGS),
    "pooling=learn, parallel_init=random": ("pooling=learn", "parallel_init=random"),
    **variants_of("aligner", get_args(AlignerForm)),
    **variants_of("aligner_kind", get_args(AlignerKind)),
    **variants_of("aligner_norm", get_args(AlignerNorm)),
    **variants_of("aligner_activation", get_args(AlignerActivation)),
    **variants_of("attention_loss", [kind for kind in get_args(AttentionLoss) if kind not in DIRECT_LOSSES]),
    **variants_of("match", get_args(Match)),
    **variants_of("layers", [*get_args(LayerChoice), "[3]"]),
    **variants_of("heads", ["[0, 2, 5]"]),
    **variants_of("parts_of_speech", ["[noun]", "[noun, adjective]"]),
    **variants_of("subjects_and_objects", ["true"]),
    **variants_of("weight_by_confidence", ["true"]),
    **variants_of("align_weight", ["estimated"]),
    **variants_of("align_warmup", ["0.5"]),
    **variants_of("align_decay", ["0.5"]),
    **variants_of("aligner_pretraining", ["0.3"]),
    **variants_of("align_switches", ["2"]),
    **variants_of("lora", ["true"]),
}
"""Name → overrides of examples/world.yaml, as `lavender train --set` takes them."""


@dataclass(frozen=True)
class Scale:
    """The size of a run: steps, samples per step, training scenes, held-out scenes, seeds."""

    steps: int
    batch: int
    num_training: int
    num_held_out: int
    seeds: tuple[int, ...]


_MAPS: dict[str, Tensor] = {}  # settings of a run → its student's maps
SLOW_STARTERS = ("pooling=max-flow-multi",)  # does not beat the constant map within the steps of a short run
QUICK, SHORT, FULL = Scale(2, 2, 6, 4, (1,)), Scale(64, 8, 96, 48, (1,)), Scale(200, 8, 400, 200, (1, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: two steps of the first variant")
    parser.add_argument("--short", action="store_true", help="one seed and fewer steps")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="only these variants")
    parser.add_argument("--json", type=Path, default=None, help="where to write the numbers")
    parser.add_argument("--keep", type=Path, default=None, help="folder of data and runs (default: temporary)")
    options = parser.parse_args()
    options.only = options.only or list(VARIANTS)[: 1 if options.quick else None]
    if unknown := [name for name in options.only if name not in VARIANTS]:
        parser.error(f"unknown {unknown}; one of {list(VARIANTS)}")
    torch.set_num_threads(1)
    scale = QUICK if options.quick else SHORT if options.short else FULL
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = measure(folder, options.only, scale, options.json)
    failed = [name for name, result in results.items() if not result["ok"]]
    print(f"{len(results) - len(failed)} of {len(results)} variants pass" + (f"; not: {failed}" if failed else ""))
    sys.exit(1 if failed and not options.quick else 0)


def measure(folder: Path, names: Sequence[str], scale: Scale, json_path: Path | None) -> dict[str, dict[str, Any]]:
    """Every variant at every seed. After each variant a line is printed, and all results so far are written."""
    began = time.monotonic()
    prepare(folder, scale)
    print(f"scenes and maps: {time.monotonic() - began:.0f} s\n")
    print(f"{'variant':<40} {'trained':>9} {'Aligner':>9} {'constant':>9} {'uniform':>9} {'seconds':>8}")
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        began, is_slow = time.monotonic(), name in SLOW_STARTERS and scale.steps < FULL.steps
        run_scale = replace(scale, steps=2 * scale.steps) if is_slow else scale
        by_seed = [measure_variant(folder, VARIANTS[name], run_scale, seed) for seed in scale.seeds]
        mean = {key: fmean(losses[key] for losses in by_seed) for key in by_seed[0]}
        # NaN fails
        ok = all(losses["trained"] < min(losses["aligner_only"], losses["constant"]) for losses in by_seed)
        results[name] = {
            "overrides": VARIANTS[name],
            "ok": ok,
            **mean,
            "by_seed": by_seed,
            "steps": run_scale.steps,
            "seconds": round(time.monotonic() - began, 1),
        }
        if json_path:
            json_path.write_text(json.dumps({"scale": vars(scale), "variants": results}, indent=1))
        numbers = " ".join(f"{mean[key]:9.4f}" for key in ("trained", "aligner_only", "constant", "uniform"))
        print(f"{name:<40} {numbers} {results[name]['seconds']:8.1f}{'' if ok else '  FAILS'}", flush=True)
    return results


def prepare(folder: Path, scale: Scale) -> None:
    """Write pictures and the built-in teacher's maps: each seed's training scenes, and the held-out scenes."""
    teacher = load_teacher()
    sets = {f"training-{seed}": (FIRST_SCENE + seed * SCENES_PER_SEED, scale.num_training) for seed in scale.seeds}
    for name, (start, count) in (sets | {"held-out": (HELD_OUT_FROM, scale.num_held_out)}).items():
        write_scenes(folder / name / "data", list(scenes("development", count, start=start)))
        with contextlib.redirect_stdout(None):
            extract(read_samples(folder / name / "data", CAPTION_PROMPT), teacher, folder / name / "maps")


def measure_variant(folder: Path, overrides: Sequence[str], scale: Scale, seed: int) -> dict[str, float]:
    """Held-out L_att of a variant at one seed, and of its controls."""
    trained = run_of(folder, overrides, scale, seed)
    aligner_only = run_of(folder, [*overrides, *ALIGNER_ONLY], scale, seed)
    (targets, weights), kind = teacher_maps(trained, folder / "held-out"), alignment_of(trained).attention_loss
    training = teacher_maps(trained, folder / f"training-{seed}")
    losses = {
        name: weighted_mean(per_word_loss(trained_maps(run, folder / "held-out"), targets, kind), weights)
        for name, run in (("trained", trained), ("aligner_only", aligner_only))
    }
    return losses | constant_losses(training, targets, weights, kind)


def trained_maps(run: RunConfig, data: Path) -> Tensor:
    """Train; the tuned student's maps. Equal runs are trained once, because some variants are the default."""
    settings = json.dumps([run.peft_settings(), dict(run.training) | asdict(alignment_of(run))], sort_keys=True)
    if settings not in _MAPS:
        with Path(f"{run.out}.log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            train(run)
            _MAPS[settings] = student_maps(run, data)
        shutil.rmtree(run.out)
    return _MAPS[settings]


def run_of(folder: Path, overrides: Sequence[str], scale: Scale, seed: int) -> RunConfig:
    """The run of examples/world.yaml with these overrides, as `lavender train --set …` reads it."""
    data = folder / f"training-{seed}"
    settings = {
        "model": STUDENT_PATH,
        "data": data / "data",
        "maps": data / "maps",
        "out": folder / "run",
        "seed": seed,
        "max_steps": scale.steps,
        "per_device_train_batch_size": scale.batch,
        "warmup_steps": scale.steps // 20,
        "save_strategy": "'no'",
        "disable_tqdm": "true",
        **PUBLISHED,
    }
    return read_run(RUN, [*(f"{key}={value}" for key, value in settings.items()), *overrides])


def alignment_of(run: RunConfig) -> AlignmentConfig:
    """The run's alignment settings."""
    names = [field.name for field in fields(AlignmentConfig)]
    return AlignmentConfig(**{name: run.training[name] for name in names if name in run.training})


@torch.no_grad()
def student_maps(run: RunConfig, data: Path) -> Tensor:
    """The tuned student's maps after its Aligner, (word, rows, cols)."""
    model, _ = load_run(run.out)
    head = attach(model, replace(alignment_of(run), match="label"))  # the words must not depend on the predictions
    saved = load_file(Path(run.out) / "alignment_head.safetensors")
    weights = {name.removeprefix("base_model.model."): value for name, value in saved.items()}  # PEFT's prefix
    _, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    maps = []
    for batch in batches(data, words_of(run)):
        request = AlignmentRequest(head.layers, batch["alignment"])
        model(**batch["inputs"], attention_request=request)
        maps.append(head.maps(request))
    return torch.cat(maps)


def teacher_maps(run: RunConfig, data: Path) -> tuple[Tensor, Tensor]:
    """The maps of the words that a run aligns, (word, rows, cols), and the words' weights, (word,)."""
    alignments = [batch["alignment"] for batch in batches(data, words_of(run))]
    return (
        torch.cat([tensors["targets"][tensors["present"]] for tensors in alignments]),
        torch.cat([tensors["weights"][tensors["present"]] for tensors in alignments]),
    )


def words_of(run: RunConfig) -> AlignmentConfig:
    """Only the settings that select and weight words, so that variants with the same words share batches."""
    config = alignment_of(run)
    return AlignmentConfig(
        parts_of_speech=config.parts_of_speech,
        subjects_and_objects=config.subjects_and_objects,
        weight_by_confidence=config.weight_by_confidence,
    )


@cache
def batches(data: Path, words: AlignmentConfig) -> list[dict[str, Any]]:
    """A data set in batches of 16: the model's inputs and the alignment's tensors."""
    processor = AutoProcessor.from_pretrained(STUDENT_PATH)
    adapter = adapter_for(AutoConfig.from_pretrained(STUDENT_PATH))
    base = DataCollatorForVisionLanguageModeling(processor)
    collate = AlignmentCollator(base, processor, adapter, MapStore.open(str(data / "maps")), words)
    examples: Any = to_dataset(read_samples(data / "data", CAPTION_PROMPT))
    collated = []
    for start in range(0, len(examples), 16):
        batch = collate([examples[index] for index in range(start, min(start + 16, len(examples)))])
        alignment = batch.pop("alignment")
        del batch["labels"]
        collated.append({"inputs": dict(batch), "alignment": alignment})
    return collated


def constant_losses(training: tuple[Tensor, Tensor], targets: Tensor, weights: Tensor, kind: Any) -> dict[str, float]:
    """Held-out loss of one map for all words: the better mean of the training words' maps, and the best uniform map."""
    heat, counts = min_max(training[0]), training[1][:, None, None]
    shares = heat + FLOOR
    shares = (shares / shares.sum(dim=(-2, -1), keepdim=True) * counts).sum(dim=0) / counts.sum()
    uniform = torch.full_like(heat[0], float((heat * counts).mean() / counts.mean()))

    def loss(constant: Tensor) -> float:
        return weighted_mean(per_word_loss(constant.expand_as(targets), targets, kind), weights)

    return {
        "constant": min(loss((heat * counts).sum(dim=0) / counts.sum()), loss(shares / shares.max())),
        "uniform": loss(uniform),
    }


def weighted_mean(losses: Tensor, weights: Tensor) -> float:
    return float((losses * weights).sum() / weights.sum())


if __name__ == "__main__":
    try:
        main()
    except LavenderError as error:
        sys.exit(f"method_variants: {error}")
