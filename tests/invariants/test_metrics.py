"""What is logged: the same whatever the accumulation, the batch size of evaluation and the number of workers."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from closeness import close
from invariants.test_trainer import logged, lora, run  # noqa: F401
from lavender.alignment.coverage import NO_MAPS, Coverage
from lavender.alignment.objective import AlignmentRequest
from lavender.data.store import MapStore
from lavender.maps import WordMaps
from lavender.training.metrics import Metrics, num_real_samples
from lavender.words import content_words

NUMBERS = ("vlm_loss", "attention_loss", "matched_words", "student_entropy", "attention_mass")


class Processes:
    """Stands for accelerate with processes that all have the same."""

    def __init__(self, num_processes: int):
        self.num_processes = num_processes

    def gather(self, one: torch.Tensor) -> torch.Tensor:
        return one.repeat(self.num_processes, 1)


def request_of(*maps: torch.Tensor, matched: int | None = None) -> AlignmentRequest:
    """One sample, whose student looks where the maps say; the n-th word's share on its map is n tenths."""
    count = len(maps)
    present = torch.ones(1, count, dtype=torch.bool)
    request = AlignmentRequest(
        (0,),
        {
            "rows": torch.zeros(1, 1, dtype=torch.long),
            "shares": torch.ones(1, count, 1),
            "present": present,
            "weights": present.float(),
            "boxes": torch.zeros(1, 1, 4),
            "word_pictures": torch.zeros(1, count, dtype=torch.long),
            "pictures": torch.zeros(1, 1, dtype=torch.long),
            "targets": torch.zeros(1, count, 2, 2),
        },
    )
    request.student_maps = torch.stack(maps)
    request.map_shares = torch.arange(1, count + 1) / 10
    request.matched = present & (torch.arange(count) < (count if matched is None else matched))
    return request


def with_losses(request: AlignmentRequest, *losses: float) -> AlignmentRequest:
    request.losses = torch.tensor(losses)
    return request


UNIFORM, TWO, ONE = torch.ones(2, 2), torch.tensor([[3.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 7.0], [0.0, 0.0]])


@pytest.mark.parametrize("num_processes", [1, 3])
def test_golden_values_of_training(num_processes):
    """Two steps of two micro-batches; entropies are ln 4, ln 2 and 0. The mean over words counts the unmatched too."""
    metrics, accelerator = Metrics(), Processes(num_processes)
    for vlm, attention, request in (
        (1.0, 0.5, request_of(UNIFORM, TWO)),
        (2.0, 0.25, request_of(ONE)),
        (3.0, 0.0, request_of(UNIFORM, matched=0)),
        (4.0, 0.125, request_of(TWO)),
    ):
        metrics.add_step(torch.tensor(vlm), torch.tensor(attention), request, 0.5)
    found = metrics.take_steps(accelerator)  # ty: ignore[invalid-argument-type]
    assert found == pytest.approx(
        {
            "vlm_loss": 5.0,
            "attention_loss": 0.4375,
            "matched_words": 2 * num_processes,
            "student_entropy": (2 * torch.tensor(4.0).log() + 2 * torch.tensor(2.0).log()).item() / 5,
            "attention_mass": (0.1 + 0.2 + 0.1 + 0.1 + 0.1) / 5,
        }
    )
    assert metrics.take_steps(accelerator) == {}  # ty: ignore[invalid-argument-type]


def test_golden_values_of_evaluation():
    """Batches of 2, 1 and 1 samples, which match 2 words of 3, 1 of 1 and 0 of 1; the losses sum to 1, 0.2 and 0."""
    metrics, accelerator = Metrics(), Processes(2)
    first = request_of(UNIFORM, TWO, ONE, matched=2)
    for name in ("present", "matched", "weights"):  # the second sample has no word
        own = getattr(first, name)
        setattr(first, name, torch.cat([own, torch.zeros_like(own)]))
    first.losses = torch.tensor([0.25, 0.75, 9.0])  # the last one does not match
    metrics.add_batch(torch.tensor(1.0), first, 2)
    metrics.add_batch(torch.tensor(4.0), with_losses(request_of(TWO), 0.2), 1)
    metrics.add_batch(torch.tensor(6.0), with_losses(request_of(ONE, matched=0), 9.0), 1)
    found = metrics.take_batches(accelerator)  # ty: ignore[invalid-argument-type]
    entropy = (torch.tensor(4.0).log() + 2 * torch.tensor(2.0).log()).item() / 5
    expected = {"vlm_loss": 3.0, "attention_loss": 0.4, "matched_words": 6, "matched_share": 0.6}
    attention_mass = (0.1 + 0.2 + 0.3 + 0.1 + 0.1) / 5
    assert found == pytest.approx(expected | {"student_entropy": entropy, "attention_mass": attention_mass})
    metrics.add_batch(torch.tensor(6.0), with_losses(request_of(ONE, matched=0), 9.0), 1)
    none = metrics.take_batches(accelerator)  # ty: ignore[invalid-argument-type]
    assert math.isnan(none["attention_loss"])
    assert none["matched_share"] == none["matched_words"] == 0


def test_words_weigh_what_they_weigh_in_an_evaluation():
    metrics = Metrics()
    request = request_of(UNIFORM, TWO, ONE, matched=2)
    request.weights = torch.tensor([[0.25, 0.5, 0.125]])
    metrics.add_batch(torch.tensor(1.0), with_losses(request, 0.2, 0.5, 9.0), 1)
    found = metrics.take_batches(Processes(1))  # ty: ignore[invalid-argument-type]
    assert found["attention_loss"] == pytest.approx(0.4)


def test_samples_that_fill_up_the_last_batch_do_not_count():
    """Two samples with two words and one; the second sample is there a second time."""
    metrics = Metrics()
    request = with_losses(request_of(UNIFORM, TWO, ONE), 0.5, 1.0, 9.0)
    request.present = request.matched = torch.tensor([[True, True], [False, True]])
    request.weights = request.present.float()
    metrics.add_batch(torch.tensor(3.0), request, 1)
    metrics.add_batch(torch.tensor(6.0), request, 0)
    found = metrics.take_batches(Processes(1))  # ty: ignore[invalid-argument-type]
    entropy = (torch.tensor(4.0).log() + torch.tensor(2.0).log()).item() / 2
    expected = {"vlm_loss": 3.0, "attention_loss": 0.75, "matched_words": 2, "matched_share": 1}
    assert found == pytest.approx(expected | {"student_entropy": entropy, "attention_mass": 0.15})


@pytest.mark.parametrize(
    ("end", "remainder", "process", "expected"),
    [(False, 3, 1, 4), (True, -1, 1, 4), (True, 0, 1, 4), (True, 6, 0, 4), (True, 6, 1, 2), (True, 6, 2, 0)],
)
def test_how_many_samples_are_real(end, remainder, process, expected):
    """Six samples in the last round of three processes with batches of four: 4, 2 and 0."""
    state = SimpleNamespace(end_of_dataloader=end, remainder=remainder)
    accelerator: Any = SimpleNamespace(gradient_state=state, process_index=process)
    assert num_real_samples(accelerator, 4) == expected


def test_entropy_and_mass_are_not_logged_without_a_word():
    metrics = Metrics()
    request = request_of(UNIFORM, matched=0)
    request.student_maps, request.map_shares = request.student_maps[:0], request.map_shares[:0]
    metrics.add_step(torch.tensor(2.0), torch.tensor(0.0), request, 1.0)
    assert metrics.take_steps(Processes(1)) == {  # ty: ignore[invalid-argument-type]
        "vlm_loss": 2.0,
        "attention_loss": 0.0,
        "matched_words": 0.0,
    }


def test_accumulated_batches_log_one_batchs_numbers(run):  # noqa: F811
    """Every second step is logged."""
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4, "logging_steps": 2}
    settings["align_warmup"] = 0.9
    whole = run(per_device_train_batch_size=4, **settings)
    parts = run(per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    for name in NUMBERS:
        assert logged(parts, name) == close(logged(whole, name))
        assert len(logged(whole, name)) == 2
    assert logged(parts, "align_weight") == logged(whole, "align_weight") == pytest.approx([10 * 2 / 3.6, 10])


def test_where_the_trainer_divides_the_loss_the_numbers_are_right(run, make_student):  # noqa: F811
    """A model that takes no number of items: its loss is each micro-batch's mean, and the trainer divides by them."""
    settings: dict[str, Any] = {"learning_rate": 0.0, "max_steps": 3}
    runs = []
    for sizes in (
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ):
        model = make_student()
        model.accepts_loss_kwargs = False
        runs.append(run(model=model, **sizes, **settings))
        parts = [logged(runs[-1], name) for name in ("loss", "vlm_loss", "attention_loss")]
        for total, language, attention in zip(*parts, strict=True):
            assert total == pytest.approx(language + 10 * attention, rel=1e-5)
    for name in ("attention_loss", "matched_words", "student_entropy", "attention_mass"):
        assert logged(runs[1], name) == close(logged(runs[0], name))


def test_a_constant_weight_is_not_logged(run):  # noqa: F811
    assert logged(run(), "align_weight") == []


def test_entropy_and_mass_are_those_of_the_students_own_maps(run, processor, store_path, some_scenes, captions):  # noqa: F811
    """Through `student_maps`, another way to the same attention. The mass is the share on the map of the store."""
    from lavender.maps import entropy
    from lavender.students.word_maps import AnsweredPicture, student_maps

    trainer = run(max_steps=1, per_device_train_batch_size=6, learning_rate=0.0)
    readings = [
        AnsweredPicture(scene.image, "describe the picture.", caption, content_words(caption, ("noun",)))
        for scene, caption in list(zip(some_scenes, captions, strict=True))[:-1]
    ]
    maps: list[WordMaps] = student_maps(trainer.model, processor, readings, (11, 13))
    expected = entropy(torch.cat([one.maps for one in maps])).mean().item()
    assert logged(trainer, "student_entropy") == [pytest.approx(expected, rel=1e-4)]
    shares = []
    for own, stored in zip(maps, MapStore.open(store_path), strict=True):
        assert own.words == stored.words
        for attention, heat in zip(own.maps.double(), stored.maps.double(), strict=True):
            heat = (heat - heat.min()) / (heat.max() - heat.min())
            shares.append(float((attention * heat).sum() / attention.sum()))
    assert len(shares) == 19
    assert logged(trainer, "attention_mass") == [pytest.approx(sum(shares) / len(shares), rel=1e-4)]


@pytest.mark.parametrize("peft", [False, True])
def test_evaluation_does_not_depend_on_its_batches(run, dataset, peft):  # noqa: F811
    """Of several sets too, each under its own name; the numbers of training are not among them."""
    metrics = []
    for size in (1, 3, 6):
        trainer = run(peft=lora() if peft else None, per_device_eval_batch_size=size)
        found = trainer.evaluate({"all": dataset, "last": dataset.select([4, 5])})
        metrics.append(found)
        for name in NUMBERS:
            assert f"eval_all_{name}" in found
            assert f"eval_last_{name}" in found
            assert f"eval_{name}" not in found
        history = [entry for entry in trainer.state.log_history if "eval_all_loss" in entry]
        assert len(history) == 1
        assert not {"vlm_loss", "attention_loss"} & history[0].keys()
    for found in metrics[1:]:
        for name in ("attention_loss", "matched_words", "student_entropy", "attention_mass"):
            for part in ("all", "last"):
                assert found[f"eval_{part}_{name}"] == close(metrics[0][f"eval_{part}_{name}"])
    alone = metrics[-1]
    assert alone["eval_all_loss"] == pytest.approx(
        alone["eval_all_vlm_loss"] + 10 * alone["eval_all_attention_loss"], rel=1e-5
    )
    assert alone["eval_all_matched_words"] > alone["eval_last_matched_words"] > 0


def test_a_prediction_leaves_no_number_behind(run, dataset):  # noqa: F811
    trainer = run()
    expected = trainer.evaluate(dataset)
    trainer.args.prediction_loss_only = True
    trainer.predict(dataset.select([0]))
    assert trainer.evaluate(dataset)["eval_attention_loss"] == expected["eval_attention_loss"]


@pytest.mark.parametrize("workers", [0, 2])
def test_coverage_counts_what_was_trained_on(run, dataset, captions, store_path, workers):  # noqa: F811
    """Not what was only read: the loader is a batch ahead, and with workers several."""
    data = dataset.select([0, 5, 1, 2])
    trainer = run(
        data=data,
        max_steps=2,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        dataloader_num_workers=workers,
    )
    nouns = len(content_words(captions[0], ("noun",)))
    assert trainer.coverage == Coverage(2, 1, nouns, trainer.coverage.dropped)
    assert trainer.coverage.dropped == {NO_MAPS: 1}
    assert len(list(MapStore.open(store_path))) == 5
    trainer.evaluate(dataset)
    assert trainer.coverage.samples == 2


def test_everything_logged_is_plain_json(run):  # noqa: F811
    for entry in run(align_warmup=0.5).state.log_history:
        assert json.loads(json.dumps(entry)) == entry
