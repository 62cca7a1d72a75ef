"""Replay: each sample at least once, and the share that was asked for."""

from __future__ import annotations

from collections import Counter

import pytest

from lavender.data.replay import with_replay
from lavender.data.samples import Sample, Samples
from lavender.maps import Dropped


def named(prefix: str, number: int) -> Samples:
    samples = tuple(Sample(f"{prefix}{index}", (), []) for index in range(number))
    return Samples(samples, (Dropped(prefix, "unreadable"),), (), tuple((sample.name,) for sample in samples))


@pytest.mark.parametrize(
    ("new", "known", "share", "expected"),
    [
        (100, 800, 0.5, (800, 800)),
        (100, 50, 0.5, (100, 100)),
        (100, 800, 0.25, (2400, 800)),
        (100, 30, 0.25, (100, 33)),
        (3, 2, 0.4, (3, 2)),
    ],
)
def test_the_smaller_part_is_repeated(new, known, share, expected):
    mixed = with_replay(named("new", new), named("known", known), share)
    times = Counter(sample.name for sample in mixed)
    parts = [[count for name, count in times.items() if name.startswith(prefix)] for prefix in ("new", "known")]
    assert tuple(map(sum, parts)) == expected
    assert tuple(map(len, parts)) == (new, known)
    assert all(max(counts) - min(counts) <= 1 for counts in parts)
    assert mixed.identities == tuple((sample.name,) for sample in mixed)
    assert [drop.what for drop in mixed.dropped] == ["new", "known"]


def test_nothing_is_mixed_into_nothing():
    new = named("new", 3)
    assert with_replay(new, Samples(()), 0.5) is new
