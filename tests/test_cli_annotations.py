"""`lavender extract --annotations`: people's masks as a teacher, from the command line to a data set of a run."""

from __future__ import annotations

import json

import pytest

from annotated import Coco
from command_line import complaint, lavender
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.data.images import image_id
from lavender.data.samples import read_samples
from lavender.data.store import MapStore


@pytest.fixture
def panoptic(tmp_path):
    """COCO's folders on disk; the panoptic JSON."""
    (tmp_path / "coco").mkdir()
    Coco(tmp_path / "coco").write()
    return tmp_path / "coco" / "annotations" / "panoptic_val2017.json"


def test_store_and_data_set_of_coco(panoptic, tmp_path):
    out = tmp_path / "maps"
    ran = lavender("extract", "--annotations", "coco-panoptic", "--from", panoptic, "--out", out, "--grid", 8)
    assert ran.code == DONE, ran.err
    assert f"data set: {out / 'panoptic_val2017.jsonl'}" in ran.out
    store = MapStore.open(out, verify=True)
    assert store.grid == (8, 8)
    assert store.identity["layout"] == "coco-panoptic"
    samples = read_samples(out / "panoptic_val2017.jsonl")
    assert not samples.dropped
    for sample in samples:  # every row of the data set finds its maps
        assert (image_id(sample.load()[0]), sample.answers[0]) in store
    dog = next(maps for maps in store if maps.text.startswith("A dog"))
    assert {word.text for word in dog.words} >= {"dog", "wall"}
    assert dog.confidence.tolist() == [1.0] * len(dog.words)


def test_texts_of_ones_own_on_annotated_pictures(panoptic, tmp_path):
    rows = [{"file_name": f"{panoptic.parent.parent}/val2017/000000000139.png", "text": "The wall behind a dog"}]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "metadata.jsonl").write_text(json.dumps(rows[0]) + "\n")
    ran = lavender(
        "extract",
        "--annotations",
        "coco-panoptic",
        "--from",
        panoptic,
        "--data",
        tmp_path / "own",
        "--out",
        tmp_path / "maps",
    )
    assert ran.code == DONE, ran.err
    assert "data set:" not in ran.out
    (maps,) = MapStore.open(tmp_path / "maps")
    assert [word.text for word in maps.words] == ["wall", "dog"]


@pytest.mark.parametrize(
    ("arguments", "code", "got"),
    [
        (("--annotations", "coco-panoptic"), WRONG_USAGE, "Got --annotations without --from."),
        (("--teacher", "world", "--data", "x", "--from", "y"), WRONG_USAGE, "Got --from with --teacher."),
        (("--teacher", "world", "--data", "x", "--split", "val"), WRONG_USAGE, "Got --split with --teacher."),
        (("--teacher", "world"), WRONG_USAGE, "Got --teacher without --data."),
        (("--annotations", "coco-panoptic", "--from", "/nowhere.json"), FAILED, "/nowhere.json"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, code, got, tmp_path):
    assert got in complaint(lavender("extract", *arguments, "--out", tmp_path / "maps"), code)
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    "option", ["--mode=ddim", "--timesteps=9", "--steps=5", "--seed=1", "--batch-size=2", "--device=cpu"]
)
def test_options_of_a_teacher_are_refused_with_annotations(panoptic, option, tmp_path):
    ran = lavender("extract", "--annotations", "coco-panoptic", "--from", panoptic, option, "--out", tmp_path / "maps")
    assert f"Got {option.split('=')[0]} with --annotations." in complaint(ran, WRONG_USAGE)


@pytest.mark.parametrize(
    ("option", "got"), [("--set=flip=true", "Got --set with --ann"), ("--columns=image=a,caption=b", "without --data")]
)
def test_settings_that_annotations_do_not_read_are_refused(panoptic, option, got, tmp_path):
    ran = lavender("extract", "--annotations", "coco-panoptic", "--from", panoptic, option, "--out", tmp_path / "maps")
    assert got in complaint(ran, WRONG_USAGE)


def test_one_maker_of_maps_is_named(tmp_path):
    both = lavender("extract", "--teacher", "world", "--annotations", "coco-panoptic", "--out", tmp_path)
    assert both.code == lavender("extract", "--out", tmp_path).code == WRONG_USAGE
