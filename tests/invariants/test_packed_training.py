"""A collator that packs: the trainer trains as SFTTrainer does with weight 0, and aligns the words of every sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from closeness import close, moved
from lavender.alignment.packing import packed
from lavender.errors import ConfigError, NotFiniteError
from lavender.students.registry import adapter_for
from lavender.training.trainer import LavenderConfig, LavenderTrainer
from lavender.world import STUDENT_PATHS


@pytest.fixture
def run(dataset, store_path, tmp_path):
    """Trains LLaVA for two steps of three samples, with or without packing."""

    def run(trainer_type: type = LavenderTrainer, packs: bool = True, builds_only: bool = False, **settings: Any):
        path, kwargs = STUDENT_PATHS["llava"], {}
        config = SFTConfig if trainer_type is SFTTrainer else LavenderConfig
        if trainer_type is LavenderTrainer:
            settings |= {"maps": str(store_path), "min_coverage": 0.5, "probe_size": 0}
        args = config(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=3,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            **settings,
        )
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(path)
        trainer = trainer_type(model, args, train_dataset=dataset, processing_class=processor, **kwargs)
        if packs:
            collate, adapter = trainer.data_collator, adapter_for(model.config)
            trainer.data_collator = lambda examples: packed(collate(examples), adapter)
        if not builds_only:
            trainer.train()
        return trainer

    return run


def test_weight_zero_is_plain_fine_tuning_of_packed_rows(run):
    plain, ours = run(SFTTrainer), run(align_weight=0.0)
    assert moved(plain.model.state_dict(), ours.model.state_dict(), plain.args.learning_rate) == []
    losses = [[row["loss"] for row in one.state.log_history if "loss" in row] for one in (plain, ours)]
    assert losses[0] == close(losses[1])


def test_augmentation_behind_a_replaced_collator_is_refused(run):
    """It would be switched off in silence."""
    with pytest.raises(ConfigError, match="augmentation with a data_collator that was replaced"):
        run(augment_flip=0.5)


def test_packed_rows_align_as_rows_of_their_own(run):
    apart, together = (run(packs=packs).state.log_history for packs in (False, True))
    for one, other in zip(apart[:2], together[:2], strict=True):
        assert one["matched_words"] == other["matched_words"] > 0
        for name in ("loss", "vlm_loss", "attention_loss"):
            # sums in other orders, in the second step after an update
            assert other[name] == pytest.approx(one[name], rel=1e-3), name


def test_a_packed_batch_that_is_not_finite_is_described_by_sample(run):
    """Hidden or not, a NaN is in every row of a dense kernel: so it is every sample, each by its own text."""
    trainer = run(builds_only=True)
    collate = trainer.data_collator

    def spoiled(examples: list[Any]) -> dict[str, Any]:
        batch = collate(examples)
        batch["pixel_values"][1, 0, 0, 0] = torch.nan
        return batch

    trainer.data_collator = spoiled
    with pytest.raises(NotFiniteError, match="That is every sample of the batch") as caught:
        trainer.train()
    assert all(f"of sample {sample} ('" in caught.value.got for sample in range(3))
