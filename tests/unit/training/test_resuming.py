"""Which checkpoints can be resumed from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavender.alignment.coverage import Coverage
from lavender.training.checkpoints import COUNTS_FILE
from lavender.training.resuming import FIRST_COUNTS, _BrokenError, _check_counts


@pytest.mark.parametrize(("number", "is_whole"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_checkpoint_may_hold_fewer_counts(tmp_path: Path, number, is_whole):
    """As one of a version that knew fewer reasons; but neither less nor more than there ever were."""
    size = (FIRST_COUNTS, len(Coverage().counts()))[number] + (0 if is_whole else 2 * number - 1)
    (tmp_path / COUNTS_FILE).write_text(json.dumps([0] * size))
    if is_whole:
        _check_counts(tmp_path)
        return
    with pytest.raises(_BrokenError, match=f"does not hold {len(Coverage().counts())} counts"):
        _check_counts(tmp_path)
