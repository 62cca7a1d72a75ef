"""From rows on disk with one picture, two and none to a trained student: each word on its own picture's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from families import test_qwen_vl as qwen
from families.core import PUBLISHED
from lavender.alignment.coverage import NO_PICTURE
from lavender.alignment.objective import AlignmentRequest
from lavender.config import ExtractionConfig
from lavender.data.images import image_id
from lavender.data.samples import Samples, read_samples, to_dataset
from lavender.data.store import MapStore
from lavender.students.registry import adapter_for
from lavender.teachers.diffusion.teacher import Teacher
from lavender.teachers.extract import extract
from lavender.training.trainer import LavenderConfig, LavenderTrainer
from lavender.world.student_models import STUDENTS

QUESTIONS = ("What is on both?", "And what is it here?", "Hi there?", "Describe the image.")
GRID = (11, 13)


@pytest.fixture
def samples(some_scenes, captions, tmp_path) -> Samples:
    """One picture with a caption; two in a question; text alone; two in two questions."""
    for index, scene in enumerate(some_scenes):
        scene.image.save(tmp_path / f"{index}.png")
    both, here, hi, _ = QUESTIONS
    rows = [
        {"image": "0.png", "text": captions[0]},
        {
            "images": ["1.png", "2.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": both}]},
                {"role": "assistant", "content": captions[1]},
            ],
        },
        {"messages": [{"role": "user", "content": hi}, {"role": "assistant", "content": captions[2]}]},
        {
            "image": ["3.png", "4.png"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{both}"},
                {"from": "gpt", "value": captions[3]},
                {"from": "human", "value": f"{here} <image>"},
                {"from": "gpt", "value": captions[4]},
            ],
        },
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples(tmp_path / "train.jsonl")


def make_student(kind: str, texts: list[str]) -> tuple[Any, Any]:
    """(model, processor)."""
    if kind in STUDENTS:
        processor = STUDENTS[kind].build_processor([*texts, *QUESTIONS], vocabulary=300)
        return STUDENTS[kind].build_model(processor), processor
    processor = qwen.build_processor([*texts, *QUESTIONS])
    config: Any = qwen.config_of(kind, processor.tokenizer)
    return Qwen2VLForConditionalGeneration(config), processor


@pytest.mark.parametrize("alignment", [{}, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_from_disk_to_a_trained_student(kind, alignment, samples, captions, pipeline, tmp_path):
    assert samples.dropped == ()
    teacher = Teacher(pipeline, ExtractionConfig(grid=GRID, batch_size=2), name="tiny")
    summary = extract(samples, teacher, tmp_path / "maps", strict=True)
    pairs = [(sample, *pair) for sample in samples for pair in sample.pairs]
    assert (summary.records, summary.without_picture) == (len(pairs), 1) == (6, 1)
    store: Any = MapStore.open(tmp_path / "maps")

    trainer = train(make_student(kind, captions), samples, tmp_path, **alignment)
    log = [entry for entry in trainer.state.log_history if "attention_loss" in entry]
    assert len(log) == 2
    assert all(entry["attention_loss"] > 0 for entry in log)
    coverage = trainer.coverage
    assert (coverage.samples, coverage.mapped_samples) == (4, 3)
    assert coverage.words == sum(len(store.get(known(sample, index), text).words) for sample, index, text in pairs)
    assert coverage.dropped == {NO_PICTURE: 1}
    assert sum(entry["matched_words"] for entry in log) == coverage.words

    first, second = (known(samples.samples[1], index) for index in (0, 1))
    text = samples.samples[1].answers[0]
    check_second(trainer, store.get(first, text), store.get(second, text))


@pytest.mark.parametrize("kind", ["mllama", "llava", "qwen2_vl"])
def test_a_step_of_text_alone(kind, samples, captions, pipeline, tmp_path):
    """A batch without any picture is plain fine-tuning, and the next one is aligned."""
    chosen = Samples((samples.samples[2], samples.samples[0]))
    extract(chosen, Teacher(pipeline, ExtractionConfig(grid=GRID), name="tiny"), tmp_path / "maps")
    trainer = train(make_student(kind, captions), chosen, tmp_path, per_device_train_batch_size=1)
    log = [entry for entry in trainer.state.log_history if "attention_loss" in entry]
    text, mapped = sorted(log, key=lambda entry: entry["attention_loss"])
    assert (text["attention_loss"], text["matched_words"]) == (0, 0)
    assert text["vlm_loss"] > 0
    assert mapped["attention_loss"] > 0


def known(sample, index: int) -> str:
    return image_id(sample.load_picture(index))


def train(student, samples: Samples, folder: Path, per_device_train_batch_size: int = 2, **alignment: Any) -> Any:
    model, processor = student
    args = LavenderConfig(
        output_dir=str(folder / "out"),
        maps=str(folder / "maps"),
        max_steps=2,
        seed=3,
        report_to="none",
        bf16=False,
        per_device_train_batch_size=per_device_train_batch_size,
        use_cpu=True,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        **alignment,
    )
    trainer = LavenderTrainer(model, args, processing_class=processor, train_dataset=to_dataset(samples))
    trainer.train()
    return trainer


def check_second(trainer: Any, first: Any, second: Any) -> None:
    """Each word of the row with two pictures is there for each, with that picture's map and keys alone."""
    batch = trainer.data_collator([trainer.train_dataset[1]])
    found = batch.pop("alignment")
    count = len(second.words)
    assert found["word_pictures"].tolist() == [[0] * count + [1] * count]
    torch.testing.assert_close(found["targets"][0], torch.cat([first.maps, second.maps]))
    assert not torch.equal(first.maps, second.maps)
    tokens = (batch["input_ids"][0] == adapter_for(trainer.model.config).image_token_id()).nonzero()[:, 0]
    assert found["keys"][0].tolist() == tokens.tolist()
    own = found["pictures"][0]
    assert own.tolist() == sorted(own.tolist())
    assert set(own.tolist()) == {0, 1}

    def loss(moved: int | None) -> torch.Tensor:
        """Of the words on the second picture, with the keys of one of the pictures moved elsewhere."""
        boxes = found["boxes"].clone()
        if moved is not None:
            boxes[0, own == moved] = boxes[0, own == moved].flip(0)
        present = found["present"] & (found["word_pictures"] == 1)
        request = AlignmentRequest(trainer._alignment_layers, found | {"boxes": boxes, "present": present})
        return trainer.model(**batch, attention_request=request).attention_loss

    with torch.no_grad():
        trainer.model.eval()
        batch.pop("labels")
        torch.testing.assert_close(loss(0), loss(None), rtol=1e-6, atol=0)
        # an untrained student looks everywhere, so the share of its attention hardly changes
        least = 1e-5 if trainer.args.alignment().is_direct else 1e-4
        assert (loss(1) - loss(None)).abs() > least * loss(None)
