"""How good word maps are: pointing, overlap and average precision against true masks, entropy, controls.

Frame: every map (rows, cols) is resized bilinearly to its mask's (height, width) before it is judged.
A map that is zero everywhere says nothing: it points nowhere and covers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lavender.errors import DataError
from lavender.maps import entropy, to_distribution

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Candidate thresholds, each a share of the map's maximum: 0.05, 0.10, … 0.95."""

SIZES = {"small": (0.0, 0.06), "medium": (0.06, 0.1), "large": (0.1, 1.1)}
"""Things by their share of the picture: from the first bound up to the second."""

ENTROPY_GRID = (32, 32)
"""(rows, cols) on which entropy is measured, so that maps of different grids can be compared."""


@dataclass(frozen=True, eq=False)
class JudgedMap:
    """One word's map and the truth about it.

    Attributes:
        map: heat, non-negative (rows, cols), of any scale.
        mask: the word's visible true mask, bool (height, width), with at least one pixel.
        order: the word's place in the order of mention, from 0.
        wrong: the map of another word present in the same scene (rows, cols), or None where there is none.

    Raises:
        DataError: a map or mask is not two-dimensional, the mask is empty, or a map is not finite.
    """

    map: Tensor
    mask: np.ndarray | Tensor
    order: int
    wrong: Tensor | None = None

    def __post_init__(self) -> None:
        maps = [self.map] if self.wrong is None else [self.map, self.wrong]
        shapes = [tuple(one.shape) for one in (*maps, self.mask)]
        if any(len(shape) != 2 for shape in shapes):
            raise DataError(
                f"shapes {shapes}", "(rows, cols) maps and a (height, width) mask", "judge one word at a time"
            )
        if not self.mask.any():
            raise DataError("a mask without a pixel", "a word that is visible in the picture", "leave this word out")
        if not all(torch.isfinite(one).all() for one in maps):
            raise DataError("a map with NaN or infinity", "finite heat", "look at how this map was made")


@dataclass(frozen=True)
class MapScores:
    """Scores of many maps; shares and means over words. `None` where nothing could be judged.

    Attributes:
        pointing: share of maps whose maximum lies in the mask.
        pointing_by_mention, words_by_mention: the same by place in the order of mention, and of how many words.
        iou_fixed, iou_threshold: mean IoU at a threshold chosen elsewhere, and that threshold.
        iou_best, best_threshold: mean IoU at the best single threshold on these very maps, and that threshold.
        ap, auroc: mean pixel average precision, and mean area under the pixels' ROC curve.
        pointing_by_size, words_by_size: pointing by the mask's share of the picture, the bounds of `SIZES`.
        wrong_word_pointing, num_wrong: share of other words' maps that point at this word, and of how many.
        entropy: mean, in nats, of maps summed to 1 on 32 × 32 (at most ln 1024 = 6.93).
        uniform_pointing: what a uniformly random point would score: the mean share of the mask.
        centre_pointing: what a blob in the picture's centre would score.
        num_words: how many maps were judged.
    """

    pointing: float
    pointing_by_mention: dict[int, float]
    words_by_mention: dict[int, int]
    iou_fixed: float
    iou_threshold: float
    iou_best: float
    best_threshold: float
    ap: float
    auroc: float
    pointing_by_size: dict[str, float]
    words_by_size: dict[str, int]
    wrong_word_pointing: float | None
    num_wrong: int
    entropy: float
    uniform_pointing: float
    centre_pointing: float
    num_words: int

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON keeps them: the keys of the by-mention tables are strings."""
        scores = asdict(self)
        for key in ("pointing_by_mention", "words_by_mention"):
            scores[key] = {str(order): value for order, value in scores[key].items()}
        return scores


def resize_map(map: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map (rows, cols) bilinearly to `size` (height, width); float32 on the CPU."""
    heat = map.detach().to("cpu", torch.float64)  # so that rounding does not make equal pixels differ
    return F.interpolate(heat[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].float()


def pointing(map: Tensor, mask: np.ndarray | Tensor) -> bool:
    """Whether the maximum of the resized map lies in the mask; of equal maxima, the first in reading order."""
    return _rank(map, mask).points


def iou(map: Tensor, mask: np.ndarray | Tensor, threshold: float) -> float:
    """Intersection over union of the mask and the pixels with at least `threshold` × the map's maximum."""
    return float(_rank(map, mask).ious((threshold,))[0])


def kl_from_mask(map: Tensor, mask: np.ndarray | Tensor, floor: float = 1e-4) -> float:
    """KL(mask ‖ map) in nats on the grid of `ENTROPY_GRID`, both as distributions: how little a map expects the truth.

    The map is mixed with a share of `floor` of the uniform distribution, so that a cell without any heat costs
    much and not infinitely much. A uniform map scores the log of 1 / the mask's share (about).
    """
    truth = to_distribution(F.adaptive_avg_pool2d(torch.as_tensor(mask).double()[None, None], ENTROPY_GRID)[0, 0])
    found = to_distribution(resize_map(map, ENTROPY_GRID).double())
    found = (1 - floor) * found + floor / found.numel()
    return float(torch.where(truth > 0, truth * (truth.clamp_min(1e-30) / found).log(), 0.0).sum())


def average_precision(map: Tensor, mask: np.ndarray | Tensor) -> float:
    """Pixel average precision: Σ precision × gain in recall, down the distinct values of the map.

    Pixels of equal heat enter together, so that a flat map scores the share of the mask whatever its order.
    """
    return _rank(map, mask).average_precision()


def best_threshold(judged: Sequence[JudgedMap], candidates: Sequence[float] = THRESHOLDS) -> tuple[float, float]:
    """The candidate with the highest mean IoU, and that mean. Of equals, the lowest.

    Raises:
        DataError: there is no map to judge.
    """
    _require_some(judged)
    return _best([_rank(one.map, one.mask) for one in judged], candidates)


def score_maps(judged: Sequence[JudgedMap], iou_threshold: float) -> MapScores:
    """Score many maps. A few milliseconds a map of 64 × 128 pixels, on one core.

    Args:
        judged: the maps with their truth.
        iou_threshold: for `iou_fixed`, a share of each map's maximum, chosen on other scenes (`best_threshold`).

    Raises:
        DataError: there is no map to judge.
    """
    _require_some(judged)
    ranked = [_rank(one.map, one.mask) for one in judged]
    by_mention: dict[int, list[bool]] = {}
    for one, ranking in sorted(zip(judged, ranked, strict=True), key=lambda pair: pair[0].order):
        by_mention.setdefault(one.order, []).append(ranking.points)
    by_size: dict[str, list[bool]] = {}
    for name, (low, high) in SIZES.items():
        points = [ranking.points for ranking in ranked if low <= ranking.mask_share < high]
        by_size |= {name: points} if points else {}
    wrong = [pointing(one.wrong, one.mask) for one in judged if one.wrong is not None]
    threshold, iou_best = _best(ranked, THRESHOLDS)
    return MapScores(
        pointing=_mean([ranking.points for ranking in ranked]),
        pointing_by_mention={order: _mean(points) for order, points in by_mention.items()},
        words_by_mention={order: len(points) for order, points in by_mention.items()},
        iou_fixed=_mean([float(ranking.ious((iou_threshold,))[0]) for ranking in ranked]),
        iou_threshold=iou_threshold,
        iou_best=iou_best,
        best_threshold=threshold,
        ap=_mean([ranking.average_precision() for ranking in ranked]),
        auroc=_mean([ranking.auroc() for ranking in ranked]),
        pointing_by_size={name: _mean(points) for name, points in by_size.items()},
        words_by_size={name: len(points) for name, points in by_size.items()},
        wrong_word_pointing=_mean(wrong) if wrong else None,
        num_wrong=len(wrong),
        entropy=_mean([float(entropy(resize_map(one.map, ENTROPY_GRID))) for one in judged]),
        uniform_pointing=_mean([ranking.mask_share for ranking in ranked]),
        centre_pointing=_mean([bool(one.mask[tuple(side // 2 for side in one.mask.shape)]) for one in judged]),
        num_words=len(judged),
    )


@dataclass(frozen=True, eq=False)
class _Ranking:
    """The pixels of one resized map from hot to cold: one sort, from which every score is read.

    Attributes:
        heat: float64 (pixel,), falling.
        hits: int64 (pixel,), how many of the pixels up to this one lie in the mask.
    """

    heat: Tensor
    hits: Tensor

    @property
    def points(self) -> bool:
        return bool(self.hits[0] == 1 and self.heat[0] > 0)

    @property
    def mask_share(self) -> float:
        return int(self.hits[-1]) / len(self.hits)

    def ious(self, thresholds: Sequence[float]) -> Tensor:
        """IoU at each threshold: float64 (threshold,)."""
        if self.heat[0] <= 0:
            return torch.zeros(len(thresholds), dtype=torch.float64)
        cuts = self.heat[0] * torch.tensor(thresholds, dtype=torch.float64) * (1 - 1e-6)  # float32's rounding
        chosen = torch.searchsorted(-self.heat, -cuts, right=True)  # pixels at or above the cut
        inside = torch.cat([self.hits.new_zeros(1), self.hits])[chosen]
        return inside / (chosen + self.hits[-1] - inside).double()

    def auroc(self) -> float:
        """Chance that a pixel of the mask is hotter than one outside, ties half; 1 where nothing is outside."""
        hits, num_pixels = self._steps()
        outside = num_pixels - hits
        if not outside[-1]:
            return 1.0
        share = torch.cat([outside.new_zeros(1), outside]).double() / outside[-1]
        return float(torch.trapezoid(torch.cat([hits.new_zeros(1), hits]).double() / hits[-1], share))

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Down the distinct values of the map: hits, and pixels, at or above each."""
        last_of_equals = torch.ones(len(self.heat), dtype=torch.bool)
        last_of_equals[:-1] = self.heat[1:] != self.heat[:-1]
        return self.hits[last_of_equals], last_of_equals.nonzero()[:, 0] + 1

    def average_precision(self) -> float:
        hits, num_pixels = self._steps()
        gained = torch.diff(hits, prepend=hits.new_zeros(1))
        return float((hits.double() / num_pixels * gained).sum() / self.hits[-1])


def _rank(map: Tensor, mask: np.ndarray | Tensor) -> _Ranking:
    truth = torch.as_tensor(mask, dtype=torch.bool, device="cpu")
    heat, order = resize_map(map, (truth.shape[0], truth.shape[1])).flatten().sort(descending=True, stable=True)
    return _Ranking(heat.double(), truth.flatten()[order].long().cumsum(0))


def _best(ranked: Sequence[_Ranking], candidates: Sequence[float]) -> tuple[float, float]:
    means = torch.stack([ranking.ious(candidates) for ranking in ranked]).mean(dim=0)
    best = int(means.argmax())
    return candidates[best], float(means[best])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _require_some(judged: Sequence[JudgedMap]) -> None:
    if not judged:
        raise DataError("no map", "at least one map with its true mask", "check which words were mapped")
