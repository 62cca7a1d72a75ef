"""How the world's students are fine-tuned: the settings and helpers that the demo and the studies share."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lavender.config import ExtractionConfig
from lavender.teachers.diffusion.teacher import Teacher
from lavender.world import STUDENT_PATHS, TEACHER_PATH
from lavender.world.student_models import CAPTION_PROMPT

GRID = (16, 16)  # the finest layer of the built-in teacher; the default, the paper's 32 × 32, would only enlarge it
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 10,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "disable_tqdm": True,
}
LEARNING_RATES = {
    ("mllama", "full"): 5e-4,
    ("mllama", "lora"): 2e-3,
    ("mllama", "lora-all"): 2e-3,
    ("llava", "full"): 5e-4,
    ("llava", "lora"): 3e-4,
}
"""(student, tuning) → learning rate. Mllama's of "full" and "lora" are the best ones of plain fine-tuning on
development scenes; the others were not searched (docs/log.md)."""
ALIGNMENT: dict[str, Any] = {"attention_loss": "published", "align_weight": 5.0, "match": "exact"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""Environment of a training process: several run side by side, one per core."""
STOP_SECONDS = 10.0
"""How long a training process may clean up after SIGTERM, before it is killed."""


def load_teacher(**settings: Any) -> Teacher:
    """The built-in teacher, with the settings that suit it; `settings` of `ExtractionConfig` replace or add some."""
    suitable: dict[str, Any] = {"grid": GRID, "geometry": "squash", "batch_size": 16}
    if settings.get("mode", "noise") == "noise":  # no other mode reads timesteps
        suitable["timesteps"] = (100,)
    config = ExtractionConfig(**(suitable | settings))
    return Teacher.from_pretrained(TEACHER_PATH, config, name="world")


def training_settings(student: str, tuning: str, seed: int, steps: int = 200, align: bool = True) -> dict[str, Any]:
    """Settings of `LavenderConfig` for one fine-tuning of a world student.

    Args:
        student: "mllama" or "llava".
        tuning: "full", "lora" or "lora-all".
        seed: seed of the training.
        steps: optimizer steps, of 16 samples each.
        align: False sets `align_weight` to 0, which is plain fine-tuning.
    """
    rate = {"learning_rate": LEARNING_RATES[student, tuning], "max_steps": steps, "seed": seed}
    return TRAINING | ALIGNMENT | rate | ({} if align else {"align_weight": 0.0})


def run_paths(student: str, data: Path, maps: Path, out: Path) -> dict[str, Any]:
    """The settings of a run file besides those of `LavenderConfig`: model, paths, prompt and dtype."""
    return {
        "model": str(STUDENT_PATHS[student]),
        "data": str(data),
        "maps": str(maps),
        "out": str(out),
        "prompt": CAPTION_PROMPT,
        "dtype": "float32",
    }


def stop_processes(processes: Sequence[subprocess.Popen | BaseProcess]) -> None:
    """Terminate the processes that still run; kill those that have not ended after `STOP_SECONDS`."""
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _wait(process, STOP_SECONDS)
        process.kill()
        _wait(process)


def _wait(process: subprocess.Popen | BaseProcess, seconds: float | None = None) -> None:
    if isinstance(process, BaseProcess):
        process.join(seconds)
    else:
        process.wait(seconds)
