"""The options of verbs that run a model: on which device, with which numbers, how many samples at a time."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lavender.errors import ConfigError

if TYPE_CHECKING:
    from lavender.evaluation.placement import Placement

DTYPES = ("float32", "float16", "bfloat16")
COMPARED = "default: float32 on a CPU; else auto, the models' type on disk, and float32 if their types differ"
"""Help on --dtype for verbs that compare models."""


def add_placement(
    group: argparse._ActionsContainer,
    dtype: str = "default: bfloat16 on cuda, else float32",
    choices: tuple[str, ...] = DTYPES,
) -> None:
    """Add --device and --dtype; `dtype` is the help of the latter."""
    group.add_argument("--device", default=None, help="such as cuda:1 (default: cuda if there is one, else cpu)")
    group.add_argument("--dtype", default=None, choices=choices, help=dtype)


def add_batch_size(group: argparse._ActionsContainer, text: str = "samples per forward pass (default: 16)") -> None:
    group.add_argument("--batch-size", type=int, default=None, metavar="N", help=text)


def placement_of(options: argparse.Namespace, on_gpu: str = "bfloat16") -> Placement:
    """How the options say that models run.

    Args:
        on_gpu: the default type on a GPU. On a CPU it is float32.

    Raises:
        ConfigError: PyTorch cannot use the device here; a batch size below 1.
    """
    from lavender.evaluation.placement import Placement

    device, batch_size = usable_device(options.device), vars(options).get("batch_size")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}", "at least 1", "change it")
    dtype = options.dtype or (on_gpu if device.startswith("cuda") else "float32")
    return Placement(device, dtype, batch_size or Placement.batch_size)


def usable_device(name: str | None) -> str:
    """The device of this name; without a name a GPU if there is one, else the CPU.

    Raises:
        ConfigError: PyTorch cannot use it here.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name!r}, which PyTorch cannot use here",
            "cpu, or the name of a device of this machine such as cuda or cuda:1",
            "choose another device, or leave --device out",
        ) from error
    return name
