"""Checkpoints during training: counts of coverage, types and names of weights, so that a resumed run is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lavender.alignment.objective import is_alignment_part
from lavender.errors import ConfigError

COUNTS_FILE = "coverage_counts.json"
"""File in a checkpoint's folder: what the run had counted when it wrote the checkpoint."""


def write_counts(accelerator: Accelerator, counts: Tensor, folder: str) -> None:
    """Write the counts, summed over processes, and wait until every process has written its part of the checkpoint.

    The main process then writes the file that makes the checkpoint complete.
    """
    total = accelerator.gather(counts.to(accelerator.device)[None]).sum(dim=0)
    if accelerator.is_main_process:
        (Path(folder) / COUNTS_FILE).write_text(json.dumps(total.tolist()))
    accelerator.wait_for_everyone()


def read_counts(accelerator: Accelerator, counts: Tensor, folder: str | None) -> Tensor:
    """Add a checkpoint's counts to `counts`, on the main process alone: counts are summed over processes at the end."""
    path = Path(folder or "") / COUNTS_FILE
    if folder is None or not accelerator.is_main_process or not path.is_file():
        return counts
    saved = json.loads(path.read_text())
    saved += [0] * (len(counts) - len(saved))  # for reasons that an older version did not know
    return counts + torch.tensor(saved, device=counts.device)


def check_alignment_parts(folder: str, model: nn.Module) -> None:
    """Refuse a checkpoint of another loss: with an Aligner where the model has none, or without one where it has one.

    Loading would only warn of it. Checkpoints of FSDP and DeepSpeed, which have other files, are not looked at.

    Raises:
        ConfigError: the checkpoint has parameters that alignment adds and the model has none, or the reverse.
    """
    names: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            names.update(weights.keys())
    in_model = any(is_alignment_part(name) for name, _ in model.named_parameters())
    if not names or in_model == any(map(is_alignment_part, names)):
        return
    got = "without an Aligner, but this loss has one" if in_model else "with an Aligner, but this loss has none"
    do = "set the checkpoint's own attention_loss and align_weight"
    do += "" if in_model else "; attention_loss='published' was the default of earlier versions"
    raise ConfigError(f"the checkpoint {folder} {got}", "a checkpoint of the same loss", do)


@contextmanager
def types_kept(model: nn.Module) -> Iterator[None]:
    """Restore the types of parameters that loading changes: PEFT loads adapters as float32, but QLoRA's are bfloat16.

    A resumed run would otherwise continue in another precision.
    """
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before[name]:
            parameter.data = parameter.data.to(before[name])


@contextmanager
def saved_under_module_names(model: nn.Module) -> Iterator[None]:
    """Make `model.save_pretrained` write the modules' current names.

    For some models transformers writes older names. A resumed run loads into existing modules, so it would silently
    keep the base's weights.
    """
    if isinstance(model, PreTrainedModel):
        save = partial(type(model).save_pretrained, model, save_original_format=False)
        model.save_pretrained = cast(Any, save)
    try:
        yield
    finally:
        vars(model).pop("save_pretrained", None)
