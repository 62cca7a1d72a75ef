"""Replay: samples of what a model knows already, mixed into new data so that it is not forgotten."""

from __future__ import annotations

from itertools import cycle, islice
from typing import TypeVar

from lavender.data.samples import Samples

T = TypeVar("T")


def with_replay(samples: Samples, replayed: Samples, share: float) -> Samples:
    """Both data sets, with each sample at least once; the smaller part is repeated until the shares are right.

    The order is not mixed: trainers shuffle.

    Example:
        >>> from lavender.data.samples import Sample, Samples
        >>> from lavender.data.replay import with_replay
        >>> new, known = (Samples((Sample(name, (), []),) * number) for name, number in (("new", 2), ("known", 6)))
        >>> mixed = with_replay(new, known, 0.75)
        >>> [sample.name for sample in mixed]
        ['new', 'new', 'known', 'known', 'known', 'known', 'known', 'known']
        >>> len(with_replay(new, known, 0.5))
        12

    Args:
        samples: the new data.
        replayed: data of the kind that the model learned before.
        share: the share of `replayed` among the samples, between 0 and 1.
    """
    if not samples.samples or not replayed.samples:
        return samples
    number = max(len(samples), round(len(replayed) * (1 - share) / share))
    replayed_number = max(len(replayed), round(len(samples) * share / (1 - share)))
    return Samples(
        _repeated(samples.samples, number) + _repeated(replayed.samples, replayed_number),
        samples.dropped + replayed.dropped,
        samples.outside + replayed.outside,
        _repeated(samples.identities, number) + _repeated(replayed.identities, replayed_number),
    )


def _repeated(entries: tuple[T, ...], number: int) -> tuple[T, ...]:
    return tuple(islice(cycle(entries), number))
