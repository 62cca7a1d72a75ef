"""The tables of README.md and docs/evidence.md have the numbers of the studies' pages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lavender.world.studies.page import page, show
from lavender.world.studies.registry import STUDIES

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence"
RANGE = re.compile(r"\d\.\d{3} \(\d\.\d{3}–\d\.\d{3}\)")


@pytest.mark.parametrize(
    ("study", "file", "first", "last", "count"),
    [
        ("new-words", "README.md", "**New words from few captions", "![F1 of new", 28),
        ("new-words", "docs/evidence.md", "### New words", "### Attributes", 36 + 36 + 16),
        ("attributes", "README.md", "**Which thing has which colour", "## Where it does not pay", 7),
        ("attributes", "docs/evidence.md", "### Attributes", "### Known words", 30 + 27 + 3),
        ("main", "README.md", "**Captions of words that", "**Where something stands", 3),
        ("main", "docs/evidence.md", "### Known words", "`lavender study teacher-controls`", 48),
        ("ood", "docs/evidence.md", "### Severely out of domain", "## 2. Where?", 20 + 15),
        ("rearrangement", "docs/evidence.md", "### A fault in the order", "### When attention follows", 19),
        ("alignment-over-time", "docs/evidence.md", "### When attention follows", "### The level alone", 36),
        ("overfitting", "docs/evidence.md", "### It does not keep", "### A lower alignment loss", 24),
        ("loss-vs-score", "docs/evidence.md", "### A lower alignment loss", "### The learned pooling", 28),
        ("pooling-over-training", "docs/evidence.md", "### The learned pooling", "## 5. What is not", 21),
        ("teacher-controls", "docs/evidence.md", "`lavender study teacher-controls`", "### Real weights", 32),
    ],
)
def test_numbers_are_those_of_the_study(study, file, first, last, count):
    text = (ROOT / file).read_text()
    found = RANGE.findall(text[text.index(first) : text.index(last)])
    results = json.loads((EVIDENCE / study / "results.json").read_text())
    measured = {show(values) for scores in results["arms"].values() for values in scores.values() if None not in values}
    assert len(found) == count
    assert [number for number in found if number not in measured] == []


@pytest.mark.parametrize(
    "study",
    [
        "new-words",
        "attributes",
        "main",
        "teacher-controls",
        "scaling",
        "rearrangement",
        "alignment-over-time",
        "overfitting",
        "mixing",
        "loss-vs-score",
        "pooling-over-training",
        "ood",
    ],
)
def test_a_page_is_that_of_its_results(study):
    results = json.loads((EVIDENCE / study / "results.json").read_text())
    assert (EVIDENCE / study / "page.md").read_text() == page(STUDIES[study], results)
    assert results["settings"]["scoring"]["split"] == "sealed"


@pytest.mark.parametrize(
    ("file", "first", "last", "count"),
    [
        ("docs/evidence.md", "### Real weights", "### Severely out of domain", 20),
        ("README.md", "**The same with real weights", "**Which thing has which colour", 5),
    ],
)
def test_numbers_of_real_weights_are_those_of_the_benchmark(file, first, last, count):
    text = (ROOT / file).read_text()
    found = RANGE.findall(text[text.index(first) : text.index(last)].replace("\n", " "))
    arms = json.loads((EVIDENCE / "real.json").read_text())["arms"]
    measured = {show([one[key] for one in arm]) for arm in arms.values() for key in arm[0] if key != "answers"}
    assert len(found) == count
    assert [number for number in found if number not in measured] == []


def test_numbers_of_the_joint_teacher_are_those_of_the_benchmark():
    text = (ROOT / "docs/teachers.md").read_text()
    found = RANGE.findall(text[text.index("### Joint attention") : text.index("A uniform map has 0.092")])
    arms = json.loads((EVIDENCE / "joint_teacher_sealed.json").read_text())["arms"]
    measured = {show([one[key] for one in arm["seeds"]]) for arm in arms.values() for key in arm["seeds"][0]}
    assert len(found) == 20
    assert [number for number in found if number not in measured] == []


def test_numbers_of_its_students_are_those_of_the_benchmark():
    text = (ROOT / "docs/teachers.md").read_text()
    found = RANGE.findall(text[text.index("Do students gain from these maps?") : text.index("## Words")])
    arms = json.loads((EVIDENCE / "joint_teacher_student.json").read_text())["arms"]
    measured = {show(values) for scores in arms.values() for values in scores.values()}
    assert len(found) == 20
    assert [number for number in found if number not in measured] == []
