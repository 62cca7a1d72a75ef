"""Extraction, training and evaluation of what users have: bad pictures and texts, other stores, strictness.

Verbs run in this process, through `main`. No score is looked at: any weights will do.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from command_line import Ran, complaint, lavender, write_metadata, write_run, write_scenes
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.data.store import MapStore

GRID = "16"  # the built-in teacher's own


@pytest.fixture(scope="module")
def scenes_folder(some_scenes, captions, tmp_path_factory) -> Path:
    """Six scenes as PNG files with their captions."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), some_scenes, captions)


def extract(data: Path, out: Path, *more: object) -> Ran:
    return lavender("extract", "--data", data, "--teacher", "world", "--out", out, "--grid", GRID, *more)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--words", "nuon"), "'nuon'"),
        (("--timesteps", "50", "1000"), "--timesteps 1000"),
        (("--set", "geometry=round"), "geometry='round'"),
        (("--set", "geometri=crop"), "write 'geometry' instead"),
        (("--set", "layer_weights={nowhere: 1}"), "layer_weights for 'nowhere'"),
        (("--set", "inversion_steps=3"), "inversion_steps=3 with --steps 10"),
        (("--grid", "1"), "(1, 1)"),
        (("--batch-size", "0"), "--batch-size 0"),
        (("--device", "warp"), "'warp'"),
        (("--data", "/nowhere/at/all"), None),
    ],
)
def test_extract_refuses_settings_before_it_writes(arguments, named, scenes_folder, tmp_path):
    line = complaint(extract(scenes_folder, tmp_path / "maps", *arguments), WRONG_USAGE if named else FAILED)
    assert (named or "/nowhere/at/all") in line
    assert not (tmp_path / "maps").exists()


def test_extract_names_a_teacher_that_is_not_there_before_it_writes(scenes_folder, tmp_path):
    line = complaint(extract(scenes_folder, tmp_path / "maps", "--teacher", "/nowhere"), FAILED)
    assert "the teacher /nowhere, which cannot be loaded: there is no such folder" in line
    assert not (tmp_path / "maps").exists()


def test_a_folder_of_no_known_layout_is_told_which_there_are(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    line = complaint(extract(tmp_path, tmp_path / "maps"), FAILED)
    assert "notes.txt" in line
    assert "metadata.jsonl" in line
    assert "results.csv" in line


# extract: bad pictures and texts


def header_of_png(width: int, height: int) -> bytes:
    """A PNG that says its size and has no pixels to speak of."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


BAD_PICTURES = {  # file: what its reason must say
    "missing.png": "no such file",
    "empty.png": "0 bytes",
    "truncated.png": "cannot be decoded",
    "animated.gif": "several frames",
    "dot.png": "1 × 1 pixels",
    "vast.png": "at most 100,000,000 pixels",
    "text.png": "no picture",
}
UNUSUAL_PICTURES = ("cmyk.jpg", "deep.png")
BAD_TEXTS = {  # text: what its reason must say
    "": "empty caption",
    "of the and": "no word that is a noun or adjective or verb",
    "一只狗坐在草地上。": "no word that is a noun or adjective or verb",
}
LONG = "a dog and a big cat with " * 285 + "an apple on top ."


@pytest.fixture(scope="module")
def bad_folder(some_scenes, captions, scenes_folder, tmp_path_factory) -> Path:
    """Six good pictures, then pictures and texts of every kind that goes wrong, or looks as if it would."""
    folder = tmp_path_factory.mktemp("bad")
    rows = [json.loads(line) for line in (scenes_folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        (folder / row["file_name"]).write_bytes((scenes_folder / row["file_name"]).read_bytes())
    image = some_scenes[0].image
    whole = (folder / "0.png").read_bytes()
    (folder / "empty.png").touch()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture at all")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "vast.png").write_bytes(header_of_png(20_000, 10_000))
    image.convert("CMYK").save(folder / "cmyk.jpg")
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "deep.png")
    rows += [{"file_name": name, "text": captions[0]} for name in (*BAD_PICTURES, *UNUSUAL_PICTURES)]
    rows += [{"file_name": "0.png", "text": text} for text in (*BAD_TEXTS, LONG)]
    write_metadata(folder, rows)
    return folder


@pytest.fixture(scope="module")
def extracted(bad_folder, tmp_path_factory) -> tuple[Ran, Path]:
    """That folder, extracted."""
    out = tmp_path_factory.mktemp("extracted") / "maps"
    return extract(bad_folder, out), out


def test_bad_input_is_skipped_counted_and_named(extracted):
    ran, out = extracted
    assert ran.code == DONE, ran.err
    dropped = json.loads((out / "extraction.json").read_text())["dropped"]
    wrong = len(BAD_PICTURES) + len(BAD_TEXTS)
    assert f"; {wrong} dropped" in ran.out
    assert len(dropped) == wrong
    for reason in (*BAD_PICTURES.values(), *BAD_TEXTS.values()):
        assert any(reason in one["reason"] for one in dropped), reason
    lines = (6, *range(6 + 1, 6 + len(BAD_PICTURES)), *range(15, 18))  # of metadata.jsonl, from 0
    assert sorted(one["what"].split(":")[0] for one in dropped) == sorted(f"metadata.jsonl line {n + 1}" for n in lines)


def test_the_summary_shows_ten_drops_and_where_the_rest_is(extracted):
    ran, out = extracted
    shown = [line for line in ran.out.splitlines() if line.startswith("  dropped ")]
    dropped = json.loads((out / "extraction.json").read_text())["dropped"]
    assert shown == [f"  dropped {one['what']}: {one['reason']}" for one in dropped[: len(shown)]]
    assert len(shown) == 10


def test_time_and_disk_are_told_before_the_work(extracted):
    ran, _ = extracted
    assert " texts: about " in ran.err + ran.out
    assert " MB" in ran.err + ran.out


def test_good_and_unusual_input_is_all_there(extracted, bad_folder, captions):
    from lavender.data.images import image_id, load_image

    store = MapStore.open(extracted[1], verify=True)

    def words(name: str, text: str) -> list[str]:
        maps = store.get(image_id(load_image(bad_folder / name, name)), text)
        assert maps is not None
        assert maps.grid == (16, 16)
        return [word.text for word in maps.words]

    for index, caption in enumerate(captions):
        assert words(f"{index}.png", caption)
    for name in UNUSUAL_PICTURES:
        assert words(name, captions[0]) == words("0.png", captions[0])
    assert len(LONG.split()) == 2000
    long = words("0.png", LONG)
    assert long.count("dog") == long.count("cat") == 285
    assert long[-2:] == ["apple", "top"]


def test_a_second_run_finds_everything_there(extracted, bad_folder):
    _, out = extracted
    before = [(maps.image_id, maps.text) for maps in MapStore.open(out)]
    again = extract(bad_folder, out)
    assert again.code == DONE
    assert f"; {len(before)} were already there; " in again.out
    assert [(maps.image_id, maps.text) for maps in MapStore.open(out)] == before


def test_a_store_of_another_geometry_is_refused_and_stays(extracted, scenes_folder):
    _, out = extracted
    before = len(MapStore.open(out))
    line = complaint(extract(scenes_folder, out, "--grid", "8"), FAILED)
    assert "[16, 16]" in line
    assert "[8, 8]" in line
    assert len(MapStore.open(out, verify=True)) == before


@pytest.mark.parametrize("other", [("--mode", "ddim"), ("--seed", "1"), ("--timesteps", "100"), ("--words", "noun")])
def test_a_store_of_other_settings_names_the_setting(other, extracted, scenes_folder):
    key = {"--words": "parts_of_speech"}.get(other[0], other[0].removeprefix("--"))
    assert f"{key} is " in complaint(extract(scenes_folder, extracted[1], *other), FAILED)


def test_strict_stops_at_a_bad_picture_and_keeps_what_was_extracted(scenes_folder, captions, tmp_path):
    for file in scenes_folder.glob("*.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:400])
    write_metadata(tmp_path, [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(captions)])
    out = tmp_path / "maps"
    line = complaint(extract(tmp_path, out, "--strict", "--batch-size", "1"), FAILED)
    assert "metadata.jsonl line 4" in line
    assert {maps.text for maps in MapStore.open(out, verify=True)} == set(captions[:3])
    rest = extract(tmp_path, out)
    assert rest.code == DONE
    assert "2 texts with " in rest.out
    assert "; 3 were already there; 1 dropped" in rest.out
    assert {maps.text for maps in MapStore.open(out)} == {*captions[:3], *captions[4:]}


def test_strict_refuses_unreadable_rows_before_the_first_pass(bad_folder, tmp_path):
    line = complaint(extract(bad_folder, tmp_path / "maps", "--strict"), FAILED)
    assert "no such file" in line
    assert "strict" in line


def test_strict_is_content_with_good_input(scenes_folder, tmp_path):
    ran = extract(scenes_folder, tmp_path / "maps", "--strict")
    assert ran.code == DONE
    assert "\n6 texts with " in ran.out
    assert "; 0 dropped" in ran.out


def test_a_picture_that_breaks_while_training_is_named_before_training(extracted, bad_folder, tmp_path):
    """Training drops what extraction dropped: a skip that is counted, not a crash at some step."""
    run = write_run(
        tmp_path,
        data=str(bad_folder),
        maps=str(extracted[1]),
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=False,
    )
    ran = lavender("train", run, "--set", "dtype=float32")
    assert ran.code == DONE, ran.err
    coverage = json.loads((run.parent / "out" / "coverage.json").read_text())
    reasons = [one["reason"] for one in coverage["unreadable"]]
    for reason in BAD_PICTURES.values():
        assert any(reason in one for one in reasons), reason
    assert ran.out.count("dropped ") >= len(BAD_PICTURES)


# eval, with models that are not run


@pytest.fixture
def evaluate(tmp_path, monkeypatch) -> Callable[..., dict]:
    """Evaluates `a/run` against others of tmp_path on some data; returns eval.json and notes what was looked at."""
    from lavender.evaluation import runs as judgement
    from lavender.evaluation.compare import Judged

    def observe(arms, samples, store, place, trust_remote_code):
        return {name: [Judged("", {"num_samples": (float(len(samples)), 1)})] * len(samples) for name in arms}

    monkeypatch.setattr(judgement, "_observe_arms", observe)
    monkeypatch.setattr(judgement, "load_reader", lambda *_: None)  # the models are not there
    monkeypatch.setattr(judgement, "taken", lambda samples, readers: samples)

    def run(data: Path, *against: str) -> dict:
        (tmp_path / "a" / "run").mkdir(parents=True)
        config = {"model": "a model", "data": str(data), "maps": "maps", "prompt": "What?"}
        (tmp_path / "a" / "run" / "config.yaml").write_text(yaml.safe_dump(config))
        others = [part for name in against for part in ("--against", tmp_path / name)]
        ran = lavender("eval", tmp_path / "a" / "run", "--data", data, *others)
        assert ran.code == DONE, ran.err
        return json.loads((tmp_path / "a" / "run" / "eval.json").read_text())

    return run


def test_arms_of_the_same_name_are_told_apart(evaluate, scenes_folder):
    assert list(evaluate(scenes_folder, "b/run", "base")["arms"]) == ["base", "run", "base (2)", "run (2)"]


def test_eval_leaves_out_what_cannot_be_decoded_and_says_so(evaluate, bad_folder):
    result = evaluate(bad_folder)
    notes = "\n".join(result["notes"])
    for name, reason in BAD_PICTURES.items():
        assert reason in notes, name
    assert "left out 2 rows; the first, metadata.jsonl line 7: no such file" in notes
    good = 6 + len(UNUSUAL_PICTURES) + len(BAD_TEXTS)  # one of these texts is empty, and LONG is there
    assert result["arms"]["base"]["num_samples"] == good


def test_eval_looks_at_samples_of_one_picture_and_counts_the_others(evaluate, scenes_folder, tmp_path):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    two = [{"role": "user", "content": "<image> and <image>?"}, turns[1]]
    later = [*turns, {"role": "user", "content": "<image>?"}, turns[1]]
    image = next(str(one) for one in sorted(scenes_folder.iterdir()) if one.suffix == ".png")
    rows = [
        {"images": [image, image], "messages": two},
        {"messages": turns},
        {"image": image, "messages": turns},
        {"messages": turns},
        {"image": image, "messages": later},
        {"image": image, "messages": [turns[1], *turns]},
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(tmp_path / "mixed.jsonl")
    assert result["arms"]["base"]["num_samples"] == result["samples"] == 1
    assert result["notes"] == [
        "left out 1 sample with several pictures",
        "left out 2 samples without a picture",
        "left out 1 sample whose picture is not in the first question",
        "left out 1 sample not beginning with a question and its answer",
    ]


def test_eval_refuses_data_without_a_sample_of_one_picture(tmp_path, scenes_folder):
    from lavender.data.samples import read_samples
    from lavender.errors import DataError
    from lavender.evaluation.sampling import spread

    image = next(str(one) for one in sorted(scenes_folder.iterdir()) if one.suffix == ".png")
    turns = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "A dog."}]
    (tmp_path / "two.jsonl").write_text(json.dumps({"images": [image, image], "messages": turns}))
    with pytest.raises(DataError, match="with several pictures. Expected at least one sample with one picture"):
        spread(read_samples(tmp_path / "two.jsonl").samples, 4)
