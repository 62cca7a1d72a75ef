"""Pictures with maps of words, as the page and the figure show them.

Maps and masks cover the whole picture, row 0 at the top. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from lavender.drawing import dim_outside, heat_layer, peak_of
from lavender.errors import DataError
from lavender.evaluation.map_scores import mass_in_mask

TRUE_MASK = "true mask"


@dataclass(frozen=True, eq=False)
class WordRow:
    """A row of maps of one word.

    Attributes:
        word: what the row is called.
        maps: source name → non-negative map (rows, cols) of any grid and scale, or None for no map.
        mask: the word's true mask, bool (height, width) of the picture, where it is known.
        span: half-open span of the word's characters in the panel's `truth`, where it is known.
    """

    word: str
    maps: dict[str, Tensor | None]
    mask: np.ndarray | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture, maps of its words, and answers about it.

    Attributes:
        image: the picture.
        title: what the panel is called.
        rows: one per word.
        answers: model name → its answer.
        truth: the reference answer, or "".
        note: a remark below the answers, or "".
        group: the heading under which it stands, together with its neighbours of the same group, or "".

    Raises:
        DataError: a true mask has another size than the picture.
    """

    image: Image.Image
    title: str
    rows: list[WordRow]
    answers: dict[str, str] = field(default_factory=dict)
    truth: str = ""
    note: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if row.mask is not None and row.mask.shape != self.size:
                raise DataError(
                    f"a mask {row.mask.shape} of {row.word!r}", f"the picture's {self.size}", "resize the mask"
                )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image.height, self.image.width


@dataclass(frozen=True, eq=False)
class MapCell:
    """What lies over the picture in one row and column.

    Attributes:
        size: (height, width) of the picture in pixels.
        heat: the map, non-negative (rows, cols); None for a mask.
        mask: the true mask, bool (height, width), of a cell that shows it; else None.
        peak: (row, column) of the map's maximum in pixels of the picture; None for a mask, and for a map of zeros.
        share: the share of the map that lies in the true mask, from 0 to 1; None without a mask, or for zeros.
    """

    size: tuple[int, int]
    heat: Tensor | None
    mask: np.ndarray | None
    peak: tuple[int, int] | None = None
    share: float | None = None

    @property
    def is_mask(self) -> bool:
        return self.heat is None

    @property
    def layer(self) -> np.ndarray:
        """The layer over the whole picture: uint8 (height, width, RGBA) of any resolution."""
        if self.heat is not None:
            return heat_layer(self.heat, self.size)
        assert self.mask is not None
        return dim_outside(self.mask)


def sources_of(panels: Sequence[Panel]) -> list[str]:
    """The columns of all panels: the true mask if one is known, then the sources in the order they first occur."""
    rows = [row for panel in panels for row in panel.rows]
    masked = [TRUE_MASK] if any(row.mask is not None for row in rows) else []
    return masked + list(dict.fromkeys(source for row in rows for source in row.maps))


def cell_of(panel: Panel, row: WordRow, source: str) -> MapCell | None:
    """The cell of a row in the column `source`; None if there is no map."""
    if source == TRUE_MASK:
        return None if row.mask is None else MapCell(panel.size, None, row.mask)
    heat = row.maps.get(source)
    if heat is None:
        return None
    peak = peak_of(heat, panel.size)
    share = None if row.mask is None or peak is None else mass_in_mask(heat, row.mask)
    return MapCell(panel.size, heat, None, peak, share)
