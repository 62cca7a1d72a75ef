"""`lavender inspect`: what the library sees in a model or a map store, before GPU hours are spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavender.errors import ConfigError
from lavender.report import Panel, WordRow, draw_figure
from lavender.store import MapStore


def inspect_target(target: str, picture: Path | None = None) -> dict[str, Any]:
    """Facts about a map store or a model folder."""
    if (Path(target) / "manifest.json").is_file():
        if picture is not None:
            raise ConfigError(f"--picture with the map store {target}", "a model", "leave --picture out")
        return _inspect_store(Path(target))
    return _inspect_model(target, picture)


def _inspect_store(path: Path) -> dict[str, Any]:
    store = MapStore.open(path, verify=True)
    examples = []
    for maps in store:
        examples.append({"text": maps.text, "words": [word.text for word in maps.words], "image_id": maps.image_id})
        if len(examples) == 3:
            break
    return {
        "kind": "map store", "records": len(store), "words": store.num_words, "grid": store.grid,
        "identity": dict(store.identity), "info": dict(store.info), "examples": examples,
    }  # fmt: skip


def _inspect_model(target: str, picture: Path | None) -> dict[str, Any]:
    """From the config alone (no weights); with `picture`, loads the model and draws one map."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from lavender.run import loading
    from lavender.vlm.registry import adapter_for

    with loading("model", target):
        config = AutoConfig.from_pretrained(target)
    adapter = adapter_for(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "kind": "model", "family": adapter.model_type, "class": type(model).__name__, "parameters": parameters,
        "usable_layers": list(adapter.usable_layers()), "image_keys": adapter.describe_keys(),
        "bytes_in_bfloat16": 2 * parameters,
    }  # fmt: skip
    return facts | ({"sample": _draw_sample(target, picture)} if picture is not None else {})


def _draw_sample(target: str, picture: Path) -> dict[str, Any]:
    from lavender.attention import Reading, student_maps
    from lavender.run import load_run
    from lavender.words import content_words

    try:
        from skimage.data import chelsea
    except ModuleNotFoundError as error:
        raise ConfigError(
            "no scikit-image", "the demo extra, whose photograph is drawn", "pip install 'lavender-vlm[demo]'"
        ) from error
    from PIL import Image

    image, answer = Image.fromarray(chelsea()), "A cat with green eyes and long whiskers."
    model, processor = load_run(target)
    reading = Reading(image, "Describe the image.", answer, content_words(answer, ("noun", "adjective", "verb")))
    maps = student_maps(model, processor, [reading])[0]
    rows = [WordRow(word.text, {"attention": one}) for word, one in zip(maps.words, maps.maps, strict=True)]
    draw_figure([Panel(image, "attention on a photograph, before any tuning", rows, {})], picture)
    return {"text": answer, "words": [word.text for word in maps.words], "grid": maps.grid, "picture": str(picture)}
