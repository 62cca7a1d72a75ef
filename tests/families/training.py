"""Two steps of the real trainer on the world's pictures: what each family's processor and model must get through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from lavender.training.trainer import LavenderConfig, LavenderTrainer


def train_two_steps(
    model: PreTrainedModel, processor: ProcessorMixin, dataset: Dataset, maps: Path, out: Path, **alignment: Any
) -> None:
    """Both steps have an alignment loss above 0; the published one is below 1."""
    args = LavenderConfig(
        output_dir=str(out),
        max_steps=2,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        maps=str(maps),
        **alignment,
    )
    trainer = LavenderTrainer(model, args=args, processing_class=processor, train_dataset=dataset)
    trainer.train()
    losses = [entry["attention_loss"] for entry in trainer.state.log_history if "attention_loss" in entry]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    if args.attention_loss == "published":
        assert all(loss < 1 for loss in losses)
