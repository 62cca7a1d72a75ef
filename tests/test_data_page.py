"""The examples of docs/data.md are read as it says, and what it counts is so."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lavender.cli.main import main
from lavender.data.images import MAX_BYTES, MAX_PIXELS, MIN_SIDE
from lavender.data.samples import CAPTION_COLUMNS, PICTURE_COLUMNS, TEXT_COLUMNS, Samples, read_samples
from lavender.data.store import MapStore
from lavender.files import IMAGE_FORMATS

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
COLUMNS = yaml.safe_load(re.findall(r"^```yaml\n(columns: .*)$", PAGE, re.M)[0])["columns"]
EXAMPLES = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", PAGE, re.M | re.S))


@pytest.fixture
def read(tmp_path) -> dict[str, Samples]:
    """Each example in a folder of its own, with the pictures that it names."""
    found = {}
    for name, text in EXAMPLES.items():
        folder = tmp_path / Path(name).stem
        for picture in set(re.findall(r"[\w/]+\.(?:png|jpg)", text)):
            (folder / picture).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16)).save(folder / picture)
        (folder / name).write_text(text)
        columns = COLUMNS if name == "vqa.jsonl" else None
        found[name] = read_samples(
            folder if name in ("metadata.jsonl", "results.csv") else folder / name, columns=columns
        )
    return found


def test_every_layout_has_an_example_that_is_read_whole(read):
    assert not [drop for samples in read.values() for drop in samples.dropped]
    assert {name: len(samples) for name, samples in read.items()} == {
        "metadata.jsonl": 3,
        "train.jsonl": 5,
        "several.jsonl": 3,
        "named.jsonl": 2,
        "results.csv": 2,
        "vqa.jsonl": 2,
        "about.jsonl": 2,
    }


def test_the_forms_of_a_conversation_mean_the_same(read):
    first, *same, caption = read["train.jsonl"]
    assert all(one.messages == first.messages for one in (*same, *read["named.jsonl"], read["vqa.jsonl"].samples[0]))
    assert caption.messages[0]["content"][-1]["text"] == "Describe the image."


def test_several_pictures_and_none(read):
    assert [len(sample.sources) for sample in read["several.jsonl"]] == [2, 2, 0]
    first, second, text = (sample.pairs for sample in read["several.jsonl"])
    assert first == ((0, "A cat and a dog."), (1, "A cat and a dog."))
    assert second == ((0, "A cat."), (0, "A dog."), (1, "A dog."))
    assert text == ()


def test_words_that_are_about_others(read):
    question, caption = read["about.jsonl"]
    assert question.about == (("red", "dog"),)
    assert caption.about == (("red", "dog"), ("blue", "cat"))


def test_the_tables_name_every_column_in_order():
    picture, text = (
        re.findall(r"`(\w+)`", re.search(rf"^\| {row} \| (.*) \|$", PAGE, re.M)[1])  # ty: ignore
        for row in ("picture", "text")
    )
    assert tuple(picture) == PICTURE_COLUMNS
    assert tuple(name for name in text if name not in ("prompt", "instruction")) == TEXT_COLUMNS
    assert tuple(text[-2:]) == CAPTION_COLUMNS


def test_the_limits_are_those_of_the_code():
    assert f"a side under {MIN_SIDE} pixels, or more than {MAX_PIXELS:,} pixels" in PAGE
    assert f"at most {MAX_BYTES // 2**30} GiB" in PAGE
    *formats, last = IMAGE_FORMATS
    assert f"none of {', '.join(formats)} and {last}".lower() in PAGE.lower()


def test_the_commands_run(tmp_path, monkeypatch):
    """As they stand, with the built-in teacher."""
    commands = re.findall(r"^lavender (extract .*)$", PAGE, re.M)
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "dog.png", "val2014/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / name)
    (tmp_path / "vqa.jsonl").write_text(EXAMPLES["vqa.jsonl"])
    image = {"filename": "1.png", "filepath": "val2014"}
    images = [
        image | {"split": split, "sentences": [{"raw": f"A {name}."}]}
        for split, name in (("restval", "cat"), ("train", "dog"), ("test", "cup"))
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    for number, command in enumerate(commands):
        words = shlex.split(re.sub(r"--teacher \S+", "--teacher world", command).replace("maps/", f"maps{number}"))
        assert main(words) == 0
    assert [len(MapStore.open(tmp_path / f"maps{number}")) for number in range(2)] == [2, 2]
