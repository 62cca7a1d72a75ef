"""What LavenderTrainer takes from SFTTrainer's callers, and how it leaves their model and settings."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from accelerate.utils import DistributedType
from peft import PrefixTuningConfig, PromptTuningConfig

from invariants.test_trainer import KINDS, lora, of_kind, own_weights, run  # noqa: F401
from lavender.alignment.objective import HEAD_NAME
from lavender.errors import ConfigError, DataError
from lavender.training import trainer as trainer_module
from lavender.training.trainer import LavenderConfig, LavenderTrainer


@pytest.fixture
def settings(store_path, tmp_path) -> dict[str, Any]:
    shared = {"max_steps": 1, "report_to": "none", "bf16": False, "use_cpu": True, "max_length": None, "probe_size": 0}
    return shared | {"output_dir": str(tmp_path / "out"), "maps": str(store_path), "disable_tqdm": True}


@pytest.fixture
def saved(make_student, processor, tmp_path) -> str:
    make_student().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_model_by_its_name_alone(saved, settings, dataset):
    """The processor is that of the model. The settings can be used again, as for a run without alignment."""
    args = LavenderConfig(**settings, model_init_kwargs={"dtype": "bfloat16"})
    for _ in range(2):
        trainer = LavenderTrainer(saved, args, train_dataset=dataset)
        assert cast(Any, trainer.model).dtype == torch.bfloat16
        assert args.model_init_kwargs == {"dtype": "bfloat16"}
    assert type(trainer.processing_class).__name__ == "MllamaProcessor"


@pytest.mark.parametrize("kind", [DistributedType.MULTI_GPU, DistributedType.DEEPSPEED, DistributedType.NO])
def test_a_model_is_not_spread_where_each_process_has_one(kind, saved, settings, dataset, monkeypatch):
    """As SFTTrainer does: otherwise TRL's function would choose device_map="auto"."""
    args, seen = LavenderConfig(**settings, trust_remote_code=True), {}

    def create(name: str, **given: Any) -> Any:
        seen.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "create_model_from_path", create)
    monkeypatch.setattr(args.distributed_state, "distributed_type", kind)
    with pytest.raises(KeyboardInterrupt):
        LavenderTrainer(saved, args, train_dataset=dataset)
    alone = kind == DistributedType.NO
    assert seen == {"trust_remote_code": True} | ({} if alone else {"device_map": None})


def test_methods_that_add_tokens_are_refused(run):  # noqa: F811
    for config in (PromptTuningConfig, PrefixTuningConfig):
        with pytest.raises(ConfigError, match=r"peft_type: PR\w+_TUNING, which does not tune chosen modules"):
            run(build_only=True, peft=config(num_virtual_tokens=3, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_error_the_same_model_trains_as_a_new_one(kind, run, make_student, dataset):  # noqa: F811
    """As in a notebook, where the same cell runs again with the setting that the error names."""
    model = make_student()
    modules = [name for name, _ in model.named_modules()]
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(DataError, match="or lower min_coverage"):
        run(model=model, data=dataset.select([5]), build_only=True, **of_kind(kind))  # it has no maps
    assert [name for name, _ in model.named_modules()] == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    again, new = run(model=model, **of_kind(kind)), run(**of_kind(kind))
    assert HEAD_NAME in str([name for name, _ in again.model.named_modules()])
    found, expected = own_weights(again), own_weights(new)
    assert found.keys() == expected.keys()
    assert [name for name, one in expected.items() if not torch.equal(found[name], one)] == []


def test_several_gpus_in_one_process_are_refused(settings, make_student, processor, dataset, monkeypatch):
    """transformers' Trainer would copy the model to each, and split a batch without its words."""
    args = LavenderConfig(**settings)
    monkeypatch.setattr(args, "_n_gpu", 2)
    with pytest.raises(ConfigError, match="2 GPUs in one process.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        LavenderTrainer(make_student(), args, processing_class=processor, train_dataset=dataset)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_loss_is_of_32_bits(kind, run):  # noqa: F811
    """PEFT's wrapper opens autocast around the model and its hooks; the model's own forward closes it before them."""
    trainer, seen = run(build_only=True, bf16=True, **of_kind(kind)), set()
    head = trainer.accelerator.unwrap_model(trainer.model).get_submodule(
        f"base_model.model.{HEAD_NAME}" if kind == "lora" else HEAD_NAME
    )
    head.register_forward_pre_hook(lambda module, args: seen.add(torch.is_autocast_enabled("cpu")))
    trainer.train()
    assert seen == {False}


def test_pictures_that_max_length_cuts_are_named(run):  # noqa: F811
    with pytest.raises(DataError, match="the model takes none.*set max_length=None, or raise it"):
        run(build_only=True, max_length=3)


def test_a_number_becomes_no_estimate_in_the_middle_of_a_run(run, tmp_path):  # noqa: F811
    shared = {"attention_loss": "published", "save_strategy": "steps", "save_steps": 1}
    run(**shared)
    with pytest.raises(ConfigError, match="a checkpoint of a run whose align_weight was a number"):
        run("estimated", resume=str(tmp_path / "out" / "checkpoint-1"), **shared)
