"""Verifying, counting, merging and converting map stores."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset, load_from_disk

from command_line import complaint, lavender
from lavender.cli.main import DONE, FAILED
from lavender.data import store_table
from lavender.data.store import MapStore
from lavender.data.store_table import FACTS, export_table, import_table
from lavender.data.store_tools import merge, stats, verify
from lavender.errors import StoreError
from lavender.maps import Word, WordMaps
from unit.data.store_victim import GRID, IDENTITY, INFO, record

RECORDS = [record(index) for index in range(11)]  # 0 to 3 words each, 15 in all; records 0, 3, 6 and 9 left out a word


def fill(path: Path, records, identity=IDENTITY, info=INFO) -> Path:
    with MapStore.writer(path, identity, info, GRID, records_per_shard=4) as writer:
        assert all(writer.add(one) for one in records)
    return path


@pytest.fixture
def store(tmp_path) -> Path:
    return fill(tmp_path / "maps", RECORDS)


def content(path: Path) -> dict:
    """All of a store's records, by image and text."""
    return {
        (one.image_id, one.text): (one.words, one.dropped, one.maps.tolist(), one.confidence.tolist())
        for one in MapStore.open(path, verify=True)
    }


# verify


def test_a_whole_store_has_no_fault(store):
    assert verify(store) == (found := verify(store))
    assert (found.records, found.words, found.faults) == (11, 15, ())
    ran = lavender("store", "verify", store)
    assert ran.code == DONE
    assert ran.out == f"{store}: 11 records with 15 word maps, whole\n"


def test_every_fault_of_every_store_is_named(store, tmp_path):
    """A flipped bit in one record, a cut table of another shard, a missing shard: the rest is still counted."""
    other = fill(tmp_path / "other", RECORDS[:2])
    first = store / "shard-00000.safetensors"
    flipped = bytearray(first.read_bytes())
    begin = flipped.index(b'["0000')
    flipped[begin + 5] ^= 1
    first.write_bytes(flipped)
    (store / "shard-00001.parquet").unlink()
    table = store / "shard-00002.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    found = verify(store)
    assert found.records == 3  # of the first shard's four
    assert [
        next(part for part in ("shard 1 is missing", "record 0", "shard-00002") if part in fault)
        for fault in found.faults
    ] == ["shard 1 is missing", "record 0", "shard-00002"]
    ran = lavender("store", "verify", other, store)
    assert f"{other}: 2 records with 1 word maps, whole" in ran.out
    assert f"{store}: 3 records" in ran.out
    assert all(fault in ran.out for fault in found.faults)
    assert "Got 3 faults." in complaint(ran, FAILED)


def test_what_is_no_store_cannot_be_verified(tmp_path):
    assert "which has no manifest.json" in complaint(lavender("store", "verify", tmp_path), FAILED)


# stats


def test_stats_count_what_was_added(tmp_path):
    words = (Word("dog", 2, 5, "dog", "noun"), Word("red", 9, 12, "red", "adjective"))
    sure = torch.tensor([0.25, 0.75])
    same_image = WordMaps(RECORDS[0].image_id, "a dog is red", words, torch.ones(2, *GRID), confidence=sure)
    store = fill(tmp_path / "maps", [*RECORDS, same_image])
    found = stats(store)
    counts = {name: found[name] for name in ("records", "images", "words", "lemmas", "grid")}
    assert counts == {"records": 12, "images": 11, "words": 17, "lemmas": 4, "grid": [5, 7]}
    # texts with 0, 1, 2 and 3 words: 3, 3, 4 and 2
    assert found["words_per_text"] == {"mean": 1.417, "min": 0, "10%": 0, "median": 2, "90%": 3, "max": 3}
    assert found["parts_of_speech"] == {"noun": 16, "adjective": 1}
    assert found["most_frequent"] == {"dog": 9, "hat": 5, "sky": 2, "red": 1}
    assert found["left_out"] == {"no token": 4}
    assert found["confidence"] == {"mean": 0.941, "min": 0.25, "10%": 1, "median": 1, "90%": 1, "max": 1}
    assert found["bytes"] == sum(file.stat().st_size for file in store.glob("shard-*"))
    assert found["identity"] == MapStore.open(store).identity
    assert json.loads(lavender("store", "stats", store, "--json").out) == found
    assert "parts of speech: noun 16, adjective 1\n" in lavender("store", "stats", store).out


def test_stats_of_an_empty_store(tmp_path):
    found = stats(fill(tmp_path / "maps", []))
    assert (found["records"], found["images"], found["words_per_text"], found["confidence"]) == (0, 0, None, None)


# merge


def test_a_merge_has_every_record_once(tmp_path):
    first = fill(tmp_path / "first", RECORDS[:6], info={"teacher": "tiny", "version": "1"})
    second = fill(tmp_path / "second", RECORDS[4:], info={"teacher": "tiny", "version": "2"})
    ran = lavender("store", "merge", first, second, "--out", tmp_path / "all")
    assert ran.code == DONE
    assert "11 records" in ran.out
    assert "11 added, 2 were in an earlier store" in ran.out
    whole = fill(tmp_path / "whole", RECORDS)
    assert content(tmp_path / "all") == content(whole)
    assert MapStore.open(tmp_path / "all").info == {"teacher": "tiny", "version": ["1", "2"]}
    again = merge([first, second], tmp_path / "all")  # goes on where it was, here at its end
    assert (again.records, again.added, again.repeated) == (11, 0, 13)


@pytest.mark.parametrize("change", ["maps", "words", "confidence"])
def test_different_maps_of_the_same_text_are_refused_before_anything_is_written(tmp_path, change):
    one = RECORDS[3]
    other = {
        "maps": dataclasses.replace(one, maps=(one.maps + 3 / 255).clamp_max(1)),
        "words": dataclasses.replace(one, words=one.words[:2], maps=one.maps[:2], confidence=one.confidence[:2]),
        "confidence": dataclasses.replace(one, confidence=one.confidence - 0.02),
    }[change]
    first, second = fill(tmp_path / "first", RECORDS[:6]), fill(tmp_path / "second", [other, RECORDS[7]])
    with pytest.raises(StoreError, match="1 of 1 repeated records that differ") as caught:
        merge([first, second], tmp_path / "all")
    assert repr(one.text) in caught.value.got
    assert not (tmp_path / "all").exists()


def test_what_rounding_leaves_is_no_difference(tmp_path):
    near = dataclasses.replace(RECORDS[3], maps=(RECORDS[3].maps - 0.9 / 255).clamp_min(0))
    first, second = fill(tmp_path / "first", RECORDS[:6]), fill(tmp_path / "second", [near])
    assert merge([first, second], tmp_path / "all").repeated == 1
    assert content(tmp_path / "all") == content(first)  # of the first store


def test_stores_of_other_settings_are_not_merged(tmp_path):
    first = fill(tmp_path / "first", RECORDS[:2])
    second = fill(tmp_path / "second", RECORDS[2:4], identity=IDENTITY | {"mode": "ddim"})
    with pytest.raises(StoreError, match="mode is 'noise' and 'ddim'"):
        merge([first, second], tmp_path / "all")
    with pytest.raises(StoreError, match="mode is 'ddim' and 'noise'"):
        merge([first], second)
    assert not (tmp_path / "all").exists()
    assert len(MapStore.open(second)) == 2


# tables


@pytest.mark.parametrize("format_name", ["parquet", "arrow"])
def test_a_table_and_back_is_the_same_store(store, tmp_path, format_name, monkeypatch):
    monkeypatch.setattr(store_table, "ROWS_PER_FILE", 4)
    table = tmp_path / "table"
    ran = lavender("store", "export", store, "--out", table, "--format", format_name)
    assert ran.out == f"11 records written to {table}\n", ran.err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    ran = lavender("store", "import", table, "--out", tmp_path / "again")
    assert ran.out == f"11 records written to {tmp_path / 'again'}\n", ran.err
    assert content(tmp_path / "again") == content(store)
    opened, again = MapStore.open(store), MapStore.open(tmp_path / "again")
    assert (again.identity, again.info, again.grid) == (opened.identity, opened.info, opened.grid)


def test_datasets_reads_a_table(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_table, "ROWS_PER_FILE", 4)
    export_table(store, tmp_path / "parquet")
    files = sorted(path.name for path in (tmp_path / "parquet" / "data").iterdir())
    assert files == [f"train-0000{index}-of-00003.parquet" for index in range(3)]
    export_table(store, tmp_path / "arrow", "arrow")
    cache = str(tmp_path / "cache")
    from_hub = load_dataset(str(tmp_path / "parquet"), split="train", cache_dir=cache)  # by the card's own settings
    tables: list[Any] = [from_hub, load_from_disk(tmp_path / "arrow")]
    for table in tables:
        for row, given in zip(table.with_format("numpy"), RECORDS, strict=True):
            assert (row["image_id"], row["text"]) == (given.image_id, given.text)
            assert [(word["text"], word["start"]) for word in row["words"]] == [
                (word.text, word.start) for word in given.words
            ]
            scale = np.array([word["scale"] for word in row["words"]]).reshape(-1, 1, 1)
            assert np.allclose(row["maps"] / 255 * scale, given.maps.numpy(), rtol=0, atol=0.5 / 255 + 1e-6)


def test_an_empty_store_goes_there_and_back(tmp_path):
    empty = fill(tmp_path / "maps", [])
    assert export_table(empty, tmp_path / "table") == 0
    assert import_table(tmp_path / "table", tmp_path / "again") == 0
    assert len(MapStore.open(tmp_path / "again")) == 0


@pytest.mark.parametrize("damage", ["a file is missing", "a file is cut", "no facts", "a map of another size"])
def test_a_table_that_is_not_whole_is_refused(store, tmp_path, damage, monkeypatch):
    monkeypatch.setattr(store_table, "ROWS_PER_FILE", 4)
    table = tmp_path / "table"
    export_table(store, table)
    file = table / "data" / "train-00001-of-00003.parquet"
    if damage == "a file is missing":
        file.unlink()
    elif damage == "a file is cut":
        file.write_bytes(file.read_bytes()[:200])
    elif damage == "no facts":
        (table / FACTS).write_text("{}")
    else:
        facts = json.loads((table / FACTS).read_text())
        (table / FACTS).write_text(json.dumps(facts | {"grid": [7, 7]}))
    with pytest.raises(StoreError, match="no whole table of maps"):
        import_table(table, tmp_path / "again")


def test_a_table_never_replaces_files(store, tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "mine").write_text("mine")
    assert "which is there already" in complaint(
        lavender("store", "export", store, "--out", tmp_path / "table"), FAILED
    )
    assert [path.name for path in (tmp_path / "table").iterdir()] == ["mine"]


def test_what_a_push_would_upload_has_a_card(store, tmp_path):
    ran = lavender("store", "push", store, "someone/maps", "--dry-run", tmp_path / "table")
    assert ran.code == DONE, ran.err
    assert [line.split()[2] for line in ran.out.splitlines()] == [
        "README.md",
        "data/train-00000-of-00001.parquet",
        FACTS,
    ]
    card = (tmp_path / "table" / "README.md").read_text()
    assert "11 texts on 11 images with 15 word maps of 5 × 7 cells" in card
    assert 'load_dataset("someone/maps"' in card
    assert '"mode": "noise"' in card
    assert "size_categories:\n- n<1K\n" in card


def test_a_push_without_a_network_is_one_error(store):
    assert "nothing was uploaded" in complaint(lavender("store", "push", store, "someone/maps"), FAILED)
