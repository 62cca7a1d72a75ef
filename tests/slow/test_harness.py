"""`lavender eval --tasks` through lmms-eval's own evaluator, offline: a run and its base, and a model without a run.

Each call is a process of its own: lmms-eval changes file locks and logging of the process that it runs in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature

from command_line import lavender, write_run, write_scenes
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.evaluation.harness.benchmarks import GROUPS
from lavender.world import STUDENT_PATHS

# an import of lmms-eval, torch and transformers per call, and an index of 2,000 files in one of them
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ANSWERED = """
task: local_names
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: scenes.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function local.picture
doc_to_text: "describe the picture."
doc_to_target: "{{names}}"
generation_kwargs: {max_new_tokens: 12, do_sample: false}
process_results: !function local.results
metric_list:
  - {metric: said, aggregation: !function local.mean, higher_is_better: true}
"""
RANKED = """
task: local_ranked
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: scenes.parquet
test_split: test
output_type: multiple_choice
doc_to_visual: !function local.picture
doc_to_text: "describe the picture."
doc_to_target: 0
doc_to_choice: "{{[caption, other]}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
CODE = """
def picture(doc):
    return [doc["image"].convert("RGB")]


def results(doc, results):
    return {"said": {"score": float(any(name in results[0] for name in doc["names"].split(","))), "said": results[0]}}


def mean(items):
    return sum(item["score"] for item in items) / len(items)


def no_number(items):
    return float("nan")


def no_mean(items):
    raise ArithmeticError("no mean")
"""

LOADED = """
import json, sys
from lavender.evaluation.harness import TASKS_PATH
from lavender.evaluation.harness.task_index import TaskIndex
from lmms_eval.tasks import TaskManager

theirs = TaskManager("ERROR")
ours = TaskManager("ERROR", [str(TASKS_PATH)], include_defaults=False)
index = TaskIndex()
found = {"in both": sorted({*theirs.all_tasks} & {*ours.all_tasks})}
for task in json.loads(sys.argv[1]):
    assert index.leaves([task]) == [task]
    config = index.manager._get_config(task)
    split, metrics = config.get("test_split") or config["validation_split"], config["metric_list"]
    found[task] = [split, [one["metric"] for one in metrics]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, some_scenes, captions) -> Path:
    """A folder with six scenes, a task of their names, the same with a mean
    that is NaN and with one that fails, one of their captions against others, and a group of the first and the last."""
    folder = tmp_path_factory.mktemp("tasks")
    others = [*captions[1:], captions[0]]
    rows = [
        {"image": scene.image, "names": ",".join(scene.names), "caption": caption, "other": other}
        for scene, caption, other in zip(some_scenes, captions, others, strict=True)
    ]
    Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet(folder / "scenes.parquet")
    (folder / "names.yaml").write_text(ANSWERED)
    (folder / "nan.yaml").write_text(
        ANSWERED.replace("local_names", "local_nan").replace("local.mean", "local.no_number")
    )
    (folder / "bad.yaml").write_text(
        ANSWERED.replace("local_names", "local_bad").replace("local.mean", "local.no_mean")
    )
    (folder / "ranked.yaml").write_text(RANKED)
    (folder / "both.yaml").write_text("group: local\ntask:\n  - local_names\n  - local_ranked\n")
    (folder / "local.py").write_text(CODE)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, some_scenes, captions, store_path) -> tuple[Path, Path]:
    """A plain run and an aligned one with LoRA, of one step each, of the world's student."""
    folders = []
    for name, weight in (("plain", 0), ("aligned", 1)):
        folder = tmp_path_factory.mktemp(name)
        (folder / "data").mkdir()
        write_scenes(folder / "data", some_scenes, captions)
        settings: dict[str, object] = {
            "maps": str(store_path),
            "out": str(folder / name),
            "align_weight": weight,
            "lora": {"r": 2},
        }
        settings |= {"max_steps": 1, "learning_rate": 0.05, "dtype": "float32", "probe_size": 0, "disable_tqdm": True}
        ran = lavender("train", write_run(folder, **settings))
        assert ran.code == DONE, ran.err
        folders.append(folder / name)
    return folders[0], folders[1]


def evaluated(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lavender.cli", "eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=900, check=False)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_its_base_and_another_run(runs, tasks):
    plain, aligned = runs
    command = (aligned, "--against", plain, "--tasks", "local", "--include-path", tasks, "--batch-size", 2)
    ran = evaluated(*command)
    assert ran.returncode == DONE, ran.stderr
    result = json.loads((aligned / "eval-tasks.json").read_text())
    assert list(result["arms"]) == ["base", "plain", "aligned"]
    assert len({arm["checkpoint"] for arm in result["arms"].values()}) == 3
    logs = aligned / "eval-tasks"
    for task, metric in (("local_names", "said"), ("local_ranked", "acc")):
        entry = result["tasks"][task]
        assert (entry["metric"], entry["samples"], entry["split"]) == (metric, 6, "test")
        for arm, score in entry["scores"].items():
            samples = lines(logs / arm / f"{task}.jsonl")
            assert [sample["doc_id"] for sample in samples] == list(range(6))
            assert score == pytest.approx(sum(sample["scores"][metric] for sample in samples) / 6)
        means = entry["scores"]
        for other, found in entry["differences"].items():
            assert found["difference"] == pytest.approx(means["aligned"] - means[other])
            assert found["low"] <= found["difference"] <= found["high"]
            assert found["num_units"] == 6
        assert list(entry["differences"]) == ["base", "plain"]
    # a trained student names what it sees, and finds captions likelier that are true
    assert result["tasks"]["local_names"]["scores"]["base"] > 1 / 2
    assert result["tasks"]["local_ranked"]["scores"]["base"] > 1 / 2
    assert "local_names" in ran.stdout
    assert max(map(len, ran.stdout.splitlines()[:8])) <= 80

    # stopped in the middle of the last model's answers: the same command gives the same result
    [log] = (logs / "aligned").glob("answers-*.jsonl")
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) * 2 // 3])
    written = log.stat().st_size
    before = [lines(logs / arm / "local_names.jsonl") for arm in result["arms"]]
    again = evaluated(*command)
    assert again.returncode == DONE, again.stderr
    assert [lines(logs / arm / "local_names.jsonl") for arm in result["arms"]] == before
    assert log.stat().st_size > written
    assert {line["request"] for line in lines(log)} == {json.loads(line)["request"] for line in whole.splitlines()}
    assert json.loads((aligned / "eval-tasks.json").read_text())["tasks"] == result["tasks"]


def test_a_model_without_a_run(tasks, tmp_path):
    """On a task, on the same with a mean that fails, and with one that is NaN."""
    model, names = STUDENT_PATHS["llava"], "local_bad,local_names,local_nan"
    command = ("--model", model, "--tasks", names, "--include-path", tasks, "--limit", 2, "--out", tmp_path)
    ran = evaluated(*command)
    assert ran.returncode == FAILED, ran.stderr
    result = json.loads((tmp_path / "eval-tasks.json").read_text(), parse_constant=pytest.fail)
    assert list(result["tasks"]) == ["local_names", "local_nan"]
    assert result["failed"]["local_bad"].startswith("Got the task local_bad, which fails: ")
    assert "lavender eval: Got the task local_bad, which fails: " in ran.stderr
    assert result["tasks"]["local_nan"]["scores"] == {"student_llava": None}
    assert "no score for student_llava on local_nan: lmms-eval's said is NaN or infinite" in ran.stdout
    assert result["tasks"]["local_names"]["samples"] == 2
    assert result["tasks"]["local_names"]["differences"] == {}
    assert "only the first 2 samples of each task: not comparable with published numbers" in ran.stdout


def test_an_unknown_task_and_data_that_are_out_of_reach(tasks, tmp_path):
    """Both are told before a model is loaded."""
    (tmp_path / "gone.yaml").write_text(ANSWERED.replace("scenes.parquet", "gone.parquet").replace("names", "gone", 1))
    (tmp_path / "local.py").write_text(CODE)
    where = ("--model", STUDENT_PATHS["mllama"], "--out", tmp_path / "out", "--include-path", tmp_path)
    ran = evaluated(*where, "--tasks", "local_gone")
    assert ran.returncode == FAILED, ran.stderr
    assert "Got the task local_gone, which cannot be loaded" in ran.stderr
    assert "gone.parquet" in ran.stderr
    ran = evaluated(*where, "--tasks", "local_gnoe,pope")
    assert ran.returncode == WRONG_USAGE, ran.stderr
    assert "Got the task 'local_gnoe'" in ran.stderr
    assert "such as local_gone" in ran.stderr
    assert not list((tmp_path / "out").rglob("answers-*"))


def test_every_task_of_the_table_loads_and_has_its_metrics_and_split():
    """Its YAML file in full, so with all that its functions import. The data sets are out of reach here."""
    table = [one for group in GROUPS.values() for one in group if one.task]
    command = [sys.executable, "-c", LOADED, json.dumps([one.task for one in table])]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found.pop("in both") == []  # a name that both have would be theirs
    told_otherwise = {"worldmedqa_v_local": "test", "coco_karpathy_cider": "test", "hateful_memes": "validation"}
    for one in table:
        split, metrics = found[one.task]
        assert split == told_otherwise.get(one.task, one.split), one.task
        assert set(one.keys) <= set(metrics), one.task
