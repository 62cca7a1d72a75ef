"""The verb `export` and the function mean one thing: a whole model, or with `merge=False` the adapter apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MllamaForConditionalGeneration
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from command_line import lavender
from invariants.test_run_files import STEP
from invariants.test_trainer import base, lora, run, trained  # noqa: F401
from lavender import export
from lavender.cli.main import DONE
from lavender.errors import ConfigError, FileError
from lavender.training.distributed import whole_models
from lavender.training.run import LoraSettings, RunConfig, export_run, train


@pytest.fixture(scope="module")
def finished(places, tmp_path_factory) -> Path:
    """A finished run of LoRA."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    return train(RunConfig(**places, out=str(out), lora=LoraSettings(), training=STEP | {"learning_rate": 1e-2}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_verb_and_the_function_write_the_same(finished, places, tmp_path):
    assert lavender("export", finished, "--out", tmp_path / "verb").code == DONE
    assert export(str(finished), tmp_path / "function") == tmp_path / "function"
    assert export_run(finished, tmp_path / "old name") == tmp_path / "old name"
    assert same(tmp_path / "verb", tmp_path / "function")
    assert same(tmp_path / "verb", tmp_path / "old name")
    untuned = weights(Path(places["model"]))
    merged = weights(tmp_path / "verb")
    assert merged.keys() == untuned.keys()
    assert {name for name in merged if not torch.equal(merged[name], untuned[name])} == {
        name for name in merged if "q_proj.weight" in name or "v_proj.weight" in name
    }


def test_a_run_with_its_adapter_apart(finished, tmp_path):
    folder = export(finished, tmp_path / "adapter", merge=False)
    for path in (finished / "checkpoint").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert "adapter_model.safetensors" in os.listdir(folder)


def test_a_trainer_merges_as_its_run_does(run, base, finished, tmp_path):  # noqa: F811
    """The model in training, and the random numbers that it draws next, stay as they are."""
    trainer = trained(run, base, "lora")
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    drawn = torch.get_rng_state()
    merged = export(trainer, tmp_path / "new" / "merged")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    export(trainer, tmp_path / "run" / "checkpoint", merge=False)
    for name in ("config.yaml", "coverage.json"):  # for the card
        shutil.copy(finished / name, tmp_path / "run")
    assert same(merged, export(tmp_path / "run", tmp_path / "of the run"))
    assert os.listdir(tmp_path / "new") == ["merged"]
    loaded = MllamaForConditionalGeneration.from_pretrained(merged)
    tuned = {name: weight for name, weight in loaded.state_dict().items() if "q_proj.weight" in name}
    untuned = MllamaForConditionalGeneration.from_pretrained(base).state_dict()
    assert tuned
    assert not any(torch.equal(weight, untuned[name]) for name, weight in tuned.items())


def test_what_cannot_be_merged_is_said_before_anything_is_written(run, finished, tmp_path):  # noqa: F811
    trainer = run(build_only=True, peft=lora())  # of a model that was never on disk
    with pytest.raises(ConfigError, match=r"Got an adapter to merge, .* export with merge=False"):
        export(trainer, tmp_path / "exported")
    with pytest.raises(FileError, match="Got no checkpoint in"):
        export(tmp_path, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    export(finished, tmp_path / "exported", merge=False)
    with pytest.raises(ConfigError, match="which is not empty"):
        export(finished, tmp_path / "exported")


class Zero3:
    """What transformers asks of DeepSpeed's settings."""

    def is_zero3(self) -> bool:
        return True


def test_a_merge_reads_its_base_whole_amid_sharded_training(monkeypatch):
    zero3 = Zero3()
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", lambda: zero3)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert is_deepspeed_zero3_enabled()
    with whole_models():
        assert not is_deepspeed_zero3_enabled()
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert is_deepspeed_zero3_enabled()
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
