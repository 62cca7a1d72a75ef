"""Where models run when they are scored, with which numbers, and how many samples at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavender.students.loading import dtype_on_disk, load_run


@dataclass(frozen=True)
class Placement:
    """How models run.

    Attributes:
        device: such as "cpu" or "cuda:1".
        dtype: such as "float32". "auto" is what `one_dtype` finds.
        batch_size: samples per forward.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16

    def load(self, path: str | Path, trust_remote_code: bool = False) -> tuple[Any, Any]:
        """The model and its processor; see `lavender.students.loading.load_run`."""
        return load_run(path, self.dtype, trust_remote_code, self.device)

    def words(self) -> str:
        """The options of a command that say this, with a blank before; "" for the default on a CPU."""
        found = (
            "" if (self.device, self.dtype) == ("cpu", "float32") else f" --device {self.device} --dtype {self.dtype}"
        )
        return found + ("" if self.batch_size == Placement.batch_size else f" --batch-size {self.batch_size}")

    def one_dtype(self, arms: Mapping[str, str | Path], trust_remote_code: bool = False) -> tuple[Placement, list[str]]:
        """The placement with one type for all models, and a note if their own types differ.

        Rounding differs by type, and may be as large as what tuning changed. So "auto" is the models' type on disk, and
        if they differ, or do not name one, float32, which holds the weights of each exactly.

        Args:
            arms: name → run, model folder or hub id.
            trust_remote_code: run the code that comes with a model.
        """
        if self.dtype != "auto":
            return self, []
        found = {arm: dtype_on_disk(path, trust_remote_code) for arm, path in arms.items()}
        first, *others = set(found.values())
        if not others and (first is not None or len(arms) == 1):
            return replace(self, dtype=first or "auto"), []
        named = ", ".join(f"{arm} {dtype or 'not named'}" for arm, dtype in found.items())
        note = f"all models are loaded in float32, for their types on disk differ: {named}; --dtype names another"
        return replace(self, dtype="float32"), [note]


ON_CPU = Placement()
"""Float32 on the CPU."""
