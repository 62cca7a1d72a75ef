"""The run files in examples/: read as they are, trained as they are but for size, and right about the full-size models.

A recipe's own settings train a tiny random model of its own class, from a folder on disk. On the full-size
architecture, built without weights, what it trains is found by name and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, dynamic_module_utils
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from trl import chat_template_utils

import families.test_flamingo
import families.test_idefics3
import families.test_minicpm_v
import families.test_qwen_vl
from command_line import write_scenes
from families.minicpm_v_published import MiniCPMV, MiniCPMVConfig, save_as_published
from families.published_configs import PUBLISHED
from lavender.config import AlignmentConfig
from lavender.students.base import PARTS
from lavender.students.registry import adapter_for
from lavender.training.run import load_run, read_run, train, trained_lines
from lavender.training.trainable import check_trained, freeze, peft_config_of, trained_parameters
from lavender.world.studies.cells import FROZEN
from lavender.world.studies.new_words import FORMS, STEPS

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.yaml"))}
KINDS = {
    "llama32_vision_11b_lora": "mllama",
    "llama32_vision_11b_full": "mllama",
    "llama32_vision_11b_16gb": "mllama",
    "minicpm_llama3_v25": "minicpmv",
    "new_words": "qwen2_5_vl",
    "openflamingo": "open_flamingo",
    "qwen25_vl_7b_24gb": "qwen2_5_vl",
    "smolvlm_24gb": "smolvlm",
}
# recipe → trained parameters of the tower, between, and of the language model, by hand from the published sizes
VISION_QV = 40 * 2 * 8 * (1280 + 1280)
LLAMA_QV = 40 * 8 * ((4096 + 4096) + (4096 + 1024))
LLAMA_QKVO = 32 * 64 * 2 * ((4096 + 4096) + (4096 + 1024))
QWEN_QKVO = 28 * 16 * 2 * ((3584 + 3584) + (3584 + 512))
QWEN_LINEAR = QWEN_QKVO + 28 * 16 * 3 * (3584 + 18944)
SMOL_QKVO, SIGLIP_QKV = 24 * 16 * 4 * (2048 + 2048), 27 * 16 * 3 * (1152 + 1152)
TRAINED: dict[str, tuple[int | None, int | None, int | None]] = {  # None: all of it
    "llama32_vision_11b_lora": (VISION_QV, 0, LLAMA_QV),
    "llama32_vision_11b_full": (None, None, None),
    "llama32_vision_11b_16gb": (0, 0, 40 * 16 * 2 * ((4096 + 4096) + (4096 + 1024))),
    "minicpm_llama3_v25": (0, 0, LLAMA_QKVO),
    "new_words": (0, 0, QWEN_LINEAR),
    "openflamingo": (0, None, 0),
    "qwen25_vl_7b_24gb": (0, 0, QWEN_QKVO),
    "smolvlm_24gb": (SIGLIP_QKV, 0, SMOL_QKVO),
}
every_recipe = pytest.mark.parametrize("name", KINDS)


def full_size(kind: str) -> PreTrainedModel:
    """The published architecture without weights; of MiniCPM-V the tests' own writing of it."""
    settings = dict(PUBLISHED[kind][0])
    with torch.device("meta"):
        if kind != "minicpmv":
            return AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **settings))
        seeing = {name: one for name, one in settings.pop("vision_config").items() if name != "model_type"}
        for name in ("architectures", "auto_map", "slice_config", "version"):
            del settings[name]
        return MiniCPMV(MiniCPMVConfig(**settings, heads=32, vision_config=seeing))


def test_every_run_file_is_a_recipe_here():
    assert set(RECIPES) == {*KINDS, "world"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_whole(name):
    """No unknown key; values that LavenderConfig takes; the accelerate file and template that it names are there."""
    run = read_run(RECIPES[name])
    names = set(AlignmentConfig.__dataclass_fields__) & set(run.training)
    AlignmentConfig(**{key: run.training[key] for key in names})
    text = RECIPES[name].read_text()
    for path in re.findall(r"examples/[\w/.]+\.(?:yaml|jinja)", text):
        assert path.startswith("examples/accelerate/") or (ROOT / path).is_file(), path
    assert text.count(f"examples/{name}.yaml") >= 1


@every_recipe
def test_a_recipe_tells_what_was_run_and_what_not(name):
    header = " ".join(line.lstrip("# ") for line in RECIPES[name].read_text().splitlines() if line.startswith("#"))
    for said in ("Memory, estimated", "Time, estimated", "Run: ", "Not run: ", "lavender extract ", "lavender export "):
        assert said in header


@every_recipe
def test_what_a_recipe_trains_at_full_size(name):
    run, kind = read_run(RECIPES[name]), KINDS[name]
    model = full_size(kind)
    parameters = sum(one.numel() for one in model.parameters()) / 1e9
    assert round(parameters, 2) == (PUBLISHED[kind][1] or 8.54)
    freeze(model, run.freeze)
    if (settings := run.peft_settings()) is not None:
        config = peft_config_of(settings, model, run.freeze)
        config.task_type = None  # for one PEFT asks for methods that MiniCPM-V has from its adapter's hooks
        model = get_peft_model(model, config)
    counts = trained_parameters(model)
    for part, expected in zip(PARTS, TRAINED[name], strict=True):
        assert counts[part][0] == (counts[part][1] if expected is None else expected), part


def test_the_recipe_of_new_words_is_that_of_the_study():
    run, recipe = read_run(RECIPES["new_words"]), dict(FORMS["recipe"])
    assert {key: run.training[key] for key in recipe} == recipe
    assert tuple(run.freeze) == FROZEN
    assert run.training["max_steps"] == STEPS
    assert run.replay_share == 0.5


def test_the_page_of_recipes(tmp_path):
    """It names each, its settings are read, and the line that it shows is the run's own."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert set(re.findall(r"^\| `(\w+)\.yaml` \|", page, re.M)) == set(RECIPES)
    blocks = [yaml.safe_load(one) for one in re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)]
    runs = [read_run(RECIPES["world"], [f"{key}={json.dumps(one)}" for key, one in block.items()]) for block in blocks]
    assert runs[0].freeze == ["vision_tower", "connector"]
    assert runs[1].peft_settings() == runs[2].peft_settings()
    run = read_run(RECIPES["qwen25_vl_7b_24gb"])
    model = full_size("qwen2_5_vl")
    freeze(model, run.freeze)
    config = peft_config_of(run.peft_settings() or {}, model, run.freeze)
    assert "\n".join(trained_lines(check_trained(get_peft_model(model, config), run.freeze))) in page


def test_the_size_of_the_published_lora_file():
    """Of both towers, in float32: 23.6 MB. That of the text model alone would have 17.0 MB."""
    assert (VISION_QV + LLAMA_QV, round(4e-6 * (VISION_QV + LLAMA_QV), 1), round(4e-6 * LLAMA_QV, 1)) == (
        5_898_240,
        23.6,
        17.0,
    )


@pytest.fixture
def on_disk(processor, make_student, captions, tmp_path, monkeypatch) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Writes a tiny model of a family with its processor; its folder, and what tiny pictures want instead."""
    folder = tmp_path / "model"

    def write(kind: str) -> tuple[Path, dict[str, Any]]:
        if kind == "minicpmv":
            monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
            monkeypatch.syspath_prepend(str(tmp_path / "modules"))
            own = families.test_minicpm_v.build_processor(captions)
            folder.mkdir()
            save_as_published(folder, MiniCPMV(families.test_minicpm_v.config_of(own.tokenizer)), own)
            return folder, {}
        if kind == "mllama":
            model, own = make_student(), processor
        else:
            family = {
                "open_flamingo": lambda: families.test_flamingo.family_of(captions, "mpt"),
                "qwen2_5_vl": lambda: families.test_qwen_vl.family_of(kind, captions),
                "smolvlm": lambda: families.test_idefics3.family_of(kind, captions),
            }[kind]()
            model, own = family.make(), family.processor
        changed: dict[str, Any] = {}
        if kind in ("qwen2_5_vl", "smolvlm"):
            templates = Path(chat_template_utils.__file__).parent / "chat_templates"  # as published
            own.chat_template = (templates / f"{kind}.jinja").read_text()
            changed["image_processor"] = {"size": {"shortest_edge": 24**2, "longest_edge": 48**2}}
            if kind == "smolvlm":
                changed["image_processor"] = {"size": {"longest_edge": 64}}
            # the published processors need torchvision for a slot for videos
            monkeypatch.setattr(PROCESSOR_MAPPING, "_extra_content", dict(PROCESSOR_MAPPING._extra_content))
            AutoProcessor.register(type(model.config), type(own), exist_ok=True)
        model.save_pretrained(folder)
        own.save_pretrained(folder)
        return folder, changed

    return write


@every_recipe
def test_a_recipe_trains(name, on_disk, some_scenes, captions, store_path, tmp_path, monkeypatch, capsys):
    """Two steps with the recipe's own settings; then the checkpoint is loaded as a user would, and moved as it says."""
    monkeypatch.chdir(ROOT)
    folder, changed = on_disk(KINDS[name])
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write_scenes(data, some_scenes, captions)
    small = {
        "model": str(folder),
        "data": str(data),
        "maps": str(store_path),
        "out": str(out),
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "warmup_steps": 0,
        "prompt": "describe the picture.",
        **changed,
    }
    if read_run(RECIPES[name]).replay_data:
        small["replay_data"] = str(data)
    run = read_run(RECIPES[name], [f"{key}={json.dumps(value)}" for key, value in small.items()])
    train(run)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert len(losses) == 2
    assert all(0 < one < 100 for one in losses)
    resolved = yaml.safe_load((out / "config.yaml").read_text())["training"]
    assert {key: resolved[key] for key in run.training} == run.training
    said = capsys.readouterr().out
    assert ("the loss covers whole conversations" in said) == (KINDS[name] in ("minicpmv", "open_flamingo"))
    tuned, own = load_run(out, trust_remote_code=run.trust_remote_code)
    base, _ = load_run(folder, trust_remote_code=run.trust_remote_code)
    before, adapter = base.state_dict(), adapter_for(base.config)
    moved = {adapter.part_of(key) for key, one in tuned.state_dict().items() if not torch.equal(one, before[key])}
    assert moved == {part for part, count in zip(PARTS, TRAINED[name], strict=True) if count != 0}
    for key, value in run.image_processor.items():
        assert {k: v for k, v in dict(getattr(own.image_processor, key)).items() if v} == value
    if run.lora is not None:
        assert load_file(out / "checkpoint" / "adapter_model.safetensors")
