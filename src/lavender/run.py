"""A training run from a YAML file: read, check, train, write the run folder.

A run folder holds `config.yaml` (resolved), `metrics.jsonl`, `environment.json`, `coverage.json` and
`checkpoint/`, an ordinary checkpoint (or LoRA adapter) with processor.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lavender.config import check_keys
from lavender.errors import ConfigError, LavenderError
from lavender.loading import export_run, load_config, load_model, load_processor, load_run, loading
from lavender.model_files import IN_RUN_FILE
from lavender.run_config import LoraSettings, RunConfig, read_overrides, read_run

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from lavender.alignment_data import Coverage
    from lavender.data import Samples
    from lavender.trainer import LavenderConfig

PACKAGES = ("lavender-vlm", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
DEFAULTS: dict[str, Any] = {"report_to": "none", "max_length": None}  # where they differ from TRL's
EVALUATED = ("loss", "vlm_loss", "attention_loss")
"""What an evaluation gives that can say which checkpoint is best, without `eval_`."""

__all__ = [
    "LoraSettings", "RunConfig", "export_run", "load_run", "loading", "read_overrides", "read_run", "train",
]  # fmt: skip


def train(run: RunConfig) -> Path:
    """Run it; the run folder. With `align_weight: 0` this is plain fine-tuning.

    Under `accelerate launch` every process calls this; the main one writes and prints.
    """
    from lavender.alignment_data import SeveralStores
    from lavender.checkpoints import export, save_head
    from lavender.data import read_samples, readable, to_dataset
    from lavender.processes import last_complete_checkpoint
    from lavender.store import MapStore
    from lavender.trainable import check_trained, freeze, peft_config_of
    from lavender.trainer import LavenderTrainer

    _check_evaluation(run)
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    sets = [readable(read_samples(path, prompt=run.prompt)) for path in (run.data, run.eval_data) if path is not None]
    notes = [f"dropped {drop.what}: {drop.reason}" for samples in sets for drop in samples.dropped]
    processor, args, load_model = _prepared(run, out)
    if not args.assistant_only_loss:
        notes.append("the loss covers whole conversations, not the answers alone (assistant_only_loss is false)")
    is_main = args.process_index == 0
    _say(notes, is_main)
    stores = SeveralStores(*(MapStore.open(path) for path in (run.maps, run.eval_maps) if path is not None))
    model, settings = load_model(), run.peft_settings()
    freeze(model, run.freeze)
    trainer = LavenderTrainer(
        model, args, processing_class=processor, train_dataset=to_dataset(sets[0]), maps=stores,
        eval_dataset=to_dataset(sets[1]) if run.eval_data else None,
        peft_config=None if settings is None else peft_config_of(settings, model, run.freeze),
    )  # fmt: skip
    _say([check_trained(trainer.accelerator.unwrap_model(trainer.model), run.freeze)], is_main)
    checkpoint, interrupted = last_complete_checkpoint(out / "trainer")
    _say([f"passed over {path}, which was not written to its end" for path in interrupted], is_main)
    _say([f"going on from {checkpoint}"] if checkpoint else [], is_main)
    if is_main:
        _write_start(run, args, out)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if is_main:
        with (out / "metrics.jsonl").open("w") as lines:
            lines.writelines(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
        coverage = _counted(trainer.coverage, sets[0]) | {"refused": [one._asdict() for one in trainer.refused]}
        if run.eval_data:
            own = coverage["evaluation"] = _counted(trainer.eval_coverage, sets[1])
            own["refused"] = [one._asdict() for one in trainer.eval_refused]
            print(f"maps for {own['mapped_samples']} of {own['samples']} samples of the evaluation")
        (out / "coverage.json").write_text(json.dumps(coverage, indent=1))
    export(trainer, out / "checkpoint")
    save_head(trainer, out / "alignment_head.safetensors")
    trainer.accelerator.wait_for_everyone()
    return out


def _say(lines: list[str], is_main: bool) -> None:
    for line in lines if is_main else ():
        print(line)


def _check_evaluation(run: RunConfig) -> None:
    """Settings of evaluation that do not fit each other, before anything is read."""
    strategy, metric = run.training.get("eval_strategy", "no"), run.training.get("metric_for_best_model")
    evaluates = strategy not in ("no", False, None)
    if run.eval_maps is not None and run.eval_data is None:
        raise ConfigError(f"eval_maps: {run.eval_maps} without eval_data", "the samples of these maps", "add eval_data")
    if evaluates and run.eval_data is None:
        raise ConfigError(f"eval_strategy: {strategy} without eval_data", "samples to evaluate on", "add eval_data")
    if run.eval_data is not None and not evaluates:
        raise ConfigError(
            f"eval_data: {run.eval_data}, of which no use is made", "a time to evaluate",
            "add for example eval_strategy: steps and eval_steps: 100",
        )  # fmt: skip
    if metric is not None and str(metric).removeprefix("eval_") not in EVALUATED:
        names = ", ".join(f"eval_{name}" for name in EVALUATED)
        raise ConfigError(f"metric_for_best_model: {metric}", f"one of {names}", "choose one of them")


def _prepared(run: RunConfig, out: Path) -> tuple[ProcessorMixin, LavenderConfig, Callable]:
    """Processor, settings, and what loads the model: after the settings, which say how that is divided."""
    from lavender.trainable import quantization_config
    from lavender.trainer import LavenderConfig
    from lavender.vlm.registry import adapter_for

    common: dict[str, Any] = {"trust_remote_code": run.trust_remote_code}
    with loading("model", run.model, IN_RUN_FILE):
        adapter = adapter_for(load_config(run.model, **common))
        processor = load_processor(adapter, run.model, **common)
    _set_images(processor, run.image_processor)
    quantized = {}
    if run.quantization is not None:
        quantized["quantization_config"] = quantization_config(run.quantization, run.peft_settings() is not None)
    try:
        args = LavenderConfig(output_dir=str(out / "trainer"), maps=run.maps, **_training_settings(run, processor))
    except LavenderError:
        raise
    except (TypeError, ValueError) as error:  # transformers' and TRL's own checks
        got = f"settings of training that LavenderConfig refuses: {error}"
        raise ConfigError(got, "values that it accepts", "change the setting") from error

    def load():
        with loading("model", run.model, IN_RUN_FILE):
            return load_model(adapter, run.model, processor, dtype=run.dtype, **common, **quantized)

    return processor, args, load


def _training_settings(run: RunConfig, processor: ProcessorMixin) -> dict[str, Any]:
    return {**DEFAULTS, "assistant_only_loss": _tells_answers(processor), **run.training}


def _write_start(run: RunConfig, args: LavenderConfig, out: Path) -> None:
    """What is known before the first step."""
    training = {**DEFAULTS, "assistant_only_loss": args.assistant_only_loss, **run.training}
    resolved = asdict(run) | {"training": training}
    (out / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(resolved)), sort_keys=False))
    environment = {"python": platform.python_version(), "platform": platform.platform()}
    environment |= {name: version(name) for name in PACKAGES} | {"device": str(args.device), "seed": str(args.seed)}
    environment["processes"] = str(args.world_size)
    (out / "environment.json").write_text(json.dumps(environment, indent=1))


def _counted(coverage: Coverage, samples: Samples) -> dict[str, Any]:
    return {
        "samples": coverage.samples, "mapped_samples": coverage.mapped_samples, "words": coverage.words,
        "dropped": dict(coverage.dropped), "unreadable": [asdict(drop) for drop in samples.dropped],
    }  # fmt: skip


def _tells_answers(processor: Any) -> bool:
    """Whether the chat template marks the assistant's turns, or TRL has a variant of it that does."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not processor.chat_template:
        return False
    try:
        return has_generation_markers(processor.chat_template) or get_training_chat_template(processor) is not None
    except ValueError:  # TRL's way of saying that it does not know the template
        return False


def _set_images(processor: Any, settings: Mapping[str, Any]) -> None:
    """Replace settings of the image processor; those of the checkpoint that the run writes too."""
    if settings:
        images = processor.image_processor
        check_keys(settings, list(images.to_dict()), "image_processor")
        processor.image_processor = type(images).from_dict(images.to_dict() | dict(settings))
