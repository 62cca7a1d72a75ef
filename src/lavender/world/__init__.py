"""The built-in world: small trained models of real classes, and generated scenes whose true masks are known."""

from __future__ import annotations

from pathlib import Path

WEIGHTS_PATH = Path(__file__).parent / "weights"
TEACHER_PATH = WEIGHTS_PATH / "teacher"
STUDENT_PATHS = {name: WEIGHTS_PATH / f"student_{name}" for name in ("mllama", "llava", "mllama_new_words")}
STUDENT_PATH = STUDENT_PATHS["mllama"]

TEACHER_NAME = "world"
"""The name of the built-in teacher: `lavender extract --teacher world`, and `teacher` in the map store's identity."""
TEACHER_NOTES = {
    TEACHER_NAME: "The maps come from the built-in teacher, which was trained on drawings over textures only. On "
    "photographs they show that the pipeline works, not where things are."
}
"""Teacher name → what a report has to say about its maps."""
