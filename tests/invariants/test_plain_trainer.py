"""The mixin on `transformers.Trainer`, as a user writes it, against LavenderTrainer with the same collator."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from closeness import close, moved
from invariants.test_trainer import KINDS, LOSSES, logged, of_kind
from lavender.alignment.objective import is_alignment_part
from lavender.errors import ConfigError
from lavender.training.arguments import AlignmentArguments
from lavender.training.exporting import export, save_head
from lavender.training.mixin import AlignmentMixin
from lavender.training.trainer import LavenderConfig, LavenderTrainer


@dataclass
class MyArguments(AlignmentArguments, TrainingArguments):
    pass


class MyTrainer(AlignmentMixin, Trainer):
    pass


class MyCollator:
    """TRL's, without a label where the picture stands: no logit belongs to that token."""

    def __init__(self, processor: Any):
        self._base, self._image_token = DataCollatorForVisionLanguageModeling(processor), processor.image_token_id

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch = self._base(examples)
        batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == self._image_token, -100)
        return batch


@pytest.fixture
def run_plain(make_student, processor, dataset, store_path, tmp_path):
    """As `run`, with a base collator of the user's and, unless told otherwise, transformers.Trainer."""

    def run_plain(
        *, build_only=False, resume=None, peft=None, collator: Any = True, evaluated=None, classes=None, **kw
    ) -> Any:
        trainer_class, arguments_class = classes or (MyTrainer, MyArguments)
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "plain"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "seed": 3,
            "learning_rate": 1e-3,
            "report_to": "none",
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "maps": str(store_path),
        }
        torch.manual_seed(11)
        trainer = trainer_class(
            make_student(),
            arguments_class(**settings | kw),
            processing_class=processor,
            train_dataset=dataset,
            data_collator=MyCollator(processor) if collator is True else collator,
            eval_dataset=evaluated,
            peft_config=peft,
        )
        if not build_only:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run_plain


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_the_trainer_of_trl(run_plain, kind):
    """Accumulated too. TRL sums the loss in tiles, so the last bits may differ."""
    settings = {"optim": "sgd", "learning_rate": 0.05, "gradient_accumulation_steps": 2, **of_kind(kind)}
    trl = {"bf16": False, "gradient_checkpointing": False, "max_length": None}
    ours, plain = run_plain(classes=(LavenderTrainer, LavenderConfig), **settings, **trl), run_plain(**settings)
    for name in (*LOSSES, "student_entropy", "grad_norm", "probe_map_agreement", "probe_attention_loss"):
        assert logged(plain, name) == pytest.approx(logged(ours, name), rel=1e-4)
    expected, found = ours.model.state_dict(), plain.model.state_dict()
    assert expected.keys() == found.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_no_interruption(run_plain, tmp_path, kind):
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = run_plain(output_dir=str(tmp_path / "whole"), **settings, **of_kind(kind))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run_plain(output_dir=str(tmp_path / "again"), resume=checkpoint, **settings, **of_kind(kind))
    for name in (*LOSSES, "probe_map_agreement"):
        assert logged(resumed, name) == close(logged(whole, name))
    assert moved(whole.model.state_dict(), resumed.model.state_dict()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_its_export_has_no_trace_of_alignment(run_plain, make_student, tmp_path, kind):
    trainer = run_plain(**of_kind(kind))
    folder = export(trainer, tmp_path / "export", merge=False)
    if save_head(trainer, tmp_path / "head.safetensors"):
        assert all(is_alignment_part(name) for name in load_file(tmp_path / "head.safetensors"))
    base = make_student()
    loaded = PeftModel.from_pretrained(base, folder) if "lora" in kind else type(base).from_pretrained(folder)
    own = {name: one for name, one in trainer.model.state_dict().items() if not is_alignment_part(name)}
    assert loaded.state_dict().keys() == own.keys()
    assert [name for name, one in loaded.state_dict().items() if not torch.equal(own[name], one)] == []


def test_predictions_are_the_models_own(run_plain, dataset):
    """`compute_metrics` gets what plain training would give it: alignment's loss is not among the predictions."""
    seen: list[Any] = []
    trainer = run_plain(build_only=True, per_device_eval_batch_size=1, evaluated=dataset.select([0, 1]))
    trainer.compute_metrics = lambda one: seen.append(one) or {"count": len(one.label_ids)}
    metrics = trainer.evaluate()
    assert metrics["eval_count"] == 2
    assert metrics["eval_attention_loss"] > 0
    assert seen[0].predictions.shape[:2] == seen[0].label_ids.shape
    result = trainer.predict(dataset.select([0, 1]))
    assert result.predictions.shape == seen[0].predictions.shape
    assert result.metrics["test_attention_loss"] == pytest.approx(metrics["eval_attention_loss"])
    trainer.args.prediction_loss_only = True
    assert trainer.predict(dataset.select([0])).predictions is None


def test_what_a_plain_trainer_lacks_is_refused(run_plain):
    with pytest.raises(ConfigError, match=r"Got no data_collator\..*pass data_collator="):
        run_plain(collator=None)
    with pytest.raises(ConfigError, match="match='exact' with Liger's fused cross-entropy"):
        run_plain(build_only=True, match="exact", use_liger_kernel=True)


def test_liger_may_pass_where_no_prediction_is_needed(run_plain):
    for settings in (
        {"match": "label"},
        {"match": "exact", "liger_kernel_config": {"fused_linear_cross_entropy": False}},
    ):
        run_plain(build_only=True, use_liger_kernel=True, **settings)


def test_the_example_of_the_documentation(make_student, processor, dataset, store_path, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (example,) = (block for block in blocks if "AlignmentMixin" in block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maps").symlink_to(store_path)
    names = {"model": make_student(), "processor": processor, "dataset": dataset, "my_collator": MyCollator(processor)}
    shortened = example.replace("max_steps=1000", "max_steps=1, use_cpu=True, disable_tqdm=True, logging_steps=1")
    monkeypatch.setitem(sys.modules, "example", namespace := ModuleType("example"))
    vars(namespace).update(names)
    exec(shortened, vars(namespace))
    trainer = vars(namespace)["trainer"]
    trainer.train()
    assert logged(trainer, "attention_loss")[0] > 0
