"""Every variant of alignment trains, and leaves no trace in the checkpoint."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import get_args

import pytest
from safetensors import safe_open

from closeness import close, moved
from invariants.test_trainer import LEARN, PUBLISHED, logged, lora, own_head, run  # noqa: F401
from lavender.alignment.objective import HEAD_NAME
from lavender.alignment.pooling import POOLINGS
from lavender.config import (
    AlignerActivation,
    AlignerForm,
    AlignerKind,
    AlignerNorm,
    AlignmentConfig,
    AttentionLoss,
)
from lavender.data.store import MapStore
from lavender.training.exporting import export

OPTIONS = {
    "pooling": POOLINGS,
    "aligner": get_args(AlignerForm),
    "aligner_kind": get_args(AlignerKind),
    "aligner_norm": get_args(AlignerNorm),
    "aligner_activation": get_args(AlignerActivation),
    "attention_loss": get_args(AttentionLoss),
    "align_weight": ["estimated"],
    "layers": ["first", "middle", "last"],
    "heads": [[1]],
    "subjects_and_objects": [True],
    "weight_by_confidence": [True],
    "sharpen": [3.0],
    "subtract_background": [True],
    "attention_forcing": [0.6],
}
VARIANTS = [{}] + [  # the default once
    {name: value} | (PUBLISHED if name in ("pooling", "align_weight") or "aligner" in name else {})
    for name, values in OPTIONS.items()
    for value in values
    if name == "pooling" or value != getattr(AlignmentConfig, name)
]
TOGETHER = {"pooling": "flow-multi", "aligner": "deep", "aligner_norm": "batch", "attention_loss": "published-js"}
RANDOM = LEARN | {"parallel_init": "random"}


def names_in(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sorted(weights.keys())


@pytest.fixture(scope="module")
def plain(make_student, processor, tmp_path_factory) -> Path:
    """The untuned checkpoint."""
    folder = tmp_path_factory.mktemp("plain")
    make_student().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings", [*VARIANTS, TOGETHER, RANDOM], ids=lambda own: "-".join(map(str, own.values())) or "default"
)
def test_a_variant_trains_and_leaves_no_trace(run, plain, tmp_path, settings):  # noqa: F811
    trainer = run(**settings)
    head = trainer.model.get_submodule(HEAD_NAME)
    assert head.config == AlignmentConfig(**{"align_weight": 10.0} | settings)  # what `run` has
    losses = logged(trainer, "attention_loss")
    assert len(losses) == 2
    assert all(isfinite(loss) and loss > 0 for loss in losses)
    assert losses[0] != losses[1]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    folder = export(trainer, tmp_path / "export")
    assert names_in(folder) == names_in(plain)
    assert {file.name for file in folder.iterdir()} == {file.name for file in plain.iterdir()} | {"README.md"}
    for file in folder.glob("*.json"):
        assert "alignment" not in file.read_text()
        assert "lavender" not in file.read_text()


ESTIMATED = PUBLISHED | {"align_weight": "estimated", "weight_by_confidence": True}


def test_the_weight_is_that_of_the_residuals_before(run):  # noqa: F811
    """App. C: λ = 1/(2σ²), σ² begins at 0.05 and moves by a twentieth towards each step's residual."""
    trainer = run(max_steps=3, align_weight="estimated", **PUBLISHED)
    variance = 0.05
    for total, language, residual in zip(
        *(logged(trainer, name) for name in ("loss", "vlm_loss", "attention_loss")), strict=True
    ):
        assert total == pytest.approx(language + residual / (2 * variance), rel=1e-3)  # logged to four digits
        variance = 0.95 * variance + 0.05 * residual
    assert trainer._align_weight.estimate.variance == pytest.approx(variance, rel=1e-3)
    assert abs(variance - 0.05) > 1e-3


def test_a_sum_over_cells_has_the_same_variance(run):  # noqa: F811
    """The residual is that of a cell, whichever way the loss adds them up."""
    settings = {"align_weight": "estimated", "max_steps": 1}
    mean, total = (run(attention_loss=loss, **settings) for loss in ("published", "published-sum"))
    assert total._align_weight.estimate.variance == pytest.approx(mean._align_weight.estimate.variance, rel=1e-5)
    assert logged(total, "attention_loss")[0] == pytest.approx(11 * 13 * logged(mean, "attention_loss")[0], rel=1e-3)


def test_accumulated_batches_have_one_weight_and_one_variance(run):  # noqa: F811
    settings = {**ESTIMATED, "max_steps": 3, "optim": "sgd", "learning_rate": 0.05}
    whole = run(per_device_train_batch_size=4, **settings)
    parts = run(per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    assert whole._align_weight.estimate.variance != 0.05
    assert parts._align_weight.estimate.variance == close(whole._align_weight.estimate.variance)
    for name in ("loss", "attention_loss"):
        assert logged(parts, name) == close(logged(whole, name))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_goes_on_with_its_variance(run, tmp_path, kind):  # noqa: F811
    trainers = []
    for resume in (None, str(tmp_path / "0" / "checkpoint-2")):
        trainers.append(
            run(
                peft=lora() if kind == "lora" else None,
                output_dir=str(tmp_path / str(len(trainers))),
                resume=resume,
                max_steps=4,
                save_steps=2,
                save_strategy="steps",
                **ESTIMATED,
            )
        )
    whole, resumed = trainers
    assert resumed._align_weight.estimate.variance == close(whole._align_weight.estimate.variance)
    assert logged(resumed, "loss") == close(logged(whole, "loss"))
    expected = whole.model.state_dict()
    assert moved(expected, resumed.model.state_dict()) == []


def test_confidence_weighs_words(run, store_path):  # noqa: F811
    """The batch's weights are the store's confidences, and the loss is another one than the plain mean."""
    plain, weighted = run(max_steps=1), run(max_steps=1, weight_by_confidence=True)
    batch = next(iter(weighted.get_train_dataloader()))["alignment"]
    sure = [one for record in MapStore.open(store_path) for one in record.confidence.tolist()]
    assert {round(one, 4) for one in batch["weights"][batch["present"]].tolist()} <= {round(one, 4) for one in sure}
    assert logged(weighted, "attention_loss") != logged(plain, "attention_loss")
    assert logged(weighted, "matched_words") == logged(plain, "matched_words")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resuming_keeps_what_batch_normalisation_has_seen(run, tmp_path, kind):  # noqa: F811
    """Its running mean and variance are no parameters."""
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "aligner_norm": "batch", **PUBLISHED}
    trainers = []
    for resume in (None, str(tmp_path / "0" / "checkpoint-2")):
        out = str(tmp_path / str(len(trainers)))
        trainers.append(run(peft=lora() if kind == "lora" else None, output_dir=out, resume=resume, **settings))
    whole, resumed = (own_head(trainer) for trainer in trainers)
    assert logged(trainers[1], "attention_loss") == close(logged(trainers[0], "attention_loss"))
    assert [name for name, one in whole.items() if "running" in name]
    assert moved(whole, resumed) == []
