"""What remains of a training: an ordinary checkpoint, and beside it what alignment trained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ProcessorMixin

from lavender.alignment.objective import TRAINED_PARTS, is_alignment_part
from lavender.errors import ConfigError, FileError
from lavender.files import TEMPORARY, expanded
from lavender.students.loading import load_run
from lavender.training.mixin import AlignmentMixin


def export(trainer: AlignmentMixin, path: str | Path) -> Path:
    """Write an ordinary checkpoint with processor: no trace of alignment in weights or config.

    Full tuning writes what `from_pretrained` loads; LoRA writes an adapter for `PeftModel.from_pretrained`.
    With several processes every one must call this, to give its share of the weights; the main process writes.
    """
    path = expanded(path)
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return path
    # weights are written under the names they were read with; ZeRO-3's reader notes renamings that it did not use
    if renamings := vars(model).get("_weight_conversions"):
        model._weight_conversions = [one for one in renamings if one.was_used()]
    if isinstance(model, PeftModel):
        _export_adapter(model, state, path)
    else:
        model.save_pretrained(
            path, state_dict={name: value for name, value in state.items() if not is_alignment_part(name)}
        )
    cast(ProcessorMixin, trainer.processing_class).save_pretrained(path)
    return path


def save_head(trainer: AlignmentMixin, path: str | Path) -> None:
    """Write what alignment trained beside the model, and every export leaves out: Aligner, parallel projections.

    With several processes every one must call this; the main process writes.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return
    own = {name: value for name, value in state.items() if is_alignment_part(name) and "original_module" not in name}
    saved = {name.replace(".modules_to_save.default", ""): value.contiguous() for name, value in own.items()}
    save_file(saved, str(expanded(path)), metadata={"format": "pt"})


def _export_adapter(model: PeftModel, state: dict[str, Tensor], path: Path) -> None:
    """PEFT writes all it trained; then alignment's own parts are taken out of file and config."""
    config = cast(LoraConfig, model.peft_config["default"])
    kept = config.modules_to_save
    config.modules_to_save = [name for name in kept or () if name not in TRAINED_PARTS] or None
    try:
        model.save_pretrained(str(path), state_dict=state)
    finally:
        config.modules_to_save = kept
    weights = path / "adapter_model.safetensors"
    adapter = {name: value for name, value in load_file(weights).items() if not is_alignment_part(name)}
    save_file(adapter, weights, metadata={"format": "pt"})


def export_run(run: Path, out: Path, trust_remote_code: bool = False) -> Path:
    """Write a run's tuned model as one ordinary checkpoint with processor, LoRA merged, in the weights' own dtype."""
    run, out = expanded(run), expanded(out)
    if not (run / "checkpoint").is_dir():
        raise FileError(f"no checkpoint in {run}", "a run folder that `lavender train` wrote", "name such a folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        got = f"{out}, which is {'not empty' if out.is_dir() else 'a file'}"
        raise ConfigError(got, "a new folder", "choose another --out")
    model, processor = load_run(run, dtype="auto", trust_remote_code=trust_remote_code)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=out.parent) as partial:  # whole, or not there
        model.save_pretrained(Path(partial) / "model")
        processor.save_pretrained(Path(partial) / "model")
        (Path(partial) / "model").replace(out)
    return out
