"""Extraction in several processes, here one after the other: the shares make up the whole, and the store is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from lavender.config import ExtractionConfig
from lavender.data.sample_table import SampleTable
from lavender.data.samples import Sample, Samples, read_samples
from lavender.data.store import MapStore
from lavender.errors import ConfigError, DataError
from lavender.maps import Dropped
from lavender.teachers.diffusion.teacher import Teacher
from lavender.teachers.extract import extract
from lavender.teachers.launch import Launch, image_numbers
from lavender.world.student_models import conversation

ANSWERS = ["a dog", "two cats run", "the red hat", "12, 3!", "a sun", "an old house", "a tree", "a cup"]


class OneOf(Launch):
    """A process that does not wait for the others."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


class After(Launch):
    """A process that runs after those before it in rank, and is told what they did."""

    told: ClassVar[list[Any]] = []

    def gather(self, value: Any) -> list[Any]:
        if self.rank == 0:
            self.told.clear()
        self.told.append(value)
        return list(self.told)


def sample(name: str, source: Any, answer: str) -> Sample:
    return Sample(name, (source,), conversation("what is it?", answer))


@pytest.fixture
def samples(tmp_path) -> Samples:
    """Eight image files with an answer each. The second, third and last have the same pixels, the third and the last
    the same answer too. The first file has a second answer. One row was dropped."""
    found = []
    for row, answer in enumerate(ANSWERS):
        path = tmp_path / f"{row}.png"
        shade = 34 if row in (1, 2, 7) else 17 * row
        Image.new("RGB", (40, 30), (shade, 90, 255 - shade)).save(path)
        found.append(sample(f"row {row}", path, ANSWERS[2] if row == 7 else answer))
    found.append(sample("row 8", tmp_path / "0.png", "a boat"))
    return Samples(tuple(found), (Dropped("row 9", "no text"),))


@pytest.fixture
def teacher(pipeline) -> Teacher:
    return Teacher(pipeline, ExtractionConfig(grid=(11, 13), batch_size=2), name="tiny")


def records(path: Path) -> dict:
    store = MapStore.open(path, verify=True)
    found = {(one.image_id, one.text): (one.words, one.dropped, one.maps) for one in store}
    assert len(found) == len(store)
    return found


def test_the_samples_of_an_image_have_its_number(samples):
    assert list(image_numbers(samples)) == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    encoded = Samples((sample("a", b"x", "a dog"), sample("b", b"y", "a dog"), sample("c", b"x", "a cat")))
    assert list(image_numbers(encoded)) == [0, 1, 0]
    image = Image.new("RGB", (9, 9))
    assert list(image_numbers(Samples((sample("a", image, "a dog"), sample("b", image, "a cat"))))) == [0, 0]


@pytest.mark.parametrize("size", [2, 4])
def test_every_sample_has_one_process(samples, size):
    shares = [Launch(rank, size).share(samples) for rank in range(size)]
    names = [[one.name for one in share] for share in shares]
    assert sorted(name for share in names for name in share) == [f"row {row}" for row in range(9)]
    assert "row 8" in names[0]  # with the first of the same file
    assert names[1][:2] == ["row 1", f"row {1 + size}"]
    assert [one.name for one in shares[1].samples[:1]] == ["row 1"]
    assert [share.dropped for share in shares] == [samples.dropped, *[()] * (size - 1)]


@pytest.mark.parametrize("size", [2, 4])
def test_the_shares_of_a_data_set_that_was_read_are_read_from_it(samples, tmp_path, size):
    rows = [{"file_name": one.sources[0].name, "text": one.answers[0]} for one in samples]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    given = read_samples(tmp_path)
    shares = [Launch(rank, size).share(given) for rank in range(size)]
    assert all(isinstance(share.samples, SampleTable) for share in shares)
    expected = [ANSWERS[rank:3:size] for rank in range(size)]  # the fourth of four processes has none
    assert [[one.answers[0] for one in share] for share in shares] == expected


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_is_dropped_of_the_same_pixels_is_named_once(teacher, samples, tmp_path, size):
    """Two files of the same pixels have the same answers: one without a noun, one with a word too long to map."""
    long = f"a {'x' * 300} dog"
    pairs = [("1.png", "12, 3!"), ("2.png", "12, 3!"), ("1.png", long), ("2.png", long)]
    twice = Samples(tuple(sample(f"{name} {text}", tmp_path / name, text) for name, text in pairs), samples.dropped)
    alone = extract(twice, teacher, tmp_path / "one")
    for rank in range(size):
        together = extract(twice, teacher, tmp_path / "several", launch=After(rank, size))
    assert len(alone.dropped) == 3
    assert sorted(map(str, together.dropped)) == sorted(map(str, alone.dropped))
    assert (together.records, together.already_there) == (alone.records, alone.already_there) == (2, 2)


def test_strict_refuses_dropped_rows_in_every_process_before_any_work(teacher, samples, tmp_path):
    for rank in range(2):
        with pytest.raises(DataError, match="row 9: no text"):
            extract(samples, teacher, tmp_path / "maps", launch=OneOf(rank, 2), strict=True)
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize("size", [2, 4])
def test_two_and_four_writers_have_the_records_of_one(teacher, samples, tmp_path, size):
    alone = extract(samples, teacher, tmp_path / "one")
    expected = records(tmp_path / "one")
    assert len(expected) == 8
    parts = [extract(samples, teacher, tmp_path / "several", launch=OneOf(rank, size)) for rank in range(size)]
    found = records(tmp_path / "several")
    assert found.keys() == expected.keys()
    for key, (words, dropped, maps) in expected.items():
        assert found[key][:2] == (words, dropped)
        # a batch of another size changes the last bits, and with them at most one of 255 steps
        torch.testing.assert_close(found[key][2], maps, rtol=0, atol=1 / 255 + 1e-5)
    for name in ("records", "words"):
        assert sum(getattr(part, name) for part in parts) == getattr(alone, name)
    assert sum(part.already_there for part in parts) == alone.already_there == 1
    drops = [drop for part in parts for drop in part.dropped]
    assert sorted(map(str, drops)) == sorted(map(str, alone.dropped))
    assert json.loads((tmp_path / "several" / "extraction.json").read_text())["runs"][0]["records"] == parts[0].records


def test_one_process_continues_what_several_began_and_the_other_way(teacher, samples, tmp_path):
    extract(samples, teacher, tmp_path / "maps", launch=OneOf(1, 2))
    begun = len(MapStore.open(tmp_path / "maps"))
    assert 0 < begun < 8
    extract(Samples(samples.samples[:5]), teacher, tmp_path / "maps")
    for rank in range(4):
        extract(samples, teacher, tmp_path / "maps", launch=OneOf(rank, 4))
    assert len(records(tmp_path / "maps")) == 8


def test_a_process_that_another_overtook_counts_what_it_wrote(teacher, samples, tmp_path):
    """While one extracts, another writes the same records: the first has none of its own in the end."""

    def overtake(texts: int) -> None:
        if not (tmp_path / "maps" / "extraction.json").exists():
            extract(samples, teacher, tmp_path / "maps", launch=OneOf(0, 1))

    summary = extract(samples, teacher, tmp_path / "maps", launch=OneOf(0, 1), on_progress=overtake)
    assert (summary.records, summary.words, summary.already_there) == (0, 0, 9)
    assert len(records(tmp_path / "maps")) == 8


def test_the_launch_is_that_of_the_environment(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.of_environment() is None
    monkeypatch.setenv("WORLD_SIZE", "")
    assert Launch.of_environment() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    # as a Kubernetes training job sets them for one process per host
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=4, LOCAL_WORLD_SIZE=, RANK=3\."):
        Launch.of_environment()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Launch.of_environment() == Launch(3, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="4 processes, 2 of them on this host"):
        Launch.of_environment()
