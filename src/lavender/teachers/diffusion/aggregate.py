"""Aggregation: the attention of many layers, heads and passes becomes one map per word on the picture's grid.

Sums are kept on one grid per layer size, so memory does not grow with the number of layers. Only `head_share` < 1 keeps
the map of every head, on the final grid.

Axis suffixes: B batch row, H head, C cell, W word, A maps of all layers and heads, r c rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.teachers.diffusion.base import Layer, LayerWeights
from lavender.teachers.diffusion.layer_weights import head_weights
from lavender.teachers.diffusion.views import WHOLE, Box, resample_to_picture, resample_to_view

NEAR = 3 / 16
"""Two peaks agree if they are at most this far apart, in shares of the picture's sides: three cells of Stable
Diffusion's 16 × 16 layers."""


class Aggregate:
    """Collects the maps of one batch. The last word column is not a word: it is the mean of all the text's tokens.

    Args:
        config: the settings of extraction.
        weights: of layers and heads, see `ExtractionConfig.layer_weights`.
        boxes: per row, the part of its picture that the latents show.
        tokens_BW: how many tokens each word column is the mean of.
    """

    def __init__(self, config: ExtractionConfig, weights: LayerWeights, boxes: Sequence[Box], tokens_BW: Tensor):
        self.config, self.weights, self.boxes, self.tokens_BW = config, weights, tuple(boxes), tokens_BW
        self._sums: dict[tuple[int, int], Tensor] = {}  # per grid of layers: (row, cell, word)
        self._total = 0.0
        self._heads: dict[tuple[str, int], Tensor] = {}
        self._peaks: list[Tensor] = []  # per layer and pass: (row, head, word, 2)

    def add(self, layer: Layer, maps_BHCW: Tensor) -> None:
        """Add a layer's attention; call it once per layer and pass.

        Args:
            maps_BHCW: (row, head, cell, word). With several noises per row, the noises of one row are adjacent.
        """
        if len(maps_BHCW) != len(self.boxes):
            maps_BHCW = maps_BHCW.unflatten(0, (len(self.boxes), -1)).mean(dim=1)
        heads = maps_BHCW.shape[1]
        weight_H = head_weights(self.weights, layer.name, heads)
        used = [head for head in range(heads) if weight_H[head]]
        used_BHCW = maps_BHCW if len(used) == heads else maps_BHCW[:, used]
        self._peaks.append(self._peak_places(layer, used_BHCW[..., :-1]))
        if self.config.head_share < 1:
            for head in used:
                key, maps = (layer.name, head), self._on_picture(layer.grid, maps_BHCW[:, head] * weight_H[head])
                self._heads[key] = self._heads[key] + maps if key in self._heads else maps
            return
        # avoid copies between Python and the GPU: each would wait for the layers before
        if len(set(weight_H)) == 1:
            share_H = maps_BHCW.new_full((heads,), weight_H[0] / heads)
        else:
            share_H = torch.tensor(weight_H, device=maps_BHCW.device) / heads
        maps_BCW = torch.einsum("bhcw,h->bcw", maps_BHCW, share_H)
        self._sums[layer.grid] = self._sums[layer.grid] + maps_BCW if layer.grid in self._sums else maps_BCW
        self._total += sum(weight_H) / heads

    def _on_picture(self, grid: tuple[int, int], maps_BCW: Tensor) -> Tensor:
        """Maps of a layer on the final grid of the whole picture: (row, word, rows, cols)."""
        return resample_to_picture(maps_BCW.transpose(1, 2).unflatten(-1, grid), self.boxes, self.config.grid)

    def _peak_places(self, layer: Layer, maps_BHCW: Tensor) -> Tensor:
        """Where each head's map is highest, (down, across) in shares of the picture: (row, head, word, 2)."""
        rows, cols = layer.grid
        place_BHW = maps_BHCW.argmax(dim=2)
        in_view = torch.stack([(place_BHW // cols + 0.5) / rows, (place_BHW % cols + 0.5) / cols], dim=-1)
        if all(box == WHOLE for box in self.boxes):
            return in_view
        boxes = torch.tensor(self.boxes, device=in_view.device)[:, None, None]
        return boxes[..., :2] + in_view * (boxes[..., 2:] - boxes[..., :2])

    def agreement(self, maps_BWrc: Tensor) -> Tensor:
        """The confidence in each map, (row, word) in [0, 1].

        It is the share of layers, heads and passes whose peak is at most `NEAR` from the map's peak.
        """
        rows, cols = maps_BWrc.shape[-2:]
        place_BW = maps_BWrc.flatten(2).argmax(dim=2)
        peak_BW2 = torch.stack([(place_BW // cols + 0.5) / rows, (place_BW % cols + 0.5) / cols], dim=-1)
        distance_BAW = (torch.cat(self._peaks, dim=1) - peak_BW2[:, None]).norm(dim=-1)
        return (distance_BAW <= NEAR).float().mean(dim=1)

    def maps(self) -> Tensor:
        """The words' maps, (row, word, rows, cols), not negative, of any scale; without the column of the text."""
        if self.config.space == "output":
            maps_BWrc = [self._on_picture(grid, self._of_concepts(dot_BCW)) for grid, dot_BCW in self._sums.items()]
            return torch.stack(maps_BWrc).sum(dim=0)
        if self._heads:
            maps_ABWrc = torch.stack(list(self._heads.values()))
            words_BWrc, text_BWrc = _most_peaked(maps_ABWrc[:, :, :-1], maps_ABWrc[:, :, -1:], self.config.head_share)
        else:
            sums_BWrc = torch.stack([self._on_picture(grid, maps_BCW) for grid, maps_BCW in self._sums.items()])
            mean_BWrc = sums_BWrc.sum(0) / self._total
            words_BWrc, text_BWrc = mean_BWrc[:, :-1], mean_BWrc[:, -1:]
        if self.config.competition == "none":
            return words_BWrc
        num_B1, num_BW = self.tokens_BW[:, -1:, None, None], self.tokens_BW[:, :-1, None, None]
        if self.config.competition == "share":
            return words_BWrc * num_BW / (text_BWrc * num_B1).clamp_min(torch.finfo(torch.float32).tiny)
        # a text of a single word has no other tokens: clamp the count to avoid a division by 0
        others_BWrc = (text_BWrc * num_B1 - words_BWrc * num_BW) / (num_B1 - num_BW).clamp_min(1)
        return (words_BWrc - others_BWrc).clamp_min(0)

    def _of_concepts(self, dot_BCW: Tensor) -> Tensor:
        """Dot products of any sign, summed over layers, as maps whose lowest cell of the view is 0: (row, cell, word).

        They compete in the view, because outside of it a map is 0 and a dot product is nothing.
        """
        words_BCW, mean_BC1 = dot_BCW[..., :-1] / self._total, dot_BCW[..., -1:] / self._total
        is_word_B1W, num_words_B11 = self.tokens_BW[:, None, :-1], self.tokens_BW[:, None, -1:]
        if self.config.competition == "share":
            return words_BCW.masked_fill(is_word_B1W == 0, float("-inf")).softmax(dim=-1)
        if self.config.competition == "contrast":
            words_BCW = words_BCW - (mean_BC1 * num_words_B11 - words_BCW) / (num_words_B11 - 1).clamp_min(1)
        return words_BCW - words_BCW.amin(dim=1, keepdim=True)


def _most_peaked(maps_ABWrc: Tensor, text_AB1rc: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Per word, the mean of the `share` of maps with the highest contrast, and the text's mean over the same: BWrc."""
    contrast_ABW = maps_ABWrc.amax(dim=(-2, -1)) - maps_ABWrc.mean(dim=(-2, -1))
    kept = max(1, round(share * len(maps_ABWrc)))
    chosen = contrast_ABW.topk(kept, dim=0).indices[..., None, None].expand(-1, -1, -1, *maps_ABWrc.shape[-2:])
    text_ABWrc = text_AB1rc.expand_as(maps_ABWrc)
    return maps_ABWrc.gather(0, chosen).mean(dim=0), text_ABWrc.gather(0, chosen).mean(dim=0)


def refine(
    maps_BWrc: Tensor, image_attention: Sequence[tuple[Layer, Tensor, Tensor]], boxes: Sequence[Box], order: int
) -> Tensor:
    """Spread each map along the image's self-attention, `order` times: the mean over heads and layers.

    Args:
        maps_BWrc: (row, word, rows, cols), of whole pictures.
        image_attention: layers of one grid with their queries and keys (row, head, cell, width).
        boxes: per row, the part of its picture that the latents show.
    """
    layer = image_attention[0][0]
    values_BWrc = resample_to_view(maps_BWrc, boxes, layer.grid)
    for _ in range(order):
        values_BCW = values_BWrc.flatten(2).transpose(1, 2)
        spread = [_attend(query, key, values_BCW) for _, query, key in image_attention]
        values_BWrc = torch.stack(spread).mean(dim=0).transpose(1, 2).unflatten(-1, layer.grid)
    return resample_to_picture(values_BWrc, boxes, (maps_BWrc.shape[-2], maps_BWrc.shape[-1]))


def _attend(query_BHCD: Tensor, key_BHCD: Tensor, values_BCW: Tensor) -> Tensor:
    """softmax(QKᵀ/√d)·values, mean over heads and over the noises of a row: (row, cell, word)."""
    heads, width, words = query_BHCD.shape[1], query_BHCD.shape[-1], values_BCW.shape[-1]
    values = values_BCW.repeat_interleave(len(query_BHCD) // len(values_BCW), dim=0)
    padded = F.pad(values.to(query_BHCD.dtype), (0, -words % width))
    chunks = [
        F.scaled_dot_product_attention(query_BHCD, key_BHCD, chunk[:, None].expand(-1, heads, -1, -1))
        for chunk in padded.split(width, dim=-1)
    ]
    spread = torch.cat(chunks, dim=-1)[..., :words].float().mean(dim=1)
    return spread.unflatten(0, (len(values_BCW), -1)).mean(dim=1)
