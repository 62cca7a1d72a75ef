"""The world's tasks through lmms-eval's own evaluator, offline, and their page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lavender.cli import main
from lavender.evaluation.harness import TASKS_PATH
from lavender.evaluation.harness.task_index import TaskIndex
from lavender.world import STUDENT_PATH
from lavender.world.suite import SUITE, suite_items

PAGE = (Path(__file__).parents[2] / "docs" / "world-suite.md").read_text()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_every_task_of_the_suite_has_its_files_and_a_row_of_the_page():
    rows = re.findall(r"^\| `(world_\w+)` \| .* \| (\d+) \| `(\w+)` \|$", PAGE, re.M)
    assert [name for name, _, _ in rows] == [f"world_{task}" for task in SUITE]
    for name, num_items, metric in rows:
        text = (TASKS_PATH / "world" / f"{name}.yaml").read_text()
        assert f"task: {name}\n" in text
        assert text.split("- metric: ")[1].split("\n")[0] == metric
        assert SUITE[name.removeprefix("world_")].num_items == int(num_items)
        sealed = (TASKS_PATH / "world" / f"{name}_sealed.yaml").read_text()
        assert sealed == f"include: {name}.yaml\ntask: {name}_sealed\ntest_split: sealed\n"


@pytest.mark.parametrize("ending", ["", "_sealed"])
def test_the_groups_have_every_task_but_the_cutouts(ending):
    index = TaskIndex()
    expected = [f"world_{task}{ending}" for task in SUITE if task != "ood_cutouts"]
    assert index.leaves([f"world{ending}"]) == expected
    for group in ("world_pope", "world_ood"):
        assert index.leaves([group + ending]) == [name for name in expected if name.startswith(f"{group}_")]


def test_the_tasks_run_on_a_student(tmp_path):
    """One of each kind of score. The log has every sample, its question as the suite has it, and its score."""
    tasks = ("world_pope_adversarial", "world_captions", "world_signs", "world_ood_question")
    command = ["eval", "--model", str(STUDENT_PATH), "--tasks", ",".join(tasks), "--limit", "6", "--out", str(tmp_path)]
    assert main(command) == 0
    result = json.loads((tmp_path / "eval-tasks.json").read_text())
    assert set(tasks) <= set(json.dumps(result).split('"'))
    for name in tasks:
        (log,) = tmp_path.glob(f"*/{name}.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        items = suite_items(name.removeprefix("world_"), count=6)
        assert [line["prompt"] for line in lines] == [item.question for item in items]
        assert [line["target"] for line in lines] == [item.answers[0] for item in items]
        assert all(line["answer"] for line in lines)
        assert all("scores" in line for line in lines)
