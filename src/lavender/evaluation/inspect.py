"""`lavender inspect`: what the library sees in a model or a map store, before GPU hours are spent."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavender.data.store import MapStore
from lavender.errors import ConfigError, UnsupportedModelError
from lavender.evaluation.report.figure import draw_figure
from lavender.evaluation.report.page import Panel, WordRow
from lavender.files import writing
from lavender.model_files import one_line
from lavender.type_checks import check_type

if TYPE_CHECKING:
    from PIL import Image

    from lavender.students.base import VlmAdapter

QUESTION, ANSWER = "Describe the image.", "A cat with green eyes and long whiskers."
SAMPLE_SIZE = (480, 640)  # (height, width) in pixels of the picture that stands for a user's
NEEDS = "an adapter: one file in lavender/vlm, one line in its registry, one file of tests; see docs/add-a-vlm.md"
OWN_CODE = "the model comes with its own code; read it, then add --trust-remote-code"
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")
_WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json", "checkpoint")


def inspect_target(target: str, picture: Path | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Facts about a map store or a model: a folder (its config.json is enough), a run folder, or a hub id.

    Args:
        target: its path or name.
        picture: where to write one picture with the model's maps drawn over it; loads the weights.
        trust_remote_code: run the code that comes with the model.

    Raises:
        ConfigError: a setting that does not go with it.
        ModelError: no such model, or a damaged one.
        StoreError: a damaged store.
        UnsupportedModelError: a model without an adapter.
    """
    check_type("trust_remote_code", trust_remote_code, bool)
    target = os.path.expanduser(target)
    if (Path(target) / "manifest.json").is_file():
        if picture is not None:
            raise ConfigError(f"--picture with the map store {target}", "a model", "leave --picture out")
        return _inspect_store(Path(target))
    return _inspect_model(target, picture, trust_remote_code)


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


def _inspect_model(target: str, picture: Path | None, trust_remote_code: bool) -> dict[str, Any]:
    """From the config alone (no weights); with `picture`, loads the model and draws one map."""
    from lavender.students.loading import loading

    folder, trust_remote_code = _model_folder(target), trust_remote_code is True
    with loading("model", folder):
        return _model_facts(target, folder, picture, trust_remote_code)


def _model_facts(target: str, folder: str, picture: Path | None, trust_remote_code: bool) -> dict[str, Any]:
    config, is_whole = _config_of(folder, trust_remote_code)
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
        raise _consent(folder, f", whose config leaves {error.name!r} to that code") from error
    if is_whole:
        return facts | _measured(target, folder, config, adapter, picture, trust_remote_code)
    if picture is not None:
        raise _consent(folder, " and must run to draw maps")
    return facts | {"parameters": None, "bytes_in_bfloat16": None, "memory": None, "sample": {"missing": OWN_CODE}}


def _measured(
    target: str, folder: str, config: Any, adapter: VlmAdapter, picture: Path | None, trust_remote_code: bool
) -> dict[str, Any]:
    """What takes the model's modules, without weights, and its processor."""
    from lavender.evaluation.memory import footprint

    model = _empty_model(config, trust_remote_code)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sample = _sample(folder, adapter, trust_remote_code)
    if picture is not None:
        sample |= _draw_sample(target, picture, trust_remote_code)
    return {
        "class": type(model).__name__,
        "parameters": parameters,
        "bytes_in_bfloat16": 2 * parameters,
        "sample": sample,
        "memory": footprint(model, adapter, sample.get("image_keys"), sample.get("tokens")),
    }


def _model_folder(target: str) -> str:
    """The model of a run folder; else the target."""
    checkpoint = Path(target) / "checkpoint"
    return str(checkpoint) if (checkpoint / "config.json").is_file() else target


def _config_of(target: str, trust_remote_code: bool) -> tuple[Any, bool]:
    """A model's config, and whether it is whole: one that comes with code which may not run is taken as written."""
    from transformers import CONFIG_MAPPING

    from lavender.students.loading import load_config, read_config

    raw = read_config(target)
    own_code = "AutoConfig" in (raw.get("auto_map") or {}) and raw.get("model_type") not in CONFIG_MAPPING
    if own_code and not trust_remote_code:
        return _as_written(raw), False
    return load_config(target, trust_remote_code), True


def _as_written(raw: dict[str, Any]) -> Any:
    """A config and its parts, without the defaults that the model's own code would add."""
    from transformers import PreTrainedConfig

    parts = {name: _as_written(one) for name, one in raw.items() if name.endswith("_config") and isinstance(one, dict)}
    config: Any = PreTrainedConfig(**{name: one for name, one in raw.items() if name != "model_type"} | parts)
    config.model_type = raw.get("model_type", "")
    return config


def _consent(target: str, why: str) -> ConfigError:
    return ConfigError(
        f"{target}, a model that comes with its own code{why}",
        "your consent to run that code",
        "read it, then add --trust-remote-code",
    )


def _adapter_of(config: Any) -> VlmAdapter:
    from lavender.students.registry import adapter_for

    try:
        return adapter_for(config)
    except UnsupportedModelError as error:
        sees = any(name in config.to_dict() for name in ("vision_config", "vision_tower", "visual"))
        reason = "" if sees else ", which has no part that sees pictures"
        do = f"use a supported model, or write {NEEDS}" if sees else "use a vision-language model"
        raise UnsupportedModelError(error.got + reason, error.expected, do) from error


def _empty_model(config: Any, trust_remote_code: bool) -> Any:
    """The model without weights: shapes alone."""
    import torch

    from lavender.students.registry import auto_class

    with torch.device("meta"):
        return auto_class(config, trust_remote_code).from_config(config, trust_remote_code=trust_remote_code)


def _sample(target: str, adapter: VlmAdapter, trust_remote_code: bool) -> dict[str, Any]:
    """What the processor makes of one conversation: words, their tokens and rows. Says why where it cannot."""
    from lavender.students.loading import load_processor

    if Path(target).is_dir() and not any((Path(target) / name).is_file() for name in _PROCESSOR_FILES):
        return {"missing": "the folder has no processor and no tokenizer"}
    try:
        return _located(adapter, load_processor(adapter, target, trust_remote_code))
    except Exception as error:  # whatever a damaged or absent processor raises
        return {"missing": f"its processor does not make a sample here: {one_line(error)}"}


def _located(adapter: VlmAdapter, processor: Any) -> dict[str, Any]:
    from PIL import Image

    from lavender.students.locate import WordLocator
    from lavender.students.word_maps import AnsweredPicture, processor_inputs
    from lavender.words import content_words

    height, width = SAMPLE_SIZE
    words = content_words(ANSWER, ("noun", "adjective", "verb"))
    picture = AnsweredPicture(Image.new("RGB", (width, height)), QUESTION, ANSWER, words)
    inputs, messages = processor_inputs(processor, [picture]), picture.messages()
    ids, dropped = inputs["input_ids"][0], Counter()
    found = WordLocator(processor, adapter).rows(
        messages, [(1, ANSWER, words)], ids, inputs["attention_mask"][0], dropped
    )
    keys = adapter.key_tensors(inputs, [[SAMPLE_SIZE]], processor)["pictures"]
    return {
        "text": ANSWER,
        "words": [word.text for word, _ in found],
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
            for word, rows in found
        ],
    }


def _draw_sample(target: str, picture: Path, trust_remote_code: bool) -> dict[str, Any]:
    from lavender.students.loading import load_run
    from lavender.students.word_maps import AnsweredPicture, student_maps
    from lavender.words import content_words

    image = _photograph()
    model, processor = load_run(target, trust_remote_code=trust_remote_code)
    reading = AnsweredPicture(image, QUESTION, ANSWER, content_words(ANSWER, ("noun", "adjective", "verb")))
    maps = student_maps(model, processor, [reading])[0]
    rows = [WordRow(word.text, {"attention": one}) for word, one in zip(maps.words, maps.maps, strict=True)]
    with writing(picture):
        draw_figure([Panel(image, "attention on a photograph, before any tuning", rows, {})], picture)
    return {"text": ANSWER, "words": [word.text for word in maps.words], "grid": maps.grid, "picture": str(picture)}


def _photograph() -> Image.Image:
    try:
        from skimage.data import chelsea
    except ModuleNotFoundError as error:
        raise ConfigError(
            "no scikit-image", "the demo extra, whose photograph is drawn", "pip install 'lavender-vlm[demo]'"
        ) from error
    from PIL import Image

    return Image.fromarray(chelsea())


def as_text(facts: dict[str, Any]) -> str:
    """The facts as a page for a terminal."""
    return _store_text(facts) if facts["kind"] == "map store" else _model_text(facts)


def _store_text(facts: dict[str, Any]) -> str:
    rows, cols = facts["grid"]
    lines = [f"map store: {facts['records']} texts with {facts['words']} word maps of {rows} × {cols}"]
    lines += [f"  {name:<14} {value}" for name, value in {**facts["identity"], **facts["info"]}.items()]
    for example in facts["examples"]:
        lines += ["", f"  {example['text']!r}", f"  maps of: {', '.join(example['words']) or 'no word'}"]
    return "\n".join(lines)


def _model_text(facts: dict[str, Any]) -> str:
    layers = f"{len(facts['usable_layers'])} of {facts['layers']}: {_ranges(facts['usable_layers'])}"
    parameters = "unknown: " + OWN_CODE
    if facts["parameters"] is not None:
        parameters = f"{facts['parameters']:,} ({_size(facts['bytes_in_bfloat16'])} in bfloat16)"
    lines = [
        f"{facts['class']}, family {facts['family']}",
        f"  parameters     {parameters}",
        f"  usable layers  {layers}; {facts['heads']} heads each",
        f"  image keys     {facts['image_keys']}",
        "",
    ]
    memory = _memory_lines(facts["memory"]) if facts["memory"] else [f"No estimate of memory: {OWN_CODE}"]
    lines += [*_sample_lines(facts["sample"]), "", *memory]
    return "\n".join(one for line in lines for one in _wrapped(line) or [""])


def _wrapped(line: str) -> list[str]:
    indent = " " * (17 if line.startswith("  ") and not line.startswith("  -") else 4)
    return textwrap.wrap(line, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _sample_lines(sample: dict[str, Any]) -> list[str]:
    if "missing" in sample and "words" not in sample:
        return [f"No words of a sample: {sample['missing']}"]
    lines = [f"Words of {sample['text']!r}"]
    if "located" in sample:
        height, width = sample["picture_size"]
        lines[0] += (
            f" on a picture {width} pixels wide and {height} high: {sample['tokens']} tokens, "
            f"{sample['image_keys']} image keys"
        )
        for one in sample["located"]:
            lines.append(f"  {one['word']:<14} row {_ranges(one['rows']):<12} {' '.join(map(repr, one['tokens']))}")
        lines += [f"  left out: {count} × {reason}" for reason, count in sample["dropped"].items()]
    if "picture" in sample:
        lines.append(f"  maps of {', '.join(sample['words'])} drawn in {sample['picture']}")
    return lines


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    arms = {
        "full tuning": memory["full"],
        "of 16 bits": memory["full_16_bit"],
        "LoRA": memory["lora"],
        "QLoRA": memory["qlora"],
    }
    lines = [
        "Memory of training, a rough estimate for one GPU:",
        "  " + " " * 28 + "".join(f"{arm:>14}" for arm in arms),
    ]
    for part in memory["full"]:
        values = [arm[part] for arm in arms.values()]
        lines.append(f"  {part:<28}" + "".join(f"{_size(value):>14}" for value in values))
    sums = [sum(arm.values()) for arm in arms.values()]
    lines.append(f"  {'together':<28}" + "".join(f"{_size(value):>14}" for value in sums))
    lines.append(f"  {'pooling: learn, in addition':<28}" + f"{_size(memory['learn']):>14}" * len(arms))
    return [*lines, "  Assumed:", *(f"  - {one}" for one in memory["assumptions"])]


def _size(count: float) -> str:
    """Bytes for people; a kilobyte is 1000."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count:.0f} B"


def _ranges(numbers: list[int]) -> str:
    """3, 4, 5 and 9 as "3–5, 9"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
