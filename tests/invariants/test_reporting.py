"""What a run from a YAML file reports, and where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from command_line import write_run, write_scenes
from lavender.training.run import read_run, train


@pytest.fixture
def run_file(make_student, processor, some_scenes, captions, store_path, tmp_path) -> Path:
    make_student().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    data = write_scenes(tmp_path / "data", some_scenes, captions)
    return write_run(
        tmp_path,
        model=str(tmp_path / "model"),
        data=str(data),
        maps=str(store_path),
        prompt="describe the picture.",
        dtype="float32",
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
    )


def test_tensorboard_from_yaml(run_file):
    """In the run's folder, with the numbers of metrics.jsonl."""
    out = train(read_run(run_file, ["report_to=tensorboard", "probe_steps=1"]))
    (events_file,) = out.rglob("events.out.tfevents.*")
    assert events_file.parent.parent == out / "trainer" / "runs"
    events = EventAccumulator(str(events_file.parent))
    events.Reload()
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "vlm_loss", "attention_loss", "matched_words", "student_entropy", "probe_map_agreement"):
        expected = [(one["step"], one[name]) for one in entries if name in one]
        assert expected
        found = events.Scalars(f"train/{name}")
        assert [one.step for one in found] == [step for step, _ in expected]
        assert [one.value for one in found] == pytest.approx([value for _, value in expected])
    assert [tag for tag in events.Tags()["images"] if tag.startswith("probe/")]


def test_nothing_is_reported_unless_asked(run_file):
    out = train(read_run(run_file))
    assert not list(out.rglob("events.out.tfevents.*"))
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in entries if "probe_map_agreement" in one] == [0, 2]
    coverage = json.loads((out / "coverage.json").read_text())
    assert (coverage["samples"], coverage["mapped_samples"]) in ((4, 4), (4, 3))
