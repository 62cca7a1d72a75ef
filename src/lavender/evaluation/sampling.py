"""Which samples of a data set are looked at, when not all are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from lavender.data.samples import Sample, Samples
from lavender.errors import ConfigError, DataError

T = TypeVar("T")


def evenly(values: Sequence[T], number: int) -> list[T]:
    """At most `number` of the values, spread evenly over all of them, the first one included."""
    number = min(number, len(values))
    return [values[at * len(values) // number] for at in range(number)]


def require_limit(limit: int) -> None:
    """Raise ConfigError unless `limit` is a number of samples, at least 1."""
    if limit < 1:
        raise ConfigError(f"--limit {limit}", "at least 1", "give the number of samples to look at")


def spread(samples: Sequence[Sample], limit: int) -> tuple[Sample, ...]:
    """At most `limit` of the samples that can be compared on, spread evenly. `left_out` counts the others.

    Raises:
        DataError: no sample can be compared on.
    """
    usable = [index for index, sample in enumerate(samples) if not _reason_to_leave_out(sample)]
    if not usable:
        raise DataError(
            f"{len(samples)} samples: {'; '.join(left_out(Samples(tuple(samples))))}",
            "at least one sample with one picture, which its first question shows",
            "name other data",
        )
    return tuple(samples[index] for index in evenly(usable, limit))


def left_out(read: Samples) -> list[str]:
    """A line per reason for which samples cannot be compared on, and one on rows that are none.

    A reading is one picture, question and answer.
    """
    reasons = Counter(_reason_to_leave_out(sample) for sample in read.samples)
    lines = [
        f"left out {count} sample{'' if count == 1 else 's'} {reason}" for reason, count in reasons.items() if reason
    ]
    if read.dropped:
        number, first = len(read.dropped), read.dropped[0]
        lines.append(f"left out {number} row{'' if number == 1 else 's'}; the first, {first.what}: {first.reason}")
    return lines


def _reason_to_leave_out(sample: Sample) -> str:
    if len(sample.sources) != 1:
        return "with several pictures" if sample.sources else "without a picture"
    turns = [message for message in sample.messages if message["role"] != "system"]
    if [turn["role"] for turn in turns[:2]] != ["user", "assistant"]:
        return "not beginning with a question and its answer"
    has_picture = any(part["type"] == "image" for part in turns[0]["content"])
    return "" if has_picture else "whose picture is not in the first question"
