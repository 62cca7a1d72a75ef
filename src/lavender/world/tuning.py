"""How the world's students are fine-tuned: the settings that demo and studies share, chosen on development scenes."""

from __future__ import annotations

from typing import Any

from lavender.config import ExtractionConfig
from lavender.teachers.diffusion.teacher import Teacher
from lavender.world import TEACHER_PATH

GRID = (16, 16)  # the built-in teacher's finest layer; a user's default is the paper's 32 × 32
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
    ("llava", "full"): 5e-4,
    ("llava", "lora"): 3e-4,
}
"""Mllama's are those at which plain fine-tuning is best; LLaVA's were not searched (docs/log.md)."""
ALIGNMENT: dict[str, Any] = {"align_weight": 5.0, "match": "exact"}


def load_teacher() -> Teacher:
    """The built-in teacher, ready to map."""
    config = ExtractionConfig(grid=GRID, timesteps=(100,), geometry="squash", batch_size=16)
    return Teacher.from_pretrained(TEACHER_PATH, config, name="world")
