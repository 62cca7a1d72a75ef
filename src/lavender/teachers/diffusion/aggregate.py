"""From the attention of many layers, heads and passes to one map a word, on the grid of the whole picture.

Sums are kept on the final grid, so memory grows with words × cells and not with layers; the selection of
heads alone needs every head's map at once.

Axis suffixes: B batch row, H head, C cell, W word, A maps of all layers and heads, r c rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.errors import ConfigError
from lavender.teachers.diffusion.base import Layer, LayerWeights
from lavender.teachers.diffusion.views import WHOLE, Box, from_picture, lay

NEAR = 3 / 16
"""Two peaks nearer than this, in shares of the picture's sides, agree: three cells of Stable Diffusion's 16 × 16."""


class Aggregate:
    """Collects one batch's maps. The last word column is not a word: the mean of all the text's tokens.

    Args:
        config: the levers.
        weights: of layers and heads, by the beginning of a layer's name; see `ExtractionConfig.layer_weights`.
        views: the part of its picture that each row's latents show.
        tokens_BW: how many tokens each word column is the mean of.
    """

    def __init__(self, config: ExtractionConfig, weights: LayerWeights, views: Sequence[Box], tokens_BW: Tensor):
        self.config, self.weights, self.views, self.tokens_BW = config, weights, tuple(views), tokens_BW
        self._sums: dict[tuple[int, int], Tensor] = {}  # of layers of one grid, (row, cell, word)
        self._total = 0.0
        self._heads: dict[tuple[str, int], Tensor] = {}
        self._peaks: list[Tensor] = []  # of each layer and pass: (row, head, word, 2)

    def take(self, layer: Layer, maps_BHCW: Tensor) -> None:
        """Add a layer's attention, one call a layer and pass; several noises of a row follow one another."""
        if len(maps_BHCW) != len(self.views):
            maps_BHCW = maps_BHCW.unflatten(0, (len(self.views), -1)).mean(dim=1)
        heads = maps_BHCW.shape[1]
        weight_H = head_weights(self.weights, layer.name, heads)
        used = [head for head in range(heads) if weight_H[head]]
        used_BHCW = maps_BHCW if len(used) == heads else maps_BHCW[:, used]
        self._peaks.append(self._peak_places(layer, used_BHCW[..., :-1]))
        if self.config.head_share < 1:
            for head in used:
                key, laid = (layer.name, head), self._laid(layer.grid, maps_BHCW[:, head] * weight_H[head])
                self._heads[key] = self._heads[key] + laid if key in self._heads else laid
            return
        # no tensor from or to Python where it can be helped: on a GPU each waits for the layers before
        if len(set(weight_H)) == 1:
            share_H = maps_BHCW.new_full((heads,), weight_H[0] / heads)
        else:
            share_H = torch.tensor(weight_H, device=maps_BHCW.device) / heads
        maps_BCW = torch.einsum("bhcw,h->bcw", maps_BHCW, share_H)
        self._sums[layer.grid] = self._sums[layer.grid] + maps_BCW if layer.grid in self._sums else maps_BCW
        self._total += sum(weight_H) / heads

    def _laid(self, grid: tuple[int, int], maps_BCW: Tensor) -> Tensor:
        return lay(maps_BCW.transpose(1, 2).unflatten(-1, grid), self.views, self.config.grid)

    def _peak_places(self, layer: Layer, maps_BHCW: Tensor) -> Tensor:
        """Where each head's map is highest, (down, across) in shares of the picture: (row, head, word, 2)."""
        rows, cols = layer.grid
        place_BHW = maps_BHCW.argmax(dim=2)
        in_view = torch.stack([(place_BHW // cols + 0.5) / rows, (place_BHW % cols + 0.5) / cols], dim=-1)
        if all(view == WHOLE for view in self.views):
            return in_view
        views = torch.tensor(self.views, device=in_view.device)[:, None, None]
        return views[..., :2] + in_view * (views[..., 2:] - views[..., :2])

    def agreement(self, maps_BWrc: Tensor) -> Tensor:
        """The confidence in each map, (row, word) in [0, 1].

        The share of layers and heads (and passes) whose own highest cell lies near the map's, that is within `NEAR`
        of the picture's sides.
        """
        rows, cols = maps_BWrc.shape[-2:]
        place_BW = maps_BWrc.flatten(2).argmax(dim=2)
        peak_BW2 = torch.stack([(place_BW // cols + 0.5) / rows, (place_BW % cols + 0.5) / cols], dim=-1)
        apart_BAW = (torch.cat(self._peaks, dim=1) - peak_BW2[:, None]).norm(dim=-1)
        return (apart_BAW <= NEAR).float().mean(dim=1)

    def maps(self) -> Tensor:
        """(row, word, rows, cols), not negative, of any scale; without the text's own column."""
        if self._heads:
            maps_ABWrc = torch.stack(list(self._heads.values()))
            words_BWrc, text_BWrc = _most_peaked(maps_ABWrc[:, :, :-1], maps_ABWrc[:, :, -1:], self.config.head_share)
        else:
            mean_BWrc = torch.stack([self._laid(grid, one) for grid, one in self._sums.items()]).sum(0) / self._total
            words_BWrc, text_BWrc = mean_BWrc[:, :-1], mean_BWrc[:, -1:]
        if self.config.competition == "none":
            return words_BWrc
        num_B1, num_BW = self.tokens_BW[:, -1:, None, None], self.tokens_BW[:, :-1, None, None]
        if self.config.competition == "share":
            return words_BWrc * num_BW / (text_BWrc * num_B1).clamp_min(torch.finfo(torch.float32).tiny)
        # a text of one word has no other token, and nothing to stand out from
        others_BWrc = (text_BWrc * num_B1 - words_BWrc * num_BW) / (num_B1 - num_BW).clamp_min(1)
        return (words_BWrc - others_BWrc).clamp_min(0)


def head_weights(weights: LayerWeights, name: str, heads: int) -> list[float]:
    """The weight of each head of a layer: of the longest beginning of its name that is given, else 1.

    Raises:
        ConfigError: another number of weights than heads.
    """
    weight = layer_weight(weights, name)
    if isinstance(weight, (int, float)):
        return [float(weight)] * heads
    if len(weight) != heads:
        raise ConfigError(
            f"{len(weight)} weights for the {heads} heads of layer {name}",
            "one number, or one a head",
            "change layer_weights",
        )
    return [float(one) for one in weight]


def layer_weight(weights: LayerWeights, name: str) -> float | Sequence[float]:
    """What is given for a layer: one number, or one a head."""
    matching = [prefix for prefix in weights if name.startswith(prefix)]
    return weights[max(matching, key=len)] if matching else 1.0


def _most_peaked(maps_ABWrc: Tensor, text_AB1rc: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Of each word the mean of the share of maps whose peak stands out most, and the text's in the same: both BWrc."""
    contrast_ABW = maps_ABWrc.amax(dim=(-2, -1)) - maps_ABWrc.mean(dim=(-2, -1))
    kept = max(1, round(share * len(maps_ABWrc)))
    chosen = contrast_ABW.topk(kept, dim=0).indices[..., None, None].expand(-1, -1, -1, *maps_ABWrc.shape[-2:])
    text_ABWrc = text_AB1rc.expand_as(maps_ABWrc)
    return maps_ABWrc.gather(0, chosen).mean(dim=0), text_ABWrc.gather(0, chosen).mean(dim=0)


def refine(
    maps_BWrc: Tensor, image_attention: Sequence[tuple[Layer, Tensor, Tensor]], views: Sequence[Box], order: int
) -> Tensor:
    """Spread each map along what the image's cells attend to, `order` times: mean over heads and layers.

    Args:
        image_attention: layers of one grid with their queries and keys (row, head, cell, width).
        views: the part of its picture that each row's latents show.
    """
    layer = image_attention[0][0]
    values_BWrc = from_picture(maps_BWrc, views, layer.grid)
    for _ in range(order):
        values_BCW = values_BWrc.flatten(2).transpose(1, 2)
        spread = [_attend(query, key, values_BCW) for _, query, key in image_attention]
        values_BWrc = torch.stack(spread).mean(dim=0).transpose(1, 2).unflatten(-1, layer.grid)
    return lay(values_BWrc, views, (maps_BWrc.shape[-2], maps_BWrc.shape[-1]))


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
