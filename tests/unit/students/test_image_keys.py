"""Boxes and cells, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from lavender.students.image_keys import (
    EMPTY_BOX,
    KeyLayout,
    grid_boxes,
    key_layout,
    on_keys,
    overlap_matrix,
    seen_cells,
    to_grid,
)


def overlap(*box: float, grid: tuple[int, int] = (5, 7)) -> torch.Tensor:
    """The map (rows, cols) of one box."""
    return overlap_matrix(torch.tensor([box], dtype=torch.float64), grid).view(grid)


def test_a_box_that_is_a_cell():
    expected = torch.zeros(5, 7)
    expected[3, 2] = 1
    torch.testing.assert_close(overlap(3 / 5, 2 / 7, 4 / 5, 3 / 7), expected, rtol=0, atol=1e-6)


def test_a_box_over_four_cells():
    # rows 1.5 to 2.25 of 5: 2/3 in row 1, 1/3 in row 2; columns 4.2 to 5.2 of 7: 4/5 in column 4, 1/5 in column 5
    expected = torch.zeros(5, 7)
    expected[1, 4], expected[1, 5], expected[2, 4], expected[2, 5] = 8 / 15, 2 / 15, 4 / 15, 1 / 15
    torch.testing.assert_close(overlap(1.5 / 5, 4.2 / 7, 2.25 / 5, 5.2 / 7), expected, rtol=0, atol=1e-6)


def test_the_whole_picture_is_uniform():
    torch.testing.assert_close(overlap(0, 0, 1, 1), torch.full((5, 7), 1 / 35))


def test_a_box_much_smaller_than_a_cell_keeps_its_mass():
    expected = torch.zeros(5, 7)
    expected[0, 6] = 1
    torch.testing.assert_close(overlap(0.1, 0.99, 0.1001, 0.9901), expected, rtol=0, atol=1e-6)


def test_an_empty_box_gives_nothing():
    assert overlap(*EMPTY_BOX).tolist() == torch.zeros(5, 7).tolist()


def test_parts_outside_the_picture_count_as_outside():
    assert overlap(0.5, 0, 1.5, 2).sum().item() == pytest.approx(0.5 * 0.5)
    expected = torch.zeros(5, 7)
    expected[4, 6] = 0.25
    torch.testing.assert_close(overlap(4 / 5, 6 / 7, 6 / 5, 8 / 7), expected, rtol=0, atol=1e-6)
    assert overlap(1, 0, 1.3, 1).sum() == 0


def test_rows_and_columns_are_not_confused():
    boxes = grid_boxes(2, 3)
    matrix = overlap_matrix(boxes, (2, 3))
    torch.testing.assert_close(matrix, torch.eye(6), rtol=0, atol=1e-6)


def test_mass_is_kept_between_any_two_grids():
    matrix = overlap_matrix(grid_boxes(11, 13), (5, 7))
    assert matrix.dtype == torch.float32
    assert matrix.shape == (143, 35)
    torch.testing.assert_close(matrix.sum(1), torch.ones(143))
    torch.testing.assert_close(matrix.sum(0), torch.full((35,), 143 / 35))
    down = matrix.view(11, 13, 5, 7).sum((1, 3))  # row i of 11 has its centre at 5 · (i + ½) / 11 rows of cells
    assert down.argmax(1).tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]


def test_grid_boxes_are_row_major_and_fill_the_frame():
    boxes = grid_boxes(2, 3, (0.5, 0.25, 1.5, 1.0))
    assert boxes.dtype == torch.float64
    assert boxes.tolist() == [
        [0.5, 0.25, 1.0, 0.5],
        [0.5, 0.5, 1.0, 0.75],
        [0.5, 0.75, 1.0, 1.0],
        [1.0, 0.25, 1.5, 0.5],
        [1.0, 0.5, 1.5, 0.75],
        [1.0, 0.75, 1.5, 1.0],
    ]


def test_maps_made_row_by_row_are_products_with_the_whole_matrix():
    """Two layers, three samples (of two pictures, of one that is cropped, of none), two heads, five words."""
    crop = grid_boxes(7, 4, (0.1, -0.2, 0.9, 1.3))
    layout, grid = key_layout([[grid_boxes(3, 5), grid_boxes(2, 6)], [crop], []]), (5, 7)
    attention = torch.rand(2, 3, 2, 5, layout.boxes.shape[1], requires_grad=True)
    of_words = torch.tensor([[0, 1, 1, 0, 1], [0] * 5, [0] * 5])
    heat, weights = torch.rand(3, 5, *grid), torch.rand(2, 3, 2, 5, *grid)
    is_own = (layout.pictures[:, None] == of_words[..., None]).float()
    matrix = torch.stack([overlap_matrix(boxes, grid) for boxes in layout.boxes]).unflatten(-1, grid)
    expected = 35 * torch.einsum("lbhwk,bwk,bkrc->lbhwrc", attention, is_own, matrix)
    found = to_grid(attention, layout, of_words, grid)
    laid = torch.einsum("bwrc,bkrc->bwk", heat, matrix) * is_own
    # the same products of float32, added in another order
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(on_keys(heat, layout, of_words), laid, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad((maps * weights).sum(), attention)[0] for maps in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_cells_that_a_cropped_picture_shows():
    """The second picture of the second sample is cut at the left, to the middle of the third of six columns."""
    cut = grid_boxes(4, 4, (0.0, 2.5 / 6, 1.0, 1.0))
    layout = key_layout([[grid_boxes(2, 2)], [grid_boxes(2, 2), cut]])
    assert seen_cells(layout, 0, 0, (2, 6)).all()
    assert seen_cells(layout, 1, 1, (2, 6)).tolist() == [[False, False, True, True, True, True]] * 2


def test_the_cells_that_a_resampler_gets():
    """Latents 0 and 1 of a picture are of the view whose patches show the upper half."""
    boxes = torch.stack([grid_boxes(2, 2, (0.5, 0.0, 1.0, 1.0)), grid_boxes(2, 2, (0.0, 0.0, 0.5, 1.0))])
    layout = KeyLayout(boxes, torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 1, 0, 0]]))
    assert seen_cells(layout, 0, 0, (2, 1)).tolist() == [[True], [False]]
    assert seen_cells(layout, 0, 1, (2, 1)).tolist() == [[False], [True]]
