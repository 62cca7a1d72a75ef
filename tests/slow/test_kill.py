"""`lavender extract`, killed twice and started again, ends with the records of an undisturbed run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forking import Forked
from lavender.data.store import MapStore
from lavender.maps import WordMaps
from lavender.world.language import caption_scene
from lavender.world.scenes import scenes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Records reach the disk in shards of 256. To kill twice after some have, and leave some to do, takes more than 512.
NUM_PICTURES, NUM_CAPTIONS = 120, 5


@pytest.fixture(scope="module")
def flickr_folder(tmp_path_factory) -> Path:
    """Flickr30k's published layout, half of the pictures JPEG."""
    folder = tmp_path_factory.mktemp("flickr30k")
    pictures = folder / "flickr30k_images"
    pictures.mkdir()
    with (folder / "results.csv").open("w") as lines:
        lines.write("image_name| comment_number| comment\n")
        for index, scene in enumerate(scenes("development", NUM_PICTURES)):
            name = f"{scene.seed}.{'jpg' if index % 2 else 'png'}"
            scene.image.save(pictures / name)
            for variant in range(NUM_CAPTIONS):
                lines.write(f"{name}| {variant}| {caption_scene(scene, variant).text}\n")
    return folder


@pytest.fixture(scope="module")
def start(verbs, flickr_folder) -> Callable[[Path], Forked]:
    """Starts an extraction; a batch size that does not divide a shard, so that batches differ after a kill."""

    def begin(out: Path) -> Forked:
        log = out.with_suffix(".log")
        options = ("--data", flickr_folder, "--teacher", "world", "--out", out, "--grid", 16, "--batch-size", 7)
        return verbs.start("extract", *options, out=log, err=log)

    return begin


def num_shards(out: Path) -> int:
    return len(list(out.glob("shard-*.parquet")))


def kill_after_a_new_shard(process: Forked, out: Path, delay: float) -> None:
    before, until = num_shards(out), time.monotonic() + 500
    while num_shards(out) == before:
        assert process.poll() is None, f"it ended by itself:\n{out.with_suffix('.log').read_text()[-2000:]}"
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(delay)
    assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    assert process.wait() == -9


def records(out: Path) -> dict[tuple[str, str], WordMaps]:
    store = MapStore.open(out, verify=True)
    found = {(maps.image_id, maps.text): maps for maps in store}
    assert len(found) == len(store)  # none twice
    return found


def test_killed_twice_and_started_again_it_ends_with_the_same_records(start, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait(timeout=600) == 0, whole.with_suffix(".log").read_text()[-2000:]
    for delay in (0.0, 0.4):
        kill_after_a_new_shard(start(broken), broken, delay)
    left = len(records(broken))
    assert start(broken).wait(timeout=600) == 0, broken.with_suffix(".log").read_text()[-2000:]

    expected, found = records(whole), records(broken)
    assert 0 < left < len(expected)
    said, told = (json.loads((out / "extraction.json").read_text()) for out in (broken, whole))
    assert [run["records"] for run in said["runs"]] == [left, len(expected) - left]  # the first was killed, twice
    for name in ("records", "words", "in_store", "words_in_store", "dropped_before"):
        assert said[name] == told[name], name
    assert sorted(map(str, said["dropped"])) == sorted(map(str, told["dropped"]))
    assert found.keys() == expected.keys()
    assert len({identity for identity, _ in expected}) == NUM_PICTURES
    for key, maps in expected.items():
        assert found[key].words == maps.words
        assert found[key].dropped == maps.dropped
        # batches are cut anew, and one of another size changes the last bits: at most one of 255 steps
        torch.testing.assert_close(found[key].maps, maps.maps, rtol=0, atol=1.01 / 255)
    names = {path.name for path in broken.iterdir()}
    assert not [name for name in names if name.startswith(".tmp-")]
