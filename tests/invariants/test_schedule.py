"""Stages of a run: the Aligner's own, with a frozen VLM, and the rise and fall of λ. And what a run leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from invariants.test_trainer import KINDS, PUBLISHED, logged, of_kind, own_head, own_weights, run  # noqa: F401
from lavender.errors import ConfigError, DataError
from lavender.training.exporting import save_head


def with_aligner(kind: str) -> dict[str, Any]:
    return PUBLISHED if kind == "published" else of_kind(kind)


@pytest.mark.parametrize("kind", ["published", "published, lora", "learn"])
def test_in_its_stage_the_aligner_alone_learns(run, kind):  # noqa: F811
    start = run(build_only=True, **with_aligner(kind))
    stage = run(aligner_pretraining=1.0, weight_decay=0.1, **with_aligner(kind))
    before, after = own_weights(start), own_weights(stage)
    assert [name for name, one in before.items() if not torch.equal(after[name], one)] == []
    first, last = own_head(start), own_head(stage)
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert len(set(logged(stage, "attention_loss"))) == 2
    trainable = {name: one.requires_grad for name, one in start.model.named_parameters()}
    assert {name: one.requires_grad for name, one in stage.model.named_parameters()} == trainable


def test_after_the_stage_all_learn(run):  # noqa: F811
    """Two steps of four are the stage: they end as a run of two steps that is stage alone; then the VLM moves."""
    start, stage = run(build_only=True, **PUBLISHED), run(aligner_pretraining=0.5, max_steps=4, **PUBLISHED)
    assert any(not torch.equal(own_weights(stage)[name], one) for name, one in own_weights(start).items())
    losses = logged(stage, "attention_loss")
    assert len(losses) == 4
    assert len(set(losses)) == 4


def test_the_weight_rises_and_falls(run):  # noqa: F811
    trainer = run(max_steps=8, align_warmup=0.5, align_decay=0.25, learning_rate=0.0)
    parts = [logged(trainer, name) for name in ("loss", "vlm_loss", "attention_loss")]
    weights = [(total - language) / attention for total, language, attention in zip(*parts, strict=True)]
    assert weights == pytest.approx([2.5, 5, 7.5, 10, 10, 10, 5, 0], rel=0.02, abs=0.02)


def test_the_weight_is_switched_off_and_on(run):  # noqa: F811
    """Two switches in eight steps: steps 0 to 2, 3 to 5, 6 and 7."""
    trainer = run(max_steps=8, align_switches=2, learning_rate=0.0)
    parts = [logged(trainer, name) for name in ("loss", "vlm_loss", "attention_loss")]
    weights = [(total - language) / attention for total, language, attention in zip(*parts, strict=True)]
    assert weights == pytest.approx([10, 10, 10, 0, 0, 0, 10, 10], rel=0.02, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"align_switches": -1}, "Got align_switches=-1"),
        ({"align_warmup": 1.5}, "Got align_warmup=1.5"),
        ({"aligner_pretraining": -0.1}, "Got aligner_pretraining=-0.1"),
        ({"aligner_pretraining": 0.5}, "Got aligner_pretraining=0.5 with attention_loss='mass', the default"),
        (
            {"align_weight": 0.0, "aligner_pretraining": 0.5, **PUBLISHED},
            "Got aligner_pretraining with align_weight=0",
        ),
    ],
)
def test_impossible_stages_are_refused(run, settings, words):  # noqa: F811
    with pytest.raises(ConfigError, match=words):
        run(settings.pop("align_weight", 10.0), build_only=True, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_what_alignment_trained_is_kept_beside_the_model(run, kind, tmp_path):  # noqa: F811
    """With the default loss that is nothing, and there is no file."""
    trainer = run(**of_kind(kind))
    is_saved = save_head(trainer, tmp_path / "head.safetensors")
    assert is_saved == (tmp_path / "head.safetensors").is_file() == ("attention_loss" in KINDS[kind])
    saved = load_file(tmp_path / "head.safetensors") if is_saved else {}
    names = {name.rsplit("alignment_", 1)[1] for name in saved}
    aligner = {f"head.aligner.{layer}.weight" for layer in (0, 3, 6, 9)} | {"head.aligner.9.bias"}
    parallel = {"parallel.query.weight", "parallel.key.weight"} if kind == "learn" else set()
    assert names == (aligner | parallel if "attention_loss" in KINDS[kind] else set())
    assert len(saved) == {"full": 0, "lora": 0, "published, lora": 5, "learn": 5 + 4}[kind]


def test_chosen_parts_of_speech_alone_are_aligned(run):  # noqa: F811
    everything, nouns = run(max_steps=1), run(max_steps=1, parts_of_speech=["noun"])
    words = [logged(trainer, "matched_words")[0] for trainer in (everything, nouns)]
    assert words[1] == words[0] > 0  # the store has nouns alone
    with pytest.raises(DataError, match="Got maps for 0 of 6 samples"):  # these captions have no verb
        run(build_only=True, parts_of_speech=["verb"])
    with pytest.raises(ConfigError, match="Got parts_of_speech='name'"):
        run(build_only=True, parts_of_speech=["name"])
