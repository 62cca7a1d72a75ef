"""Runs with held-out data: which checkpoint is exported, what is counted, and settings that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MllamaForConditionalGeneration

from closeness import close
from command_line import complaint, lavender, write_run, write_scenes
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.data.store import MapStore
from lavender.maps import WordMaps

EVALUATING: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST: dict[str, Any] = EVALUATING | {"load_best_model_at_end": True}


@pytest.fixture
def settings(make_student, processor, some_scenes, captions, store_path, tmp_path) -> dict[str, Any]:
    """Four pictures to train on; to evaluate on, one with maps and the one without."""
    make_student().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for name, part in (("train", slice(0, 4)), ("held-out", slice(4, 6))):
        (tmp_path / name).mkdir()
        write_scenes(tmp_path / name, some_scenes[part], captions[part])
    return {
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "train"),
        "eval_data": str(tmp_path / "held-out"),
        "maps": str(store_path),
        "prompt": "describe the picture.",
        "dtype": "float32",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "probe_size": 0,
        "align_weight": 10,
    }


def evaluations(out: Path) -> dict[int, dict[str, float]]:
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {int(entry["step"]): entry for entry in entries if "eval_loss" in entry}


def weights(folder: Path, lora: bool) -> dict[str, torch.Tensor]:
    if lora:
        return load_file(folder / "adapter_model.safetensors")
    return MllamaForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("lora", "metric"), [(None, "eval_vlm_loss"), ({"r": 3}, "eval_attention_loss"), (None, "eval_attention_loss")]
)
def test_the_best_checkpoint_is_exported(lora, metric, settings, tmp_path):
    """With this loss and learning rate the last is not the best."""
    chosen = BEST | {"attention_loss": "published", "lora": lora, "metric_for_best_model": metric}
    ran = lavender("train", write_run(tmp_path, **settings | chosen))
    assert ran.code == DONE, ran.err
    out = tmp_path / "out"
    found = evaluations(out)
    assert sorted(found) == [1, 2]
    assert found[1][metric] < found[2][metric]
    exported = weights(out / "checkpoint", bool(lora))
    best, last = (weights(out / "trainer" / f"checkpoint-{step}", bool(lora)) for step in (1, 2))
    assert [name for name, one in exported.items() if not torch.equal(one, best[name])] == []
    assert [name for name, one in exported.items() if not torch.equal(one, last[name])]
    coverage = json.loads((out / "coverage.json").read_text())
    assert (coverage["samples"], coverage["mapped_samples"]) == (8, 8)
    assert (coverage["evaluation"]["samples"], coverage["evaluation"]["mapped_samples"]) == (2, 1)
    assert coverage["evaluation"]["dropped"] == {"sample without maps in the store": 1}
    assert "maps for 1 of 2 samples of the evaluation" in ran.out


def test_maps_of_the_evaluation_come_from_a_store_of_their_own(settings, store_path, some_scenes, tmp_path):
    """Split in two by picture, the maps give the losses that they give together."""
    records = list(MapStore.open(store_path))
    for name, own in (("first", records[:4]), ("second", records[4:])):
        with MapStore.writer(tmp_path / name, {"made by": "tests"}, {}, (11, 13)) as writer:
            for record in own:
                writer.add(record)
    together = settings | EVALUATING | {"max_steps": 1}
    apart = together | {"maps": str(tmp_path / "first"), "eval_maps": str(tmp_path / "second")}
    losses = []
    for name, one in (("together", together), ("apart", apart)):
        ran = lavender("train", write_run(tmp_path, **one, out=str(tmp_path / name)))
        assert ran.code == DONE, ran.err
        losses.append(evaluations(tmp_path / name)[1])
    for key in ("eval_vlm_loss", "eval_attention_loss", "eval_matched_words"):
        assert losses[0][key] == close(losses[1][key])  # two models, made apart
        assert losses[0][key] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_strategy": "no"}, "which nothing uses"),
        ({"eval_data": None}, "eval_strategy: steps without eval_data"),
        ({"eval_data": None, "eval_strategy": "no", "eval_maps": "somewhere"}, "without eval_data"),
        ({"metric_for_best_model": "eval_attension_loss"}, "metric_for_best_model: eval_attension_loss"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, words, settings, tmp_path):
    assert words in complaint(lavender("train", write_run(tmp_path, **settings | BEST | changes)), WRONG_USAGE)


def test_maps_of_two_sizes_are_refused(settings, store_path, tmp_path):
    record = next(iter(MapStore.open(store_path)))
    with MapStore.writer(tmp_path / "small", {"made by": "tests"}, {}, (5, 7)) as writer:
        maps = torch.ones(len(record.words), 5, 7)
        writer.add(WordMaps(record.image_id, record.text, record.words, maps))
    run = write_run(tmp_path, **settings | EVALUATING, eval_maps=str(tmp_path / "small"))
    message = complaint(lavender("train", run), FAILED)
    assert f"the map stores {store_path} of 11 × 13 cells, {tmp_path / 'small'} of 5 × 7 cells" in message


def test_choosing_by_the_attention_loss_needs_maps(settings, some_scenes, captions, tmp_path):
    (tmp_path / "unmapped").mkdir()
    write_scenes(tmp_path / "unmapped", some_scenes[5:], captions[5:])
    changes = {"eval_data": str(tmp_path / "unmapped"), "metric_for_best_model": "eval_attention_loss"}
    run = write_run(tmp_path, **settings | BEST | changes)
    assert "Got maps for 0 of 1 samples" in complaint(lavender("train", run), FAILED)


def test_replayed_samples_are_mixed_in_and_recorded(settings, tmp_path):
    """Four samples of the data and one of the two held-out ones has no maps: the two are repeated to be a half."""
    chosen = settings | {"replay_data": settings.pop("eval_data"), "num_train_epochs": 1, "max_steps": -1}
    ran = lavender("train", write_run(tmp_path, **chosen, replay_share=0.5))
    assert ran.code == DONE, ran.err
    coverage = json.loads((tmp_path / "out" / "coverage.json").read_text())
    assert (coverage["samples"], coverage["mapped_samples"]) == (8, 6)
    assert (
        "maps for 4 of 4 samples with a picture\nof replay_data, maps for 1 of 2 samples with a picture; 1" in ran.out
    )
    again = lavender("train", write_run(tmp_path, **chosen, replay_share=0.2))
    assert "replay_share: 0.5 → 0.2" in complaint(again, WRONG_USAGE)


def test_replayed_samples_without_maps_do_not_stop_a_run(settings, some_scenes, captions, tmp_path):
    """Of ten samples four have maps, which is less than `min_coverage`; of the data alone all have."""
    (tmp_path / "unmapped").mkdir()
    write_scenes(tmp_path / "unmapped", some_scenes[5:], captions[5:])
    del settings["eval_data"]
    chosen = settings | {"replay_data": str(tmp_path / "unmapped"), "num_train_epochs": 1, "max_steps": -1}
    ran = lavender("train", write_run(tmp_path, **chosen, replay_share=0.6))
    assert ran.code == DONE, ran.err
    coverage = json.loads((tmp_path / "out" / "coverage.json").read_text())
    assert (coverage["samples"], coverage["mapped_samples"]) == (10, 4)
    again = lavender("train", write_run(tmp_path, **chosen | {"replay_data": chosen["data"]}, replay_share=0.6))
    assert f"replay_data: {tmp_path / 'unmapped'} → {chosen['data']}" in complaint(again, WRONG_USAGE)
