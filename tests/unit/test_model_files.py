"""Models, adapters and teachers that are missing, damaged or out of reach: one sentence, which is true."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaForConditionalGeneration

from command_line import complaint, lavender, write_run, write_scenes
from lavender.cli.main import FAILED
from lavender.config import ExtractionConfig
from lavender.errors import ConfigError, LavenderError, ModelError, NotFiniteError
from lavender.evaluation.check import check_model
from lavender.model_files import IN_RUN_FILE, loading
from lavender.students.loading import load_run
from lavender.teachers.diffusion.teacher import Teacher
from lavender.training.arguments import check_reports
from lavender.training.trainer import LavenderConfig
from lavender.world import STUDENT_PATHS, TEACHER_PATH

BASE = STUDENT_PATHS["llava"]
VISION = "model.vision_tower.embeddings.patch_embedding.weight"


def copied(source: Path, at: Path) -> Path:
    shutil.copytree(source, at)
    return at


def changed(path: Path, change: str, name: str | None = None) -> str:
    """Weights with one of them left out, renamed, of another shape, or with a number that is none; its name."""
    state = load_file(path)
    name = name or sorted(state)[3]
    tensor = state.pop(name)
    if change == "renamed":
        state[f"{name}_old"] = tensor
    elif change == "shape":
        state[name] = torch.cat([tensor, tensor])
    elif change != "missing":
        state[name] = tensor.clone()
        state[name].view(-1)[1] = float(change)
    save_file(state, path, metadata={"format": "pt"})
    return name


@pytest.fixture
def model(tmp_path) -> Path:
    return copied(BASE, tmp_path / "model")


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A LoRA of the shipped student, as training writes it."""
    folder = tmp_path / "adapter"
    base = LlavaForConditionalGeneration.from_pretrained(BASE)
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        folder.mkdir(exist_ok=True)
        shutil.copy(BASE / file, folder)
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = str(BASE)
    tuned.save_pretrained(folder)
    return folder


CHANGES = pytest.mark.parametrize("change", ["missing", "renamed", "shape", "nan", "inf"])


# weights


@CHANGES
def test_a_model_whose_weights_are_not_all_there_or_not_finite(model, change):
    name = changed(model / "model.safetensors", change)
    with pytest.raises(ModelError) as caught:
        load_run(model)
    assert str(model) in str(caught.value)
    assert name.removeprefix("language_model.model.") in str(caught.value)  # transformers has another beginning for it


@CHANGES
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_teacher_likewise(tmp_path, part, change):
    teacher = copied(TEACHER_PATH, tmp_path / "teacher")
    changed(next((teacher / part).glob("*.safetensors")), change)
    with pytest.raises(ModelError, match=str(teacher)):
        Teacher.from_pretrained(teacher, ExtractionConfig(grid=(8, 8)))


@CHANGES
def test_an_adapter_likewise(adapter, change):
    load_run(adapter)
    changed(adapter / "adapter_model.safetensors", change)
    with pytest.raises(ModelError, match=str(adapter)):
        load_run(adapter)


def test_a_model_with_more_layers_than_its_config_has(model):
    settings = json.loads((model / "config.json").read_text())
    settings["text_config"]["num_hidden_layers"] -= 1
    (model / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"config has no place for .*layers\.3\."):
        load_run(model)


def test_tied_weights_are_not_missing(model, tmp_path):
    tied = LlavaForConditionalGeneration.from_pretrained(model)
    for config in (tied.config, tied.config.get_text_config()):
        config.tie_word_embeddings = True
    type(tied)(tied.config).save_pretrained(model)
    assert not [name for name in load_file(model / "model.safetensors") if "lm_head" in name]
    loaded, _ = load_run(model)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_pickled_weights_are_never_loaded(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"without safetensors beside pytorch_model\.bin.*a pickle can run code"):
        load_run(model)


def test_pickled_adapters_are_never_loaded(adapter):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"beside adapter_model\.bin"):
        load_run(adapter)


def test_an_index_whose_part_is_not_there(model):
    whole = AutoModelForImageTextToText.from_pretrained(model)
    (model / "model.safetensors").unlink()
    whole.save_pretrained(model, max_shard_size="1MB")
    load_run(model)
    sorted(model.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json, which names .*model-00002-of"):
        load_run(model)


@pytest.mark.parametrize("verb", ["check", "inspect", "train", "export"])
def test_every_verb_fails_at_a_git_lfs_pointer(verb, model, tmp_path, some_scenes, captions, store_path):
    (tmp_path / "data").mkdir()
    data = write_scenes(tmp_path / "data", some_scenes, captions)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 21000000\n"
    (model / ("config.json" if verb == "inspect" else "model.safetensors")).write_text(pointer)
    (tmp_path / "run").mkdir()
    model.rename(tmp_path / "run" / "checkpoint")
    folder = tmp_path / "run" / "checkpoint"
    ran = {
        "check": lambda: lavender("check", folder, "--data", data, "--maps", store_path),
        "inspect": lambda: lavender("inspect", folder),
        "train": lambda: lavender(
            "train", write_run(tmp_path, model=str(folder), data=str(data), maps=str(store_path))
        ),
        "export": lambda: lavender("export", tmp_path / "run", "--out", tmp_path / "out"),
    }[verb]()
    line = complaint(ran, FAILED)
    assert f"{folder}/" in line
    assert "a Git LFS pointer" in line
    assert "run git lfs pull" in line


# configs


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "num_hidden_layers", 10**9),
        ("vision_config", "num_hidden_layers", 5000),
        ("text_config", "hidden_size", 10**12),
        ("text_config", "vocab_size", 10**7),
        ("text_config", "intermediate_size", 10**7),
        ("vision_config", "image_size", 10**6),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(model, part, name, value):
    settings = json.loads((model / "config.json").read_text())
    settings[part][name] = value
    (model / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=str(model)):
        load_run(model)


def test_absurd_sizes_of_a_teacher(tmp_path):
    teacher = copied(TEACHER_PATH, tmp_path / "teacher")
    for file, name, value in (
        ("unet/config.json", "layers_per_block", 10**9),
        ("vae/config.json", "block_out_channels", [10**9] * 3),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10),
        ("scheduler/scheduler_config.json", "beta_end", 1e30),
        ("tokenizer/tokenizer_config.json", "model_max_length", 9**30),
    ):
        before = (teacher / file).read_text()
        (teacher / file).write_text(json.dumps(json.loads(before) | {name: value}))
        with pytest.raises(ModelError, match=str(teacher)):
            Teacher.from_pretrained(teacher, ExtractionConfig(grid=(8, 8)))
        (teacher / file).write_text(before)
    Teacher.from_pretrained(teacher, ExtractionConfig(grid=(8, 8)))


def test_a_teacher_names_no_class_of_other_libraries(tmp_path):
    teacher = copied(TEACHER_PATH, tmp_path / "teacher")
    index = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps(index | {"unet": ["os", "system"]}))
    with pytest.raises(ModelError, match=r"os\.system as .*a class of diffusers or transformers"):
        Teacher.from_pretrained(teacher, ExtractionConfig(grid=(8, 8)))


@pytest.mark.parametrize("version", ["2.6", 4.0, "4.5", None])
def test_other_versions_of_minicpm_v_are_refused_by_name(version, tmp_path):
    settings: dict[str, Any] = {"model_type": "minicpmv", "num_hidden_layers": 2, "query_num": 64, "version": version}
    settings["auto_map"] = {"AutoConfig": "own.Config"}
    (tmp_path / "config.json").write_text(json.dumps({name: one for name, one in settings.items() if one is not None}))
    line = complaint(lavender("inspect", tmp_path), FAILED)
    assert (f"MiniCPM-V {version}: " if version else "MiniCPM-V 2 or older") in line
    assert "MiniCPM-Llama3-V-2.5" in line


def test_a_tokenizer_of_another_model(model):
    settings = json.loads((model / "tokenizer.json").read_text())
    settings["added_tokens"].append(settings["added_tokens"][-1] | {"id": 5000, "content": "<beyond>"})
    (model / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"whose tokenizer has '<beyond>' as token \d+ and whose embeddings are"):
        load_run(model)


@pytest.mark.parametrize("template", ["{% for", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_fails(model, template):
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=f"the chat template of {model}, which fails"):
        load_run(model)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_a_model_without_an_image_processor(model, file):
    for name in ("preprocessor_config.json", "processor_config.json"):
        (model / name).unlink(missing_ok=True)
    if file == "processor_config.json":
        (model / file).write_text('{"processor_class": "LlavaProcessor"}')
    with pytest.raises(ModelError, match=str(model)):
        load_run(model)


# what the message advises


def answer(status: int) -> Any:
    """What an error of the hub holds, whichever client it was asked with."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("cause", "offline", "said", "advice"),
    [
        (GatedRepoError("gated", response=answer(403)), False, "access to it is restricted", "accept it at"),
        (RepositoryNotFoundError("no", response=answer(404)), False, "no model of this name", "run hf auth login"),
        (HfHubHTTPError("no", response=answer(401)), False, "refuses it", "run hf auth login"),
        (LocalEntryNotFoundError("no"), True, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
        (OfflineModeIsEnabled("no"), True, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
        (LocalEntryNotFoundError("no"), False, "out of reach", "check network and proxy"),
        (HfHubHTTPError("no", response=answer(503)), False, "out of reach", "check network and proxy"),
    ],
)
def test_a_hub_id_that_cannot_be_had(monkeypatch, cause, offline, said, advice):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ModelError) as caught, loading("model", "some/model"):
        try:
            raise cause
        except Exception as error:
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the files") from error
    assert said in str(caught.value)
    assert advice in caught.value.do


def test_consent_is_asked_for_where_it_can_be_given():
    for given, advice in (({}, "add --trust-remote-code"), ({"consent": IN_RUN_FILE}, "in the run file")):
        with pytest.raises(ConfigError) as caught, loading("model", "x", **given):
            raise ValueError("set trust_remote_code=True")
        assert advice in caught.value.do
    with pytest.raises(ModelError) as failed, loading("teacher", "x", consent=None):
        raise ValueError("set trust_remote_code=True")
    assert "trust" not in str(failed.value)


@pytest.mark.parametrize("kind", [KeyError, TypeError, RecursionError, MemoryError, AttributeError])
def test_whatever_loading_raises_is_one_sentence(tmp_path, kind):
    expected = pytest.raises(ModelError, match=f"the model {tmp_path}, which cannot be loaded: {kind.__name__}")
    with expected, loading("model", tmp_path):
        raise kind("a\nb")


def test_a_missing_package_is_named_and_no_folder_is_to_be_repaired(tmp_path):
    with pytest.raises(ModelError) as caught, loading("model", tmp_path):
        raise ImportError("Package `num2words` is required to run SmolVLM processor. Install it")
    assert "num2words" in caught.value.got
    assert caught.value.do == "install what is named"
    with pytest.raises(ModelError) as caught, loading("model", tmp_path):
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found in your envir")
    assert "Qwen2VLVideoProcessor requires the Torchvision library" in caught.value.got
    assert caught.value.do == "pip install 'lavender-vlm[torchvision]', from the index that your torch is from"


@pytest.mark.parametrize(
    ("content", "said", "advice"),
    [
        (b"\n\x0c\n\x05<unk>\x15" + bytes(4), "a file of SentencePiece", "'lavender-vlm[sentencepiece]'"),
        (b"IQ== 0\nIg== 1\n", "`tiktoken` is required", "install what is named"),
    ],
)
def test_the_package_of_a_tokenizer_is_named(tmp_path, monkeypatch, content, said, advice):
    """Without sentencepiece, transformers asks for tiktoken whichever of the two the file needs."""
    (tmp_path / "spiece.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    monkeypatch.setattr("lavender.model_files.find_spec", lambda name: None)  # also where somebody has it
    with pytest.raises(ModelError) as caught, loading("teacher", tmp_path):
        AutoTokenizer.from_pretrained(tmp_path)
    assert said in caught.value.got
    assert advice in caught.value.do


def test_a_tokenizer_whose_file_is_not_there(model, monkeypatch):
    monkeypatch.setattr("lavender.model_files.find_spec", lambda name: None)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no file of its tokenizer.*get its tokenizer.json too"):
        load_run(model)


def test_a_failed_import_that_was_handled_is_not_blamed(tmp_path):
    with pytest.raises(ModelError, match=r"config.json is truncated.*repair the folder"), loading("model", tmp_path):
        try:
            raise ImportError("No module named 'optional'")
        except ImportError:
            raise OSError("config.json is truncated")  # noqa: B904
    with pytest.raises(ModelError, match="access to it is restricted"), loading("model", "some/model"):
        try:
            raise ImportError("No module named 'optional'")
        except ImportError:
            raise GatedRepoError("gated", response=answer(403))  # noqa: B904
    with pytest.raises(ModelError, match="No module named 'needed'.*install what is named"), loading("model", tmp_path):
        raise RuntimeError("Failed to import a model") from ImportError("No module named 'needed'")


@pytest.mark.parametrize("consent", ["false", "no", 1, [0], None])
def test_consent_is_true_and_nothing_else(consent, tmp_path):
    (tmp_path / "own.py").write_text("from pathlib import Path\nPath(__file__ + '.ran').touch()\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}})
    )
    with pytest.raises(LavenderError):
        load_run(tmp_path, trust_remote_code=consent)
    assert not (tmp_path / "own.py.ran").exists()


# verdicts and settings


def test_a_verdict_of_nan_is_an_error(some_scenes, captions, tmp_path, store_path, monkeypatch):
    """Weights may be finite and yet give no finite loss."""
    loaded, processor = load_run(STUDENT_PATHS["mllama"])
    loaded.lm_head.weight.data.mul_(1e38)
    monkeypatch.setattr("lavender.evaluation.placement.load_run", lambda *args, **kwargs: (loaded, processor))
    with pytest.raises(NotFiniteError, match="NaN or infinity in the loss of .* from the patches: whole"):
        check_model(STUDENT_PATHS["mllama"], write_scenes(tmp_path, some_scenes, captions), store_path)


def test_what_a_run_reports_to_must_be_installed(monkeypatch):
    monkeypatch.setattr("lavender.training.arguments.get_available_reporting_integrations", lambda: ["tensorboard"])
    check_reports(["tensorboard"])
    with pytest.raises(ConfigError, match="pip install wandb, or set report_to: none"):
        check_reports(["wandb"])
    with pytest.raises(ConfigError, match=r"report_to: wandd\. Expected none, or some of"):
        check_reports(["wandd"])


def test_bf16_without_such_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ConfigError, match="set bf16: false and use_cpu: true, in a script bf16=False"):
        LavenderConfig(output_dir=str(tmp_path), maps="maps", bf16=True)
