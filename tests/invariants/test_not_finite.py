"""A loss that is NaN or infinite stops training with the name of what made it so: sample, word or weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from invariants.test_plain_trainer import run_plain  # noqa: F401
from invariants.test_trainer import logged, lora, run  # noqa: F401
from lavender.data.images import image_id
from lavender.errors import NotFiniteError
from lavender.training.not_finite import answers_finite


class Planting:
    """A collator around another, that spoils the pixels of some samples of its n-th batch."""

    def __init__(self, base: Any, samples: tuple[int, ...], value: float = float("nan"), at: int = 2):
        self.base, self.samples, self.value, self.left = base, samples, value, at

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch = self.base(examples)
        self.left -= 1
        if self.left == 0:
            for sample in self.samples:
                batch["pixel_values"][sample, 0, 0, 0, 0, 0] = self.value
        return batch


def spoiled(trainer: Any, *samples: int, **how: Any) -> NotFiniteError:
    trainer.data_collator = Planting(trainer.data_collator, samples, **how)
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    return caught.value


ORDERED: dict[str, Any] = {"train_sampling_strategy": "sequential", "max_steps": 3, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["full", "lora", "plain trainer"])
def test_a_sample_is_named(run, run_plain, some_scenes, captions, kind, value):  # noqa: F811
    """The second of the second batch: scene 3. Its words too, and nobody else's."""
    make = run_plain if kind == "plain trainer" else run
    trainer = make(build_only=True, peft=lora() if kind == "lora" else None, **ORDERED)
    error = spoiled(trainer, 1, value=value)
    scene = some_scenes[3]
    assert trainer.state.global_step == 1
    words = [word for word in captions[3].replace(".", " ").replace(",", " ").split() if f"'{word}'" in error.got]
    assert words
    assert error.got.startswith("a loss that is not finite, in step 2: L_VLM and L_att of '")
    assert " of sample 1 ('" in error.got
    assert "sample 0" not in error.got
    assert " ".join(captions[3].split()[:3]) in error.got
    size = f"{scene.image.height} × {scene.image.width}"
    assert f"picture {image_id(scene.image)[:12]} of {size} pixels)" in error.got
    assert error.expected == "finite L_VLM and L_att"
    assert error.do.startswith("repair or remove what is named")


def test_it_is_not_hidden_by_the_filter_of_logs(run):  # noqa: F811
    """With accumulation the bad micro-batch is the one that is named; transformers would have logged a mean instead."""
    settings = ORDERED | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2}
    for filtered in (True, False):
        trainer = run(build_only=True, logging_nan_inf_filter=filtered, **settings)
        error = spoiled(trainer, 0, at=4)
        assert "in step 2: L_VLM" in error.got
        assert logged(trainer, "loss")[0] > 0


def test_every_sample_is_the_models_fault(run):  # noqa: F811
    error = spoiled(run(build_only=True, **ORDERED), 0, 1)
    assert "That is every sample of the batch" in error.got
    assert "sample 0" in error.got
    assert "sample 1" in error.got
    assert error.do.startswith("lower the learning rate, or train in bfloat16")


def test_weights_are_named(run, make_student):  # noqa: F811
    model = make_student()
    trainer = run(build_only=True, model=model, probe_size=0, **ORDERED)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[1, 2] = float("inf")
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    assert "in step 1: " in caught.value.got
    assert "The weights are not finite either, such as model.language_model.layers.0.mlp.up_proj.weight" in str(
        caught.value
    )
    assert "the weights diverged in an earlier step" in caught.value.do


def test_the_aligners_weights_are_named(run):  # noqa: F811
    """Then L_att alone is not finite."""
    trainer = run(build_only=True, probe_size=0, attention_loss="published", **ORDERED)
    with torch.no_grad():
        next(trainer.model.get_submodule("alignment_head").parameters()).fill_(float("nan"))
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    assert "L_VLM of" not in caught.value.got
    assert "L_VLM and" not in caught.value.got
    assert "L_att of " in caught.value.got
    assert "such as alignment_head." in caught.value.got


def test_a_run_that_diverges_stops(run):  # noqa: F811
    """A learning rate far too high: the error comes in an early step, and says where to turn."""
    trainer = run(build_only=True, max_steps=30, learning_rate=1e25, optim="sgd", max_grad_norm=0.0)
    with pytest.raises(NotFiniteError, match=r"Do this: lower the learning rate"):
        trainer.train()
    assert trainer.state.global_step < 10


def test_half_precision_that_overflows(run, make_student):  # noqa: F811
    """float16 holds no number above 65504. The weights themselves are finite."""
    model = make_student()
    with torch.no_grad():
        model.lm_head.weight.mul_(3e4 / model.lm_head.weight.abs().max())
    trainer = run(build_only=True, model=model, probe_size=0, **ORDERED)
    trainer.model.half()  # later, for a trainer refuses weights that would train in float16
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    assert "weights are not finite" not in caught.value.got
    assert "That is every sample of the batch" in caught.value.got
    assert "train in bfloat16 or float32" in caught.value.do


def test_without_alignment_too(run):  # noqa: F811
    error = spoiled(run(0.0, build_only=True, **ORDERED), 1)
    assert "sample 1" in error.got


def test_which_samples_are_finite():
    """Of a row only its sum is looked at; rows without a label do not count."""
    labels = torch.tensor([[-100, 1, 2], [-100, 1, -100], [-100, 1, 2]])
    logits = torch.zeros(3, 3, 5)
    logits[0, 1, 4] = float("inf")  # predicts the label 2
    logits[1, 1, 4] = float("nan")  # predicts no label
    logits[2, 2] = float("nan")  # the last row predicts nothing
    found = answers_finite({"logits": logits}, labels)
    assert found is not None
    assert found.tolist() == [False, True, True]
    log_probs = torch.tensor([[0.0, float("-inf")], [0.0, 0.0], [-3.0, -1.0]])
    found = answers_finite({"log_probs": log_probs, "logits": None}, labels)
    assert found is not None
    assert found.tolist() == [False, True, True]
    assert answers_finite({"logits": None}, labels) is None
    huge = torch.full((1, 3, 5), 6e4, dtype=torch.float16)
    found = answers_finite({"logits": huge}, labels[:1])
    assert found is not None
    assert found.tolist() == [True]
    row = torch.zeros(1, 6, 5)
    row[0, [1, 4]] = float("nan")  # predict the first token of the second sample, and the last of the third
    found = answers_finite({"logits": row}, torch.tensor([[-100, 1, -100, -100, 1, 2]]), torch.tensor([0, 2, 3, 6]))
    assert found is not None
    assert found.tolist() == [True, True, False]
