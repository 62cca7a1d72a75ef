"""The paper's data sets, from small files in their published layouts, with the rows that are broken in them."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from PIL import Image

from lavender.data.images import image_id, load_image
from lavender.data.recipes import PAPER, RECIPES, Settings, prepare
from lavender.data.recipes.sources import CAPTION_PROMPT
from lavender.data.samples import Samples, read_samples
from lavender.errors import ConfigError, DataError, LavenderError

ALL = Settings(test_share=0)


def picture(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (11, 13, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def flickr30k(folder: Path, pictures: int = 3) -> Path:
    """results.csv as published: a bar and a number are missing from one row of 2199200615.jpg."""
    (folder / "flickr30k_images").mkdir(parents=True)
    lines = ["image_name| comment_number| comment"]
    names = [f"{1000 + index}.jpg" for index in range(pictures - 1)] + ["2199200615.jpg"]
    for seed, name in enumerate(names):
        (folder / "flickr30k_images" / name).write_bytes(picture(seed, "JPEG"))
        lines += [f"{name}| {number}| Caption {number} of {name} ." for number in range(4)]
        lines.append(f"{name}| 4   A dog runs across the grass ." if name == "2199200615.jpg" else f"{name}| 4| Last .")
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    return folder


def rlaif_v(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Two parquet files with the published columns, without the features of `datasets`."""
    folder.mkdir(parents=True)
    common = {"ds_name": "RLAIF-V", "rejected": "No.", "origin_dataset": "COCO", "origin_split": "{}", "idx": "0"}
    if rows is None:
        texts = [{"question": f"What is {index}? ", "chosen": f"It is {index}."} for index in range(4)]
        rows = [{"image": {"bytes": picture(100 + index), "path": "x.jpg"}} | row for index, row in enumerate(texts)]
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        table = pyarrow.Table.from_pylist([common | row for row in part])
        pyarrow.parquet.write_table(table, folder / f"RLAIF-V-Dataset_{number:03}.parquet")
    return folder


def ocrvqa(folder: Path, rows: int = 3) -> Path:
    """A shard of ocrvqa in The Cauldron."""
    folder.mkdir(parents=True)
    values = [
        {
            "images": [{"bytes": picture(200 + index, "JPEG"), "path": None}],
            "texts": [
                {"user": "Who wrote this book?", "assistant": "Ann.", "source": "ocrvqa"},
                {"user": "What year?", "assistant": f"{1990 + index}.", "source": "ocrvqa"},
            ],
        }
        for index in range(rows)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), folder / "train-00000-of-00019-0a1b2c3d.parquet")
    return folder


def ocrvqa_without_its_first_shard(folder: Path) -> Path:
    """Its 30,000 first rows would be others."""
    [first] = ocrvqa(folder).iterdir()
    for number in (1, 2):
        (folder / f"train-{number:05}-of-00019.parquet").write_bytes(first.read_bytes())
    first.unlink()
    return folder


def laion(folder: Path, rows: int = 3) -> Path:
    """What img2dataset writes: one row could not be downloaded."""
    (folder / "00000").mkdir(parents=True)
    table = []
    for index in range(rows):
        key = f"{index:09}"
        (folder / "00000" / f"{key}.jpg").write_bytes(picture(300 + index, "JPEG"))
        table.append({"key": key, "caption": f" caption {index}", "url": "http://x", "status": "success"})
    table.append({"key": "000000099", "caption": "lost", "url": "http://x", "status": "failed_to_download"})
    table = [row | {"error_message": None if row["status"] == "success" else "HTTP Error 404"} for row in table]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "00000.parquet")
    return folder


def read(out: Path) -> Samples:
    samples = read_samples(out / "train.jsonl")
    assert not samples.dropped
    return samples


def turns(samples: Samples) -> list[list[str]]:
    return [
        [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
        for sample in samples
    ]


def reasons(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(drop["what"], drop["reason"]) for drop in found["dropped"]]


def test_flickr30k_takes_the_first_caption_of_each_picture_and_names_the_broken_row(tmp_path):
    source = flickr30k(tmp_path / "flickr30k")
    report = prepare("flickr30k", source, tmp_path / "out", ALL)
    found = report["sets"]["flickr30k"]
    assert (found["found"], found["expected"], found["counted"]) == (3, 31_783, "pictures")
    assert (found["samples"], found["other_captions"]) == (3, 11)
    assert [what for what, _ in reasons(found)] == ["results.csv line 16"]
    assert "2199200615.jpg| 4   A dog runs across the grass ." in reasons(found)[0][1]
    samples = read(tmp_path / "out")
    assert turns(samples) == [[CAPTION_PROMPT, f"Caption 0 of {name}.jpg ."] for name in ("1000", "1001", "2199200615")]
    assert [sample.source for sample in samples] == sorted((source / "flickr30k_images").iterdir())
    assert json.loads((tmp_path / "out" / "prepared.json").read_text()) == report


def test_flickr30k_with_all_captions_and_a_prompt(tmp_path):
    settings = Settings("all", 0, prompt="What is it?")
    report = prepare("flickr30k", flickr30k(tmp_path / "flickr30k"), tmp_path / "out", settings)
    found = report["sets"]["flickr30k"]
    assert (found["found"], found["samples"], found["other_captions"]) == (3, 14, 0)
    assert turns(read(tmp_path / "out"))[-1] == ["What is it?", "Caption 3 of 2199200615.jpg ."]


def test_flickr30k_from_karpathys_json_with_its_splits(tmp_path):
    flickr30k(tmp_path / "flickr30k")
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": f"First, {split}."}, {"raw": "Second."}]}
        for name, split in (("1000.jpg", "train"), ("1001.jpg", "val"), ("2199200615.jpg", "test"))
    ]
    path = tmp_path / "flickr30k" / "dataset_flickr30k.json"
    path.write_text(json.dumps({"images": images}))
    found = prepare("flickr30k", Path(f"{path}:train+val+test"), tmp_path / "out", ALL)["sets"]["flickr30k"]
    assert (found["found"], found["other_captions"]) == (3, 3)
    assert [texts[-1] for texts in turns(read(tmp_path / "out"))] == ["First, train.", "First, val.", "First, test."]


def test_no_picture_is_in_both_files_and_the_seed_decides(tmp_path):
    source = flickr30k(tmp_path / "flickr30k", 20)
    splits = {}
    for seed in (42, 42, 7):
        report = prepare("flickr30k", source, tmp_path / "out", Settings("all", seed=seed))
        assert report["train"] + report["test"] == 99  # five captions of each picture, without the broken row
        train, test = (
            {sample.source for sample in read_samples(tmp_path / "out" / f"{split}.jsonl")}
            for split in ("train", "test")
        )
        assert (len(train), len(test)) == (18, 2)
        assert not train & test
        splits.setdefault(seed, test)
        assert splits[seed] == test
    assert splits[42] != splits[7]


def test_the_split_of_ocrvqa_is_that_of_the_authors_code(tmp_path):
    """`train_test_split(test_size=1 - 0.9, shuffle=True, seed=42)` of the first rows, when no cover repeats."""
    prepare("ocrvqa30k", ocrvqa(tmp_path / "ocrvqa", 30), tmp_path / "out")
    rows = Dataset.from_dict({"year": [f"{1990 + index}." for index in range(30)]})
    theirs = rows.train_test_split(test_size=1 - 0.9, shuffle=True, seed=42)["test"]["year"]
    assert sorted(texts[-1] for texts in turns(read_samples(tmp_path / "out" / "test.jsonl"))) == sorted(theirs)


def test_rlaif_v_takes_the_chosen_answer_and_keeps_the_pixels(tmp_path):
    report = prepare("rlaif-v", rlaif_v(tmp_path / "rlaif"), tmp_path / "out", ALL)
    found = report["sets"]["rlaif-v"]
    assert (found["found"], found["expected"], found["dropped"]) == (4, 83_132, [])
    samples = read(tmp_path / "out")
    assert turns(samples) == [[f"What is {index}?", f"It is {index}."] for index in range(4)]
    assert [image_id(sample.load()[0]) for sample in samples] == [
        image_id(load_image(picture(100 + index), "it")) for index in range(4)
    ]


def test_rows_that_cannot_be_used_are_named_with_the_reason(tmp_path):
    good = {"bytes": picture(1), "path": None}
    rows = [
        {"image": good, "question": "Fine?", "chosen": "Yes."},
        {"image": {"bytes": picture(2)[:40], "path": None}, "question": "Cut?", "chosen": "Yes."},
        {"image": {"bytes": b"not a picture", "path": None}, "question": "Other?", "chosen": "Yes."},
        {"image": {"bytes": None, "path": "gone.jpg"}, "question": "Gone?", "chosen": "Yes."},
        {"image": good, "question": "Empty?", "chosen": "  "},
        {"image": good, "question": None, "chosen": "Yes."},
        {"image": good, "question": "Two <image> places?", "chosen": "Yes."},
        {"image": good, "question": "Again?", "chosen": "Yes."},
    ]
    report = prepare("rlaif-v", rlaif_v(tmp_path / "rlaif", rows), tmp_path / "out", ALL)
    found = report["sets"]["rlaif-v"]
    assert (found["found"], found["pictures"]) == (2, 1)
    first, second = (f"RLAIF-V-Dataset_{number:03}.parquet row" for number in (0, 1))
    assert [what for what, _ in reasons(found)] == [f"{first} 1", f"{first} 2", f"{first} 3"] + [
        f"{second} {row}" for row in range(3)
    ]
    parts = ("only its beginning", "no picture of a known", "gone.jpg", "'  '", "None", "<image>")
    for (_, reason), part in zip(reasons(found), parts, strict=True):
        assert part in reason
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 1


def test_ocrvqa_from_its_own_file_and_the_first_rows_only(tmp_path, monkeypatch):
    (tmp_path / "ocr" / "images").mkdir(parents=True)
    books: dict[str, dict[str, Any]] = {}
    for index, (key, split) in enumerate({"0761183272": 1, "1421539489": 3, "0316881791": 1, "0553": 1}.items()):
        (tmp_path / "ocr" / "images" / f"{key}.jpg").write_bytes(picture(index, "JPEG"))
        books[key] = {
            "imageURL": f"http://x/{key}.jpg",
            "questions": ["Who wrote this book?", "What is the title?"],
            "answers": ["Ann", f"Book {index}"],
            "split": split,
        }
    books["0316881791"]["answers"].pop()
    (tmp_path / "ocr" / "dataset.json").write_text(json.dumps(books))
    found = prepare("ocrvqa30k", tmp_path / "ocr", tmp_path / "out", ALL)["sets"]["ocrvqa30k"]
    assert reasons(found) == [("dataset.json 0316881791", "not one answer for each question")]
    first = ["Who wrote this book?", "Ann", "What is the title?", "Book 0"]
    assert turns(read(tmp_path / "out")) == [first, [*first[:3], "Book 3"]]
    monkeypatch.setitem(RECIPES, "ocrvqa30k", replace(RECIPES["ocrvqa30k"], expected=1))
    prepare("ocrvqa30k", tmp_path / "ocr", tmp_path / "out", ALL)
    assert turns(read(tmp_path / "out")) == [first]


def test_laion_is_read_as_img2dataset_writes_it(tmp_path):
    found = prepare("laion50k", laion(tmp_path / "laion"), tmp_path / "out", ALL)["sets"]["laion50k"]
    assert (found["found"], found["expected"]) == (3, 50_000)
    assert reasons(found) == [("00000.parquet row 3", "not downloaded: HTTP Error 404")]
    assert turns(read(tmp_path / "out"))[2] == [CAPTION_PROMPT, "caption 2"]


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_laion_in_img2datasets_other_formats(tmp_path, kind):
    folder = laion(tmp_path / "laion")
    pictures = {path.stem: path.read_bytes() for path in (folder / "00000").iterdir()}
    shutil.rmtree(folder / "00000")
    if kind == "parquet":
        table = pyarrow.parquet.read_table(folder / "00000.parquet")
        column = pyarrow.array([pictures.get(key.as_py()) for key in table["key"]])
        pyarrow.parquet.write_table(table.append_column("jpg", column), folder / "00000.parquet")
    else:
        with tarfile.open(folder / "00000.tar", "w") as archive:
            for key, content in sorted(pictures.items()):
                for ending, inside in (("jpg", content), ("txt", f" caption {int(key)}".encode())):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(inside)
                    archive.addfile(info, io.BytesIO(inside))
    found = prepare("laion50k", folder, tmp_path / "out", ALL)["sets"]["laion50k"]
    assert reasons(found) == [("00000.parquet row 3", "not downloaded: HTTP Error 404")]
    assert turns(read(tmp_path / "out")) == [[CAPTION_PROMPT, f"caption {index}"] for index in range(3)]


def test_laion_stops_at_the_papers_number_of_rows_that_can_be_used(tmp_path, monkeypatch):
    source = laion(tmp_path / "laion", 4)
    (source / "00000" / "000000000.jpg").write_bytes(b"not a picture")
    monkeypatch.setitem(RECIPES, "laion50k", replace(RECIPES["laion50k"], expected=2))
    found = prepare("laion50k", source, tmp_path / "out", ALL, strict=True)["sets"]["laion50k"]
    assert [what for what, _ in reasons(found)] == ["00000.parquet row 0"]
    assert [texts[-1] for texts in turns(read(tmp_path / "out"))] == ["caption 1", "caption 2"]


def test_the_mixture_is_the_three_sets_each_with_its_own_split(tmp_path):
    flickr30k(tmp_path / "all" / "flickr30k", 10)
    rlaif_v(tmp_path / "all" / "rlaif-v")
    ocrvqa(tmp_path / "all" / "ocrvqa30k", 10)
    report = prepare("paper", tmp_path / "all", tmp_path / "out")
    assert tuple(report["sets"]) == PAPER
    assert {name: (found["train"], found["test"]) for name, found in report["sets"].items()} == {
        "rlaif-v": (3, 1),
        "flickr30k": (9, 1),
        "ocrvqa30k": (9, 1),
    }
    assert (report["train"], report["test"], len(read(tmp_path / "out"))) == (21, 3, 21)
    alone = prepare("flickr30k", tmp_path / "all" / "flickr30k", tmp_path / "alone")
    assert alone["sets"]["flickr30k"]["test"] == 1
    ours, theirs = (
        [line for line in (tmp_path / name / "test.jsonl").read_text().splitlines() if '"flickr30k: ' in line]
        for name in ("out", "alone")
    )
    assert ours == theirs


def test_a_picture_of_two_sets_is_not_in_both_files(tmp_path):
    """Each set has its own split, but what one of them tests on no other trains on."""
    for name, seeds in (("rlaif-v", range(10)), ("ocrvqa30k", range(9, -1, -1))):
        rows = [{"bytes": picture(seed), "path": None} for seed in seeds]
        (tmp_path / "all" / name).mkdir(parents=True)
        table = [{"image": row, "question": "What?", "chosen": "It."} for row in rows]
        if name == "ocrvqa30k":
            table = [{"images": [row], "texts": [{"user": "What?", "assistant": "It."}]} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "all" / name / "x.parquet")
    flickr30k(tmp_path / "all" / "flickr30k", 10)
    report = prepare("paper", tmp_path / "all", tmp_path / "out")
    train, test = (
        {sample.load()[0].tobytes() for sample in read_samples(tmp_path / "out" / f"{split}.jsonl")}
        for split in ("train", "test")
    )
    assert not train & test
    assert [report["sets"][name]["test"] for name in PAPER] == [2, 1, 2]
    assert len(test) == 3


def test_nine_of_ten_of_the_expected_numbers_is_the_papers_0_13_million():
    assert round(0.9 * sum(RECIPES[name].expected for name in PAPER), -4) == 130_000


def test_strict_refuses_another_number_than_the_papers_and_writes_nothing(tmp_path):
    words = r"flickr30k with 2 pictures and 1 rows dropped; the first, results.csv line 11: .* Expected 31,783"
    with pytest.raises(DataError, match=words):
        prepare("flickr30k", flickr30k(tmp_path / "flickr30k", 2), tmp_path / "out", strict=True)
    assert not list((tmp_path / "out").glob("*.json*"))


def test_strict_takes_the_papers_number_with_a_broken_row(tmp_path, monkeypatch):
    recipe = replace(RECIPES["flickr30k"], expected=2)
    monkeypatch.setitem(RECIPES, "flickr30k", recipe)
    report = prepare("flickr30k", flickr30k(tmp_path / "flickr30k", 2), tmp_path / "out", strict=True)
    assert len(report["sets"]["flickr30k"]["dropped"]) == 1


@pytest.mark.parametrize("share", [0.1, 0.9, 0])
def test_too_few_usable_pictures_are_an_error(share, tmp_path):
    bad = {"image": {"bytes": b"no picture", "path": None}, "question": "What?", "chosen": "It."}
    good = bad | {"image": {"bytes": picture(0), "path": None}}
    source = rlaif_v(tmp_path / "rlaif", [bad, good if share else bad])
    words = rf"rlaif-v with {int(share > 0)} usable pictures and \d rows dropped; the first, .* row 0: the picture, 10"
    with pytest.raises(DataError, match=words):
        prepare("rlaif-v", source, tmp_path / "out", Settings(test_share=share))


def test_files_of_another_program_are_not_replaced(tmp_path):
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"with train.jsonl and without prepared.json"):
        prepare("rlaif-v", rlaif_v(tmp_path / "rlaif"), tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_a_picture_that_a_stopped_call_cut_is_written_again(tmp_path):
    source = rlaif_v(tmp_path / "rlaif")
    prepare("rlaif-v", source, tmp_path / "out")
    first = next((tmp_path / "out" / "images").rglob("*.png"))
    whole = first.read_bytes()
    first.write_bytes(whole[:50])
    prepare("rlaif-v", source, tmp_path / "out")
    assert first.read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("rlaif-v", lambda folder: folder / "none", "does not exist"),
        ("rlaif-v", lambda folder: ocrvqa(folder / "o"), "without the columns image, question, chosen"),
        ("ocrvqa30k", lambda folder: rlaif_v(folder / "r"), "The Cauldron"),
        ("laion50k", lambda folder: flickr30k(folder / "f"), "img2dataset"),
        ("paper", lambda folder: flickr30k(folder / "all" / "flickr30k").parent, "without rlaif-v and ocrvqa30k"),
        ("flickr30k", lambda folder: folder / "none", "which does not exist"),
        ("laion50k", lambda folder: folder / "none", "which does not exist"),
        ("ocrvqa30k", lambda folder: ocrvqa_without_its_first_shard(folder / "o"), "with the shards 1, 2"),
        ("coco", flickr30k, "one of flickr30k, laion50k, rlaif-v, ocrvqa30k, paper"),
    ],
)
def test_another_layout_is_an_error_that_says_what_is_expected(name, make, words, tmp_path):
    with pytest.raises(LavenderError, match=words):
        prepare(name, make(tmp_path), tmp_path / "out")


def test_a_damaged_parquet_file_is_named(tmp_path):
    source = rlaif_v(tmp_path / "rlaif")
    path = source / "RLAIF-V-Dataset_001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"RLAIF-V-Dataset_001.parquet, which cannot be read"):
        prepare("rlaif-v", source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("rlaif-v", Settings(prompt="What?"), "prompt='What.' for rlaif-v, which has questions of its own"),
        ("laion50k", Settings("all"), "captions=all for laion50k, which has one text per row"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(name, settings, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        prepare(name, tmp_path, tmp_path / "out", settings)


def test_a_cell_that_cannot_be_read_costs_its_row(tmp_path):
    texts = pyarrow.array([b"caf\xe9", b"It."]).view(pyarrow.string())
    table = {"image": [{"bytes": picture(0), "path": None}] * 2, "question": ["What?"] * 2, "chosen": texts}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    found = prepare("rlaif-v", tmp_path, tmp_path / "out", ALL)["sets"]["rlaif-v"]
    assert reasons(found) == [("x.parquet row 0", "chosen cannot be read (UnicodeDecodeError)")]
    assert turns(read(tmp_path / "out")) == [["What?", "It."]]


@pytest.mark.parametrize("wrong", [{"captions": "two"}, {"test_share": 1.0}, {"seed": -1}, {"prompt": " "}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Settings(**wrong)
