"""A few dozen of the odd texts that `fuzz.texts` makes; `make test-all` tries many more."""

from __future__ import annotations

from fuzz.texts import try_all


def test_odd_texts_are_read_or_counted(tmp_path):
    assert try_all(40, seed=13, work=tmp_path) == []
