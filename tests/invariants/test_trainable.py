"""What a run trains: frozen parts stay to the bit, any PEFT method works, and what cannot work is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from transformers import MllamaForConditionalGeneration
from trl import chat_template_utils

from command_line import complaint, lavender, write_run
from lavender.cli.main import DONE, WRONG_USAGE
from lavender.data.samples import read_samples, to_dataset
from lavender.errors import ConfigError
from lavender.students.base import PARTS
from lavender.students.families.mllama import MllamaAdapter
from lavender.training.run import LoraSettings, RunConfig, load_run, read_run, train
from lavender.training.settings import marks_answers
from lavender.training.trainable import check_trained, freeze, peft_config_of, weights_dtype
from lavender.training.trainer import LavenderConfig, LavenderTrainer

STEPS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "seed": 3,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
TARGETS = ["q_proj", "v_proj"]


def moved(places: dict[str, str], out: Path) -> set[str | None]:
    """Parts of which a weight is another after the run."""
    model, _ = load_run(out)
    before = MllamaForConditionalGeneration.from_pretrained(places["model"]).state_dict()
    adapter = MllamaAdapter(model.config)
    return {adapter.part_of(name) for name, one in model.state_dict().items() if not torch.equal(one, before[name])}


@pytest.mark.parametrize(
    "frozen", [[], ["vision_tower"], ["language_model"], ["vision_tower", "connector"], ["connector", "language_model"]]
)
def test_frozen_parts_stay_to_the_bit(places, tmp_path, frozen, capsys):
    """Weight decay too leaves them alone; the count says so before the first step."""
    train(RunConfig(**places, out=str(tmp_path), freeze=frozen, training=STEPS | {"weight_decay": 0.1}))
    assert moved(places, tmp_path) == set(PARTS) - set(frozen)
    (line,) = (one for one in capsys.readouterr().out.splitlines() if one.startswith("trained parameters: "))
    counts = dict(one.split(" ", 1) for one in line.removeprefix("trained parameters: ").split(", ") if " of " in one)
    for part in PARTS:
        trained, whole = counts[part].split(" of ")
        assert trained == ("0" if part in frozen else whole)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["freeze"] == frozen


def test_an_aligner_stage_ends_with_frozen_parts_still_frozen(places, tmp_path):
    training = STEPS | {"attention_loss": "published", "aligner_pretraining": 0.5}
    train(RunConfig(**places, out=str(tmp_path), freeze=["vision_tower"], training=training))
    assert moved(places, tmp_path) == {"connector", "language_model"}


@pytest.mark.parametrize("frozen", [[], ["vision_tower"]])
def test_lora_in_the_whole_or_in_what_is_not_frozen(places, tmp_path, frozen):
    """By suffix q_proj and v_proj are in both towers, as in the paper's runs."""
    path = write_run(tmp_path, **places, lora={"target_modules": TARGETS}, freeze=frozen, **STEPS)
    ran = lavender("train", path)
    assert ran.code == DONE, ran.err
    names = load_file(tmp_path / "out" / "checkpoint" / "adapter_model.safetensors")
    seeing = [name for name in names if ".vision_model." in name]
    assert bool(seeing) != bool(frozen)
    assert [name for name in names if ".language_model." in name]
    assert moved(places, tmp_path / "out") == {"language_model"} | ({"vision_tower"} if not frozen else set())


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LORA", "use_dora": True, "r": 2},
        {"peft_type": "LORA", "use_rslora": True, "r": 2, "modules_to_save": ["multi_modal_projector"]},
        {"peft_type": "IA3", "feedforward_modules": []},
        {"peft_type": "LOHA", "r": 2},
        {"peft_type": "OFT", "oft_block_size": 4},
    ],
    ids=lambda one: "-".join(str(part) for part in list(one.values())[:2]),
)
@pytest.mark.parametrize("loss", ["mass", "published"])
def test_any_peft_method(places, tmp_path, settings, loss):
    """It trains, beside an Aligner too, and merges into an ordinary checkpoint."""
    train(
        RunConfig(
            **places,
            out=str(tmp_path),
            peft=settings | {"target_modules": TARGETS},
            freeze=["vision_tower"],
            training=STEPS | {"attention_loss": loss},
        )
    )
    saved = PeftConfig.from_pretrained(str(tmp_path / "checkpoint"))
    assert saved.peft_type == settings["peft_type"]
    assert not [
        name for name in load_file(tmp_path / "checkpoint" / "adapter_model.safetensors") if "alignment" in name
    ]
    extra = {"connector"} if "modules_to_save" in settings else set()
    assert moved(places, tmp_path) == {"language_model"} | extra
    assert lavender("export", tmp_path, "--out", tmp_path / "model").code == DONE


def test_every_linear_layer_under_learned_projections(places, tmp_path):
    """PEFT's "all-linear" means the model's own layers, and none that alignment adds."""
    settings = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
    training = STEPS | {"attention_loss": "published", "pooling": "learn", "aligner_kind": "mlp"}
    train(RunConfig(**places, out=str(tmp_path), peft=settings, training=training))
    assert moved(places, tmp_path) == set(PARTS)
    saved: Any = PeftConfig.from_pretrained(str(tmp_path / "checkpoint"))
    named = saved.target_modules
    assert "q_proj" in named
    assert not [name for name in named if "alignment" in name or "lm_head" in name]


def test_lora_is_the_short_form_of_peft(make_student):
    model = make_student()
    short = RunConfig("m", "d", "s", "o", lora=None)
    assert short.peft_settings() is None
    config: Any = peft_config_of(RunConfig("m", "d", "s", "o", lora=LoraSettings(r=3)).peft_settings() or {}, model)
    assert (config.peft_type, config.r, config.lora_alpha, config.lora_dropout) == ("LORA", 3, 32, 0.05)
    assert config.task_type == "CAUSAL_LM"
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    assert config.exclude_modules is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 8}, "Got peft_type: None. Expected one of ['ADAMSS'"),
        ({"peft_type": "LORRA"}, "Got peft_type: 'LORRA'"),
        ({"peft_type": "LORA", "rank": 8, "target_modules": TARGETS}, "Got the key 'rank' in peft"),
        ({"peft_type": "LORA", "r": 8}, "Got peft without target_modules"),
        ({"peft_type": "LORA", "target_modules": ["q_projj"]}, "Got target_modules="),
        ({"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"], "layers_pattern": "x"}, "that PEFT refuses"),
        ({"peft_type": "ADALORA", "target_modules": TARGETS, "total_step": 9}, "bypasses the hooks"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "which does not tune chosen modules"),
        ({"peft_type": "VERA", "target_modules": TARGETS}, "Got freeze with peft_type: VERA"),
        ({"peft_type": "LORA", "target_modules": ["multi_modal_projector"]}, "with freeze: ['connector']"),
        ({"peft_type": "LORA", "target_modules": TARGETS, "exclude_modules": ["x"]}, "Got freeze and exclude_modules"),
    ],
)
def test_settings_of_peft_that_cannot_work(make_student, settings, words):
    with pytest.raises(ConfigError) as caught:
        peft_config_of(settings, make_student(), ["connector"])
    assert words in str(caught.value)
    assert " Do this: " in str(caught.value)


@pytest.mark.parametrize(
    ("frozen", "words"),
    [
        (["vision"], "Got freeze: ['vision']. Expected a list of some of ['vision_tower', 'connector'"),
        ("vision_tower", "Got freeze: 'vision_tower'"),
        (list(PARTS), "Expected a part that trains"),
    ],
)
def test_parts_that_cannot_be_frozen(make_student, frozen, words):
    with pytest.raises(ConfigError) as caught:
        freeze(make_student(), frozen)
    assert words in str(caught.value)


def test_what_a_method_trains_in_a_frozen_part_is_noticed(places, tmp_path):
    """Biases of all layers, and modules that are trained whole, do not ask where they lie."""
    peft = {"peft_type": "LORA", "target_modules": TARGETS, "bias": "all"}
    with pytest.raises(ConfigError, match=r"and trained weights in \['vision_tower'\]"):
        train(RunConfig(**places, out=str(tmp_path), peft=peft, freeze=["vision_tower"], training=STEPS))


def test_lora_and_peft_in_one_file(tmp_path):
    line = complaint(lavender("train", write_run(tmp_path, lora=True, peft={"peft_type": "IA3"})), WRONG_USAGE)
    assert "Got lora and peft" in line
    with pytest.raises(ConfigError, match="Got peft='lora'"):
        read_run(write_run(tmp_path, peft="lora"))
    assert read_run(write_run(tmp_path), ["freeze=[connector]"]).freeze == ["connector"]


def test_small_steps_of_16_bit_weights(places, tmp_path, capsys):
    """What the run's note says: in bfloat16 most weights stay where they are at the paper's learning rate."""
    shares = {}
    for dtype in ("bfloat16", "float32"):
        out = tmp_path / dtype
        train(RunConfig(**places, out=str(out), dtype=dtype, training=STEPS | {"learning_rate": 1e-5}))
        model, _ = load_run(out)
        base, _ = load_run(places["model"], dtype=dtype)
        before = base.state_dict()
        moved = sum(int((one != before[name]).sum()) for name, one in model.state_dict().items())
        shares[dtype] = moved / sum(one.numel() for one in before.values())
        assert ("trained weights of 16 bits" in capsys.readouterr().out) == (dtype == "bfloat16")
    assert shares["bfloat16"] < 0.5 * shares["float32"]


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_full_tuning_of_16_bit_weights_is_in_float32_unless_asked(places, tmp_path, kind, capsys):
    """What a model folder of 16 bits once trained in: in float16 the loss went from 9 to 140 in ten steps."""
    model, processor = load_run(places["model"], dtype=kind)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "half")
    here = places | {"model": str(tmp_path / "half")}
    train(RunConfig(**here, out=str(tmp_path / "out"), training=STEPS | {"max_steps": 1, "probe_size": 0}))
    assert "trained weights of 16 bits" not in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["dtype"] == "float32"
    assert {one.dtype for one in load_file(tmp_path / "out" / "checkpoint" / "model.safetensors").values()} == {
        torch.float32
    }
    for asked in ("float16", "half"):
        run = RunConfig(**here, out=str(tmp_path / f"{asked} out"), dtype=asked, training=STEPS)
        with pytest.raises(ConfigError, match="float16.* in which AdamW.* dtype: float32"):
            train(run)
        assert not (tmp_path / f"{asked} out").exists()


def test_the_type_of_a_run_s_weights(make_student):
    """Under PEFT the base keeps its own type; a part that is trained whole may not be of float16."""
    model = make_student().half()
    config = model.config
    config.dtype = torch.float16
    assert (
        weights_dtype("auto", config, with_peft=True) == weights_dtype("float16", config, with_peft=True) == "float16"
    )
    assert weights_dtype("auto", config, with_peft=False) == "float32"
    assert weights_dtype("torch.bfloat16", config, with_peft=False) == "bfloat16"
    config.dtype = None
    with pytest.raises(ConfigError, match="Got dtype: 'bf17'"):
        weights_dtype("bf17", config, with_peft=True)
    with pytest.raises(ConfigError, match="trained weights of float16, such as "):
        check_trained(model, [])


def test_a_script_with_float16_weights_is_refused(places, tmp_path):
    """As `from_pretrained` loads them from a folder of 16 bits. Under PEFT the adapters are float32."""
    model, processor = load_run(places["model"], dtype="float16")
    args = LavenderConfig(output_dir=str(tmp_path / "out"), maps=places["maps"], **STEPS)
    rows = to_dataset(read_samples(places["data"]))
    with pytest.raises(ConfigError, match="trained weights of float16, such as .*dtype=torch.float32"):
        LavenderTrainer(model, args, processing_class=processor, train_dataset=rows)
    model, processor = load_run(places["model"], dtype="float16")
    peft_config = LoraConfig(target_modules=["q_proj", "v_proj"])
    LavenderTrainer(model, args, processing_class=processor, train_dataset=rows, peft_config=peft_config)


def test_learned_projections_of_a_16_bit_model_are_of_32(places, tmp_path):
    """So that a step of 1e-5 moves them, beside the Aligner and LoRA, which are of 32 bits too."""
    heads = {}
    for rate in (1e-5, 0.0):
        out = tmp_path / str(rate)
        training = STEPS | {"attention_loss": "published", "pooling": "learn", "learning_rate": rate}
        train(RunConfig(**places, out=str(out), dtype="bfloat16", lora=LoraSettings(), training=training))
        heads[rate] = load_file(out / "alignment_head.safetensors")
    projections = [name for name in heads[0.0] if "alignment_parallel" in name]
    assert projections
    for name in projections:
        assert heads[0.0][name].dtype == torch.float32
        assert (heads[1e-5][name] != heads[0.0][name]).float().mean() > 0.9


def test_settings_of_the_image_processor(places, tmp_path):
    train(RunConfig(**places, out=str(tmp_path), image_processor={"image_mean": [0.1, 0.2, 0.3]}, training=STEPS))
    _, processor = load_run(tmp_path)
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    with pytest.raises(ConfigError, match="Got the key 'max_tiles' in image_processor"):
        train(RunConfig(**places, out=str(tmp_path), image_processor={"max_tiles": 1}, training=STEPS))


@pytest.mark.parametrize(
    ("template", "marks"), [("smolvlm", True), ("llama3_2", False), ("qwen2_5_vl_training", True), (None, False)]
)
def test_whether_answers_are_told_apart(processor, template, marks):
    """By the template's own marks, or by a variant that TRL has of it."""
    own = copy.copy(processor)
    folder = Path(chat_template_utils.__file__).parent / "chat_templates"
    own.chat_template = None if template is None else (folder / f"{template}.jinja").read_text()
    assert marks_answers(own) == marks
