"""Scores of word maps against true masks: pointing, IoU, average precision, AUROC, KL, entropy, and controls.

Every map (rows, cols) is resized bilinearly to its mask's (height, width) before it is scored. A map that is zero
everywhere points nowhere and covers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
"""Size of a thing → its share of the picture: from the first bound up to, not including, the second."""

ENTROPY_GRID = (32, 32)
"""(rows, cols) on which entropy and KL are computed, so that maps of different grids compare."""


@dataclass(frozen=True, eq=False)
class JudgedMap:
    """A word's map with its true mask.

    Attributes:
        map: non-negative (rows, cols), of any scale.
        mask: the word's visible true mask, bool (height, width), with at least one pixel.
        order: the word's place in the order of mention, from 0.
        wrong: as a control, the map of another word of the same scene (rows, cols), or None.

    Raises:
        DataError: a map or mask is not two-dimensional, the mask is empty, or a map is not finite.
    """

    map: Tensor
    mask: np.ndarray | Tensor
    order: int
    wrong: Tensor | None = None

    def __post_init__(self) -> None:
        maps = [self.map] if self.wrong is None else [self.map, self.wrong]
        shapes = [tuple(array.shape) for array in (*maps, self.mask)]
        if any(len(shape) != 2 for shape in shapes):
            raise DataError(
                f"shapes {shapes}", "(rows, cols) maps and a (height, width) mask", "score one word at a time"
            )
        if not self.mask.any():
            raise DataError("a mask without a pixel", "a word that is visible in the picture", "leave this word out")
        if not all(torch.isfinite(heat).all() for heat in maps):
            raise DataError("a map with NaN or infinity", "finite values", "check how this map was made")


@dataclass(frozen=True)
class MapScores:
    """Scores of many maps, as shares of words or means over words.

    Attributes:
        pointing: share of maps whose maximum lies in the mask (the pointing game, Zhang et al. 2018).
        pointing_by_mention, words_by_mention: order of mention → pointing, and the number of words.
        iou_fixed, iou_threshold: mean IoU at a threshold that was chosen on other scenes, and this threshold.
        iou_best, best_threshold: mean IoU at the single best threshold for these maps, and this threshold.
        mass: share of the map that lies in the mask, mean; `uniform_pointing` is that of a uniform map.
        ap, auroc: means of the pixels' average precision, and of the area under their ROC curve.
        pointing_by_size, words_by_size: key of `SIZES` → pointing, and the number of words.
        wrong_word_pointing, num_wrong: share of other words' maps that point at this word, None without such maps; and
            the number of these maps.
        entropy: mean, in nats, of maps summed to 1 on 32 × 32 cells (Eq. 23); at most ln 1024 = 6.93.
        uniform_pointing: pointing of a uniformly random point, the mean share of the mask in its picture.
        centre_pointing: pointing of a map with its maximum in the centre of the picture.
        num_words: number of maps.
    """

    pointing: float
    pointing_by_mention: dict[int, float]
    words_by_mention: dict[int, int]
    iou_fixed: float
    iou_threshold: float
    iou_best: float
    best_threshold: float
    mass: float
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
        """The scores as JSON keeps them: orders of mention become strings."""
        scores = asdict(self)
        for key in ("pointing_by_mention", "words_by_mention"):
            scores[key] = {str(order): value for order, value in scores[key].items()}
        return scores


def resize_map(map: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map (rows, cols) bilinearly to `size` (height, width); float32 on the CPU."""
    heat = map.detach().to("cpu", torch.float64)  # so that rounding does not make equal pixels differ
    return F.interpolate(heat[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].float()


def pointing(map: Tensor, mask: np.ndarray | Tensor, tolerance: float = 0.0) -> bool:
    """Whether the maximum of the resized map lies in the mask. Of equal maxima, the first in reading order counts.

    Args:
        map: non-negative (rows, cols).
        mask: bool (height, width).
        tolerance: how far from the mask the maximum may lie, in pixels between pixel centres. The pointing game of
            Zhang et al. (2018) allows 15 pixels.
    """
    if tolerance <= 0:
        return _rank(map, mask).points
    truth = torch.as_tensor(mask, dtype=torch.bool, device="cpu")
    heat = resize_map(map, (truth.shape[0], truth.shape[1]))
    if heat.max() <= 0 or not truth.any():
        return False
    peak = torch.tensor(divmod(int(heat.argmax()), truth.shape[1]))
    return float((truth.nonzero() - peak).double().norm(dim=1).min()) <= tolerance


def iou(map: Tensor, mask: np.ndarray | Tensor, threshold: float) -> float:
    """IoU of the mask with the pixels of at least `threshold` × the resized map's maximum; from 0 to 1.

    Args:
        map: non-negative (rows, cols).
        mask: bool (height, width), with at least one pixel.
        threshold: a share of the maximum. Choose it on other pictures, with `best_threshold`.
    """
    return float(_rank(map, mask).ious((threshold,))[0])


def average_precision(map: Tensor, mask: np.ndarray | Tensor) -> float:
    """Average precision of the resized map's pixels, where those of the mask are the true ones; from 0 to 1.

    Equal pixels count together. A flat map scores the mask's share of the picture.

    Args:
        map: non-negative (rows, cols).
        mask: bool (height, width), with at least one pixel.
    """
    return _rank(map, mask).average_precision()


def centre_prior(grid: tuple[int, int] = (32, 32)) -> Tensor:
    """A map that knows nothing but that photographers put things into the centre: float32 (rows, cols), maximum 1.

    A Gaussian at the picture's centre; its standard deviation is a quarter of the side in each direction.

    Examples:
        >>> centre_prior((1, 3)).tolist()  # exp(−8/9) beside the centre: a third of the side is 4/3 deviations
        [[0.4111122786998749, 1.0, 0.4111122786998749]]
    """
    rows, cols = ((torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5 for side in grid)
    heat = torch.exp(-8 * (rows[:, None].square() + cols.square()))
    return (heat / heat.max()).float()


def controls(judged: Sequence[JudgedMap], iou_threshold: float, seed: int = 0) -> dict[str, MapScores]:
    """What maps without knowledge of the words score on the same masks, for a table beside `score_maps`.

    Args:
        judged: at least two maps with their masks.
        iou_threshold: as for `score_maps`.
        seed: of the shuffle.

    Returns:
        `centre prior`: every map is `centre_prior`. `shuffled words`: every mask gets the map of another word, by a
        random permutation that leaves none at its place. `uniform`: every map is flat; its pointing is that of a
        random point (`MapScores.uniform_pointing`), since a flat map has no maximum.

    Raises:
        DataError: fewer than two maps.
    """
    if len(judged) < 2:
        raise DataError(f"{len(judged)} maps", "at least two, to shuffle them", "judge more words")
    order = np.random.default_rng(seed).permutation(len(judged)).tolist()
    other = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle, so that no map stays at its place
    centre = [replace(word, map=centre_prior((word.map.shape[0], word.map.shape[1])), wrong=None) for word in judged]
    shuffled = [replace(word, map=judged[other[index]].map, wrong=None) for index, word in enumerate(judged)]
    flat = score_maps([replace(word, map=torch.ones_like(word.map), wrong=None) for word in judged], iou_threshold)
    return {
        "centre prior": score_maps(centre, iou_threshold),
        "shuffled words": score_maps(shuffled, iou_threshold),
        "uniform": replace(flat, pointing=flat.uniform_pointing, pointing_by_mention={}, pointing_by_size={}),
    }


def mass_in_mask(map: Tensor, mask: np.ndarray | Tensor) -> float:
    """The share of the resized map that lies in the mask, from 0 to 1; of attention, the share on the thing.

    Args:
        map: non-negative (rows, cols).
        mask: bool (height, width).
    """
    truth = torch.as_tensor(mask, dtype=torch.bool, device="cpu")
    return float(to_distribution(resize_map(map, (truth.shape[0], truth.shape[1])).double())[truth].sum())


def kl_from_mask(map: Tensor, mask: np.ndarray | Tensor, floor: float = 1e-4) -> float:
    """KL(mask ‖ map) in nats on `ENTROPY_GRID`, both as distributions. Lower is better.

    A uniform map scores about −ln(the mask's share of the picture).

    Args:
        map: non-negative (rows, cols).
        mask: bool (height, width), with at least one pixel.
        floor: share of the uniform distribution that is mixed into the map, so that a cell of value 0 has finite cost.
    """
    truth = to_distribution(F.adaptive_avg_pool2d(torch.as_tensor(mask).double()[None, None], ENTROPY_GRID)[0, 0])
    predicted = to_distribution(resize_map(map, ENTROPY_GRID).double())
    predicted = (1 - floor) * predicted + floor / predicted.numel()
    return float(torch.where(truth > 0, truth * (truth.clamp_min(1e-30) / predicted).log(), 0.0).sum())


def best_threshold(judged: Sequence[JudgedMap], candidates: Sequence[float] = THRESHOLDS) -> tuple[float, float]:
    """(the threshold with the highest mean IoU, this mean). Of equal thresholds, the first.

    A map's IoU at a threshold t is that of its mask with the pixels of at least t × the map's maximum.

    Args:
        judged: at least one map.
        candidates: thresholds, as shares of each map's maximum.

    Raises:
        DataError: there is no map.
    """
    _require_some(judged)
    return _best([_rank(word.map, word.mask) for word in judged], candidates)


def score_maps(judged: Sequence[JudgedMap], iou_threshold: float) -> MapScores:
    """Score many maps: a few milliseconds per map with a mask of 64 × 128 pixels, on one core.

    Args:
        judged: at least one map with its mask.
        iou_threshold: of `iou_fixed`, a share of each map's maximum; choose it on other scenes with `best_threshold`.

    Raises:
        DataError: there is no map.
    """
    _require_some(judged)
    ranked = [_rank(word.map, word.mask) for word in judged]
    by_mention: dict[int, list[bool]] = {}
    for word, ranking in sorted(zip(judged, ranked, strict=True), key=lambda pair: pair[0].order):
        by_mention.setdefault(word.order, []).append(ranking.points)
    by_size: dict[str, list[bool]] = {}
    for name, (low, high) in SIZES.items():
        points = [ranking.points for ranking in ranked if low <= ranking.mask_share < high]
        by_size |= {name: points} if points else {}
    wrong = [pointing(word.wrong, word.mask) for word in judged if word.wrong is not None]
    threshold, iou_best = _best(ranked, THRESHOLDS)
    return MapScores(
        pointing=_mean([ranking.points for ranking in ranked]),
        pointing_by_mention={order: _mean(points) for order, points in by_mention.items()},
        words_by_mention={order: len(points) for order, points in by_mention.items()},
        iou_fixed=_mean([float(ranking.ious((iou_threshold,))[0]) for ranking in ranked]),
        iou_threshold=iou_threshold,
        iou_best=iou_best,
        best_threshold=threshold,
        mass=_mean([mass_in_mask(word.map, word.mask) for word in judged]),
        ap=_mean([ranking.average_precision() for ranking in ranked]),
        auroc=_mean([ranking.auroc() for ranking in ranked]),
        pointing_by_size={name: _mean(points) for name, points in by_size.items()},
        words_by_size={name: len(points) for name, points in by_size.items()},
        wrong_word_pointing=_mean(wrong) if wrong else None,
        num_wrong=len(wrong),
        entropy=_mean([float(entropy(resize_map(word.map, ENTROPY_GRID))) for word in judged]),
        uniform_pointing=_mean([ranking.mask_share for ranking in ranked]),
        centre_pointing=_mean([bool(word.mask[tuple(side // 2 for side in word.mask.shape)]) for word in judged]),
        num_words=len(judged),
    )


@dataclass(frozen=True, eq=False)
class _Ranking:
    """The pixels of a resized map sorted by descending value. All scores are computed from this one sort.

    Attributes:
        heat: float64 (pixel,), descending.
        hits: int64 (pixel,), number of pixels up to this one that lie in the mask.
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
        cuts = self.heat[0] * torch.tensor(thresholds, dtype=torch.float64) * (1 - 1e-6)  # rounding of float32
        chosen = torch.searchsorted(-self.heat, -cuts, right=True)  # pixels at or above the cut
        inside = torch.cat([self.hits.new_zeros(1), self.hits])[chosen]
        return inside / (chosen + self.hits[-1] - inside).double()

    def auroc(self) -> float:
        """Chance that a pixel of the mask has a higher value than one outside (ties: half); 1 if none is outside."""
        hits, num_pixels = self._steps()
        outside = num_pixels - hits
        if not outside[-1]:
            return 1.0
        share = torch.cat([outside.new_zeros(1), outside]).double() / outside[-1]
        return float(torch.trapezoid(torch.cat([hits.new_zeros(1), hits]).double() / hits[-1], share))

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Per distinct value of the map, descending: the number of hits, and of pixels, with at least this value."""
        last_of_equals = torch.ones(len(self.heat), dtype=torch.bool)
        last_of_equals[:-1] = self.heat[1:] != self.heat[:-1]
        return self.hits[last_of_equals], last_of_equals.nonzero()[:, 0] + 1

    def average_precision(self) -> float:
        """Σ precision × gain in recall over the distinct values. Equal pixels count together, in no order."""
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
        raise DataError("no map", "at least one map with its true mask", "check which words have maps")
