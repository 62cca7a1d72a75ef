"""A real run on the words of all turns and on words that are about others: from rows on disk to a trained student."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from lavender.config import ExtractionConfig
from lavender.data.samples import Samples, read_samples, to_dataset
from lavender.data.store import MapStore
from lavender.teachers.diffusion.teacher import Teacher
from lavender.teachers.extract import extract
from lavender.training.trainer import LavenderConfig, LavenderTrainer
from lavender.world.student_models import STUDENTS

QUESTION = "what color is the dog near the tree?"
ANSWERS = ("red", "it is blue", "a green dog", "dark red")
COLORS = ("red", "blue", "green", "dark red")
GRID = (11, 13)


@pytest.fixture(scope="module")
def samples(some_scenes, tmp_path_factory) -> Samples:
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for index, (answer, color) in enumerate(zip(ANSWERS, COLORS, strict=True)):
        some_scenes[index].image.save(folder / f"{index}.png")
        about: Any = {color: "dog"} if index % 2 else [{"word": color, "about": "dog"}]
        rows.append({"image": f"{index}.png", "prompt": QUESTION, "completion": answer, "about": about})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples(folder / "train.jsonl")


@pytest.fixture(scope="module")
def maps(samples, pipeline, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("maps") / "maps"
    config = ExtractionConfig(grid=GRID, batch_size=2, texts="all", parts_of_speech=("noun",))
    extract(samples, Teacher(pipeline, config, name="tiny"), path)
    return str(path)


def student_of(kind: str) -> tuple[Any, Any]:
    processor = STUDENTS[kind].build_processor([QUESTION, *ANSWERS], vocabulary=300)
    torch.manual_seed(5)
    return STUDENTS[kind].build_model(processor), processor


def arguments(config_type: type, folder, **settings: Any) -> Any:
    return config_type(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        seed=3,
        max_length=None,
        **settings,
    )


def train(kind: str, samples: Samples, maps: str, folder, **settings: Any) -> LavenderTrainer:
    model, processor = student_of(kind)
    trainer = LavenderTrainer(
        model,
        arguments(LavenderConfig, folder, maps=maps, **settings),
        processing_class=processor,
        train_dataset=to_dataset(samples),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["mllama", "llava"])
def test_two_steps_on_all_turns(kind, samples, maps, tmp_path):
    """Each question has a dog, a color and a tree; each answer a color that is about the dog, and one has a dog."""
    assert [sample.about[0].word for sample in samples] == list(COLORS)
    trainer = train(kind, samples, maps, tmp_path, texts="all", rows="both", attention_loss="mass")
    log = [entry for entry in trainer.state.log_history if "attention_loss" in entry]
    assert len(log) == 2
    assert all(entry["attention_loss"] > 0 for entry in log)
    assert {record.text: [word.text for word in record.words] for record in MapStore.open(maps)} == {
        QUESTION: ["color", "dog", "tree"],
        "red": ["red"],  # alone it is a noun to the tagger; the dog's map takes the place of its own
        "it is blue": [],
        "a green dog": ["dog"],
        "dark red": ["red"],
    }
    coverage = trainer.coverage
    assert (coverage.samples, coverage.mapped_samples, coverage.words) == (4, 4, 4 * 3 + 4 + 1)
    assert +coverage.dropped == {}


@pytest.mark.parametrize("kind", ["mllama", "llava"])
def test_without_weight_it_is_plain_fine_tuning(kind, samples, maps, tmp_path):
    """To the bit, whatever is aligned."""
    settings: dict[str, Any] = {"texts": "all", "rows": "both", "attributes": "noun"}
    aligned = train(kind, samples, maps, tmp_path / "aligned", align_weight=0, probe_size=0, **settings)
    model, processor = student_of(kind)
    plain = SFTTrainer(
        model,
        arguments(SFTConfig, tmp_path / "plain"),
        processing_class=processor,
        train_dataset=to_dataset(samples).remove_columns("about"),
    )
    plain.train()
    models: Any = plain.model, aligned.model
    expected, found = (dict(each.named_parameters()) for each in models)
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())
