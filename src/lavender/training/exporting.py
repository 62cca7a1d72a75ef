"""Export: the tuned model as an ordinary checkpoint, and what alignment trained beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ProcessorMixin

from lavender.alignment.objective import TRAINED_PARTS, is_alignment_part
from lavender.data.hub import upload
from lavender.errors import ConfigError, FileError
from lavender.files import TEMPORARY, expanded
from lavender.students.loading import check_finished, load_run
from lavender.students.word_maps import random_state_kept
from lavender.training.distributed import whole_models
from lavender.training.mixin import AlignmentMixin
from lavender.training.model_card import CARD, run_card, trainer_card


def export(
    trained: AlignmentMixin | str | Path, path: str | Path, *, merge: bool = True, trust_remote_code: bool = False
) -> Path:
    """Write the tuned model and its processor as an ordinary checkpoint, which needs no Lavender to load.

    By default every export is a whole model for `from_pretrained`, as `lavender export` writes it. With `merge=False`,
    LoRA and other PEFT methods write an adapter for `PeftModel.from_pretrained`, as `Trainer.save_model` does. Neither
    weights nor config contain anything of alignment. The folder's README.md is a model card.

    Examples:
        >>> import torch
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from lavender import LavenderConfig, LavenderTrainer, Teacher, export, extract, read_samples, to_dataset
        >>> from lavender.world import STUDENT_PATH, TEACHER_PATH
        >>> rows = [{"image": Image.new("RGB", (96, 64), "red"), "text": "a red dog"}]
        >>> samples = read_samples(Dataset.from_list(rows))
        >>> _ = extract(samples, Teacher.from_pretrained(TEACHER_PATH), "maps")
        >>> model = AutoModelForImageTextToText.from_pretrained(STUDENT_PATH, dtype=torch.float32)
        >>> processor = AutoProcessor.from_pretrained(STUDENT_PATH)
        >>> args = LavenderConfig("run", maps="maps", max_steps=1, max_length=None, use_cpu=True, bf16=False)
        >>> trainer = LavenderTrainer(model, args, train_dataset=to_dataset(samples), processing_class=processor)
        >>> _ = trainer.train()
        >>> export(trainer, "tuned").name
        'tuned'

    Args:
        trained: a trainer after `train()`, or the run folder that `lavender train` wrote. With several processes every
            process must call this with its trainer, because each holds part of the weights; the main process writes.
        path: folder to write to. For a run folder it must be new or empty, and appears only when it is complete.
        merge: merge an adapter into the weights. The base model is read again from its folder or the Hub, at the
            `revision` of the PEFT config, and keeps the type it has there; the model in training does not change.
        trust_remote_code: run the Python code that comes with the model, for a run folder or a merge.

    Returns:
        The folder.

    Raises:
        FileError: the run folder has no checkpoint.
        ConfigError: the folder for a run is not empty; a merge needs a base model that was not read from anywhere.
        ModelError: the model or the base model is missing, damaged or out of reach.
    """
    if isinstance(trained, str | Path):
        return _export_run(expanded(trained), expanded(path), merge, trust_remote_code)
    return _export_trainer(trained, expanded(path), merge, trust_remote_code)


def export_run(
    run: str | Path,
    out: str | Path,
    trust_remote_code: bool = False,
    merge: bool = True,
    repository: str | None = None,
) -> Path:
    """`export` of a run folder: what `lavender export` calls. The card's example loads `repository`."""
    return _export_run(expanded(run), expanded(out), merge, trust_remote_code, repository)


def save_head(trainer: AlignmentMixin, path: str | Path) -> bool:
    """Write the weights that alignment added, which every export leaves out: Aligner and parallel projections.

    With several processes every process must call this; the main process writes the safetensors file.

    Returns:
        Whether alignment added weights. The direct losses add none; then there is no file.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not any(is_alignment_part(name) for name, _ in model.named_parameters()):
        return False
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return True
    head = {name: value for name, value in state.items() if is_alignment_part(name) and "original_module" not in name}
    saved = {name.replace(".modules_to_save.default", ""): value.contiguous() for name, value in head.items()}
    save_file(saved, str(expanded(path)), metadata={"format": "pt"})
    return True


def _export_trainer(trainer: AlignmentMixin, path: Path, merge: bool, trust_remote_code: bool) -> Path:
    model = trainer.accelerator.unwrap_model(trainer.model)
    merge = merge and isinstance(model, PeftModel)
    if merge and not model.get_base_model().name_or_path:
        raise ConfigError(
            "an adapter to merge, and a base model that was not loaded from a folder or the Hub",
            "a base model that can be read again",
            "save the base model and load it from there before training, or export with merge=False",
        )
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return path
    if not merge:
        _write(trainer, model, state, path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as adapter:
        _write(trainer, model, state, Path(adapter))
        with whole_models(), random_state_kept(trainer.args.device):
            _write_loaded(Path(adapter), path, trust_remote_code)
    trainer_card(trainer, path.name, is_adapter=False).save(path / CARD)
    return path


def push(folder: str | Path, repository: str, private: bool = True) -> str:
    """Upload an exported checkpoint, with its card, to a model repository, which is made if it is not there.

    Args:
        folder: what `export` wrote.
        repository: its hub id.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        FileError: the hub refuses, or cannot be reached.
    """
    return upload(expanded(folder), repository, "model", "A model tuned with lavender-vlm", private)


def _write(trainer: AlignmentMixin, model: Any, state: dict[str, Tensor], path: Path) -> None:
    """Write the model as it was trained, an adapter apart, the processor, and the card."""
    # weights are written under the names they were read with; ZeRO-3's reader notes renamings that it did not use
    if renamings := vars(model).get("_weight_conversions"):
        model._weight_conversions = [renaming for renaming in renamings if renaming.was_used()]
    if isinstance(model, PeftModel):
        _write_adapter(model, state, path)
    else:
        model.save_pretrained(
            path, state_dict={name: value for name, value in state.items() if not is_alignment_part(name)}
        )
    cast(ProcessorMixin, trainer.processing_class).save_pretrained(path)
    trainer_card(trainer, path.name, isinstance(model, PeftModel)).save(path / CARD)


def _write_adapter(model: PeftModel, state: dict[str, Tensor], path: Path) -> None:
    """Let PEFT write all it trained, then remove alignment's parts from the file and the config."""
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


def _write_loaded(folder: Path, out: Path, trust_remote_code: bool) -> None:
    """Load a checkpoint, an adapter merged, and write it as one model in the type of its weights on disk."""
    model, processor = load_run(folder, dtype="auto", trust_remote_code=trust_remote_code)
    model.save_pretrained(out)
    processor.save_pretrained(out)


def check_export(run: Path, out: Path, merge: bool) -> tuple[Path, bool]:
    """Check that a run can be exported. Nothing is written.

    Returns:
        The folder to write, and whether the run's checkpoint is an adapter.

    Raises:
        FileError, ConfigError: as `export`.
    """
    check_finished(run)
    if not (run / "checkpoint").is_dir():
        raise FileError(f"no checkpoint in {run}", "a run folder that `lavender train` wrote", "name such a folder")
    out = out.resolve()  # a link is not replaced, but the folder that it names
    if out == Path.cwd() or os.path.ismount(out):
        raise ConfigError(f"{out}, which cannot be replaced", "a new folder", "name a folder in it with --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        got = f"{out}, which is {'not empty' if out.is_dir() else 'a file'}"
        raise ConfigError(got, "a new folder", "choose another --out")
    is_adapter = (run / "checkpoint" / "adapter_config.json").is_file()
    if not merge and not is_adapter:
        got = f"an adapter of {run}, whose weights were tuned themselves"
        raise ConfigError(got, "a run with LoRA or another PEFT method", "leave out --adapter (merge=False)")
    return out, is_adapter


def _export_run(run: Path, out: Path, merge: bool, trust_remote_code: bool, repository: str | None = None) -> Path:
    out, is_adapter = check_export(run, out, merge)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=out.parent) as partial:  # `out` appears when it is complete
        model = Path(partial) / "model"
        if is_adapter and not merge:
            shutil.copytree(run / "checkpoint", model)
        else:
            _write_loaded(run, model, trust_remote_code)
        run_card(run, is_adapter and not merge, repository).save(model / CARD)
        model.replace(out)
    return out
