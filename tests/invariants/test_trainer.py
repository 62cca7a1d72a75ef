"""What a training run must keep: plain fine-tuning where nothing is aligned, sums over micro-batches, the checkpoint.

Pictures, models and maps are tiny; a run is two to four steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, MllamaForConditionalGeneration
from trl import SFTConfig, SFTTrainer

from closeness import close, moved
from lavender.alignment.objective import HEAD_NAME, TRAINED_PARTS, attach, is_alignment_part
from lavender.data.store import MapStore
from lavender.errors import ConfigError, DataError
from lavender.training import mixin
from lavender.training.exporting import export
from lavender.training.schedule import forced_words
from lavender.training.trainer import LavenderConfig, LavenderTrainer
from lavender.words import content_words
from lavender.world.student_models import conversation

PUBLISHED: dict[str, Any] = {"attention_loss": "published"}
LEARN: dict[str, Any] = PUBLISHED | {"pooling": "learn"}
KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": {}, "published, lora": PUBLISHED, "learn": LEARN}
"""Runs and their settings: two with the default loss, one with an Aligner beside LoRA, one with projections too."""
DIRECT: dict[str, dict[str, Any]] = {
    "kl": {"attention_loss": "kl"},
    "forced": {"attention_forcing": 0.6},
    "kl of sharpened maps, forced": {
        "attention_loss": "kl",
        "attention_forcing": 0.6,
        "sharpen": 2.0,
        "subtract_background": True,
        "weight_by_confidence": True,
    },
    "kl, lora, both rows": {"attention_loss": "kl", "rows": "both"},
}
"""More runs with a loss of the attention itself, and their settings."""
UNEVEN = (0, 1, 2, 5, 3, 4, 0, 1)
"""Samples of 3 or 4 mapped words, but the fourth has none."""
LOSSES = ("loss", "vlm_loss", "attention_loss", "matched_words")

READER = """
import json, sys, torch
from PIL import Image
from transformers import AutoProcessor, MllamaForConditionalGeneration

torch.set_num_threads(1)
texts = {}
for kind, folder in json.loads(sys.argv[1]).items():
    base = json.loads(sys.argv[2]).get(kind)
    model = MllamaForConditionalGeneration.from_pretrained(base or folder)
    if base:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, folder)
    processor = AutoProcessor.from_pretrained(folder)
    prompt = processor.apply_chat_template(json.loads(sys.argv[4]), add_generation_prompt=True)
    inputs = processor(images=Image.open(sys.argv[3]), text=prompt, add_special_tokens=False, return_tensors="pt")
    ids = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
    texts[kind] = processor.tokenizer.decode(ids[0])
assert not [name for name in sys.modules if name.split(".")[0] == "lavender"]
print(json.dumps(texts))
"""


@pytest.fixture
def run(make_student, processor, dataset, store_path, tmp_path):
    """Trains a fresh model and returns the trainer; `build_only` stops before the first step."""

    def run(
        align_weight: float | None = 10.0, *, build_only=False, resume=None, data=None, model=None, peft=None, **kw
    ):
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "seed": 3,
            "learning_rate": 1e-3,
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "max_length": None,
            "logging_steps": 1,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        trainer_class: Any = SFTTrainer
        config_class: Any = SFTConfig
        if align_weight is not None:
            # two samples: test_probe.py has more
            settings |= {"maps": str(store_path), "align_weight": align_weight, "probe_size": 2}
            trainer_class, config_class = LavenderTrainer, LavenderConfig
        torch.manual_seed(11)  # whoever draws random numbers first, begins here
        trainer = trainer_class(
            make_student() if model is None else model,
            args=config_class(**settings | kw),
            processing_class=processor,
            train_dataset=dataset if data is None else data,
            peft_config=peft,
        )
        if not build_only:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def lora() -> LoraConfig:
    return LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def of_kind(kind: str) -> dict[str, Any]:
    """The settings of a kind of run, with those of LoRA where the kind names it."""
    return {"peft": lora() if "lora" in kind else None, **(KINDS | DIRECT)[kind]}


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def own_weights(trainer) -> dict[str, torch.Tensor]:
    """The model's weights without those that alignment adds."""
    return {
        name: one for name, one in trainer.model.state_dict().items() if not set(name.split(".")) & set(TRAINED_PARTS)
    }


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weight_zero_is_plain_fine_tuning_step_for_step(run, make_student, kind):
    """To the bit, so with one model: its weights are put back in their places in memory."""
    model = make_student()
    start = {name: one.clone() for name, one in model.state_dict().items()}
    plain = run(None, model=model, peft=lora() if kind == "lora" else None, max_steps=3)
    expected = {name: one.clone() for name, one in plain.model.state_dict().items()}
    model = plain.model.unload() if kind == "lora" else model
    model.load_state_dict(start)
    zero = run(0.0, model=model, peft=lora() if kind == "lora" else None, max_steps=3)
    assert len(logged(plain, "loss")) == 3
    assert logged(zero, "loss") == logged(plain, "loss")
    assert logged(zero, "vlm_loss") == pytest.approx(logged(plain, "loss"), rel=1e-4)
    found = own_weights(zero)
    assert found.keys() == expected.keys()
    assert [name for name, one in expected.items() if not torch.equal(found[name], one)] == []


def test_the_seed_decides_the_aligner_too(run):
    """The fixture leaves the global generator in one state, so without the seed all three would be equal."""
    first = own_head(run(build_only=True, **PUBLISHED))
    second = own_head(run(build_only=True, **PUBLISHED))
    other = own_head(run(build_only=True, seed=43, **PUBLISHED))
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def own_head(trainer) -> dict[str, torch.Tensor]:
    return {name: one for name, one in trainer.model.state_dict().items() if "alignment_head" in name}


def test_alignment_changes_the_run(run):
    plain, aligned = run(0.0), run(10.0)
    assert logged(aligned, "vlm_loss")[0] == close(logged(plain, "vlm_loss")[0])
    assert logged(aligned, "vlm_loss")[1] != close(logged(plain, "vlm_loss")[1])
    assert logged(aligned, "attention_loss")[0] == close(logged(plain, "attention_loss")[0])
    assert logged(plain, "attention_loss")[0] > 0
    for total, language, attention in zip(*(logged(aligned, name) for name in LOSSES[:3]), strict=True):
        assert total == pytest.approx(language + 10 * attention, rel=1e-3)  # logged to four digits


@pytest.mark.parametrize("kind", [*KINDS, *DIRECT])
def test_accumulated_batches_are_one_batch(run, dataset, monkeypatch, kind):
    """8 × 1 and 1 × 8 make the same steps. Ragged: the captions have other lengths and numbers of mapped words."""
    forced: list[int] = []

    def counted(*given: Any) -> torch.Tensor | None:
        words = forced_words(*given)
        forced.append(0 if words is None else int(words.sum()))
        return words

    monkeypatch.setattr(mixin, "forced_words", counted)
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "train_sampling_strategy": "sequential"}
    runs = []
    for size in (8, 1):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        runs.append(run(data=dataset.select(UNEVEN), **sizes, **settings, **of_kind(kind)))
    whole, parts = runs
    assert logged(parts, "matched_words") == logged(whole, "matched_words")
    present = whole.data_collator([dataset[index] for index in UNEVEN])["alignment"]["present"]
    counts = set(present.sum(dim=1).tolist())
    assert 0 in counts
    assert len(counts) > 2
    for name in ("vlm_loss", "attention_loss", "attention_mass", "loss"):
        assert logged(parts, name) == close(logged(whole, name))
    expected, found = whole.model.state_dict(), parts.model.state_dict()
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-5, atol=1e-6, msg=name)
    # the same words are forced: some at the first step, fewer at the second
    assert len(forced) == 2 + 16
    assert forced[:2] == [sum(forced[2:10]), sum(forced[10:])]
    if "forced" in kind:
        assert 0 < forced[1] < forced[0] < int(present.sum())
    else:
        assert forced[:2] == [0, 0]


@pytest.mark.parametrize("kind", ["full", "lora", *DIRECT])
def test_a_direct_loss_adds_no_parameter(run, make_student, kind):
    """There is no Aligner: the trained parameters are those of plain fine-tuning."""
    trainer = run(build_only=True, **of_kind(kind))
    head = trainer.model.get_submodule(("base_model.model." if "lora" in kind else "") + HEAD_NAME)
    assert head.aligner is None
    assert not list(head.parameters())
    names = {name for name, _ in trainer.model.named_parameters()}
    assert not [name for name in names if is_alignment_part(name)]
    if "lora" not in kind:
        assert names == {name for name, _ in make_student().named_parameters()}
    trainer.train()
    assert len(logged(trainer, "attention_loss")) == 2
    assert all(0 < mass < 1 for mass in logged(trainer, "attention_mass"))


def test_a_batch_without_a_matched_word_costs_nothing_and_is_counted(run, dataset, captions):
    """The last scene has no maps in the store."""
    data = dataset.select([5, 0])
    trainer = run(data=data, per_device_train_batch_size=1)
    words, losses = logged(trainer, "matched_words"), logged(trainer, "attention_loss")
    nouns = len(content_words(captions[0], ("noun",)))
    assert sorted(words) == [0, nouns]
    assert losses[words.index(0)] == 0
    assert losses[words.index(nouns)] > 0
    index = words.index(0)
    assert logged(trainer, "loss")[index] == pytest.approx(logged(trainer, "vlm_loss")[index], rel=1e-4)
    coverage = trainer.coverage
    assert (coverage.samples, coverage.mapped_samples, coverage.words) == (2, 1, nouns)
    assert coverage.dropped == {"sample without maps in the store": 1}
    assert coverage.share == 0.5


def test_too_few_maps_stop_before_the_first_step(run, dataset):
    with pytest.raises(DataError) as caught:
        run(data=dataset.select([5, 5, 0]), min_coverage=0.5, build_only=True)
    assert str(caught.value).startswith(
        "Got maps for 1 of 3 samples ({'sample without maps in the store': 2}). Expected at least a share of 0.5."
    )
    run(data=dataset.select([5, 5, 0]), min_coverage=0.3, build_only=True)


def test_evaluation_is_counted_apart_from_training(run):
    trainer = run()
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_loss"] > 0
    last = trainer.state.log_history[-1]
    assert last["eval_attention_loss"] > 0
    assert last["eval_loss"] == pytest.approx(last["eval_vlm_loss"] + 10 * last["eval_attention_loss"], rel=1e-3)
    assert not {"attention_loss", "vlm_loss"} & last.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "Expected non-reentrant checkpointing; the reentrant kind loses the attention's gradient silently. "
            "Do this: set use_reentrant to False.",
        ),
        ({"align_weight": -1}, "Got align_weight=-1."),
        ({"pooling": "flow"}, "Got pooling='flow'."),
        ({"min_coverage": 2}, "Got min_coverage=2."),
    ],
)
def test_wrong_settings_are_refused(settings, message, tmp_path):
    given: dict[str, Any] = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, **settings}
    with pytest.raises(ConfigError) as caught:
        LavenderConfig(**given)
    assert message in str(caught.value)


def test_the_old_name_of_checkpointing_is_refused_too(tmp_path):
    with pytest.warns(FutureWarning, match="gradient_checkpointing"), pytest.raises(ConfigError, match="reentrant"):
        LavenderConfig(
            output_dir=str(tmp_path),
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_loss(run, kind):
    plain = run(**of_kind(kind))
    checkpointed = run(activation_checkpointing=True, **of_kind(kind))
    assert checkpointed.model.is_activation_checkpointing
    for name in LOSSES:
        assert logged(checkpointed, name) == close(logged(plain, name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"maps": None}, "Got no maps. Expected a map store."),
        ({"packing": True}, "Got packing or padding_free. Expected one sample per row."),
        ({"layers": [0]}, r"Got layers=\(0,\), of which \[0\] do not see the picture"),
    ],
)
def test_what_cannot_be_aligned_is_refused(run, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(build_only=True, **settings)


def test_a_model_that_is_aligned_already_is_refused(run, make_student):
    model = make_student()
    args = LavenderConfig(output_dir="unused", use_cpu=True, bf16=False).alignment()
    attach(model, args)
    with pytest.raises(ConfigError, match="Got a model with an alignment head"):
        run(build_only=True, model=model)


def test_a_peft_model_is_refused(run, make_student):
    with pytest.raises(ConfigError, match=r"pass the base model and peft_config=\.\.\."):
        run(build_only=True, model=PeftModel(make_student(), lora()))


def test_a_peft_method_that_passes_the_hooks_by_is_refused(run):
    with pytest.raises(ConfigError, match="peft_type: ADALORA, whose wrapper bypasses the hooks"):
        run(peft=AdaLoraConfig(target_modules=["q_proj"], total_step=9, task_type="CAUSAL_LM"))


def test_the_callers_peft_config_serves_the_plain_run_too(run):
    """Alignment adds its parts to a copy: else the control would train an Aligner."""
    shared = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    run(peft=shared, build_only=True, **PUBLISHED)
    assert (shared.target_modules, shared.modules_to_save) == ("all-linear", None)
    plain = run(0.0, peft=shared, build_only=True, **PUBLISHED)
    trained = [name for name, weights in plain.model.named_parameters() if weights.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_a_trainer_that_fails_leaves_the_settings_as_they_were(base, dataset, processor, store_path, tmp_path):
    args = LavenderConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"attn_implementation": "eager"},
        report_to="none",
    )
    given: Any = {"train_dataset": dataset, "processing_class": processor}
    with pytest.raises(ConfigError, match="no maps"):
        LavenderTrainer(str(base), args, **given)
    assert args.model_init_kwargs == {"attn_implementation": "eager"}
    args.maps = str(store_path)
    model: Any = LavenderTrainer(str(base), args, **given).model
    assert model.config.get_text_config()._attn_implementation.endswith("eager")


def test_deepspeed_does_not_round_what_alignment_reads(run, dataset, monkeypatch):
    """transformers moves every tensor of a batch to the type of DeepSpeed's config."""
    trainer = run(build_only=True)
    batch = trainer.data_collator([dataset[0], dataset[1]])
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(trainer.accelerator.state, "deepspeed_plugins", {"default": plugin}, raising=False)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    prepared = trainer._prepare_inputs(batch)
    assert prepared["pixel_values"].dtype == torch.bfloat16
    for name, one in batch["alignment"].items():
        if isinstance(one, torch.Tensor):
            assert prepared["alignment"][name].dtype == one.dtype, name
            assert torch.equal(prepared["alignment"][name], one), name


def test_the_batch_of_plain_fine_tuning_is_inside(run, dataset, store_path):
    """The collator adds `alignment` and changes nothing else; its targets are the store's maps."""
    plain, aligned = run(None, build_only=True), run(build_only=True)
    examples = [aligned.train_dataset[index] for index in (1, 0)]
    batch = aligned.data_collator([dict(one) for one in examples])
    expected = plain.data_collator([dict(one) for one in examples])
    alignment = batch.pop("alignment")
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], one) for name, one in expected.items())
    records = list(MapStore.open(store_path))
    for sample, record in enumerate((records[1], records[0])):
        assert alignment["present"][sample].sum() == len(record.words)
        assert torch.equal(alignment["targets"][sample, : len(record.words)], record.maps)
        assert alignment["targets"][sample, len(record.words) :].abs().sum() == 0
        assert alignment["shares"][sample].sum(1)[: len(record.words)].tolist() == pytest.approx(
            [1] * len(record.words)
        )
        for index, word in enumerate(record.words):
            rows = alignment["rows"][sample][alignment["shares"][sample, index] > 0]
            assert aligned.processing_class.tokenizer.decode(batch["input_ids"][sample, rows + 1]).strip() == word.text


@pytest.fixture
def base(make_student, processor, tmp_path) -> Path:
    """The untuned checkpoint on disk."""
    make_student().save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(run, base: Path, kind: str) -> Any:
    return run(model=MllamaForConditionalGeneration.from_pretrained(base), learning_rate=1e-2, **of_kind(kind))


def generated(model, processor, image) -> str:
    prompt = processor.apply_chat_template(conversation("what is it?"), add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt")
    ids = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.tokenizer.decode(ids[0])


def plain_export(base: Path, tmp_path: Path) -> Path:
    """What transformers alone writes for the untuned model after loading it."""
    model = MllamaForConditionalGeneration.from_pretrained(base)
    model.config.use_cache = False  # as every trainer with checkpointing in mind leaves it
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_no_trace_of_alignment(run, base, tmp_path, kind):
    trainer = trained(run, base, kind)
    state = {name: one.clone() for name, one in trainer.model.state_dict().items()}
    folder = export(trainer, tmp_path / kind, merge=False)
    weights = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    names = [name for one in weights for name in one]
    plain = load_file(base / "model.safetensors")
    if "lora" in kind:
        assert len(names) == 2 * 2 * (4 + 3 + 1)  # A and B, of q and v, in the layers of text and vision
        assert all("lora_" in name for name in names)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["modules_to_save"] is None
        assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    else:
        assert sorted(names) == sorted(plain)
        assert any(not torch.equal(weights[0][name], one) for name, one in plain.items())
        plain_folder = plain_export(base, tmp_path)
        assert (folder / "config.json").read_text() == (plain_folder / "config.json").read_text()
    written = "".join(file.read_text() for file in folder.glob("*.json"))
    assert "lavender" not in written
    assert "alignment" not in written
    assert (folder / "chat_template.jinja").read_text() == (base / "chat_template.jinja").read_text()
    for name, one in trainer.model.state_dict().items():  # the model in training is not touched
        assert torch.equal(one, state[name]), name


@pytest.mark.slow
def test_exports_load_without_lavender_and_write_the_same(run, base, some_scenes, processor, tmp_path):
    some_scenes[0].image.save(tmp_path / "picture.png")
    folders, expected = {}, {}
    for kind in KINDS:
        trainer = trained(run, base, kind)
        folders[kind] = str(export(trainer, tmp_path / kind, merge=False))
        expected[kind] = generated(trainer.model, processor, some_scenes[0].image)
    expected["base"] = generated(MllamaForConditionalGeneration.from_pretrained(base), processor, some_scenes[0].image)
    folders["base"] = str(base)
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            READER,
            json.dumps(folders),
            json.dumps({kind: str(base) for kind in KINDS if "lora" in kind}),
            str(tmp_path / "picture.png"),
            json.dumps(conversation("what is it?")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == expected
    assert len(set(expected.values())) > 1


def test_an_export_loads_here_and_writes_the_same(run, base, some_scenes, tmp_path):
    trainer = trained(run, base, "full")
    folder = export(trainer, tmp_path / "full")
    loaded = MllamaForConditionalGeneration.from_pretrained(folder)
    image, processor = some_scenes[0].image, AutoProcessor.from_pretrained(folder)
    assert loaded.config.get_text_config()._attn_implementation == "sdpa"
    assert generated(loaded, processor, image) == generated(trainer.model, trainer.processing_class, image)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_no_interruption(run, tmp_path, kind):
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = run(output_dir=str(tmp_path / "whole"), **settings, **of_kind(kind))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run(output_dir=str(tmp_path / "resumed"), resume=checkpoint, **settings, **of_kind(kind))
    for name in LOSSES:
        assert logged(resumed, name) == close(logged(whole, name))
    assert moved(whole.model.state_dict(), resumed.model.state_dict()) == []


@pytest.mark.parametrize(
    ("before", "after", "message"), [(PUBLISHED, {}, "with an Aligner"), ({}, PUBLISHED, "without an Aligner")]
)
def test_a_checkpoint_of_another_loss_does_not_resume(run, tmp_path, before, after, message):
    settings: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "probe_size": 0}
    run(output_dir=str(tmp_path / "before"), **settings, **before)
    with pytest.raises(ConfigError, match=message):
        run(output_dir=str(tmp_path / "after"), resume=str(tmp_path / "before" / "checkpoint-1"), **settings, **after)
