"""benchmarks/reading.py runs, and writes what it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "reading.py"


@pytest.mark.slow
def test_the_benchmark_of_reading_runs(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--quick", "--json", str(tmp_path / "reading.json")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    numbers = json.loads((tmp_path / "reading.json").read_text())
    assert {"samples_per_s", "rss_mb_1k", "rss_mb_2k", "step_share", "step_ms", "collate_ms"} <= numbers.keys()
    assert all(value > 0 for value in numbers.values())
    assert numbers["step_share"] < 1
