"""Starting `accelerate launch` with the project's own files, two processes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from scale.worker import Case

TESTS = Path(__file__).parents[1]
FILES = TESTS.parent / "examples" / "accelerate"
BF16 = ("--mixed_precision", "bf16")
KINDS = ("ddp", "fsdp2", "zero2", "zero3")
# ZeRO knows the CPU as an accelerator of its own; the trainer's use_cpu would make DDP of it, and of FSDP2
SETTINGS: dict[str, dict[str, object]] = {
    "one_gpu": {"use_cpu": True},
    "ddp": {"use_cpu": True},
    "fsdp2": {},
    "zero2": {"ddp_backend": "gloo"},
    "zero3": {"ddp_backend": "gloo"},
}


def launch(kind: str, *command: object, processes: int = 2, code: int = 0, options: Sequence[str] = ()) -> str:
    """Run a script (or -m module) under `accelerate launch`; what it wrote, stdout and stderr."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(FILES / f"{kind}.yaml"),
            "--num_processes",
            str(processes),
            "--mixed_precision",
            "no",
            "--main_process_port",
            "0",
            *options,
            *map(str, command),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
    )
    said = f"{ran.stdout}\n{ran.stderr}"
    assert ran.returncode == code, said[-6000:]
    return said


def train(kind: str, run: Path, *overrides: str, code: int = 0, options: Sequence[str] = ()) -> str:
    """`lavender train` under `accelerate launch`, as a user starts it; FSDP2 and bf16 by way of stand-ins for GPUs."""
    stands_in = kind == "fsdp2" or BF16[1] in options
    script = (TESTS / "scale" / "on_cpu.py", kind) if stands_in else ("-m", "lavender.cli")
    changes = [part for override in overrides for part in ("--set", override)]
    return launch(kind, *script, "train", run, *changes, code=code, options=options)


def gradients(kind: str, cases: Sequence[Case], workspace: Path, out: Path, options: Sequence[str] = ()):
    """Each case's gradients by parameter, and what was logged, of two processes."""
    out.mkdir(parents=True)
    order = {"kind": kind, "out": str(out), "workspace": str(workspace), "settings": SETTINGS[kind]}
    (out / "order.json").write_text(json.dumps(order | {"cases": [asdict(case) for case in cases]}))
    launch(kind, TESTS / "scale" / "worker.py", out / "order.json", options=options)
    found: dict[str, tuple[dict[str, Tensor], dict]] = {}
    for case in cases:
        about = json.loads((out / f"{case.name}.json").read_text())
        assert about["processes"] == 2
        found[case.name] = load_file(out / f"{case.name}.safetensors"), about
    return found
