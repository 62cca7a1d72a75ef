"""AUROC, for benchmarks that rank samples by a model's probability (Hateful Memes)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lavender.errors import DataError
from lavender.evaluation.scorers.scores import Scores


def auroc(predictions: Sequence[float], references: Sequence[int]) -> Scores:
    """Area under the ROC curve: the probability that a positive sample is ranked above a negative one, ties half.

    Args:
        predictions: one number per sample, larger for positive, such as the probability of "yes".
        references: 1 for positive and 0 for negative.

    Returns:
        Per sample the share of samples of the other class that it is on the right side of, ties half; their mean over
        either class is the AUROC. Aggregate `auroc`, 0 to 1, 0.5 by chance.

    Raises:
        DataError: not as many references as predictions, a prediction that is no finite number, a reference that is
            neither 0 nor 1, or only one class, for which there is no AUROC.
    """
    if len(predictions) != len(references):
        got = f"{len(references)} references for {len(predictions)} predictions"
        raise DataError(got, "one reference per prediction", "pass lists of the same length")
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        if prediction is None or isinstance(prediction, str) or not math.isfinite(prediction):
            raise DataError(f"{prediction!r} as prediction {index}", "a finite number", "check the model's scores")
        if reference not in (0, 1):
            raise DataError(f"{reference!r} as reference {index}", "0 or 1", "give the class as a number")
    scores, positive = np.asarray(predictions, dtype=float), np.asarray(references, dtype=bool)
    if positive.all() or not positive.any():
        only = (
            "no samples"
            if not len(positive)
            else "only positive samples"
            if positive.all()
            else "only negative samples"
        )
        raise DataError(only, "samples of both classes", "score more samples, or report accuracy")
    negatives, positives = np.sort(scores[~positive]), np.sort(scores[positive])
    above = _share_below(scores, negatives)
    below = 1 - _share_below(scores, positives)
    placed = np.where(positive, above, below)
    return Scores(tuple(placed.tolist()), {"auroc": float(placed[positive].mean())})


def _share_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each score the share of the sorted others that are below it, ties half."""
    return (np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")) / (2 * len(others))
