"""A training run from a YAML file: read, check, train, write the run folder.

`lavender.training.run_folder` lists what a run folder holds; its `checkpoint/` is an ordinary checkpoint, or a LoRA
adapter, with its processor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavender.config import check_keys
from lavender.errors import ConfigError
from lavender.files import TEMPORARY, write_whole
from lavender.model_files import IN_RUN_FILE
from lavender.students.loading import load_config, load_model, load_processor, load_run, loading
from lavender.training.exporting import export_run
from lavender.training.run_config import LoraSettings, RunConfig, check_out, read_overrides, read_run
from lavender.training.run_folder import (
    CHECKPOINT,
    COVERAGE,
    HEAD,
    METRICS,
    TRAINER,
    check_place,
    check_same,
    gone_on,
    is_finished,
    remove_run,
    resolved_settings,
    write_config,
    write_environment,
)
from lavender.training.training_settings import refused_settings, try_optimizer
from lavender.training.training_settings import training_keys as _training_keys
from lavender.type_checks import check_type

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

    from lavender.alignment.collator import Coverage
    from lavender.data.samples import Samples
    from lavender.data.store import MapStore
    from lavender.training.trainer import LavenderConfig, LavenderTrainer

DEFAULTS: dict[str, Any] = {"report_to": "none", "max_length": None}  # where they differ from TRL's
EVALUATED = ("loss", "vlm_loss", "attention_loss")
"""What an evaluation gives that can say which checkpoint is best, without `eval_`."""

__all__ = [
    "LoraSettings",
    "RunConfig",
    "_training_keys",
    "export_run",
    "load_run",
    "loading",
    "read_overrides",
    "read_run",
    "train",
]


def train(run: RunConfig, restart: bool = False) -> Path:
    """Run it; the run folder. With `align_weight: 0` this is plain fine-tuning.

    A folder that holds this run is gone on with, from its last whole checkpoint; where it is finished, nothing happens.
    Under `accelerate launch` every process calls this; the main one writes and prints.

    Args:
        restart: remove the run in the folder, whatever its settings, and begin anew.

    Raises:
        ConfigError: settings that cannot be; a folder that holds something else, or a run of other settings, data, maps
            or model. Then nothing was written.
    """
    from accelerate import PartialState

    from lavender.data.samples import read_samples, readable
    from lavender.data.store import MapStore

    _check_evaluation(run)
    out = check_out(run.out)
    holds_run = check_place(out, restart)
    sets = [readable(read_samples(path, prompt=run.prompt)) for path in (run.data, run.eval_data) if path is not None]
    notes = [f"dropped {drop.what}: {drop.reason}" for samples in sets for drop in samples.dropped]
    run = replace(run, dtype=_weights_dtype(run))
    processor, args, load_model = _prepared(run, out)
    if not args.assistant_only_loss:
        notes.append("the loss covers whole conversations, not the answers alone (assistant_only_loss is false)")
    stores = [MapStore.open(path) for path in run.stores()]
    wanted = resolved_settings(run, args, _content(run, args, sets))
    is_main = args.process_index == 0
    if holds_run and not restart:
        found = check_same(out, wanted)
        wanted, changed = gone_on(found, wanted)
        if is_finished(out, found, wanted):
            _say([f"finished: {out} holds this run, trained to its end; --restart trains it anew"], is_main)
            return out
        notes += changed
    PartialState().wait_for_everyone()  # all have compared before one writes
    notes.append(_told(sets[0], stores))
    _say(notes, is_main)
    trainer = _trainer(run, args, processor, load_model(), sets, stores)
    checkpoint = _begin(trainer, out, wanted, restart, is_main)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _finish(trainer, out, sets, is_main)
    return out


def _trainer(run: RunConfig, args: LavenderConfig, processor: Any, model: Any, sets: list[Samples], stores: list):
    from lavender.alignment.collator import SeveralStores
    from lavender.data.samples import to_dataset
    from lavender.training.trainable import check_trained, freeze, peft_config_of
    from lavender.training.trainer import LavenderTrainer

    settings = run.peft_settings()
    freeze(model, run.freeze)
    peft_config = None if settings is None else peft_config_of(settings, model, run.freeze)
    with refused_settings("the trainer"):
        trainer = LavenderTrainer(
            model,
            args,
            processing_class=processor,
            train_dataset=to_dataset(sets[0]),
            maps=SeveralStores(*stores),
            eval_dataset=to_dataset(sets[1]) if run.eval_data else None,
            peft_config=peft_config,
        )
    trained = check_trained(trainer.accelerator.unwrap_model(trainer.model), run.freeze)
    _say([trained], args.process_index == 0)
    return trainer


def _begin(trainer: LavenderTrainer, out: Path, wanted: dict[str, Any], restart: bool, is_main: bool) -> Path | None:
    """Write what is known before the first step; the checkpoint to go on from, or None."""
    from lavender.training.resuming import last_whole_checkpoint, set_aside
    from lavender.training.run_log import RunLog

    if restart and is_main:
        remove_run(out)
    trainer.accelerator.wait_for_everyone()
    checkpoint, passed = last_whole_checkpoint(out / TRAINER)
    trainer.accelerator.wait_for_everyone()  # all have looked before one renames
    lines = [f"passed over {path}, {reason}" for path, reason in passed.items()]
    if passed and checkpoint is None:
        lines.append("no whole checkpoint is left: the run begins at its first step")
    _say([*lines, *([f"going on from {checkpoint}"] if checkpoint else [])], is_main)
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
        write_config(out, wanted)
        write_environment(out, wanted)
        (out / COVERAGE).unlink(missing_ok=True)  # of a run that is made longer, and so is not finished any more
        set_aside(passed)
    trainer.accelerator.wait_for_everyone()
    trainer.add_callback(RunLog(out / METRICS))
    return checkpoint


def _finish(trainer: LavenderTrainer, out: Path, sets: list[Samples], is_main: bool) -> None:
    """Export, each part whole or not there; coverage.json, written last, says that the run is finished."""
    from lavender.training.exporting import export, save_head

    partial = {name: out / f"{TEMPORARY}{name}" for name in (CHECKPOINT, HEAD)}
    if is_main:
        shutil.rmtree(partial[CHECKPOINT], ignore_errors=True)
    export(trainer, partial[CHECKPOINT])
    save_head(trainer, partial[HEAD])
    if is_main:
        shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
        for name, path in partial.items():
            path.replace(out / name)
        coverage = _counted(trainer.coverage, sets[0]) | {"refused": [one._asdict() for one in trainer.refused]}
        print(_covered(coverage, "training"))
        if trainer.eval_dataset is not None:
            refused = [one._asdict() for one in trainer.eval_refused]
            coverage["evaluation"] = _counted(trainer.eval_coverage, sets[1]) | {"refused": refused}
            print(_covered(coverage["evaluation"], "evaluation"))
        write_whole(out / COVERAGE, json.dumps(coverage, indent=1))
    trainer.accelerator.wait_for_everyone()


def _told(samples: Samples, stores: list[MapStore]) -> str:
    """For how many samples there are maps, before the first step; which words of theirs can be aligned shows later."""
    with_picture = [(one, ids) for one, ids in zip(samples, samples.identities, strict=True) if ids]
    known = sum(
        any((ids[index], text) in store for index, text in one.pairs for store in stores) for one, ids in with_picture
    )
    line = f"maps for {known} of {len(with_picture)} samples with a picture"
    without = len(with_picture) - known
    return line + (f"; {without} without maps are trained on as plain fine-tuning does" if without else "")


def _covered(counted: dict[str, Any], what: str) -> str:
    line = f"maps for {counted['mapped_samples']} of {counted['samples']} samples of the {what}"
    left_out = ", ".join(f"{reason}: {count}" for reason, count in counted["dropped"].items())
    return line + (f" ({left_out})" if left_out else "")


def _content(run: RunConfig, args: LavenderConfig, sets: list[Samples]) -> dict[str, str]:
    """Digests of what the run is made from."""
    from lavender.training.fingerprints import digest_of_data, digest_of_folder, digest_of_model, digests_of_settings

    content = {
        "model": digest_of_model(run.model, vars(_config_of(run)).get("_commit_hash")),
        "data": digest_of_data(sets[0]),
        "maps": "+".join(digest_of_folder(Path(path)) for path in run.training_stores()),
    }
    if run.eval_data is not None:
        content["eval_data"] = digest_of_data(sets[1])
    if run.eval_maps is not None:
        content["eval_maps"] = digest_of_folder(Path(run.eval_maps))
    return content | digests_of_settings(run.training)


def _config_of(run: RunConfig) -> PreTrainedConfig:
    with loading("model", run.model, IN_RUN_FILE):
        return load_config(run.model, trust_remote_code=run.trust_remote_code)


def _weights_dtype(run: RunConfig) -> str:
    from lavender.training.trainable import weights_dtype

    return weights_dtype(run.dtype, _config_of(run), with_peft=run.peft_settings() is not None)


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
            f"eval_data: {run.eval_data}, of which no use is made",
            "a time to evaluate",
            "add for example eval_strategy: steps and eval_steps: 100",
        )
    if metric is not None and str(metric).removeprefix("eval_") not in EVALUATED:
        names = ", ".join(f"eval_{name}" for name in EVALUATED)
        raise ConfigError(f"metric_for_best_model: {metric}", f"one of {names}", "choose one of them")


def _prepared(run: RunConfig, out: Path) -> tuple[ProcessorMixin, LavenderConfig, Callable]:
    """Processor, settings, and what loads the model: after the settings, which say how that is divided."""
    from lavender.students.registry import adapter_for
    from lavender.training.trainable import quantization_config
    from lavender.training.trainer import LavenderConfig

    common: dict[str, Any] = {"trust_remote_code": run.trust_remote_code}
    dtype = _weights_dtype(run)
    with loading("model", run.model, IN_RUN_FILE):
        adapter = adapter_for(load_config(run.model, **common))
        processor = load_processor(adapter, run.model, **common)
    _set_images(processor, run.image_processor)
    quantized = {}
    if run.quantization is not None:
        quantized["quantization_config"] = quantization_config(run.quantization, run.peft_settings() is not None)
    with refused_settings("LavenderConfig"):
        args = LavenderConfig(output_dir=str(out / "trainer"), **_training_settings(run, processor))
    try_optimizer(args)

    def load():
        with loading("model", run.model, IN_RUN_FILE):
            return load_model(adapter, run.model, processor, dtype=dtype, **common, **quantized)

    return processor, args, load


def _training_settings(run: RunConfig, processor: ProcessorMixin) -> dict[str, Any]:
    return {**DEFAULTS, "assistant_only_loss": _tells_answers(processor), **run.training}


def _counted(coverage: Coverage, samples: Samples) -> dict[str, Any]:
    return {
        "samples": coverage.samples,
        "mapped_samples": coverage.mapped_samples,
        "words": coverage.words,
        "dropped": dict(coverage.dropped),
        "unreadable": [asdict(drop) for drop in samples.dropped],
    }


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
    """Replace settings of the image processor; those of the checkpoint that the run writes too.

    Raises:
        ConfigError: an unknown setting, one of another type, or one with which a picture cannot be processed.
    """
    from huggingface_hub.dataclasses import validate_typed_dict
    from PIL import Image

    if not settings:
        return
    images = processor.image_processor
    own, typed = images.to_dict(), getattr(images, "valid_kwargs", None)
    check_keys(settings, list(own), "image_processor")
    named = {name: value for name, value in settings.items() if typed and name in typed.__annotations__}
    for name in settings.keys() - named.keys():
        if own[name] is not None:
            check_type(f"image_processor.{name}", settings[name], type(own[name]))
    with refused_settings("the image processor"):
        if typed:
            validate_typed_dict(typed, named)
        changed = type(images).from_dict(own | dict(settings))
        changed(images=[Image.new("RGB", (64, 48))], return_tensors="pt")
    processor.image_processor = changed
