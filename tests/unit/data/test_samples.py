"""Data sets: each layout read into the same samples, each drop named, each error readable."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lavender.data.images import image_id
from lavender.data.samples import Sample, Samples, read_samples, to_dataset
from lavender.errors import DataError
from lavender.maps import Dropped


def png(shade: int = 0) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (13, 11), (shade, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    for index, name in enumerate(("a.png", "b.png", "sub/c.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(index))
    return tmp_path


def jsonl(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(samples: Samples) -> list[tuple[str, ...]]:
    return [sample.answers for sample in samples]


def reasons(samples: Samples) -> list[str]:
    return [dropped.reason for dropped in samples.dropped]


def captioned(prompt: str, answer: str) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def test_imagefolder_of_jsonl(folder):
    jsonl(
        folder / "metadata.jsonl", {"file_name": "b.png", "text": " A dog. "}, {"file_name": "sub/c.png", "text": "Ü"}
    )
    samples = read_samples(folder)
    assert list(samples) == [
        Sample("metadata.jsonl line 1", (folder / "b.png",), captioned("Describe the image.", "A dog.")),
        Sample("metadata.jsonl line 2", (folder / "sub/c.png",), captioned("Describe the image.", "Ü")),
    ]
    assert len(samples) == 2
    assert samples.dropped == ()
    assert samples.samples[0].load()[0].getpixel((0, 0)) == (1, 2, 3)


def test_imagefolder_of_csv_with_its_faults(folder):
    table = '\ufefffile_name,caption\na.png,"One, ""two""\nthree"\nb.png,  \nno.png,A cat\nb.png\nb.png,A hat\n'
    (folder / "metadata.csv").write_text(table, encoding="utf-8")
    samples = read_samples(str(folder), prompt="What?")
    assert texts(samples) == [('One, "two"\nthree',), ("A hat",)]
    assert samples.samples[1].messages == captioned("What?", "A hat")
    assert samples.samples[1].name == "metadata.csv line 7"
    assert samples.dropped == (
        Dropped("metadata.csv line 4", "empty caption: '  '"),
        Dropped("metadata.csv line 5", f"no such file: {folder / 'no.png'}"),
        Dropped("metadata.csv line 6", "1 fields where the header has 2"),
    )


@pytest.mark.parametrize("images", [".", "flickr30k_images"])
def test_flickr30k(tmp_path, images):
    (tmp_path / images).mkdir(exist_ok=True)
    for name in ("1000092795.jpg", "2199200615.jpg"):
        (tmp_path / images / name).write_bytes(png())
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\n"
        "1000092795.jpg| 0| Two young guys with shaggy hair .\n"
        '1000092795.jpg| 1| A "sign" | and a bar .\n'
        "2199200615.jpg| 4   A dog runs across the grass .\n"
        "2199200615.jpg| 3| A dog runs .\n"
        "7.jpg| 0| Gone .\n",
        encoding="utf-8",
    )
    samples = read_samples(tmp_path)
    assert texts(samples) == [("Two young guys with shaggy hair .",), ('A "sign" | and a bar .',), ("A dog runs .",)]
    assert [sample.source for sample in samples][2] == tmp_path / images / "2199200615.jpg"
    bar, gone = samples.dropped
    line = "2199200615.jpg| 4   A dog runs across the grass ."
    assert bar == Dropped("results.csv line 4", f"2 fields separated by bars, not 3: {line!r}")
    assert gone == Dropped("results.csv line 6", f"no such file: {tmp_path / '7.jpg'}")


def test_messages_of_every_form_become_one_form(folder):
    part_form = captioned("Hi?", "Ho.")
    after = [{"role": "user", "content": [{"type": "text", "text": "Hi?"}, {"type": "image"}]}, part_form[1]]
    system = {"role": "system", "content": "Be brief."}
    text_form = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
    path = jsonl(
        folder / "train.jsonl",
        {"images": ["a.png"], "messages": part_form},
        {"images": ["a.png"], "messages": text_form},
        {"image": "a.png", "prompt": "Hi?", "completion": "Ho."},
        {"image": "a.png", "prompt": text_form[:1], "completion": text_form[1:]},
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nHi?"}, {"from": "gpt", "value": "Ho."}],
        },
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "Hi?\n<image>"}, {"from": "gpt", "value": "Ho."}],
        },
        {"image": "a.png", "messages": after},
        {"image": "a.png", "messages": [system, *text_form, *text_form]},
    )
    samples = read_samples(path)
    assert samples.dropped == ()
    assert all(sample.messages == part_form for sample in samples.samples[:5])
    assert samples.samples[5].messages == samples.samples[6].messages == after
    last = samples.samples[7]
    assert last.messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert last.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "Hi?"}]
    assert last.messages[3]["content"] == [{"type": "text", "text": "Hi?"}]
    assert last.answers == ("Ho.", "Ho.")


def test_llava_json(folder):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A hat."}]
    rows = [{"id": 1, "conversations": turns}, {"id": 2, "image": "sub/c.png", "conversations": turns}, 7]
    (folder / "llava.json").write_text(json.dumps(rows), encoding="utf-8")
    samples = read_samples(folder / "llava.json")
    assert list(samples) == [Sample("llava.json row 1", (folder / "sub/c.png",), captioned("What?", "A hat."))]
    assert samples.dropped == (
        Dropped("llava.json row 0", "no picture and 1 place for pictures"),
        Dropped("llava.json row 2", "a JSON int, not an object"),
    )


def test_several_captions_are_several_samples(folder):
    samples = read_samples(jsonl(folder / "a.jsonl", {"image": "a.png", "caption": ["A cat.", "A hat."]}))
    assert texts(samples) == [("A cat.",), ("A hat.",)]
    assert [sample.name for sample in samples] == ["a.jsonl line 1 caption 0", "a.jsonl line 1 caption 1"]


USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.png", "text": ""}, "empty caption: ''"),
        ({"image": "a.png", "text": None}, "no text in any of the columns messages, conversations"),
        ({"image": "a.png", "caption": ["A", " "]}, "empty caption: ['A', ' ']"),
        ({"images": [], "text": "A"}, "no picture"),
        ({"image": "", "text": "A"}, "no picture"),
        ({"images": ["a.png", "b.png"], "text": "A"}, "2 pictures and no place for pictures"),
        (
            {"image": ["a.png", None], "conversations": [{"from": "human", "value": "<image><image>"}, ANSWER]},
            "NoneType",
        ),
        ({"images": ["a.png", "b.png"], "messages": [USER, ANSWER]}, "2 pictures and no place for pictures"),
        (
            {"images": ["a.png", "b.png"], "messages": [{**USER, "content": "<image>?"}, ANSWER]},
            "2 pictures and 1 place",
        ),
        ({"images": '["a.png"', "messages": [USER, ANSWER]}, "not JSON: "),
        ({"messages": [{**USER, "content": "<image>?"}, ANSWER]}, "no picture and 1 place for pictures"),
        ({"image": "a.png", "videos": ["a.mp4"], "messages": [USER, ANSWER]}, "a video; only still pictures have maps"),
        ({"video": "a.mp4", "messages": [USER, ANSWER]}, "a video; only still pictures have maps"),
        (
            {
                "images": ["a.png", "b.png"],
                "messages": [
                    {**USER, "content": [{"type": "image", "index": 1}, {"type": "image", "index": 0}]},
                    ANSWER,
                ],
            },
            "places for the pictures [1, 0], not in the pictures' order",
        ),
        ({"image": "https://x.org/a.png", "text": "A"}, "the address https://x.org/a.png; download it"),
        ({"image": {"path": "no.png"}, "text": "A"}, "no such file: "),
        ({"image": 7, "text": "A"}, "the picture is a int, not a path"),
        ({"image": "a.png", "messages": "A dog."}, "not JSON: "),
        ({"image": "a.png", "messages": {"role": "user"}}, "messages is a dict, not a list"),
        ({"image": "a.png", "messages": [7]}, "a turn is a int, not an object"),
        ({"image": "a.png", "messages": [USER, {"role": "tool", "content": "A"}]}, "the role 'tool', not one of"),
        ({"image": "a.png", "messages": [USER, {"role": "assistant"}]}, "content is a NoneType, not a list"),
        ({"image": "a.png", "messages": [USER, {**ANSWER, "content": " "}]}, "an empty answer"),
        ({"image": "a.png", "messages": [USER]}, "no assistant turn"),
        ({"image": "a.png", "messages": [ANSWER]}, "no user turn"),
        (
            {"image": "a.png", "messages": [{**USER, "content": "<image><image>Hi?"}, ANSWER]},
            "1 picture and 2 places for pictures",
        ),
        (
            {"image": "a.png", "messages": [USER, {**ANSWER, "content": "<image>"}]},
            "a picture in the assistant's turn, not in",
        ),
        (
            {"image": "a.png", "messages": [{**USER, "content": [{"type": "video"}]}, ANSWER]},
            "a video; only still pictures have maps",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_and_named(folder, row, reason):
    samples = read_samples(jsonl(folder / "a.jsonl", row, {"image": "a.png", "text": "A dog."}))
    assert texts(samples) == [("A dog.",)]
    assert samples.dropped[0].what == "a.jsonl line 1"
    assert reason in samples.dropped[0].reason


TWO = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A hat."}]},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And"}, {"type": "image"}, {"type": "text", "text": "this?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
]
TEXT = [
    {"role": "user", "content": [{"type": "text", "text": "Hi?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Ho."}]},
]


def test_several_pictures_keep_their_places(folder):
    """As parts, as markers of LLaVA and ShareGPT, as structs of parquet, and as JSON in a cell of CSV."""
    plain = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A hat."},
        {"from": "human", "value": "And <image> this?"},
        {"from": "gpt", "value": "A cat."},
    ]
    numbered = json.loads(json.dumps(TWO))
    numbered[0]["content"][0]["index"], numbered[2]["content"][1]["index"] = 0, 1
    path = jsonl(
        folder / "a.jsonl",
        {"images": ["a.png", "b.png"], "messages": TWO},
        {"images": ["a.png", "b.png"], "messages": numbered},
        {"images": ["a.png", "b.png"], "conversations": plain},
        {"image": ["a.png", "b.png"], "conversations": plain},
    )
    structs = [{"bytes": png(0), "path": "gone.png"}, {"bytes": None, "path": "b.png"}]
    pq.write_table(pa.Table.from_pylist([{"images": structs, "messages": TWO}]), folder / "a.parquet")
    cells = (json.dumps(one).replace('"', '""') for one in (["a.png", "b.png"], TWO))
    (folder / "a.csv").write_text("images,messages\n" + ",".join(f'"{cell}"' for cell in cells) + "\n")
    read = [*read_samples(path), *read_samples(folder / "a.csv"), *read_samples(folder / "a.parquet")]
    files = (folder / "a.png", folder / "b.png")
    assert [one.sources for one in read] == [files] * 5 + [(png(0), folder / "b.png")]
    assert all(one.messages == TWO for one in read)
    assert [image.getpixel((0, 0)) for image in read[5].load()] == [(0, 2, 3), (1, 2, 3)]
    assert read[0].source is None
    assert read[0].pairs == ((0, "A hat."), (0, "A cat."), (1, "A cat."))  # the hat was said before the second picture


def test_a_single_picture_in_a_later_turn_stays_there(folder):
    turns = [USER, ANSWER, {**USER, "content": "<image>And now?"}, {**ANSWER, "content": "Hm."}]
    (sample,) = read_samples(jsonl(folder / "a.jsonl", {"image": "a.png", "messages": turns}))
    assert [part["type"] for part in sample.messages[2]["content"]] == ["image", "text"]
    assert sample.answers == ("Ho.", "Hm.")
    assert sample.pairs == ((0, "Hm."),)


@pytest.mark.parametrize(
    "none", [{}, {"images": []}, {"images": None}, {"image": ""}, {"images": [None], "videos": []}]
)
def test_text_alone_is_a_sample(folder, none):
    path = jsonl(folder / "a.jsonl", {"image": "a.png", "text": "A dog."}, {**none, "messages": [USER, ANSWER]})
    samples = read_samples(path)
    assert samples.dropped == ()
    assert samples.samples[1] == Sample("a.jsonl line 2", (), TEXT)
    assert samples.samples[1].pairs == samples.samples[1].load() == ()
    assert samples.samples[1].answers == ("Ho.",)


def test_a_broken_picture_of_several_is_named(folder):
    (folder / "b.png").write_bytes(png()[:50])
    (sample,) = read_samples(jsonl(folder / "a.jsonl", {"images": ["a.png", "b.png"], "messages": TWO}))
    with pytest.raises(DataError, match=r"Got picture 2 of a\.jsonl line 1, which cannot be decoded"):
        sample.load()


def test_a_sample_made_by_hand_needs_a_place_for_each_picture(folder):
    with pytest.raises(DataError, match="Got mine with 1 picture and 2 places for pictures. Expected a place for each"):
        Sample("mine", (folder / "a.png",), TWO)


def test_a_column_of_a_similar_name_is_named(folder):
    """The advice is true: with it the data are read."""
    rows = {"file_name": "a.png", "captions": "A cat."}
    message = failure(folder / "a.jsonl", rows)
    assert (
        "Do this: rename the column captions to caption, or give --columns image=file_name,caption=captions" in message
    )
    columns = {"image": "file_name", "caption": "captions"}
    assert next(iter(read_samples(folder / "a.jsonl", columns=columns))).answers == ("A cat.",)
    message = failure(folder / "a.jsonl", {"imag": "a.png", "messages": [USER, ANSWER]})
    assert "rename the column imag to image, or give --columns image=imag,messages=messages" in message


def test_data_without_any_picture_are_refused(folder):
    """A column of another name would otherwise be text alone, silently."""
    row = {"messages": [USER, ANSWER]}
    assert "with the columns ['photo', 'messages']. Expected one of these" in failure(
        folder / "a.jsonl", {"photo": "a.png", **row}
    )
    message = failure(folder / "a.jsonl", {"images": [], **row}, {"images": [7], **row})
    assert (
        "with 1 samples, none with a picture, and 1 rows dropped; the first, a.jsonl line 2: the picture is a"
        in message
    )


def test_a_malformed_line_is_dropped(folder):
    path = folder / "a.jsonl"
    path.write_text('{"image": "a.png"\n\n{"image": "a.png", "text": "A dog."}\n', encoding="utf-8")
    samples = read_samples(path)
    assert samples.samples[0].name == "a.jsonl line 3"
    assert reasons(samples)[0].startswith("not JSON: Expecting ',' delimiter")


def test_parquet_shards_with_embedded_and_linked_pictures(folder):
    rows = [
        {"images": [{"bytes": png(5), "path": "gone.png"}], "messages": captioned("Hi?", "Ho.")},
        {"images": [{"bytes": None, "path": "a.png"}], "messages": captioned("Hi?", "Hm.")},
    ]
    pq.write_table(pa.Table.from_pylist(rows[:1]), folder / "train-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[1:]), folder / "train-00001-of-00002.parquet")
    samples = read_samples(folder)
    assert list(samples) == [
        Sample("train-00000-of-00002.parquet row 0", (png(5),), captioned("Hi?", "Ho.")),
        Sample("train-00001-of-00002.parquet row 0", (folder / "a.png",), captioned("Hi?", "Hm.")),
    ]
    assert texts(read_samples(folder / "train-00001-of-00002.parquet")) == [("Hm.",)]

    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    with pytest.raises(DataError) as caught:
        read_samples(folder)
    assert "with the splits test, train. Expected one split" in str(caught.value)


def test_reading_decodes_nothing_and_loading_names_the_sample(folder):
    (folder / "a.png").write_bytes(png()[:50])
    samples = read_samples(jsonl(folder / "a.jsonl", {"image": "a.png", "text": "A dog."}))
    assert len(samples) == 1
    with pytest.raises(DataError, match=r"Got the picture of a\.jsonl line 1, which cannot be decoded"):
        samples.samples[0].load()


def failure(path, *rows) -> str:
    with pytest.raises(DataError) as caught:
        read_samples(jsonl(path, *rows) if rows else path)
    return str(caught.value)


def test_what_fits_no_layout_lists_the_layouts_and_what_was_found(folder):
    message = failure(folder)
    assert f"Got {folder}, which holds a.png, b.png, sub. Expected one of these formats: (1) a folder with" in message
    for layout in ("metadata.jsonl", "Flickr30k", "LLaVA", ".parquet or .arrow shards", "datasets.Dataset"):
        assert layout in message
    assert f"the file {folder / 'a.png'}" in failure(folder / "a.png")
    (folder / "empty").mkdir()
    assert "which holds nothing" in failure(folder / "empty")
    assert "with the columns ['image', 'label']. Expected one of these" in failure(
        folder / "a.jsonl", {"image": "a.png", "label": 7}
    )
    (folder / "coco.json").write_text('{"images": []}', encoding="utf-8")
    assert "a JSON dict where a list of rows should be" in failure(folder / "coco.json")


def test_other_failures(folder):
    assert "no, which does not exist" in failure(folder / "no")
    message = failure(folder / "a.jsonl", {"image": "no.png", "text": "A"}, {"image": "no.png", "text": "B"})
    assert "2 rows, none usable; the first, a.jsonl line 1: no such file" in message
    (folder / "b.json").write_text("[{]", encoding="utf-8")
    assert "b.json, which cannot be read: not JSON: Expecting property name" in failure(folder / "b.json")
    (folder / "b.jsonl").write_bytes(b'{"text": "\xff"}')
    assert "b.jsonl line 1: not UTF-8: byte 0xff at character 10; save the file as UTF-8" in failure(folder / "b.jsonl")
    (folder / "b.jsonl").write_text("")
    assert "b.jsonl, which has no row" in failure(folder / "b.jsonl")
    (folder / "b.parquet").write_bytes(b"PAR1 no PAR1")
    assert "b.parquet, which cannot be read: " in failure(folder / "b.parquet")
    (folder / "metadata.csv").touch()
    (folder / "metadata.jsonl").touch()
    assert "with metadata.csv and metadata.jsonl. Expected one of them" in failure(folder)
    assert "Got a dict. Expected a path or a datasets.Dataset. Do this: choose a split" in failure({"train": 7})


def test_round_trip_through_a_dataset(folder):
    from datasets import Dataset
    from datasets import Image as ImageFeature

    faded = Image.new("RGBA", (13, 11), (10, 20, 30, 100))
    faded.format = "JPEG"  # what a picture opened from a JPEG says; storing it as one would change its pixels
    given = [
        Sample("file", (folder / "a.png",), captioned("Hi?", "A hat.")),
        Sample("bytes", (png(5),), captioned("Hi?", "A cat.")),
        Sample("memory", (faded,), captioned("Hi?", "A rat.")),
    ]
    dataset = to_dataset(given)
    assert isinstance(dataset, Dataset)
    assert dataset.column_names == ["images", "messages"]
    assert dataset.features["images"].feature == ImageFeature()
    stored = dataset.with_format("arrow")[:].column("images").to_pylist()
    assert stored[0] == [{"bytes": None, "path": str(folder / "a.png")}]
    assert stored[1] == [{"bytes": png(5), "path": None}]
    assert [image_id(row["images"][0]) for row in dataset] == [image_id(sample.load()[0]) for sample in given]

    again = read_samples(dataset.select([2, 0]))
    assert [sample.name for sample in again] == ["dataset row 0", "dataset row 1"]
    assert [sample.messages for sample in again] == [given[2].messages, given[0].messages]
    assert again.samples[1].source == folder / "a.png"
    assert len(to_dataset([])) == 0


def test_round_trip_of_several_and_none(folder):
    given = [
        Sample("two", (folder / "a.png", png(5)), TWO),
        Sample("text", (), TEXT),
        Sample("one", (folder / "b.png",), captioned("Hi?", "Ho.")),
    ]
    dataset = to_dataset(given)
    assert [[image_id(image) for image in row["images"]] for row in dataset] == [
        [image_id(image) for image in sample.load()] for sample in given
    ]
    again = read_samples(dataset)
    assert [sample.messages for sample in again] == [sample.messages for sample in given]
    assert [len(sample.sources) for sample in again] == [2, 0, 1]
    assert again.samples[0].sources == given[0].sources


def test_a_dataset_is_made_in_pieces_that_arrow_holds(folder, monkeypatch):
    from lavender.data import sample_table

    monkeypatch.setattr(sample_table, "_PIECE_ROWS", 3)
    monkeypatch.setattr(sample_table, "_PIECE_BYTES", 3 * len(png(5)))
    two, text = Sample("two", (png(5), png(6)), TWO), Sample("text", (), TEXT)
    given = [two, two, text, text, text, text]
    assert [len(piece) for piece in sample_table._pieces(given)] == [1, 3, 2]
    assert [len(row["images"]) for row in to_dataset(given)] == [2, 2, 0, 0, 0, 0]


def test_a_dataset_with_the_json_feature(folder):
    from datasets import Dataset, Features, Json, List, Value

    features = Features({"image": Value("string"), "messages": List(Json())})
    rows = [{"image": str(folder / "a.png"), "messages": captioned("Hi?", "Ho.")}]
    samples = read_samples(Dataset.from_list(rows, features=features))
    assert samples.samples[0].messages == captioned("Hi?", "Ho.")


def test_trl_accepts_the_messages():
    from trl.data_utils import prepare_multimodal_messages

    row = to_dataset([Sample("bytes", (png(5),), captioned("Hi?", "Ho."))])[0]
    prepared = prepare_multimodal_messages(row["messages"], row["images"])
    assert [part["type"] for part in prepared[0]["content"]] == ["image", "text"]
    assert prepared[0]["content"][0]["image"].getpixel((0, 0)) == (5, 2, 3)
    assert prepared[1]["content"][0]["text"] == "Ho."
