"""The column `about`: its forms, and where its words are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lavender.data.about import About, Link, Place, entries_of, links_of
from lavender.data.conversations import UnusableError
from lavender.data.samples import Sample, Samples, read_samples, to_dataset
from lavender.training.fingerprints import digest_of_data

QUESTION, ANSWER = "What color is the small dog?", "It is red."
RED = (About("red", "dog"),)


def turns(*texts: str) -> list[dict[str, Any]]:
    """A conversation that begins with the user."""
    return [
        {"role": "assistant" if index % 2 else "user", "content": [{"type": "text", "text": text}]}
        for index, text in enumerate(texts)
    ]


def found(messages: list[dict], *entries: tuple[str, str]) -> list[tuple[str, str, int]]:
    """(word, phrase, turn of the phrase) of each link."""
    texts = [message["content"][0]["text"] for message in messages]
    return [
        (texts[word.turn][word.start : word.end], texts[about.turn][about.start : about.end], about.turn)
        for word, about in links_of([About(*entry) for entry in entries], messages)
    ]


@pytest.mark.parametrize(
    "value",
    [
        [{"word": "red", "about": "dog"}],
        {"red": "dog"},
        {"red": "dog", "blue": None},  # as Arrow gives objects with different keys
        '[{"word": "red", "about": "dog"}]',
        '{"red": "dog"}',
        RED,
    ],
)
def test_the_forms_of_a_cell(value):
    assert entries_of(value) == RED


@pytest.mark.parametrize("value", [None, [], {}, "", " ", "[]", "null"])
def test_no_entry(value):
    assert entries_of(value) == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("red", "about is no JSON"),
        (7, "about is a int, not a list of"),
        (["red"], "about holds 'red', which is not a list of"),
        ([{"word": "red"}], "about holds {'word': 'red'}"),
        ([{"word": "red", "about": None}], "about holds None, not a word or a phrase"),
        ({"red": ["dog"]}, "about holds ['dog'], not a word or a phrase"),
        ({" ": "dog"}, "about holds ' ', not a word or a phrase"),
    ],
)
def test_other_forms_are_refused(value, message):
    with pytest.raises(UnusableError) as caught:
        entries_of(value)
    assert message in str(caught.value)


def test_a_word_of_the_question():
    assert links_of(RED, turns(QUESTION, ANSWER)) == [Link(Place(1, 6, 9), Place(0, 24, 27))]


def test_a_phrase_of_the_same_answer_comes_first():
    messages = turns("is there a dog?", "a dog on red and a dog on blue")
    assert found(messages, ("red", "dog"), ("blue", "dog")) == [("red", "dog", 1), ("blue", "dog", 1)]
    assert [link.about.start for link in links_of([About("red", "dog"), About("blue", "dog")], messages)] == [2, 19]


def test_a_phrase_after_its_word():
    assert links_of([About("red", "big dog")], turns("?", "red is the big  dog")) == [
        Link(Place(1, 0, 3), Place(1, 11, 19))
    ]


def test_the_nearest_question_comes_first_and_no_later_one():
    messages = turns("a dog?", "no", "the dog, what color?", "Red", "a dog?", "yes")
    assert found(messages, ("red", "dog")) == [("Red", "dog", 2)]
    assert found(messages, ("yes", "color")) == [("yes", "color", 2)]


def test_a_word_is_not_about_itself():
    assert found(turns("is there a dog?", "yes, a dog"), ("dog", "dog")) == [("dog", "dog", 0)]


def test_repeated_words():
    """The n-th entry is of the n-th occurrence, over all answers; a single one is of all."""
    messages = turns("the dog and the cat?", "red and red", "and the hat?", "red")
    assert found(messages, ("red", "dog"), ("red", "cat"), ("red", "hat")) == [
        ("red", "dog", 0),
        ("red", "cat", 0),
        ("red", "hat", 2),
    ]
    assert [phrase for _, phrase, _ in found(messages, ("Red", "cat"))] == ["cat"] * 3
    assert [phrase for _, phrase, _ in found(messages, ("red", "dog"), ("red", "cat"))] == ["dog", "cat"]


def test_whole_words_alone():
    assert found(turns("a dog and dogs", "reddish, red"), ("red", "dogs")) == [("red", "dogs", 0)]
    with pytest.raises(UnusableError, match="about names 'redd', which is there in no answer"):
        found(turns("a dog", "reddish"), ("redd", "dog"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("blue", "dog")], "about names 'blue', which is there in no answer"),
        ([("dog", "color")], "about names 'dog', which is there in no answer"),  # only in the question
        ([("red", "cat")], "about says that 'red' is about 'cat', which is in no text before or around it"),
        ([("red", "dog"), ("red", "color")], "about names 'red', which is there 1 times, for 2 entries"),
        ([("red", "dog"), ("is red", "dog")], "about names 'is red' and 'red', which overlap"),
    ],
)
def test_entries_that_name_no_word_of_the_texts(entries, message):
    with pytest.raises(UnusableError) as caught:
        found(turns(QUESTION, ANSWER), *entries)
    assert str(caught.value) == message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (16, 12), "red").save(tmp_path / "a.png")
    return tmp_path


ROW = {"image": "a.png", "prompt": QUESTION, "completion": ANSWER}


@pytest.mark.parametrize("about", [[{"word": "red", "about": "dog"}], {"red": "dog"}])
def test_every_format_reads_the_column(folder, about):
    (folder / "a.jsonl").write_text(json.dumps(ROW | {"about": about}))
    (folder / "a.json").write_text(json.dumps([ROW | {"about": about}]))
    cell = json.dumps(about).replace('"', '""')
    (folder / "a.csv").write_text(f'image,prompt,completion,about\na.png,{QUESTION},{ANSWER},"{cell}"\n')
    pq.write_table(pa.Table.from_pylist([ROW | {"about": about}]), folder / "a.parquet")
    row = ROW | {"image": str(folder / "a.png")}
    rows = [row | {"about": about}, row | {"about": None}]
    read = [*(folder / f"a.{kind}" for kind in ("jsonl", "json", "csv", "parquet")), datasets.Dataset.from_list(rows)]
    for source in read:
        samples = read_samples(source)
        assert not samples.dropped
        assert samples.samples[0].about == RED
        assert all(sample.about == () for sample in samples.samples[1:])


def test_rows_that_do_not_fit_are_dropped_by_name(folder):
    captions = {"image": "a.png", "caption": ["a red dog", "a dog"], "about": {"red": "dog"}}
    rows = [ROW, ROW | {"about": {"blue": "dog"}}, ROW | {"about": 7}, captions]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read_samples(folder / "a.jsonl")
    assert len(samples) == 1
    assert [drop.reason for drop in samples.dropped] == [
        "about names 'blue', which is there in no answer",
        'about is a int, not a list of {"word": …, "about": …}, or an object of such words',
        "about with several captions; write a row for each caption",
    ]


def test_the_column_survives_a_dataset(folder):
    """A data set without it has no such column."""
    with_about = Sample("one", (folder / "a.png",), PICTURED, RED)
    without = Sample("two", (folder / "a.png",), PICTURED)
    assert to_dataset([without]).column_names == ["images", "messages"]
    dataset = to_dataset(sample for sample in (with_about, without))
    assert dataset.column_names == ["images", "messages", "about"]
    assert dataset["about"] == [[{"word": "red", "about": "dog"}], []]
    again = read_samples(dataset)
    assert [sample.about for sample in again] == [RED, ()]


def test_a_run_with_another_column_is_another_run(folder):
    def digest(*about: About) -> str:
        return digest_of_data(Samples((Sample("one", (folder / "a.png",), PICTURED, about),), identities=(("0",),)))

    assert len({digest(), digest(*RED), digest(About("red", "small dog"))}) == 3


PICTURED = turns(QUESTION, ANSWER)
PICTURED[0]["content"].insert(0, {"type": "image"})
