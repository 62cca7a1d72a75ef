"""`lavender data inspect`: what it counts is so, and what is broken is named."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from command_line import complaint, lavender
from lavender.cli.main import FAILED
from lavender.data.images import image_id, load_image
from lavender.data.samples import Sample, read_samples
from lavender.data.store import MapStore
from lavender.errors import ModelError
from lavender.evaluation.data_checks.inspect import inspect_data
from lavender.evaluation.data_checks.lengths import StudentCounter, fewest_clip_tokens, num_words, teacher_counter
from lavender.evaluation.data_checks.pages import inspection_page
from lavender.evaluation.data_checks.scan import look_at_pictures
from lavender.evaluation.report.page import render_report
from lavender.evaluation.sampling import evenly
from lavender.maps import Word, WordMaps
from lavender.students.loading import load_config, load_processor
from lavender.students.registry import adapter_for
from lavender.world import STUDENT_PATHS, TEACHER_PATH

GERMAN = "Ein Hund läuft über die grüne Wiese und jagt einen Ball."
ENGLISH = "A man in a blue shirt is standing on a ladder and cleans a window."


def noise(path: Path, height: int, width: int, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


@pytest.fixture
def data(tmp_path) -> Path:
    """Three pictures, one of them in two files; two broken rows; a row that repeats; three languages or none."""
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, (name, size) in enumerate({"a": (17, 19), "b": (23, 29), "c": (31, 13)}.items()):
        noise(folder / f"{name}.png", *size, seed=seed)
    Image.open(folder / "a.png").save(folder / "again.bmp")
    (folder / "cut.png").write_bytes((folder / "b.png").read_bytes()[:300])
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "text": ENGLISH},
        {"image": "b.png", "text": GERMAN},
        {"image": "missing.png", "text": "a cat"},
        {"image": "cut.png", "text": "a cut picture"},
        {"image": "again.bmp", "text": ENGLISH},
        {"image": "c.png", "text": "Yes"},
        {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": ENGLISH}]},
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def test_samples_broken_rows_words_languages_and_duplicates(data):
    facts = inspect_data(data).facts
    assert (facts["samples"], facts["text_only"]) == (6, 1)
    assert [row["what"] for row in facts["broken"]] == ["data.jsonl line 3", "data.jsonl line 4"]
    assert "no such file" in facts["broken"][0]["reason"]
    assert "truncated" in facts["broken"][1]["reason"]
    assert str(data.parent / "cut.png") in facts["broken"][1]["reason"]
    assert facts["words"]["per_answer"] | {"p95": 0} == {"min": 1, "median": 13, "mean": 10, "p95": 0, "max": 15}
    assert facts["languages"]["samples"]["de"] == 1
    assert facts["languages"]["examples"] == ["data.jsonl line 2"]
    assert sum(facts["languages"]["samples"].values()) == 6
    duplicates = facts["duplicates"]
    assert (duplicates["distinct_pictures"], duplicates["pictures_stored_again"]) == (3, 1)
    assert duplicates["picture_examples"] == [["data.jsonl line 5", str(data.parent / "a.png")]]
    assert duplicates["sample_examples"] == [["data.jsonl line 5", "data.jsonl line 1"]]
    assert facts["picture_sizes"]["height"] == {"min": 17, "median": 23, "p95": 30.2, "max": 31, "mean": 23.667}
    assert facts["picture_sizes"]["width"]["max"] == 29
    assert (facts["student_tokens"], facts["maps"]) == (None, None)
    json.dumps(facts)


def test_the_fewest_clip_tokens_are_no_more_than_those_of_a_clip_tokenizer(captions):
    count, limit = teacher_counter(str(TEACHER_PATH))
    assert limit == 48
    for text in (*captions, "the dog's ball, 12 of them!", "x_1 …don't", ""):
        assert 2 <= fewest_clip_tokens(text) <= count(text)
    assert count("a dog") == 4  # both words are in its vocabulary


@pytest.mark.parametrize(
    ("text", "words", "tokens"),
    [
        ("the dog's ball", 3, 6),
        ("12 o'clock!?", 2, 8),
        ("a well-known  cat.", 3, 8),
        ("", 0, 2),
        ("猫坐在mat上", 5, 3),
        ("cafe\u0301s", 1, 3),
        ("a<|endoftext|>", 2, 4),
    ],
)
def test_words_and_pieces_are_counted_as_by_hand(text, words, tokens):
    assert (num_words(text), fewest_clip_tokens(text)) == (words, tokens)


def test_texts_over_the_limit_of_77_tokens_are_counted(data):
    rows = data.read_text().splitlines()
    for number in (75, 76):
        rows.append(json.dumps({"image": "c.png", "text": " ".join(["dog"] * number)}))
    data.write_text("\n".join(rows))
    clip = inspect_data(data).facts["clip_tokens"]
    assert (clip["limit"], clip["longer"], clip["max"], clip["counted_by"]) == (77, 1, 78, "fewest possible")


@pytest.mark.parametrize("name", ["mllama", "llava"])
def test_student_tokens_are_those_of_its_processor(name, data):
    """One picture, and none; counted with a blank picture of the same size."""
    path = str(STUDENT_PATHS[name])
    counter = StudentCounter(path)
    config = load_config(path)
    processor = load_processor(adapter_for(config), path)
    assert counter.context == config.get_text_config().max_position_embeddings
    samples = [sample for sample in read_samples(data) if "cut" not in str(sample.source)]
    for sample in samples:
        pictures = sample.load()
        text = processor.apply_chat_template(sample.messages, tokenize=False)
        images = {"images": [list(pictures)]} if pictures else {}
        inputs = processor(text=[text], add_special_tokens=False, return_tensors="pt", **images)
        sizes = tuple((picture.height, picture.width) for picture in pictures)
        assert counter.tokens(sample, sizes) == inputs["input_ids"].shape[1]


def test_samples_beyond_the_students_context_are_counted(data):
    with data.open("a") as file:
        file.write(json.dumps({"image": "c.png", "text": " ".join(["dog"] * 600)}) + "\n")
    tokens = inspect_data(data, student=str(STUDENT_PATHS["mllama"])).facts["student_tokens"]
    assert (tokens["limit"], tokens["longer"]) == (512, 1)
    assert tokens["max"] > 600


def test_a_picture_that_the_students_processor_refuses_is_broken(data, monkeypatch):
    def refuse(self, sample, sizes):
        if sizes == ((31, 13),):
            raise ValueError("absolute aspect ratio must be smaller than 2")
        return 1

    monkeypatch.setattr(StudentCounter, "tokens", refuse)
    broken = inspect_data(data, student=str(STUDENT_PATHS["mllama"])).facts["broken"]
    assert broken[-1]["what"] == "data.jsonl line 6"
    assert "the student's processor refuses it: absolute aspect ratio" in broken[-1]["reason"]


def test_columns_of_other_names_are_read_as_told(data):
    rows = [json.dumps({"pic": f"{name}.png", "q": "What is it?", "a": "a cat"}) for name in "ab"]
    data.write_text("\n".join(rows))
    facts = inspect_data(data, columns={"image": "pic", "question": "q", "answer": "a"}).facts
    assert (facts["samples"], facts["broken"], facts["words"]["per_question"]["max"]) == (2, [], 3)


def test_a_picture_inside_a_table_is_no_duplicate_of_itself(data, tmp_path):
    """A row with several captions is several samples of one picture."""
    encoded = [(data.parent / f"{name}.png").read_bytes() for name in "aba"]
    rows = [
        {"image": {"bytes": one, "path": None}, "text": [f"{at} one", f"{at} two"]} for at, one in enumerate(encoded)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    facts = inspect_data(tmp_path / "rows.parquet").facts
    assert facts["samples"] == 6
    assert (facts["duplicates"]["distinct_pictures"], facts["duplicates"]["pictures_stored_again"]) == (2, 1)


def test_pictures_inside_a_table_are_not_all_kept(data, monkeypatch):
    """As many samples at once as `_AT_ONCE` says: the encoded pictures of a large table do not fit into memory."""
    monkeypatch.setattr("lavender.evaluation.data_checks.scan._AT_ONCE", 2)
    encoded = (data.parent / "a.png").read_bytes()
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
    ]
    made: list[weakref.ref[Sample]] = []
    most = 0

    def samples() -> Iterator[Sample]:
        nonlocal most
        for at in range(9):
            second = encoded if at != 4 else encoded[:100]
            sample = Sample(f"row {at}", (encoded, second), messages)
            made.append(weakref.ref(sample))
            most = max(most, sum(one() is not None for one in made))
            yield sample

    class Streamed(list):
        def __iter__(self) -> Iterator[Sample]:
            return samples()

    looks, broken = look_at_pictures(Streamed([None] * 9), lambda image: image.size)
    assert most <= 5
    assert looks == [None if at == 4 else ((19, 17), (19, 17)) for at in range(9)]
    assert [(drop.what, "picture 2, which" in drop.reason) for drop in broken] == [("row 4", True)]


def test_shown_samples_are_spread_over_all():
    assert evenly(range(11), 6) == [0, 1, 3, 5, 7, 9]
    assert (evenly(range(2), 6), evenly([], 6)) == ([0, 1], [])


def test_the_page_cuts_long_texts_and_counts_pictures(data):
    text = {"role": "user", "content": "<image><image>Compare."}, {"role": "assistant", "content": "word " * 1000}
    data.write_text(json.dumps({"images": ["a.png", "b.png"], "messages": text}))
    page = render_report(inspection_page(inspect_data(data)))
    assert page.count("word ") < 200
    assert "(5,000 characters)" in page
    assert "The first of 2 pictures." in page


def test_the_share_with_maps_is_of_pairs_of_picture_and_text(data, tmp_path):
    identity = {name: image_id(load_image(data.parent / f"{name}.png", name)) for name in "abc"}
    word = Word("man", 2, 5, "man", "noun")
    with MapStore.writer(tmp_path / "maps", {"teacher": "x", "texts": "answers"}, {}, (2, 3)) as writer:
        writer.add(WordMaps(identity["a"], ENGLISH, (word,), torch.ones(1, 2, 3)))
        writer.add(WordMaps(identity["c"], "Yes", (), torch.zeros(0, 2, 3)))
    maps = inspect_data(data, maps=tmp_path / "maps").facts["maps"]
    assert {key: maps[key] for key in ("texts", "pairs", "records", "with_maps", "share_with_maps")} == {
        "texts": "answers",
        "pairs": 3,
        "records": 2,
        "with_maps": 1,
        "share_with_maps": 0.3333,
    }


def test_the_share_with_maps_of_several_stores(data, tmp_path):
    """As a run takes them: the first that has a pair answers, here without a map."""
    identity = {name: image_id(load_image(data.parent / f"{name}.png", name)) for name in "abc"}
    word = Word("man", 2, 5, "man", "noun")
    one = WordMaps(identity["a"], ENGLISH, (word,), torch.ones(1, 2, 3))
    none = WordMaps(identity["a"], ENGLISH, (), torch.zeros(0, 2, 3))
    other = WordMaps(identity["c"], "Yes", (Word("Yes", 0, 3, "yes", "noun"),), torch.ones(1, 2, 3))
    for name, records in {"first": [one], "second": [none, other], "wide": []}.items():
        grid = (2, 5) if name == "wide" else (2, 3)
        with MapStore.writer(tmp_path / name, {"teacher": "x", "texts": "answers"}, {}, grid) as writer:
            assert all(writer.add(record) for record in records)
    numbers = {}
    for names in (("first", "second"), ("second", "first"), ("second",)):
        stores = [str(tmp_path / name) for name in names]
        ran = lavender("data", "inspect", data, "--maps", *stores)
        facts = json.loads(ran.out)["maps"]
        assert facts["stores"] == stores
        numbers[names] = facts["records"], facts["with_maps"]
    assert numbers == {("first", "second"): (2, 2), ("second", "first"): (2, 1), ("second",): (2, 1)}
    ran = lavender("data", "inspect", data, "--maps", tmp_path / "first", "--maps", tmp_path / "wide")
    assert "wide of 2 × 5 cells" in complaint(ran, FAILED)


def test_the_page_names_what_is_broken_and_shows_samples(data):
    inspection = inspect_data(data)
    page = render_report(inspection_page(inspection))
    for part in ("data.jsonl line 3", "no such file", "2 rows or pictures are broken", ">de<"):
        assert part in page
    assert len(inspection.shown) == 4
    assert page.count('<article class="card panel') == 4


def test_a_student_that_is_not_there_is_an_error(data, tmp_path):
    with pytest.raises(ModelError):
        inspect_data(data, student=str(tmp_path / "none"))
