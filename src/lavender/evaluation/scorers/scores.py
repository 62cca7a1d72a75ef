"""What every scorer returns, and the checks of what it is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass

from lavender.errors import DataError


@dataclass(frozen=True)
class Scores:
    """The scores of one model's predictions in one metric.

    Attributes:
        per_sample: one number per sample, in the order of the predictions.
        aggregate: the numbers over all samples by name; the first is the one that the benchmark reports. None where a
            number does not exist, such as the score of the answered questions if none was answered.
    """

    per_sample: tuple[float, ...]
    aggregate: dict[str, float | None]


def mean(values: Sequence[float]) -> float:
    """The mean of at least one number."""
    return sum(values) / len(values)


def mean_scores(name: str, per_sample: Sequence[float]) -> Scores:
    """Scores whose aggregate is the mean over the samples."""
    return Scores(tuple(per_sample), {name: mean(per_sample)})


def require_texts(predictions: Sequence[str], **others: Sized) -> None:
    """Raise DataError unless there is at least one prediction, each is a text, and the others are as many."""
    if isinstance(predictions, str) or not len(predictions):
        got = f"the text {predictions!r}" if isinstance(predictions, str) else "no predictions"
        raise DataError(got, "a list of at least one prediction", "pass the model's answers as a list of texts")
    for name, values in others.items():
        if isinstance(values, str) or len(values) != len(predictions):
            got = "one text" if isinstance(values, str) else f"{len(values)} {name}"
            raise DataError(
                f"{got} for {len(predictions)} predictions", f"{name}: one per prediction", f"pass a list of {name}"
            )
    for index, prediction in enumerate(predictions):
        if not isinstance(prediction, str):
            raise DataError(
                f"{prediction!r} as prediction {index}", "a text", 'pass "" where the model answered nothing'
            )


def gold_answers(references: Sequence[str | Sequence[str]], at_least: int = 1) -> list[list[str]]:
    """The right answers of each sample as a list; one right answer may be given as a text.

    Args:
        references: per sample one text or a list of texts.
        at_least: the fewest answers that a sample may have.

    Raises:
        DataError: a sample has fewer answers, or one that is not a text.
    """
    golds = [[gold] if isinstance(gold, str) or not isinstance(gold, Iterable) else list(gold) for gold in references]
    for index, gold in enumerate(golds):
        if len(gold) < at_least or not all(isinstance(answer, str) for answer in gold):
            raise DataError(
                f"{gold!r} as the right answers of sample {index}",
                f"at least {at_least} text{'s' if at_least > 1 else ''}",
                "correct the sample's answers, or leave it out of the evaluation",
            )
    return golds
