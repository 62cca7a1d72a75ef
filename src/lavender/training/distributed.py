"""Distributed training: unsupported set-ups, FSDP preparation, batches that would deadlock."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers.integrations import deepspeed

from lavender.errors import ConfigError, DataError
from lavender.training.arguments import AlignmentArguments

# the mixins use attributes of Trainer; at run time they are combined with a class that has them
_TrainerLike = Trainer if TYPE_CHECKING else object


def refuse_settings(args: AlignmentArguments, with_peft: bool) -> None:
    """Raise ConfigError for settings that cannot work together, before anything is built."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process, among which transformers' Trainer would split each batch",
            "a process per GPU",
            "start with accelerate launch and examples/accelerate/ddp.yaml, or set CUDA_VISIBLE_DEVICES=0 for one GPU",
        )
    zero_stage = 0 if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage
    if args.torch_compile:
        raise ConfigError(
            "torch_compile with alignment, which compiles the whole model with its hooks",
            "a model that is not compiled as a whole",
            "set torch_compile: false; in a script of your own, call compile() of each decoder layer instead",
        )
    if args.aligner_pretraining and args.align_weight == 0:
        raise ConfigError("aligner_pretraining with align_weight=0", "alignment to pretrain", "set one of them")
    if args.aligner_pretraining and args.deepspeed_plugin is not None:
        raise ConfigError(
            "aligner_pretraining with DeepSpeed, which steps inside backward with gradients of all parameters",
            "one process, DDP or FSDP2",
            "launch with examples/accelerate/ddp.yaml or fsdp2.yaml",
        )
    if zero_stage == 3 and with_peft and args.activation_checkpointing:
        raise ConfigError(
            "DeepSpeed ZeRO-3 with LoRA and activation checkpointing, for which TRL forces the reentrant kind; that "
            "loses the attention's gradient",
            "non-reentrant checkpointing",
            "use FSDP2 or ZeRO-2, or set activation_checkpointing: false",
        )


def refuse_model(model: PreTrainedModel) -> None:
    """Raise ConfigError for a model whose layers are spread over devices."""
    placed: dict[str, Any] = vars(model).get("hf_device_map", {})  # of a model loaded with a device_map
    places = {str(place) for place in placed.values()}
    if len(places) > 1:
        raise ConfigError(
            f"a model spread over the devices {sorted(places)}, whose captured attention rows are on different devices",
            "a model on one device, or sharded by FSDP2 or ZeRO",
            "load it without device_map='auto', and launch with examples/accelerate/fsdp2.yaml",
        )


def refuse_accelerator(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Raise ConfigError for a way of sharding or parallelising a model that alignment does not support."""
    shards = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if shards and vars(model).get("is_quantized"):
        raise ConfigError(
            f"a quantised model with {accelerator.distributed_type.value}, which is untested with alignment",
            "one process, or DDP",
            "launch with examples/accelerate/ddp.yaml, or leave quantization out",
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError(
            "FSDP version 1, which flattens a layer's weights and so hides those that TRL's fused loss reads",
            "FSDP2",
            "set fsdp_version: 2, as examples/accelerate/fsdp2.yaml does",
        )
    plan = accelerator.parallelism_config
    if plan is not None and (plan.tp_enabled or plan.cp_enabled or plan.sp_enabled):
        raise ConfigError(
            f"tensor, context or sequence parallelism of size ({plan.tp_size}, {plan.cp_size}, {plan.sp_size}), "
            "which splits heads or tokens over processes",
            "all heads and tokens of a sample in one process",
            "use data parallelism: examples/accelerate/ddp.yaml, fsdp2.yaml, zero2.yaml or zero3.yaml",
        )


class UnroundedAlignment(_TrainerLike):
    """A trainer under DeepSpeed moves all tensors of a batch to the model's type; this one leaves those of alignment.

    In 16 bits the boxes of many small keys would be empty.
    """

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        alignment = send_to_device(inputs.pop("alignment"), self.args.device)
        return {**super()._prepare_inputs(inputs), "alignment": alignment}


def prepare_for_fsdp(accelerator: Accelerator, model: nn.Module) -> None:
    """Set the layers that FSDP2 wraps, and gather the output layer's weights before each forward.

    FSDP2 wraps those classes of `_no_split_modules` that the model contains. accelerate fails if one is missing, as
    CLIP's text layers are in LLaVA.
    """
    base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    plugin = accelerator.state.fsdp_plugin
    assert plugin is not None
    if plugin.transformer_cls_names_to_wrap is None:
        classes = {type(module).__name__ for module in base.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(classes & set(base._no_split_modules or ()))
    base.register_forward_pre_hook(_gather_output_layer)


def _gather_output_layer(model: PreTrainedModel, args: tuple) -> None:
    """Gather the output layer's weights, as FSDP2 does before the layer's forward, which TRL's fused loss never calls.

    TRL gathers sharded weights itself, but then the gradient of each shard is not averaged over processes.
    """
    layer = model.get_output_embeddings()
    if isinstance(layer, FSDPModule):
        layer.unshard()


def check_batches(accelerator: Accelerator, with_pictures: Sequence[bool]) -> None:
    """Stop where sharded training would deadlock: text-only batches on some processes, pictures on others.

    Args:
        with_pictures: for each micro-batch of this process, whether it has a picture.

    Raises:
        DataError: there are such batches; raised on every process.
    """
    flags = torch.tensor(with_pictures, dtype=torch.long, device=accelerator.device)
    counts = accelerator.gather(flags[None]).sum(dim=0)
    if ((counts > 0) & (counts < accelerator.num_processes)).any():
        raise DataError(
            "a text-only batch on one process and a batch with pictures on another, which run different layers",
            "the same layers on all processes, as FSDP2 and ZeRO need",
            "raise per_device_train_batch_size, leave out samples without a picture, or use DDP",
        )


@contextmanager
def whole_models() -> Iterator[None]:
    """Let `from_pretrained` read a whole model in this process alone, although a sharded training is set up.

    transformers would otherwise divide it among the processes, and wait for those that read none.
    """
    config, fsdp = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop("ACCELERATE_USE_FSDP", None)
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
        if fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp
