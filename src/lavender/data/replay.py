"""Replay: samples of what a model knows already, mixed into new data so that it is not forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets


def with_replay(dataset: datasets.Dataset, replayed: datasets.Dataset, share: float) -> datasets.Dataset:
    """Both data sets, with each sample at least once; the part that is too small for its share is repeated.

    The order is not mixed: trainers shuffle.

    Examples:
        >>> from datasets import Dataset
        >>> from lavender.data.replay import with_replay
        >>> new, known = (Dataset.from_dict({"name": [name] * number}) for name, number in (("new", 2), ("known", 6)))
        >>> list(with_replay(new, known, 0.75)["name"])
        ['new', 'new', 'known', 'known', 'known', 'known', 'known', 'known']
        >>> len(with_replay(new, known, 0.5))  # the new samples three times
        12
        >>> len(with_replay(new, known, 0.9))  # the known samples three times
        20

    Args:
        dataset: the new data, at least one sample.
        replayed: data of the kind that the model learned before, at least one sample, with the same columns.
        share: the share of `replayed` among the samples, between 0 and 1.
    """
    import datasets

    number = max(len(dataset), round(len(replayed) * (1 - share) / share))
    replayed_number = max(len(replayed), round(len(dataset) * share / (1 - share)))
    return datasets.concatenate_datasets([_repeated(dataset, number), _repeated(replayed, replayed_number)])


def _repeated(dataset: datasets.Dataset, number: int) -> datasets.Dataset:
    return dataset.select([index % len(dataset) for index in range(number)])
