"""Verifying, counting, merging and converting map stores."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from command_line import complaint, lavender
from lavender.cli.main import DONE, FAILED
from lavender.data import store_table
from lavender.data.shared_writer import SharedStoreWriter
from lavender.data.store import MapStore, SeveralStores
from lavender.data.store_table import FACTS, export_table, import_table
from lavender.data.store_tools import merge, stats, verify
from lavender.errors import ConfigError, DataError, StoreError
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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_at_rename(number: int, call) -> None:
    """Run a call in a process that is killed just before its rename of that number, from 0."""
    child = os.fork()
    if not child:
        original, renames = os.replace, iter(range(1000))

        def replace(*paths, **options):
            if next(renames) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*paths, **options)

        with mock.patch.object(os, "replace", replace):
            call()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


# verify


def test_a_whole_store_has_no_fault(store):
    assert verify(store) == (found := verify(store))
    assert (found.records, found.words, found.faults) == (11, 15, ())
    ran = lavender("store", "verify", store)
    assert ran.code == DONE
    assert ran.out == f"{store}: 11 records with 15 word maps, whole\n"


def test_every_fault_of_every_store_is_named(store, tmp_path):
    """A flipped bit in one record, a missing shard, and a cut table of another: the rest is still counted."""
    other = fill(tmp_path / "other", RECORDS[:2])
    first = store / "shard-00000.safetensors"
    flipped = bytearray(first.read_bytes())
    begin = flipped.index(b'["0000')
    flipped[begin + 5] ^= 1
    first.write_bytes(flipped)
    for file in store.glob("shard-00001.*"):
        file.unlink()
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


@pytest.mark.parametrize("number", range(3))
def test_a_shard_without_its_table_is_named(store, number):
    """Of the last shard too, which opening the store does not miss."""
    (store / f"shard-0000{number}.parquet").unlink()
    (fault,) = verify(store).faults
    assert f"shard-0000{number}.safetensors has no shard-0000{number}.parquet" in fault


def test_a_lost_last_shard_is_missed_in_the_count_of_the_extraction(store):
    (store / "extraction.json").write_text('{"in_store": 11}')
    assert verify(store).faults == ()
    for file in store.glob("shard-00002.*"):
        file.unlink()
    assert verify(store).faults == ("3 of the 11 records are missing that extraction.json counts",)
    assert "Got 1 fault." in complaint(lavender("store", "verify", store), FAILED)
    (store / "extraction.json").write_text("[]")
    assert verify(store).faults == ()


def test_a_record_that_is_there_twice_is_a_fault(tmp_path):
    """As after two writers on two copies of a store, whose shards were then put together."""
    store = fill(tmp_path / "maps", RECORDS[:4])
    other = shutil.copytree(store, tmp_path / "other")
    fill(store, [RECORDS[4]])
    fill(other, [RECORDS[5]])
    fill(other, [RECORDS[4], RECORDS[6]])
    for file in other.glob("shard-00002.*"):
        shutil.copy(file, store)
    found = verify(store)
    assert found.records == 7
    assert found.faults == ("records that are there twice: 1; a merge to a new store takes each once",)
    merge([store], tmp_path / "all")
    assert verify(tmp_path / "all").faults == ()
    assert len(MapStore.open(tmp_path / "all")) == 6


def test_what_is_no_store_cannot_be_verified(store, tmp_path):
    assert "which has no manifest.json" in complaint(lavender("store", "verify", tmp_path), FAILED)
    ran = lavender("store", "verify", tmp_path, store)
    assert "which has no manifest.json" in complaint(ran, FAILED)
    assert f"{store}: 11 records with 15 word maps, whole" in ran.out


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
    assert MapStore.open(tmp_path / "all").info == {
        "teacher": "tiny",
        "version": ["1", "2"],
        "made_from": [{"merge": [str(first), str(second)]}],
    }
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


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_a_version_that_some_stores_lack(tmp_path, order):
    """Of an earlier release, or of a pipeline in memory: its store fits to any version, and two versions do not fit."""
    versions = ({}, {"teacher_version": "1"}, {"teacher_version": "2"})
    stores = [
        fill(tmp_path / str(index), RECORDS[index : index + 1], identity=IDENTITY | version)
        for index, version in enumerate(versions)
    ]
    paths = [stores[index] for index in order]
    if len(order) == 2:
        merge(paths, tmp_path / "all")
        assert MapStore.open(tmp_path / "all").identity["teacher_version"] == "1"
    else:
        with pytest.raises(StoreError, match="teacher_version"):
            merge(paths, tmp_path / "all")


@pytest.mark.parametrize("key", ["teacher_version", "tiny_vae_version"])
def test_versions_do_not_mix_through_a_store_that_has_none(tmp_path, key):
    """One after another as in one call; and if all have the version of something else."""
    common = {"tiny_vae_version": "same"} if key == "teacher_version" else {"teacher_version": "same"}
    plain, one, two = [
        fill(tmp_path / str(index), RECORDS[index : index + 1], identity=IDENTITY | version)
        for index, version in enumerate((common, common | {key: "1"}, common | {key: "2"}))
    ]
    merge([plain], tmp_path / "all")
    merge([one], tmp_path / "all")
    assert MapStore.open(tmp_path / "all").identity == json.loads(json.dumps(IDENTITY | common | {key: "1"}))
    for paths, out in (([two], "all"), ([plain, one, two], "other")):
        with pytest.raises(StoreError, match=f"{key} is '1' and '2'"):
            merge(paths, tmp_path / out)
    assert content(tmp_path / "all") == content(plain) | content(one)


def test_what_a_killed_merge_left_is_named(tmp_path):
    store = fill(tmp_path / "first", RECORDS[:2])
    (tmp_path / "all" / ".tmp-all-abcd").mkdir(parents=True)
    with pytest.raises(StoreError, match="as a command leaves it that was killed") as caught:
        merge([store], tmp_path / "all")
    assert "remove what is in it" in caught.value.do


def test_a_merged_store_appears_when_it_is_complete(tmp_path):
    first, second = fill(tmp_path / "first", RECORDS[:6]), fill(tmp_path / "second", RECORDS[6:])
    killed_at_rename(3, lambda: merge([first, second], tmp_path / "all"))  # after the manifest and a shard
    assert not (tmp_path / "all").exists()
    assert merge([first, second], tmp_path / "all").added == 11
    assert len(MapStore.open(tmp_path / "all")) == 11


def test_a_merge_into_a_store_redoes_its_lost_shards(store, tmp_path):
    other = shutil.copytree(store, tmp_path / "other")
    for file in store.glob("shard-00001.*"):
        file.unlink()
    assert merge([other], store).added == 4
    assert content(store) == content(other)


@pytest.mark.parametrize("way", ["merged", "imported", "merged into an extracted one"])
def test_the_advice_for_a_damaged_shard_makes_its_records_again(store, tmp_path, way, monkeypatch):
    """The advice is followed: the files are deleted, and the store is made again from what its manifest names."""
    monkeypatch.setattr(MapStore, "writer", staticmethod(partial(MapStore.writer, records_per_shard=4)))
    if way == "imported":
        export_table(store, tmp_path / "table")
    into = fill(tmp_path / "all", RECORDS[:1]) if way == "merged into an extracted one" else tmp_path / "all"
    import_table(tmp_path / "table", into) if way == "imported" else merge([store], into)
    expected = content(into)
    source = tmp_path / "table" if way == "imported" else store
    advice = {
        "merged": f"merge {source} into it again",
        "imported": f"import {source} into it again",
        "merged into an extracted one": f"extract again and merge {source} into it again",
    }[way]
    maps = into / "shard-00001.safetensors"
    damaged = bytearray(maps.read_bytes())
    damaged[-1] ^= 1
    maps.write_bytes(damaged)
    with pytest.raises(StoreError) as caught:
        list(MapStore.open(into))
    files = "shard-00001.parquet and shard-00001.safetensors"
    assert caught.value.do == f"delete {files} and {advice}: only their records are redone"
    for name in files.split(" and "):
        (into / name).unlink()
    with pytest.raises(StoreError) as caught:
        MapStore.open(into)
    assert caught.value.do == f"{advice}: only the missing records are redone"
    import_table(source, into) if way == "imported" else merge([source], into)
    assert content(into) == expected
    info = MapStore.open(into).info
    assert len(info["made_from"]) == (2 if "extracted" in way else 1)  # the same source is named once


@pytest.mark.parametrize("processes", [1, 2])
def test_an_extraction_into_a_merged_store_is_advised_too(tmp_path, processes):
    """The shard that the extraction wrote cannot be merged again, so the advice names both."""
    first = fill(tmp_path / "first", RECORDS[:6])
    merge([first], tmp_path / "all")
    if processes == 1:
        fill(tmp_path / "all", RECORDS[6:])
    else:
        with SharedStoreWriter(tmp_path / "all", IDENTITY, INFO, GRID, rank=0, num_processes=2) as writer:
            assert all(writer.add(one) for one in RECORDS[6:])
    assert MapStore.open(tmp_path / "all").info["made_from"] == [{"merge": [str(first)]}, {"extract": []}]
    last = max((tmp_path / "all").glob("*.parquet"))
    last.with_suffix(".safetensors").write_bytes(b"damaged")
    with pytest.raises(StoreError) as caught:
        MapStore.open(tmp_path / "all")
    assert f"and merge {first} into it again and extract again: only their records are redone" in caught.value.do


def test_what_cannot_be_merged_or_joined_is_named(store, tmp_path):
    with pytest.raises(ConfigError, match="no store to merge"):
        merge([], tmp_path / "all")
    with MapStore.writer(tmp_path / "wide", IDENTITY, INFO, (5, 9)):
        pass
    with pytest.raises(DataError, match=rf"{store} of 5 × 7 cells, {tmp_path / 'wide'} of 5 × 9 cells"):
        SeveralStores(MapStore.open(store), MapStore.open(tmp_path / "wide"))


# tables


@pytest.mark.parametrize("limit", [("ROWS_PER_FILE", 4), ("BYTES_PER_FILE", 200)])  # 525 bytes of maps in all
def test_a_table_and_back_is_the_same_store(store, tmp_path, limit, monkeypatch):
    monkeypatch.setattr(store_table, *limit)
    table = tmp_path / "table"
    ran = lavender("store", "export", store, "--out", table)
    assert names(table / "data") == [f"train-0000{index}-of-00003.parquet" for index in range(3)]
    assert ran.out == f"11 records written to {table}\n", ran.err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    ran = lavender("store", "import", table, "--out", tmp_path / "again")
    assert ran.out == f"11 records written to {tmp_path / 'again'}\n", ran.err
    assert content(tmp_path / "again") == content(store)
    opened, again = MapStore.open(store), MapStore.open(tmp_path / "again")
    assert (again.identity, again.grid) == (opened.identity, opened.grid)
    assert again.info == {**opened.info, "made_from": [{"import": [str(table)]}]}
    export_table(tmp_path / "again", tmp_path / "other")  # paths of this machine are not published
    assert (tmp_path / "other" / FACTS).read_text() == (table / FACTS).read_text()
    assert (tmp_path / "other" / "README.md").read_text() == (table / "README.md").read_text()


def test_datasets_reads_a_table(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_table, "ROWS_PER_FILE", 4)
    export_table(store, tmp_path / "table")
    cache = str(tmp_path / "cache")
    table = load_dataset(str(tmp_path / "table"), split="train", cache_dir=cache)  # by the card's own settings
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


@pytest.mark.parametrize(
    "damage", ["a file is missing", "a file is cut", "no facts", "a map of another size", "a grid of texts"]
)
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
        grid = [7, 7] if damage == "a map of another size" else [5, "7"]
        facts = json.loads((table / FACTS).read_text())
        (table / FACTS).write_text(json.dumps(facts | {"grid": grid}))
    with pytest.raises(StoreError, match="no whole table of maps"):
        import_table(table, tmp_path / "again")
    assert names(tmp_path) == ["maps", "table"]  # nothing is left that looks like a store


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("text", None, "no text"),
        ("image_id", None, "no image_id"),
        ("words", None, ""),
        ("words", [{"text": "dog", "start": 0, "end": 3, "lemma": None, "part_of_speech": "noun"}], ""),
        ("words", [{"scale": None}], ""),
        ("words", [{"scale": 2.0}], "outside"),
        ("words", [None], ""),
        ("maps", [[[0.5] * 7] * 5], "truncated"),
        ("maps", [[[256] * 7] * 5], "256"),
        ("maps", [[[255] * 7] * 4], "reshape"),
        ("maps", None, ""),
        ("maps", 1, ""),
    ],
)
def test_a_changed_row_is_refused_by_its_number(store, tmp_path, column, value, why):
    """Record 1 has one word. What another program writes may have nulls, and other types."""
    export_table(store, tmp_path / "table")
    (file,) = (tmp_path / "table" / "data").iterdir()
    rows = pq.read_table(file).replace_schema_metadata(None).to_pylist()
    if column == "maps" and value is not None:  # a column has one type
        rows = rows[1:2]
        rows[0]["maps"] = value
    elif column == "words" and value is not None:
        rows[1]["words"] = [word and {**rows[1]["words"][0], **word} for word in value]
    else:
        rows[1][column] = value
    pq.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(StoreError, match=rf"row {int(len(rows) > 1)} of .*{why}.* no whole table of maps"):
        import_table(tmp_path / "table", tmp_path / "again")


def test_whole_numbers_of_another_type_are_the_same_maps(store, tmp_path):
    export_table(store, tmp_path / "table")
    (file,) = (tmp_path / "table" / "data").iterdir()
    pq.write_table(pa.Table.from_pylist(pq.read_table(file).to_pylist()), file)  # of 64 bits
    import_table(tmp_path / "table", tmp_path / "again")
    assert content(tmp_path / "again") == content(store)


@pytest.mark.parametrize("place", ["new", "folder", "link", "."])
def test_a_table_goes_to_a_new_or_empty_folder(store, tmp_path, place, monkeypatch):
    work = tmp_path / "work"
    (work / "folder").mkdir(parents=True)
    if place == "link":
        (work / "link").symlink_to("folder")
    monkeypatch.chdir(work / "folder" if place == "." else work)
    assert export_table(store, place) == 11
    assert names(Path(place)) == ["README.md", "data", FACTS]
    assert not list(work.rglob(".*"))


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
