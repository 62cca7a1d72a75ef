"""The map store: what comes back, what survives a kill, what is refused and with which words."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lavender import files
from lavender.data.store import MapStore, StoreWriter
from lavender.data.store_format import pack_shard, read_manifest
from lavender.errors import ConfigError, StoreError
from lavender.maps import Word, WordMaps
from unit.data.store_victim import GRID, IDENTITY, INFO, NUM_RECORDS, record, write

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
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest) == ["format", "store", "identity", "grid", "info", "checksum"]
    assert (manifest["format"], manifest["grid"], len(manifest["store"])) == (3, [5, 7], 32)
    assert (manifest["identity"], manifest["info"]) == ({"mode": "noise", "grid": [5, 7]}, {"teacher": "tiny"})
    stored = load_file(tmp_path / "shard-00000.safetensors")
    assert stored["maps"].shape == (2 + 0 + 1 + 2, 5, 7)
    assert stored["maps"].dtype == torch.uint8
    assert stored["scale"][:2].tolist() == [0.5, 0]
    assert stored["maps"][0, 1, 2] == 255
    assert stored["maps"][0, 4, 6] == 128  # 127.5 rounds to even
    assert stored["maps"][:2].sum() == 255 + 128
    assert stored["first_row"].tolist() == [0, 2, 2, 3]
    lines = [json.loads(line) for line in stored["records"].numpy().tobytes().splitlines()]
    red_hats = [["red", 0, 3, "red", "adjective", 0.5], ["hats", 4, 8, "hat", "noun", 0.75]]
    assert lines[:2] == [["ab", "red hats", red_hats, []], ["0" * 32, " 0", [], [["cat", "no token"]]]]
    table = pq.read_table(tmp_path / "shard-00000.parquet").to_pylist()
    hats = {"text": "hats", "start": 4, "end": 8, "lemma": "hat", "part_of_speech": "noun"}
    assert table[0]["words"][1] == hats | {"confidence": 0.75}
    nothing = {"words": [], "dropped": [{"what": "cat", "reason": "no token"}]}
    assert table[1] == {"image_id": "0" * 32, "text": " 0", **nothing}
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
    source = Path(__file__).parents[3] / "src"
    result = subprocess.run(
        # the victim forks on purpose; from 3.12 on Python warns of that in a process with threads
        [sys.executable, "-W", "ignore::DeprecationWarning", victim, tmp_path / "killed"],
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
    (tmp_path / ".tmp-manifest.json-0123456789abcdef").write_text("{")
    assert len(MapStore.open(fill(tmp_path))) == 11


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_map_file(tmp_path):
    maps = fill(tmp_path) / "shard-00001.safetensors"
    flip(maps, -1)
    opened = MapStore.open(tmp_path)
    assert opened.get(RECORDS[0].image_id, RECORDS[0].text) is not None
    for action in (lambda: list(opened), lambda: MapStore.open(tmp_path, verify=True), lambda: writer(tmp_path)):
        message = failure(action)
        assert (
            f"Got shard-00001 of {tmp_path}, which is damaged: the checksum of record 3 of shard-00001.saf" in message
        )
        assert "Do this: delete shard-00001.parquet and shard-00001.safetensors and extract again" in message
    size = maps.stat().st_size
    maps.write_bytes(maps.read_bytes()[:-9])
    assert f"shard-00001.safetensors: it has {size - 9} bytes, expected {size}" in failure(MapStore.open, tmp_path)
    maps.unlink()
    for action in (MapStore.open, writer):  # a record without its maps does not count as done
        assert "shard-00001.safetensors is missing" in failure(action, tmp_path)
    (tmp_path / "shard-00001.parquet").unlink()
    message = failure(MapStore.open, tmp_path)
    assert f"Got {tmp_path}, which has 2 shards up to number 2 and none of number 1." in message
    with writer(tmp_path) as store:  # what the messages say to do
        assert [store.add(one) for one in RECORDS] == [False] * 4 + [True] * 4 + [False] * 3
    assert [one.text for one in MapStore.open(tmp_path, verify=True)] == [one.text for one in RECORDS]


def test_a_damaged_table(tmp_path):
    table = fill(tmp_path) / "shard-00002.parquet"
    whole = table.read_bytes()
    flip(table, 40)
    assert f"shard-00002 of {tmp_path}, which is damaged: the checksum of shard-00002.parquet" in failure(
        MapStore.open, tmp_path
    )
    assert "shard-00002" in failure(writer, tmp_path)
    table.write_bytes(whole[: len(whole) // 2])
    assert "shard-00002" in failure(MapStore.open, tmp_path)
    pq.write_table(pq.read_table(tmp_path / "shard-00001.parquet").select(["text"]), table)
    assert "shard-00002" in failure(MapStore.open, tmp_path)
    table.write_bytes(whole)
    assert len(MapStore.open(tmp_path)) == 11


def same_as(records: list[WordMaps], store: MapStore) -> bool:
    found = list(store)
    return len(found) == len(records) and all(
        (one.image_id, one.text, one.words, one.dropped) == (other.image_id, other.text, other.words, other.dropped)
        and torch.equal(one.maps, other.maps)
        and torch.equal(one.confidence, other.confidence)
        for one, other in zip(found, records, strict=True)
    )


def test_no_flipped_bit_gives_another_record(tmp_path):
    fill(tmp_path)
    files = [tmp_path / name for name in names(tmp_path) if name != "writer.lock"]
    before = list(MapStore.open(tmp_path))
    identity, chance, noticed = MapStore.open(tmp_path).identity, random.Random(0), 0
    for _ in range(300):
        file = chance.choice(files)
        whole = file.read_bytes()
        changed, place = bytearray(whole), chance.randrange(len(whole))
        changed[place] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        try:
            store = MapStore.open(tmp_path)
            assert (same_as(before, store), store.identity, store.info, store.grid) == (True, identity, INFO, GRID), (
                file.name,
                place,
            )
        except StoreError:
            noticed += 1
        file.write_bytes(whole)
    assert noticed >= 290  # what is left: spaces that pad a header


def test_every_byte_of_the_manifest_counts(tmp_path):
    path = fill(tmp_path) / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for changed in (whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :], whole[:place]):
            path.write_bytes(changed)
            assert "manifest.json" in failure(MapStore.open, tmp_path)
    path.write_bytes(whole)
    assert len(MapStore.open(tmp_path)) == 11


def swap(first: Path, second: Path) -> None:
    ours, theirs = first.read_bytes(), second.read_bytes()
    first.write_bytes(theirs)
    second.write_bytes(ours)


def test_shards_in_another_place_are_refused(tmp_path):
    ours, theirs = fill(tmp_path / "ours"), fill(tmp_path / "theirs")
    for kinds in (["safetensors"], ["parquet"], ["safetensors", "parquet"]):
        for kind in kinds:
            swap(ours / f"shard-00000.{kind}", ours / f"shard-00001.{kind}")
        assert "shard-00000" in failure(MapStore.open, ours)
        for kind in kinds:
            swap(ours / f"shard-00000.{kind}", ours / f"shard-00001.{kind}")
        for kind in kinds:
            swap(ours / f"shard-00001.{kind}", theirs / f"shard-00001.{kind}")
        assert "shard-00001" in failure(MapStore.open, ours)
        for kind in kinds:
            swap(ours / f"shard-00001.{kind}", theirs / f"shard-00001.{kind}")
    assert len(MapStore.open(ours, verify=True)) == 11
    swap(ours / "manifest.json", theirs / "manifest.json")
    message = failure(MapStore.open, ours)
    assert f"Got {ours / 'shard-00000.safetensors'}, which was written as a shard of another store." in message
    assert "Do this: put the files back where they were written, or delete shard-00000.parquet and shard-" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors["scale"].fill_(1e30),
        lambda tensors: tensors["scale"].neg_(),
        lambda tensors: tensors["maps"].copy_(tensors["maps"].flip(0)),
        lambda tensors: tensors.update(maps=tensors["maps"].float()),
        lambda tensors: tensors.update(maps=tensors["maps"].reshape(-1, 7, 5).contiguous()),
        lambda tensors: tensors.update(maps=tensors["maps"][:-1].contiguous()),
        lambda tensors: tensors["first_row"].add_(1),
        lambda tensors: tensors.pop("scale"),
    ],
)
@pytest.mark.parametrize("keeps_metadata", [True, False])
def test_a_rewritten_map_file_is_refused(tmp_path, change, keeps_metadata):
    path = fill(tmp_path, RECORDS[1:4]) / "shard-00000.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata if keeps_metadata else None)
    assert "shard-00000" in failure(lambda: list(MapStore.open(tmp_path)))


@pytest.mark.parametrize("scale", [1e30, -1.0, math.nan, math.inf])
def test_a_scale_out_of_range_is_refused_even_with_its_checksum(tmp_path, scale):
    fill(tmp_path, RECORDS[1:2])
    stored = np.zeros((1, *GRID), np.uint8), np.array([scale], np.float32)
    files = pack_shard(read_manifest(tmp_path), 0, [(RECORDS[1], *stored)])
    for kind, content in zip(("safetensors", "parquet"), files, strict=True):
        (tmp_path / f"shard-00000.{kind}").write_bytes(content)
    assert "record 0: a scale or confidence of " in failure(lambda: list(MapStore.open(tmp_path)))


def test_reading_gives_the_numbers_of_the_formula_to_the_bit(tmp_path):
    fill(tmp_path, RECORDS[3:4])
    stored = load_file(tmp_path / "shard-00000.safetensors")
    expected = stored["maps"].float() / 255 * stored["scale"][:, None, None]
    assert torch.equal(next(iter(MapStore.open(tmp_path))).maps, expected)


@pytest.mark.parametrize("confidence", [math.nan, math.inf, -1.0, 1.5])
def test_a_confidence_out_of_range_is_refused(tmp_path, confidence):
    one = RECORDS[2]
    wrong = WordMaps(one.image_id, one.text, one.words, one.maps, confidence=torch.tensor([0.5, confidence]))
    with writer(tmp_path) as store:
        assert f"the confidences [0.5, {confidence}] for 'dog hat 2'. Expected each in [0, 1]" in failure(
            store.add, wrong
        )
        assert store.add(one)
    assert len(MapStore.open(tmp_path)) == 1


def test_a_text_that_looks_like_a_checksum_is_a_text(tmp_path):
    texts = ["blake2b:" + "0" * 32, "", "blake2b:"]
    fill(tmp_path, [WordMaps("ab", text, (), torch.zeros(0, *GRID)) for text in texts])
    assert [one.text for one in MapStore.open(tmp_path, verify=True)] == texts
    assert pq.read_table(tmp_path / "shard-00000.parquet")["text"].to_pylist() == texts


def test_half_a_character_is_refused(tmp_path):
    with writer(tmp_path) as store:
        message = failure(store.add, WordMaps("ab", "a \ud800 dog", (), torch.zeros(0, *GRID)))
        assert "half a character" in message
        assert message.isascii()
        assert ("ab", "a \ud800 dog") not in store
        assert store.add(WordMaps("ab", "🐶 ist größer", (Word("🐶", 0, 1, "🐶", "noun"),), torch.ones(1, *GRID)))
    store = MapStore.open(tmp_path)
    assert store.get("ab", "a \ud800 dog") is None
    assert store.get("ab", "🐶 ist größer") is not None


@pytest.mark.parametrize(
    "name",
    [
        "writer.lock",
        "manifest.json",
        "extraction.json",
        ".tmp-manifest.json",
        ".tmp-shard-00003.safetensors",
        "shard-00003.safetensors",
        "shard-00003.parquet",
    ],
)
@pytest.mark.parametrize("begun", [True, False])
def test_a_planted_link_is_named_and_not_followed(tmp_path, name, begun):
    victim, store = tmp_path / "victim", tmp_path / "maps"
    victim.write_text("precious")
    if begun:
        fill(store)
        (store / name).unlink(missing_ok=True)
    else:
        store.mkdir()
    (store / name).symlink_to(victim)
    assert f"{store / name}, which is a link" in failure(writer, store)
    assert victim.read_text() == "precious"


def test_a_lock_that_is_another_files_name_is_not_written(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "writer.lock").hardlink_to(tmp_path / "victim")
    assert "another file's second name" in failure(writer, tmp_path / "maps")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_store_behind_a_link_is_a_store(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "maps")
    assert "cannot be written" in failure(writer, tmp_path / "link")  # it leads nowhere yet
    (tmp_path / "maps").mkdir()
    fill(tmp_path / "link")
    assert len(MapStore.open(tmp_path / "link", verify=True)) == 11


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.parquet", "shard-00001.safetensors"])
def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path, name):
    (fill(tmp_path) / name).unlink()
    os.mkfifo(tmp_path / name)
    assert name.split(".")[0] in failure(lambda: list(MapStore.open(tmp_path)))
    assert f"{name}, which is no file" in failure(writer, tmp_path)


def test_a_full_disk_names_the_place_and_what_is_kept(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fill(tmp_path, RECORDS[:4])
    with writer(tmp_path) as store:
        for one in RECORDS[4:7]:
            store.add(one)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            message = failure(store.add, RECORDS[7])
        assert f"Got {tmp_path / 'shard-00001.parquet'}, which cannot be written: No space left on device" in message
        assert "the 4 records written before are whole, the last 4 are not written" in message
        assert not [name for name in names(tmp_path) if name.startswith(".tmp-")]
        assert len(MapStore.open(tmp_path, verify=True)) == 4
    assert len(MapStore.open(tmp_path, verify=True)) == 8  # there was space again when the writer was left
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        message = failure(writer, tmp_path / "new")
    assert f"Got {tmp_path / 'new'}, which cannot be written" in message


@pytest.mark.parametrize("grid", [(2.5, 3), "ab", (3,), 3, (True, 3), (0, 3)])
def test_a_grid_that_is_none_is_refused(tmp_path, grid):
    with pytest.raises(ConfigError, match="whole numbers"):
        writer(tmp_path, grid=grid)


@pytest.mark.parametrize("identity", [{"seed": math.nan}, {"path": Path("a")}])
def test_settings_that_json_cannot_hold_are_refused(tmp_path, identity):
    with pytest.raises(ConfigError, match="settings of a map store"):
        writer(tmp_path, identity)


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


def test_a_store_without_a_record_takes_the_settings_of_its_next_writer(tmp_path):
    with writer(tmp_path, {"mode": "ddim"}, grid=(2, 2)):
        pass
    fill(tmp_path)
    assert len(MapStore.open(tmp_path, verify=True)) == len(RECORDS)
    assert MapStore.open(tmp_path).identity["mode"] == "noise"


def test_a_store_without_a_version_takes_that_of_its_next_writer(tmp_path):
    """Of an earlier release, or of a pipeline in memory. From then on it refuses other versions."""
    fill(tmp_path)
    for key in ("teacher_version", "tiny_vae_version"):
        with writer(tmp_path, IDENTITY | {key: "1"}):
            pass
        assert MapStore.open(tmp_path, verify=True).identity[key] == "1"
        assert f"{key} is '1' there and '2' here" in failure(writer, tmp_path, IDENTITY | {key: "2"})
    with writer(tmp_path):  # its version is not known
        pass
    assert MapStore.open(tmp_path).identity["teacher_version"] == "1"


def test_settings_that_the_mode_does_not_read_are_not_compared(tmp_path):
    """Earlier releases took `--mode ddim --seed 4`, and recorded the seed."""
    old = {"mode": "ddim", "num_steps": 10, "seed": 4, "timesteps": [50]}
    with writer(tmp_path, old) as store:
        store.add(RECORDS[0])
    with writer(tmp_path, old | {"seed": 0}) as store:
        store.add(RECORDS[1])
    assert len(MapStore.open(tmp_path, verify=True)) == 2
    message = failure(writer, tmp_path, old | {"num_steps": 20, "seed": 0})
    assert "num_steps is 10 there and 20 here" in message
    assert "seed" not in message
    message = failure(writer, tmp_path, old | {"mode": "noise", "seed": 0})  # which reads it
    assert "seed is 4 there and 0 here" in message


def test_one_writer_at_a_time(tmp_path):
    with writer(tmp_path):
        message = failure(writer, tmp_path)
        assert f"Got {tmp_path}, which process {os.getpid()} is writing to. Expected one writer at a time" in message
    with writer(tmp_path):
        pass


def test_the_lock_of_another_process_ends_with_it(tmp_path):
    ready, child_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store = writer(tmp_path)
            os.write(child_end, b"locked")
            while len(store) == 0:
                signal.pause()
        finally:
            os._exit(1)
    os.close(child_end)
    assert os.read(ready, 6) == b"locked"
    assert f"Got {tmp_path}, which process {child} is writing to" in failure(writer, tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with writer(tmp_path) as store:
        assert store.add(RECORDS[1])
    assert (tmp_path / "writer.lock").read_text() == str(os.getpid())


def test_a_holder_that_cannot_be_read_is_another_process(tmp_path, monkeypatch):
    """As on Windows, where nobody else may read a locked file."""

    def denied(descriptor: int, size: int) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    with writer(tmp_path):
        monkeypatch.setattr("os.read", denied)
        assert f"Got {tmp_path}, which another process is writing to. Expected one writer" in failure(writer, tmp_path)


def test_reading_without_pread(tmp_path, monkeypatch):
    """Windows has none."""
    monkeypatch.setattr("lavender.data.store_format.read_at", files._seek_and_read)
    store = MapStore.open(fill(tmp_path), verify=True)
    for given in reversed(RECORDS):
        assert_same(store.get(given.image_id, given.text), given)


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
    (tmp_path / "manifest.json").write_text('{"format": 4}')
    assert "in format 4. Expected format 3. Do this: use the release that wrote it" in failure(MapStore.open, tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 2, "identity": {}, "grid": [5, 7], "info": {}}')
    assert "in format 2. Expected format 3. Do this: make the store again in another folder" in failure(
        writer, tmp_path
    )


def test_maps_that_are_not_heat_on_the_grid_are_refused(tmp_path):
    word = (Word("dog", 0, 3, "dog", "noun"),)
    with writer(tmp_path) as store:
        message = failure(store.add, WordMaps("ab", "dog", word, torch.zeros(1, 7, 5)))
        assert f"maps on a grid of (7, 5) for 'dog'. Expected the grid (5, 7) of {tmp_path}" in message
        message = failure(store.add, WordMaps("ab", "dog", word, torch.full((1, 5, 7), 1.5)))
        assert "maps from 1.5 to 1.5 for 'dog'. Expected heat in [0, 1]" in message
        assert "from nan to nan" in failure(store.add, WordMaps("ab", "dog", word, torch.full((1, 5, 7), torch.nan)))
        assert store.add(WordMaps("ab", "dog", word, torch.zeros(1, 5, 7)))
