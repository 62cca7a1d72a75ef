"""`lavender study`, killed with all its processes and started again: what was finished is not run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lavender.world.studies.page import QUICK
from lavender.world.studies.registry import STUDIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEED, JOBS = 7, 2


@pytest.fixture
def start(tmp_path) -> Callable[[str], subprocess.Popen]:
    """Starts the study in a process group of its own; stdout and stderr go to files of the given name."""

    def begin(name: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "lavender.cli",
            "study",
            "teacher-controls",
            "--quick",
            "--seeds",
            str(SEED),
            "--out",
            str(tmp_path / "out"),
            "--jobs",
            str(JOBS),
            "--json",
        ]
        with (tmp_path / f"{name}.out").open("w") as out, (tmp_path / f"{name}.err").open("w") as err:
            return subprocess.Popen(
                command, stdout=out, stderr=err, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
            )

    return begin


def finished(out: Path) -> dict[str, int]:
    """Name of each result → when it was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}


def kill_after_a_result(process: subprocess.Popen, out: Path, said: Path) -> None:
    until = time.monotonic() + 900
    while not finished(out):
        assert process.poll() is None, f"it ended by itself:\n{said.read_text()[-2000:]}"
        assert time.monotonic() < until
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_and_started_again_it_goes_on(start, tmp_path):
    out = tmp_path / "out"
    process = start("first")
    try:
        kill_after_a_result(process, out, tmp_path / "first.err")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "first.out").read_text() == ""
    before, num_arms = finished(out), len(STUDIES["teacher-controls"].arms(True))
    assert 1 <= len(before) < num_arms
    assert not (out / "teacher-controls").exists()

    assert start("second").wait(timeout=1200) == 0, (tmp_path / "second.err").read_text()[-2000:]
    after = finished(out)
    assert len(after) == num_arms
    assert {name: after[name] for name in before} == before

    said, folder = json.loads((tmp_path / "second.out").read_text()), out / "teacher-controls"
    assert said == json.loads((folder / "results.json").read_text())
    assert (said["study"], said["quick"], said["seeds"]) == ("teacher-controls", True, [SEED])
    assert said["command"] == f"lavender study teacher-controls --quick --seeds {SEED}"
    assert said["settings"]["scoring"] == {"split": "development", "start": 0, "count": 100}
    assert list(said["arms"]) == list(STUDIES["teacher-controls"].arms(True))
    for scores in said["arms"].values():
        for metric in STUDIES["teacher-controls"].metrics:
            (score,) = scores[metric]
            assert 0 <= score <= 1
    assert len({json.dumps(scores) for scores in said["arms"].values()}) == num_arms  # no arm twice
    assert QUICK in (folder / "page.md").read_text()
    assert (folder / "plot.png").stat().st_size > 1000
    assert not list((out / "runs").iterdir())  # what the killed runs had written is gone too
