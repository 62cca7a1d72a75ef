"""Frames: what of a picture the teacher sees, and where maps of it lie on the whole picture. Numbers by hand."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from lavender.config import Geometry
from lavender.teachers.diffusion.views import PADDING, WHOLE, View, resample_to_picture, resample_to_view, view_of

GEOMETRIES = get_args(Geometry)


def picture(width: int, height: int, box: tuple[float, float, float, float]) -> Image.Image:
    """Black, with a white box (top, left, bottom, right) in shares of its sides."""
    image = Image.new("RGB", (width, height))
    top, left, bottom, right = box
    ImageDraw.Draw(image).rectangle(
        (left * width, top * height, right * width - 1, bottom * height - 1), fill=(255, 255, 255)
    )
    return image


@pytest.mark.parametrize(
    ("geometry", "sides", "size", "view"),
    [
        ("squash", (200, 100), (64, 64), WHOLE),
        ("crop", (200, 100), (64, 64), (0, 0.25, 1, 0.75)),
        ("crop", (100, 400), (64, 64), (0.375, 0, 0.625, 1)),
        ("crop", (101, 100), (64, 64), (0, 0.5 / 101, 1, 100.5 / 101)),
        ("letterbox", (200, 100), (64, 64), (-0.5, 0, 1.5, 1)),  # 32 rows of picture, 16 of padding on each side
        ("letterbox", (100, 400), (64, 64), (0, -1.5, 1, 2.5)),  # 16 columns of picture, 24 on each side
        ("letterbox", (64, 65), (64, 64), (0, 0, 1, 64 / 63)),  # 63 columns: the odd one of padding is the last
        ("letterbox", (1, 200), (64, 64), (0, -31, 1, 33)),  # never less than a pixel
        ("aspect", (100, 100), (64, 64), WHOLE),
        ("aspect", (200, 100), (48, 88), WHOLE),  # 64 / √2 = 45.3 and 90.5 by eights
        ("aspect", (100, 400), (128, 32), WHOLE),
        ("aspect", (100, 2500), (320, 16), WHOLE),  # 12.8 and 320
        ("aspect", (8, 8000), (512, 8), WHOLE),  # 2.02 and 2023.9: never less than the unit, nor more than the longest
    ],
)
def test_views_by_hand(geometry, sides, size, view):
    found = view_of(Image.new("RGB", sides), geometry, 64, 8, 512)
    assert found.size == size
    assert found.pixels.shape == (*size, 3)
    assert found.pixels.dtype == np.uint8
    assert found.box == pytest.approx(view)


def test_padding_is_grey_and_the_rest_is_the_picture():
    found = view_of(Image.new("RGB", (200, 100), (9, 80, 200)), "letterbox", 64, 8, 512).pixels
    assert (found[:16] == PADDING).all()
    assert (found[48:] == PADDING).all()
    assert (found[16:48] == (9, 80, 200)).all()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("sides", [(300, 150), (150, 300), (257, 131), (64, 64)])
@pytest.mark.parametrize("box", [(0.25, 0.375, 0.5, 0.625), (0.4, 0.3, 0.6, 0.7), (0.3, 0.5, 0.7, 0.6)])
def test_a_planted_box_comes_back_at_its_place(geometry, sides, box):
    """The brightness of what the teacher sees, resampled to the picture's grid, is the picture's own brightness."""
    image, grid = picture(*sides, box), (20, 40)
    seen = view_of(image, geometry, 192, 8, 4608)
    bright = torch.from_numpy(seen.pixels.astype(np.float32)).permute(2, 0, 1).mean(dim=0)[None, None] / 255
    found = resample_to_picture(bright, [seen.box], grid)
    if seen.box[0] < 0 or seen.box[1] < 0:  # the padding's grey must not show
        assert found[..., 0, 0] == found[..., -1, -1] == 0
    expected = torch.zeros(grid)
    top, left, bottom, right = (round(share * side) for share, side in zip(box, (*grid, *grid), strict=True))
    expected[top:bottom, left:right] = 1
    assert (found[0, 0] - expected).abs().mean() < 0.02
    assert ((found[0, 0] > 0.5).float() - expected).abs().sum() <= 0.15 * expected.sum()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("sides", [(300, 150), (131, 257)])
def test_a_mirrored_view_is_that_of_the_mirrored_picture(geometry, sides):
    image = picture(*sides, (0.25, 0.375, 0.5, 0.625))
    image.paste((200, 30, 90), (0, 0, sides[0] // 3, sides[1]))
    view = view_of(image, geometry, 64, 8, 512)
    mirrored = view.mirrored()
    maps = torch.rand(1, 2, 16, 16)
    back = resample_to_picture(maps.flip(-1), [mirrored.box], (11, 13)).flip(-1)
    assert mirrored.size == view.size
    torch.testing.assert_close(back, resample_to_picture(maps, [view.box], (11, 13)), rtol=0, atol=1e-5)
    twice = mirrored.mirrored()
    assert twice.box == pytest.approx(view.box)
    assert (twice.pixels == view.pixels).all()


def test_resampling_by_hand():
    """A crop of the middle half of the columns: four columns of the picture's grid of which two are seen."""
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert resample_to_picture(maps, [(0, 0.25, 1, 0.75)], (2, 4)).tolist() == [[[[0, 1, 2, 0], [0, 3, 4, 0]]]]
    # padding above and below: of four rows the middle two are the picture
    tall = torch.arange(8.0).reshape(1, 1, 4, 2)
    assert resample_to_picture(tall, [(-0.5, 0, 1.5, 1)], (2, 2)).tolist() == [[[[2, 3], [4, 5]]]]
    # the whole: bilinear between cell centres, the border beyond the outer ones
    line = torch.tensor([[[[0.0, 4.0]]]])
    assert resample_to_picture(line, [WHOLE], (1, 4)).tolist() == [[[[0, 1, 3, 4]]]]


def test_rows_with_different_views_do_not_mix():
    maps, views = torch.rand(3, 2, 6, 7), [WHOLE, (0, 0.2, 1, 0.8), (-0.5, 0, 1.5, 1)]
    together = resample_to_picture(maps, views, (11, 13))
    for index, view in enumerate(views):
        torch.testing.assert_close(together[index], resample_to_picture(maps[index : index + 1], [view], (11, 13))[0])


@pytest.mark.parametrize("view", [WHOLE, (0.0, 0.0, 1.0, 1.0 + 1e-9)])
@pytest.mark.parametrize("grid", [(11, 13), (3, 7), (6, 7)])  # 6 → 3: the mean of two cells by either rule
def test_the_whole_by_either_way(view, grid):
    maps = torch.rand(2, 3, 6, 7)
    expected = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resample_to_picture(maps, [view, view], grid), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), [((64, 64), (16, 16)), ((52, 78), (32, 32)), ((32, 128), (32, 32))])
def test_no_cell_of_a_finer_map_is_passed_over(source, target):
    """A shrunk side has area means: each cell counts as much as its share of the picture, wherever a peak stands."""
    maps = torch.eye(source[0] * source[1])[None].unflatten(-1, source)
    weights = resample_to_picture(maps, [WHOLE], target)[0].sum(dim=(-2, -1))
    share = target[0] * target[1] / (source[0] * source[1])
    torch.testing.assert_close(weights, torch.full_like(weights, share), rtol=0, atol=1e-5)
    by_hand = resample_to_picture(torch.tensor([[[[8.0, 0, 4, 4, 2]]]]), [WHOLE], (1, 2))
    assert by_hand.flatten().tolist() == pytest.approx([(8 + 0 + 2) / 2.5, (2 + 4 + 2) / 2.5])


@pytest.mark.parametrize("view", [(0, 0.25, 1, 0.75), (-0.5, 0, 1.5, 1), WHOLE])
def test_there_and_back(view):
    """A smooth map of the picture, as the view sees it and back: the same where it is seen, 0 elsewhere."""
    rows, cols = torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(0, 1, 32), indexing="ij")
    maps = (rows + 2 * cols + 1)[None, None]
    seen = resample_to_view(maps, [view], (48, 64))
    back = resample_to_picture(seen, [view], (24, 32))
    inside = back != 0
    assert inside.float().mean() == (0.5 if view[1] else 1)
    torch.testing.assert_close(back[inside], maps[inside], rtol=0, atol=0.06)
    if view[0] < 0:
        assert seen[:, :, :12].abs().max() == seen[:, :, 36:].abs().max() == 0


def test_a_view_knows_its_size():
    assert View(np.zeros((5, 7, 3), np.uint8), WHOLE).size == (5, 7)
