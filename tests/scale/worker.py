"""What every process of a launch runs: cases of one step each, whose gradients the main process writes.

The same function gives the gradients of one process, inside the test's own process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback


@dataclass(frozen=True)
class Case:
    """One step of training.

    Attributes:
        name: of its file of gradients.
        samples: rows of the data set, in their order; divided among the processes.
        lora: tunes q and v with LoRA, or all weights.
        model: folder of the workspace.
        settings: of LavenderConfig.
    """

    name: str
    samples: tuple[int, ...] = (0, 1, 2, 3)
    lora: bool = False
    model: str = "mllama"
    settings: dict[str, Any] = field(default_factory=dict)


class Gradients(TrainerCallback):
    """Keeps each parameter's gradient, whole, before the optimiser uses it."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.trainer: Any = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer.is_deepspeed_enabled:  # its engine steps inside backward
            engine = self.trainer.deepspeed
            step = engine.step

            def watched(*given, **named):
                from deepspeed.utils import safe_get_full_grad

                self._keep(engine.module, safe_get_full_grad)
                engine.step = step
                return step(*given, **named)

            engine.step = watched

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.is_deepspeed_enabled:
            self._keep(self.trainer.model, _whole_gradient)

    def _keep(self, model: nn.Module, gradient_of) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradient = gradient_of(parameter)
                if gradient is not None:
                    self.found[name] = gradient.detach().float().clone()


def _whole_gradient(parameter: nn.Parameter) -> Tensor | None:
    from torch.distributed.tensor import DTensor

    return parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad


def settings_of(case: Case, processes: int, out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "max_steps": 1,
        "per_device_train_batch_size": len(case.samples) // processes,
        "train_sampling_strategy": "sequential",
        "seed": 3,
        "optim": "sgd",
        "learning_rate": 0.1,
        "report_to": "none",
        "bf16": False,
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "max_grad_norm": 0.0,
        "align_weight": 10.0,
        "probe_size": 0,
    } | case.settings


def run_case(case: Case, workspace: Path, processes: int, out: Path, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """The trainer after the step, and the gradients that it used, by parameter."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from lavender.training.trainer import LavenderConfig, LavenderTrainer

    args = LavenderConfig(
        maps=str(workspace / "maps"), **settings_of(case, processes, out) | settings
    )  # before the model is read: it tells how
    model = AutoModelForImageTextToText.from_pretrained(workspace / case.model)
    gradients = Gradients()
    lora = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = LavenderTrainer(
        model,
        args,
        processing_class=AutoProcessor.from_pretrained(workspace / case.model),
        train_dataset=Dataset.load_from_disk(str(workspace / "data")).select(case.samples),
        peft_config=lora if case.lora else None,
        callbacks=[gradients],
    )
    gradients.trainer = trainer
    trainer.train()
    trainer.remove_callback(gradients)
    return trainer, gradients.found


def is_unchanged(trainer: Any, base: Path) -> bool:
    """Whether the weights of the base model are still those on disk, to the bit; every process must ask."""
    from transformers import AutoModelForImageTextToText

    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return False
    own = {name.removeprefix("base_model.model.").replace(".base_layer", ""): one for name, one in state.items()}
    expected = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    return all(torch.equal(own[name].cpu(), one) for name, one in expected.items())


@contextlib.contextmanager
def gloo_for_all() -> Iterator[None]:
    """FSDP on the CPU. Torch has it; accelerate has it for GPUs alone, and asks here which kind there is."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    with mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.MULTI_GPU)):
        yield


@contextlib.contextmanager
def without_gpus(kind: str) -> Iterator[None]:
    """Stand-ins for what a kind of run needs of GPUs."""
    if kind == "fsdp2":
        with gloo_for_all():
            yield
    elif kind in ("zero2", "zero3"):
        # an extension for inference on CPUs: training does not call it, and its compilation takes minutes
        with mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None):
            yield
    else:
        yield


def main() -> None:
    torch.set_num_threads(1)
    order = json.loads(Path(sys.argv[1]).read_text())
    out = Path(order["out"])
    gc.freeze()  # modules: the end of each case runs a garbage collection
    with without_gpus(order["kind"]):
        for one in order["cases"]:
            case = Case(**one | {"samples": tuple(one["samples"])})
            trainer, gradients = run_case(case, Path(order["workspace"]), 2, out / "trainer", **order["settings"])
            frozen = "aligner_pretraining" in case.settings
            unchanged = frozen and is_unchanged(trainer, Path(order["workspace"]) / case.model)
            if trainer.accelerator.is_main_process:
                save_file({name: one.contiguous() for name, one in gradients.items()}, out / f"{case.name}.safetensors")
                (out / f"{case.name}.json").write_text(
                    json.dumps(
                        {
                            "type": str(trainer.accelerator.distributed_type),
                            "case": asdict(case),
                            "processes": trainer.accelerator.num_processes,
                            "wrapped": type(trainer.model_wrapped).__name__,
                            "unchanged": unchanged,
                            "log": trainer.state.log_history,
                        }
                    )
                )
            del trainer, gradients
    gc.collect()  # the threads of a process group must end while Python still runs
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
