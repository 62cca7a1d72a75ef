"""QLoRA: a base of 4 or 8 bits, adapters and alignment beside it. bitsandbytes runs on the CPU too."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, MllamaForConditionalGeneration
from trl import SFTConfig, SFTTrainer

from command_line import complaint, lavender, write_run
from lavender.alignment.objective import attach
from lavender.cli.main import DONE, WRONG_USAGE
from lavender.config import AlignmentConfig
from lavender.errors import ConfigError
from lavender.evaluation.memory import footprint
from lavender.students.registry import adapter_for
from lavender.training.run import LoraSettings, RunConfig, load_run, train
from lavender.training.trainable import trained_parameters
from lavender.training.trainer import LavenderConfig, LavenderTrainer

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {  # with 8 bits on a CPU bitsandbytes fails on states of four dimensions, as the tower's are
    "load_in_8bit": True,
    "llm_int8_skip_modules": ["model.vision_model", "model.multi_modal_projector", "lm_head"],
}
KINDS: dict[str, dict[str, Any]] = {
    "published": {"attention_loss": "published"},
    "learn": {"attention_loss": "published", "pooling": "learn"},
    "default": {},
    "kl, forced": {"attention_loss": "kl", "attention_forcing": 0.9},
}
STEPS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "seed": 3,
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "disable_tqdm": True,
}


@pytest.fixture(params=[True, False], ids=["a CPU with avx512_bf16", "a CPU without"])
def packing(request, monkeypatch) -> bool:
    """Whether bitsandbytes takes this CPU for one whose kernel wants weights packed anew: both, on every machine."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: request.param)
    return request.param


@pytest.fixture
def quantized(places) -> Any:
    return AutoModelForImageTextToText.from_pretrained(places["model"], quantization_config=BitsAndBytesConfig(**NF4))


@pytest.mark.parametrize("settings", [NF4, INT8], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run(places, tmp_path, settings, kind, packing, capsys):
    """Adapters learn; what alignment adds stays of 32 bits; the export is an ordinary checkpoint of the base's type."""
    train(
        RunConfig(
            **places,
            out=str(tmp_path),
            quantization=settings,
            lora=LoraSettings(),
            training=STEPS | KINDS[kind],
        )
    )
    assert "TRL itself trains the adapters of a quantised model in bfloat16" in capsys.readouterr().out
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    most = 1 if KINDS[kind].get("attention_loss") == "published" else float("inf")  # min–max maps differ by 1 at most
    assert len([entry for entry in logged if 0 < entry.get("attention_loss", 0) < most]) == 2
    assert len([entry for entry in logged if 0 < entry.get("attention_mass", 0) < 1]) == 2
    added = [load_file(file) for file in tmp_path.glob("alignment_head.safetensors")]
    dtypes = [{one.dtype for one in weights.values()} for weights in added]
    assert dtypes == ([] if kind in ("default", "kl, forced") else [{torch.float32}])
    adapter = load_file(tmp_path / "checkpoint" / "adapter_model.safetensors")
    assert not [name for name in adapter if "alignment" in name]
    assert all(one.abs().max() > 0 for name, one in adapter.items() if "lora_B" in name and "language" in name)
    assert lavender("export", tmp_path, "--out", tmp_path / "model").code == DONE
    merged, _ = load_run(tmp_path / "model")
    before = MllamaForConditionalGeneration.from_pretrained(places["model"]).state_dict()
    moved = {name.split(".")[-2] for name, one in merged.state_dict().items() if not torch.equal(one, before[name])}
    assert moved == {"q_proj", "v_proj"}


def test_weights_stay_as_they_were_packed_whatever_the_cpu(places, packing):
    """bitsandbytes packs them anew at a forward in evaluation, for good; no gradient goes through its kernel then."""
    plain = AutoModelForImageTextToText.from_pretrained(places["model"], quantization_config=BitsAndBytesConfig(**NF4))
    layers = [one for one in plain.modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    assert {one.support_avx512bf16_for_cpu for one in layers} == {packing}
    model = adapter_for(plain.config).load(
        AutoModelForImageTextToText, str(places["model"]), quantization_config=BitsAndBytesConfig(**NF4)
    )
    layer = next(
        one
        for one in model.modules()
        if isinstance(one, bitsandbytes.nn.Linear4bit) and one.in_features % one.weight.quant_state.blocksize
    )
    before, states = layer.weight.data.clone(), torch.ones(1, layer.in_features)
    layer.eval()(states)
    assert torch.equal(layer.weight.data, before)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_weight_zero_is_plain_qlora_step_for_step(packing, places, processor, dataset, store_path, tmp_path):
    trained = {}
    for name, trainer_class, config_class, more in (
        ("plain", SFTTrainer, SFTConfig, {}),
        ("ours", LavenderTrainer, LavenderConfig, {"maps": str(store_path), "align_weight": 0.0}),
    ):
        model = AutoModelForImageTextToText.from_pretrained(
            places["model"], quantization_config=BitsAndBytesConfig(**NF4)
        )
        args: Any = config_class(
            output_dir=str(tmp_path), report_to="none", max_length=None, save_strategy="no", **STEPS, **more
        )
        trainer: Any = trainer_class(
            model,
            args=args,
            processing_class=processor,
            train_dataset=dataset,
            peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        trainer.train()
        trained[name] = {key: one for key, one in trainer.model.named_parameters() if "lora_" in key}
    assert trained["plain"].keys() == trained["ours"].keys()
    assert trained["plain"]
    for key, one in trained["plain"].items():
        assert torch.equal(one, trained["ours"][key]), key


@pytest.mark.parametrize("kind", ["learn", "default"])
def test_resuming_is_no_interruption(places, tmp_path, kind):
    """Also of the quantised base's adapters and of what alignment adds."""
    common: dict[str, Any] = {**places, "quantization": NF4, "lora": LoraSettings()}
    training = STEPS | KINDS[kind] | {"max_steps": 4, "save_steps": 2}
    whole = train(RunConfig(**common, out=str(tmp_path / "whole"), training=training))
    broken = tmp_path / "broken"
    (broken / "trainer").mkdir(parents=True)
    (broken / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    (whole / "trainer" / "checkpoint-2").rename(broken / "trainer" / "checkpoint-2")
    train(RunConfig(**common, out=str(broken), training=training))
    files = ["checkpoint/adapter_model.safetensors"] + (["alignment_head.safetensors"] if kind == "learn" else [])
    for file in files:
        expected, found = load_file(whole / file), load_file(broken / file)
        assert [name for name, one in expected.items() if not torch.equal(found[name], one)] == []


def test_learned_projections_begin_as_the_dequantised_ones(quantized):
    attach(quantized, AlignmentConfig(attention_loss="published", pooling="learn"))
    adapter = adapter_for(quantized.config)
    for layer in adapter.usable_layers():
        attention = adapter.attention_module(quantized, layer)
        parallel = attention.get_submodule("alignment_parallel")
        for own, new in ((attention.q_proj, parallel.query), (attention.k_proj, parallel.key)):
            assert own.weight.dtype == torch.uint8
            assert torch.equal(new.weight, dequantize_module_weight(own).float())


def test_packed_weights_are_counted_as_what_they_stand_for(quantized, places):
    plain = MllamaForConditionalGeneration.from_pretrained(places["model"])
    expected = {part: whole for part, (_, whole) in trained_parameters(plain).items()}
    assert {part: whole for part, (_, whole) in trained_parameters(quantized).items()} == expected


def test_the_estimate_of_its_weights(quantized, places):
    """Within a tenth of what the quantised model holds."""
    plain = MllamaForConditionalGeneration.from_pretrained(places["model"]).bfloat16()
    estimate = footprint(plain, adapter_for(plain.config), None, None)["qlora"]["weights"]
    quantized.lm_head.bfloat16()
    held = 0
    for parameter in quantized.parameters():
        state = vars(parameter).get("quant_state")
        held += parameter.numel() * (parameter.element_size() if parameter.dtype == torch.uint8 else 2)
        if state is not None:
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    lora = footprint(plain, adapter_for(plain.config), None, None)["lora_parameters"]
    assert estimate - 2 * lora == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantization": NF4}, "Got quantization without lora or peft"),
        ({"quantization": "4bit", "lora": True}, "Got quantization='4bit'. Expected a mapping or null."),
        ({"quantization": {"bnb_4bit_quant_type": "nf4"}, "lora": True}, "Do this: write quantization: {load_in_4bit"),
        ({"quantization": NF4 | {"quant_type": "nf4"}, "lora": True}, "Got the key 'quant_type' in quantization"),
        (
            {"quantization": NF4 | {"bnb_4bit_compute_dtype": "bf17"}, "lora": True},
            "bnb_4bit_compute_dtype='bf17'",
        ),
    ],
)
def test_what_cannot_work_is_refused(places, tmp_path, settings, words):
    path = write_run(tmp_path, **places | settings)
    assert words in complaint(lavender("train", path), WRONG_USAGE)


def test_without_bitsandbytes(places, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ConfigError, match=r"pip install 'lavender-vlm\[quantization\]'"):
        train(RunConfig(**places, out=str(tmp_path), quantization=NF4, lora=LoraSettings(), training=STEPS))
