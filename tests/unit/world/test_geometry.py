"""Faults of geometry, by hand. A map has 16 × 16 cells, a tile of the student 8 × 8 patches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lavender.world.studies.geometry import FAULTS, Fault, faulty

WIDE, TALL, SQUARE, PADDED = (64, 128), (128, 64), (64, 64), (64, 96)


def lit(rows: slice, cols: slice) -> Tensor:
    heat = torch.zeros(16, 16)
    heat[rows, cols] = 1
    return heat


def test_patches_of_two_tiles_side_by_side_are_taken_for_rows():
    """A patch has 2 × 1 cells. Row 1 of a grid of 8 × 16 patches begins with the 16th patch: row 2 of the left tile."""
    moved = faulty(lit(slice(2, 4), slice(0, 1)), WIDE, "reshaped")
    torch.testing.assert_close(moved, lit(slice(4, 6), slice(0, 1)))
    # the 8th patch of row 0 is the first of the left tile's row 1
    moved = faulty(lit(slice(0, 2), slice(8, 9)), WIDE, "reshaped")
    torch.testing.assert_close(moved, lit(slice(2, 4), slice(0, 1)))
    # row 4 begins with the right tile
    moved = faulty(lit(slice(8, 10), slice(0, 1)), WIDE, "reshaped")
    torch.testing.assert_close(moved, lit(slice(0, 2), slice(8, 9)))


@pytest.mark.parametrize("size", [TALL, SQUARE])
def test_tiles_in_one_column_keep_their_order(size):
    heat = lit(slice(4, 8), slice(2, 6))
    torch.testing.assert_close(faulty(heat, size, "reshaped"), heat)


def test_padding_is_taken_for_picture():
    """Of a canvas of 128 pixels the picture has 96: patches of the padding seem to show its last quarter."""
    assert not faulty(lit(slice(0, 16), slice(12, 16)), PADDED, "stretched").any()
    heat = lit(slice(0, 16), slice(0, 6))
    torch.testing.assert_close(faulty(heat, PADDED, "stretched"), lit(slice(0, 16), slice(0, 8)))
    torch.testing.assert_close(faulty(heat, WIDE, "stretched"), heat)  # without padding nothing changes


def test_rows_are_taken_for_columns():
    heat = lit(slice(2, 4), slice(5, 9))
    torch.testing.assert_close(faulty(heat, PADDED, "transposed"), lit(slice(5, 9), slice(2, 4)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_constant_map_stays_constant_where_the_picture_fills_its_tiles(fault: Fault):
    torch.testing.assert_close(faulty(torch.ones(16, 16), WIDE, fault), torch.ones(16, 16))
