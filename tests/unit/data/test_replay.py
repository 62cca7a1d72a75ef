"""Replay: each sample at least once, and the share that was asked for."""

from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset

from lavender.data.replay import with_replay


def named(prefix: str, number: int) -> Dataset:
    return Dataset.from_dict({"name": [f"{prefix}{index}" for index in range(number)]})


@pytest.mark.parametrize(
    ("new", "known", "share", "expected"),
    [
        (100, 800, 0.5, (800, 800)),
        (100, 50, 0.5, (100, 100)),
        (100, 800, 0.25, (2400, 800)),
        (100, 30, 0.25, (100, 33)),
        (3, 2, 0.4, (3, 2)),
        (2, 6, 0.9, (2, 18)),
    ],
)
def test_the_part_that_is_too_small_for_its_share_is_repeated(new, known, share, expected):
    names = list(with_replay(named("new", new), named("known", known), share)["name"])
    times = Counter(names)
    parts = [[count for name, count in times.items() if name.startswith(prefix)] for prefix in ("new", "known")]
    assert tuple(map(sum, parts)) == expected
    assert tuple(map(len, parts)) == (new, known)
    assert all(max(counts) - min(counts) <= 1 for counts in parts)
    assert names[: expected[0]] == [f"new{index % new}" for index in range(expected[0])]
