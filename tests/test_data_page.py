"""The examples of docs/data.md are read as it says, and what it counts is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from lavender.data.images import MAX_BYTES, MAX_PIXELS, MIN_SIDE
from lavender.data.samples import CAPTION_COLUMNS, PICTURE_COLUMNS, TEXT_COLUMNS, Samples, read_samples
from lavender.files import IMAGE_FORMATS

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
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
        found[name] = read_samples(folder if name in ("metadata.jsonl", "results.csv") else folder / name)
    return found


def test_every_layout_has_an_example_that_is_read_whole(read):
    assert list(read) == ["metadata.jsonl", "results.csv", "train.jsonl", "several.jsonl", "about.jsonl"]
    assert not [drop for samples in read.values() for drop in samples.dropped]
    assert {name: len(samples) for name, samples in read.items()} == {
        "metadata.jsonl": 3,
        "results.csv": 2,
        "train.jsonl": 4,
        "several.jsonl": 3,
        "about.jsonl": 2,
    }


def test_the_forms_of_a_conversation_mean_the_same(read):
    first, *same, caption = read["train.jsonl"]
    assert all(one.messages == first.messages for one in same)
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
    assert tuple(name for name in text if name != "prompt") == TEXT_COLUMNS
    assert tuple(text[-2:]) == CAPTION_COLUMNS


def test_the_limits_are_those_of_the_code():
    assert f"a side under {MIN_SIDE} pixels, or more than {MAX_PIXELS:,} pixels" in PAGE
    assert f"at most {MAX_BYTES // 2**30} GiB" in PAGE
    *formats, last = IMAGE_FORMATS
    assert f"none of {', '.join(formats)} and {last}".lower() in PAGE.lower()
