"""What families share whose pictures are tokens of the text, and whose pictures are cut into tiles."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from lavender.errors import DataError
from lavender.students.base import VlmAdapter

Box = tuple[float, float, float, float]
"""(top, left, bottom, right) as shares of the picture."""


class SelfAttentionAdapter(VlmAdapter):
    """Base of families whose pictures are part of the sequence: every decoder layer attends to them."""

    def usable_layers(self) -> tuple[int, ...]:
        return tuple(range(self.config.text_config.num_hidden_layers))

    def attention_module(self, model: PreTrainedModel, layer: int) -> Any:
        return model.model.language_model.layers[layer].self_attn

    def image_token_id(self) -> int:
        return self.config.image_token_id


def tile_frames(rows: int, cols: int, seen: float) -> list[Box]:
    """The part of the picture that each tile shows, row by row.

    Args:
        rows, cols: the grid of tiles, which divides the picture evenly.
        seen: share of a tile's side that whole cells cover, from its top or left.
    """
    return [
        (row / rows, col / cols, (row + seen) / rows, (col + seen) / cols) for row in range(rows) for col in range(cols)
    ]


def check_view_tokens(counts: list[int], num_views: int, cells: int, view: str, views: str) -> None:
    """Check that a batch has the tokens of whole views, and of all of them.

    Args:
        counts: number of picture tokens of each sample.
        num_views: number of views in the batch's pixels.
        cells: number of tokens per view.
        view, views: what the message calls one view, and several.

    Raises:
        DataError: a view is cut, or the numbers differ.
    """
    uncut = "raise max_length (or set it to None) if it cuts pictures"
    cut = [count for count in counts if count % cells]
    if cut:
        raise DataError(f"{cut[0]} picture tokens in a sample", f"{cells} for each {view}", uncut)
    if sum(counts) != num_views * cells:
        expected = f"{num_views * cells}: {num_views} {views}"
        raise DataError(f"{sum(counts)} picture tokens in a batch", expected, uncut)
