"""Several writers of one store, taking turns in one process: no record is lost or doubled, whoever writes first."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from lavender.data import store_writer
from lavender.data.shared_writer import SharedStoreWriter
from lavender.data.store import MapStore
from lavender.data.store_writer import take_lock
from lavender.errors import StoreError
from lavender.maps import Word, WordMaps

GRID = (2, 3)


def record(index: int) -> WordMaps:
    words = (Word("dog", 0, 3, "dog", "noun"),) * (index % 3)
    return WordMaps(f"{index:032x}", f"dog {index}", words, torch.full((len(words), *GRID), index / 100))


def writer(path: Path, rank: int, num_processes: int = 2, seed: int = 0) -> SharedStoreWriter:
    return SharedStoreWriter(
        path, {"seed": seed}, {}, GRID, rank=rank, num_processes=num_processes, records_per_shard=3
    )


def texts(path: Path) -> list[str]:
    return sorted(maps.text for maps in MapStore.open(path, verify=True))


def test_writers_take_turns_and_number_their_shards_in_one_row(tmp_path):
    with writer(tmp_path, 0) as first, writer(tmp_path, 1) as second:
        for index in range(10):
            assert (first, second)[index % 2].add(record(index))
    assert texts(tmp_path) == sorted(f"dog {index}" for index in range(10))
    names = sorted(path.name for path in tmp_path.glob("shard-*.parquet"))
    assert names == [f"shard-{number:05d}.parquet" for number in range(4)]
    assert first.num_doubled == second.num_doubled == (0, 0)


def test_a_record_of_two_writers_is_written_once_and_counted(tmp_path):
    with writer(tmp_path, 0) as first, writer(tmp_path, 1) as second:
        for index in (0, 1, 5):
            assert second.add(record(index))  # fills its buffer: a shard
        for index in (4, 5, 1):
            assert first.add(record(index))  # what the other has written is not known yet
        assert (record(0).image_id, "dog 0") in first  # now it is
        assert not first.add(record(0))
        with second.locked():  # now it knows what the other has written since
            assert len(second) == len(first) == 4
    assert first.num_doubled == (2, 2 + 1)  # dog 5 with two words, dog 1 with one
    assert texts(tmp_path) == ["dog 0", "dog 1", "dog 4", "dog 5"]


def test_writers_of_other_settings_do_not_mix_their_records(tmp_path):
    with writer(tmp_path, 0) as first:
        with MapStore.writer(tmp_path, {"seed": 1}, {}, GRID) as other:  # no record is there yet
            assert other.add(record(0))
        with pytest.raises(StoreError, match="seed is 1 there and 0 here"):
            for index in range(3):
                first.add(record(index))
        first._buffer.clear()
    assert texts(tmp_path) == ["dog 0"]


def test_a_store_that_was_replaced_gets_no_shard_of_the_earlier_one(tmp_path):
    with writer(tmp_path, 0) as first:
        for seed in (1, 0):  # nothing is written yet, so each takes the store for its own settings
            MapStore.writer(tmp_path, {"seed": seed}, {}, GRID).close()
        for index in range(3):
            assert first.add(record(index))
    assert texts(tmp_path) == ["dog 0", "dog 1", "dog 2"]
    with pytest.raises(StoreError, match="replaced while this command wrote"), writer(tmp_path, 0) as first:
        for path in tmp_path.iterdir():
            path.unlink()
        MapStore.writer(tmp_path, {"seed": 0}, {}, GRID).close()
        for index in range(3, 6):
            first.add(record(index))


def test_another_writer_may_die_between_its_two_files(tmp_path):
    """Its maps file without a table does not count; the next writer takes its number."""
    with writer(tmp_path, 0) as first:
        child = os.fork()
        if not child:
            with writer(tmp_path, 1) as second:
                second.add(record(0))
                original, files = os.replace, iter(range(2))

                def die_at_the_second_file(*names, **options):
                    if next(files) == 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*names, **options)

                with mock.patch.object(os, "replace", die_at_the_second_file):
                    second.flush()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert [path.name for path in tmp_path.glob("shard-*")] == ["shard-00000.safetensors"]
        first.add(record(1))
    assert texts(tmp_path) == ["dog 1"]
    with writer(tmp_path, 1) as second:
        assert (record(0).image_id, "dog 0") not in second
        second.add(record(0))
    assert texts(tmp_path) == ["dog 0", "dog 1"]


def test_together_they_verify_every_shard(tmp_path):
    with MapStore.writer(tmp_path, {"seed": 0}, {}, GRID, records_per_shard=3) as alone:
        for index in range(9):
            alone.add(record(index))
    maps = tmp_path / "shard-00001.safetensors"
    content = bytearray(maps.read_bytes())
    content[content.rindex(b"dog 4")] ^= 1
    maps.write_bytes(content)
    assert len(writer(tmp_path, 0)) == 9  # its share are the shards 0 and 2
    with pytest.raises(StoreError, match="shard-00001"):
        writer(tmp_path, 1)


def test_settings_are_compared_as_by_one_writer(tmp_path):
    writer(tmp_path, 0)
    with pytest.raises(StoreError, match="seed is 0 there and 1 here"):
        writer(tmp_path, 1, seed=1)
    with MapStore.writer(tmp_path, {"seed": 0}, {}, GRID) as alone:  # no lock was left
        alone.add(record(0))


def locked_by_another(path: Path, of_launch: bool, until: Path) -> int:
    """A process that holds the lock of a store until a file is there; its id. It has the lock on return."""
    child = os.fork()
    if not child:
        try:
            descriptor = take_lock(path, of_launch=of_launch)
            (path.parent / "locked").touch()
            while not until.exists():
                time.sleep(0.01)
            os.close(descriptor)
        finally:
            os._exit(0)
    while not (path.parent / "locked").exists():
        time.sleep(0.01)
    return child


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(store_writer, "PATIENCE", 0.1)


def test_a_writer_alone_is_refused_by_name_when_a_launch_opens_its_store(tmp_path, impatient):
    (tmp_path / "maps").mkdir()
    child = locked_by_another(tmp_path / "maps", of_launch=False, until=tmp_path / "done")
    try:
        with pytest.raises(StoreError, match=f"which process {child} is writing to. Expected one writer at a time"):
            writer(tmp_path / "maps", 0)
    finally:
        (tmp_path / "done").touch()
        os.waitpid(child, 0)
    with writer(tmp_path / "maps", 0) as first:
        assert first.add(record(0))


@pytest.mark.parametrize("of_launch", [False, True])
def test_who_is_waited_for_is_named(tmp_path, impatient, of_launch):
    """While a launch writes it waits for any process: what is buffered is not given up. It says so once."""
    first = writer(tmp_path / "maps", 0)
    assert first.add(record(0))
    child = locked_by_another(tmp_path / "maps", of_launch, until=tmp_path / "done")
    with mock.patch.object(store_writer.log, "warning", side_effect=lambda *said: (tmp_path / "done").touch()) as log:
        first.flush()
    os.waitpid(child, 0)
    log.assert_called_once_with(
        "waiting for %s, which is writing to %s",
        f"process {child}{' of a launch' if of_launch else ''}",
        tmp_path / "maps",
    )
    assert texts(tmp_path / "maps") == ["dog 0"]


def test_a_process_of_a_launch_that_opens_the_store_is_waited_for(tmp_path, impatient):
    (tmp_path / "maps").mkdir()
    child = locked_by_another(tmp_path / "maps", of_launch=True, until=tmp_path / "done")
    with (
        mock.patch.object(store_writer.log, "warning", side_effect=lambda *said: (tmp_path / "done").touch()),
        writer(tmp_path / "maps", 0) as first,
    ):
        assert first.add(record(0))
    os.waitpid(child, 0)
    assert texts(tmp_path / "maps") == ["dog 0"]
