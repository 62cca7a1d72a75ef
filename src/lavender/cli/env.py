"""`lavender env`: versions, build, devices and threads, for a bug report."""

from __future__ import annotations

import argparse
import os
import platform
import re
from typing import Any

from lavender.cli.output import report
from lavender.cli.stopping import DONE

HELP = "print versions, devices and threads, for a bug report"
DESCRIPTION = """Print what a bug report needs: versions, the build of PyTorch, devices, threads and the variables that
change them. It names no path and no user."""
PACKAGES = (
    *("lavender-vlm", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "diffusers", "tokenizers"),
    *("safetensors", "huggingface_hub", "numpy", "pillow", "pyarrow", "deepspeed", "bitsandbytes", "ray"),
    *("liger-kernel", "flash-attn", "torchvision"),
)
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "HF_HUB_OFFLINE"),
    *("TOKENIZERS_PARALLELISM", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "LAVENDER_DEBUG"),
)

_FOLDERS = re.compile(r"(https?://\S+)|(?<![\w.])(?:~|[A-Za-z]:)?(?:[/\\][^/\\:'\"()]*)+[/\\]")
"""The folders of paths in a message; web addresses as group 1, which stay."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has no options but those of every verb."""


def run(options: argparse.Namespace) -> int:
    facts = environment()
    lines = []
    for part, values in facts.items():
        lines.append(f"{part}:")
        for name, value in values.items():
            lines.append(f"  {name}: {'not installed' if value is None and part == 'packages' else value}")
    report(options, facts, lines)
    return DONE


def environment() -> dict[str, dict[str, Any]]:
    """What a bug report needs, as JSON values. A package that is missing or broken is a fact too, not an error."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": {"python": platform.python_version(), "platform": platform.platform(), "usable CPU cores": cores},
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": _torch(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken build raises OSError and others; the report is about just this
        return {"cannot be imported": _fault(error)}
    facts: dict[str, Any] = {
        "CUDA of the build": torch.version.cuda,
        "ROCm of the build": torch.version.hip,
        "CPU kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "threads between operations": torch.get_num_interop_threads(),
        "MPS": torch.backends.mps.is_available(),
    }
    try:
        facts["CUDA"] = torch.cuda.is_available()  # raises too where PYTORCH_NVML_BASED_CUDA_CHECK is set
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = f"compute capability {device.major}.{device.minor}"
            facts[f"GPU {index}"] = f"{device.name}, {device.total_memory / 1e9:.1f} GB, {capability}"
    except Exception as error:  # a driver that does not fit, or a GPU that has failed
        facts["GPUs cannot be asked"] = _fault(error)
    return facts


def _fault(error: Exception) -> str:
    """An error on one line, without the folders of the files that it names."""
    one_line = " ".join(str(error).split())
    return f"{type(error).__name__}: {_FOLDERS.sub(lambda found: found[1] or '…/', one_line)}"
