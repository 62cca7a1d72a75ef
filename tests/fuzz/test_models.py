"""A few damaged folders of each kind, of other seeds than the long job's."""

from __future__ import annotations

import pytest

from fuzz.models import try_all


@pytest.mark.parametrize("seed", [1])
def test_damaged_folders_end_in_a_sentence(seed, tmp_path):
    assert try_all(30, seed, tmp_path) == []
