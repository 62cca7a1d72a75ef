"""COCO panoptic masks as word maps: where words lie, how maps and samples join, and what cannot be used."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from annotated import GRID, HEIGHT, WIDTH, Coco, drops, near, outer, picture, run, write_mask
from lavender.data.images import image_id, load_image
from lavender.data.samples import read_samples
from lavender.data.store import MapStore
from lavender.errors import ConfigError, DataError, StoreError
from lavender.teachers.annotations.coco import CocoPanoptic
from lavender.teachers.annotations.extract import extract_annotations, open_annotations
from lavender.teachers.annotations.regions import cell_shares, mask_region


@pytest.fixture
def coco(tmp_path) -> Coco:
    (tmp_path / "coco").mkdir()
    return Coco(tmp_path / "coco")


def test_coco_maps_are_all_segments_of_the_category_crowds_included(coco, tmp_path):
    summary, found = run(coco.write(), tmp_path / "maps")
    record = found["A dog by a brick wall."]
    assert [(word.text, word.start) for word in record.words] == [("dog", 2), ("wall", 17)]
    dog = outer([1, 0.2, 0], [1, 1 / 14, 0, 0, 0])
    dog += outer([0, 0, 2 / (10 / 3)], [0, 0, 0, 0, 2 / 2.8])  # the crowd
    near(record.maps[0], dog)
    wall = outer([1, 1, 1], [0, 0, 1 / 2.8, 0, 0])
    wall[0, 4] = 1 / (10 / 3 * 2.8)
    near(record.maps[1], wall * 2.8)  # the most covered cell has heat 1
    assert record.confidence.tolist() == [1, 1]
    assert drops(record.dropped) == [("brick", "no category has this name")]
    assert record.image_id == image_id(picture(100))
    assert [word.text for word in found["Nothing but a cat and dogs"].words] == ["dogs"]
    assert (summary.records, summary.words, summary.already_there) == (3, 3, 0)


def test_a_region_that_is_the_whole_picture_is_no_place(coco, tmp_path):
    summary, found = run(coco.write(), tmp_path / "maps")
    assert found["Grass."].words == ()
    assert drops(found["Grass."].dropped) == [("Grass", "its region is the whole picture, which is no place")]
    assert ("1 texts", "no word with a map; stored without") in drops(summary.dropped)


def test_dropped_words_are_counted_by_name_and_reason(coco, tmp_path):
    coco.captions["annotations"] += [
        {"image_id": 285, "id": 4, "caption": "A cat, a dog and a Cat"},
        {"image_id": 285, "id": 5, "caption": "a hot dog"},
    ]
    summary, found = run(coco.write(), tmp_path / "maps")
    assert ("'cat', 3 times", "no category has this name") in drops(summary.dropped)
    assert ("'dog', 1 times", "no segment of 'dog' on the picture") in drops(summary.dropped)
    assert drops(found["a hot dog"].dropped) == [
        ("hot", "no segment of 'hot dog' on the picture"),
        ("dog", "no segment of 'hot dog' on the picture"),
    ]
    written = json.loads((tmp_path / "maps" / "extraction.json").read_text())
    assert written["dropped"] == [vars(one) for one in summary.dropped]


def test_the_identity_names_the_layout_its_grid_and_its_rules(coco, tmp_path):
    layout = coco.write()
    run(layout, tmp_path / "maps")
    identity = MapStore.open(tmp_path / "maps").identity
    assert (identity["teacher"], identity["layout"], identity["grid"]) == ("annotations", "coco-panoptic", [3, 5])
    assert identity["parts_of_speech"] == ["noun"]
    other = CocoPanoptic(layout.path, synonyms={"dog": ["cat"]})
    with pytest.raises(StoreError, match=r"synonyms is '.*' there and '.*' here"):
        extract_annotations(other.samples(), other, tmp_path / "maps", grid=GRID)
    _, found = run(other, tmp_path / "others")
    assert [word.text for word in found["Nothing but a cat and dogs"].words] == ["cat", "dogs"]


def test_the_data_file_is_read_and_joins_with_the_store(coco, tmp_path):
    layout = coco.write()
    (coco.root / "val2017" / "000000000285.png").write_bytes(b"no picture")
    data_file = tmp_path / "maps" / "data.jsonl"
    summary, _ = run(layout, tmp_path / "maps", data_file=data_file)
    assert summary.dropped[0].what == "000000000285.png caption 2: 'Grass.'"
    samples, store = read_samples(data_file), MapStore.open(tmp_path / "maps")
    assert [one.answers for one in samples] == [("A dog by a brick wall.",), ("Nothing but a cat and dogs",)]
    assert all((image_id(one.load()[0]), one.answers[0]) in store for one in samples)
    assert str(tmp_path) not in data_file.read_text()  # relative: the tree can move
    again, _ = run(layout, tmp_path / "maps", data_file=data_file)
    assert (again.records, again.already_there) == (0, 2)
    assert len(read_samples(data_file)) == 2


def test_data_of_ones_own_on_pictures_of_coco(coco, tmp_path):
    layout = coco.write()
    picture(100).save(tmp_path / "COCO_train2014_000000000139.png")
    picture(7).save(tmp_path / "mine.png")
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "It's a dog!"},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "At the wall"},
    ]
    rows = [
        {"image": "COCO_train2014_000000000139.png", "conversations": turns},
        {"image": "mine.png", "text": "a dog"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read_samples(tmp_path / "train.jsonl")
    summary = extract_annotations(samples, layout, tmp_path / "maps", grid=GRID)
    store = MapStore.open(tmp_path / "maps")
    for answer, word in (("It's a dog!", "dog"), ("At the wall", "wall")):
        record = store.get(image_id(samples.samples[0].load()[0]), answer)
        assert record is not None
        assert [one.text for one in record.words] == [word]
    assert "mine.png, which is not in panoptic_val2017.json" in drops(summary.dropped)[0][1]
    with pytest.raises(DataError, match="mine.png"):
        extract_annotations(samples, layout, tmp_path / "strict", grid=GRID, strict=True)


@pytest.mark.parametrize("stop", [1, 2])
def test_stopped_and_started_again_it_ends_with_the_same_records(coco, tmp_path, stop):
    layout = coco.write()
    expected, undisturbed = run(layout, tmp_path / "undisturbed")
    assert expected.dropped
    done = 0

    def interrupt(texts: int) -> None:
        nonlocal done
        done += texts
        if done >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(layout, tmp_path / "maps", on_progress=interrupt)
    assert len(MapStore.open(tmp_path / "maps")) == stop
    summary, found = run(layout, tmp_path / "maps")
    assert (summary.already_there, summary.records) == (stop, 3 - stop)
    assert summary.dropped == expected.dropped  # also what the first run had written and not told
    assert list(found) == list(undisturbed)
    for text, record in undisturbed.items():
        assert (found[text].words, found[text].dropped) == (record.words, record.dropped)
        assert torch.equal(found[text].maps, record.maps)


def test_faulty_segments_are_named_and_the_others_serve(coco, tmp_path):
    segments = coco.panoptic["annotations"][0]["segments_info"]
    segments[0]["category_id"] = 999  # a dog
    segments[3]["id"] = 6  # the tile wall
    summary, found = run(coco.write(), tmp_path / "maps")
    assert drops(summary.dropped)[:3] == [
        ("000000000139.png", "segment 70001 has the unknown category 999"),
        ("000000000139.png", "segment 6 ('wall-tile') has no pixel in 000000000139.png"),
        ("000000000139.png", "000000000139.png has pixels of the segments [5], which the JSON lacks"),
    ]
    near(found["A dog by a brick wall."].maps[0], outer([0, 0, 1], [0, 0, 0, 0, 1]))  # the crowd alone
    near(found["A dog by a brick wall."].maps[1], outer([1, 1, 1], [0, 0, 1, 0, 0]))


def test_masks_that_cannot_be_used_drop_their_texts_by_name(coco, tmp_path):
    layout = coco.write()
    mask = layout.masks / "000000000139.png"

    def reasons(out: str) -> list[str]:
        summary, found = run(layout, tmp_path / out)
        assert list(found) == ["Grass."]
        assert summary.dropped[0].what == "000000000139.png caption 1: 'A dog by a brick wall.'"
        return [one.reason for one in summary.dropped[:2]]

    write_mask(mask, coco.ids["000000000139"].T)
    assert all("of 14 × 10 pixels, annotated at 10 × 14" in reason for reason in reasons("size"))
    Image.new("L", (WIDTH, HEIGHT)).save(mask)
    assert all("in the mode 'L'" in reason for reason in reasons("mode"))
    mask.write_bytes(mask.read_bytes()[:40])
    assert all("or only its beginning" in reason for reason in reasons("cut"))
    mask.unlink()
    assert all(f"no such file: {mask}" in reason for reason in reasons("missing"))


def test_a_missing_picture_an_empty_caption_and_a_picture_without_one(coco):
    coco.captions["annotations"][0]["caption"] = " \n"
    coco.captions["annotations"][1]["image_id"] = 77
    samples = coco.write().samples()
    assert [one.answers for one in samples] == [("Nothing but a cat and dogs",)]
    assert drops(samples.dropped) == [
        ("000000000139.png caption 1", "empty caption: ' \\n'"),
        ("000000000285.png", "no caption in captions_val2017.json"),
        ("captions_val2017.json caption 2", "its picture 77 has no annotation in panoptic_val2017.json"),
    ]
    (coco.root / "val2017" / "000000000139.png").unlink()
    with pytest.raises(DataError, match="no usable picture and caption.*no such file"):
        coco.write().samples()


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_annotations_of_a_turned_picture(coco, tmp_path, orientation, frame):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = coco.root / "val2017" / "000000000139.png"
    picture(100).save(path, exif=exif)
    if orientation == 6 and frame == "upright":
        coco.ids["000000000139"] = np.rot90(coco.ids["000000000139"], -1)  # clockwise, as the picture is shown
    _, found = run(coco.write(), tmp_path / "maps")
    record = found["A dog by a brick wall."]
    dog = np.isin(coco.ids["000000000139"], [70_001, 258])
    if orientation == 6 and frame == "stored":
        dog = np.rot90(dog, -1)
    shares = cell_shares(mask_region(dog), dog.shape, GRID)
    near(record.maps[0], shares / shares.max())
    assert record.image_id == image_id(load_image(path, "it"))


def test_a_turned_picture_whose_annotations_may_be_in_either_frame_is_dropped(coco, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    picture(100).save(coco.root / "val2017" / "000000000139.png", exif=exif)
    summary, found = run(coco.write(), tmp_path / "maps")
    assert list(found) == ["Grass."]
    assert "EXIF orientation 3, which may or may not be in its annotations" in summary.dropped[0].reason


def test_coco_files_that_are_not_of_the_layout(coco):
    path = coco.write().path
    assert CocoPanoptic(coco.root).path == path  # the folder serves too
    (coco.root / "annotations" / "panoptic_train2017.json").write_text("{}")
    with pytest.raises(DataError, match="panoptic_train2017.json and annotations/panoptic_val2017.json"):
        CocoPanoptic(coco.root)
    with pytest.raises(DataError, match=r"panoptic_train2017.json without a list 'images': \[\]"):
        CocoPanoptic(coco.root / "annotations" / "panoptic_train2017.json")
    (coco.root / "annotations" / "panoptic_train2017.json").write_text(path.read_text())
    with pytest.raises(DataError, match="no folder of pictures: none of .*train2017"):
        CocoPanoptic(coco.root / "annotations" / "panoptic_train2017.json")
    path.write_text(json.dumps(coco.panoptic | {"annotations": [{"image_id": 139, "segmentation": []}]}))
    with pytest.raises(DataError, match=r"panoptic_val2017.json with the entry {'image_id': 139"):
        CocoPanoptic(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="a JSON list"):
        CocoPanoptic(path)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        CocoPanoptic(path)
    coco.panoptic["images"][1]["file_name"] = "again/000000000139.jpg"
    with pytest.raises(DataError, match="pictures of different names"):
        coco.write()


def test_captions_of_another_kind(coco):
    layout = coco.write()
    (coco.root / "annotations" / "captions_val2017.json").write_text(
        json.dumps({"annotations": [{"id": 1, "image_id": 139, "bbox": []}]})
    )
    with pytest.raises(DataError, match="not instances or keypoints"):
        layout.samples()
    (coco.root / "annotations" / "captions_val2017.json").unlink()
    with pytest.raises(DataError, match="no captions_.*.json beside"):
        CocoPanoptic(layout.path).samples()


def test_open_annotations(coco):
    opened = open_annotations("coco-panoptic", coco.write().path, parts_of_speech=("noun", "verb"))
    assert isinstance(opened, CocoPanoptic)
    with pytest.raises(ConfigError, match="split='val' with coco-panoptic"):
        open_annotations("coco-panoptic", coco.root, split="val")
    with pytest.raises(ConfigError, match="captions='it' with flickr30k-entities"):
        open_annotations("flickr30k-entities", coco.root, captions="it")
    with pytest.raises(ConfigError, match="the annotation format 'coco'"):
        open_annotations("coco", coco.root)


def test_pictures_in_memory_cannot_be_found(coco, tmp_path):
    from lavender.data.samples import Sample, Samples
    from lavender.world.student_models import conversation

    samples = Samples((Sample("row 0", (picture(3),), conversation("what?", "a dog")),))
    summary = extract_annotations(samples, coco.write(), tmp_path / "maps", grid=GRID)
    assert "by whose name annotations are found" in summary.dropped[0].reason


def test_each_picture_of_several_gets_the_maps_of_the_text(coco, tmp_path):
    """The dog's maps on the first; the second is grass alone. Text alone needs none."""
    layout = coco.write()
    names = [f"coco/val2017/{name}.png" for name in coco.ids]
    turns = [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "a dog"}]
    rows = [
        {"images": names, "conversations": turns},
        {
            "messages": [
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "Ho."},
            ]
        },
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    progress = []
    summary = extract_annotations(
        read_samples(tmp_path / "train.jsonl"),
        layout,
        tmp_path / "maps",
        grid=GRID,
        strict=True,
        on_progress=progress.append,
    )
    store = MapStore.open(tmp_path / "maps")
    dog, grass = (store.get(image_id(picture(shade)), "a dog") for shade in (100, 101))
    assert dog is not None
    assert grass is not None
    assert [word.text for word in dog.words] == ["dog"]
    assert grass.words == ()
    assert (summary.records, summary.without_picture, sum(progress)) == (2, 1, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda coco: coco["images"].append(5),
        lambda coco: coco["images"][0].update(id=[1]),
        lambda coco: coco["images"][0].update(file_name=5),
        lambda coco: coco["images"][0].update(file_name="../../outside.png"),
        lambda coco: coco["images"][0].update(file_name="\ud800.png"),
        lambda coco: coco["annotations"][0].update(file_name="/etc/passwd"),
        lambda coco: coco["annotations"][0].update(image_id={}),
        lambda coco: coco["annotations"][0].update(segments_info=5),
        lambda coco: coco["annotations"][0]["segments_info"].append({"id": float("nan"), "category_id": 1}),
        lambda coco: coco["annotations"][0]["segments_info"].append({"id": 1, "category_id": [1]}),
        lambda coco: coco["categories"].append({"id": 1}),
        lambda coco: coco["categories"].append({"id": 99, "name": None}),
    ],
)
def test_entries_of_wrong_types_are_one_error(coco, change):
    coco.panoptic["categories"] = list(coco.panoptic["categories"])
    change(coco.panoptic)
    with pytest.raises(DataError, match=r"panoptic_val2017\.json with the entry"):
        coco.write()


def test_what_is_there_twice_is_one_error(coco):
    coco.panoptic["images"].append({"id": 139, "file_name": "another.png"})
    with pytest.raises(DataError, match="the picture 139 twice"):
        coco.write()
    coco.panoptic["images"].pop()
    coco.panoptic["categories"] = [*coco.panoptic["categories"], {"id": 1, "name": "cat"}]
    with pytest.raises(DataError, match="the category 1 twice"):
        coco.write()


def test_captions_of_wrong_types(coco):
    layout = coco.write()
    path = coco.root / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps({"annotations": [{"id": 1, "image_id": [139], "caption": "A dog."}]}))
    with pytest.raises(DataError, match="with the annotation {'caption': 'A dog.', 'id': 1"):
        layout.samples()
    path.write_text('{"annotations": [], "annotations": []}')
    with pytest.raises(DataError, match="an object with the key 'annotations' twice"):
        layout.samples()
    texts = [(1, "A dog \ud800."), (2, ["A dog."]), (3, "A dog.")]
    path.write_text(json.dumps({"annotations": [{"id": one, "image_id": 139, "caption": text} for one, text in texts]}))
    samples = layout.samples()
    assert [one.answers for one in samples] == [("A dog.",)]
    assert [one.reason for one in samples.dropped[:2]] == [
        "half of a surrogate pair at character 6",
        "empty caption: ['A dog.']",
    ]


def test_masks_that_are_no_files_or_too_large(coco):
    layout = coco.write()
    mask = layout.masks / "000000000139.png"
    mask.unlink()
    os.mkfifo(mask)
    with pytest.raises(DataError, match="a pipe, not a file"):
        layout.read("000000000139")
    mask.unlink()
    picture(1).save(mask, "BMP")
    with pytest.raises(DataError, match="Expected one of PNG"):
        layout.read("000000000139")


def test_pictures_that_links_lead_outside(coco):
    layout = coco.write()
    picture_file = coco.root / "val2017" / "000000000139.png"
    picture_file.rename(coco.root / "moved.png")
    os.symlink(coco.root / "moved.png", picture_file)
    samples = layout.samples()
    assert [one.what for one in samples.outside] == ["000000000139.png"]
    with pytest.raises(DataError, match=r"000000000139\.png: it lies outside the folder"):
        extract_annotations(samples, layout, coco.root / "maps", grid=GRID, strict=True)


@pytest.mark.parametrize("texts", ["questions", "all"])
def test_questions_are_mapped_where_any_text_can_be(coco, tmp_path, texts):
    layout, expected = coco.write(), {"Is the dog red?", *(["Yes."] if texts == "all" else [])}
    picture(100).save(tmp_path / "COCO_train2014_000000000139.png")
    row = {"image": "COCO_train2014_000000000139.png", "prompt": "Is the dog red?", "completion": "Yes."}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    data_file = tmp_path / "out.jsonl"
    samples = read_samples(tmp_path / "data.jsonl")
    summary = extract_annotations(samples, layout, tmp_path / "maps", grid=GRID, texts=texts, data_file=data_file)
    found = {record.text: record for record in MapStore.open(tmp_path / "maps")}
    assert found.keys() == expected
    assert [word.text for word in found["Is the dog red?"].words] == ["dog"]
    assert summary.records == len(expected)
    assert [json.loads(line)["text"] for line in data_file.read_text().splitlines()] == [
        text for text in expected if text == "Yes."
    ]
    with pytest.raises(StoreError, match=f"texts is '{texts}' there and 'answers' here"):
        extract_annotations(samples, layout, tmp_path / "maps", grid=GRID)
