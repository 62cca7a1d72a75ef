"""The map store: what comes back, what survives a kill, what is refused and with which words."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from lavender.errors import StoreError
from lavender.maps import Word, WordMaps
from lavender.store import MapStore, StoreWriter
from unit.store_victim import GRID, IDENTITY, INFO, NUM_RECORDS, record, write

RECORDS = [record(index) for index in range(11)]


def writer(path: Path, identity=IDENTITY, grid=GRID, records_per_shard=4) -> StoreWriter:
    return MapStore.writer(path, identity, INFO, grid, records_per_shard)


def fill(path: Path, records=RECORDS) -> Path:
    with writer(path) as store:
        assert all(store.add(one) for one in records)
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def assert_same(got: WordMaps | None, given: WordMaps) -> None:
    assert got is not None
    fields = ("image_id", "text", "words", "dropped")
    assert [getattr(got, name) for name in fields] == [getattr(given, name) for name in fields]
    assert got.maps.dtype == torch.float32
    assert got.maps.shape == given.maps.shape
    assert torch.allclose(got.maps, given.maps, rtol=0, atol=0.5 / 255 + 1e-6)


def failure(action, *args, **kwargs) -> str:
    with pytest.raises(StoreError) as caught:
        action(*args, **kwargs)
    return str(caught.value)


def test_what_goes_in_comes_back(tmp_path):
    store = MapStore.open(fill(tmp_path / "new" / "maps"), verify=True)
    assert len(store) == 11
    assert store.num_words == sum(index % 4 for index in range(11)) == 15
    assert store.grid == (5, 7)
    assert store.identity == {"mode": "noise", "grid": [5, 7]}
    assert store.info == INFO
    for got, given in zip(store, RECORDS, strict=True):
        assert_same(got, given)
    for given in reversed(RECORDS):
        assert (given.image_id, given.text) in store
        assert_same(store.get(given.image_id, given.text), given)
    assert store.get(RECORDS[0].image_id, "another text") is None
    assert (RECORDS[0].image_id, RECORDS[1].text) not in store
    copy = pickle.loads(pickle.dumps(store))
    assert_same(copy.get(RECORDS[3].image_id, RECORDS[3].text), RECORDS[3])


def test_layout_on_disk(tmp_path):
    maps = torch.zeros(2, 5, 7)
    maps[0, 1, 2], maps[0, 4, 6] = 0.5, 0.25
    words = (Word("red", 0, 3, "red", "adjective"), Word("hats", 4, 8, "hat", "noun"))
    fill(tmp_path, [WordMaps("ab", "red hats", words, maps, confidence=torch.tensor([0.5, 0.75])), *RECORDS[:4]])
    assert names(tmp_path) == [
        "manifest.json",
        *(f"shard-0000{number}.{kind}" for number in (0, 1) for kind in ("parquet", "safetensors")),
        "writer.lock",
    ]
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "format": 2,
        "identity": {"mode": "noise", "grid": [5, 7]},
        "grid": [5, 7],
        "info": {"teacher": "tiny"},
    }
    stored = load_file(tmp_path / "shard-00000.safetensors")
    assert stored["maps"].shape == (2 + 0 + 1 + 2, 5, 7)
    assert stored["maps"].dtype == torch.uint8
    assert stored["scale"][:2].tolist() == [0.5, 0]
    assert stored["maps"][0, 1, 2] == 255
    assert stored["maps"][0, 4, 6] == 128  # 127.5 rounds to even
    assert stored["maps"][:2].sum() == 255 + 128
    index = pq.read_table(tmp_path / "shard-00000.parquet").to_pylist()
    assert [row["first_row"] for row in index] == [0, 2, 2, 3]
    hats = {"text": "hats", "start": 4, "end": 8, "lemma": "hat", "part_of_speech": "noun"}
    assert index[0]["words"][1] == hats | {"confidence": 0.75}
    assert index[1] == {
        "image_id": "0" * 32,
        "text": " 0",
        "first_row": 2,
        "words": [],
        "dropped": [{"what": "cat", "reason": "no token"}],
    }
    read = next(iter(MapStore.open(tmp_path)))
    assert read.maps[0, 1, 2] == 0.5  # a maximum is exact
    assert read.confidence.tolist() == [0.5, 0.75]


def test_small_heat_is_as_exact_as_large(tmp_path):
    maps = torch.rand((1, *GRID), generator=torch.Generator().manual_seed(7)) * 0.01
    fill(tmp_path, [WordMaps("ab", "dog", (Word("dog", 0, 3, "dog", "noun"),), maps)])
    stored = next(iter(MapStore.open(tmp_path))).maps
    assert torch.allclose(stored, maps, rtol=0, atol=0.01 / 255 / 2 + 1e-8)


def test_a_store_without_words_and_a_store_without_records(tmp_path):
    store = MapStore.open(fill(tmp_path / "a", [RECORDS[0]]), verify=True)
    assert (len(store), store.num_words) == (1, 0)
    assert_same(store.get(RECORDS[0].image_id, RECORDS[0].text), RECORDS[0])
    store = MapStore.open(fill(tmp_path / "b", []))
    assert (len(store), store.num_words, list(store)) == (0, 0, [])


def test_a_record_is_added_once(tmp_path):
    with writer(tmp_path) as store:
        assert store.add(RECORDS[1])
        assert not store.add(RECORDS[1])  # still buffered
        store.flush()
        assert not store.add(RECORDS[1])
    with writer(tmp_path) as store:
        assert (RECORDS[1].image_id, RECORDS[1].text) in store
        assert (RECORDS[2].image_id, RECORDS[2].text) not in store
        assert not store.add(RECORDS[1])
        assert store.add(RECORDS[2])
    assert [one.text for one in MapStore.open(tmp_path)] == [RECORDS[1].text, RECORDS[2].text]


def test_a_reader_sees_flushed_shards_while_a_writer_works(tmp_path):
    with writer(tmp_path) as store:
        for one in RECORDS[:6]:
            store.add(one)
        assert len(MapStore.open(tmp_path)) == 4
        store.flush()
        assert len(MapStore.open(tmp_path)) == 6


def test_an_exception_loses_no_record(tmp_path):
    def interrupted() -> None:
        with writer(tmp_path) as store:
            for one in RECORDS[:5]:
                store.add(one)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(MapStore.open(tmp_path, verify=True)) == 5
    fill(tmp_path, RECORDS[5:])  # and the lock is free


def test_kill_9_and_resume_equals_an_undisturbed_run(tmp_path):
    write(tmp_path / "calm")
    calm = MapStore.open(tmp_path / "calm")
    victim = Path(__file__).with_name("store_victim.py")
    source = Path(__file__).parents[2] / "src"
    result = subprocess.run(
        [sys.executable, victim, tmp_path / "killed"],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    codes = json.loads(result.stdout)
    assert codes["at_rename"] == [-signal.SIGKILL] * 6
    assert -signal.SIGKILL in codes["at_random"]
    assert codes["left_alone"] == [0]
    killed = MapStore.open(tmp_path / "killed", verify=True)
    assert len(killed) == NUM_RECORDS
    assert names(tmp_path / "killed") == names(tmp_path / "calm")
    for one, other in zip(killed, calm, strict=True):
        assert (one.image_id, one.text, one.words, one.dropped) == (
            other.image_id,
            other.text,
            other.words,
            other.dropped,
        )
        assert torch.equal(one.maps, other.maps)


def test_leftovers_of_a_kill_are_not_seen_and_are_removed(tmp_path):
    fill(tmp_path, RECORDS[:4])
    (tmp_path / ".tmp-shard-00001.safetensors").write_bytes(b"half")
    (tmp_path / "shard-00001.safetensors").write_bytes(b"a shard without its index")
    assert len(MapStore.open(tmp_path, verify=True)) == 4
    with writer(tmp_path):
        assert names(tmp_path) == ["manifest.json", "shard-00000.parquet", "shard-00000.safetensors", "writer.lock"]
    for name in names(tmp_path):
        (tmp_path / name).unlink()
    (tmp_path / "writer.lock").touch()  # killed before there was a manifest
    (tmp_path / ".tmp-manifest.json").write_text("{")
    assert len(MapStore.open(fill(tmp_path))) == 11


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_map_file(tmp_path):
    maps = fill(tmp_path) / "shard-00001.safetensors"
    flip(maps, -1)
    message = failure(MapStore.open, tmp_path, verify=True)
    assert f"Got shard-00001 of {tmp_path}, which is damaged: the checksum of shard-00001.safetensors" in message
    assert "Do this: delete shard-00001.parquet and shard-00001.safetensors and extract again" in message
    maps.write_bytes(maps.read_bytes()[:-9])
    assert "shard-00001 of" in failure(list, MapStore.open(tmp_path))
    maps.unlink()
    assert "shard-00001.safetensors is missing" in failure(MapStore.open, tmp_path, verify=True)
    assert "shard-00001 of" in failure(list, MapStore.open(tmp_path))
    (tmp_path / "shard-00001.parquet").unlink()
    with writer(tmp_path) as store:  # what the message says to do
        assert [store.add(one) for one in RECORDS] == [False] * 4 + [True] * 4 + [False] * 3
    assert len(MapStore.open(tmp_path, verify=True)) == 11


def test_a_damaged_index(tmp_path):
    index = fill(tmp_path) / "shard-00002.parquet"
    whole = index.read_bytes()
    flip(index, 40)
    assert f"shard-00002 of {tmp_path}, which is damaged" in failure(MapStore.open, tmp_path)
    assert "shard-00002" in failure(writer, tmp_path)
    index.write_bytes(whole[: len(whole) // 2])
    assert "shard-00002" in failure(MapStore.open, tmp_path)
    pq.write_table(pq.read_table(tmp_path / "shard-00001.parquet").select(["text"]), index)
    assert "its columns are ['text']" in failure(MapStore.open, tmp_path)
    index.write_bytes(whole)
    assert len(MapStore.open(tmp_path)) == 11


def test_a_store_of_other_settings_is_refused(tmp_path):
    fill(tmp_path)
    message = failure(writer, tmp_path, {"mode": "ddim", "grid": (7, 5), "steps": 10}, (7, 5))
    assert f"the store {tmp_path}, made with other settings: " in message
    assert "grid is [5, 7] there and [7, 5] here" in message
    assert "mode is 'noise' there and 'ddim' here" in message
    assert "steps is '(not set)' there and 10 here" in message
    assert "choose another folder" in message
    with writer(tmp_path) as store:  # the refusal left no lock, and info may differ
        assert not store.add(RECORDS[0])


def test_one_writer_at_a_time(tmp_path):
    with writer(tmp_path):
        message = failure(writer, tmp_path)
        assert f"Got {tmp_path}, which process {os.getpid()} is writing to. Expected one writer at a time" in message
    with writer(tmp_path):
        pass


def test_a_folder_that_is_no_store(tmp_path):
    (tmp_path / "thesis.tex").touch()
    message = failure(writer, tmp_path)
    assert f"Got {tmp_path}, which holds 'thesis.tex' and no manifest.json" in message
    assert "Do this: choose another folder" in message
    assert names(tmp_path) == ["thesis.tex"]
    assert "which is a file" in failure(writer, tmp_path / "thesis.tex")
    assert f"{tmp_path}, which has no manifest.json. Expected the folder of a map store" in failure(
        MapStore.open, tmp_path
    )
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    assert "manifest.json, which is damaged: KeyError('format')" in failure(MapStore.open, tmp_path)
    assert "thesis.tex" in names(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 3}')
    assert "in format 3. Expected format 2. Do this: use the release that wrote it" in failure(MapStore.open, tmp_path)


def test_maps_that_are_not_heat_on_the_grid_are_refused(tmp_path):
    word = (Word("dog", 0, 3, "dog", "noun"),)
    with writer(tmp_path) as store:
        message = failure(store.add, WordMaps("ab", "dog", word, torch.zeros(1, 7, 5)))
        assert f"maps on a grid of (7, 5) for 'dog'. Expected the grid (5, 7) of {tmp_path}" in message
        message = failure(store.add, WordMaps("ab", "dog", word, torch.full((1, 5, 7), 1.5)))
        assert "maps from 1.5 to 1.5 for 'dog'. Expected heat in [0, 1]" in message
        assert "from nan to nan" in failure(store.add, WordMaps("ab", "dog", word, torch.full((1, 5, 7), torch.nan)))
        assert store.add(WordMaps("ab", "dog", word, torch.zeros(1, 5, 7)))
