"""Exact shares of cells, and which words name which category. Golden values are worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from annotated import CATEGORIES, GRID, HEIGHT, WIDTH, outer
from lavender.data.images import load_image
from lavender.teachers.annotations.category_names import COCO_SYNONYMS, CategoryNames, spoken_names
from lavender.teachers.annotations.regions import box_region, cell_shares, mask_region, turn_upright
from lavender.words import words_of


def test_a_mask_counts_by_exact_area_where_the_grid_does_not_divide_the_picture():
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[:4, :3] = True
    # cells are 10/3 high and 14/5 = 2.8 wide: 4 rows are 1.2 cells, 3 columns are 1 cell and 0.2 / 2.8 = 1/14
    expected = outer([1, 0.2, 0], [1, 1 / 14, 0, 0, 0])
    torch.testing.assert_close(cell_shares(mask_region(mask), mask.shape, GRID), expected)


def test_a_grid_finer_than_the_picture():
    mask = np.array([[True, False]])
    expected = [[1, 1, 0.5, 0, 0]] * 3
    torch.testing.assert_close(cell_shares(mask_region(mask), (1, 2), (3, 5)), torch.tensor(expected))


def test_boxes_count_once_where_they_overlap_and_not_outside():
    # 12 × 10 pixels on a grid of 2 × 3: cells of 5 × 4
    boxes = [(0.0, 0.0, 5.0, 3.0), (0.0, 2.0, 2.5, 6.0), (5.0, 10.0, 99.0, 99.0)]
    expected = [[(15 + 2.5) / 20, 5 / 20, 0], [0, 0, 10 / 20]]
    torch.testing.assert_close(cell_shares(box_region(boxes, (10, 12)), (10, 12), (2, 3)), torch.tensor(expected))


def test_boxes_of_whole_pixels_equal_their_mask():
    rng = np.random.default_rng(5)
    mask, boxes = np.zeros((31, 43), dtype=bool), []
    for _ in range(7):
        left, right = sorted(rng.choice(44, 2, replace=False).tolist())
        top, bottom = sorted(rng.choice(32, 2, replace=False).tolist())
        mask[top:bottom, left:right] = True
        boxes.append((top, left, bottom, right))
    ours = cell_shares(box_region(boxes, mask.shape), mask.shape, (7, 11))
    torch.testing.assert_close(ours, cell_shares(mask_region(mask), mask.shape, (7, 11)))
    assert ours.mean().item() == pytest.approx(mask.mean(), abs=1e-6)  # area is kept


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_stored_frame_is_turned_as_the_picture_is(orientation):
    stored = np.zeros((HEIGHT, WIDTH), dtype=bool)
    stored[1:4, 2:9] = stored[7, 12] = True
    image = Image.fromarray(stored.astype(np.uint8) * 255).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    upright = np.asarray(load_image(image, "it"))[..., 0] > 0
    assert upright.shape == (WIDTH, HEIGHT)
    for region in (mask_region(stored), box_region([(1, 2, 4, 9), (7, 12, 8, 13)], stored.shape)):
        turned = turn_upright(region, stored.shape, orientation)
        assert (np.diff(turned.down) > 0).all()
        assert (np.diff(turned.across) > 0).all()
        shares = cell_shares(turned, upright.shape, (5, 3))
        torch.testing.assert_close(shares, cell_shares(mask_region(upright), upright.shape, (5, 3)))


def test_spoken_names():
    stuff = ("sky-other-merged", "grass-merged", "wall-brick", "floor-other-merged", "mirror-stuff", "water-other")
    assert [spoken_names(name, False) for name in stuff] == [
        ["sky"],
        ["grass"],
        ["wall"],
        ["floor"],
        ["mirror"],
        ["water"],
    ]
    assert spoken_names("T-shirt", True) == ["t-shirt"]
    assert spoken_names("fire_hydrant", True) == ["fire hydrant"]
    assert spoken_names("door, double door", True) == ["door", "double door"]


def matches(text: str) -> list[tuple[str, tuple[str, ...]]]:
    names = CategoryNames([(one["name"], bool(one["isthing"])) for one in CATEGORIES], COCO_SYNONYMS)
    return [(" ".join(word.text for word in run), found) for run, found in names.match(text, words_of(text))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two dogs and a puppy", [("dogs", ("dog",)), ("puppy", ("dog",))]),
        ("men eat hot dogs", [("men", ("person",)), ("hot dogs", ("hot dog",))]),
        ("the dog is hot, dog", [("dog", ("dog",)), ("dog", ("dog",))]),
        (
            "a hot-dog, hot-dogs by the fire hydrants",
            [("hot-dog", ("hot dog",)), ("hot-dogs", ("hot dog",)), ("fire hydrants", ("fire hydrant",))],
        ),
        ("on skis under the skies", [("skis", ("skis",)), ("skies", ("sky-other-merged",))]),
        ("an orange shirt, two oranges", [("oranges", ("orange",))]),
        ("a brick wall on grass", [("wall", ("wall-brick", "wall-tile")), ("grass", ("grass-merged",))]),
        ("a dog-friendly place", []),
    ],
)
def test_words_name_categories(text, expected):
    assert matches(text) == expected


def test_the_longest_name_counts():
    names = CategoryNames([("wine", True), ("wine glass", True)], {})
    text = "wine glasses, wine"
    assert [(len(run), found) for run, found in names.match(text, words_of(text))] == [
        (2, ("wine glass",)),
        (1, ("wine",)),
    ]
