"""What extraction on Ray does before a cluster is there; tests/slow/test_kill_workers.py has one."""

from __future__ import annotations

import pickle
import re
import sys
import tracemalloc
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from command_line import complaint, lavender
from lavender.cli.main import WRONG_USAGE
from lavender.config import ExtractionConfig
from lavender.data.sample_table import SampleTable
from lavender.data.samples import Sample, Samples
from lavender.data.store import MapStore, StoreWriter
from lavender.data.store_format import key_of
from lavender.errors import ConfigError, DataError
from lavender.teachers.extract import extract
from lavender.teachers.extraction_loop import Step, write_maps
from lavender.teachers.ray_engine import TeacherPlan, _Keys, _Mapper, _Tasks, extract_on_ray
from lavender.teachers.ray_pool import _Packed, _sendable, _unreached, run_on_ray
from lavender.world import TEACHER_PATH
from lavender.world.student_models import conversation

PLAN = TeacherPlan(str(TEACHER_PATH), ExtractionConfig(grid=(11, 13), batch_size=2))


def sample(name: str, source: Path | bytes) -> Sample:
    return Sample(name, (source,), conversation("what is it?", f"a dog {name}"))


@pytest.fixture
def picture(tmp_path, monkeypatch) -> Path:
    """Its path, relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("0.png")
    return Path("0.png")


def test_the_samples_of_an_image_are_in_one_task(picture, tmp_path):
    sources = [picture, b"x", b"y", b"x", picture, b"z"]
    given = Samples(tuple(sample(f"{place}", source) for place, source in enumerate(sources)))
    assert [[one.name for one in task] for task in _Tasks(given, 1)] == [["0", "4"], ["1", "3"], ["2"], ["5"]]
    assert [[one.name for one in task] for task in _Tasks(given, 3)] == [["0", "4", "1", "3"], ["2", "5"]]
    first = _Tasks(given, 1)[0][0]
    assert first.sources == (tmp_path / "0.png",)  # a worker may have another working directory
    assert first.messages == given.samples[0].messages
    assert list(_Tasks(Samples(()), 3)) == []


def test_tasks_are_made_one_by_one(tmp_path):
    """A data set that holds its images, of 40 MB, never has more than two tasks of 1 MB in memory."""
    images = SampleTable.of(sample(f"{place}", bytes([place]) * 10**6) for place in range(40))
    packed = _Packed(_Tasks(Samples(images), 1))
    assert len(packed) == 40
    tracemalloc.start()
    try:
        for number in range(40):
            row = packed[number]
            assert row["number"] == number
            [found] = pickle.loads(row["task"])
            assert found.sources == (bytes([number]) * 10**6,)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_the_keys_of_a_store_are_found_and_no_others():
    pairs = [(f"{number:x}", "a dog") for number in range(40)]
    keys = _Keys({key_of(*pair) for pair in pairs[::2]}, {})
    assert [pair in keys for pair in pairs] == [True, False] * 20
    assert ("0", "half a \ud800 character") not in keys
    assert ("0", "a dog") not in _Keys(set(), {})


def test_tasks_of_which_one_runs_twice_have_the_records_of_one_process(picture, tmp_path):
    """The work of a worker, here. Tasks, work and results are pickled, as on their way through Ray."""
    given = Samples(tuple(sample(f"{place}", source) for place, source in enumerate((picture, b"broken", picture))))
    wordless = Sample("wordless", (picture,), conversation("what is it?", "12, 3!"))
    given = Samples((*given, replace(given.samples[0], name="again"), wordless))
    alone = extract(given, PLAN.load(), tmp_path / "one")

    def steps(writer: StoreWriter) -> Generator[Step, None, None]:
        work = pickle.loads(pickle.dumps(_Mapper(PLAN, False, _Keys(writer.keys, writer.left_out))))
        tasks = pickle.loads(pickle.dumps(list(_Tasks(given, 1))))
        assert len(tasks) == 2
        for task in (tasks[0], *tasks):
            yield from pickle.loads(pickle.dumps(list(work(task))))

    settings: dict[str, Any] = {"identity": {}, "info": {}, "grid": (11, 13), "strict": False}
    for again in (False, True):
        told = write_maps(given, tmp_path / "ray", steps, **settings, on_progress=lambda texts: None)
        assert alone.records == 3
        assert told.records == (0 if again else 3)
        assert sorted(map(str, told.dropped)) == sorted(map(str, alone.dropped))
        assert len(told.dropped) == 2
    one, other = (MapStore.open(tmp_path / name, verify=True) for name in ("one", "ray"))
    assert len(other) == len(one) == 3
    for expected, found in zip(one, other, strict=True):
        assert (found.image_id, found.text, found.words) == (expected.image_id, expected.text, expected.words)
        torch.testing.assert_close(found.maps, expected.maps, rtol=0, atol=1.01 / 255)


def test_an_image_that_the_host_of_a_worker_lacks_is_no_dropped_sample():
    work = _Mapper(PLAN, strict=False, done=_Keys(set(), {}))
    with pytest.raises(DataError, match="/nowhere/1.png of row 1, which the host .* does not have"):
        next(work([sample("row 1", Path("/nowhere/1.png"))]))


def test_numbers_that_are_not_positive_are_refused(picture, tmp_path):
    with pytest.raises(ConfigError, match="samples_per_task=0"):
        extract_on_ray(Samples((sample("0", picture),)), PLAN, tmp_path / "maps", samples_per_task=0)
    with pytest.raises(ConfigError, match="0 workers"):
        next(run_on_ray([1], iter, workers=0, gpu=False))


class Unreadable(Exception):
    """An error that pickles, and cannot be made again from its message."""

    def __init__(self, number: int, word: str):
        super().__init__(f"{word} {number}")


def test_an_error_of_a_worker_arrives_though_it_cannot_be_pickled():
    error = DataError("a", "b", "c")
    assert _sendable(error) is error
    sent = pickle.loads(pickle.dumps(_sendable(Unreadable(3, "no. "))))
    assert "Unreadable: no.  3" in str(sent)


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("local", "The node timed out.", "did not start on this host: The node timed out. .*Ray waits 30 s"),
        ("local", "AF_UNIX path length cannot exceed 107 bytes: /x", "set RAY_TMPDIR to a folder with a short path"),
        ("10.0.0.1:6379", "No.", "no answer from the Ray cluster at RAY_ADDRESS=10.0.0.1:6379: No. .*check the add"),
    ],
)
def test_why_there_is_no_cluster(address, error, message):
    assert re.search(message, str(_unreached(address, Exception(error))))


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'lavender-vlm\[ray\]'"):
        next(run_on_ray([1], iter, workers=1, gpu=False))


@pytest.mark.parametrize(
    ("arguments", "processes", "message"),
    [
        (["--workers", "2"], 1, "--workers without --engine ray"),
        (["--engine", "ray"], 2, "--engine ray in several processes"),
        (["--engine", "ray", "--device", "cuda:1"], 1, "--device 'cuda:1' with --engine ray"),
        (["--engine", "ray", "--workers", "0"], 1, "0 workers"),
        (["--engine", "ray"], 1, "--engine ray without --device, on a host without a GPU"),
        (["--device", "cuda"], 9999, "9999 processes"),
        (["--device", "cuda:0"], 2, "--device 'cuda:0' in 2 processes"),
    ],
)
def test_options_that_do_not_fit_are_refused(picture, tmp_path, monkeypatch, arguments, processes, message):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a dog"}\n')
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(processes))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379" if "without a GPU" in message else "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = lavender("extract", "--data", tmp_path, "--teacher", "world", "--out", tmp_path / "maps", *arguments)
    assert message in complaint(ran, WRONG_USAGE)


@pytest.mark.parametrize(("engine", "processes"), [("ray", 1), ("local", 2)])
def test_annotations_need_one_process(tmp_path, monkeypatch, engine, processes):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(processes))
    monkeypatch.setenv("RANK", "0")
    arguments = ["--annotations", "coco-panoptic", "--from", tmp_path / "panoptic.json", "--engine", engine]
    ran = lavender("extract", *arguments, "--out", tmp_path / "maps")
    assert "Expected one process" in complaint(ran, WRONG_USAGE)
