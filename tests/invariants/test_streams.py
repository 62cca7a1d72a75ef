"""Streams as training data: the same run as with a list in the same order, and nothing of them is used up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import DataLoaderDispatcher
from datasets import Features, Image, IterableDataset, List, load_dataset

from closeness import close, moved
from invariants.test_trainer import LOSSES, logged, lora, run  # noqa: F401
from lavender.errors import ConfigError, DataError
from lavender.training.trainer import LavenderConfig

ORDERED: dict[str, Any] = {"train_sampling_strategy": "sequential", "max_steps": 4}


@pytest.fixture
def streams(dataset, tmp_path) -> dict[str, Any]:
    """The data set as a stream of its own, and from a file on disk."""
    dataset.to_parquet(tmp_path / "data.parquet")
    from_disk = load_dataset(
        "parquet",
        data_files=str(tmp_path / "data.parquet"),
        streaming=True,
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    features = Features(dataset.features | {"images": List(Image())})
    return {"memory": dataset.to_iterable_dataset(), "disk": from_disk.cast(features)}


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_stream_trains_as_a_list_in_its_order(run, dataset, streams, kind):  # noqa: F811
    """Four steps of two are more than the six samples: the stream begins anew, as the list does."""
    expected = run(**ORDERED)
    assert isinstance(streams[kind], IterableDataset)
    found = run(data=streams[kind], max_steps=4)
    for name in (*LOSSES, "student_entropy", "probe_map_agreement"):
        assert logged(found, name) == close(logged(expected, name))
    weights = expected.model.state_dict()
    assert moved(weights, found.model.state_dict()) == []
    assert found.coverage == expected.coverage
    assert not isinstance(found.get_train_dataloader(), DataLoaderDispatcher)


def test_a_stream_resumes(run, streams, tmp_path):  # noqa: F811
    settings: dict[str, Any] = {"data": streams["memory"], "max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = run(output_dir=str(tmp_path / "whole"), peft=lora(), **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run(output_dir=str(tmp_path / "again"), peft=lora(), resume=checkpoint, **settings)
    assert logged(resumed, "loss") == close(logged(whole, "loss"))
    expected = whole.model.state_dict()
    assert moved(expected, resumed.model.state_dict()) == []


def test_a_stream_with_workers_and_shuffling(run, dataset):  # noqa: F811
    data = dataset.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=4)
    trainer = run(data=data, max_steps=3, dataloader_num_workers=2)
    assert len(logged(trainer, "loss")) == 3
    assert trainer.coverage.samples == 5  # each worker has three: batches of two, two, one, and one that is not used
    assert trainer.coverage.mapped_samples in (4, 5)


def test_a_stream_is_evaluated(run, dataset, streams):  # noqa: F811
    trainer = run(build_only=True)
    expected = trainer.evaluate(dataset)
    found = trainer.evaluate(streams["memory"])
    for name in ("loss", "vlm_loss", "attention_loss", "matched_words"):
        assert found[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"])


def test_too_few_maps_in_the_beginning_of_a_stream_stop(run, dataset):  # noqa: F811
    with pytest.raises(DataError, match="Got maps for 1 of 3 samples"):
        run(data=dataset.select([5, 5, 0]).to_iterable_dataset(), build_only=True)


def test_a_stream_needs_a_number_of_steps(run, streams):  # noqa: F811
    with pytest.raises(ValueError, match="max_steps"):
        run(data=streams["memory"], max_steps=-1, num_train_epochs=1)


def test_dispatching_is_refused(tmp_path: Path):
    """accelerate would read a batch in one process and cut it, pixels and boxes too, along the first axis."""
    with pytest.raises(ConfigError, match="leave dispatch_batches out"):
        LavenderConfig(
            output_dir=str(tmp_path), bf16=False, use_cpu=True, accelerator_config={"dispatch_batches": True}
        )
