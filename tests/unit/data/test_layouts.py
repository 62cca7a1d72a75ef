"""Layouts in which people have their data: pictures in messages, other columns, published forms, splits, the hub."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
import tarfile
from argparse import Namespace
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lavender.cli.options import columns_of
from lavender.data.published import text_rows
from lavender.data.samples import Samples, read_samples, readable, to_dataset
from lavender.data.tables import Wanted, parquet_rows
from lavender.errors import ConfigError, DataError
from lavender.files import data_path
from lavender.training.run_config import read_run


def shade(image: Image.Image) -> int:
    """The first value of a picture, by which the tests tell pictures apart."""
    return image.tobytes()[0]


def png(shade: int = 0) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (13, 11), (shade, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    for index, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(png(index))
    return tmp_path


def jsonl(path: Path, *rows: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(samples: Samples) -> list[str]:
    return [answer for one in samples for answer in one.answers]


def drops(samples: Samples) -> dict[str, str]:
    return {drop.what: drop.reason for drop in samples.dropped}


def failure(path: Any, **more: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        read_samples(path, **more)
    return str(caught.value)


# pictures named inside messages


def asked(*parts: dict) -> list[dict]:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}, answer]


def forms(folder: Path) -> dict[str, dict]:
    """Parts that name a.png, in the forms of Qwen, transformers and OpenAI."""
    code = base64.b64encode(png()).decode()
    address = f"data:image/png;base64,{code}"
    return {
        "image": {"type": "image", "image": "a.png"},
        "path": {"type": "image", "path": "a.png"},
        "url": {"type": "image", "url": str(folder / "a.png")},
        "file URL": {"type": "image", "image": f"file://{folder}/a.png"},
        "data URL": {"type": "image", "image": address},
        "Qwen's base64": {"type": "image", "image": f"data:image;base64,{code}", "max_pixels": 100, "index": None},
        "base64": {"type": "image", "base64": code},
        "struct": {"type": "image", "image": {"path": "a.png", "bytes": None}},
        "OpenAI": {"type": "image_url", "image_url": {"url": address, "detail": "low"}},
        "OpenAI, short": {"type": "image_url", "image_url": "a.png", "image": None},
    }


def test_pictures_named_in_messages(folder):
    parts = forms(folder)
    samples = read_samples(jsonl(folder / "x.jsonl", *({"messages": asked(part)} for part in parts.values())))
    assert samples.dropped == ()
    for form, sample in zip(parts, samples, strict=True):
        (image,) = sample.load()
        assert image.getpixel((0, 0)) == (0, 2, 3), form
        assert sample.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    rows = [{"messages": asked(parts["path"])}, {"messages": asked(parts["OpenAI"])}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")  # where each part has all keys
    assert len(read_samples(folder / "x.parquet")) == 2


def test_several_named_pictures_keep_their_order(folder):
    first, second = {"type": "image", "image": "b.png"}, {"type": "image_url", "image_url": {"url": "a.png"}}
    turns = [*asked(first), *asked(second)]
    for row in ({"messages": turns}, {"messages": turns, "images": ["b.png", "a.png"]}):
        (sample,) = read_samples(jsonl(folder / "x.jsonl", row))
        assert sample.sources == (folder / "b.png", folder / "a.png")
        assert len(sample.pairs) == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": asked({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}})},
            "the address https://x.org/a.png; download it and give its path",
        ),
        ({"messages": asked({"type": "image", "url": "http://x.org/a.png"})}, "the address http://x.org/a.png"),
        ({"messages": asked({"type": "image", "image": "file:///no.png"})}, "no such file: /no.png"),
        ({"messages": asked({"type": "image_url"})}, "a part image_url without an address"),
        ({"messages": asked({"type": "image", "image": "a.png", "path": "b.png"})}, "a part that names 2 pictures"),
        (
            {"messages": asked({"type": "image", "image": "a.png"}, {"type": "image"})},
            "turns that name 1 of their 2 pictures; name all, or none",
        ),
        (
            {"image": "b.png", "messages": asked({"type": "image", "image": "a.png"})},
            "turns that name other pictures than the row's column",
        ),
        ({"image": "a.png", "system": "\ud800", "messages": asked()}, "system with half of a surrogate pair"),
        ({"instruction": "What?", "output": 5}, "an instruction, input or output is a int, not a text"),
        ({"instruction": "What?", "output": "A.", "history": [["Hi?"]]}, "history holds ['Hi?'], not a pair"),
        ({"prompt": "How many?", "completion": 5}, "completion is a int, not a text or a list of turns"),
        ({"prompt": {}, "completion": "A."}, "prompt is a dict, not a text or a list of turns"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(folder, row, reason):
    samples = read_samples(jsonl(folder / "x.jsonl", {"image": "a.png", "text": "A dog."}, row))
    assert answers(samples) == ["A dog."]
    assert reason in drops(samples)["x.jsonl line 2"]


# columns


def test_alpacas_columns_are_a_conversation(folder):
    row = {"instruction": "What is it?", "input": "Be brief.", "output": "A cat.", "system": "You see.", "text": "no"}
    (sample, short) = read_samples(
        jsonl(
            folder / "x.jsonl",
            row | {"image": "a.png", "history": [["Hi?", "Ho."]]},
            {"image": "a.png", "instruction": "<image>What?", "input": "", "output": "A dog."},
        )
    )
    turns = [(one["role"], [part.get("text", part["type"]) for part in one["content"]]) for one in sample.messages]
    assert turns == [
        ("system", ["You see."]),
        ("user", ["image", "Hi?"]),
        ("assistant", ["Ho."]),
        ("user", ["What is it?\nBe brief."]),
        ("assistant", ["A cat."]),
    ]
    assert short.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


VQA = {"pic": "a.png", "q": "What is it?", "a": "A cat.", "text": "not read", "messages": "nor this"}


def test_columns_with_names_of_their_own(folder):
    path = jsonl(folder / "x.jsonl", VQA, {"pic": "b.png", "a": "A dog."}, {"pic": "b.png", "q": "What?", "a": None})
    samples = read_samples(path, columns={"image": "pic", "question": "q", "answer": "a"})
    assert answers(samples) == ["A cat."]
    assert samples.samples[0].messages[0]["content"][1]["text"] == "What is it?"
    assert list(drops(samples)) == ["x.jsonl line 2", "x.jsonl line 3"]
    as_captions = read_samples(path, "Say it.", {"image": "pic", "answer": "a"})
    assert answers(as_captions) == ["A cat.", "A dog."]
    assert as_captions.samples[0].messages[0]["content"][1]["text"] == "Say it."
    pq.write_table(pa.Table.from_pylist([VQA | {"pic": png()}]), folder / "x.parquet")
    for kind in (folder / "x.parquet", datasets.Dataset.from_list([VQA | {"pic": str(folder / "a.png")}])):
        assert answers(read_samples(kind, columns={"image": "pic", "question": "q", "answer": "a"})) == ["A cat."]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"picture": "pic", "answer": "a"}, "columns with 'picture'. Expected one of image, question, answer"),
        ({"image": "pic"}, "Expected exactly one of answer, caption, messages"),
        ({"image": "pic", "answer": "a", "caption": "a"}, "Expected exactly one of"),
        ({"image": "pic", "question": "q", "caption": "a"}, "question, without answer"),
        ({"image": "", "caption": "a"}, "columns with image=''"),
        ({"image": "photo", "caption": "a"}, "image='photo', which is in no row of"),
        ("image=pic,answer=a", "columns='image=pic,answer=a'. Expected a mapping of role to name"),
    ],
)
def test_wrong_columns_are_refused(folder, columns, said):
    assert said in failure(jsonl(folder / "x.jsonl", VQA), columns=columns)


def test_columns_of_a_run_file_and_of_the_command_line(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("model: m\ndata: d\nmaps: s\nout: o\ncolumns: {image: pic, answer: a}\n")
    assert read_run(run).columns == {"image": "pic", "answer": "a"}
    with pytest.raises(ConfigError, match="columns with 'picture'"):
        read_run(run, ["columns={picture: pic, answer: a}"])
    assert columns_of(Namespace(columns="image=pic,answer=a=b")) == {"image": "pic", "answer": "a=b"}
    assert columns_of(Namespace(columns=None)) is None
    for wrong in ("image", "image=a,image=b", ""):
        with pytest.raises(ConfigError, match="Expected each role once, as ROLE=NAME"):
            columns_of(Namespace(columns=wrong))


# published layouts


def test_texts_beside_pictures(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "c.jpg").write_bytes(png(7))
    (folder / "sub" / "c.txt").write_text("\ufeff[a cat]\n", encoding="utf-8")
    (folder / "a.txt").write_bytes("café".encode("latin-1"))
    (folder / "readme.txt").write_text("of no picture")
    samples = read_samples(folder)
    assert answers(samples) == ["[a cat]"]
    assert samples.samples[0].name == "sub/c.jpg"
    assert drops(samples) == {
        "a.png": "its text a.txt: not UTF-8; save it as UTF-8",
        "b.png": "no text b.txt beside it",
    }


def test_folders_of_texts_and_pictures_that_are_not_read_are_named(folder):
    """Links to folders, which may lead in a circle or anywhere, and folders that cannot be read."""
    data = folder / "data"
    for place in (data / "a", data / "z"):
        place.mkdir(parents=True)
        (place / "x.png").write_bytes(png())
        (place / "x.txt").write_text(f"A {place.name}.")
    for name, target in (("b", data), ("c", Path("/proc/self"))):
        (data / name).symlink_to(target)
    reason = "a link to a folder, which is not followed; put the folder itself there"
    samples = read_samples(data)
    assert answers(samples) == ["A a.", "A z."]
    assert drops(samples) == {"b": reason, "c": reason}
    rows = text_rows(data)
    assert [next(rows).name for _ in range(3)] == ["b", "c", "a/x.png"]
    shutil.rmtree(data / "z")
    assert [(row.name, row.fault) for row in rows] == [("z", "a folder that cannot be read: No such file or directory")]


def karpathy(folder: Path, name: str, **more: Any) -> Path:
    """A file in the form of dataset_coco.json, whose second picture is missing and whose fourth row is broken."""
    rows: list[Any] = [
        {"filename": f"{index}.png", "split": split, "sentences": [{"raw": f"A {index}."}, {"raw": f"B {index}."}]}
        for index, split in enumerate(("train", "train", "restval", "train", "test"))
    ]
    rows[3].pop("filename")
    for index in (0, 2, 4):
        place = folder / "images" / more.get("filepath", "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes(png(index))
    (folder / name).write_text(json.dumps({"images": [row | more for row in rows], "dataset": "x"}))
    return folder / name


@pytest.mark.parametrize("more", [{}, {"filepath": "val2014"}])
def test_karpathys_json(folder, more):
    path = karpathy(folder, "dataset_coco.json", **more)
    samples = read_samples(f"{path}:train+restval")
    assert answers(samples) == ["A 0.", "B 0.", "A 2.", "B 2."]
    assert [shade(one.load()[0]) for one in samples] == [0, 0, 2, 2]
    assert samples.outside == ()
    assert list(drops(samples)) == ["dataset_coco.json image 1", "dataset_coco.json image 3"]
    assert "no such file: " in drops(samples)["dataset_coco.json image 1"]
    assert "KeyError 'filename'" in drops(samples)["dataset_coco.json image 3"]
    assert answers(read_samples(f"{path}:test")) == ["A 4.", "B 4."]
    assert "the split 'val' of " in failure(f"{path}:val")
    assert "with the splits restval, test, train. Expected one split" in failure(path)


def test_a_picture_in_several_folders_of_published_captions(folder):
    """The file with the path of the row counts; by its name alone no folder is chosen."""
    path = karpathy(folder, "dataset_coco.json", filepath="val2014")
    for place in ("a_small", "b_small"):
        (folder / place).mkdir()
        for index in (0, 2, 4):
            (folder / place / f"{index}.png").write_bytes(png(200))
    assert [shade(one.load()[0]) for one in read_samples(f"{path}:train+restval")] == [0, 0, 2, 2]
    path = karpathy(folder, "without.json")
    assert "the picture 0.png is in a_small and b_small" in failure(f"{path}:train+restval")
    (folder / "results.csv").write_text("image_name| comment_number| comment\n0.png| 0| A cat .\n")
    assert "is in a_small and b_small" in failure(folder / "results.csv")
    (folder / "0.png").write_bytes(png(7))
    assert [shade(one.load()[0]) for one in read_samples(folder / "results.csv")] == [7]


def test_an_empty_cell_hides_no_column(folder):
    (folder / "x.csv").write_text("images,image,messages,text,caption\n,0.png,,,A cat.\n")
    (folder / "0.png").write_bytes(png(5))
    (sample,) = samples = read_samples(folder / "x.csv")
    assert [shade(picture) for picture in sample.load()] == [5]
    assert answers(samples) == ["A cat."]
    (sample,) = read_samples(jsonl(folder / "x.jsonl", {"images": [], "image": "0.png", "text": "A cat."}))
    assert len(sample.sources) == 1
    empty: list[dict] = [{"images": [None]}, {"images": [""]}, {"prompt": "", "completion": ""}, {"messages": []}]
    empty += [{"instruction": "", "output": ""}, {"conversations": [], "text": ""}, {"videos": [], "tools": " "}]
    rows = [{"image": "0.png", "caption": "A cat."} | cells for cells in empty]
    assert answers(read_samples(jsonl(folder / "y.jsonl", *rows))) == ["A cat."] * len(rows)
    (folder / "z.csv").write_text("image,prompt,completion,messages,text\n0.png,,,[],A cat.\n")
    assert answers(read_samples(folder / "z.csv")) == ["A cat."]


def tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def shown(number: int) -> dict[str, bytes]:
    described = {"caption": f"cat {number}", "exif": None if number < 6 else "{}"}
    return {"jpg": png(number), "txt": f"cat {number}".encode(), "json": json.dumps(described).encode()}


def test_webdataset(tmp_path):
    folder = tmp_path / "odd [name]"
    folder.mkdir()
    tar(folder / "a-00000-of-00002.tar", {f"{number:05}": shown(number) for number in range(8)})
    broken = {"y": shown(9) | {"txt": b"", "json": b"{}"}, "z": shown(7) | {"jpg": b""}}
    tar(folder / "a-00001-of-00002.tar", {"x": shown(8)} | broken)
    samples = read_samples(folder)
    assert answers(samples) == [f"cat {number}" for number in (*range(9), 7)]
    assert samples.samples[3].name == "a-00000-of-00002.tar 00003"
    assert samples.samples[3].load()[0].getpixel((0, 0)) == (3, 2, 3)
    assert drops(samples) == {"a-00001-of-00002.tar y": "empty caption: ['']"}
    assert list(drops(readable(samples)))[1:] == ["a-00001-of-00002.tar z"]
    assert len(read_samples(folder / "a-00000-of-00002.tar")) == 8
    assert answers(read_samples(folder, columns={"image": "jpg", "caption": "txt"})) == answers(samples)
    (folder / "a-00001-of-00002.tar").write_bytes(b"no tar" * 200)
    assert "a-00001-of-00002.tar, which cannot be read: " in failure(folder)
    (folder / "a-00001-of-00002.tar").unlink()
    assert "without 1 of the 2 shards of 'a'" in failure(folder)


def test_a_bad_sample_of_a_webdataset_costs_only_itself(tmp_path):
    question = {"from": "human", "value": "<image><image>What?"}
    talk = json.dumps({"images": ["x.jpg"], "conversations": [question, {"from": "gpt", "value": "Two."}]}).encode()
    tar(
        tmp_path / "x.tar",
        {
            "0": {"jpg": png(), "txt": b"A cat."},
            "1": {"png": png(), "txt": b"A PNG.", "cls": b"5"},
            "2": {"jpg": png(), "json": b"{bad"},
            "3": {"jpg": png(), "json": b"[1]"},
            "4": {"jpg": png(), "txt": b"caf\xe9"},
            "5": {"0.jpg": png(1), "1.jpg": png(2), "json": talk},
            "6": {"txt": b"No picture."},
            "dir/7": {"JPG": png(), "json": b'{"caption": "In the JSON.", "image": "no.jpg"}'},
        },
    )
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("8.txt"))
    samples = read_samples(tmp_path / "x.tar")
    assert answers(samples) == ["A cat.", "A PNG.", "Two.", "In the JSON."]
    assert [shade(picture) for picture in samples.samples[2].load()] == [1, 2]
    found = {name.removeprefix("x.tar "): reason for name, reason in drops(samples).items()}
    assert found.pop("2").startswith("its .json is not JSON: ")
    assert found == {
        "3": "its .json is a JSON list, not an object",
        "4": "its .txt is not UTF-8",
        "6": "no picture",
        "8": "two files with the ending .txt",
    }


def test_a_damaged_webdataset_does_not_end_early_in_silence(tmp_path):
    path = tmp_path / "x.tar"
    tar(path, {f"{number}": shown(number) for number in range(4)})
    whole = path.read_bytes()
    header = whole.index(b"2.jpg")
    path.write_bytes(whole[:header] + b"9" + whole[header + 1 :])  # its checksum is wrong now
    assert f"x.tar, which cannot be read: it is damaged at byte {header:,}" in failure(path)
    path.write_bytes(whole[:header])  # cut between two files
    samples = read_samples(path)
    assert answers(samples) == ["cat 0", "cat 1"]
    assert drops(samples) == {"x.tar end": "the mark of the archive's end is missing; samples may be missing too"}
    path.write_bytes(whole[: header + 100])
    assert "x.tar, which cannot be read: " in failure(path)


@pytest.mark.parametrize("kind", ["files", "webdataset", "parquet"])
def test_what_img2dataset_wrote(tmp_path, kind):
    """LAION's pictures as downloaded: those that failed are named with the reason."""
    statuses = ["success", "failed_to_download", "success", "success"]
    rows: list[dict[str, Any]] = [
        {
            "url": f"https://x.org/{number}",
            "caption": f"cat {number}" if number != 3 else None,
            "key": f"0000{number}",
            "status": status,
            "error_message": None if status == "success" else "HTTP Error 404:\nNot Found",
        }
        for number, status in enumerate(statuses)
    ]
    there = [row for row in rows if row["status"] == "success"]
    if kind == "parquet":
        rows = [row | {"jpg": png(int(row["key"])) if row in there else None} for row in rows]
    elif kind == "files":
        (tmp_path / "00000").mkdir()
        for row in there:
            (tmp_path / "00000" / f"{row['key']}.jpg").write_bytes(png(int(row["key"])))
    else:
        kept = [row for row in there if row["caption"]]
        tar(tmp_path / "00000.tar", {row["key"]: shown(int(row["key"])) for row in kept})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    samples = read_samples(tmp_path)
    assert answers(samples) == ["cat 0", "cat 2"]
    assert [shade(one.load()[0]) for one in samples] == [0, 2]
    assert drops(samples)["00000.parquet row 1"] == r"not downloaded: HTTP Error 404:\nNot Found"
    assert len(drops(samples)) == 2  # and the one without a caption
    (tmp_path / "00001.tar").touch()
    (tmp_path / "00002").mkdir()
    assert {name: drops(read_samples(tmp_path))[name] for name in ("00001.tar", "00002")} == {
        "00001.tar": "no table 00001.parquet beside it",
        "00002": "no table 00002.parquet beside it",
    }


def test_laion_as_published_asks_for_its_pictures(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"URL": "https://x.org/1", "TEXT": "a cat"}]), tmp_path / "part.parquet")
    assert "whose column URL has addresses of pictures" in failure(tmp_path)
    assert "img2dataset" in failure(tmp_path / "part.parquet")


# splits, saved data sets, streams, the hub


ROWS = [{"image": "a.png", "text": "A cat."}, {"image": "b.png", "text": "A dog."}]


def test_splits_of_a_folder(folder):
    data = folder / "data"
    data.mkdir()
    for split, row in zip(("train", "test"), ROWS, strict=True):
        pq.write_table(pa.Table.from_pylist([row | {"image": png()}]), data / f"{split}-00000-of-00001.parquet")
        jsonl(folder / split / "metadata.jsonl", {"file_name": "../a.png", "text": row["text"]})
    assert f"name one, as {data}:test" in failure(data)
    assert answers(read_samples(f"{data}:train")) == ["A cat."]
    assert "the split 'tra' of " in failure(f"{data}:tra")
    assert answers(read_samples(f"{folder}:test")) == ["A dog."]
    assert "which has no such split" in failure(f"{folder / 'train' / 'metadata.jsonl'}:train")
    rows = [row | {"image": str(folder / row["image"])} for row in ROWS]
    parts: dict[Any, Any] = {
        split: datasets.Dataset.from_list([row]) for split, row in zip(("train", "test"), rows, strict=True)
    }
    datasets.DatasetDict(parts).save_to_disk(folder / "saved")
    assert answers(read_samples(f"{folder / 'saved'}:test")) == ["A dog."]
    assert "with the splits train, test. Expected one split" in failure(folder / "saved")
    assert answers(read_samples(folder / "saved" / "train")) == ["A cat."]
    assert answers(read_samples(folder / "saved" / "train" / "data-00000-of-00001.arrow")) == ["A cat."]


@pytest.mark.parametrize("names", [("train.parquet", "test.parquet"), ("x-train-0.tar", "x-val-0.tar")])
def test_shards_of_several_splits_are_refused_by_their_names(tmp_path, names):
    for number, name in enumerate(names):
        if name.endswith(".tar"):
            tar(tmp_path / name, {"0": shown(number)})
        else:
            pq.write_table(pa.Table.from_pylist([{"image": png(), "text": f"cat {number}"}]), tmp_path / name)
    assert "Expected one split" in failure(tmp_path)
    assert answers(read_samples(f"{tmp_path}:train")) == ["cat 0"]


def test_shards_of_two_kinds_are_refused(tmp_path):
    dataset: Any = datasets.Dataset.from_list([{"image": png(), "text": "A cat."}])
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / "a.arrow")
    shutil.rmtree(tmp_path / "saved")
    assert "with files of the kinds .arrow, .parquet. Expected shards of one kind" in failure(tmp_path)


def test_folders_of_splits_and_files_of_splits(folder):
    for split in ("train", "test"):
        jsonl(folder / "files" / f"{split}.jsonl", {"image": "../a.png", "text": f"A {split}."})
        (folder / "texts" / split).mkdir(parents=True)
        (folder / "texts" / split / "x.png").write_bytes(png())
        (folder / "texts" / split / "x.txt").write_text(f"A {split}.")
    for kind in ("files", "texts"):
        assert answers(read_samples(f"{folder / kind}:train")) == ["A train."]
        assert "has no such split" in failure(f"{folder / kind}:val")
    assert f"name one, as {folder / 'texts'}:test" in failure(folder / "texts")
    assert f"Expected one file. Do this: give the path of one, as {folder / 'files'}/train.jsonl" in failure(
        folder / "files"
    )


def test_json_lines_in_a_json_file(folder):
    path = jsonl(folder / "x.json", *ROWS)
    path.write_text(path.read_text() + "{bad\n")
    samples = read_samples(path)
    assert answers(samples) == ["A cat.", "A dog."]
    assert list(drops(samples)) == ["x.json line 3"]
    assert "which has no such split" in failure(f"{path}:train")
    one = jsonl(folder / "one.json", ROWS[0])
    assert answers(read_samples(one)) == ["A cat."]
    assert "which has no such split" in failure(f"{one}:train")
    assert "a JSON dict where a list of rows should be" in failure(jsonl(folder / "coco.json", {"annotations": []}))


def test_a_parquet_file_of_one_row_group_is_not_held_in_memory(tmp_path):
    """As pandas writes it."""
    chance, pool, peak = random.Random(0), pa.default_memory_pool(), 0
    rows = [{"image": chance.randbytes(20_000), "text": "A cat."} for _ in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=len(rows), write_batch_size=64)
    del rows
    before = pool.bytes_allocated()
    for _ in parquet_rows(tmp_path / "x.parquet", Wanted()):
        peak = max(peak, pool.bytes_allocated() - before)
    assert peak < 40e6  # of 60 MB


def test_a_stream_is_read_without_decoding(folder):
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    rows = [{"image": {"bytes": png(), "path": None}, "text": "A cat."}, {"image": None, "text": "A dog."}]
    rows.append({"image": {"bytes": png()[:40], "path": None}, "text": "A hat."})
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "x.parquet")
    stream = datasets.load_dataset("parquet", data_files=str(folder / "x.parquet"), split="train", streaming=True)
    samples = read_samples(stream)
    assert answers(samples) == ["A cat.", "A hat."]
    assert samples.samples[0].source == png()
    assert drops(samples) == {"dataset row 1": "no picture"}


def test_hub_ids(folder, monkeypatch):
    """What is asked of `datasets`; the network is not used here."""
    asked = []

    def load(name: str, config: str | None, split: str | None) -> Any:
        asked.append((name, config, split))
        loaded: Any = datasets.Dataset.from_list([row | {"image": str(folder / "a.png")} for row in ROWS])
        return loaded if split else datasets.DatasetDict({"train": loaded})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for text in ("org/name", "org/name:train[:10%]", "org/name:config:train", Path("org/na.me:train")):
        assert answers(read_samples(text)) == ["A cat.", "A dog."]
    assert asked == [
        ("org/name", None, None),
        ("org/name", None, "train[:10%]"),
        ("org/name", "config", "train"),
        ("org/na.me", None, "train"),
    ]
    assert read_samples("org/name").samples[1].name == "org/name row 1"


def test_a_hub_id_that_cannot_be_loaded(monkeypatch):
    message = failure("org/no-such-data:train")
    assert "org/no-such-data, which is no path here, and which `datasets` cannot load: " in message
    assert "data/train.jsonl, which does not exist" in failure("data/train.jsonl")  # no id: the ending of a file


def cached(folder: Path, monkeypatch) -> Path:
    """A picture as `datasets` downloads it: a link in the hub's cache to a file in it. The cache itself is a link."""
    blob = folder / "disk" / "datasets--org--name" / "blobs" / "0f"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(png(7))
    (folder / "hub").symlink_to(folder / "disk")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    picture = folder / "hub" / "datasets--org--name" / "snapshots" / "1" / "a.png"
    picture.parent.mkdir(parents=True)
    picture.symlink_to("../../blobs/0f")
    return picture


@pytest.mark.parametrize("kind", ["hub id", "dataset", "saved", "saved split", "arrow file", "arrow folder"])
def test_strict_takes_pictures_in_the_cache_of_datasets(folder, monkeypatch, kind):
    """Pictures elsewhere are refused, also there."""
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    image = datasets.Image()
    features = datasets.Features(image=image, text=datasets.Value("string"))
    for picture, is_inside in ((cached(folder, monkeypatch), True), (folder / "a.png", False)):
        rows = [{"image": {"bytes": None, "path": str(picture)}, "text": "A cat."}]
        rows.append({"image": {"bytes": png(), "path": "b.png"}, "text": "A dog."})  # inside the table
        table: Any = datasets.Dataset.from_list(rows, features=features)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, table=table, **named: table)
        saved = folder / f"saved {is_inside}" / "train"
        struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}  # an Image would be embedded
        table.cast_column("image", datasets.Features(image=struct)["image"]).save_to_disk(saved)
        if kind == "arrow folder":  # as in the cache of `datasets`
            (saved / "state.json").unlink()
        data: Any = {"hub id": "org/name", "dataset": table, "saved split": f"{saved.parent}:train"}.get(kind, saved)
        samples = read_samples(next(saved.glob("*.arrow")) if kind == "arrow file" else data)
        assert answers(samples) == ["A cat.", "A dog."]
        if is_inside:
            samples.check_strict()
            assert shade(samples.samples[0].load()[0]) == 7
        else:
            with pytest.raises(DataError, match=r"a\.png lies outside the folder"):
                samples.check_strict()


def test_strict_refuses_the_cache_of_datasets_in_files_of_others(folder, monkeypatch):
    (folder / "mine").mkdir()
    picture = cached(folder, monkeypatch)
    samples = read_samples(jsonl(folder / "mine" / "x.jsonl", {"image": str(picture), "text": "A cat."}))
    with pytest.raises(DataError, match=r"a\.png lies outside the folder"):
        samples.check_strict()


@pytest.mark.parametrize("name", ["./org/name", "../org/name", "~/org/name", "org/name/", "./org/name:train", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_id(folder, monkeypatch, name):
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: pytest.fail("the hub was asked"))
    for given in (name, data_path(name), str(folder / "org" / "name")):  # as the commands give it: a Path
        message = failure(given)
        assert "org/name" in message or "a/b/c" in message
        assert "which does not exist. Expected a file or folder of data. Do this: check the path" in message


def test_a_path_with_a_dot_that_is_there_stays_as_it_is_written(folder, monkeypatch):
    monkeypatch.chdir(folder)
    jsonl(folder / "x.jsonl", *ROWS)
    assert data_path("./x.jsonl") == Path("x.jsonl")
    assert answers(read_samples("./x.jsonl")) == ["A cat.", "A dog."]
    assert data_path("org/name:train") == Path("org/name:train")


# on disk


def test_samples_lie_in_a_file_that_goes_with_them(folder, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (folder / "tmp").mkdir()
    path = jsonl(folder / "x.jsonl", *ROWS * 3)
    samples = read_samples(path)
    [place] = (folder / "tmp").iterdir()
    table: Any = samples.samples
    assert [table[index].answers[0] for index in (0, 1, -1)] == ["A cat.", "A dog.", "A dog."]
    assert [one.answers[0] for one in table[1:6:2]] == ["A dog."] * 3
    assert len(table[3:3]) == 0
    with pytest.raises(IndexError):
        table[6]
    kept = readable(samples)
    del samples, table
    assert place.is_dir()
    dataset = to_dataset(kept)
    del kept
    assert place.is_dir()
    assert [one["images"][0].size for one in dataset] == [(13, 11)] * 6
    read_samples(path)
    assert list((folder / "tmp").iterdir()) == [place]  # that of samples without a user is gone
