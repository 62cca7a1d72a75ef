"""Load a model and its processor from a model folder, a hub id or a run folder. Errors name the path and the reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lavender.errors import FileError, ModelError
from lavender.model_files import (
    check_files,
    check_sizes,
    check_weight_files,
    loading,
    one_line,
    read_json,
    refuse_not_finite,
)
from lavender.students.base import VlmAdapter
from lavender.students.chat_processor import check_offsets
from lavender.type_checks import check_type

__all__ = [
    "dtype_on_disk",
    "load_config",
    "load_model",
    "load_processor",
    "load_reader",
    "load_run",
    "load_run_processor",
    "loading",
    "places_of",
    "read_config",
]

_TURNS = (
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
)


def read_config(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json as a dict. Call it inside `loading`, which turns other errors into ModelError.

    Args:
        path: folder or hub id.
        revision: branch, tag or commit on the hub; None for the main branch.

    Raises:
        ModelError: config.json is missing or damaged.
    """
    from transformers import PreTrainedConfig

    check_files(path, ["config.json"])
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"the folder {path}, without config.json", "a model folder or a hub id", "check the path")
    raw, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    check_sizes(raw, path)
    return raw


def load_config(path: str | Path, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """A model's config, as an object of its class. See `read_config`."""
    from transformers import AutoConfig

    read_config(path, revision)
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code is True, revision=revision)


def load_processor(
    adapter: VlmAdapter, path: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The processor to train with. If it has a chat template, the template is tried. `revision` as in `read_config`.

    Raises:
        ModelError: the folder has no image processor or no tokenizer, the template fails, or the processor does not
            return what the template needs; see `lavender.students.chat_processor`.
    """
    from transformers import AutoProcessor, PreTrainedTokenizerBase

    check_files(path)
    published = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code is True, revision=revision)
    parts = [getattr(published, name, None) for name in ("image_processor", "tokenizer")]
    if parts[0] is None or not isinstance(parts[1], PreTrainedTokenizerBase):
        raise ModelError(
            f"a {type(published).__name__} in {path}",
            "a processor of pictures and text",
            "get preprocessor_config.json, processor_config.json and the tokenizer's files too",
        )
    processor = adapter.processor(published)
    if processor.chat_template:
        try:
            rendered = processor.apply_chat_template(list(_TURNS), tokenize=False)
        except Exception as error:
            raise ModelError(
                f"the chat template of {path}, which fails on a question about a picture and its answer: "
                f"{one_line(error)}",
                "a template for such conversations",
                "repair chat_template.jinja, or get it once more",
            ) from error
        # others return the offsets, and damaged settings may make them expand a picture to billions of tokens
        if not type(processor).__module__.startswith(("transformers.", "lavender.")):
            check_offsets(processor, rendered)
    return processor


def load_model(
    adapter: VlmAdapter,
    path: str | Path,
    processor: Any,
    *,
    dtype: str,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Any:
    """The model, from safetensors files only.

    Args:
        adapter: the adapter of the model's family.
        path: folder or hub id.
        processor: its processor, whose tokens must all have an embedding.
        dtype: such as "float32" or "bfloat16".
        trust_remote_code: whether code that comes with the model may run.
        settings: further arguments of `from_pretrained`.

    Raises:
        ModelError: see `lavender.model_files.load_weights`; or the tokenizer is of another model.
    """
    from lavender.students.registry import auto_class

    trust = trust_remote_code is True
    auto = auto_class(adapter.config, trust)
    model = adapter.load(auto, str(path), dtype=dtype, use_safetensors=True, trust_remote_code=trust, **settings)
    num_embeddings = adapter.num_embeddings(model)
    token, number = max(processor.tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= num_embeddings:
        raise ModelError(
            f"the model {path}, whose tokenizer has {token!r} as token {number} and whose embeddings are "
            f"{num_embeddings}",
            "an embedding for each token",
            "get the tokenizer's files of this model",
        )
    return model


def load_run(path: str | Path, dtype: str = "float32", trust_remote_code: bool = False, device: str = "cpu"):
    """Load a model for evaluation: (model in evaluation mode, processor). LoRA is merged.

    Args:
        path: a run folder, whose checkpoint is loaded; or a model folder or hub id.
        dtype: such as "float32" or "bfloat16".
        trust_remote_code: whether code that comes with the model may run. A run that was trained with it needs it here
            again, since a run folder may come from somebody else.
        device: where the model is moved to once it is loaded.

    Raises:
        ModelError: the model is missing, damaged or out of reach.
        FileError: the run is not finished.
        ConfigError: the model comes with its own code, which may not run.
    """
    path, folder, lora, base, adapter, processor = _without_weights(path, trust_remote_code)
    with loading("model", path):
        with loading("base model" if lora else "model", base):
            settings = {} if lora is None else {"revision": lora.revision}
            model = load_model(adapter, base, processor, dtype=dtype, trust_remote_code=trust_remote_code, **settings)
        if lora is not None:
            model = _with_adapter(model, folder, lora)
        return model.eval().to(device), processor


def load_run_processor(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The processor that `load_run` returns, without reading weights. Raises what `load_run` raises before that."""
    return _without_weights(path, trust_remote_code)[-1]


def load_reader(path: str | Path, trust_remote_code: bool = False) -> tuple[VlmAdapter, Any]:
    """The adapter of a run's or model's family, and its processor. Raises what `load_run` raises before weights."""
    return _without_weights(path, trust_remote_code)[-2:]


def dtype_on_disk(path: str | Path, trust_remote_code: bool = False) -> str | None:
    """The type in which `dtype="auto"` loads a run or model, as its config names it; None if it names none.

    Of a LoRA adapter it is that of its base. Raises what `load_run` raises before it reads weights.
    """
    config = _without_weights(path, trust_remote_code)[4].config
    return None if config.dtype is None else str(config.dtype).removeprefix("torch.")


def _without_weights(path: str | Path, trust_remote_code: bool) -> tuple[str, Path, Any, str | Path, VlmAdapter, Any]:
    """Of a run or model: its path, the folder to load, PEFT's config or None, the base, its adapter, the processor."""
    from lavender.students.registry import adapter_for

    check_type("trust_remote_code", trust_remote_code, bool)
    path = os.path.expanduser(path)  # a hub id stays as it is
    folder = _checkpoint_of(path)
    with loading("model", path):
        lora = _adapter_config(folder) if (folder / "adapter_config.json").is_file() else None
        base = folder if lora is None else lora.base_model_name_or_path
        with loading("base model" if lora else "model", base):
            adapter = adapter_for(load_config(base, trust_remote_code, None if lora is None else lora.revision))
        return path, folder, lora, base, adapter, load_processor(adapter, folder, trust_remote_code)


def places_of(path: str | Path) -> tuple[str | Path, str | Path, str | None]:
    """Of a run, a model or an adapter: where its processor is, where the whole model's config is, its revision.

    Raises:
        FileError: the run is not finished.
        ModelError: an adapter that names no base.
    """
    path = os.path.expanduser(path)
    folder = _checkpoint_of(path)
    if (folder / "adapter_config.json").is_file():
        lora = _adapter_config(folder)
        return folder, lora.base_model_name_or_path, lora.revision
    place = folder if folder.is_dir() else path
    return place, place, None


def _checkpoint_of(path: str | Path) -> Path:
    """The checkpoint in a run folder; any other path as it is."""
    checkpoint = Path(path) / "checkpoint"
    check_finished(Path(path))
    return checkpoint if checkpoint.is_dir() else Path(path)


def check_finished(path: Path) -> None:
    """Raise FileError for the folder of a run that is not finished, such as one that is being made longer."""
    run = path / "config.yaml"
    if not run.is_file() or (path / "config.json").is_file():
        return
    lacking = next((name for name in ("checkpoint", "coverage.json") if not (path / name).exists()), None)
    if lacking:
        got = f"the run {path}, which has no {lacking}: it is not finished"
        raise FileError(
            got, "a finished run", f"let it go on: lavender train {run}" if goes_on(path) else its_model(path)
        )


def goes_on(run: Path) -> bool:
    """Whether `lavender train` lets a run go on, which it otherwise begins anew, its checkpoint then replaced."""
    return any((run / "trainer").glob("checkpoint-*")) or not (run / "checkpoint").is_dir()


def its_model(run: Path) -> str:
    """What to do with a run that does not go on."""
    return f"name the model folder itself, {run / 'checkpoint'}; lavender train would begin the run anew"


def _adapter_config(folder: Path) -> Any:
    """The config of the PEFT adapter in a folder."""
    from peft import PeftConfig

    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"base_model_name_or_path: {base!r} in {folder / 'adapter_config.json'}",
            "the folder or hub id of its base",
            "write it there",
        )
    lora = PeftConfig.from_pretrained(str(folder))
    lora.task_type = None  # the adapter is merged, so PEFT's wrapper for a task is not needed
    lora.inference_mode = True
    return lora


def _with_adapter(model: Any, folder: Path, lora: Any) -> Any:
    """The model with the PEFT adapter of a folder merged into its weights."""
    from peft import PeftModel
    from safetensors import safe_open

    check_weight_files(folder)
    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            refuse_not_finite(name, tensors.get_tensor(name), path)
    tuned = PeftModel(model, lora)
    result = tuned.load_adapter(str(folder), "default", torch_device="cpu")
    if result.missing_keys or result.unexpected_keys:
        raise ModelError(
            f"the adapter {path}, which lacks {sorted(result.missing_keys)[:3]} and has {result.unexpected_keys[:3]}, "
            "which its base has not",
            "the adapter of this base",
            "name its base in adapter_config.json, or get the adapter once more",
        )
    return tuned.merge_and_unload()
