"""What a path or hub id is: a vision-language model, a diffusion teacher, or a map store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from lavender.errors import ConfigError, ModelError

Kind = Literal["model", "teacher", "maps"]
NAMES: dict[Kind, str] = {
    "model": "a vision-language model",
    "teacher": "a diffusion teacher",
    "maps": "a map store",
}
_MARKS: dict[Kind, tuple[str, ...]] = {
    "model": ("config.json", "adapter_config.json", "config.yaml", "checkpoint"),
    "teacher": ("model_index.json",),
    "maps": ("manifest.json",),
}
"""Files and folders of which any shows the kind."""


def kind_of(target: str) -> Kind:
    """Whether a target is a model, a teacher or a map store.

    Args:
        target: a folder: of a model, a run, a LoRA adapter, a diffusion pipeline or a map store; or a hub id.

    Raises:
        ConfigError: the folder has the files of several kinds.
        ModelError: a folder of none of them, or a file. A hub id without model_index.json counts as a model.

    Examples:
        >>> from lavender.world import STUDENT_PATH, TEACHER_PATH
        >>> kind_of(str(TEACHER_PATH)), kind_of(str(STUDENT_PATH))
        ('teacher', 'model')
    """
    folder = Path(os.path.expanduser(target))
    if folder.is_file():
        raise ModelError(f"the file {folder}", "a folder, or a hub id", "name the folder of the model or map store")
    if not folder.is_dir():
        return "teacher" if _on_hub(target, "model_index.json") else "model"
    found = {kind: [mark for mark in marks if (folder / mark).exists()] for kind, marks in _MARKS.items()}
    kinds: list[Kind] = [kind for kind, marks in found.items() if marks]
    if len(kinds) > 1:
        marks = " and ".join(f"{found[kind][0]} of {NAMES[kind]}" for kind in kinds)
        raise ConfigError(
            f"the folder {folder}, which has {marks}", "the files of one kind", "move one kind into a folder of its own"
        )
    if not kinds:
        raise ModelError(
            f"the folder {folder}, which is no model, run, teacher or map store",
            f"one of the files {', '.join(mark for marks in _MARKS.values() for mark in marks)}",
            "check the path",
        )
    return kinds[0]


def _on_hub(target: str, name: str) -> bool:
    """Whether the hub or its cache has a file. An id that cannot be reached has none: loading it says why."""
    from huggingface_hub.errors import HFValidationError
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            target,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, HFValidationError):
        return False
    return found is not None
