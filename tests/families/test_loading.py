"""Models that transformers alone cannot load: OpenFlamingo's file, code that comes with a model, a bad config."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoProcessor, CLIPImageProcessorPil, dynamic_module_utils
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from command_line import complaint, lavender, write_run, write_scenes
from families.minicpm_v_published import MiniCPMV, save_as_published, sincos
from families.test_flamingo import tiny_published
from families.test_minicpm_v import build_processor as minicpm_processor
from families.test_minicpm_v import config_of
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.errors import ConfigError, ModelError
from lavender.students.families.flamingo_model import FlamingoForConditionalGeneration
from lavender.students.registry import FAMILIES
from lavender.training.run import load_run
from lavender.world.student_models import _tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
STEP = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}


@pytest.fixture
def data(some_scenes, captions, tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return write_scenes(folder, some_scenes, captions)


@pytest.fixture
def minicpm(captions, tmp_path, monkeypatch) -> Path:
    """A folder as published, its code beside the weights. What is run of it stays in this test's folder."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    processor = minicpm_processor(captions)
    folder = tmp_path / "minicpm"
    folder.mkdir()
    save_as_published(folder, MiniCPMV(config_of(processor.tokenizer)), processor)
    return folder


def moved(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name].float(), other[name].float())]


def test_openflamingo_from_its_published_file(captions, data, store_path, tmp_path, monkeypatch):
    """The page's own words, with small parts in the place of the named ones; then inspect, and a step of training."""
    monkeypatch.chdir(tmp_path)
    tokenizer = _tokenizer(captions, 300, ("</s>",), "<unk>", eos_token="</s>")
    theirs, vision, language = tiny_published("mpt", 4, len(tokenizer) + 3, len(tokenizer) + 1)
    for part in (tokenizer, language):
        part.save_pretrained("language")
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (images, vision):
        part.save_pretrained("vision")
    torch.save(theirs.checkpoint(), "checkpoint.pt")
    (code,) = (one for one in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "checkpoint.pt" in one)
    exec(code.replace("mosaicml/mpt-7b", "language").replace("openai/clip-vit-large-patch14", "vision"), {})
    loaded, processor = load_run("open-flamingo-9b")
    assert isinstance(loaded, FlamingoForConditionalGeneration)
    assert torch.equal(loaded.model.perceiver.latents, theirs.perceiver.latents)
    assert processor.image_token_id == loaded.config.image_token_id == len(tokenizer) + 1
    facts = json.loads(lavender("inspect", "open-flamingo-9b").out)
    assert (facts["family"], facts["usable_layers"]) == ("open_flamingo", [3])
    assert facts["sample"]["words"][0] == "cat"
    ran = lavender("train", write_run(tmp_path, model="open-flamingo-9b", data=str(data), maps=str(store_path), **STEP))
    assert ran.code == DONE, ran.err
    tuned, again = load_run(tmp_path / "out")
    assert moved(tuned.state_dict(), loaded.state_dict())
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_code_of_a_model_runs_on_consent_alone(minicpm, data, store_path, tmp_path):
    run = write_run(tmp_path, model=str(minicpm), data=str(data), maps=str(store_path), **STEP)
    for ran, advice in (
        (lavender("train", run), "read it, then write trust_remote_code: true in the run file."),
        (lavender("check", minicpm, "--data", data, "--maps", store_path), "read it, then add --trust-remote-code"),
    ):
        line = complaint(ran, WRONG_USAGE)
        assert "comes with its own code" in line
        assert advice in line
    facts = json.loads(lavender("inspect", minicpm).out)
    assert facts["parameters"] is None
    assert not (tmp_path / "modules").exists() or not list((tmp_path / "modules").rglob("minicpm*.py"))
    ran = lavender("check", minicpm, "--data", data, "--maps", store_path, "--trust-remote-code")
    assert ran.code == DONE, ran.err
    assert json.loads(ran.out)["groups"]["all"]["words"] == 19


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_with_its_own_code(minicpm, data, store_path, tmp_path, lora):
    """Trained, loaded again as the run was, inspected, and exported with its code, which then needs nothing of ours."""
    run = {"model": str(minicpm), "data": str(data), "maps": str(store_path), "lora": lora, **STEP}
    ran = lavender("train", write_run(tmp_path, **run, trust_remote_code=True))
    assert ran.code == DONE, ran.err
    base, _ = load_run(minicpm, trust_remote_code=True)
    with pytest.raises(ConfigError, match="comes with its own code"):  # a run folder may come from somebody else
        load_run(tmp_path / "out")
    tuned, processor = load_run(tmp_path / "out", trust_remote_code=True)
    changed = moved(tuned.state_dict(), base.state_dict())
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed) or not lora
    assert processor.image_processor.scale_resolution == 48
    for model in (base, tuned):  # what no checkpoint holds, and transformers 5 does not make again
        assert torch.equal(model.resampler.pos_embed, sincos(64, 70, 70))
    facts = json.loads(lavender("inspect", minicpm, "--trust-remote-code").out)
    assert facts["parameters"] == sum(one.numel() for one in base.parameters())
    assert facts["sample"]["words"][0] == "cat"
    ran = lavender("export", tmp_path / "out", "--out", tmp_path / "model", "--trust-remote-code")
    assert ran.code == DONE, ran.err
    assert (tmp_path / "model" / "minicpm_v_published.py").is_file()
    again, _ = load_run(tmp_path / "model", trust_remote_code=True)
    assert not moved(again.state_dict(), tuned.state_dict())
    plain = AutoProcessor.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert type(plain).__name__ == "MiniCPMVProcessor"


def needs_torchvision(model_type: str) -> bool:
    """Whether a published processor has a slot for videos, or images that no other backend processes."""
    kind = getattr(transformers, str(PROCESSOR_MAPPING_NAMES[model_type]))
    if "torchvision" in vars(kind).get("_backends", ()):
        return True
    images = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, {"pil": ""})
    return "pil" not in images or "video_processor" in kind.get_attributes()


def test_the_page_names_the_processors_that_need_torchvision():
    (named,) = re.findall(r"load only where torchvision is,(.*?); so does", DOCS.read_text(), re.S)
    types = [one for one in FAMILIES if one in PROCESSOR_MAPPING_NAMES]
    assert set(re.findall(r"`(\w+)`", named)) == set(filter(needs_torchvision, types))
    assert set(FAMILIES) - set(types) == {"minicpmv", "open_flamingo"}


def test_a_config_that_contradicts_itself(data, store_path, tmp_path):
    text = {"model_type": "qwen2", "num_hidden_layers": 6, "layer_types": ["full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl", "text_config": text}))
    with pytest.raises(ModelError, match=r"whose config is wrong: .*`num_hidden_layers` \(6\).* repair its config"):
        load_run(tmp_path)
    run = write_run(tmp_path, model=str(tmp_path), data=str(data), maps=str(store_path))
    for ran in (lavender("train", run), lavender("inspect", tmp_path)):
        assert "whose config is wrong" in complaint(ran, FAILED)
