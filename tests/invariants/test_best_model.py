"""Evaluation while training, and the best checkpoint back at the end: weights, adapters, what alignment trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from closeness import close, moved
from invariants.test_plain_trainer import run_plain  # noqa: F401
from invariants.test_trainer import KINDS, logged, of_kind, run  # noqa: F401
from lavender.alignment.objective import is_alignment_part
from lavender.training.exporting import export, save_head
from lavender.training.trainer import LavenderConfig, LavenderTrainer

STEPS = 4


def climbing(trainer: Any, name: str, best: int) -> None:
    """Let the metric be lowest at one step, whatever the weights: which one is put back is then no accident."""
    evaluate = trainer.evaluate

    def planted(*args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = evaluate(*args, **kwargs)
        assert name in metrics
        return metrics | {name: abs(trainer.state.global_step - best) + 1.0}

    trainer.evaluate = planted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer_kind", ["trl", pytest.param("plain", marks=pytest.mark.slow)])
def test_the_best_weights_are_back(run_plain, dataset, tmp_path, kind, trainer_kind):  # noqa: F811
    """Step 2 of 4 is best: afterwards all is as after a run that has done two steps of the same schedule."""
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "constant",
        "evaluated": dataset,
        "metric_for_best_model": "eval_vlm_loss",
        "per_device_eval_batch_size": 6,
    }
    if trainer_kind == "trl":
        settings |= {"bf16": False, "gradient_checkpointing": False, "max_length": None}
        settings |= {"classes": (LavenderTrainer, LavenderConfig)}
    trainer = run_plain(
        build_only=True, load_best_model_at_end=True, output_dir=str(tmp_path / "all"), **settings, **of_kind(kind)
    )
    climbing(trainer, "eval_vlm_loss", best=2)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    expected = run_plain(**settings | of_kind(kind) | {"max_steps": 2, "save_strategy": "no"})
    found, wanted = trainer.model.state_dict(), expected.model.state_dict()
    assert found.keys() == wanted.keys()
    assert any(is_alignment_part(name) for name in found) == ("attention_loss" in KINDS[kind])
    assert moved(wanted, found) == []
    last = run_plain(**settings | of_kind(kind) | {"save_strategy": "no"})
    assert any(not torch.equal(found[name], one) for name, one in last.model.state_dict().items())
    export(trainer, tmp_path / "export", merge=False)
    assert save_head(trainer, tmp_path / "head.safetensors") == ("attention_loss" in KINDS[kind])


def test_the_best_is_the_lowest_language_loss(run, dataset, make_student, processor, store_path, tmp_path):  # noqa: F811
    """Not the lowest `eval_loss`: of two sets, the one that is named."""
    args = LavenderConfig(
        output_dir=str(tmp_path),
        maps=str(store_path),
        max_steps=STEPS,
        seed=3,
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_length=None,
        logging_steps=1,
        gradient_checkpointing=False,
        disable_tqdm=True,
        learning_rate=0.1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        load_best_model_at_end=True,
        metric_for_best_model="eval_mapped_vlm_loss",
        save_total_limit=1,
    )
    trainer = LavenderTrainer(
        make_student(),
        args,
        processing_class=processor,
        train_dataset=dataset,
        eval_dataset={"mapped": dataset.select(range(5)), "unmapped": dataset.select([5])},
    )
    trainer.train()
    values = logged(trainer, "eval_mapped_vlm_loss")
    assert len(values) == STEPS
    assert len(logged(trainer, "eval_unmapped_vlm_loss")) == STEPS
    assert all(math.isnan(one) for one in logged(trainer, "eval_unmapped_attention_loss"))
    best = min(range(STEPS), key=values.__getitem__)
    assert trainer.state.best_metric == values[best]
    assert Path(str(trainer.state.best_model_checkpoint)).name == f"checkpoint-{best + 1}"
    assert trainer.evaluate()["eval_mapped_vlm_loss"] == pytest.approx(values[best], rel=1e-5)


def test_evaluation_does_not_disturb_training(run, make_student, dataset):  # noqa: F811
    """Logged numbers and weights are those of a run that never evaluates, also where it evaluates between two logs."""
    plain = run(max_steps=4, logging_steps=2)
    trainer = run(max_steps=4, logging_steps=2, build_only=True)
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 1
    trainer.eval_dataset = dataset.select([0, 5])
    trainer.train()
    for name in ("loss", "vlm_loss", "attention_loss", "matched_words", "student_entropy"):
        assert logged(trainer, name) == close(logged(plain, name))
    assert len(logged(trainer, "eval_vlm_loss")) == 4
    assert moved(plain.model.state_dict(), trainer.model.state_dict()) == []
