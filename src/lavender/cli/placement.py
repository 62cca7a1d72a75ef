"""The options of verbs that run a model: on which device, and with which numbers."""

from __future__ import annotations

import argparse

from lavender.errors import ConfigError

DTYPES = ("float32", "float16", "bfloat16")


def add_placement(
    group: argparse._ActionsContainer, dtype: str = "default: bfloat16 on cuda, else float32", choices=DTYPES
) -> None:
    """Add --device and --dtype; `dtype` is the help of the latter."""
    group.add_argument("--device", default=None, help="such as cuda:1 (default: cuda if there is one, else cpu)")
    group.add_argument("--dtype", default=None, choices=choices, help=dtype)


def placement_of(options: argparse.Namespace, on_gpu: str = "bfloat16") -> tuple[str, str]:
    """(device, type of the numbers), as the options say or by default.

    Args:
        on_gpu: the default type on a GPU. On a CPU it is float32.

    Raises:
        ConfigError: PyTorch cannot use the device here.
    """
    device = usable_device(options.device)
    return device, options.dtype or (on_gpu if device.startswith("cuda") else "float32")


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
