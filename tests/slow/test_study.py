"""A study that is killed with all its processes and started again does not run finished cells again."""

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
from slow.small_study import SCORED

STUDY, SEED, JOBS = "teacher-controls", 7, 2  # every target of the alignment is trained on
FIRST_RESULT_SECONDS, WHOLE_STUDY_SECONDS = 1200, 2100
"""Limits for a study that hangs. The whole test takes some minutes on two free cores, and up to ten on busy ones."""

# longer than both limits together, so that the test's own messages come before pytest's
pytestmark = [pytest.mark.slow, pytest.mark.timeout(FIRST_RESULT_SECONDS + WHOLE_STUDY_SECONDS + 60)]


@pytest.fixture
def start(tmp_path) -> Callable[[str], subprocess.Popen]:
    """Starts the study in a process group of its own; stdout and stderr go to files of the given name."""

    def begin(name: str) -> subprocess.Popen:
        command = [
            sys.executable,
            str(Path(__file__).parent / "small_study.py"),
            "study",
            STUDY,
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


def kill_after_a_result(process: subprocess.Popen, out: Path, errors: Path) -> None:
    deadline = time.monotonic() + FIRST_RESULT_SECONDS
    while not finished(out):
        assert process.poll() is None, f"it ended by itself:\n{errors.read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"no result yet:\n{errors.read_text()[-2000:]}"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_killed_study_continues(start, tmp_path):
    out = tmp_path / "out"
    process = start("first")
    try:
        kill_after_a_result(process, out, tmp_path / "first.err")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "first.out").read_text() == ""
    before, num_arms = finished(out), len(STUDIES[STUDY].arms(True))
    assert 1 <= len(before) < num_arms
    assert not (out / STUDY).exists()

    process = start("second")
    try:
        assert process.wait(timeout=WHOLE_STUDY_SECONDS) == 0, (tmp_path / "second.err").read_text()[-2000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    after = finished(out)
    assert len(after) == num_arms
    assert {name: after[name] for name in before} == before

    printed, folder = json.loads((tmp_path / "second.out").read_text()), out / STUDY
    assert printed == json.loads((folder / "results.json").read_text())
    assert (printed["study"], printed["quick"], printed["seeds"]) == (STUDY, True, [SEED])
    assert printed["command"] == f"lavender study {STUDY} --quick --seeds {SEED}"
    assert printed["settings"]["scoring"] == {"split": "development", "start": 0, "count": SCORED}
    assert list(printed["arms"]) == list(STUDIES[STUDY].arms(True))
    for scores in printed["arms"].values():
        for metric in STUDIES[STUDY].metrics:
            (score,) = scores[metric]
            assert 0 <= score <= 1
    assert len({json.dumps(scores) for scores in printed["arms"].values()}) == num_arms  # no two arms are equal
    assert QUICK in (folder / "page.md").read_text()
    assert (folder / "plot.png").stat().st_size > 1000
    assert not list((out / "runs").iterdir())  # the folders of killed runs are removed too
