"""Loading models: an ordinary folder, a hub id, or the checkpoint of a run; errors name the path and the reason."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lavender.errors import ConfigError, LavenderError
from lavender.type_checks import check_type
from lavender.whole_files import TEMPORARY

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@contextmanager
def loading(what: str, path: str | Path) -> Iterator[None]:
    """Say in our own words that a model cannot be loaded."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except LavenderError:
        raise
    except StrictDataclassError as error:  # a config that contradicts itself: the second line says how
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the {what} {path}, whose config is wrong: {reason}", "a config that fits", "repair its config.json"
        ) from error
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the {what} {path}, which comes with its own code", "your consent to run that code",
                "read it, then add --trust-remote-code, or trust_remote_code: true to a run",
            ) from error  # fmt: skip
        reason = str(error).strip().split("\n")[0].rstrip(".")
        if not Path(path).exists() and not _HUB_ID.fullmatch(str(path)):
            reason = "there is no such folder"
        raise ConfigError(
            f"the {what} {path}, which cannot be loaded: {reason}", "a model folder or a hub id", "check the path"
        ) from error


def load_run(path: str | Path, dtype: str = "float32", trust_remote_code: bool = False):
    """(model, processor) of a run folder's checkpoint, or of a plain model path; LoRA is merged.

    Code that comes with the model runs only if `trust_remote_code`, also where the run was trained so: a run folder
    may come from somebody else.
    """
    from transformers import AutoProcessor

    from lavender.vlm.registry import adapter_for

    check_type("trust_remote_code", trust_remote_code, bool)
    path = os.path.expanduser(path)
    checkpoint = Path(path) / "checkpoint"
    if (
        not checkpoint.is_dir()
        and (Path(path) / "config.yaml").is_file()
        and not (Path(path) / "config.json").is_file()
    ):
        raise ConfigError(
            f"the run {path}, which has no checkpoint: it is not finished",
            "a finished run",
            f"let it go on: lavender train {Path(path) / 'config.yaml'}",
        )
    folder = checkpoint if checkpoint.is_dir() else Path(path)
    with loading("model", path):
        model = _load_model(folder, dtype, trust_remote_code)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return model, adapter_for(model.config).processor(processor)


def export_run(run: Path, out: Path, trust_remote_code: bool = False) -> Path:
    """Write a run's tuned model as one ordinary checkpoint with processor, LoRA merged, in the weights' own dtype."""
    if not (run / "checkpoint").is_dir():
        raise ConfigError(f"no checkpoint in {run}", "a run folder that `lavender train` wrote", "name such a folder")
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


def _load_model(folder: Path, dtype: str, trust_remote_code: bool):
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig

    from lavender.vlm.registry import adapter_for, auto_class

    lora = PeftConfig.from_pretrained(str(folder)) if (folder / "adapter_config.json").is_file() else None
    base = str(folder) if lora is None else str(lora.base_model_name_or_path)
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    model = adapter_for(config).load(
        auto_class(config, trust_remote_code), base, dtype=dtype, use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if lora is not None:
        lora.task_type = None  # it is merged here, and what PEFT adds for a task is not needed
        model = PeftModel.from_pretrained(model, str(folder), config=lora).merge_and_unload()
    return model.eval()
