"""`lavender train --dry-run`: what a run would train, on what, and in how much memory. No weights are loaded.

It makes the checks of a run that need no weights, in the same order and with the same errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft import get_peft_model
from torch import Tensor
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from lavender.alignment.collator import AlignmentCollator
from lavender.alignment.coverage import Coverage
from lavender.alignment.objective import attach
from lavender.data.samples import to_dataset
from lavender.data.store import SeveralStores
from lavender.evaluation.inspect import empty_model
from lavender.evaluation.memory import footprint, footprint_of_run
from lavender.files import printable
from lavender.students.registry import adapter_for
from lavender.training.distributed import refuse_settings
from lavender.training.refused_samples import check_coverage, refused_of, summary, without
from lavender.training.run import Plan, lines_of_plan, plan_of, trained_lines
from lavender.training.run_folder import check_same, gone_on, is_finished, read_config, resolved_settings
from lavender.training.settings import refused_settings
from lavender.training.trainable import (
    ALIGNMENT,
    check_trained,
    freeze,
    name_all_linear,
    peft_config_of,
    train_alignment,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from lavender.training.run_config import RunConfig

NUM_SAMPLES = 3
"""Samples that are shown."""
UNCHECKED = (
    "not checked: the weights, the memory that is really free, the launcher and its sharding, the other processes, the "
    "losses, and whether the disk has room for the checkpoints"
)
"""The last line."""
_MAX_TEXT = 100  # characters of a text that is shown


def dry_run(run: RunConfig, restart: bool = False) -> Iterator[str]:
    """The lines to print. Nothing is written.

    Raises:
        ConfigError, DataError, ModelError, StoreError, UnsupportedModelError: what would end the run before its first
            step, if no weights are needed to find it.
    """
    plan = plan_of(run, restart)
    refuse_settings(plan.args, with_peft=run.peft_settings() is not None)
    yield from _settings(plan, restart)
    yield from ["", *plan.notes, *lines_of_plan(plan)]
    collator = _collator(plan)
    accepted = {}
    for name, samples in plan.sets.items():
        dataset = to_dataset(samples)
        refused = refused_of(dataset, collator, PartialState())
        yield from (f"{name}: {line}" for line in summary(refused, len(dataset)))
        accepted[name] = without(dataset, refused)
    coverage = check_coverage(accepted["data"], collator, plan.args.min_coverage)
    if "eval_data" in accepted and (plan.args.metric_for_best_model or "").endswith("attention_loss"):
        check_coverage(accepted["eval_data"], collator, plan.args.min_coverage)
    yield f"of {coverage.samples} samples that were read, {coverage.mapped_samples} have words with maps"
    yield from (f"  {count} × {reason}" for reason, count in (+coverage.dropped).items())
    shown = _Shown(accepted["data"], collator)
    yield from ["", "first samples:", *shown.lines]
    yield from ["", *_model(plan, shown), "", UNCHECKED]


def _settings(plan: Plan, restart: bool) -> Iterator[str]:
    """The settings that a run names or resolves, and those of the trainer that are not its defaults."""
    resolved = resolved_settings(plan.run, plan.args, {})
    defaults = {setting.name: setting.default for setting in fields(plan.args)}
    training = resolved.pop("training")
    changed = {
        name: value
        for name, value in training.items()
        if name in plan.run.training or (value is not None and value != defaults.get(name) and value not in ({}, []))
    }
    yield "settings:"
    for name, value in (resolved | changed).items():
        if name != "record" and value not in (None, {}, []):
            yield f"  {name}: {value}"
    yield f"  and {len(training) - len(changed)} settings of the trainer at their defaults"
    if plan.holds_run and not restart:
        record = read_config(plan.out).get("record")
        content = record.get("content", {}) if isinstance(record, dict) else {}  # not compared: weights are not read
        wanted = resolved_settings(plan.run, plan.args, content)
        found = check_same(plan.out, wanted)
        wanted, changed = gone_on(found, wanted)
        ends = is_finished(plan.out, found, wanted)
        goes_on = "do nothing, because it is finished" if ends else "go on with it"
        yield f"{plan.out} holds a run of these settings; training would {goes_on}"
        yield "  whether its model, data and maps still have the same content is not checked"
        yield from changed


def _collator(plan: Plan) -> AlignmentCollator:
    """The collator of the run's trainer."""
    args: Any = plan.args
    processor: Any = plan.processor
    template = None
    if args.assistant_only_loss and not has_generation_markers(processor.chat_template):
        with refused_settings("TRL"):
            template = get_training_chat_template(processor)
    base = DataCollatorForVisionLanguageModeling(
        processor=processor,
        max_length=args.max_length,
        pad_to_multiple_of=args.pad_to_multiple_of,
        assistant_only_loss=args.assistant_only_loss,
        chat_template=template,
    )
    stores = SeveralStores(*plan.stores)
    return AlignmentCollator(base, processor, adapter_for(plan.config), stores, args.alignment())


class _Shown:
    """The first samples as the collator makes them.

    Attributes:
        lines: what is said of them.
        tokens, keys: the most tokens and image keys of one.
    """

    def __init__(self, dataset: Dataset, collator: AlignmentCollator):
        self.lines: list[str] = []
        self.tokens = self.keys = 0
        for index in range(min(NUM_SAMPLES, len(dataset))):
            batch = collator([dataset[index]])
            alignment = batch["alignment"]
            self.tokens = max(self.tokens, batch["input_ids"].shape[1])
            self.keys = max(self.keys, int((alignment["pictures"] >= 0).sum()))
            self.lines.append(f"  {index}: {alignment['names'][0]}, {batch['input_ids'].shape[1]} tokens")
            for message in dataset[index]["messages"]:
                self.lines += [f"    {message['role']}: {text}" for text in _texts(message)]
            self.lines += _words(alignment)


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    for part in message["content"]:
        if part["type"] == "text":
            text = printable(part["text"])
            yield text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


def _words(alignment: Mapping[str, Any]) -> Iterator[str]:
    """The words with a map and where it is highest, and why other words have none."""
    for word, heat in zip(alignment["words"][0], alignment["targets"][0], strict=False):
        yield f"    {word}: {_place(heat)}"
    counted = Coverage.of(alignment["counts"])
    yield from (f"    {count} × {reason}" for reason, count in (+counted.dropped).items())


def _place(heat: Tensor) -> str:
    row, col = divmod(int(heat.argmax()), heat.shape[1])
    return f"its map is highest in row {row + 1} of {heat.shape[0]}, column {col + 1} of {heat.shape[1]}"


def _model(plan: Plan, shown: _Shown) -> Iterator[str]:
    """What trains, and the memory that this needs."""
    run, config, settings = plan.run, plan.args.alignment(), plan.run.peft_settings()
    model = empty_model(plan.config, run.trust_remote_code, dtype=getattr(torch, run.dtype))
    setups = footprint(model, adapter_for(plan.config), shown.keys or None, shown.tokens or None)
    freeze(model, run.freeze)
    peft_config = None if settings is None else peft_config_of(settings, model, run.freeze)
    if peft_config is not None:
        name_all_linear(peft_config, model)
    with torch.device("meta"):
        attach(model, config)
        train_alignment(model, config, peft_config)
        tuned = model if peft_config is None else get_peft_model(model, peft_config)
    trained = check_trained(tuned, run.freeze)
    yield from trained_lines(trained)
    number = sum(number for part, (number, _) in trained.parameters.items() if part != ALIGNMENT)
    batch_size = plan.args.per_device_train_batch_size
    needed = footprint_of_run(run, config, setups, number, batch_size)
    yield f"memory per device, a rough estimate: {sum(needed.values()) / 1e9:.2f} GB"
    yield from (f"  {use}: {size / 1e9:.2f} GB" for use, size in needed.items())
    yield (
        f"  for {batch_size} samples of {shown.tokens} tokens and {shown.keys} image keys, the most of those shown; "
        "with AdamW, gradient checkpointing and no sharding; `lavender inspect` lists all assumptions"
    )
