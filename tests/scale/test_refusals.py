"""What alignment cannot work with, said before the first step. What only a launch can show is in test_train.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from transformers import BitsAndBytesConfig, MllamaForConditionalGeneration

from lavender.errors import ConfigError
from lavender.training.distributed import check_batches, refuse_accelerator, refuse_model
from scale.worker import Case, run_case


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"torch_compile": True}, "Got torch_compile with alignment"),
        (
            {"attention_loss": "published", "align_weight": 0.0, "aligner_pretraining": 0.5},
            "Got aligner_pretraining with align_weight=0",
        ),
    ],
)
def test_settings_that_cannot_work_together(settings, message, workspace, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_case(Case("refused", settings=settings), workspace, 1, tmp_path, use_cpu=True)


def test_a_model_spread_over_devices_is_refused(workspace, tmp_path):
    places = {"model": "cpu", "lm_head": "disk"}
    model = MllamaForConditionalGeneration.from_pretrained(
        workspace / "mllama", device_map=places, offload_folder=tmp_path
    )
    with pytest.raises(ConfigError, match=r"Got a model spread over the devices \['cpu', 'disk'\]"):
        refuse_model(model)
    refuse_model(MllamaForConditionalGeneration.from_pretrained(workspace / "mllama", device_map="cpu"))


def test_batches_of_one_process_are_never_uneven(workspace, tmp_path):
    trainer, _ = run_case(Case("one"), workspace, 1, tmp_path, use_cpu=True)
    check_batches(trainer.accelerator, [True, False])


@pytest.mark.parametrize(
    ("plan", "is_fsdp2", "message"),
    [
        (None, False, "Got FSDP version 1"),
        ({"tp_size": 2}, True, r"Got tensor, context or sequence parallelism of size \(2, 1, 1\)"),
        ({"cp_size": 4}, True, r"of size \(1, 4, 1\)"),
    ],
)
def test_ways_of_dividing_a_model_that_are_refused(plan, is_fsdp2, message, workspace):
    """What accelerate says of itself; it makes neither of these on a CPU."""
    model = MllamaForConditionalGeneration.from_pretrained(workspace / "mllama")
    plan = None if plan is None else ParallelismConfig(**plan)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=is_fsdp2, parallelism_config=plan)
    with pytest.raises(ConfigError, match=message):
        refuse_accelerator(accelerator, model)  # ty: ignore[invalid-argument-type]
    accelerator.is_fsdp2, accelerator.parallelism_config = True, ParallelismConfig(dp_shard_size=2)
    refuse_accelerator(accelerator, model)  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_quantised_model_is_not_sharded(kind, workspace):
    model = MllamaForConditionalGeneration.from_pretrained(
        workspace / "mllama", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=True, parallelism_config=None)
    with pytest.raises(ConfigError, match=f"Got a quantised model with {kind.value}"):
        refuse_accelerator(accelerator, model)  # ty: ignore[invalid-argument-type]
    accelerator.distributed_type = DistributedType.MULTI_CPU
    refuse_accelerator(accelerator, model)  # ty: ignore[invalid-argument-type]
