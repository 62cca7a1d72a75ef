"""The built-in world: small trained models of real classes, and generated scenes whose true masks are known."""

from __future__ import annotations

from pathlib import Path

WEIGHTS_PATH = Path(__file__).parent / "weights"
TEACHER_PATH = WEIGHTS_PATH / "teacher"
STUDENT_PATHS = {family: WEIGHTS_PATH / f"student_{family}" for family in ("mllama", "llava")}
STUDENT_PATH = STUDENT_PATHS["mllama"]
