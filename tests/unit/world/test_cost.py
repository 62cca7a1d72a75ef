"""What `lavender study --list` says of each study."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lavender.cli import main
from lavender.world.studies.cost import cost_of, listed
from lavender.world.studies.registry import STUDIES


def test_costs_by_hand():
    """Eight arms. Quick: 60 steps of 0.5 s, 3 × 100 pictures of 0.05 s, 10 s to load; 200 samples of 0.1 s."""
    quick, full = (cost_of(STUDIES["teacher-controls"], quick) for quick in (True, False))
    assert (quick.runs, full.runs) == (8, 24)
    assert quick.minutes == pytest.approx((8 * (30 + 15 + 10) + 20) / 60)
    assert full.minutes == pytest.approx((24 * (100 + 45 + 10) + 3 * 80) / 60)


def test_a_student_that_is_scored_often_costs_more():
    """Four arms of 60 steps, six scorings of 100 scenes, 100 samples."""
    cost = cost_of(STUDIES["overfitting"], quick=True)
    assert cost.runs == 4
    assert cost.minutes == pytest.approx((4 * (30 + 6 * 5 + 10) + 10) / 60)


def test_a_warm_up_costs_once():
    """Three arms of 10 steps from one base. It has 250 steps of 0.5 s, and 1,600 samples of 0.1 s."""
    arms = {name: arm for name, arm in STUDIES["attributes"].arms(True).items() if arm.task == "questions"}
    cost = cost_of(replace(STUDIES["attributes"], arms=lambda quick: arms, quick_steps=10), quick=True)
    assert cost.runs == 3
    assert cost.minutes == pytest.approx((250 * 0.5 + 1600 * 0.1 + 3 * (10 * 0.25 + 5 + 10) + 20) / 60)


def test_every_study_is_listed(capsys):
    assert main(["study", "--list"]) == 0
    printed = capsys.readouterr().out
    assert printed == listed(STUDIES) + "\n"
    rows = re.findall(r"^([a-z-]+) +\d+ runs, [\d.]+ (?:min|h) +\d+ runs, [\d.]+ (?:min|h)\n    (.*)$", printed, re.M)
    assert max(map(len, printed.splitlines())) <= 80
    assert rows == [(name, study.title) for name, study in STUDIES.items()]


def test_no_name_is_wrong_usage(capsys):
    assert main(["study"]) == 2
    assert "Do this: see what each costs: lavender study --list." in capsys.readouterr().err
