"""The study of new words: its arms, and how many captions plain fine-tuning needs for the same score."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest

from lavender.config import AlignmentConfig
from lavender.world.studies import cells
from lavender.world.studies.cells import Cell, data_path, prepare
from lavender.world.studies.new_words import arms, efficiency, equal_plain_size
from lavender.world.studies.registry import Scale
from lavender.world.studies.study import METRICS
from lavender.world.studies.tasks import TASKS

PLAIN = {25: 0.25, 100: 0.5, 400: 0.75, 800: 0.75}


@pytest.mark.parametrize(
    ("score", "size"),
    [
        (0.25, 25),
        (0.375, 50),  # half of the way from 25 to 100 in the logarithm
        (0.5, 100),
        (0.5625, 141.42),  # a quarter of the way from 100 to 400: 100 · √2
        (0.75, 400),
        (0.249, None),
        (0.751, None),
    ],
)
def test_the_size_of_plain_fine_tuning_with_the_same_score(score, size):
    expected = None if size is None else pytest.approx(size, rel=1e-4)
    assert equal_plain_size(PLAIN, score) == expected
    assert equal_plain_size(dict(reversed(PLAIN.items())), score) == expected


def test_where_more_captions_score_lower_the_first_rise_counts():
    plain = {25: 0.25, 50: 0.125, 100: 0.375, 200: 0.25, 400: 0.5}
    assert equal_plain_size(plain, 0.25) == pytest.approx(70.71, rel=1e-4)  # 50 · √2
    assert equal_plain_size({25: 0.5}, 0.5) is None


def test_efficiency_by_hand():
    scores = {
        "base": {"new_names": [0.0, 0.0]},
        "plain 25": {"new_names": [0.125, 0.375]},
        "plain 100": {"new_names": [0.5, 0.5]},
        "recipe 25": {"new_names": [0.25, 0.5]},
        "recipe 100": {"new_names": [0.5, 0.75]},
        "recipe, masks 100": {"new_names": [1.0, 1.0]},
    }
    name = METRICS["new_names"]
    assert efficiency(scores) == [
        f"25 captions with the recipe: {name} 0.375; plain fine-tuning needs about 50",
        f"100 captions with the recipe: {name} 0.625; plain fine-tuning has this mean at no size of this study",
    ]


def test_the_arm_of_the_defaults_has_the_settings_of_a_user_who_sets_nothing():
    training = arms(quick=False)["defaults 100"].training(seed=1)
    assert training.keys() >= {"attention_loss", "align_weight", "sharpen", "match"}
    settings = {field.name: training[field.name] for field in fields(AlignmentConfig) if field.name in training}
    assert asdict(AlignmentConfig(**settings)) == asdict(AlignmentConfig())


def test_maps_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    """Nor are the scenes drawn."""
    cell = Cell(arms(quick=True)["recipe 100"], 3, Scale.of(True, None, None).scoring)
    drawn = []
    task = replace(TASKS["new-words"], examples=lambda *which: drawn.append(which) or [], num_replayed=0)
    monkeypatch.setitem(TASKS, "new-words", task)
    monkeypatch.setattr(cells, "write_samples", lambda data, examples, replayed: None)
    monkeypatch.setattr(cells, "write_target", lambda *which: None)
    monkeypatch.setattr(cells.MapStore, "open", lambda path: None)
    data = data_path(tmp_path, cell)
    (data / "maps").mkdir(parents=True)
    (data / "teacher").mkdir()
    prepare(tmp_path, cell)
    assert drawn == [(60_000, 100)]  # the extraction had not ended
    (data / "maps" / "extraction.json").touch()
    prepare(tmp_path, cell)
    assert len(drawn) == 1
    (data / "teacher").rmdir()
    prepare(tmp_path, cell)
    assert len(drawn) == 2
