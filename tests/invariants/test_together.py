"""What works together with alignment and what is refused, as the table of docs/training.md says: a real run each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from closeness import close
from invariants.test_plain_trainer import run_plain  # noqa: F401
from invariants.test_trainer import KINDS, logged, of_kind, run  # noqa: F401
from lavender.data.samples import Sample, to_dataset
from lavender.errors import ConfigError
from lavender.training.trainer import LavenderConfig, LavenderTrainer
from lavender.world.student_models import STUDENTS, conversation

WORKING: dict[str, dict[str, Any]] = {
    "nll": {"loss_type": "nll"},
    "dft": {"loss_type": "dft"},
    "dft, exact": {"loss_type": "dft", "match": "exact"},
    "dft, root": {"loss_type": "dft", "match": "root"},
    "neftune": {"neftune_noise_alpha": 5.0},
    "own tokens alone": {"average_tokens_across_devices": False},
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "drop_last": {"dataloader_drop_last": True, "per_device_train_batch_size": 4},
    "whole conversations": {"assistant_only_loss": False},
    "answers alone": {"assistant_only_loss": True},
    "checkpointing": {"activation_checkpointing": True},
    "empty cache": {"torch_empty_cache_steps": 1},
    "no clipping": {"max_grad_norm": 0.0},
    "count tokens": {"include_num_input_tokens_seen": "all"},
}


@pytest.mark.parametrize("name", WORKING)
def test_it_works(run, name):  # noqa: F811
    trainer = run(**WORKING[name])
    losses = [logged(trainer, one) for one in ("loss", "vlm_loss", "attention_loss")]
    assert [len(one) for one in losses] == [2, 2, 2]
    for total, language, attention in zip(*losses, strict=True):
        assert attention > 0 or "match" in WORKING[name]
        assert total == pytest.approx(language + 10 * attention, rel=1e-4)


def test_a_smaller_batch_is_found(run):  # noqa: F811
    """Three samples do not fit, once even after the forward pass: what was logged and counted by then is forgotten."""
    expected = run(per_device_train_batch_size=1, max_steps=3, train_sampling_strategy="sequential")
    trainer = run(
        per_device_train_batch_size=3,
        max_steps=3,
        train_sampling_strategy="sequential",
        auto_find_batch_size=True,
        build_only=True,
    )
    step = trainer.training_step

    def too_large(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("CUDA out of memory.")
        return loss

    trainer.training_step = too_large
    trainer.train()
    assert trainer._train_batch_size == 1
    for name in ("loss", "matched_words", "student_entropy"):
        assert len(logged(trainer, name)) == 3
    assert logged(trainer, "matched_words") == logged(expected, "matched_words")
    assert trainer.coverage == expected.coverage


def test_grouping_by_length(run, dataset):  # noqa: F811
    """Needs lengths: a column of the data set, since pictures and words become tokens only in the collator."""
    lengths = [len(one["messages"][1]["content"][0]["text"]) for one in dataset]
    trainer = run(data=dataset.add_column("length", lengths), train_sampling_strategy="group_by_length")
    assert len(logged(trainer, "attention_loss")) == 2
    with pytest.raises(ValueError, match="length"):
        run(train_sampling_strategy="group_by_length")


@pytest.mark.parametrize("match", ["label", "exact"])
@pytest.mark.parametrize("kind", ["trl", "plain"])
def test_label_smoothing(run_plain, kind, match):  # noqa: F811
    """TRL then runs the model twice; only the first run is aligned."""
    settings: dict[str, Any] = {"label_smoothing_factor": 0.1, "match": match}
    if kind == "plain":
        trainer = run_plain(**settings)
    else:
        settings |= {"bf16": False, "gradient_checkpointing": False, "max_length": None}
        with pytest.warns(FutureWarning, match="label_smoothing_factor"):
            trainer = run_plain(classes=(LavenderTrainer, LavenderConfig), **settings)
    assert len(logged(trainer, "attention_loss")) == 2


def test_a_loss_function_of_the_users(make_student, processor, dataset, store_path, tmp_path):
    """Accumulated batches are one batch there too: the trainer does not divide such a loss."""

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten()
        targets = targets.masked_fill(targets >= logits.shape[-1], -100)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    runs = []
    kinds: list[dict[str, Any]] = [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ]
    for sizes in kinds:
        args = LavenderConfig(
            output_dir=str(tmp_path),
            maps=str(store_path),
            max_steps=2,
            seed=3,
            report_to="none",
            bf16=False,
            use_cpu=True,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            optim="sgd",
            learning_rate=0.05,
            **sizes,
        )
        torch.manual_seed(11)
        with pytest.warns(FutureWarning, match="compute_loss_func"):
            trainer = LavenderTrainer(
                make_student(), args, processing_class=processor, train_dataset=dataset, compute_loss_func=loss
            )
        trainer.train()
        runs.append(trainer)
    for name in ("loss", "vlm_loss", "attention_loss", "matched_words"):
        assert logged(runs[1], name) == close(logged(runs[0], name))


def test_predictions_of_trl(run, dataset):  # noqa: F811
    """`compute_metrics` and `predict` get TRL's logits."""
    seen: list[Any] = []
    trainer = run(build_only=True, per_device_eval_batch_size=1)
    trainer.compute_metrics = lambda one: seen.append(one) or {"count": len(one.label_ids)}
    with pytest.warns(FutureWarning, match="return_outputs"):
        metrics = trainer.evaluate(dataset.select([0, 1]))
    assert metrics["eval_count"] == 2
    assert metrics["eval_attention_loss"] > 0
    assert seen[0].predictions.shape[:2] == seen[0].label_ids.shape


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "packing": ({"packing": True}, "packing or padding_free"),
    "padding_free": ({"padding_free": True}, "packing or padding_free"),
    "dispatch_batches": ({"accelerator_config": {"dispatch_batches": True}}, "leave dispatch_batches out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(run, name):  # noqa: F811
    settings, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        run(build_only=True, **settings)


def test_completions_are_no_conversations(run):  # noqa: F811
    """TRL's data of prompts and completions has no `messages`; for answers alone there is `assistant_only_loss`."""
    with pytest.raises(ValueError, match="`completion_only_loss` argument is not supported"):
        run(completion_only_loss=True)


@pytest.mark.parametrize("match", ["label", "exact"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("student", ["mllama", "llava"])
def test_batches_of_text_alone(student, kind, match, some_scenes, captions, store_path, tmp_path):
    """In training and in evaluation, beside mapped and unmapped samples and one with two pictures."""
    family = STUDENTS[student]
    processor = family.build_processor([*captions, "describe the picture."], vocabulary=300)
    text = Sample(
        "text", (), [{**turn, "content": turn["content"][-1:]} for turn in conversation("say it.", captions[0])]
    )
    scenes = [
        Sample(str(index), (scene.image,), conversation("describe the picture.", caption))
        for index, (scene, caption) in enumerate(zip(some_scenes, captions, strict=True))
    ]
    two = conversation("describe the picture.", captions[1])
    two[0]["content"].insert(0, {"type": "image"})
    both = Sample("two", (some_scenes[0].image, some_scenes[1].image), two)
    samples = [text, text, scenes[0], text, scenes[5], both]
    args = LavenderConfig(
        output_dir=str(tmp_path),
        maps=str(store_path),
        max_steps=3,
        seed=3,
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        match=match,
        **KINDS[kind],
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer = LavenderTrainer(
        family.build_model(processor),
        args,
        processing_class=processor,
        train_dataset=to_dataset(samples),
        eval_dataset=to_dataset([text, text, *samples]),
        peft_config=of_kind(kind)["peft"],
    )
    trainer.train()
    assert logged(trainer, "attention_loss")[0] == logged(trainer, "matched_words")[0] == 0
    assert all(value > 0 for value in logged(trainer, "vlm_loss"))
    assert (trainer.coverage.samples, trainer.coverage.mapped_samples) == (6, 2)
    (evaluated,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if match == "label":
        assert logged(trainer, "attention_loss")[1] > 0
        assert evaluated["eval_attention_loss"] > 0
        assert evaluated["eval_matched_words"] == trainer.coverage.words
    alone = trainer.evaluate(to_dataset([text, text]))
    assert math.isnan(alone["eval_attention_loss"])  # there is no word to take a mean of
    assert alone["eval_matched_words"] == 0
    assert alone["eval_loss"] == alone["eval_vlm_loss"]
    assert "eval_student_entropy" not in alone
