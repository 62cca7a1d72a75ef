"""Starting `accelerate launch` with the project's own files, two processes on the CPU."""

from __future__ import annotations

import json
import os
import re
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
LINES = 80
"""Lines of each process that a failed launch shows."""
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

Gradients = dict[str, tuple[dict[str, Tensor], dict]]
"""Name of a case → its gradients by parameter, and what the main process told."""


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
        timeout=900,
        env=environment,
    )
    said = f"{ran.stdout}\n{ran.stderr}"
    assert ran.returncode == code, _ends(said)
    return said


def _ends(said: str) -> str:
    """The last lines of every process: the process that failed first is not the last one to write."""
    lines = said.splitlines()
    of_rank = [re.match(r"\[rank\d+\]", line) for line in lines]
    ranks = {match[0] if match else "": None for match in of_rank}
    ends = [
        [line for line, match in zip(lines, of_rank, strict=True) if (match[0] if match else "") == rank]
        for rank in ranks
    ]
    return "\n".join(line for end in ends for line in end[-LINES:])


def train(kind: str, *runs: Sequence[object], code: int = 0, options: Sequence[str] = ()) -> str:
    """`lavender train` under `accelerate launch`, for each run in turn: its file and the settings to override.

    All runs share the start of the processes, which costs more than a short training. Stand-ins for GPUs are in place.
    """
    commands = [["train", str(run), *_overriding(overrides)] for run, *overrides in runs]
    return launch(kind, TESTS / "scale" / "on_cpu.py", kind, json.dumps(commands), code=code, options=options)


def train_as_users_do(
    kind: str, run: object, *overrides: object, processes: int = 2, options: Sequence[str] = ()
) -> str:
    """The command of the documentation, without any stand-in: for `ddp` and `one_gpu`."""
    command = ("-m", "lavender.cli", "train", run, *_overriding(overrides))
    return launch(kind, *command, processes=processes, options=options)


def _overriding(settings: Sequence[object]) -> list[str]:
    return [part for setting in settings for part in ("--set", str(setting))]


def gradients(kind: str, cases: Sequence[Case], workspace: Path, out: Path, options: Sequence[str] = ()) -> Gradients:
    """Each case's gradients by parameter, and what was logged, of two processes."""
    out.mkdir(parents=True)
    order = {"kind": kind, "out": str(out), "workspace": str(workspace), "settings": SETTINGS[kind]}
    (out / "order.json").write_text(json.dumps(order | {"cases": [asdict(case) for case in cases]}))
    launch(kind, TESTS / "scale" / "worker.py", out / "order.json", options=options)
    found: Gradients = {}
    for case in cases:
        about = json.loads((out / f"{case.name}.json").read_text())
        assert about["processes"] == 2
        found[case.name] = load_file(out / f"{case.name}.safetensors"), about
    return found
