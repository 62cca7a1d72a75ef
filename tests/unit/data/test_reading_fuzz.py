"""A few dozen of the odd inputs that `make test-all` tries by the thousand."""

from __future__ import annotations

from fuzz.data import try_all


def test_odd_input_is_read_dropped_by_name_or_one_error(tmp_path):
    assert try_all(60, 0, tmp_path) == []
