"""Check the files of a model or teacher before anything is built from them; say in one sentence what is wrong."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, errors
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

from lavender.errors import ConfigError, LavenderError, ModelError

logger = logging.getLogger(__name__)

IN_RUN_FILE = "write trust_remote_code: true in the run file"
WITH_FLAG = "add --trust-remote-code, or in Python trust_remote_code=True"
MAX_REPEATED, MAX_SIZE = 1000, 10**8
"""The most layers, and the largest value of any other size, that a config may name: above those of any known model."""
_MAX_UNPACKED = 4  # a model may have this many times the numbers in its files, which may be packed
_MAX_NAMES = 3  # names of weights in a message

_JSON = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "vocab.json", "adapter_config.json", "model_index.json"),
    *("scheduler_config.json", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json"),
)
_TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt", "tokenizer.model")
_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_POINTER = b"version https://git-lfs.github.com/spec/"
_REPEATED = re.compile(r"layers|depth|blocks")
_COUNTED = re.compile(r"size|dim|heads|experts|positions|embed|channels|latents|quer|tiles|timesteps|length|rank|num_")
_NUMBERED = re.compile(r"\.\d+\.")
_BUFFERS = re.compile(r"(position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias|num_batches_tracked)$")


@contextmanager
def loading(what: str, path: str | Path, consent: str | None = WITH_FLAG) -> Iterator[None]:
    """Explain in one sentence why a model cannot be loaded, and silence what loads it.

    Args:
        what: "model" or "teacher".
        path: its folder or hub id.
        consent: how to allow the model's own code; None if that code never runs.

    Raises:
        ModelError: any error inside that is not already a LavenderError.
        ConfigError: the model comes with its own code, without consent.
    """
    try:
        with quiet(transformers_logging):
            yield
    except LavenderError:
        raise
    except Exception as error:
        raise _load_error(what, str(path), consent, error) from error


@contextmanager
def quiet(library_logging: Any) -> Iterator[None]:
    """Silence a library's reports, and its progress bars outside a terminal.

    Args:
        library_logging: `transformers.utils.logging` or `diffusers.utils.logging`.
    """
    level, has_bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity(max(level, library_logging.ERROR))
    if not sys.stderr.isatty():
        library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(level)
        if has_bars:
            library_logging.enable_progress_bar()


def _load_error(what: str, path: str, consent: str | None, error: Exception) -> LavenderError:
    if "trust_remote_code" in str(error):
        got = f"the {what} {path}, which comes with its own code"
        if consent is None:
            return ModelError(got, f"a {what} that needs none", f"choose another {what}")
        return ConfigError(got, "your consent to run that code", f"read it, then {consent}")
    if isinstance(error, errors.StrictDataclassError):  # a config that contradicts itself: the second line says how
        got = f"the {what} {path}, whose config is wrong: {_joined(error)}"
        return ModelError(got, "a config that fits", "repair its config.json")
    got = f"the {what} {path}, which cannot be loaded: "
    chain, asks_for_tiktoken = _chain(error), "`tiktoken` file" in str(error)
    if asks_for_tiktoken and find_spec("sentencepiece") is None and _has_sentencepiece(path):
        got += "its tokenizer is a file of SentencePiece, and the package sentencepiece is not installed"
        return ModelError(got, "that package", "pip install 'lavender-vlm[sentencepiece]'")
    # not the context: an import that a library did without may have failed there
    lacking = next((link for link in (error, error.__cause__) if isinstance(link, ImportError)), error)
    if asks_for_tiktoken or isinstance(lacking, ImportError):
        do = "install what is named"
        if "torchvision" in str(lacking).lower():
            do = "pip install 'lavender-vlm[torchvision]', from the index that your torch is from"
        return ModelError(got + _joined(lacking)[:300], "the packages that it needs", do)
    if "backend tokenizer" in str(error):
        return ModelError(got + "it has no file of its tokenizer", f"a whole {what}", "get its tokenizer.json too")
    if Path(path).exists():
        return ModelError(got + one_line(error), f"a whole {what}", "repair the folder, or download it again")
    if not _HUB_ID.fullmatch(path):
        return ModelError(got + "there is no such folder", "a model folder or a hub id", "check the path")
    return _hub_error(got, path, chain)


def _has_sentencepiece(path: str) -> bool:
    """Whether a model has a file of SentencePiece. Without that package transformers takes it for tiktoken's."""
    folder = path if Path(path).is_dir() else f"{constants.HF_HUB_CACHE}/models--{path.replace('/', '--')}"
    return any(file.read_bytes()[:1] == b"\n" for file in Path(folder).rglob("*.model"))  # tiktoken's begin otherwise


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that caused it, the first one last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _hub_error(got: str, path: str, chain: list[BaseException]) -> ModelError:
    """Why a hub id cannot be loaded, from the whole chain of errors."""

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    codes = {link.response.status_code for link in chain if isinstance(link, errors.HfHubHTTPError)}
    no_folder = f"there is no folder {path}, and "
    if has(errors.GatedRepoError):
        do = f"accept it at {constants.ENDPOINT}/{path}, then run hf auth login"
        got += "access to it is restricted on the hub"
        return ModelError(got, "a licence that you have accepted, and a login", do)
    if has(errors.RepositoryNotFoundError, errors.HFValidationError):
        got += no_folder + "the hub has no model of this name that you may see"
        do = "check the path or id; for a private model run hf auth login"
        return ModelError(got, "a model folder or a hub id", do)
    if codes & {401, 403}:
        return ModelError(got + "the hub refuses it to you", "a login that may read it", "run hf auth login")
    if constants.HF_HUB_OFFLINE and has(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        got += no_folder + "HF_HUB_OFFLINE is set, and the hub's cache does not hold it"
        do = "check the path; for a hub id unset HF_HUB_OFFLINE"
        return ModelError(got, "a model folder, or a model in the cache", do)
    client_error = getattr(errors, "HTTPError", ConnectionError)  # of the library that talks to the hub
    if has(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, client_error, ConnectionError):
        got += no_folder + f"the hub at {constants.ENDPOINT} is out of reach: {one_line(chain[-1])}"
        return ModelError(got, "a model folder, or a network", "check the path; for a hub id check network and proxy")
    return ModelError(got + one_line(chain[0]), "a whole model", "check the path or id")


def _joined(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def one_line(error: BaseException) -> str:
    """The first line of an error's message, after its class unless the message alone says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0].rstrip(".")[:300] if lines else ""
    if message and isinstance(error, OSError | ValueError):
        return message
    return f"{type(error).__name__}: {message}".rstrip(": ")


def check_files(folder: str | Path, names: Sequence[str] = _JSON) -> None:
    """Check that the JSON and text files of a local folder can be read and that its config has no absurd size.

    Nothing is checked for a hub id; use `check_sizes` on its config.

    Args:
        folder: a folder, which may lack some or all of the files.
        names: names of the JSON files.

    Raises:
        ModelError: a file cannot be read or used; the message names it.
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
        raise ModelError(got, "a readable file", "check its permissions") from error
    _refuse_pointer(path, content)
    return content


def _refuse_pointer(path: Path, beginning: bytes) -> None:
    if beginning.startswith(_POINTER):
        raise ModelError(f"{path}, a Git LFS pointer", "the file it stands for", "run git lfs pull in its folder")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError for anything else."""
    try:
        settings = json.loads(_contents(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        got = f"{path}, which is not JSON: {_joined(error)[:200]}"
        raise ModelError(got, "JSON", "download the file again") from error
    if not isinstance(settings, dict):
        raise ModelError(f"a {type(settings).__name__} in {path}", "keys and values", "download the file again")
    return settings


def check_sizes(settings: Mapping[str, Any], path: str | Path, part: str = "") -> None:
    """Check that no size in a config is so large that building the model would never end. Raises ModelError."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            check_sizes(value, path, f"{part}{name}.")
            continue
        repeats, counts = _REPEATED.search(str(name)), _COUNTED.search(str(name))
        limit = MAX_REPEATED if repeats else MAX_SIZE if counts else float("inf")
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and abs(number) > limit:
                expected = f"at most {limit}, more than any known model has"
                do = "repair the config, or download it again"
                raise ModelError(f"{part}{name}: {number} in {path}", expected, do)


def check_weight_files(folder: str | Path) -> int:
    """Check that the weights of a local folder are complete safetensors files.

    Returns:
        How many numbers they hold; 0 for a hub id.

    Raises:
        ModelError: a file is missing or damaged; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return 0
    files = [path for stem in _STEMS for path in _weight_files(folder, stem)]
    if not files:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        variants = sorted(path.name for stem in _STEMS for path in folder.glob(f"{stem}.*.safetensors"))
        beside = [*variants, *pickled][:1]
        got = f"the folder {folder}, without safetensors" + (f" beside {beside[0]}" if beside else "")
        do = "convert its weights: a pickle can run code, and is never loaded" if pickled else "download the weights"
        do = "load it with its variant and save it without one" if variants else do
        raise ModelError(got, "weights in a file such as model.safetensors", do)
    return sum(_count_numbers(path) for path in files)


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The weight files that `from_pretrained` reads: a single one, or those that the index names."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
        raise ModelError(f"no weight_map of names in {index}", "a file name for each weight", "download the file again")
    paths = [folder / name for name in sorted(set(parts.values()))]
    for path in paths:
        if os.path.basename(path.name) != str(path.relative_to(folder)) or not path.is_file():
            do = "download all parts of the model"
            raise ModelError(f"{index}, which names {path}", "files in its own folder", do)
    return paths


def _count_numbers(path: Path) -> int:
    """How many numbers a safetensors file holds."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        _refuse_pointer(path, file.read(len(_POINTER)))
    try:
        with safe_open(path, framework="pt") as tensors:
            return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        got = f"{path}, which is not a whole safetensors file: {_joined(error)}"
        raise ModelError(got, "the file as it was written", "download it again") from error


def load_weights(cls: Any, path: str | Path, empty: Callable[[], nn.Module] | None = None, **settings: Any) -> Any:
    """`cls.from_pretrained(path, **settings)`, which must load a complete model.

    Args:
        cls: a class of transformers or diffusers, or an Auto class.
        path: folder or hub id.
        empty: builds the same model from its config. It is called on the meta device, to refuse a config that is far
            larger than the weights before it takes memory.
        settings: arguments of `from_pretrained`.

    Returns:
        The model.

    Raises:
        ModelError: a file is missing or damaged; the config describes another model; a weight is missing, has another
            shape, or is not finite.
    """
    num_stored = check_weight_files(path)
    if num_stored and empty is not None and not is_deepspeed_zero3_enabled():  # it shards weights as they are built
        with torch.device("meta"):
            num_built = sum(parameter.numel() for parameter in empty().parameters())
        if num_built > _MAX_UNPACKED * num_stored:
            got = f"a config of {num_built:,} parameters in {path}, whose weights are {num_stored:,}"
            do = "repair its config.json, or download the folder again"
            raise ModelError(got, "a config of these weights", do)
    # ignore_mismatched_sizes: the report then names weights of another shape, where the error names none
    model, report = cls.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **settings)
    _check_report(report, path)
    check_finite(model, path)
    spare_packing(model)
    return model


def _check_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Check that `from_pretrained` reports a complete model. Tied and ignored weights are not in its report."""
    again = "download the folder again, or repair its config.json"
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        renamed = f", and has {_some(unexpected)}, which the model does not have" if unexpected else ""
        got = f"the model {path}, whose weights lack {_some(missing)}{renamed}"
        raise ModelError(got, "all weights of the model", f"{again}: missing weights would be drawn at random")
    if report["mismatched_keys"] or report["error_msgs"]:
        names = [str(key[0]) for key in report["mismatched_keys"]] or list(map(str, report["error_msgs"]))
        got = f"the model {path}, whose weights are of other shapes than its config says: {_some(sorted(names))}"
        raise ModelError(got, "weights of this config", again)
    unused = [name for name in unexpected if not _BUFFERS.search(name)]
    if any(_NUMBERED.search(name) for name in unused):
        got = f"the model {path}, whose config has no place for {_some(unused)}"
        raise ModelError(got, "as many layers as the weights have", again)
    if unused:
        logger.warning("weights of %s that the model does not have, and that are ignored: %s", path, _some(unused))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def check_finite(model: nn.Module, path: str | Path) -> None:
    """Check that no weight is NaN or infinite, and no stored buffer NaN. Of packed weights, the scales are checked.

    Raises:
        ModelError: names the first one.
    """
    for name, parameter in model.named_parameters():
        for numbers in _numbers(parameter):
            refuse_not_finite(name, numbers, path)
    stored = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point() and buffer.isnan().any():
            refuse_not_finite(name, buffer, path)


def refuse_not_finite(name: str, numbers: Tensor, path: str | Path) -> None:
    """Raise ModelError if a weight has NaN or infinity. A weight on the meta device is passed: FSDP loads it later."""
    if not numbers.is_floating_point() or not numbers.numel() or numbers.is_meta:
        return
    wide = numbers.float() if numbers.element_size() == 1 else numbers  # 8-bit floats cannot be compared
    if not torch.stack(torch.aminmax(wide.detach())).isfinite().all():
        raise ModelError(f"NaN or infinity in {name} of {path}", "finite weights", "download the model again")


def _numbers(parameter: nn.Parameter) -> list[Tensor]:
    """The numbers of a parameter: itself, DeepSpeed's shard, or the scales of bitsandbytes' packed weights."""
    attributes = vars(parameter)
    packed, whole = attributes.get("quant_state"), attributes.get("ds_tensor", parameter)
    if packed is not None:
        return [packed.state2.absmax, packed.offset] if packed.nested else [packed.absmax]
    return [whole, attributes["SCB"]] if isinstance(attributes.get("SCB"), Tensor) else [whole]


def spare_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for CPUs with AVX512-BF16.

    It repacks them permanently at the first forward pass in evaluation mode. The kernel for such weights has no
    gradient and rounds its scales to bfloat16. It fails in layers whose width is not a multiple of the block size.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False
