"""Studies that use more than one scoring, or samples of several kinds, run from the samples to their page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lavender.world.studies.page import QUICK
from lavender.world.studies.registry import STUDIES
from slow.small_study import SCORED

SEED, SECONDS = 7, 2400
pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 60)]


@pytest.mark.parametrize("name", ["overfitting", "mixing"])
def test_a_study_runs_to_its_page(name, tmp_path):
    """With still fewer steps and scenes than `--quick`: overfitting is scored after several steps, mixing has signs."""
    command = [sys.executable, str(Path(__file__).parent / "small_study.py"), "study", name, "--quick"]
    command += ["--seeds", str(SEED), "--out", str(tmp_path), "--jobs", "2", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed, study, folder = json.loads(done.stdout), STUDIES[name], tmp_path / name
    assert printed["settings"]["scoring"]["count"] == SCORED
    steps = {"overfitting": (1, 2, 3, 4, 5, 8)}.get(name)
    arms = list(study.arms(True))
    assert list(printed["arms"]) == (
        [f"{arm}, step {step}" for arm in arms for step in steps] if steps is not None else arms
    )
    for row, scores in printed["arms"].items():
        for metric in study.metrics:
            if metric in scores:
                assert len(scores[metric]) == 1, (row, metric)
        assert set(study.metrics) <= set(scores) or row == "base"
    # the learning rate is 0 at the first step of the warm-up, which leaves plain and published alike
    differing = [json.dumps(scores) for row, scores in printed["arms"].items() if not row.endswith(", step 1")]
    assert len(set(differing)) == len(differing), "a student is scored after each step, and no two arms are equal"
    assert printed["verdict"]
    assert QUICK in (folder / "page.md").read_text()
    assert (folder / "plot.png").stat().st_size > 1000
    assert not list((tmp_path / "runs").iterdir())
