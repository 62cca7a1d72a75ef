"""A training run: read its settings, check them, train, write the run folder.

`lavender.training.run_folder` lists the files of a run folder. Its `checkpoint/` is an ordinary checkpoint, or a LoRA
adapter, with its processor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lavender.config import AlignmentConfig
from lavender.errors import ConfigError
from lavender.files import TEMPORARY, expanded, write_whole
from lavender.model_files import IN_RUN_FILE
from lavender.students.loading import load_config, load_model, load_processor, load_run, loading
from lavender.training.exporting import export_run
from lavender.training.model_card import CARD, run_card, teachers_of
from lavender.training.run_config import LoraSettings, RunConfig, check_out, overridden, read_run
from lavender.training.run_folder import (
    CHECKPOINT,
    COVERAGE,
    HEAD,
    METRICS,
    SCORES,
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
from lavender.training.settings import refused_settings, set_chat_template, set_image_processor, trainer_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

    from lavender.alignment.coverage import Coverage
    from lavender.config import Texts
    from lavender.data.samples import Samples
    from lavender.data.store import MapStore
    from lavender.training.trainable import Trained
    from lavender.training.trainer import LavenderConfig, LavenderTrainer

SETS = ("data", "replay_data", "eval_data")
"""Settings of a run that name a data set."""
EVALUATED = ("loss", "vlm_loss", "attention_loss")
"""Metrics of an evaluation that can choose the best checkpoint, without `eval_`."""

__all__ = [
    "LoraSettings",
    "RunConfig",
    "export_run",
    "load_run",
    "loading",
    "overridden",
    "read_run",
    "train",
]


def train(run: RunConfig, restart: bool = False) -> Path:
    """Train a run and write its folder. With `align_weight: 0` this is plain fine-tuning.

    If the folder holds this run already, training continues from its last complete checkpoint; if the run is finished,
    nothing happens. Under `accelerate launch` every process calls this; the main process writes and prints.

    Args:
        restart: remove the run in the folder, whatever its settings, and start again.

    Returns:
        The run folder.

    Raises:
        ConfigError: impossible settings; a folder that holds something else, or a run with other settings, data, maps
            or model. Nothing was written in these cases.
    """
    from accelerate import PartialState

    plan = plan_of(run, restart)
    run, out, args, notes = plan.run, plan.out, plan.args, plan.notes
    wanted = resolved_settings(run, args, _content(run, plan.sets))
    is_main = args.process_index == 0
    if plan.holds_run and not restart:
        found = check_same(out, wanted)
        wanted, changed = gone_on(found, wanted)
        if is_finished(out, found, wanted):
            _print([f"finished: {out} holds this run, trained to its end; --restart trains it anew"], is_main)
            return out
        notes += changed
    PartialState().wait_for_everyone()  # every process compares before the main process writes
    _print([*notes, *lines_of_plan(plan)], is_main)
    trainer = _trainer(run, args, plan.processor, plan.load_model(), plan.sets, plan.stores)
    checkpoint = _begin(trainer, out, wanted, restart, is_main)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _finish(trainer, out, plan.sets, is_main)
    return out


class Plan(NamedTuple):
    """A run whose settings are checked and whose data are read; its model is not loaded.

    Attributes:
        run: the settings, with the type of the weights.
        out: the run folder. Nothing was written to it.
        holds_run: whether it holds a run.
        config: the model's config.
        processor: the model's processor.
        args: the trainer's arguments.
        load_model: loads the weights.
        sets: the samples of each setting in `SETS`.
        stores: the map stores of training, then of evaluation.
        notes: what was dropped, and other lines to print.
    """

    run: RunConfig
    out: Path
    holds_run: bool
    config: PreTrainedConfig
    processor: ProcessorMixin
    args: LavenderConfig
    load_model: Callable[[], Any]
    sets: dict[str, Samples]
    stores: list[MapStore]
    notes: list[str]


def plan_of(run: RunConfig, restart: bool = False) -> Plan:
    """Check a run's settings, read its data and open its map stores. Raises as `train`."""
    from lavender.data.samples import read_samples, readable
    from lavender.data.store import MapStore
    from lavender.training.trainable import weights_dtype

    _check_evaluation(run)
    out = check_out(run.out)
    holds_run = check_place(out, restart)
    paths = {name: path for name in SETS if (path := getattr(run, name)) is not None}
    sets = {name: readable(read_samples(path, run.prompt, run.columns)) for name, path in paths.items()}
    notes = [f"dropped {drop.what}: {drop.reason}" for samples in sets.values() for drop in samples.dropped]
    with loading("model", run.model, IN_RUN_FILE):
        config = load_config(run.model, trust_remote_code=run.trust_remote_code)
    run = replace(run, dtype=weights_dtype(run.dtype, config, with_peft=run.peft_settings() is not None))
    processor, args, load_model = _prepared(run, config, out)
    if not args.assistant_only_loss:
        notes.append("the loss covers whole conversations, not the answers alone (assistant_only_loss is false)")
    stores = [MapStore.open(path) for path in run.stores()]
    return Plan(run, out, holds_run, config, processor, args, load_model, sets, stores, notes)


def lines_of_plan(plan: Plan) -> list[str]:
    """The loss that trains, and how many samples have maps."""
    sets, stores, texts = plan.sets, plan.stores, plan.args.texts
    lines = [_loss_line(plan.args), _maps_line(sets["data"], stores, texts)]
    if "replay_data" in sets:
        lines.append(f"of replay_data, {_maps_line(sets['replay_data'], stores, texts)}")
    return lines


def _loss_line(args: LavenderConfig) -> str:
    """The loss that trains, with the settings whose default depends on it."""
    if args.align_weight == 0:
        return "plain fine-tuning: align_weight 0"
    default = AlignmentConfig(attention_loss=args.attention_loss)
    line = f"alignment: attention_loss {args.attention_loss}"
    for name in ("align_weight", "sharpen"):
        value, usual = getattr(args, name), getattr(default, name)
        line += f", {name} {value}" + ("" if value == usual else f" (default: {usual})")
    return line


def _trainer(run: RunConfig, args: LavenderConfig, processor: Any, model: Any, sets: dict[str, Samples], stores: list):
    from lavender.data.fingerprints import commit_of
    from lavender.data.samples import to_dataset
    from lavender.data.store import SeveralStores
    from lavender.training.mixin import AlignmentMixin
    from lavender.training.trainable import check_trained, freeze, peft_config_of
    from lavender.training.trainer import LavenderTrainer

    settings = run.peft_settings()
    freeze(model, run.freeze)
    peft_config = None if settings is None else peft_config_of(settings, model, run.freeze)
    if peft_config is not None and not expanded(run.model).is_dir():
        peft_config.revision = commit_of(run.model)  # the export merges into these weights
    with refused_settings("the trainer", called_by=cast(FunctionType, AlignmentMixin.__init__)):
        trainer = LavenderTrainer(
            model,
            args,
            processing_class=processor,
            train_dataset=to_dataset(sets["data"]),
            maps=SeveralStores(*stores),
            eval_dataset=to_dataset(sets["eval_data"]) if "eval_data" in sets else None,
            peft_config=peft_config,
        )
    if "replay_data" in sets:
        trainer.add_replay(to_dataset(sets["replay_data"]), run.replay_share)
    trained = check_trained(trainer.accelerator.unwrap_model(trainer.model), run.freeze)
    _print(trained_lines(trained), args.process_index == 0)
    return trainer


def trained_lines(trained: Trained) -> list[str]:
    """The numbers of trained parameters, and a warning where small steps are lost, as lines to print."""
    parts = [f"{part} {number:,} of {whole:,}" for part, (number, whole) in trained.parameters.items()]
    lines = [f"trained parameters: {', '.join(parts)}"]
    if trained.has_bfloat16:
        lines.append(
            "trained weights of 16 bits: steps of less than about 1/500 of a weight are rounded away, unless FSDP or "
            "DeepSpeed keeps float32 copies. "
            + (
                "TRL itself trains the adapters of a quantised model in bfloat16"
                if trained.is_quantized
                else "With dtype: float32 and bf16: true only the computation uses 16 bits"
            )
        )
    return lines


def _begin(trainer: LavenderTrainer, out: Path, wanted: dict[str, Any], restart: bool, is_main: bool) -> Path | None:
    """Write the settings before the first step. Returns the checkpoint to continue from, or None."""
    from lavender.training.resuming import last_whole_checkpoint, set_aside
    from lavender.training.run_log import RunLog

    if restart and is_main:
        remove_run(out)
    trainer.accelerator.wait_for_everyone()
    checkpoint, passed = last_whole_checkpoint(out / TRAINER)
    trainer.accelerator.wait_for_everyone()  # every process has read before one renames
    lines = [f"passed over {path}, {reason}" for path, reason in passed.items()]
    if checkpoint is None and (passed or (out / METRICS).is_file()):
        lines.append("there is no whole checkpoint: the run begins at its first step")
        wanted["record"].pop("made_longer", None)
    _print([*lines, *([f"going on from {checkpoint}"] if checkpoint else [])], is_main)
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
        write_config(out, wanted)
        write_environment(out, wanted)
        for name in (COVERAGE, *SCORES):  # of a run that is made longer: it is not finished any more
            (out / name).unlink(missing_ok=True)
        set_aside(passed)
    trainer.accelerator.wait_for_everyone()
    trainer.add_callback(RunLog(out / METRICS))
    return checkpoint


def _finish(trainer: LavenderTrainer, out: Path, sets: dict[str, Samples], is_main: bool) -> None:
    """Export; each part appears only when it is complete. coverage.json, written last, marks the run as finished."""
    from lavender.training.exporting import export, save_head

    partial = {name: out / f"{TEMPORARY}{name}" for name in (CHECKPOINT, HEAD)}
    if is_main:
        shutil.rmtree(partial[CHECKPOINT], ignore_errors=True)
    export(trainer, partial[CHECKPOINT], merge=False)
    if not save_head(trainer, partial[HEAD]):
        del partial[HEAD]
    if is_main:
        shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
        trained_on = [samples for name, samples in sets.items() if name != "eval_data"]
        refused = [sample._asdict() for sample in trainer.refused]
        coverage = _counted(trainer.coverage, trained_on) | {"refused": refused}
        coverage["teachers"] = teachers_of(trainer.maps)
        print(_coverage_line(coverage, "training"))
        if trainer.eval_dataset is not None:
            refused = [sample._asdict() for sample in trainer.eval_refused]
            coverage["evaluation"] = _counted(trainer.eval_coverage, [sets["eval_data"]]) | {"refused": refused}
            print(_coverage_line(coverage["evaluation"], "evaluation"))
        is_adapter = (partial[CHECKPOINT] / "adapter_config.json").is_file()
        run_card(out, is_adapter, coverage=coverage).save(partial[CHECKPOINT] / CARD)
        for name, path in partial.items():
            path.replace(out / name)
        write_whole(out / COVERAGE, json.dumps(coverage, indent=1))
    trainer.accelerator.wait_for_everyone()


def _maps_line(samples: Samples, stores: list[MapStore], texts: Texts) -> str:
    """How many samples have maps, before the first step. Which of their words can be aligned is counted later."""
    with_picture = [(sample, ids) for sample, ids in zip(samples, samples.identities, strict=True) if ids]
    known = sum(
        any((ids[index], text) in store for index, text in sample.pairs_of(texts) for store in stores)
        for sample, ids in with_picture
    )
    line = f"maps for {known} of {len(with_picture)} samples with a picture"
    without = len(with_picture) - known
    return line + (f"; {without} without maps are trained on as plain fine-tuning does" if without else "")


def _coverage_line(counted: dict[str, Any], what: str) -> str:
    line = f"maps for {counted['mapped_samples']} of {counted['samples']} samples of the {what}"
    left_out = ", ".join(f"{reason}: {count}" for reason, count in counted["dropped"].items())
    return line + (f" ({left_out})" if left_out else "")


def _content(run: RunConfig, sets: dict[str, Samples]) -> dict[str, str]:
    """Digests of what the run is made from."""
    from lavender.data.fingerprints import digest_of_folder, digest_of_model
    from lavender.training.fingerprints import digest_of_data, digests_of_settings

    content = {
        "model": digest_of_model(run.model),
        **{name: digest_of_data(samples) for name, samples in sets.items()},
        "maps": "+".join(digest_of_folder(Path(path)) for path in run.training_stores()),
    }
    if run.eval_maps is not None:
        content["eval_maps"] = digest_of_folder(Path(run.eval_maps))
    return content | digests_of_settings(run.training)


def _print(lines: list[str], is_main: bool) -> None:
    for line in lines if is_main else ():
        print(line)


def _check_evaluation(run: RunConfig) -> None:
    """Raise ConfigError for settings of evaluation that contradict each other, before anything is read."""
    strategy, metric = run.training.get("eval_strategy", "no"), run.training.get("metric_for_best_model")
    evaluates = strategy not in ("no", False, None)
    if run.eval_maps is not None and run.eval_data is None:
        raise ConfigError(f"eval_maps: {run.eval_maps} without eval_data", "the samples of these maps", "add eval_data")
    if evaluates and run.eval_data is None:
        raise ConfigError(f"eval_strategy: {strategy} without eval_data", "samples to evaluate on", "add eval_data")
    if run.eval_data is not None and not evaluates:
        raise ConfigError(
            f"eval_data: {run.eval_data}, which nothing uses",
            "a time to evaluate",
            "add for example eval_strategy: steps and eval_steps: 100",
        )
    if metric is not None and str(metric).removeprefix("eval_") not in EVALUATED:
        names = ", ".join(f"eval_{name}" for name in EVALUATED)
        raise ConfigError(f"metric_for_best_model: {metric}", f"one of {names}", "choose one of them")


def _prepared(
    run: RunConfig, config: PreTrainedConfig, out: Path
) -> tuple[ProcessorMixin, LavenderConfig, Callable[[], Any]]:
    """Processor, the trainer's arguments, and a function that loads the model.

    The model is loaded after the arguments are built, because they set up how it is sharded.
    """
    from lavender.students.registry import adapter_for
    from lavender.training.trainable import quantization_config

    common: dict[str, Any] = {"trust_remote_code": run.trust_remote_code}
    with loading("model", run.model, IN_RUN_FILE):
        adapter = adapter_for(config)
        processor = load_processor(adapter, run.model, **common)
    set_chat_template(processor, run.training.get("chat_template_path"))
    set_image_processor(processor, run.image_processor)
    quantized = {}
    if run.quantization is not None:
        quantized["quantization_config"] = quantization_config(run.quantization, run.peft_settings() is not None)
    settings = dict(run.training)
    if settings.get("push_to_hub") and settings.get("hub_model_id") is None:
        settings["hub_model_id"] = out.name  # else all runs were named "trainer"
    args = trainer_arguments(settings, processor, out / TRAINER)

    def load() -> Any:
        with loading("model", run.model, IN_RUN_FILE):
            return load_model(adapter, run.model, processor, dtype=run.dtype, **common, **quantized)

    return processor, args, load


def _counted(coverage: Coverage, sets: list[Samples]) -> dict[str, Any]:
    return {
        "samples": coverage.samples,
        "mapped_samples": coverage.mapped_samples,
        "words": coverage.words,
        "dropped": dict(coverage.dropped),
        "unreadable": [asdict(drop) for samples in sets for drop in samples.dropped],
    }
