"""Pages about runs, and agreement of maps, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lavender.evaluation
from command_line import write_scenes
from lavender.data.store import MapStore
from lavender.evaluation import runs
from lavender.evaluation.compare import _agreement_with
from lavender.evaluation.runs import report_run
from lavender.maps import WordMaps
from lavender.words import content_words


@pytest.mark.parametrize(("teacher", "is_noted"), [("world", True), ("another", False)])
def test_notes_on_a_teacher_are_on_pages_with_its_maps_alone(
    teacher, is_noted, some_scenes, captions, tmp_path, monkeypatch
):
    (tmp_path / "data").mkdir()
    write_scenes(tmp_path / "data", some_scenes, captions)
    with MapStore.writer(tmp_path / "maps", {"teacher": teacher}, {}, (5, 7)):
        pass
    (tmp_path / "run").mkdir()
    config: dict[str, Any] = {
        "model": "m",
        "data": str(tmp_path / "data"),
        "maps": str(tmp_path / "maps"),
        "prompt": "What?",
    }
    config["training"] = {"attention_loss": "mass", "align_weight": 0.7}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(runs, "_observe_arms", lambda *args: ({}, []))
    page = report_run(tmp_path / "run", teacher_notes={"world": "Maps of a small teacher."}).read_text()
    assert ("Maps of a small teacher." in page) == is_noted
    assert "run `lavender eval` for scores" in page
    assert f"m fine-tuned on {tmp_path / 'data'}, attention_loss mass, align_weight 0.7." in page


def test_evaluation_knows_no_teacher_by_name():
    for file in Path(lavender.evaluation.__path__[0]).rglob("*.py"):
        assert '"world"' not in file.read_text(), file


class Store:
    """One record."""

    grid = (5, 7)

    def __init__(self, record: WordMaps):
        self._record = record

    def get(self, image_id: str, text: str) -> WordMaps | None:
        return self._record if (image_id, text) == (self._record.image_id, self._record.text) else None


def test_agreement_is_a_mean_over_common_words():
    text = "a dog and a cat on the grass"
    words = content_words(text, ("noun",))
    maps = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    student, unknown = WordMaps("1", text, words, maps), WordMaps("2", text, words, maps)
    teacher = torch.stack([2 * maps[0] + 1, -maps[1], torch.ones(5, 7)])  # r of 1 and -1; a flat map has none

    def agreement(number: int, *students: WordMaps) -> float | None:
        store: Any = Store(WordMaps("1", text, words[:number], teacher[:number]))
        return _agreement_with(store, students)

    assert agreement(3, student, unknown) == pytest.approx(0, abs=1e-6)
    assert agreement(1, student) == pytest.approx(1)
    assert agreement(3, unknown) is None
