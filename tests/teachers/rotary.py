"""Rotary positions by hand, for `teachers.explicit`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def turned(heads_BHTD: Tensor, positions_TA: Tensor, widths: Sequence[int], theta: float) -> Tensor:
    """Turn each pair of neighbouring numbers by its angle, as a complex number.

    Args:
        positions_TA: per token, its coordinate on each axis.
        widths: how many of a head's numbers belong to each axis.
        theta: pair i of an axis of width d turns by position · theta^(−2i/d).
    """
    angles = [
        positions_TA[:, axis, None].double() * theta ** (-torch.arange(0, width, 2).double() / width)
        for axis, width in enumerate(widths)
    ]
    angle_TP = torch.cat(angles, dim=-1)
    pairs = torch.view_as_complex(heads_BHTD.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle_TP), angle_TP)).flatten(-2)


def image_places(grid: tuple[int, int], axes: int, row_axis: int = 1) -> Tensor:
    """(cell, axis): the row and the column on two neighbouring axes, 0 on the others."""
    rows, cols = grid
    places = torch.zeros(rows, cols, axes)
    places[..., row_axis] = torch.arange(rows)[:, None]
    places[..., row_axis + 1] = torch.arange(cols)
    return places.flatten(0, 1)
