"""What data sets hold that no example shows: each row is read, or dropped by name; each file read, or one error."""

from __future__ import annotations

import base64
import csv
import json
import os
import threading
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lavender.data import tables
from lavender.data.images import image_id, load_image
from lavender.data.samples import Samples, read_samples, readable, to_dataset
from lavender.errors import DataError
from lavender.files import json_items, parse_json, printable, shown

GOOD = {"image": "a.png", "text": "A dog."}
USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}


def png(width: int = 13) -> bytes:
    buffer = BytesIO()
    Image.effect_noise((width, 11), 90).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png())
    return tmp_path / "data"


def raw(folder: Path, *lines: str | bytes, name: str = "x.jsonl") -> Samples:
    """A file of these lines, read."""
    encoded = [line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass") for line in lines]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in encoded))
    return read_samples(folder / name)


def rows(folder: Path, *values: object) -> Samples:
    return raw(folder, *(json.dumps(one) for one in values))


def answers(samples: Samples) -> list[str]:
    return [one.answers[0] for one in samples]


def failure(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_samples(path)
    return str(caught.value)


# rows


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"image": "a.png", "text": ' + "9" * 5000 + "}", "a number with too many digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"image": "a.png", "image": "b.png", "text": "x"}', "an object with the key 'image' twice"),
        ('{"image": "a.png", "messages": [{"role": "user", "role": "system"}]}', "an object with the key 'role' twice"),
        ('{"image": NaN, "text": "x"}', "the picture is a float"),
        ('{"image": "a.png", "text": NaN}', "a caption is a float, not a text"),
        ('{"image": "a.png", "text": "\\ud800 dog"}', "a text with half of a surrogate pair at character 0"),
        ('{"image": "\\ud800.png", "text": "x"}', "the picture's name has half of a surrogate pair"),
        (b'{"image": "a.png", "text": "caf\xe9"}', "not UTF-8: byte 0xe9 at character 31; save the file as UTF-8"),
        ("{\0}", "it holds NUL characters, as UTF-16 does"),
        ('{"image": "a.png", "messages": "' + "[" * 60_000 + '"}', "nested too deeply"),
    ],
)
def test_a_row_that_is_not_json_of_one_meaning_is_dropped_alone(folder, line, reason):
    samples = raw(folder, json.dumps(GOOD), line, json.dumps(GOOD | {"text": "A cat."}))
    assert answers(samples) == ["A dog.", "A cat."]
    assert [one.what for one in samples.dropped] == ["x.jsonl line 2"]
    assert reason in samples.dropped[0].reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": ["user"], "content": "x"}]}, "the role ['user'], not one of"),
        ({"messages": [{"role": {"a": 1}, "content": "x"}]}, "the role {'a': 1}, not one of"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "a part of the type ['text']"),
        ({"image": "x" * 300 + ".png"}, "a name too long for a file: "),
        ({"image": "a\0.png"}, "a name that no file can have: "),
        ({"image": "."}, "a folder, not a file: "),
        ({"image": "pipe.png"}, "a pipe, not a file: "),
        ({"image": "loop.png"}, "links that lead in a circle: "),
        ({"image": "zero.png"}, "a device, not a file: "),
        ({"image": "data:image/png;base64,@@@"}, "the data address data:image/png;base64,@@@, which holds no base64"),
        ({"image": "data:image/svg+xml,<svg/>"}, "which holds no base64"),
        ({"text": "['A dog.', 'A cat.']"}, "a list of captions that is not JSON"),
        ({"text": '["A dog."'}, "a list of captions that is not JSON"),
        ({"text": "[]"}, "empty caption: '[]'"),
        ({"system": 5}, "system is a int, not a text"),
        (
            {"system": "Be brief.", "messages": [{"role": "system", "content": "No."}, USER, ANSWER]},
            "a column system and",
        ),
        ({"tools": "[{}]"}, "conversations with tools are not supported"),
        ({"audios": ["a.wav"]}, "a sound"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "b.png"}]}, ANSWER]},
            "turns that name other pictures than the row's column",
        ),
    ],
)
def test_a_row_of_odd_values_is_dropped_with_its_reason(folder, row, reason):
    os.mkfifo(folder / "pipe.png")
    os.symlink("loop.png", folder / "loop.png")
    os.symlink("/dev/zero", folder / "zero.png")
    samples = rows(folder, GOOD, GOOD | row)
    assert answers(samples) == ["A dog."]
    assert reason in samples.dropped[0].reason
    assert len(samples.dropped[0].reason) < 1000


def test_a_column_system_is_the_system_turn(folder):
    talk = [USER, ANSWER]
    same = [{"role": "system", "content": "Be brief."}, *talk]
    first, second, blank = rows(
        folder,
        {"image": "a.png", "system": "Be brief.", "conversations": talk},
        {"image": "a.png", "system": "Be brief.", "messages": same},
        {"image": "a.png", "system": " ", "messages": talk},
    )
    assert first.messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert first.messages == second.messages
    assert [one["role"] for one in blank.messages] == ["user", "assistant"]


def test_pictures_inside_the_text_file(folder):
    content = png()
    code = base64.b64encode(content).decode()
    forms = [
        code,
        f"data:image/png;base64,{code}",
        f"DATA:;base64,{code.rstrip('=')}",
        "\n".join([code[:76], code[76:]]),
        f"data:image/png;base64,{code.replace('+', '%2B')}",
        {"bytes": code, "path": "gone.png"},
    ]
    samples = rows(folder, *({"image": one, "text": "A dog."} for one in forms))
    assert samples.dropped == ()
    assert {one.source for one in samples} == {content}
    assert samples.outside == ()


def test_a_list_in_csv(folder):
    with (folder / "x.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for text in (json.dumps(["A dog.", "A cat."]), "[sic] A hat.", "['A cup.']", '[{"box": 1}]'):
            table.writerow([json.dumps(["a.png"]), text])
    samples = read_samples(folder / "x.csv")
    assert answers(samples) == ["A dog.", "A cat.", "[sic] A hat.", '[{"box": 1}]']
    assert [one.what for one in samples.dropped] == ["x.csv line 4"]


def test_turns_of_prompt_and_completion_in_csv(folder):
    with (folder / "x.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "prompt", "completion"])
        table.writerow(["a.png", json.dumps([USER]), json.dumps([ANSWER])])
    (sample,) = read_samples(folder / "x.csv")
    assert sample.answers == ("Ho.",)


# files


def test_a_quote_that_is_not_closed_costs_its_row_alone(folder):
    lines = ('a.png,"A dog', "a.png,A cat.", 'a.png,"A hat,', 'yes"', "a.png,A cup.")
    samples = raw(folder, "image,text", *lines, name="x.csv")
    assert answers(samples) == ["A cat.", "A hat,\nyes", "A cup."]
    assert [one.what for one in samples.dropped] == ["x.csv line 2"]
    assert "not CSV: " in samples.dropped[0].reason
    many = raw(folder, "image,text", 'a.png,"A dog', *["a.png,A cat."] * 3000, name="x.csv")
    assert (len(many), len(many.dropped)) == (3000, 1)


def test_long_fields_are_read_and_the_limit_of_others_stays(folder):
    before = csv.field_size_limit()
    (sample,) = raw(folder, "image,text," + "h" * 200_000, "a.png," + "dog " * 100_000 + ",x", name="x.csv")
    assert len(sample.answers[0]) == 399_999
    assert csv.field_size_limit() == before


def test_a_column_twice_is_an_error(folder):
    (folder / "x.csv").write_text("image,image,text\na.png,b.png,x\n")
    assert "x.csv with the column 'image' twice" in failure(folder / "x.csv")
    table = pa.Table.from_arrays([pa.array(["a.png"])] * 3, ["image", "text", "text"])
    pq.write_table(table, folder / "x.parquet")
    assert "x.parquet with the column 'text' twice" in failure(folder / "x.parquet")


def test_one_row_of_a_json_list_does_not_take_the_others_along(folder):
    odd = ["9" * 5000, "[" * 50_000 + "]" * 50_000, '{"a": 1, "a": "]"}', '{"image": "a.png", "text": "caf\xe9"}']
    good = json.dumps(GOOD).encode()
    content = b"[" + b", ".join([good, *(one.encode("latin-1") for one in odd), good]) + b"]\n"
    (folder / "x.json").write_bytes(content)
    samples = read_samples(folder / "x.json")
    assert [one.name for one in samples] == ["x.json row 0", "x.json row 5"]
    assert [one.what for one in samples.dropped] == [f"x.json row {index}" for index in (1, 2, 3, 4)]
    assert "or the byte 0xe9, which is not UTF-8, at character 3" in samples.dropped[3].reason
    for cut in (content[:-3], content + b"x", content[:100].replace(b",", b";"), b'[{"a": "'):
        (folder / "x.json").write_bytes(cut)
        assert "x.json, which cannot be read: not JSON: " in failure(folder / "x.json")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_utf_16_is_named(folder, name):
    (folder / name).write_bytes(json.dumps([GOOD]).encode("utf-16"))
    assert "UTF-16, by its first two bytes" in failure(folder / name)


def test_line_separators_inside_a_text_end_no_line(folder):
    text = "A\u2028dog\x85and\x0ca\x1ccat"
    assert answers(raw(folder, json.dumps(GOOD | {"text": text}, ensure_ascii=False))) == [text]
    assert answers(raw(folder, "image,text", f"a.png,{text}", name="x.csv")) == [text]


def test_lines_without_an_end(folder, monkeypatch):
    monkeypatch.setattr(tables, "_MAX_LINE", 1000)
    samples = raw(folder, json.dumps(GOOD), "x" * 5000, json.dumps(GOOD))
    assert len(samples) == 2
    assert samples.dropped[0].reason == "longer than 1,000 characters"
    (folder / "x.jsonl").write_bytes(b"\0" * 5000)
    assert "line 1 has no end and holds NUL bytes; it is no text" in failure(folder / "x.jsonl")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet"])
def test_data_that_are_no_plain_files(folder, name):
    os.mkfifo(folder / name)
    assert "a pipe, not a file: " in failure(folder / name)
    os.unlink(folder / name)
    os.symlink("/dev/zero", folder / name)
    assert "a device, not a file: " in failure(folder / name)
    os.unlink(folder / name)
    os.symlink(name, folder / name)
    assert "links that lead in a circle: " in failure(folder / name)


def test_cells_that_python_cannot_hold_drop_their_row(folder):
    text = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe dog", b"A cat."], pa.binary()).buffers())
    pq.write_table(pa.table({"image": ["a.png"] * 2, "text": text}), folder / "x.parquet")
    samples = read_samples(folder / "x.parquet")
    assert answers(samples) == ["A cat."]
    assert samples.dropped[0].what == "x.parquet row 0"
    assert "text cannot be read (UnicodeDecodeError)" in samples.dropped[0].reason
    table = {"image": ["a.png"], "text": ["A dog."], "when": pa.array([2**31 - 1], pa.date32())}
    pq.write_table(pa.table(table), folder / "x.parquet")
    assert answers(read_samples(folder / "x.parquet")) == ["A dog."]  # a column that is not read does no harm


@pytest.mark.parametrize(
    ("pattern", "numbers", "said"),
    [
        ("train-{:05}-of-00003.parquet", (0, 2), "without 1 of the 3 shards of 'train': 00001 of 00003"),
        ("train-{:05}-of-00003-a09b74.parquet", (0, 1), "00002 of 00003"),
        ("{:05}-of-00003.parquet", (1, 2), "shards of '': 00000 of 00003"),
        ("train_{}_of_12.parquet", (0, 3), "01, 02, 04, 05, 06, 07, 08, 09 … of 12"),
        ("train-{:05}-of-9999999999.parquet", (0,), "without 9999999998 of the 9999999999 shards"),
        ("train-{:05}-of-00003.parquet", (1, 3), "00002 of 00003"),
        ("train-{:05}-of-00002.parquet", (0, 1, 7), "the shard 7 of 00002 twice or beyond its count"),
    ],
)
def test_a_missing_shard_is_named(folder, pattern, numbers, said):
    for number in numbers:
        pq.write_table(pa.table({"image": ["a.png"], "text": ["A dog."]}), folder / pattern.format(number))
    assert said in failure(folder)


def test_shards_of_two_downloads_are_refused_and_whole_ones_are_read(folder):
    table = pa.table({"image": ["a.png"], "text": ["A dog."]})
    for number in (1, 2):
        pq.write_table(table, folder / f"train-{number:05}-of-00002.parquet")  # counted from 1
    assert len(read_samples(folder)) == 2
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    assert "with shards of ['00001', '00002'] in all" in failure(folder)


# pictures outside the folder


def test_pictures_outside_are_read_and_refused_by_strict(folder, monkeypatch):
    outside = folder.parent / "out.png"
    outside.write_bytes(png())
    os.symlink(outside, folder / "link.png")
    os.symlink(folder.parent, folder / "up")
    os.symlink("a.png", folder / "inside.png")
    monkeypatch.setenv("HOME", str(folder.parent))
    samples = rows(
        folder,
        *(GOOD | {"image": one} for one in ("../out.png", str(outside), "link.png", "up/out.png", "~/out.png")),
        *(GOOD | {"image": one} for one in ("a.png", "inside.png", str(folder / "a.png"), "../data/a.png")),
    )
    assert len(samples) == 9
    assert [one.what for one in samples.outside] == [f"x.jsonl line {number}" for number in range(1, 6)]
    assert samples.outside[0].reason == f"the picture {folder}/../out.png lies outside the folder {folder}"
    assert readable(samples).outside == samples.outside
    with pytest.raises(DataError, match=r"line 1: the picture .* lies outside the folder .* leave strict out"):
        samples.check_strict()
    rows(folder, GOOD).check_strict()
    assert len(read_samples("~/data/x.jsonl")) == 1
    dataset = to_dataset(samples)
    assert len(read_samples(dataset).outside) == 9  # a dataset has no folder but the working directory


BEGINNINGS = (b"", b"root:x:0:0:", b"P5 ", b"P3 9 9 ", b"\x89PNG\r\n\x1a\n", b"II*\0", b"GIF89a", b"BM")


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_no_error_quotes_a_file(folder, beginning):
    (folder.parent / "secret").write_bytes(beginning + b"s3cret " * 40)
    samples = rows(folder, GOOD, GOOD | {"image": "../secret"})
    kept = readable(samples)
    assert len(kept) == 1
    assert "s3cret" not in kept.dropped[0].reason
    assert "root" not in kept.dropped[0].reason
    os.symlink("../secret", folder / "secret.csv")
    (folder.parent / "secret").write_bytes(beginning + b"s3cret:x:0\nx:y:0\n")
    assert "s3cret" not in failure(folder / "secret.csv")


# the parts


def test_readable_keeps_classes_of_errors(folder, monkeypatch):
    from lavender.data import samples as reading

    samples = rows(folder, GOOD)

    def fails(sample):
        raise MemoryError(threading.current_thread().name)

    monkeypatch.setattr(reading, "_identities", fails)
    with pytest.raises(MemoryError, match="ThreadPool"):
        readable(samples)


def test_what_messages_show():
    deep: list = []
    for _ in range(900):
        deep = [deep]
    assert len(shown(deep)) < 100
    assert len(shown("x" * 10**6)) < 200
    assert printable("a\n\ud800\u2028b") == r"a\n\ud800\u2028b"
    assert len(printable("x" * 10**6)) < 400


def test_parse_json_reads_what_json_reads():
    text = ' [1, "a\\u00e9\\ud83d\\udc31", {"b": [null, true, 1e3]}, []] '
    assert parse_json(text) == json.loads(text)
    assert [value for value, _ in json_items(text)] == json.loads(text)
    assert list(json_items("[ ]")) == []


def test_pixels_of_a_dataset_are_those_of_the_file(folder):
    samples = rows(folder, GOOD)
    assert image_id(to_dataset(samples)[0]["images"][0]) == image_id(load_image(folder / "a.png", "a"))
