"""Facts about a model or a map store, as `lavender inspect` prints them: no weights are needed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavender.config import CONTENT_WORDS
from lavender.data.store import MapStore
from lavender.errors import ConfigError, UnsupportedModelError
from lavender.evaluation.report.figure import draw_figure
from lavender.evaluation.report.panels import Panel, WordRow
from lavender.files import writing
from lavender.model_files import one_line
from lavender.type_checks import check_type

if TYPE_CHECKING:
    from PIL import Image

    from lavender.evaluation.placement import Placement
    from lavender.students.base import VlmAdapter

Draw = Callable[[], dict[str, Any]]
"""Loads the weights, draws the maps of a sample, and returns the facts about them."""
QUESTION, ANSWER = "Describe the image.", "A cat with green eyes and long whiskers."
SAMPLE_SIZE = (480, 640)  # (height, width) in pixels of the sample's picture
NEEDS = "an adapter for it: a file in lavender/students/families and a line in its registry; see docs/add-a-vlm.md"
OWN_CODE = "the model comes with its own code; read the code, then add --trust-remote-code"
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")


def inspect_target(
    target: str,
    picture: Path | None = None,
    trust_remote_code: bool = False,
    place: Placement | None = None,
) -> dict[str, Any]:
    """Facts about a model or a map store, as JSON keeps them. `kind` says which it is: "model" or "map store".

    Args:
        target: a map store, a model folder (its config.json is enough), a run folder, or a hub id.
        picture: path of a PNG to draw the model's word maps on a photograph to; this loads the weights.
        trust_remote_code: run the code that comes with the model.
        place: how the model of `picture` runs; None for float32 on the CPU.

    Returns:
        Of a store: its numbers of records and words, grid (rows, cols), identity, info and first texts. Of a model: its
        family, class, layers, heads and parameters, a sample's words with their rows and tokens, and the memory of
        training in bytes (`lavender.evaluation.memory.footprint`). What takes the model's own code is None without
        `trust_remote_code`.

    Raises:
        ConfigError: `picture` with a map store, or with a model whose own code may not run.
        ModelError: no such model, or a damaged one.
        StoreError: a damaged store.
        UnsupportedModelError: no adapter for this model.
    """
    check_type("trust_remote_code", trust_remote_code, bool)
    target = os.path.expanduser(target)
    if (Path(target) / "manifest.json").is_file():
        if picture is not None:
            raise ConfigError(f"--picture with the map store {target}", "--picture with a model", "leave --picture out")
        return _inspect_store(Path(target))
    draw = None if picture is None else partial(_draw_sample, target, picture, trust_remote_code, place)
    return _inspect_model(target, draw, trust_remote_code)


def _inspect_store(path: Path) -> dict[str, Any]:
    store = MapStore.open(path, verify=True)
    examples = []
    for maps in store:
        examples.append({"text": maps.text, "words": [word.text for word in maps.words], "image_id": maps.image_id})
        if len(examples) == 3:
            break
    return {
        "kind": "map store",
        "records": len(store),
        "words": store.num_words,
        "grid": store.grid,
        "identity": dict(store.identity),
        "info": dict(store.info),
        "examples": examples,
    }


def _inspect_model(target: str, draw: Draw | None, trust_remote_code: bool) -> dict[str, Any]:
    """Facts from the config alone, without weights; `draw` loads the model and draws its maps."""
    from lavender.students.loading import loading, places_of

    (folder, base, revision), trust_remote_code = places_of(target), trust_remote_code is True
    with loading("model", folder):
        config, is_whole = _config_of(str(base), trust_remote_code, revision)
        return _model_facts(str(folder), config, is_whole, draw, trust_remote_code)


def _model_facts(
    folder: str, config: Any, is_whole: bool, draw: Draw | None, trust_remote_code: bool
) -> dict[str, Any]:
    adapter = _adapter_of(config)
    try:
        facts: dict[str, Any] = {
            "kind": "model",
            "family": adapter.model_type,
            "class": (config.architectures or [None])[0],
            "usable_layers": list(adapter.usable_layers()),
            "layers": config.get_text_config().num_hidden_layers,
            "heads": adapter.num_heads(),
            "image_keys": adapter.describe_keys(),
        }
    except AttributeError as error:
        if is_whole:
            raise
        raise _needs_remote_code(folder, f", whose config leaves {error.name!r} to that code") from error
    if is_whole:
        return facts | _facts_of_modules(folder, config, adapter, draw, trust_remote_code)
    if draw is not None:
        raise _needs_remote_code(folder, " and must run to draw maps")
    return facts | {"parameters": None, "bytes_in_bfloat16": None, "memory": None, "sample": {"missing": OWN_CODE}}


def _facts_of_modules(
    folder: str, config: Any, adapter: VlmAdapter, draw: Draw | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Facts that need the model's classes (not its weights) and its processor."""
    from lavender.evaluation.memory import footprint

    model = empty_model(config, trust_remote_code)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sample = _sample(folder, adapter, trust_remote_code)
    if draw is not None:
        sample |= draw()
    return {
        "class": type(model).__name__,
        "parameters": parameters,
        "bytes_in_bfloat16": 2 * parameters,
        "sample": sample,
        "memory": footprint(model, adapter, sample.get("image_keys"), sample.get("tokens")),
    }


def _config_of(target: str, trust_remote_code: bool, revision: str | None) -> tuple[Any, bool]:
    """(config, whether it was loaded fully). Without consent to the model's own code, the raw JSON is used."""
    from transformers import CONFIG_MAPPING

    from lavender.students.loading import load_config, read_config

    raw = read_config(target, revision)
    has_own_code = "AutoConfig" in (raw.get("auto_map") or {}) and raw.get("model_type") not in CONFIG_MAPPING
    if has_own_code and not trust_remote_code:
        return _as_written(raw), False
    return load_config(target, trust_remote_code, revision), True


def _as_written(raw: dict[str, Any]) -> Any:
    """The raw JSON as a config, nested configs too, without the defaults that the model's own code would add."""
    from transformers import PreTrainedConfig

    parts = {
        name: _as_written(value) for name, value in raw.items() if name.endswith("_config") and isinstance(value, dict)
    }
    config: Any = PreTrainedConfig(**{name: value for name, value in raw.items() if name != "model_type"} | parts)
    config.model_type = raw.get("model_type", "")
    return config


def _needs_remote_code(target: str, why: str) -> ConfigError:
    return ConfigError(
        f"{target}, a model that comes with its own code{why}",
        "--trust-remote-code, your consent to run this code",
        "read the code, then add --trust-remote-code",
    )


def _adapter_of(config: Any) -> VlmAdapter:
    from lavender.students.registry import adapter_for

    try:
        return adapter_for(config)
    except UnsupportedModelError as error:
        has_vision = any(name in config.to_dict() for name in ("vision_config", "vision_tower", "visual"))
        reason = "" if has_vision else ", which has no vision part"
        do = f"use a supported model, or write {NEEDS}" if has_vision else "use a vision-language model"
        raise UnsupportedModelError(error.got + reason, error.expected, do) from error


def empty_model(config: Any, trust_remote_code: bool, **settings: Any) -> Any:
    """The model on the meta device: shapes without weights. `settings` are further arguments of `from_config`."""
    import torch

    from lavender.students.registry import auto_class

    auto = auto_class(config, trust_remote_code)
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=trust_remote_code, **settings)


def _sample(target: str, adapter: VlmAdapter, trust_remote_code: bool) -> dict[str, Any]:
    """One conversation through the processor: words, their tokens and rows; or, as `missing`, why there is none."""
    from lavender.students.loading import load_processor

    if Path(target).is_dir() and not any((Path(target) / name).is_file() for name in _PROCESSOR_FILES):
        return {"missing": "the folder has neither a processor nor a tokenizer"}
    try:
        return _located(adapter, load_processor(adapter, target, trust_remote_code))
    except Exception as error:  # whatever a damaged or absent processor raises
        return {"missing": f"the processor failed on a sample: {one_line(error)}"}


def _located(adapter: VlmAdapter, processor: Any) -> dict[str, Any]:
    from PIL import Image

    from lavender.students.locate import WordLocator
    from lavender.students.word_maps import AnsweredPicture, processor_inputs
    from lavender.words import content_words

    height, width = SAMPLE_SIZE
    words = content_words(ANSWER, CONTENT_WORDS)
    picture = AnsweredPicture(Image.new("RGB", (width, height)), QUESTION, ANSWER, words)
    inputs, messages = processor_inputs(processor, [picture]), picture.messages()
    ids, dropped = inputs["input_ids"][0], Counter()
    located = WordLocator(processor, adapter).rows(
        messages, [(1, ANSWER, words)], ids, inputs["attention_mask"][0], dropped
    )
    keys = adapter.key_tensors(inputs, [[SAMPLE_SIZE]], processor)["pictures"]
    return {
        "text": ANSWER,
        "words": [word.text for word, _ in located],
        "picture_size": list(SAMPLE_SIZE),
        "tokens": len(ids),
        "image_keys": int((keys >= 0).sum()),
        "dropped": dict(dropped),
        "located": [
            {
                "word": word.text,
                "rows": list(rows),
                "tokens": [processor.tokenizer.decode([ids[row + 1]]) for row in rows],
            }
            for word, rows in located
        ],
    }


def _draw_sample(target: str, picture: Path, trust_remote_code: bool, place: Placement | None) -> dict[str, Any]:
    from lavender.evaluation.placement import Placement
    from lavender.students.word_maps import AnsweredPicture, student_maps
    from lavender.words import content_words

    image = _photograph()
    model, processor = (place or Placement()).load(target, trust_remote_code)
    reading = AnsweredPicture(image, QUESTION, ANSWER, content_words(ANSWER, CONTENT_WORDS))
    maps = student_maps(model, processor, [reading])[0]
    rows = [WordRow(word.text, {"attention": heat}) for word, heat in zip(maps.words, maps.maps, strict=True)]
    with writing(picture):
        draw_figure([Panel(image, "attention on a photograph", rows, {})], picture)
    return {"text": ANSWER, "words": [word.text for word in maps.words], "grid": maps.grid, "picture": str(picture)}


def _photograph() -> Image.Image:
    try:
        from skimage.data import chelsea
    except ModuleNotFoundError as error:
        raise ConfigError(
            "no scikit-image, whose photograph --picture draws on",
            "the packages of the extra `demo`",
            "pip install 'lavender-vlm[demo]'",
        ) from error
    from PIL import Image

    return Image.fromarray(chelsea())
