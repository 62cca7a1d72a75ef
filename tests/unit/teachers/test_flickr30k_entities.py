"""Flickr30k Entities as word maps: phrases, boxes, and what cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from annotated import HEIGHT, WIDTH, drops, near, outer, picture, run
from lavender.data.images import image_id
from lavender.data.samples import read_samples
from lavender.data.store import MapStore
from lavender.errors import ConfigError, DataError
from lavender.teachers.annotations.base import Found
from lavender.teachers.annotations.extract import extract_annotations, open_annotations
from lavender.teachers.annotations.flickr import Flickr30kEntities, Phrase, parse_sentence

SENTENCES = """[/EN#1/people A young girl] in [/EN#2/clothing/other a red dress] sings .
[/EN#1/people She] sings to [/EN#3/people friends] at [/EN#4/scene a party] and [/EN#0/notvisual a lot] .
"""
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def thing(names: str, inside: str) -> str:
    return f"<object>{''.join(f'<name>{name}</name>' for name in names.split())}{inside}</object>"


THINGS = [
    thing("1 2", BOX.format(1, 1, 3, 4)),  # the girl and her dress: rows 0 to 3, columns 0 to 2
    thing("1", BOX.format(13, 9, 14, 10)),
    thing("3", "<scene>0</scene><nobndbox>1</nobndbox>"),
    thing("4", "<scene>1</scene><nobndbox>0</nobndbox>"),
]


def xml(things: list[str], size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    width, height = size
    return (
        f"<annotation><filename>36979.jpg</filename><size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>{''.join(things)}</annotation>"
    )


@pytest.fixture
def flickr(tmp_path) -> Path:
    folder = tmp_path / "flickr"
    for name in ("Sentences", "Annotations", "flickr30k-images"):
        (folder / name).mkdir(parents=True)
    (folder / "Sentences" / "36979.txt").write_text(SENTENCES)
    (folder / "Annotations" / "36979.xml").write_text(xml(THINGS))
    picture(60).save(folder / "flickr30k-images" / "36979.jpg")
    return folder


def found_words(found: Found) -> list[str]:
    return [word.text for word, _ in found.words]


def test_a_sentence_without_its_marks():
    sentence = parse_sentence(SENTENCES.splitlines()[0])
    assert sentence.text == "A young girl in a red dress sings ."
    assert sentence.phrases == (Phrase(0, 12, "1"), Phrase(16, 27, "2"))
    assert parse_sentence("sings [/EN#7/people girl ]\n").text == "sings girl"
    for broken in ("[/EN#1/people A girl", "[/EN#1/people A [/EN#2/people girl] sings]", "[/EN#x/people A] girl", " "):
        with pytest.raises(DataError, match="text with phrases as"):
            parse_sentence(broken)


def test_flickr_maps_are_the_union_of_a_phrases_boxes(flickr, tmp_path):
    data_file = tmp_path / "maps" / "flickr.jsonl"
    summary, found = run(Flickr30kEntities(flickr), tmp_path / "maps", data_file=data_file)
    record = found["A young girl in a red dress sings ."]
    assert [(word.text, word.start) for word in record.words] == [
        ("young", 2),
        ("girl", 8),
        ("red", 18),
        ("dress", 22),
    ]
    dress = outer([1, 0.2, 0], [1, 1 / 14, 0, 0, 0])
    girl = dress + outer([0, 0, 2 / (10 / 3)], [0, 0, 0, 0, 2 / 2.8])
    for index, expected in enumerate([girl, girl, dress, dress]):
        near(record.maps[index], expected)
    assert record.confidence.tolist() == [1] * 4
    assert drops(record.dropped) == [("sings", "in no phrase")]
    second = found["She sings to friends at a party and a lot ."]
    assert second.words == ()
    assert drops(second.dropped) == [
        ("sings", "in no phrase"),
        ("friends", "its phrase has no box"),
        ("party", "its phrase is the scene as a whole"),
        ("lot", "its phrase is marked as not visual"),
    ]
    assert ("'sings', 2 times", "in no phrase") in drops(summary.dropped)
    store = MapStore.open(tmp_path / "maps")
    assert store.identity["layout"] == "flickr30k-entities"
    samples = read_samples(data_file)
    assert len(samples) == 2
    assert all((image_id(one.load()[0]), one.answers[0]) in store for one in samples)


def test_flickrs_own_table_joins_too(flickr, tmp_path):
    (flickr / "flickr30k-images" / "results.csv").write_text(
        "image_name| comment_number| comment\n36979.jpg| 0| A young girl in a red dress sings .\n"
    )
    run(Flickr30kEntities(flickr), tmp_path / "maps")
    (sample,) = read_samples(flickr / "flickr30k-images")
    assert (image_id(sample.load()[0]), sample.answers[0]) in MapStore.open(tmp_path / "maps")


def test_a_text_may_differ_from_its_sentence_in_spaces(flickr):
    annotations = Flickr30kEntities(flickr).read("36979")
    text = "A young  girl in a red dress sings."
    found = annotations.find(text)
    assert found_words(found) == ["young", "girl", "red", "dress"]
    assert [text[word.start : word.end] for word, _ in found.words] == found_words(found)
    with pytest.raises(DataError, match="none of the picture's sentences"):
        annotations.find("A girl sings .")


def test_parts_of_speech_and_splits(flickr):
    assert found_words(
        Flickr30kEntities(flickr, parts_of_speech=("noun",)).read("36979").find("A young girl in a red dress sings .")
    ) == ["girl", "dress"]
    (flickr / "val.txt").write_text("36979\n5\n")
    layout = Flickr30kEntities(flickr, split="val")
    assert layout.label == "flickr30k-entities-val"
    assert layout.key(Path("somewhere/36979.png")) == "36979"
    samples = layout.samples()
    assert [one.name for one in samples] == ["36979.txt line 1", "36979.txt line 2"]
    assert [one.what for one in samples.dropped] == ["5"]
    with pytest.raises(DataError, match="use an existing split: val"):
        Flickr30kEntities(flickr, split="train")
    with pytest.raises(ConfigError, match="nouns"):
        Flickr30kEntities(flickr, parts_of_speech=("nouns",))
    with pytest.raises(DataError, match="1000.jpg, which is not in flickr30k-entities-val"):
        layout.key(Path("1000.jpg"))


def test_boxes_outside_ids_without_annotation_and_broken_sentences_are_named(flickr, tmp_path):
    things = [
        thing("1", BOX.format(1, 1, 3, 4)),
        thing("1", BOX.format(15, 1, 20, 4)),
        thing("2", BOX.format(0, 0, 0, 0)),
        thing("3", BOX.format(-4, 9, 90, 90)),
    ]
    (flickr / "Annotations" / "36979.xml").write_text(xml(things))
    (flickr / "Sentences" / "36979.txt").write_text(SENTENCES + "[/EN#1/people A girl\n")
    summary, found = run(Flickr30kEntities(flickr), tmp_path / "maps")
    assert "'[/EN#1/people A girl'" in summary.dropped[0].reason
    assert summary.dropped[0].what == "36979.txt line 3"
    assert ("36979.xml", "the box (0.0, 14.0, 4.0, 20.0) of 1 is empty or outside") in drops(summary.dropped)
    first, second = found.values()
    near(first.maps[1], outer([1, 0.2, 0], [1, 1 / 14, 0, 0, 0]))  # the girl's other box
    assert ("dress", "its boxes are empty or outside the picture") in drops(first.dropped)
    assert ("party", "its phrase is not in the XML file") in drops(second.dropped)
    near(second.maps[0], outer([0, 0, 1], [1, 1, 1, 1, 1]))  # friends: cut at the border


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<annotation><size>", "cannot be read"),
        (xml([thing("1", "<bndbox><xmin>1</xmin></bndbox>")]), "<bndbox> has no <ymin>"),
        (xml([thing("1", BOX.format("a", 1, 2, 3))]), "could not convert string to float"),
        ("<annotation></annotation>", "no <size>"),
        (xml(THINGS, (500, 333)), "of 14 × 10 pixels, annotated at 500 × 333"),
        (xml([thing("1", BOX.format("nan", 1, 2, 3))]), "<xmin> of nan"),
        (xml([thing("1", BOX.format(1, "-1e999", 2, 3))]), "<ymin> of -inf"),
        (xml([thing("1", BOX.format(1, 1, 2, 3))] * 1001), "more than 1,000 boxes of one entity"),
        ('<!DOCTYPE a [<!ENTITY a "a"><!ENTITY b "&a;&a;&a;">]>' + xml(THINGS), "a document type, which may define"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd">' + xml(THINGS), "a document type, which may define"),
        ("x" * 5_000_000, "Expected at most 4,194,304 bytes"),
        (None, "an XML file for each picture"),
    ],
)
def test_a_broken_xml_file_drops_the_texts_by_name(flickr, tmp_path, content, reason):
    file = flickr / "Annotations" / "36979.xml"
    file.write_text(content) if content else file.unlink()
    summary, found = run(Flickr30kEntities(flickr), tmp_path / "maps")
    assert found == {}
    assert [one.what.split(":")[0] for one in summary.dropped] == ["36979.txt line 1", "36979.txt line 2"]
    assert all(reason in one.reason for one in summary.dropped)


def test_folders_that_are_not_there(tmp_path, flickr):
    with pytest.raises(DataError, match="without the folder Sentences"):
        Flickr30kEntities(tmp_path)
    with pytest.raises(DataError, match="no folder of pictures"):
        Flickr30kEntities(flickr, pictures=tmp_path / "nowhere")


def test_the_grid_is_checked(flickr, tmp_path):
    layout = open_annotations("flickr30k-entities", flickr)
    assert isinstance(layout, Flickr30kEntities)
    with pytest.raises(ConfigError, match="grid"):
        extract_annotations(layout.samples(), layout, tmp_path / "maps", grid=(1, 500))


def test_questions_have_no_annotations(flickr, tmp_path):
    layout = Flickr30kEntities(flickr)
    with pytest.raises(ConfigError) as caught:
        extract_annotations(layout.samples(), layout, tmp_path / "maps", texts="all")
    assert "Got texts='all' with flickr30k-entities, whose captions alone are annotated." in str(caught.value)
    assert not (tmp_path / "maps").exists()


def test_a_sentence_ends_at_a_line_feed_alone(flickr):
    first, second = SENTENCES.splitlines()
    (flickr / "Sentences" / "36979.txt").write_text(f"{first[:-1]}\u2028\x85\x0c.\r\n{second}\n")
    samples = Flickr30kEntities(flickr).samples()
    assert samples.samples[0].answers[0] == "A young girl in a red dress sings \u2028\x85\x0c."
    assert [one.name for one in samples] == ["36979.txt line 1", "36979.txt line 2"]


def test_a_sentence_of_absurd_length_is_dropped_by_name(flickr):
    (flickr / "Sentences" / "36979.txt").write_text(SENTENCES + "[/EN#1/" * 50_000 + "\n")
    (drop,) = Flickr30kEntities(flickr).samples().dropped
    assert drop.what == "36979.txt line 3"
    assert "a sentence of 350,000 characters" in drop.reason


def test_names_in_a_split_stay_inside_the_folder(flickr):
    (flickr / "val.txt").write_text("../../outside\n/etc/passwd\n36979\n" + "x" * 300 + "\n")
    samples = Flickr30kEntities(flickr, split="val").samples()
    assert [one.reason.split(":")[0] for one in samples.dropped] == [
        "no name of a picture",
        "no name of a picture",
        "a name too long for a file",
    ]
    (flickr / "val.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="val.txt, which is not UTF-8 at byte 3"):
        Flickr30kEntities(flickr, split="val")
