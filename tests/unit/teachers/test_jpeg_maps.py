"""Import of the authors' JPEG maps: places, words, and what is named as left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from command_line import complaint, lavender
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.data.images import image_id
from lavender.data.store import MapStore

TEXT = "A dog. The Dog sees a well-kept hat on a table"
FILES = ("dog", "well-kept", "hat", "cat", "sofa_bed")


def grey(at: tuple[int, int], side: int = 8) -> Image.Image:
    """A map that is white in one cell and black elsewhere."""
    pixels = np.zeros((side, side), np.uint8)
    pixels[at] = 255
    return Image.fromarray(pixels)


@pytest.fixture
def wide() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8))


@pytest.fixture
def work(tmp_path, wide) -> Path:
    """Two images, of which the first has maps, in the layout of the authors: one white cell per map, in its own row."""
    data = tmp_path / "data"
    data.mkdir()
    wide.save(data / "1.png")
    Image.new("RGB", (32, 32)).save(data / "2.png")
    rows = [{"file_name": "1.png", "text": TEXT}, {"file_name": "2.png", "text": "a dog"}]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    maps = tmp_path / "maps" / "1.png" / "lpm_attention" / "1"
    maps.mkdir(parents=True)
    for row, word in enumerate(FILES):
        grey((row, 1)).save(maps / f"attention_{word}.{'jpg' if word == 'dog' else 'png'}")
    return tmp_path


def imported(work: Path, *options: str) -> MapStore:
    ran = lavender("store", "import", work / "maps", "--data", work / "data", "--out", work / "store", *options)
    assert ran.code == DONE, ran.err
    return MapStore.open(work / "store", verify=True)


def test_words_and_places(work, wide):
    """The maps cover the central square of 32 pixels: column 1 of 8 is at 1.5 / 8 of it, (16 + 6) / 64 of the image."""
    store = imported(work)
    maps = store.get(image_id(wide), TEXT)
    assert maps is not None
    assert [word.text for word in maps.words] == ["dog", "Dog", "well-kept", "hat"]
    assert [heat.amax().item() for heat in maps.maps] == [1] * 4
    rows, cols = [], []
    for heat in maps.maps:
        row, col = divmod(int(heat.argmax()), 8)
        rows.append(row)
        cols.append(col)
    assert rows == [0, 0, 1, 2]
    assert set(cols) == {2}  # 22 of 64 pixels across
    assert maps.maps[:, :, [0, 1, 6, 7]].abs().max() == 0  # no map of what the authors' teacher did not see
    assert [drop.what for drop in maps.dropped] == ["sees", "table"]
    assert store.grid == (8, 8)
    assert store.identity["geometry"] == "crop"


def test_maps_of_the_whole_image(work, wide):
    maps = imported(work, "--geometry", "squash").get(image_id(wide), TEXT)
    assert maps is not None
    assert [divmod(int(heat.argmax()), 8) for heat in maps.maps] == [(0, 1), (0, 1), (1, 1), (2, 1)]


def test_what_is_left_out_is_named(work):
    folder = work / "maps" / "1.png" / "lpm_attention" / "1"
    grey((0, 0), 16).save(folder / "attention_table.png")
    (folder / "attention_sees.png").write_bytes(b"no image")
    ran = lavender("store", "import", work / "maps", "--data", work / "data", "--out", work / "store")
    assert ran.code == DONE
    assert "1 texts with 4 word maps" in ran.out
    assert "5 dropped" in ran.out
    for said in (
        "2.png without a folder in",
        "attention_table.png: a map of 16 × 16 cells, not 8 × 8",
        "attention_sees.png: the map attention_sees.png, 8 bytes that are no picture",
        "1.png: 'cat': a map of a word that is in no text of the image",
        "1.png: 'sofa_bed': a map of a word",
    ):
        assert said in ran.out
    again = lavender("store", "import", work / "maps", "--data", work / "data", "--out", work / "store")
    assert "1 were already there; 5 dropped" in again.out  # as if a run before had been killed at its end
    strict = lavender("store", "import", work / "maps", "--data", work / "data", "--out", work / "other", "--strict")
    assert "attention_sees.png" in complaint(strict, FAILED)


def test_what_cannot_be_imported(work):
    out = ("--out", work / "store")
    assert "--data" in complaint(lavender("store", "import", work / "maps", *out), WRONG_USAGE)
    there = lavender("store", "import", work / "data", "--data", work / "data", *out)
    assert "no folder of an image has a file attention_WORD.jpg" in complaint(there, FAILED)
    assert not (work / "store").exists()


def test_images_of_the_same_name_get_no_maps_of_each_other(work, wide):
    """The layout has one folder for both, so the maps would be those of the wrong image."""
    (work / "data" / "more").mkdir()
    Image.new("RGB", (32, 32), "red").save(work / "data" / "more" / "1.png")
    with (work / "data" / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "more/1.png", "text": "a dog"}) + "\n")
    ran = lavender("store", "import", work / "maps", "--data", work / "data", "--out", work / "store")
    assert "0 texts with 0 word maps" in ran.out
    assert ran.out.count("one of 2 images that would take the maps in 1.png") == 2


def test_a_damaged_first_file_and_an_odd_accent(work, wide):
    """A name may have an accent as a character of its own, as macOS writes it."""
    folder = work / "maps" / "1.png" / "lpm_attention" / "1"
    (folder / "attention_a.png").write_bytes(b"no image")
    grey((5, 1)).save(folder / "attention_cafe\u0301.png")
    row = {"file_name": "1.png", "caption of it": "a dog in a caf\u00e9"}
    (work / "data" / "metadata.jsonl").write_text(json.dumps(row))
    store = imported(work, "--columns", "image=file_name,caption=caption of it")
    maps = store.get(image_id(wide), row["caption of it"])
    assert maps is not None
    assert [word.text for word in maps.words] == ["dog", "caf\u00e9"]


def test_images_that_are_no_files_are_named(work, tmp_path):
    image = {"bytes": (work / "data" / "2.png").read_bytes(), "path": None}
    pq.write_table(pa.Table.from_pylist([{"image": image, "text": "a dog"}]), work / "data.parquet")
    ran = lavender("store", "import", work / "maps", "--data", work / "data.parquet", "--out", work / "store")
    assert "whose image is no file" in ran.out
    options = ("--data", work / "data.parquet", "--out", work / "strict", "--strict")
    assert "whose image is no file" in complaint(lavender("store", "import", work / "maps", *options), FAILED)
