"""The study of new words: its arms and data."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

from lavender.config import AlignmentConfig
from lavender.world.studies import cells
from lavender.world.studies.cells import Cell, data_path, prepare
from lavender.world.studies.new_words import arms
from lavender.world.studies.registry import Scale
from lavender.world.studies.tasks import TASKS


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
