"""`lavender data overlap`: exact, resized and re-encoded pictures and similar texts are found, and others are not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lavender.data.images import image_id
from lavender.data.samples import read_samples
from lavender.errors import ConfigError
from lavender.evaluation.data_checks.hashes import (
    BITS,
    PictureHash,
    hash_picture,
    near_pictures,
    near_texts,
    sketch_texts,
    words_of_text,
)
from lavender.evaluation.data_checks.overlap import CAPTION_PROMPTS, Overlap, Thresholds, find_overlap
from lavender.evaluation.data_checks.pages import overlap_page, write_overlap
from lavender.evaluation.report.page import render_report
from lavender.world.scenes import scenes

CAPTION = "a brown dog runs over the wet grass near the old bridge"


def encoded(image: Image.Image, kind: str, **settings: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return Image.open(buffer).convert("RGB")


CHANGED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2)),
    "twice as large": lambda image: image.resize((image.width * 2, image.height * 2)),
    "squashed": lambda image: image.resize((96, 96)),
    "JPEG": lambda image: encoded(image, "JPEG", quality=50),
    "WebP": lambda image: encoded(image, "WEBP", quality=50),
    "resized JPEG": lambda image: encoded(image.resize((image.width // 2, image.height // 2)), "JPEG", quality=75),
}


@pytest.fixture(scope="module")
def drawn() -> list[Image.Image]:
    return [scene.image for scene in scenes("development", 12)]


def folder_of(path: Path, rows: list[tuple[Image.Image, str]]) -> Path:
    path.mkdir()
    lines = []
    for index, (image, text) in enumerate(rows):
        image.save(path / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": text}) + "\n")
    (path / "metadata.jsonl").write_text("".join(lines))
    return path


@pytest.fixture
def overlap(drawn, tmp_path) -> Overlap:
    """Of the benchmark's samples 0 to 5 the training set has a picture, a text or both; of the others nothing."""
    train = [(image, f"number {index} of many quite different training texts") for index, image in enumerate(drawn[:6])]
    train[5] = (drawn[5], CAPTION)
    bench = [
        (drawn[0], "nothing of it is known here"),
        (CHANGED["half as large"](drawn[1]), "of this one nothing is known either"),
        (CHANGED["JPEG"](drawn[2]), "and here again are other words"),
        (drawn[4], f"{CAPTION.upper()}!"),  # the picture and the text of two training samples
        (drawn[7], CAPTION + " today"),
        (CHANGED["WebP"](drawn[5]), CAPTION),
        (drawn[8], "no"),
        (ImageOps.mirror(drawn[3]), "its picture is mirrored and so not found"),
    ]
    paths = folder_of(tmp_path / "train", train), folder_of(tmp_path / "bench", bench)
    return find_overlap(paths[0], [paths[1]])


def test_what_is_shared_is_found_and_nothing_else(overlap):
    (bench,) = overlap.benchmarks
    line = [f"metadata.jsonl line {number}" for number in range(9)]
    keys = ("benchmark", "picture", "picture_in", "text", "text_in", "picture_and_text_in")
    (facts,) = overlap.facts()["benchmarks"]
    assert [tuple(match[key] for key in keys) for match in facts["matches"]] == [
        (line[1], "same", line[1], None, None, None),
        (line[2], "near", line[2], None, None, None),
        (line[3], "near", line[3], None, None, None),
        (line[4], "same", line[5], "same", line[6], None),
        (line[5], None, None, "near", line[6], None),
        (line[6], "near", line[6], "same", line[6], line[6]),
    ]
    assert bench.numbers["found"] == {
        "same_picture": 2,
        "near_picture": 3,
        "same_text": 2,
        "near_text": 1,
        "picture_and_text": 1,
        "any": 6,
    }
    assert bench.numbers["shares"]["any"] == 0.75
    assert (bench.numbers["samples"], bench.numbers["short_texts"], bench.numbers["texts"]) == (8, 1, 7)
    assert facts["matches"][4]["similarity"] == round(10 / 11, 3)


def test_a_picture_that_is_stored_many_times_is_counted_and_named_a_few_times(drawn, tmp_path):
    """A blank picture with the same text in 60 training samples, asked for by two samples of a benchmark."""
    blank = Image.new("RGB", (40, 30), "white")
    train = [(drawn[0], "some quite different words are here"), *[(blank, CAPTION)] * 60]
    bench = [(blank, CAPTION), (blank, "nothing of it is known at all"), (drawn[1], "and here are other words again")]
    overlap = find_overlap(folder_of(tmp_path / "train", train), [folder_of(tmp_path / "bench", bench)])
    copies = [f"metadata.jsonl line {number}" for number in range(2, 62)]
    facts = overlap.facts(examples=None)
    assert facts["named_per_match"] == 20
    (found,) = facts["benchmarks"]
    first, second = found["matches"]
    assert [one["sample"] for one in first["pictures_in"]] == copies[:20]
    assert [one["sample"] for one in first["texts_in"]] == copies[:20]
    assert first["both_in"] == copies[:20]
    counts = ("num_pictures_in", "num_texts_in", "num_both_in")
    assert [[match[name] for name in counts] for match in (first, second)] == [[60, 60, 60], [60, 0, 0]]
    assert (found["num_train_samples"], found["train_samples"]) == (60, copies)
    assert "train_samples" not in overlap.facts()["benchmarks"][0]
    table = next(table for table in overlap_page(overlap).tables if table.caption == "What the training set has")
    assert str(table.rows[0][2]).endswith(f"{copies[4]} and 55 more")


def test_all_training_samples_of_an_overlap_are_named(drawn, tmp_path):
    """A picture is in three training samples, near in one of these; its text in two, one of which has the picture."""
    train = [
        (CHANGED["half as large"](drawn[0]), "one of quite different words here"),
        (drawn[0], "and again quite other words than that"),
        (drawn[1], CAPTION),
        (drawn[0], CAPTION + " today"),  # has both, so it comes before sample 1, whose picture is as near
    ]
    train += [(drawn[2], f"the same picture in sample {index} of many") for index in range(7)]
    bench = [(drawn[2], "nothing of it is known at all"), (drawn[0], CAPTION)]
    overlap = find_overlap(folder_of(tmp_path / "train", train), [folder_of(tmp_path / "bench", bench)])
    line = [f"metadata.jsonl line {number}" for number in range(12)]
    first, second = overlap.facts()["benchmarks"][0]["matches"]
    assert [one["sample"] for one in first["pictures_in"]] == line[5:12]
    assert (first["texts_in"], first["both_in"], first["picture_and_text_in"]) == ([], [], None)
    assert [(one["sample"], one["picture"]) for one in second["pictures_in"]] == [
        (line[4], "same"),
        (line[2], "same"),
        (line[1], "near"),
    ]
    assert second["pictures_in"][0]["distance"] == 0
    assert second["texts_in"] == [
        {"sample": line[3], "text": "same", "similarity": 1.0},
        {"sample": line[4], "text": "near", "similarity": round(10 / 11, 3)},
    ]
    assert second["both_in"] == [line[4]]
    table = next(table for table in overlap_page(overlap).tables if table.caption == "What the training set has")
    assert [row[1:] for row in table.rows] == [
        ["same", f"{line[4]}, {line[2]}, {line[1]}", "same", f"{line[3]}, {line[4]}", line[4]],
        ["same", f"{', '.join(line[5:10])} and 2 more", None, None, None],
    ]


def test_the_files_have_every_match_a_plot_and_pairs_of_pictures(overlap, tmp_path):
    write_overlap(overlap, tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "overlap.json").read_text())["benchmarks"][0]["matches"]) == 6
    assert len(overlap.facts(examples=2)["benchmarks"][0]["matches"]) == 2
    with Image.open(tmp_path / "out" / "overlap.png") as plot:
        assert plot.width > 400
    page = (tmp_path / "out" / "overlap.html").read_text()
    assert page == render_report(overlap_page(overlap))
    assert page.count('<article class="card panel') == 5
    assert "equal pixels" in page
    head, row = overlap.rows()
    assert (head[0], len(head), row[0]) == ("benchmark", len(row), overlap.benchmarks[0].side.path)
    assert row[1:] == ["8", "25.0 %", "37.5 %", "25.0 %", "12.5 %", "12.5 %", "75.0 %"]


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_picture_is_near_its_original_and_to_no_other(change, drawn):
    originals = [hash_picture(image) for image in drawn]
    changed = [hash_picture(CHANGED[change](image)) for image in drawn]
    near = near_pictures(changed, originals, Thresholds().distance)
    assert [near[one.identity][0][0] for one in changed] == [one.identity for one in originals]
    assert all(len(found) == 1 for found in near.values())


def test_pictures_of_other_scenes_are_far_above_the_threshold(drawn):
    hashes = [hash_picture(image) for image in drawn]
    assert near_pictures(hashes, hashes, Thresholds().distance + 16) == {
        one.identity: [(one.identity, 0)] for one in hashes
    }


def test_distances_are_those_of_the_bits(monkeypatch):
    """In pieces too: a table of many pictures is compared in several steps."""
    monkeypatch.setattr("lavender.evaluation.data_checks.hashes._AT_ONCE", 2)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (7, BITS)).astype(bool)
    grey = np.zeros((4, 4, 3), np.uint8)
    hashes = [PictureHash(str(at), np.packbits(row).view(np.uint64), grey) for at, row in enumerate(bits)]
    near = near_pictures(hashes[:3], hashes, BITS)
    for at in range(3):
        assert dict(near[str(at)]) == {str(other): int((bits[at] != bits[other]).sum()) for other in range(7)}
        assert [distance for _, distance in near[str(at)]] == sorted(distance for _, distance in near[str(at)])


def test_plain_pictures_are_found_by_their_pixels_alone():
    white, grey = (Image.new("RGB", (40, 30), colour) for colour in ("white", "grey"))
    assert hash_picture(white)[:2] == (image_id(white), None)
    assert list(near_pictures([hash_picture(white)], [hash_picture(grey)], 100)) == []
    assert near_pictures([hash_picture(white)], [hash_picture(white)], 0) == {image_id(white): [(image_id(white), 0)]}


def gradient(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    share = np.linspace(0, 1, 96)[:, None, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    return Image.fromarray(np.broadcast_to(rows, (96, 128, 3)).astype(np.uint8).copy())


def framed(colour: str, frame: str) -> Image.Image:
    return ImageOps.expand(Image.new("RGB", (120, 90), colour), 4, frame)


@pytest.mark.parametrize("change", CHANGED)
def test_gradients_and_frames_of_other_colours_are_not_near_and_changed_ones_are(change):
    """Their hashes of grey frequencies are about the same."""
    pictures = [gradient((20, 60, 200), (250, 240, 230)), gradient((10, 90, 20), (120, 200, 90))]
    pictures += [framed("navy", "red"), framed("darkgreen", "orange")]
    hashes = [hash_picture(picture) for picture in pictures]
    bits = [one.bits for one in hashes if one.bits is not None]
    assert np.bitwise_count(bits[0] ^ bits[1]).sum() <= Thresholds().distance
    near = near_pictures(hashes, hashes, Thresholds().distance)
    assert near == {one.identity: [(one.identity, 0)] for one in hashes}
    changed = hash_picture(CHANGED[change](pictures[0]))
    found = near_pictures([changed], hashes, BITS)[changed.identity]
    assert [identity for identity, _ in found] == [hashes[0].identity]


@pytest.mark.parametrize("side", [8, 16, 31])
def test_small_pictures_of_noise_are_not_near(side):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(20)]
    hashes = [hash_picture(picture) for picture in pictures]
    near = near_pictures(hashes, hashes, Thresholds().distance)
    assert near == {one.identity: [(one.identity, 0)] for one in hashes}
    if side < 16:  # fewer pixels than bits of the hash: a resized copy is another picture
        return
    larger = [hash_picture(CHANGED["twice as large"](picture)) for picture in pictures]
    near = near_pictures(larger, hashes, Thresholds().distance)
    assert [near[one.identity][0][0] for one in larger] == [one.identity for one in hashes]


def test_texts_without_spaces_and_accents_in_two_forms_are_compared(drawn, tmp_path):
    train = [(drawn[0], "一只猫坐在红色的沙发上看着窗外的鸟"), (drawn[1], "trois cafés très serrés sur la table")]
    bench = [
        (drawn[2], "一只猫坐在红色的沙发上看着窗外的鸟。"),
        (drawn[3], "Trois cafe\u0301s tre\u0300s serre\u0301s sur la table"),
    ]
    found = find_overlap(folder_of(tmp_path / "train", train), [folder_of(tmp_path / "bench", bench)]).benchmarks[0]
    assert (found.numbers["found"]["same_text"], found.numbers["short_texts"]) == (2, 0)


def test_a_question_that_is_common_in_one_data_set_alone_does_not_hide_a_text(drawn, tmp_path):
    """A text has the same words on both sides."""
    question = "Who wrote this book, and what is its title?"
    answers = [f"It is the book number {number} of this writer" for number in range(3)]
    paths = []
    for at, (name, some) in enumerate((("train", answers), ("bench", answers[1:2]))):
        path = folder_of(tmp_path / name, [(drawn[at], "x")])
        rows = [{"image": "0.png", "prompt": question, "completion": answer} for answer in some]
        (path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        paths.append(path / "rows.jsonl")
    (bench,) = find_overlap(paths[0], paths[1:]).benchmarks
    assert bench.numbers["found"]["same_text"] == 1
    assert bench.matches[0].text is not None
    assert bench.matches[0].text.sample == 1


def test_the_pair_on_the_page_is_of_the_pictures_that_are_near(drawn, tmp_path):
    """Not of the first pictures of their samples."""
    folder = folder_of(tmp_path / "train", [(image, "x") for image in drawn[:3]])
    turns = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "x"}]
    (folder / "pairs.jsonl").write_text(json.dumps({"images": ["0.png", "1.png"], "messages": turns}))
    bench = folder_of(tmp_path / "bench", [(drawn[1], "y")])
    overlap = find_overlap(folder / "pairs.jsonl", [bench])
    (match,) = overlap.benchmarks[0].matches
    assert match.picture is not None
    assert match.picture.places == (0, 1)
    (panel,) = overlap_page(overlap).panels
    pair, shown = np.asarray(panel.image), drawn[1].width
    assert (pair[:, :shown] == pair[:, shown + 8 :]).all()
    assert panel.note == "equal pixels"


def test_columns_of_the_training_set_and_of_the_benchmarks(drawn, tmp_path):
    paths = []
    for name, key in (("train", "pic"), ("bench", "img")):
        paths.append(folder_of(tmp_path / name, [(drawn[0], "x")]) / "rows.jsonl")
        paths[-1].write_text(json.dumps({key: "0.png", "c": CAPTION}))
    train, bench = ({"image": name, "caption": "c"} for name in ("pic", "img"))
    overlap = find_overlap(paths[0], paths[1:], columns=train, benchmark_columns=bench)
    assert overlap.benchmarks[0].numbers["found"]["picture_and_text"] == 1


def test_similarity_is_that_of_word_triples():
    one, other = words_of_text("A dog runs, over the grass"), words_of_text("a dog runs over the hill")
    index = sketch_texts([one, words_of_text("something else that is long enough")])
    assert near_texts(index, sketch_texts([other]), 0.5) == {one: [(other, 3 / 5)]}
    assert near_texts(index, sketch_texts([other]), 0.61) == {}


def test_few_texts_at_the_threshold_are_missed():
    """100 pairs of 12 words that differ in the last: their similarity is 9 / 11."""
    pairs = [tuple(f"w{number}x{place}" for place in range(12)) for number in range(100)]
    changed = [(*words[:-1], "other") for words in pairs]
    assert len(near_texts(sketch_texts(pairs), sketch_texts(changed), 0.8)) >= 99


@pytest.mark.parametrize(("repeated", "found"), [(False, 1), (True, 0)])
def test_a_question_that_many_samples_have_does_not_count(repeated, found, drawn, tmp_path):
    """Alone, the answers are too short to be compared."""
    question = "What is on the table beside the window?"
    paths = []
    for at, name in enumerate(("train", "bench")):
        path = folder_of(tmp_path / name, [(drawn[at], "x")])
        row = {"image": "0.png", "prompt": question, "completion": "a cat"}
        rows = [row, row | {"completion": "a dog"}] if repeated else [row]
        (path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        paths.append(path / "rows.jsonl")
    assert find_overlap(paths[0], [paths[1]]).benchmarks[0].numbers["found"]["same_text"] == found


def test_the_prompts_of_captions_do_not_count(drawn, tmp_path):
    one, other = (folder_of(tmp_path / str(at), [(drawn[at], "a grey cat")]) for at in range(2))
    assert find_overlap(one, [other]).benchmarks[0].numbers["found"]["any"] == 0
    assert next(iter(read_samples(one))).messages[0]["content"][-1]["text"] in CAPTION_PROMPTS


@pytest.mark.parametrize("wrong", [{"distance": 128}, {"distance": -1}, {"similarity": 0.4}, {"similarity": 1.1}])
def test_wrong_thresholds_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"--{next(iter(wrong))}"):
        Thresholds(**wrong)
