"""Maps as a student with a fault in its geometry would be given them (App. E of the paper).

A fault puts a patch's attention at a wrong place of the picture. A map that is moved in the opposite way trains the
right student to look where the faulty one believes the thing to be. So the faults are targets of alignment, and no
faulty code is needed.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas

from lavender.maps import to_heat
from lavender.students.families.mllama import tile_boxes
from lavender.students.image_keys import grid_boxes, overlap_matrix
from lavender.world.student_models import MAX_TILES, PATCH_SIZE, TILE_SIZE

Fault = Literal["reshaped", "stretched", "transposed"]
FAULTS: dict[Fault, str] = {
    "reshaped": "the patches of all tiles, one tile after the other, are taken for the rows of one grid (Fig. 23, 24)",
    "stretched": "the padding beside the picture is taken for a part of the picture",
    "transposed": "rows are taken for columns",
}
"""Fault → what is wrong."""
assert tuple(FAULTS) == get_args(Fault)


def faulty(heat: Tensor, image_size: tuple[int, int], fault: Fault) -> Tensor:
    """A map as Mllama's student of the built-in world sees it through a fault.

    Args:
        heat: the map over the whole picture, (rows, cols); square for "transposed".
        image_size: (height, width) of the picture, in pixels.

    Returns:
        A heat of the same shape. For "reshaped" it has the fineness of the student's patches; a picture of one tile, or
        of tiles that stand one above the other, is changed in its fineness alone.
    """
    if fault == "transposed":
        return to_heat(heat.T)
    height, width = get_optimal_tiled_canvas(*image_size, MAX_TILES, TILE_SIZE)
    tiles, side = (height // TILE_SIZE, width // TILE_SIZE), TILE_SIZE // PATCH_SIZE
    by_tile = tile_boxes(image_size, tiles, MAX_TILES, TILE_SIZE, PATCH_SIZE).unflatten(0, (MAX_TILES, -1))
    boxes = by_tile[: tiles[0] * tiles[1], 1:].flatten(0, 1)  # without class tokens
    by_row = boxes.view(*tiles, side, side, 4).transpose(1, 2).flatten(0, 3)
    # the place that a faulty student believes each patch to be at
    believed = by_row if fault == "reshaped" else _stretched(tiles, side)
    grid = (heat.shape[0], heat.shape[1])
    on_patches = overlap_matrix(believed, grid) @ heat.flatten().float()
    shares = overlap_matrix(boxes, grid)
    moved = (on_patches @ shares) / shares.sum(dim=0).clamp_min(1e-9)
    return to_heat(moved.view(grid))


def _stretched(tiles: tuple[int, int], side: int) -> Tensor:
    """Boxes of the patches, one tile after the other, as if the tiles were the picture: (patch, 4)."""
    boxes = grid_boxes(tiles[0] * side, tiles[1] * side).view(tiles[0], side, tiles[1], side, 4)
    return boxes.transpose(1, 2).flatten(0, 3)
