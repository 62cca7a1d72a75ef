"""lmms-eval with Lavender's checkpoints: answers on disk, models, the table of benchmarks, and what is printed."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import re
import shutil
import tomllib
import weakref
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from huggingface_hub.errors import LocalEntryNotFoundError
from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2
from PIL import Image
from requests import ConnectionError as NoConnection
from tenacity import RetryError, retry, stop_after_attempt

from command_line import complaint, lavender
from lavender.cli import eval_tasks
from lavender.cli.main import DONE, WRONG_USAGE
from lavender.errors import ConfigError, DataError, LavenderError
from lavender.evaluation.answers import continuation_loss, generate_answers
from lavender.evaluation.harness import TASKS_PATH, file_name, models, plugin, running, task_index
from lavender.evaluation.harness.answer_log import AnswerLog, request_key
from lavender.evaluation.harness.benchmarks import GROUPS, PAPER_MODELS, scores_in
from lavender.evaluation.harness.comparing import (
    Scored,
    difference_of,
    differences,
    mean_if_answered,
    refusal_rate,
    reported,
    sample_lines,
)
from lavender.evaluation.harness.running import _notes_of_scores, _summary
from lavender.evaluation.harness.tables import (
    benchmark_table,
    notes_of_benchmarks,
    result_lines,
    vlmevalkit_settings,
)
from lavender.evaluation.harness.task_index import TaskIndex, cause_of
from lavender.evaluation.placement import Placement
from lavender.world import STUDENT_PATH

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
QUESTIONS = ("what is it?", "a red dog", "is there a cat?")


# Answers on disk


def test_answers_are_kept_per_checkpoint(tmp_path):
    key = request_key("pope", 3, 0, "Is there a cat?", {"max_new_tokens": 8}, "v1")
    with AnswerLog(tmp_path, {"checkpoint": "a"}) as log:
        log.add(key, "no\n½")
    with AnswerLog(tmp_path, {"checkpoint": "a"}) as log:
        assert log.known(key) == "no\n½"
    with AnswerLog(tmp_path, {"checkpoint": "b"}) as log:
        assert log.known(key) is None


@pytest.mark.parametrize("change", range(6))
def test_a_request_that_differs_in_anything_is_another_one(change):
    same: list[Any] = ["pope", 3, 0, "Is there a cat?", {"max_new_tokens": 8}, "v1"]
    others = ["mme", 4, 1, "Is there a dog?", {"max_new_tokens": 9}, "v2"]
    changed = [*same[:change], others[change], *same[change + 1 :]]
    assert request_key(*same) != request_key(*changed)


def test_a_line_that_a_killed_run_left_unfinished_is_dropped(tmp_path):
    with AnswerLog(tmp_path, {}) as log:
        log.add("one", "yes")
        log.add("two", "no")
    content = log.path.read_bytes()
    log.path.write_bytes(content[:-9])
    with AnswerLog(tmp_path, {}) as log:
        assert (log.known("one"), log.known("two"), len(log)) == ("yes", None, 1)
        log.add("two", "no")
    assert log.path.read_bytes() == content


def test_a_damaged_line_inside_is_an_error(tmp_path):
    with AnswerLog(tmp_path, {}) as log:
        log.add("one", "yes")
        log.add("two", "no")
    log.path.write_text("{}\n" + log.path.read_text())
    with pytest.raises(DataError, match=r"Got a damaged line 1 in .*answers-.* Do this: delete the line"):
        AnswerLog(tmp_path, {})


# Models


@pytest.fixture
def student(make_student, processor) -> models.Student:
    return models.Student(make_student().eval(), processor)


@pytest.fixture
def split(some_scenes) -> Dataset:
    rows = [
        {"image": scene.image, "question": question} for scene, question in zip(some_scenes, QUESTIONS, strict=False)
    ]
    return Dataset.from_list(rows).cast_column("image", ImageFeature())


def chat(student: models.Student, split: Dataset, **settings: Any) -> models.ChatModel:
    model = models.ChatModel(device="cpu", student=lambda: student, **settings)
    model.task_dict["t"] = {"test": split}
    return model


def requests(split: Dataset, **settings: Any) -> list[Instance]:
    def messages(row: dict) -> list[dict]:
        pictures = [{"type": "image", "url": row["image"]}] if row["image"] is not None else []
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": row["question"]}]}]

    metadata = [{"task": "t", "doc_id": index, "repeats": 1} for index in range(len(split))]
    return [
        Instance("generate_until", (question, messages, {"max_new_tokens": 5} | settings, index, "t", "test"), 0, one)
        for index, (question, one) in enumerate(zip(split["question"], metadata, strict=True))
    ]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_are_those_of_the_model_in_the_order_of_the_requests(batch_size, student, split):
    expected = generate_answers(*student, list(split["image"]), list(split["question"]), max_new_tokens=5)
    assert len(set(expected)) > 1
    found = chat(student, split, batch_size=batch_size).generate_until(requests(split))
    assert found == expected


def test_a_batch_may_have_questions_with_and_without_a_picture(student, split):
    some = split.map(lambda row, index: {"image": None if index == 1 else row["image"]}, with_indices=True)
    alone = chat(student, some, batch_size=1).generate_until(requests(some))
    assert all(alone)
    assert chat(student, some, batch_size=3).generate_until(requests(some)) == alone


def test_each_repeat_of_a_request_keeps_its_own_answer(student, split, tmp_path, monkeypatch):
    said = iter("abcdef")
    monkeypatch.setattr(models, "answer_batch", lambda *_, **__: [next(said)])
    repeated = [one for one in requests(split) for _ in range(2)]
    for _ in range(2):
        with AnswerLog(tmp_path, {}) as log:
            assert chat(student, split, log=log).generate_until(repeated) == list("abcdef")


def test_the_pictures_of_a_sample_are_known_also_from_the_log(student, split, tmp_path):
    same = Dataset.from_list([{"image": split[0]["image"], "question": question} for question in QUESTIONS])
    same = same.cast_column("image", ImageFeature())
    assert len(set(chat_pictures(student, split, None).values())) == 3
    with AnswerLog(tmp_path, {}) as log:
        first = chat_pictures(student, same, log)
    assert len(first) == 3
    assert len(set(first.values())) == 1
    with AnswerLog(tmp_path, {}) as log:
        assert chat_pictures(student, same, log) == first


def chat_pictures(student: models.Student, split: Dataset, log: AnswerLog | None) -> dict[int, str]:
    model = chat(student, split, log=log)
    model.generate_until(requests(split))
    return dict(model.pictures["t"])


def test_an_answer_on_disk_is_not_generated_again(student, split, tmp_path, monkeypatch):
    with AnswerLog(tmp_path, {}) as log:
        first = chat(student, split, log=log)
        expected = first.generate_until(requests(split))
        assert (first.generated, first.reused) == (3, 0)
    content = log.path.read_text()
    log.path.write_text("".join(content.splitlines(keepends=True)[:2]))
    with AnswerLog(tmp_path, {}) as log:
        second = chat(student, split, log=log)
        assert second.generate_until(requests(split)) == expected
        assert (second.generated, second.reused) == (1, 2)
    with AnswerLog(tmp_path, {}) as log:

        def refuse() -> models.Student:
            raise AssertionError("loaded a model whose answers are all there")

        third = models.ChatModel(device="cpu", student=refuse, log=log)
        third.task_dict["t"] = {"test": split}
        assert third.generate_until(requests(split)) == expected
        changed = split.map(lambda row: {"question": row["question"]}, new_fingerprint="other pictures")
        fourth = chat(student, changed, log=log)
        fourth.generate_until(requests(changed))
        assert (fourth.generated, fourth.reused) == (3, 0)


def test_no_more_pictures_are_in_memory_than_in_a_batch(student, some_scenes, monkeypatch):
    alive: weakref.WeakValueDictionary[int, Image.Image] = weakref.WeakValueDictionary()
    made, most = count(), []

    class Pictures:
        """A split that makes a picture whenever a row is read."""

        _fingerprint = "pictures"

        def __getitem__(self, index: int) -> dict:
            image = some_scenes[index % len(some_scenes)].image.copy()
            alive[next(made)] = image
            return {"image": image, "question": "what is it?"}

    def answers(model, processor, conversations, length, **sampling):
        gc.collect()
        most.append(len(alive))
        return ["a dog"] * len(conversations)

    monkeypatch.setattr(models, "answer_batch", answers)
    asked = Dataset.from_list([{"question": "what is it?"}] * 9)
    model = models.ChatModel(device="cpu", batch_size=2, student=lambda: student)
    model.task_dict["t"] = {"test": Pictures()}
    assert model.generate_until(requests(asked)) == ["a dog"] * 9
    assert most == [2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("stops", "answer"),
    [
        (None, "a dog.\n\nA cat."),
        (["\n\n", ""], "a dog.\n\nA cat."),
        (["cat", "\n\n"], "a dog.\n\nA"),
        ("dog", "a"),
        (["\n"], "a dog."),
        ([" ", "\n\n"], "a"),
    ],
)
def test_an_answer_ends_before_a_stop_but_not_at_a_blank_line(stops, answer, student, split, monkeypatch):
    monkeypatch.setattr(models, "answer_batch", lambda *_, **__: ["a dog.\n\nA cat."])
    assert chat(student, split).generate_until(requests(split, until=stops)) == [answer] * 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_new_tokens": 3}, {"do_sample": False, "num_beams": 1}),
        ({"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, {"do_sample": False, "num_beams": 1}),
        ({"temperature": 0.0, "do_sample": True}, {"do_sample": False, "num_beams": 1}),
        ({"num_beams": 3}, {"do_sample": False, "num_beams": 3}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
    ],
)
def test_settings_of_a_task_are_those_of_generate(settings, expected):
    assert models.sampling(settings) == expected


def test_what_would_change_the_answers_unseen_is_refused():
    with pytest.raises(ConfigError, match=r"generation_kwargs with 'max_steps'"):
        models.sampling({"max_steps": 3})
    message = {"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}
    with pytest.raises(ConfigError, match=r"a part of type 'video'"):
        models.as_conversation([message])
    with pytest.raises(ConfigError, match=r"batch_size='auto'.*at least 1"):
        models.ChatModel(batch_size="auto", student=lambda: SimpleNamespace())  # ty: ignore[invalid-argument-type]


def test_the_loss_of_an_option_is_the_mean_over_its_tokens(student, split):
    """By hand: the model's own loss on the whole conversation, with labels on the continuation alone."""
    question = [
        {"role": "user", "content": [{"type": "image", "image": split[0]["image"]}, {"type": "text", "text": "?"}]}
    ]
    loss, greedy = continuation_loss(*student, question, "a red dog")
    text = student.processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False) + "a red dog"
    inputs = student.processor(images=[[split[0]["image"]]], text=[text], add_special_tokens=False, return_tensors="pt")
    count = len(student.processor.tokenizer("a red dog", add_special_tokens=False)["input_ids"])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -count:] = inputs["input_ids"][:, -count:]
    with torch.inference_mode():
        expected = student.model(**inputs, labels=labels).loss.item()
    assert loss == pytest.approx(expected, rel=1e-4)  # another sum order of float32
    assert not greedy


def test_options_are_scored_with_their_picture_and_kept(student, split, tmp_path):
    options = ("a red dog", "a blue cat")
    metadata = {"task": "t", "doc_id": 0, "repeats": 1}
    asked = [
        Instance("loglikelihood", ("?", option, lambda row: [row["image"]], 0, "t", "test"), index, metadata)
        for index, option in enumerate(options)
    ]
    question = [
        {"role": "user", "content": [{"type": "image", "image": split[0]["image"]}, {"type": "text", "text": "?"}]}
    ]
    expected = [continuation_loss(*student, question, option)[0] for option in options]
    load = iter([student])  # it is loaded once: the second model finds all in the log
    for _ in range(2):
        with AnswerLog(tmp_path, {}) as log:
            model = models.RankingModel(device="cpu", student=partial(next, load), log=log)
            model.task_dict["t"] = {"test": split}
            found: list[Any] = model.loglikelihood(asked)
            assert [one.text[0] for one in found] == pytest.approx(expected, rel=1e-6)  # the same pass
            assert list(model.pictures["t"]) == [0]


def test_an_option_that_the_model_would_write_is_greedy(student, split):
    """A model that knows each next token of "a red dog", and so is surprised by "a red cat" at its last word."""

    class Knows:
        device, dtype, text = torch.device("cpu"), torch.float32, "a red dog"

        def __call__(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            written = student.processor.tokenizer(self.text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            known = torch.cat([input_ids[:, : -written.shape[1]], written], dim=1)
            return SimpleNamespace(logits=10.0 * torch.nn.functional.one_hot(known.roll(-1, dims=1), 500))

        forward = __call__

    image = {"type": "image", "image": split[0]["image"]}
    question = [{"role": "user", "content": [image, {"type": "text", "text": "what is it?"}]}]
    right, wrong = (continuation_loss(Knows(), student.processor, question, f"a red {it}") for it in ("dog", "cat"))
    assert right[1]
    assert right[0] < 0.03 < wrong[0]
    assert not wrong[1]


def test_lmms_eval_finds_the_models_by_the_entry_point_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"lavender": f"{plugin.__name__}:{plugin.manifests.__name__}"}
    registry = ModelRegistryV2()
    for manifest in plugin.manifests():
        registry.register_manifest(manifest)
    assert registry.get_model_class("lavender") is models.ChatModel
    assert registry.get_model_class("lavender", force_simple=True) is models.RankingModel


# The table


def test_the_paper_has_28_benchmarks():
    assert {name: len(group) for name, group in GROUPS.items()} == {"paper": 20, "worldmedqa": 1, "openflamingo": 7}
    every = [one for group in GROUPS.values() for one in group]
    assert len({one.name for one in every}) == 28
    numbered = [one for one in every if one.paper]
    assert len(numbered) == 16  # the columns of Table 1
    assert all(len(one.paper or ()) == len(PAPER_MODELS) for one in numbered)
    for one in every:
        assert one.task or one.vlmevalkit
        assert bool(one.task) == bool(one.keys) == bool(one.scorer)
        assert not one.test or (ROOT / one.test).is_file()


TABLE_1 = """
AI2D | CCBench | DocVQA | InfoVQA | MMBench EN | MME | MMMU | MMStar | OCRBench | OCR-VQA | POPE | RealWorldQA |
SEED (images) | ScienceQA | TextVQA | HallusionBench
78.7 30.6 82.8 59.0 70.8 1692.9 48.0 48.3 754.0 67.7 86.3 61.4 72.9 83.6 80.8 36.3
77.8 39.8 86.0 61.0 73.6 1664.6 43.7 45.1 733.0 70.0 86.9 60.7 73.6 74.6 81.1 36.6
79.0 39.2 90.3 65.1 81.3 1871.5 46.3 48.7 764.0 71.5 88.1 62.1 74.1 84.7 88.1 41.3
76.7 37.6 89.8 64.3 77.5 1697.4 45.6 46.8 748.0 68.6 87.3 59.4 71.8 77.1 81.5 37.7
78.7 38.6 81.6 65.0 80.0 1695.9 49.1 49.8 686.0 70.1 87.6 62.2 73.1 84.3 84.9 39.5
"""


def test_the_numbers_are_the_papers():
    """Table 1 by rows, in the order of `PAPER_MODELS`, read from the paper again."""
    first, second, *rows = TABLE_1.strip().splitlines()
    names = [name.strip() for name in f"{first} {second}".split("|")]
    columns = zip(*([float(number) for number in row.split()] for row in rows), strict=True)
    numbers = dict(zip(names, columns, strict=True))
    assert {one.name: one.paper for one in GROUPS["paper"] if one.paper} == numbers


def test_the_page_has_the_table():
    for name, lines in (("benchmarks", benchmark_table()), ("notes", notes_of_benchmarks())):
        [shown] = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end of {name} -->", PAGE, re.S)
        assert shown.splitlines() == list(lines)


def test_our_tasks_of_the_table_are_found_without_lmms_evals_own():
    index = TaskIndex()
    ours = {path.stem for path in (TASKS_PATH / "paper").glob("*.yaml")}
    named = {one.task for group in GROUPS.values() for one in group}
    assert ours - named == {"worldmedqa_v_english"}
    for task in ours:
        assert index.leaves([task]) == [task]
        assert index.ranks(task) == (task == "hateful_memes")
        config = index.manager._get_config(task)
        assert config["task"] == task
    for group in GROUPS.values():
        for one in group:
            if one.task in ours:
                metrics = [metric["metric"] for metric in index.manager._get_config(one.task)["metric_list"]]
                assert metrics[: len(one.keys)] == list(one.keys)


def test_the_cause_is_told_and_not_the_number_of_attempts():
    cause = OSError("no such data set")
    assert cause_of(ValueError("x")).args == ("x",)
    with pytest.raises(RetryError) as raised:
        retry(stop=stop_after_attempt(2))(partial(_fail, cause))()
    assert cause_of(raised.value) is cause


def _fail(error: OSError) -> None:
    raise error


# Comparing and printing


def found(task: str, metrics: dict[str, float], logged: list[dict], keys: list[str]) -> dict[str, Any]:
    """What `simple_evaluate` returns, in the parts that are read."""
    config = {"metric_list": [{"metric": key} for key in keys], "test_split": "test"}
    results = {f"{key},none": value for key, value in metrics.items()} | {"alias": task, "acc_stderr,none": "N/A"}
    samples = [
        {"doc_id": index, "arguments": ["?", {}], "filtered_resps": ["yes"], "target": "no"} | one
        for index, one in enumerate(logged)
    ]
    return {"configs": {task: config}, "results": {task: results}, "samples": {task: samples}}


def test_a_sample_has_its_scores_as_numbers():
    logged = [{"acc": 1.0, "f1": ("no", "yes")}, {"acc": {"score": 0.0, "prediction": "x"}}]
    scored = Scored.of("some_task", found("some_task", {"acc": 0.5, "f1": 0.3}, logged, ["acc", "f1"]))
    assert (scored.keys, scored.scores, reported(scored)) == (("acc",), {0: 1.0, 1: 0.0}, 0.5)
    assert scored.samples[0] == {
        "doc_id": 0,
        "prompt": "?",
        "answer": "yes",
        "target": "no",
        "scores": {"acc": 1.0},
    }


def test_of_several_filters_the_last_counts():
    logged = [{"doc_id": doc, "acc": acc} for acc in (0.0, 1.0) for doc in range(3)]
    several = found("t", {}, logged, ["acc"])
    several["results"]["t"] = {"acc,strict": 0.0, "acc,flexible": 1.0}
    scored = Scored.of("t", several)
    assert (len(scored.samples), scored.scores, reported(scored)) == (3, {0: 1.0, 1: 1.0, 2: 1.0}, 1.0)


def test_refusals_are_counted_where_answers_are_texts():
    def answered(*answers: object, task: str = "t") -> Scored:
        samples = [{"doc_id": doc, "answer": answer} for doc, answer in enumerate(answers)]
        return Scored(task, "test", ("acc",), {}, samples, {doc: 1.0 - doc % 2 for doc in range(len(answers))})

    some = answered("yes", "no", "I'm not able to answer that.", "")  # with the scores 1, 0, 1, 0
    assert (refusal_rate(some), mean_if_answered(some)) == (1 / 4, pytest.approx(1 / 3))
    assert mean_if_answered(answered("I refuse.")) is None
    options = answered([[0.1, True], [2.0, False]])
    assert refusal_rate(options) is mean_if_answered(options) is None
    assert _summary("t", {"base": some})["mean_if_answered"] == {"base": pytest.approx(1 / 3)}
    for task in ("mmbench_cn_rules_dev", "ccbench_rules", "worldmedqa_v_local"):  # not in English
        chinese = answered("我无法回答", "B", task=task)
        assert refusal_rate(chinese) is mean_if_answered(chinese) is None


@pytest.mark.parametrize(
    ("task", "metric", "value", "on_the_papers_scale"),
    [("docvqa_val", "anls", 0.828, 82.8), ("ocrbench", "ocrbench_accuracy", 0.754, 754.0), ("other", "acc", 0.5, 0.5)],
)
def test_the_papers_benchmarks_are_on_the_papers_scale(task, metric, value, on_the_papers_scale):
    scored = Scored.of(task, found(task, {metric: value}, [{metric: value}], [metric]))
    assert reported(scored) == pytest.approx(on_the_papers_scale)


def test_mme_is_the_sum_of_its_two_numbers():
    logged = [{"mme_perception_score": {"score": 1.0}}, {"mme_cognition_score": {"score": 0.0}}]
    metrics = {"mme_perception_score": 1500.5, "mme_cognition_score": 300.0}
    scored = Scored.of("mme", found("mme", metrics, logged, list(metrics)))
    assert reported(scored) == 1800.5
    assert scored.scores == {0: 1.0, 1: 0.0}


def test_the_last_model_is_compared_on_the_same_samples():
    def arm(*scores: float | None) -> Scored:
        samples = [{"doc_id": doc, "answer": "a dog"} for doc in range(len(scores))]
        known = {doc: score for doc, score in enumerate(scores) if score is not None}
        return Scored("t", "test", ("acc",), {"acc": 0.0}, samples, known)

    result = differences({"base": arm(0, 0, 1, 0), "plain": arm(1, 0, 1, 0), "aligned": arm(1, 1, 1, 0)})
    assert [(name, one["difference"], one["num_units"]) for name, one in result.items()] == [
        ("base", 0.5, 4),
        ("plain", 0.25, 4),
    ]
    low, high = result["base"]["low"], result["base"]["high"]
    assert low is not None
    assert high is not None
    assert 0 <= low <= 0.5 <= high <= 1
    assert differences({"one": arm(), "other": arm()}) == {}
    [alone] = differences({"one": arm(0), "other": arm(1)}).values()
    assert json.loads(json.dumps(alone, allow_nan=False)) == {
        "difference": 1.0,
        "low": None,
        "high": None,
        "num_units": 1,
    }
    with pytest.raises(DataError, match="2 and 1 samples of t, not the same ones"):
        differences({"one": arm(1), "other": arm(1, 1)})
    without = {"base": arm(0, 0), "plain": arm(1, None), "aligned": arm(1, 1)}
    assert list(differences(without)) == ["base"]
    (note,) = _notes_of_scores({"t": without})
    assert note == "no difference of t between models that have scores of other samples"


def test_samples_of_one_picture_are_drawn_together():
    """Two pictures with three questions each: the difference is 1 on one of them and 0 on the other."""
    pictures = {0: "a", 1: "a", 2: "a", 3: "b", 4: "b", 5: "b"}

    def arm(*scores: float) -> Scored:
        return Scored("t", "test", ("acc",), {"acc": 0.0}, [], dict(enumerate(scores)), pictures)

    [result] = differences({"base": arm(0, 0, 0, 0, 0, 0), "aligned": arm(1, 1, 1, 0, 0, 0)}).values()
    assert result == {"difference": 0.5, "low": 0.0, "high": 1.0, "num_units": 2}  # a draw has either picture twice


@pytest.mark.parametrize(
    ("task", "metrics", "scores", "named"),
    [
        ("pope", {"pope_f1_score": 2 / 3}, (1.0, 1.0, 0.0, 0.0), "share of right answers"),  # F1 of 1 hit, 1 miss
        ("docvqa_val", {"anls": 0.6667}, (1.0, 0.75, 0.25), None),  # lmms-eval rounds some means
        ("ocrbench", {"ocrbench_accuracy": 0.002}, (1.0, 1.0, 0.0), "share of right answers"),  # 2 of 1000
        ("t", {"acc": 0.9}, (0.5, 1.0), "mean score per sample"),
        ("t", {"acc": None}, (0.5, 1.0), None),
    ],
)
def test_a_difference_of_another_number_than_the_reported_one_is_named(task, metrics, scores, named):
    arm = Scored(task, "test", tuple(metrics), metrics, [], dict(enumerate(scores)))
    assert difference_of({"base": arm, "aligned": arm}) == named
    assert _summary(task, {"base": arm, "aligned": arm})["difference_of"] == named


def test_a_benchmark_without_scores_per_sample_is_scored_one_by_one():
    logged = [{"seed_image": {"pred": pred, "answer": "A"}} for pred in ("A", "B", "A")] + [{"seed_video": {}}]

    def accuracy(values: list[dict[str, str]]) -> float:
        return sum(value["pred"] == value["answer"] for value in values) / len(values)

    task = found("seedbench_images", {"seed_image": 2 / 3}, logged, ["seed_image"])
    assert Scored.of("seedbench_images", task, {"seed_image": accuracy}).scores == {0: 1.0, 1: 0.0, 2: 1.0}
    assert [one.name for one in GROUPS["paper"] if one.scored_alone] == ["MMMU", "SEED (images)"]


def test_what_a_number_lacks_is_told():
    logged = [{"mme_perception_score": {"score": 1.0}}]
    part = Scored.of("mme", found("mme", {"mme_perception_score": 200.0}, logged, ["mme_perception_score"]))
    ranked = Scored("hateful_memes", "validation", ("auroc",), {"auroc": 0.5}, [], {})
    notes = _notes_of_scores({"mme": {"base": part}, "hateful_memes": {"base": ranked, "aligned": ranked}})
    assert notes == [
        "mme is without mme_cognition_score: no sample is of this kind",
        "no difference of hateful_memes: auroc gives samples no scores",
    ]


def test_a_score_that_is_nan_is_null_and_the_reason_is_told():
    nan = float("nan")

    def arm(aggregate: float, *scores: float) -> Scored:
        logged = [{"acc": score, "target": {"age": nan, "name": "Ann"}} for score in scores]
        return Scored.of("t", found("t", {"acc": aggregate}, logged, ["acc"]))

    by_arm = {"base": arm(0.5, 1.0, 0.0, 0.0), "plain": arm(nan, 1.0, nan, 0.0), "aligned": arm(float("inf"), 1, 1, 0)}
    task = _summary("t", by_arm)
    assert task["scores"] == {"base": 0.5, "plain": None, "aligned": None}
    assert task["metrics"] == {"base": {"acc": 0.5}, "plain": {"acc": None}, "aligned": {"acc": None}}
    assert json.loads(json.dumps(task, allow_nan=False)) == task
    samples = [json.loads(line, parse_constant=pytest.fail) for line in sample_lines(by_arm["plain"])]
    assert [sample["scores"]["acc"] for sample in samples] == [1.0, None, 0.0]
    assert samples[0]["target"] == {"age": None, "name": "Ann"}
    assert _notes_of_scores({"t": by_arm}) == [
        "no score for plain on t: lmms-eval's acc is NaN or infinite, as it is for 1 of 3 samples",
        "no score for aligned on t: lmms-eval's acc is NaN or infinite",
        "no difference of t with plain: some samples score NaN",
    ]
    assert [(other, one["difference"]) for other, one in task["differences"].items()] == [
        ("base", pytest.approx(1 / 3))
    ]
    lines = list(result_lines({"arms": by_arm, "tasks": {"t": task}}))
    assert lines[1].split() == ["t", "3", "0.5000", "NaN", "NaN"]


def printed(arms: list[str]) -> list[str]:
    numbers = {"difference": 0.1, "low": None, "high": None, "num_units": 1}
    task: dict[str, Any] = {"metric": "accuracy", "split": "test", "samples": 1, "scorer": "", "paper": None}
    task |= {"scores": dict.fromkeys(arms, 0.5), "differences": dict.fromkeys(arms[:-1], numbers)}
    task["difference_of"] = None
    return list(result_lines({"arms": dict.fromkeys(arms), "tasks": {"world_pope_adversarial_sealed": task}}))


def test_models_with_long_names_are_told_apart():
    lines = printed(["base", "llama-3.2-11b-plain-lora-seed-0", "llama-3.2-11b-lavender-lora-seed-0"])
    assert lines[:3] == ["[1] base", "[2] llama-3.2-11b-plain-lora-seed-0", "[3] llama-3.2-11b-lavender-lora-seed-0"]
    assert lines[3].split() == ["task", "samples", "[1]", "[2]", "[3]"]
    assert [line.split("  ")[1] for line in lines if "−" in line] == ["[3] − [1]", "[3] − [2]"]
    assert any(line.startswith("world_pope_adversarial_sealed  accuracy; test") for line in lines)
    assert printed(["base", "plain", "aligned"])[0].split() == ["task", "samples", "base", "plain", "aligned"]


def test_each_model_has_a_name_and_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("a/run=1", "b/run=1", "c/run_1"):
        (tmp_path / folder).mkdir(parents=True)
    options = argparse.Namespace(run=None, model=["~/a/run=1", "~/b/run=1", "~/c/run_1", "org/run_1"], against=[])
    arms = eval_tasks._arms(options)
    assert len({file_name(arm) for arm in arms}) == 4
    assert list(arms)[:2] == ["run=1", "run=1 (2)"]
    assert list(arms.values()) == [*(tmp_path / one for one in ("a/run=1", "b/run=1", "c/run_1")), "org/run_1"]


@pytest.mark.parametrize(
    ("cause", "limit", "batch_size", "do"),
    [
        (ValueError("bad row"), None, 1, "leave the task out; x.log"),
        (AssertionError("MME only supports pairs"), 3, 1, "leave the task out, or --limit if it needs all"),
        (torch.OutOfMemoryError("CUDA out of memory"), 3, 2, "lower --batch-size; x.log"),
        (torch.OutOfMemoryError("CUDA out of memory"), 3, 1, "use --dtype bfloat16, or a device with more memory"),
        (NoConnection("no route"), None, 1, "run the same command again; if that does not help, leave"),
        (LocalEntryNotFoundError("no file"), None, 1, "run the same command again; if that does not help, leave"),
    ],
)
def test_the_advice_for_a_task_that_fails_fits_its_cause(cause, limit, batch_size, do):
    error = running.failure("mme", cause, Path("x.log"), limit, batch_size)
    assert error.got.startswith("the task mme, which fails: ")
    assert str(cause) in error.got
    assert error.do.startswith(do)


def test_a_run_comes_after_its_base_and_the_others(tmp_path):
    run, other = tmp_path / "aligned", tmp_path / "plain"
    run.mkdir()
    other.mkdir()
    (run / "config.yaml").write_text("model: org/base\ndata: data\nmaps: maps\n")
    options = argparse.Namespace(run=run, model=[], against=[other])
    assert list(eval_tasks._arms(options).items()) == [("base", "org/base"), ("plain", other), ("aligned", run)]


def test_models_that_are_compared_have_weights_of_one_type(make_student, processor, tmp_path):
    arms: dict[str, str | Path] = {name: tmp_path / name for name in ("base", "plain", "aligned")}
    for path, dtype in zip(arms.values(), (torch.bfloat16, torch.bfloat16, torch.float32), strict=True):
        make_student().to(dtype).save_pretrained(path)
        processor.save_pretrained(path)
    place, notes = Placement(dtype="auto").one_dtype(arms)
    loaded = [models.load_student(path, torch.device("cpu"), place.dtype, False).model for path in arms.values()]
    assert {model.dtype for model in loaded} == {torch.float32}
    assert notes == [
        "all models are loaded in float32, for their types on disk differ: base bfloat16, plain bfloat16, "
        "aligned float32; --dtype names another"
    ]

    def dtype_of(*names: str, asked: str = "auto") -> tuple[str, int]:
        place, notes = Placement(dtype=asked).one_dtype({name: arms[name] for name in names})
        return place.dtype, len(notes)

    assert dtype_of("base", "plain") == ("bfloat16", 0)
    assert dtype_of("aligned") == ("float32", 0)
    assert dtype_of("base", "aligned", asked="bfloat16") == ("bfloat16", 0)
    config = tmp_path / "plain" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "bfloat16"', '"dtype": null'))
    assert dtype_of("plain") == ("auto", 0)
    assert dtype_of("base", "plain") == ("float32", 1)


def test_an_adapter_is_another_checkpoint_on_another_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    digests = set()
    for content in ("one", "other"):
        (base / "model.safetensors").write_text(content)
        digests |= {running.checkpoint_digest(adapter), running.checkpoint_digest(adapter)}
    assert len(digests) == 2


def test_a_missing_package_of_the_extra_is_told(monkeypatch):
    monkeypatch.setattr(task_index, "_IMPORTED", ("loguru", "no_such_package"))
    with pytest.raises(ConfigError, match=r"no package no_such_package.*the extra `eval`"):
        task_index.require_harness()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("generate_until_multi_round", {}, "the task t, of the output type generate_until_multi_round"),
        ("generate_until", {"max_steps": 3}, "the task t: generation_kwargs with 'max_steps'"),
        ("generate_until", {"temperature": 0, "until": ["x"]}, None),
        ("multiple_choice", None, None),
        ("generate_until", {"metric": "submission"}, "the task t, whose answers a server scores"),
        ("generate_until", {"metric": None}, "the task t without metric_list"),
    ],
)
def test_a_task_that_is_not_supported_is_told_before_any_is_run(kind, settings, message):
    metric = (settings or {}).pop("metric", "acc")
    metrics = None if metric is None else [{"metric": metric}]
    task = SimpleNamespace(OUTPUT_TYPE=kind, config=SimpleNamespace(generation_kwargs=settings, metric_list=metrics))
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        models.check_task("t", task)


def test_the_first_metric_that_is_a_score_is_reported():
    listed = [{"metric": "submission"}, {"metric": "exact_match", "aggregation": "mean"}, {"metric": "other"}]
    assert scores_in(listed) == ["exact_match", "other"]
    config = SimpleNamespace(generation_kwargs={}, metric_list=listed)
    models.check_task("olympiadbench_math_en", SimpleNamespace(OUTPUT_TYPE="generate_until", config=config))


def test_an_error_of_our_own_keeps_its_advice(tmp_path, monkeypatch):
    monkeypatch.setenv("LAVENDER_CUTOUTS", str(tmp_path / "none"))
    with pytest.raises(LavenderError, match=r"Got the task world_ood_cutouts: .*tuxpaint") as raised:
        TaskIndex().build("world_ood_cutouts")
    assert "hf auth login" not in str(raised.value)


def test_tags_and_groups_are_their_tasks_each_once(tmp_path):
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\ntag: both\noutput_type: generate_until\n")
    (tmp_path / "group.yaml").write_text("group: outer\ntask:\n  - both\n  - worldmedqa_v_local\n")
    index = TaskIndex([tmp_path])
    assert sorted(index.leaves(["both"])) == ["first", "second"]
    assert sorted(index.leaves(["outer", "second", "worldmedqa"])) == ["first", "second", "worldmedqa_v_local"]


def test_folders_of_tasks_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(DataError, match=r"no YAML: .*broken\.yaml.*repair the file"):
        TaskIndex([tmp_path])
    with pytest.raises(ConfigError, match=r"broken\.yaml, which is no folder"):
        TaskIndex([tmp_path / "broken.yaml"])


def test_a_group_without_tasks_is_an_error(tmp_path):
    (tmp_path / "empty.yaml").write_text("group: nothing_in_it\ntask: []\n")
    with pytest.raises(ConfigError, match="nothing_in_it, which has no task"):
        TaskIndex([tmp_path]).leaves(["nothing_in_it"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", None, "no chat template"),
        ("config.json", None, "without config.json"),
        ("adapter_config.json", "{", "adapter_config.json"),
        ("config.yaml", "model: m", "it is not finished"),
    ],
)
def test_a_model_that_cannot_answer_is_told_before_any_is_run(name, content, message, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    if name == "config.yaml":
        broken.mkdir()
    else:
        shutil.copytree(STUDENT_PATH, broken)
        (broken / name).unlink(missing_ok=True)
    if content is not None:
        (broken / name).write_text(content)
    monkeypatch.setattr(running, "TaskIndex", lambda _: SimpleNamespace(leaves=list, build=lambda _: None))
    monkeypatch.setattr(running, "_run_arm", lambda *_: pytest.fail("a model was run"))
    arms = {"base": STUDENT_PATH, "broken": broken}
    with pytest.raises(LavenderError, match=message):
        running.evaluate_tasks(arms, ["t"], tmp_path / "out", tmp_path / "result.json", running.Settings())


def test_what_is_printed_fits_80_columns():
    numbers = {"difference": 0.123, "low": -0.01, "high": 0.25, "num_units": 50}
    arms = ["base", "plain", "a-run-with-a-very-long-name", "another-run-with-a-long-name", "aligned"]
    task: dict[str, Any] = {
        "metric": "ANLS",
        "split": "validation",
        "samples": 5349,
        "scorer": "x",
        "scores": dict.fromkeys(arms, 1692.91),
    }
    task |= {"differences": dict.fromkeys(arms[:-1], numbers), "paper": dict.fromkeys(PAPER_MODELS, 82.8)}
    task["difference_of"] = "share of right answers"
    local = task | {"scorer": "", "scores": dict.fromkeys(arms, 0.8), "paper": None, "differences": {}}
    lines = list(result_lines({"arms": dict.fromkeys(arms), "tasks": {"docvqa_val": task, "a_local_one": local}}))
    assert max(map(len, lines)) <= 80
    assert lines[5].split() == ["task", "samples", "[1]", "[2]", "[3]", "[4]"]
    assert "docvqa_val                 5349      1692.9" in lines[6]
    assert "docvqa_val               ANLS; validation" in lines
    assert [line for line in lines if line.startswith("a_local_one") and "0.8000" in line]
    assert "docvqa_val               [5] − [1]                   +12.3 (-1.0 to +25.0)" in lines
    assert lines[lines.index("") + 1 :].count("                         (share of right answers)") == 1
    assert any(line.split() == ["docvqa_val", *["82.8"] * 5] for line in lines)


def test_vlmevalkits_settings_have_what_lmms_eval_lacks():
    settings = json.loads(vlmevalkit_settings(["paper"], {"base": "meta/x", "aligned": "out"}, "mllama"))
    assert settings["model"]["base"] == {"class": "llama_vision", "model_path": "meta/x"}
    assert settings["data"]["MMBench_DEV_EN_V11"] == {"class": "ImageMCQDataset", "dataset": "MMBench_DEV_EN_V11"}
    assert len(settings["data"]) == 20
    for tasks in (["pope"], ["paper", "pope"]):
        with pytest.raises(ConfigError, match=r"--print-vlmevalkit with --tasks pope.*such as paper"):
            vlmevalkit_settings(tasks, {"base": "x"}, "mllama")


def test_vlmevalkit_gets_paths_that_hold_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STUDENT_PATH, tmp_path / "stu")
    ran = lavender("eval", "--model", "stu", "--tasks", "paper", "--print-vlmevalkit")
    assert json.loads(ran.out)["model"]["stu"]["model_path"] == str(tmp_path / "stu")


@pytest.mark.parametrize("family", ["minicpmv", "internvl"])
def test_vlmevalkit_gets_no_class_where_the_model_type_does_not_decide_it(family):
    settings = json.loads(vlmevalkit_settings(["paper"], {"base": "org/x"}, family))
    assert settings["model"]["base"]["class"] == "NAME_OF_THE_CLASS_IN_vlmeval.vlm"


def test_vlmevalkit_gets_no_run_folder(tmp_path):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    ran = lavender("eval", "--model", tmp_path / "run", "--tasks", "paper", "--print-vlmevalkit")
    assert "lavender export" in complaint(ran, WRONG_USAGE)
    ran = lavender("eval", "--model", STUDENT_PATH, "--tasks", "paper", "--print-vlmevalkit")
    assert ran.code == DONE
    assert json.loads(ran.out)["model"] == {
        STUDENT_PATH.name: {"class": "llama_vision", "model_path": str(STUDENT_PATH)}
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no run folder"),
        (("--model", "m"), "--model without --tasks"),
        (("run", "--batch-size", "0"), "--batch-size 0"),
        (("run", "--include-path", "tasks"), "--include-path without --tasks"),
        (("run", "--print-vlmevalkit"), "--print-vlmevalkit without --tasks"),
        (("--tasks", "pope"), "--tasks without a model"),
        (("run", "--model", "m", "--tasks", "pope"), "--tasks with a run folder and --model"),
        (("run", "--tasks", ","), "--tasks ','"),
        (("run", "--tasks", "pope", "--maps", "maps"), "--maps with --tasks"),
        (("--model", "m", "--tasks", "pope", "--limit", "0"), "--limit 0"),
        (("--model", "m", "--tasks", "pope", "--batch-size", "0"), "--batch-size 0"),
        (("--model", "m", "--tasks", "pope", "--device", "foo"), "--device 'foo', which PyTorch cannot use here"),
    ],
)
def test_options_that_do_not_fit(arguments, words):
    assert words in complaint(lavender("eval", *arguments), WRONG_USAGE)
