"""The probe: what its numbers mean, that training does not notice it, and what TensorBoard shows."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from closeness import close, moved
from invariants.test_trainer import KINDS, LEARN, LOSSES, logged, of_kind, run  # noqa: F401
from lavender.alignment.objective import HEAD_NAME
from lavender.errors import ConfigError
from lavender.maps import to_heat
from lavender.training.probe import map_agreement, peak_hits, random_state_kept

PROBE = ("probe_map_agreement", "probe_peak_hits", "probe_attention_loss", "probe_attention_mass")


def test_golden_agreement():
    """A map and itself, its negative, and an orthogonal one; a flat map does not count."""
    one = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    flat = torch.ones(2, 2)
    assert map_agreement(torch.stack([one, flat]), torch.stack([3 * one + 2, one])) == pytest.approx(1)
    assert map_agreement(one[None], -one[None]) == pytest.approx(-1)
    # by hand: deviations (3, −1, −1, −1)/4 and (1, 1, −1, −1)/2: 1/2 over √(3/4)·√1
    assert map_agreement(torch.stack([one, one]), torch.stack([other, one])) == pytest.approx((1 / 3**0.5 + 1) / 2)
    assert map_agreement(flat[None], one[None]) is None


def test_golden_hits():
    """Of 5 × 4 cells the two highest are a tenth."""
    teacher = torch.arange(20.0).view(1, 5, 4)
    student = torch.zeros(3, 5, 4)
    student[0, 4, 3], student[1, 4, 2], student[2, 4, 1] = 1, 1, 1
    assert peak_hits(student, teacher.expand(3, 5, 4)) == pytest.approx(2 / 3)
    assert peak_hits(student, torch.ones(3, 5, 4)) == 0


def test_random_state_is_kept():
    def draw() -> tuple:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with random_state_kept(torch.device("cpu")):
        draw()
    assert draw() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_notice_it(run, kind):  # noqa: F811
    """Dropout, LoRA's too, draws random numbers between two looks; a probe that drew one would show."""
    runs = []
    for size in (0, 4):
        settings = of_kind(kind)
        if settings["peft"]:
            settings["peft"].lora_dropout = 0.3
        runs.append(run(max_steps=4, probe_size=size, probe_steps=1, neftune_noise_alpha=2.0, **settings))
    without, looked = runs
    assert not any(logged(without, name) for name in PROBE)
    assert [len(logged(looked, name)) for name in PROBE] == [5] * len(PROBE)
    plain = [entry for entry in looked.state.log_history if PROBE[0] not in entry]
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    for one, other in zip(plain, without.state.log_history, strict=True):
        assert one.keys() == other.keys()
        assert {key: value for key, value in one.items() if key not in timed} == close(
            {key: value for key, value in other.items() if key not in timed}
        )
    assert moved(without.model.state_dict(), looked.model.state_dict()) == []


def test_when_it_looks(run):  # noqa: F811
    trainer = run(max_steps=5, probe_size=8, probe_steps=2)
    assert [entry["step"] for entry in trainer.state.log_history if PROBE[0] in entry] == [0, 2, 4, 5]
    assert len(logged(trainer, "loss")) == 5


def test_plain_fine_tuning_is_looked_at_too(run):  # noqa: F811
    """The baseline of a comparison. The numbers of the first look are those of the aligned run."""
    plain, aligned = run(0.0, probe_size=8), run(10.0, probe_size=8)
    for name in PROBE:
        assert logged(plain, name)[0] == close(logged(aligned, name)[0])
        assert len(logged(plain, name)) == 2


def test_it_looks_at_mapped_samples_of_the_evaluation_set(run, dataset, make_student, processor, store_path, tmp_path):  # noqa: F811
    """The last scene has no map. Losses are those of an evaluation of the same samples."""
    from lavender.training.trainer import LavenderConfig, LavenderTrainer

    args = LavenderConfig(
        output_dir=str(tmp_path),
        maps=str(store_path),
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_length=None,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        gradient_checkpointing=False,
        probe_size=2,
        per_device_eval_batch_size=1,
    )
    evaluated = dataset.select([5, 2, 4, 1])
    trainer = LavenderTrainer(
        make_student(),
        args,
        processing_class=processor,
        train_dataset=dataset.select([0]),
        eval_dataset={"one": evaluated},
    )
    trainer.train()
    evaluation = trainer.evaluate(dataset.select([2, 4]))
    for name in ("attention_loss", "attention_mass"):
        assert logged(trainer, f"probe_{name}") == [pytest.approx(evaluation[f"eval_{name}"], rel=1e-5)] * 2


def test_of_learned_projections_it_looks_at_the_students_own(run):  # noqa: F811
    """Own attention does not depend on the projections; the loss does."""
    first = run(build_only=True, learning_rate=0.0, probe_size=8, **LEARN)
    second = run(build_only=True, learning_rate=0.0, probe_size=8, **LEARN)
    with torch.no_grad():
        for name, parameter in second.model.named_parameters():
            if "alignment_parallel" in name:
                parameter.normal_()
    for trainer in (first, second):
        trainer.train()
    assert logged(first, "probe_map_agreement") == close(logged(second, "probe_map_agreement"))
    assert logged(first, "probe_attention_loss") != logged(second, "probe_attention_loss")


def test_agreement_is_seen_where_it_is_planted(run):  # noqa: F811
    """Targets that are the student's own maps: correlation 1, and each peak hits."""
    trainer = run(build_only=True, learning_rate=0.0, probe_size=8)
    (probe,) = [one for one in trainer.callback_handler.callbacks if type(one).__name__ == "Probe"]
    assert HEAD_NAME in dict(trainer.model.named_children())
    with torch.no_grad(), random_state_kept(torch.device("cpu")):
        trainer.model.eval()
        for batch in probe._batches:
            present = batch["alignment"]["present"]
            batch["alignment"]["targets"][present] = to_heat(probe._see(trainer.model, batch).student)
    trainer.train()
    assert logged(trainer, "probe_map_agreement") == pytest.approx([1, 1], abs=1e-5)
    assert logged(trainer, "probe_peak_hits") == [1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probe_size": -1}, "Got probe_size=-1. Expected a number from 0 on."),
        ({"probe_steps": 0}, "Got probe_steps=0."),
    ],
)
def test_wrong_sizes_are_refused(run, settings, message):  # noqa: F811
    with pytest.raises(ConfigError) as caught:
        run(build_only=True, **settings)
    assert message in str(caught.value)


def test_tensorboard_has_numbers_and_pictures(run, tmp_path):  # noqa: F811
    """At the same steps; what is in the picture is picture, teacher and student, side by side."""
    trainer = run(max_steps=3, probe_size=8, probe_steps=2, report_to="tensorboard", output_dir=str(tmp_path / "out"))
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    for name in (*LOSSES, "student_entropy"):
        assert [one.value for one in events.Scalars(f"train/{name}")] == pytest.approx(logged(trainer, name))
    for name in PROBE:
        assert [one.step for one in events.Scalars(f"train/{name}")] == [0, 2, 3]
        assert [one.value for one in events.Scalars(f"train/{name}")] == pytest.approx(logged(trainer, name))
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("probe/")]
    assert len(tags) == 4
    assert all(tag.endswith(": picture, teacher, student") for tag in tags)
    shown = [np.asarray(Image.open(io.BytesIO(one.encoded_image_string))) for one in events.Images(tags[0])]
    assert [one.step for one in events.Images(tags[0])] == [0, 2, 3]
    image = trainer.train_dataset[0]["images"][0]
    width = image.width
    assert shown[0].shape == (image.height, 3 * width, 3)
    assert np.array_equal(shown[0][:, :width], np.asarray(image.convert("RGB")))
    first, last = shown[0], shown[-1]
    assert np.array_equal(first[:, : 2 * width], last[:, : 2 * width])
    assert not np.array_equal(first[:, 2 * width :], last[:, 2 * width :])


def test_without_tensorboard_nothing_is_written(run, tmp_path):  # noqa: F811
    run(output_dir=str(tmp_path / "out"))
    assert not list(Path(tmp_path / "out").rglob("events*"))
