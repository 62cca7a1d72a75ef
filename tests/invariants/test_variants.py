"""Every variant of alignment trains, and leaves no trace in the checkpoint."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from invariants.test_trainer import logged, lora, own_head, run  # noqa: F401
from lavender.checkpoints import export
from lavender.config import (
    ALIGNER_ACTIVATIONS,
    ALIGNER_FORMS,
    ALIGNER_KINDS,
    ALIGNER_NORMS,
    ATTENTION_LOSSES,
    POOLINGS,
    AlignmentConfig,
)
from lavender.objective import HEAD_NAME

OPTIONS = {
    "pooling": POOLINGS, "aligner": ALIGNER_FORMS, "aligner_kind": ALIGNER_KINDS, "aligner_norm": ALIGNER_NORMS,
    "aligner_activation": ALIGNER_ACTIVATIONS, "attention_loss": ATTENTION_LOSSES,
}  # fmt: skip
VARIANTS = [
    {name: value}
    for name, values in OPTIONS.items()
    for value in values
    if name == "pooling" or value != getattr(AlignmentConfig, name)  # the default once
]
TOGETHER = {"pooling": "flow-multi", "aligner": "deep", "aligner_norm": "batch", "attention_loss": "js"}


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


@pytest.mark.parametrize("settings", [*VARIANTS, TOGETHER], ids=lambda settings: "-".join(settings.values()))
def test_a_variant_trains_and_leaves_no_trace(run, plain, tmp_path, settings):  # noqa: F811
    trainer = run(**settings)
    head = trainer.model.get_submodule(HEAD_NAME)
    assert head.config == AlignmentConfig(**settings)
    losses = logged(trainer, "attention_loss")
    assert len(losses) == 2
    assert all(isfinite(loss) and loss > 0 for loss in losses)
    assert losses[0] != losses[1]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    folder = export(trainer, tmp_path / "export")
    assert names_in(folder) == names_in(plain)
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in plain.iterdir())
    for file in folder.glob("*.json"):
        assert "alignment" not in file.read_text()
        assert "lavender" not in file.read_text()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resuming_keeps_what_batch_normalisation_has_seen(run, tmp_path, kind):  # noqa: F811
    """Its running mean and variance are no parameters."""
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "aligner_norm": "batch"}
    trainers = []
    for resume in (None, str(tmp_path / "0" / "checkpoint-2")):
        out = str(tmp_path / str(len(trainers)))
        trainers.append(run(peft=lora() if kind == "lora" else None, output_dir=out, resume=resume, **settings))
    whole, resumed = (own_head(trainer) for trainer in trainers)
    assert logged(trainers[1], "attention_loss") == logged(trainers[0], "attention_loss")
    assert [name for name, one in whole.items() if "running" in name]
    assert [name for name, one in whole.items() if not torch.equal(resumed[name], one)] == []
