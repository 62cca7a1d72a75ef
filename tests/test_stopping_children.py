"""Whoever starts trainings ends them when it is stopped."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import pytest

from lavender.world import demo, tuning
from lavender.world.studies import runner
from lavender.world.studies.cells import Arm, Cell, Scoring, result_path

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)


def test_a_stopped_demo_ends_its_trainings(tmp_path, monkeypatch):
    """One of them does not listen."""
    begun: list[subprocess.Popen] = []

    def begin(out, arm):
        program = STUBBORN if begun else "print('ready', flush=True); import time; time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        begun.append(process)
        if len(begun) == len(demo.ARMS):
            raise KeyboardInterrupt
        return process

    monkeypatch.setattr(demo, "_start_training", begin)
    monkeypatch.setattr(tuning, "STOP_SECONDS", 0.5)
    with pytest.raises(KeyboardInterrupt):
        demo.train_arms(tmp_path)
    assert begun[0].poll() is not None
    tuning.stop_processes(begun)
    assert [process.poll() for process in begun] == [-15, -9]
    for process in begun:
        assert process.stdout is not None
        process.stdout.close()


def test_a_stopped_study_ends_its_runs(tmp_path, monkeypatch):
    def stopped(running):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "as_completed", stopped)
    cells = [Cell(Arm("mllama", "none"), 0, Scoring("development", start, 40)) for start in (0, 1000, 2000)]
    with pytest.raises(KeyboardInterrupt):
        runner.run_cells(tmp_path, cells, jobs=1)
    assert multiprocessing.active_children() == []
    assert not any(result_path(tmp_path, cell).is_file() for cell in cells)
