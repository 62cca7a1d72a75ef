"""The quick benchmarks of the map store: every flipped bit is noticed, and no kill loses or doubles a record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_benchmark(name: str, path: Path) -> dict:
    command = [sys.executable, str(BENCHMARKS / name), "--quick", "--json", str(path)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=500)
    return json.loads(path.read_text())


def test_no_flipped_bit_is_silent(tmp_path):
    numbers = run_benchmark("store.py", tmp_path / "store.json")
    assert (numbers["flips"], numbers["silent"]) == (200, 0)
    assert {"bytes_per_map", "random_read_us", "open_100k_s", "sequential_per_s"} <= numbers.keys()
    assert numbers["bytes_per_map"] < 1200


def test_a_killed_writer_loses_and_doubles_nothing(tmp_path):
    assert run_benchmark("crash.py", tmp_path / "crash.json") == {"kills": 4, "lost": 0, "doubled": 0, "equal": True}
