"""A workspace on disk, which the processes of a launch share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from command_line import write_scenes
from conftest import PROMPT, SEED
from lavender.alignment.objective import detach
from lavender.data.samples import Sample, to_dataset
from lavender.training.trainer import LavenderConfig, LavenderTrainer
from lavender.world.student_models import build_llava, build_llava_processor, conversation


@pytest.fixture(scope="session")
def workspace(make_student, processor, some_scenes, captions, store_path, tmp_path_factory) -> Path:
    """Folders: `mllama`, `llava`, `llava_tied`, `taught` (students; the last knows some words), `maps`, `data` (a
    Dataset), `pictures` (four, captioned).

    The data set's rows: 0 to 4 have maps, 5 has none, 6 and 7 are text alone.
    """
    path = tmp_path_factory.mktemp("workspace")
    make_student().save_pretrained(path / "mllama")
    processor.save_pretrained(path / "mllama")
    llava_processor = build_llava_processor([*captions, PROMPT], vocabulary=300)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        llava = build_llava(llava_processor)
        llava.save_pretrained(path / "llava")
        for config in (llava.config, llava.config.get_text_config()):
            config.tie_word_embeddings = True
        type(llava)(llava.config).save_pretrained(path / "llava_tied")
    for name in ("llava", "llava_tied"):
        llava_processor.save_pretrained(path / name)
    shutil.copytree(store_path, path / "maps")
    samples = [
        Sample(f"scene {scene.seed}", (scene.image,), conversation(PROMPT, caption))
        for scene, caption in zip(some_scenes, captions, strict=True)
    ]
    samples += [Sample(f"text {caption}", (), _text_alone(caption)) for caption in captions[:2]]
    dataset = to_dataset(samples)
    dataset.save_to_disk(str(path / "data"))
    taught(make_student(), processor, dataset.select(range(4)), path).save_pretrained(path / "taught")
    processor.save_pretrained(path / "taught")
    (path / "pictures").mkdir()
    chosen = (0, 1, 2, 5)  # the last has no maps
    write_scenes(path / "pictures", [some_scenes[one] for one in chosen], [captions[one] for one in chosen])
    return path


def taught(student, processor, dataset, path: Path):
    """A student that has learned some of the answers by heart, so that it predicts some of their words."""
    args = LavenderConfig(
        output_dir=str(path / "teaching"),
        maps=str(path / "maps"),
        align_weight=0.0,
        max_steps=25,
        seed=3,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_length=None,
        save_strategy="no",
        activation_checkpointing=False,
        disable_tqdm=True,
        probe_size=0,
    )
    trainer = LavenderTrainer(student, args, processing_class=processor, train_dataset=dataset)
    trainer.train()
    detach(student)
    return student


def _text_alone(caption: str) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]
