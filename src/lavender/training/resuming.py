"""Find the checkpoint from which a stopped run continues: the last complete one."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from lavender.alignment.coverage import Coverage
from lavender.training.checkpoints import COUNTS_FILE

UNUSABLE = "unusable-"
"""Prefix for the name of a checkpoint that was skipped."""
FIRST_COUNTS = 17
"""The least number of counts that a checkpoint has held: earlier versions knew fewer reasons."""
_STATE = "trainer_state.json"
_SHARDED = ("global_step*", "optimizer_*", "optimizer.bin", "pytorch_model_fsdp*")  # as DeepSpeed and FSDP write


class _BrokenError(Exception):
    """A part of a checkpoint is missing or damaged."""


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The last checkpoint from which training can continue, and the incomplete ones after it with their faults.

    transformers writes a checkpoint file by file, `trainer_state.json` last. It continues from whatever exists, even
    without the optimiser's state, so each file is checked here. No code in the files runs; weights are not compared.
    """
    steps = sorted(
        (path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.split("-")[1].isdigit()),
        key=lambda path: int(path.name.split("-")[1]),
        reverse=True,
    )
    passed: dict[Path, str] = {}
    for path in steps:
        try:
            _check(path)
            return path, passed
        except _BrokenError as error:
            passed[path] = str(error)
    return None, passed


def set_aside(passed: dict[Path, str]) -> None:
    """Rename skipped checkpoints. The trainer would take them for its newest ones, and delete good ones."""
    for path in passed:
        aside = path.with_name(UNUSABLE + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def _check(checkpoint: Path) -> None:
    _check_state(checkpoint)
    _check_counts(checkpoint)
    for path in sorted(checkpoint.glob("*.json")):
        if path.name != COUNTS_FILE:
            _json(path)
    weights = sorted(checkpoint.glob("*.safetensors"))
    for path in weights:
        _check_weights(path)
    for path in sorted(checkpoint.glob("*.safetensors.index.json")):
        named = _json(path).get("weight_map", {}).values()
        if missing := sorted({*named} - {file.name for file in weights}):
            raise _BrokenError(f"which has no {missing[0]}")
    sharded = any(any(checkpoint.glob(pattern)) for pattern in _SHARDED)
    if not weights and not sharded:
        raise _BrokenError("which has no weights")
    _check_pickle(checkpoint / "scheduler.pt", ("last_epoch",))
    for path in checkpoint.glob("scaler.pt"):
        _check_pickle(path, ())
    if not sharded:
        _check_pickle(checkpoint / "optimizer.pt", ("state", "param_groups"))
    randoms = sorted(checkpoint.glob("rng_state*.pth"))
    if not randoms:
        raise _BrokenError("which has no rng_state.pth")
    for path in randoms:
        _check_pickle(path, ("python", "numpy", "cpu"))


def _check_state(checkpoint: Path) -> None:
    path = checkpoint / _STATE
    if not path.is_file():
        raise _BrokenError("which was not written to its end")
    found = _json(path)
    try:
        state = TrainerState.load_from_json(str(path))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise _BrokenError(f"whose {path.name} is not what the trainer wrote: {error}") from error
    logged = found.get("log_history")
    whole = [found.get(name) for name in ("global_step", "max_steps", "num_train_epochs")]
    if whole[0] != int(checkpoint.name.split("-")[1]) or not all(isinstance(number, int) for number in whole):
        raise _BrokenError(f"whose {path.name} says step {state.global_step!r}")
    if not isinstance(logged, list) or not all(isinstance(entry, dict) and "step" in entry for entry in logged):
        raise _BrokenError(f"whose {path.name} has no list of what was logged")


def _check_counts(checkpoint: Path) -> None:
    path = checkpoint / COUNTS_FILE
    if not path.is_file():
        raise _BrokenError(f"which has no {path.name}")
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _BrokenError(f"whose {path.name} is not JSON: {error}") from error
    known = len(Coverage().counts())
    if not isinstance(counts, list) or not FIRST_COUNTS <= len(counts) <= known or {*map(type, counts)} != {int}:
        raise _BrokenError(f"whose {path.name} does not hold {known} counts")


def _check_weights(path: Path) -> None:
    """Check the header, and the file's length against it."""
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (OSError, SafetensorError) as error:
        raise _BrokenError(f"whose {path.name} is damaged: {error}") from error


def _check_pickle(path: Path, keys: tuple[str, ...]) -> None:
    """Check the archive's checksums, then its content, of allowed types alone. Large tensors stay on disk."""
    if not path.is_file():
        raise _BrokenError(f"which has no {path.name}")
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise _BrokenError(f"whose {path.name} is damaged: the checksum of {bad}")
        with safe_globals():
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _BrokenError:
        raise
    except Exception as error:  # a damaged archive may raise anything: BadZipFile, RuntimeError, UnpicklingError …
        reason = str(error).split("\n")[0][:200]
        raise _BrokenError(f"whose {path.name} is damaged: {reason}") from error
    if not isinstance(found, dict) or not all(key in found for key in keys):
        raise _BrokenError(f"whose {path.name} does not hold {', '.join(keys)}")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _BrokenError(f"whose {path.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise _BrokenError(f"whose {path.name} is a {type(found).__name__}")
    return found
