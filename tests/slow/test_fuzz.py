"""Thousands of seeded wrong inputs of every kind: no traceback, no hang, nothing silent, nothing executed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SEED = 20261128
COUNTS = {
    "setting": 450,
    "option": 150,
    "stores": 300,
    "run_folders": 60,
    "texts": 500,
    "data": 500,
    "models": 120,
}


def test_at_least_two_thousand_inputs():
    assert sum(COUNTS.values()) >= 2000
    modules = {path.stem for path in (Path(__file__).parents[1] / "fuzz").glob("*.py")}
    assert {name for name in modules if not name.startswith("test_")} - {"__init__", "harness"} == {*COUNTS}


@pytest.mark.parametrize("kind", COUNTS)
def test_no_input_of_this_kind_ends_badly(kind, tmp_path):
    bad = import_module(f"fuzz.{kind}").try_all(COUNTS[kind], SEED, tmp_path)
    assert not bad, f"{len(bad)} of {COUNTS[kind]}:\n" + "\n".join(bad[:40])
