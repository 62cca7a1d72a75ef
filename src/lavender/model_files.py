"""The files of a model or a teacher: what is wrong with them becomes one sentence that names the file.

They are looked at before transformers and diffusers build anything from them. This module imports neither.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from lavender.errors import ConfigError, LavenderError, ModelError

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_POINTER = b"version https://git-lfs.github.com/spec/"
_JSON = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
    "adapter_config.json",
    "model_index.json",
    "scheduler_config.json",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
)
_TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt", "tokenizer.model")
_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
_REPEATED = re.compile(r"layers|depth|blocks")
_COUNTED = re.compile(r"size|dim|heads|experts|positions|embed|channels|latents|quer|tiles|timesteps|length|rank|num_")
MOST_REPEATED, MOST = 1000, 10**8
"""The most layers, and the largest of all other sizes, that a config may name: above those of any known model."""
IN_RUN_FILE = "write trust_remote_code: true in the run file"
WITH_FLAG = "add --trust-remote-code, or in Python trust_remote_code=True"


@contextmanager
def loading(what: str, path: str | Path, consent: str | None = WITH_FLAG) -> Iterator[None]:
    """Say in one sentence why a model cannot be loaded, whatever the reason; what loads it prints nothing.

    Args:
        what: "model" or "teacher".
        path: its folder or hub id.
        consent: how to allow the model's own code; None where it never runs.

    Raises:
        ModelError: anything was raised inside that is not already a LavenderError.
        ConfigError: the model comes with its own code, without consent.
    """
    try:
        with _quiet():
            yield
    except LavenderError:
        raise
    except Exception as error:
        raise _explained(what, str(path), consent, error) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports, which are read and said in our own words, and bars outside a terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(max(level, logging.ERROR))
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _explained(what: str, path: str, consent: str | None, error: Exception) -> LavenderError:
    from huggingface_hub.errors import StrictDataclassError

    if "trust_remote_code" in str(error):
        got = f"the {what} {path}, which comes with its own code"
        if consent is None:
            return ModelError(got, f"a {what} that needs none", f"choose another {what}")
        return ConfigError(got, "your consent to run that code", f"read it, then {consent}")
    if isinstance(error, StrictDataclassError):  # a config that contradicts itself: the second line says how
        return ModelError(
            f"the {what} {path}, whose config is wrong: {_line(error)}", "a config that fits", "repair its config.json"
        )
    got = f"the {what} {path}, which cannot be loaded: "
    if Path(path).exists():
        return ModelError(got + one_line(error), f"a whole {what}", "repair the folder, or get it once more")
    if not _HUB_ID.fullmatch(path):
        return ModelError(got + "there is no such folder", "a model folder or a hub id", "check the path")
    return ModelError(*_of_hub(got, path, error))


def _of_hub(got: str, path: str, error: Exception) -> tuple[str, str, str]:
    """What to say of a hub id that cannot be had."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    codes = {one.response.status_code for one in chain if isinstance(one, errors.HfHubHTTPError)}
    elsewhere = f"there is no folder {path}, and "
    if has(errors.GatedRepoError):
        return (
            got + "access to it is restricted on the hub",
            "a licence that you have accepted, and a login",
            f"accept it at {constants.ENDPOINT}/{path}, then run hf auth login",
        )
    if has(errors.RepositoryNotFoundError, errors.HFValidationError):
        return (
            got + elsewhere + "the hub has no model of this name that you may see",
            "a model folder or a hub id",
            "check the path or id; for a private model run hf auth login",
        )
    if codes & {401, 403}:
        return got + "the hub refuses it to you", "a login that may read it", "run hf auth login"
    if constants.HF_HUB_OFFLINE and has(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        return (
            got + elsewhere + "HF_HUB_OFFLINE is set, and the hub's cache does not hold it",
            "a model folder, or a model in the cache",
            "check the path; for a hub id unset HF_HUB_OFFLINE",
        )
    client = getattr(errors, "HTTPError", ConnectionError)  # of the library that the hub is asked with
    if has(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, client, ConnectionError):
        return (
            got + elsewhere + f"the hub at {constants.ENDPOINT} is out of reach: {one_line(chain[-1])}",
            "a model folder, or a network",
            "check the path; for a hub id check network and proxy",
        )
    return got + one_line(error), "a whole model", "check the path or id"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def one_line(error: BaseException) -> str:
    """An error's first line; its class too, where that alone says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].rstrip(".")[:300] if lines else ""
    told = isinstance(error, OSError | ValueError) and said
    return said if told else f"{type(error).__name__}: {said}".rstrip(": ")


def check_files(folder: str | Path, names: Sequence[str] = _JSON) -> None:
    """See that a local folder's JSON files and texts can be read, and that its config has no absurd size.

    A hub id is passed over: `check_sizes` can be asked with its config.

    Args:
        folder: a folder that may lack some or all of them.
        names: of the JSON files.

    Raises:
        ModelError: names the file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ModelError(f"the file {folder}", "a model folder or a hub id", "name the folder")
    for name in _TEXTS:
        if (folder / name).is_file():
            _contents(folder / name)
    for name in names:
        if (folder / name).is_file():
            settings = read_json(folder / name)
            if name in ("config.json", "scheduler_config.json"):
                check_sizes(settings, folder / name)


def _contents(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        got = f"{path}, which cannot be read: {error.strerror}"
        raise ModelError(got, "a readable file", "see its rights") from error
    _refuse_pointer(path, content)
    return content


def _refuse_pointer(path: Path, beginning: bytes) -> None:
    if beginning.startswith(_POINTER):
        raise ModelError(f"{path}, a Git LFS pointer", "the file that it stands for", "run git lfs pull in its folder")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's keys and values. Raises ModelError for anything else."""
    try:
        settings = json.loads(_contents(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        got = f"{path}, which is not JSON: {_line(error)[:200]}"
        raise ModelError(got, "JSON", "get the file once more") from error
    if not isinstance(settings, dict):
        raise ModelError(f"a {type(settings).__name__} in {path}", "keys and values", "get the file once more")
    return settings


def check_sizes(settings: Mapping[str, Any], path: str | Path, part: str = "") -> None:
    """See that no size in a config is so large that building the model would never end."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            check_sizes(value, path, f"{part}{name}.")
            continue
        most = MOST_REPEATED if _REPEATED.search(str(name)) else MOST if _COUNTED.search(str(name)) else None
        for one in value if isinstance(value, list | tuple) else [value]:
            if most is not None and isinstance(one, int | float) and abs(one) > most:
                raise ModelError(
                    f"{part}{name}: {one} in {path}",
                    f"at most {most}, more than any known model has",
                    "repair the config, or get it once more",
                )


def check_weight_files(folder: str | Path) -> int:
    """See that a local folder's weights are whole safetensors files; how many numbers they hold, 0 for a hub id.

    Raises:
        ModelError: names the file that is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return 0
    held, found = 0, False
    for stem in _STEMS:
        for path in _weight_files(folder, stem):
            found = True
            held += _held(path)
    if not found:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        got = f"the folder {folder}, without safetensors" + (f" beside {pickled[0]}" if pickled else "")
        do = "convert its weights: a pickle can run code, and is never loaded" if pickled else "get the weights"
        raise ModelError(got, "weights in a file such as model.safetensors", do)
    return held


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The files of weights that `from_pretrained` reads: one, or those of the index."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(one, str) for one in parts.values()):
        raise ModelError(f"no weight_map of names in {index}", "a file name for each weight", "get the file once more")
    paths = [folder / name for name in sorted(set(parts.values()))]
    for path in paths:
        if os.path.basename(path.name) != str(path.relative_to(folder)) or not path.is_file():
            raise ModelError(f"{index}, which names {path}", "files in its own folder", "get all parts of the model")
    return paths


def _held(path: Path) -> int:
    """How many numbers a safetensors file holds."""
    from math import prod

    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        _refuse_pointer(path, file.read(len(_POINTER)))
    try:
        with safe_open(path, framework="pt") as tensors:
            return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}, which is not a whole safetensors file: {_line(error)}",
            "the file as it was written",
            "get it once more",
        ) from error


logger = logging.getLogger(__name__)
_NUMBERED = re.compile(r"\.\d+\.")
_BUFFERS = re.compile(r"(position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias|num_batches_tracked)$")
MOST_AS_HELD = 4  # a model may have this many times the numbers of its files: they may be packed
SHOWN = 3


def load_weights(cls: Any, path: str | Path, empty: Callable[[], nn.Module] | None = None, **settings: Any) -> Any:
    """`cls.from_pretrained(path, **settings)`, refused if what it reports or holds is not a whole model.

    Args:
        cls: a class of transformers or diffusers, or an Auto class.
        path: folder or hub id.
        empty: builds the same model from its config. It is called with the meta device, to see that the model is not
            far larger than its files before any memory is taken.

    Raises:
        ModelError: a file is missing or damaged; the config tells of another model; a weight is missing, of another
            shape, or not finite.
    """
    held = check_weight_files(path)
    if held and empty is not None and not is_deepspeed_zero3_enabled():  # which divides weights as they are built
        with torch.device("meta"):
            told = sum(one.numel() for one in empty().parameters())
        if told > MOST_AS_HELD * held:
            raise ModelError(
                f"a config of {told:,} parameters in {path}, whose weights are {held:,}",
                "a config of these weights",
                "repair its config.json, or get the folder once more",
            )
    # other shapes are told in what was found, by name; else they are an error that names none
    model, found = cls.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **settings)
    _check_found(found, path)
    check_finite(model, path)
    spare_packing(model)
    return model


def _check_found(found: Mapping[str, Any], path: str | Path) -> None:
    """See that what `from_pretrained` reports is a whole model; tied weights and those to ignore are not in it."""
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        renamed = f", and has {_some(unexpected)}, which the model has not" if unexpected else ""
        raise ModelError(
            f"the model {path}, whose weights lack {_some(missing)}{renamed}",
            "all weights of the model",
            "get the folder once more, or repair its config.json: missing weights would be drawn at random",
        )
    if found["mismatched_keys"] or found["error_msgs"]:
        names = [str(one[0]) for one in found["mismatched_keys"]] or list(map(str, found["error_msgs"]))
        raise ModelError(
            f"the model {path}, whose weights are of other shapes than its config says: {_some(sorted(names))}",
            "weights of this config",
            "get the folder once more, or repair its config.json",
        )
    left = [name for name in unexpected if not _BUFFERS.search(name)]
    if any(_NUMBERED.search(name) for name in left):
        raise ModelError(
            f"the model {path}, whose config has no place for {_some(left)}",
            "as many layers as the weights have",
            "repair its config.json, or get the folder once more",
        )
    if left:
        logger.warning("of %s these weights are not used, since the model has none of the name: %s", path, _some(left))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_finite(model: nn.Module, path: str | Path) -> None:
    """See that no weight is NaN or infinite, nor a stored buffer NaN; of packed weights, what scales them.

    Raises:
        ModelError: names the first that is.
    """
    for name, parameter in model.named_parameters():
        for numbers in _numbers(parameter):
            refuse_not_finite(name, numbers, path)
    stored = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point() and buffer.isnan().any():
            refuse_not_finite(name, buffer, path)


def refuse_not_finite(name: str, numbers: Tensor, path: str | Path) -> None:
    """Raise ModelError if one of a weight's numbers is NaN or infinite. One on the meta device comes later (FSDP)."""
    if not numbers.is_floating_point() or not numbers.numel() or numbers.is_meta:
        return
    wide = numbers.float() if numbers.element_size() == 1 else numbers  # of 8 bits, which have no order
    if not torch.stack(torch.aminmax(wide.detach())).isfinite().all():
        raise ModelError(f"NaN or infinity in {name} of {path}", "finite weights", "get the model once more")


def _numbers(parameter: nn.Parameter) -> list[Tensor]:
    """What of a parameter is numbers here: itself, DeepSpeed's shard, or the scales of bitsandbytes' packed weights."""
    own = vars(parameter)
    packed, whole = own.get("quant_state"), own.get("ds_tensor", parameter)
    if packed is not None:
        return [packed.state2.absmax, packed.offset] if packed.nested else [packed.absmax]
    return [whole, own["SCB"]] if isinstance(own.get("SCB"), Tensor) else [whole]


def spare_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for CPUs with AVX512-BF16.

    It does so for good at the first forward in evaluation. The kernel for such weights has no gradient, its scales
    are rounded to bfloat16, and layers whose width is no multiple of the block fail.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False
