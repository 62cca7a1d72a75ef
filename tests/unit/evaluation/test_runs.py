"""What `eval` counts per sample, and what the tables of a report say, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lavender.evaluation
from lavender.data.samples import Samples
from lavender.errors import ConfigError, DataError
from lavender.evaluation import runs
from lavender.evaluation.chosen import choose, rule
from lavender.evaluation.compare import Judged, _agreement, entropy_tally, scores_of
from lavender.evaluation.eval_files import EvaluatedSample
from lavender.evaluation.run_tables import MAX_POINTS, curves_of, differences_of, tables_of
from lavender.evaluation.score_help import SCORES, explained, judged
from lavender.maps import WordMaps
from lavender.words import content_words


def test_evaluation_knows_no_teacher_by_name():
    for file in Path(lavender.evaluation.__path__[0]).rglob("*.py"):
        assert '"world"' not in file.read_text(), file


def test_agreement_is_a_mean_over_common_words():
    text = "a dog and a cat on the grass"
    words = content_words(text, ("noun",))
    maps = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    student = WordMaps("1", text, words, maps)
    teacher = torch.stack([2 * maps[0] + 1, -maps[1], torch.ones(5, 7)])  # r of 1 and -1; a flat map has none
    total, weight = _agreement(student, WordMaps("1", text, words, teacher))
    assert total == pytest.approx(0, abs=1e-6)
    assert weight == 2
    assert _agreement(student, WordMaps("1", text, words[:1], teacher[:1])) == (pytest.approx(1), 1)
    assert _agreement(student, None) == (0, 0)


def test_entropies_are_summed_over_words():
    """ln 4 of a uniform map of four cells, 0 of a single cell."""
    word = content_words("a dog", ("noun",))
    maps = WordMaps("1", "a dog", word, torch.ones(1, 2, 2))
    assert entropy_tally(maps) == (pytest.approx(1.3863, abs=1e-4), 1)
    assert entropy_tally(WordMaps("1", "a dog", word, torch.eye(4)[None, :1] * 3)) == (0, 1)
    assert entropy_tally(WordMaps("1", "a dog", (), torch.zeros(0, 2, 2))) == (0, 0)


def of(name: str, total: float, weight: float, picture: str = "") -> EvaluatedSample:
    """A sample on which `other` has a score of 1, and `run` of total / weight."""
    models = {"base": (0.0, 1.0), "other": (weight, weight), "run": (total, weight)}
    judged = {arm: Judged("", {"answer_nll": tally, "content_f1": tally}) for arm, tally in models.items()}
    return EvaluatedSample(name, picture or name, "r", judged)


def test_scores_are_ratios_of_sums_and_nothing_counted_is_said():
    found = scores_of([Judged("", {"answer_nll": (6.0, 2), "content_f1": (0.0, 0), "map_agreement": (0.0, 0)})] * 2)
    assert found == {"answer_nll": 3, "content_f1": None, "map_agreement": None}


def test_how_many_samples_a_score_leaves_out_is_told():
    tallies: list[dict[str, tuple[float, float]]] = [
        {"answer_nll": (2.0, 2), "content_f1": (0.0, 0)},
        {"answer_nll": (0.0, 0), "content_f1": (2.0, 3)},
    ]
    judged = {"base": [Judged("no", one) for one in (*tallies, tallies[0])]}
    assert runs._notes(Samples(()), Samples(()), judged, False) == [
        "base: answer_nll leaves out 1 of 3 samples, those with an empty answer, or one that no tokenizer takes",
        "base: content_f1 leaves out 2 of 3 samples, those where neither answer nor reference has a content word, such "
        "as “yes” and “3”",
    ]


def test_best_typical_and_worst_are_by_the_difference():
    """Loss falls, so the sample with the lowest one gains most; the one without a token is not chosen."""
    losses = {"a": 3.0, "b": -4.0, "c": 1.0, "d": 0.0, "e": 9.0, "f": 2.0, "g": 1.5}
    samples = [of(name, 2 * loss, 2) for name, loss in losses.items()] + [of("empty", 0, 0)]
    chosen, choice = choose(samples, "run", "other", "answer_nll", 3)
    assert [(samples[one.index].sample, one.group) for one in chosen] == [
        ("b", "best"),
        ("g", "typical"),
        ("e", "worst"),
    ]
    assert [one.gain for one in chosen] == [5, -0.5, -8]  # of 1 − loss
    assert chosen[0].values == (-4, 1)
    assert choice == 7
    by_f1, _ = choose(samples, "run", "other", "content_f1", 3)
    assert [samples[one.index].sample for one in by_f1] == ["e", "g", "b"]
    everything, _ = choose(samples, "run", "other", "answer_nll", 100)
    assert [samples[one.index].sample for one in everything] == ["b", "d", "c", "g", "f", "a", "e"]
    assert [one.group for one in everything] == ["best"] * 3 + ["typical"] * 2 + ["worst"] * 2
    for number in range(1, 9):
        some, _ = choose(samples, "run", "other", "answer_nll", number)
        assert len({one.index for one in some}) == len(some) == min(number, 7)
    assert choose([], "run", "other", "answer_nll", 3) == ([], 0)
    said = rule("run", "other", "answer_nll", 3, 7, 8)
    assert "3 of 8 samples" in said
    assert "1 have no answer_nll" in said
    with pytest.raises(ConfigError, match="Got --by entropy. Expected one of answer_nll, content_f1, map_agreement"):
        choose(samples, "run", "other", "entropy", 3)
    with pytest.raises(ConfigError, match="Got --pictures 0"):
        choose(samples, "run", "other", "answer_nll", 0)


def test_differences_come_first_with_intervals_and_directions():
    samples = [of(f"{index}", 0.5 + 0.01 * (index % 3), 1) for index in range(9)]
    arms = {"base": "b", "other": "o", "run": "r"}
    found = differences_of(samples, arms)
    assert [(one.first, one.second) for one in found[::2]] == [("run", "other"), ("run", "base"), ("other", "base")]
    scored = {
        "samples": 9,
        "data": "d",
        "arms": {arm: scores_of([sample.judged[arm] for sample in samples]) for arm in arms},
        "teacher": {"entropy": 2.0},
    }
    differences, scores = tables_of(scored, samples, found, {})
    assert differences.caption.startswith("Differences, on 9 samples")
    assert differences.columns == ["score", "run − other", "run − base", "other − base"]
    (loss, against_other, against_base, _), (f1, *_, other_f1) = differences.rows
    assert (loss, f1) == ("answer_nll ↓", "content_f1 ↑")
    # each resampled mean lies between 0.50 and 0.52, so the difference between −0.50 and −0.48
    assert str(against_other).startswith("−0.490 (−0.4")
    assert str(against_other).endswith(", better")
    assert str(against_base).endswith(", worse")
    assert str(other_f1) == "+1.000 (+1.000 to +1.000), better"
    assert differences.note.endswith("With fewer than 20 pictures an interval is too narrow: score more.")
    assert scores.rows[-1] == ["the teacher’s maps", None, None]
    assert "lower is better" in scores.note
    same = [of(f"{index}", 1 + 0.1 * (-1) ** index, 1) for index in range(8)]
    text = str(tables_of(scored, same, differences_of(same, arms), {})[0].rows[0][1])
    assert text.startswith("0.000 (−")
    assert text.endswith(")")  # the interval has 0 in it: neither better nor worse
    one = [of("a", 0.5, 1)]
    assert "one picture: no interval" in str(tables_of(scored, one, differences_of(one, arms), {})[0].rows[0][1])


def test_samples_of_one_picture_are_one_unit():
    samples = [of(f"{index}", 0.1 * index, 1, picture=f"{index % 3}") for index in range(9)]
    (first, *_) = differences_of(samples, {"base": "b", "run": "r"})
    assert first.interval is not None
    assert first.interval.num_units == 3


def test_every_score_is_explained_with_its_direction():
    lines = explained(SCORES)
    assert [line.partition(" (")[0] for line in lines[:-1]] == list(SCORES)
    assert lines[0].startswith("answer_nll (lower is better): ")
    assert lines[1].startswith("content_f1 (higher is better): ")
    assert lines[2].startswith("entropy (neither direction is better): ")
    assert "whatever `match`" in lines[-1]
    assert explained(["num_samples"]) == []
    assert [judged("answer_nll", sign) for sign in (1, -1)] == ["worse", "better"]
    assert [judged("map_agreement", sign) for sign in (1, -1)] == ["better", "worse"]
    assert [judged("entropy", sign) for sign in (1, -1)] == ["higher", "lower"]


def write_log(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_curves_of_all_runs_are_drawn_together(tmp_path):
    plain = write_log(tmp_path / "plain", [{"step": step, "vlm_loss": 2.0 - step} for step in range(3)])
    rows = [{"step": step, "vlm_loss": 1.0, "attention_loss": float(step)} for step in range(2 * MAX_POINTS)]
    run = write_log(tmp_path / "run", rows)
    (tmp_path / "gone").mkdir()
    curves, notes = curves_of({"base": "a model", "plain": plain, "gone": tmp_path / "gone", "run": run})
    assert [list(curve.series) for curve in curves] == [["plain", "run"], ["run"]]
    assert curves[0].series["plain"] == [(0, 2), (1, 1), (2, 0)]
    long = curves[1].series["run"]
    assert len(long) == MAX_POINTS
    assert long[0] == (0.5, 0.5)  # of steps 0 and 1
    assert notes == [
        "gone: no curves, for there is no metrics.jsonl",
        f"run: {2 * MAX_POINTS} logged steps; each point of its curves is the mean over 2",
    ]


@pytest.mark.parametrize("text", ["{", "[1]", '{"vlm_loss": 1}', '{"step": 1, "vlm_loss": "x"}'])
def test_a_damaged_log(text, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match="metrics.jsonl with a damaged line"):
        curves_of({"base": "b", "run": tmp_path})
