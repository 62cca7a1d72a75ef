"""Every benchmark runs with `--quick`, its smallest size, and writes its numbers with `--json`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "benchmarks"
TEXTS = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.py"))}
BENCHMARKS = [name for name, text in TEXTS.items() if '__name__ == "__main__"' in text]
# lines of PyTorch's profiler, tracebacks and warnings
FOREIGN = re.compile(r"kineto|profiler|STAGE:|Traceback|\w+Warning:", re.IGNORECASE)


def no_flipped_bit_is_silent(numbers: dict) -> None:
    assert (numbers["flips"], numbers["silent"]) == (200, 0)
    assert {"bytes_per_map", "random_read_us", "open_100k_s", "sequential_per_s"} <= numbers.keys()
    assert numbers["bytes_per_map"] < 1200


def a_killed_writer_loses_and_doubles_nothing(numbers: dict) -> None:
    assert numbers == {"kills": 4, "lost": 0, "doubled": 0, "equal": True}


def reading_has_all_its_numbers(numbers: dict) -> None:
    names = {"samples_per_s", "rss_mb_1k", "rss_mb_2k", "step_share", "step_ms", "collate_ms", "collate_cpu_ms"}
    names |= {"waiting_step_share", "waiting_step_ms", "map_cpu_ms", "enough_step_ms"}
    assert names <= numbers.keys()
    assert all(value > 0 for value in numbers.values())
    assert max(numbers["step_share"], numbers["waiting_step_share"]) < 1
    assert numbers["waiting_step_ms"] > 100  # the step itself


def evaluation_keeps_the_pictures_of_a_batch(numbers: dict) -> None:
    assert numbers["samples"] == [16, 32, 64]
    assert numbers["kept_pictures"] < 0.5  # 1 if all stayed in memory; the allocator keeps some of what was freed
    assert numbers["time_exponent"] > 0


def a_step_has_all_its_numbers(numbers: dict) -> None:
    """No figure is held to a limit: these rows are small, and their times are of two rounds."""
    ways = {"zero", "mass", "kl", "published", "eager"}
    assert [(row["tokens"], row["words"], row["batch"]) for row in numbers["rows"]] == [(640, 8, 1), (640, 16, 1)]
    for row in numbers["rows"]:
        assert row["time"].keys() == row["memory"].keys() == ways
        assert row["peak_mib"].keys() == ways | {"sft"}
        assert all(value["median"] > 0 for value in row["time"].values())
        assert row["peak_mib"]["eager"] > row["peak_mib"]["sft"] > 0
        assert row["peak_mib"]["published"] > row["peak_mib"]["mass"] >= row["peak_mib"]["sft"]
    (growth,) = numbers["growth"]
    assert (growth["axis"], growth["from"], growth["to"], growth["by"]) == ("words", 8, 16, 2)


CHECKS: dict[str, Callable[[dict], None]] = {
    "store": no_flipped_bit_is_silent,
    "reading": reading_has_all_its_numbers,
    "eval_growth": evaluation_keeps_the_pictures_of_a_batch,
    "train_step": a_step_has_all_its_numbers,
    "crash": a_killed_writer_loses_and_doubles_nothing,
}
"""What else must hold of a benchmark's numbers."""


def test_every_other_module_is_imported_by_a_benchmark():
    assert set(BENCHMARKS) >= set(CHECKS)
    for name in TEXTS.keys() - set(BENCHMARKS):
        assert any(f"from {name} import" in TEXTS[benchmark] for benchmark in BENCHMARKS), name


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_at_its_smallest_size(name, tmp_path):
    out = tmp_path / "numbers.json"
    ran = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", "--quick", "--json", out],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    numbers = json.loads(out.read_text())
    assert numbers
    if name in CHECKS:
        CHECKS[name](numbers)
    assert [line for line in (ran.stdout + ran.stderr).splitlines() if FOREIGN.search(line)] == []
