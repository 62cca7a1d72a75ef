"""What `eval` and `report` say of the settings of runs: what was recorded, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lavender.errors import DataError
from lavender.evaluation.eval_files import read_evaluation
from lavender.evaluation.run_report import report_run
from lavender.evaluation.runs import differing_settings
from lavender.training.run_folder import read_config


def folder(path: Path, **settings: Any) -> Path:
    path.mkdir()
    ours = {"model": "m", "data": "d", "maps": "s", "out": str(path), "prompt": "What?"}
    (path / "config.yaml").write_text(yaml.safe_dump(ours | settings))
    return path


def test_every_differing_setting_is_named(tmp_path):
    record = {"versions": {"torch": "2.7"}, "content": {"data": "1"}}
    one = folder(tmp_path / "one", training={"align_weight": 0.0, "seed": 1, "match": "label"}, record=record)
    other = folder(
        tmp_path / "other",
        training={"align_weight": 5.0, "seed": 1, "match": "label"},
        dtype="float32",
        record={"versions": {"torch": "2.8"}, "content": {"data": "2"}},
    )
    differing, notes = differing_settings({"base": "m", "one": one, "other": other})
    assert differing == {
        "align_weight": {"one": 0.0, "other": 5.0},
        "versions.torch": {"one": "2.7", "other": "2.8"},
        "content.data": {"one": "1", "other": "2"},
    }
    assert "the runs differ in align_weight: one 0.0, other 5.0" in notes
    assert "one did not record 1 of its settings, such as dtype" in notes


def test_what_a_run_did_not_record_is_not_filled_in(tmp_path):
    """An old run had λ = 10 by default; today's 2 must not be said of it."""
    old = folder(tmp_path / "old", training={"learning_rate": 1.0})
    new = folder(tmp_path / "new", training={"align_weight": 2.0, "learning_rate": 1.0, "adam_beta1": 0.9})
    differing, notes = differing_settings({"old": old, "new": new, "plain": tmp_path})
    assert differing == {"align_weight": {"old": "not recorded", "new": 2.0}}
    assert "old did not record 2 of its settings, such as adam_beta1, align_weight" in notes
    assert f"no settings are recorded in {tmp_path}" in notes


def test_a_run_from_before_a_setting_has_its_default(tmp_path):
    """The old run records all settings that there were: without columns, rows, sharpen and word_share."""
    record = {"content": {"data": "1"}}
    shared = {"attention_loss": "published", "align_weight": 2.0}
    old = folder(tmp_path / "old", training=shared, record=record)
    new = folder(
        tmp_path / "new",
        training=shared | {"rows": "predict", "sharpen": 1.0, "word_share": 0.5, "adam_beta1": 0.9},
        columns=None,
        record=record,
    )
    differing, notes = differing_settings({"old": old, "new": new})
    assert differing == {"word_share": {"old": "1.0 (default, not recorded)", "new": 0.5}}  # sharpen of this loss is 1
    assert notes == [
        "old is from before columns, rows, sharpen, word_share; the default counts",
        "old did not record 1 of its settings, such as adam_beta1",
        "the runs differ in word_share: old 1.0 (default, not recorded), new 0.5",
    ]


@pytest.mark.parametrize("text", ["a: [", "- 1", "model: m", "model: m\x00", "{}"])
def test_a_damaged_config(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=r"config\.yaml"):
        read_config(tmp_path)


def test_damaged_scores(tmp_path):
    run = folder(tmp_path / "run")
    for text in ("{", "[]", '{"data": 1}'):
        (run / "eval.json").write_text(text)
        with pytest.raises(DataError, match="eval.json, which is damaged"):
            report_run(run)
    whole = {"data": "d", "maps": None, "against": [], "samples": 1, "arms": {}, "notes": []}
    whole["arms"] = {"base": {"content_f1": 0.0}, "run": {"content_f1": 0.0}}
    (run / "eval.json").write_text(json.dumps(whole))
    judged = {"answer": "a", "tallies": {"content_f1": [0.0, 1]}}
    line = {"sample": "s", "picture": "p", "reference": "r", "models": {"base": judged, "run": judged}}
    (run / "eval.jsonl").write_text(json.dumps(line))
    found = read_evaluation(run)
    assert found is not None
    assert found.samples is not None
    assert found.samples[0].judged["run"].tallies == {"content_f1": (0.0, 1.0)}
    one_model = json.dumps(line | {"models": {"run": judged}})
    for text in ("{", "[]", '{"sample": 1}', one_model, f"{json.dumps(line)}\n{json.dumps(line)}"):
        (run / "eval.jsonl").write_text(text)
        with pytest.raises(DataError, match="eval.jsonl, which is damaged"):
            report_run(run)
