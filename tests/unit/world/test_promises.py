"""What `lavender check` said before training is held against what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavender.world.studies import attributes, main_study, new_words, promises
from lavender.world.studies.cells import Arm, Cell
from lavender.world.studies.study import METRICS, Promised, Scores, Study
from lavender.world.studies.tasks import Scoring

SCORES: Scores = {
    "plain": {"new_names": [0.2, 0.3]},
    "better": {"new_names": [0.4, 0.5]},
    "on average": {"new_names": [0.25, 0.35]},
    "level": {"new_names": [0.1, 0.4]},
}


def test_verdicts_and_outcomes(tmp_path, monkeypatch):
    """Right: a gain that was promised, and none where none was; wrong: a promise without a gain."""
    verdicts = {"better": "pays", "on average": "cannot say", "level": "pays", "plain": "no gain"}
    scoring = Scoring("development", 0, 9)
    cells = {arm: [Cell(Arm("mllama", "full", num_scenes=index), 1, scoring)] for index, arm in enumerate(SCORES)}
    arm_of = {of_arm[0].arm.num_scenes: arm for arm, of_arm in cells.items()}
    asked: list[str] = []

    def check_model(base: Path, data: Path, maps: Path, limit: int) -> dict[str, Any]:
        arm = arm_of[int(data.parent.name.split("-")[2])]
        asked.append(arm)
        assert maps.name == "teacher"
        return {"verdict": verdicts[arm], "reasons": {"new": "why"}, "groups": {}}

    monkeypatch.setattr(promises, "check_model", check_model)
    monkeypatch.setattr(promises, "prepare", lambda folder, cell: None)
    promised = [Promised(arm, "plain", "new_names") for arm in SCORES]
    found = promises.promises(tmp_path, cells, SCORES, promised)
    assert {arm: entry["outcome"] for arm, entry in found["arms"].items()} == {
        "plain": "no clear difference",
        "better": "above",
        "on average": "higher on average",
        "level": "no clear difference",
    }
    assert (found["right"], found["wrong"], found["open"], found["hit_rate"]) == (2, 1, 1, 2 / 3)
    table = promises.table_of_promises(found, METRICS)
    assert "| better | pays | new names, F1: above |" in table
    assert table.endswith("Right in 2 of 3 verdicts; 1 times it cannot say.")
    assert asked == list(SCORES)
    assert promises.promises(tmp_path, cells, SCORES, promised) == found
    assert asked == list(SCORES), "a check is kept"


def test_which_arms_are_asked():
    def arms_of(study: Study) -> list[Promised]:
        return study.promised({arm: {} for arm in study.arms(False)})

    of_words = {entry.arm: entry.plain for entry in arms_of(new_words.STUDY)}
    assert of_words["recipe 25"] == "plain 25"
    assert of_words["recipe, uniform 100"] == "plain 100"
    assert of_words["recipe, without replay 100"] == "plain, without replay 100"
    assert "published 100" not in of_words
    of_attributes = arms_of(attributes.STUDY)
    assert Promised("binding recipe, masks 1600", "binding plain 1600", "pairs") in of_attributes
    assert Promised("binding-connecting recipe 3200", "binding-connecting plain 3200", "pairs") in of_attributes
    assert not [entry for entry in of_attributes if entry.arm.startswith("places")]
    assert Promised("llava lora recipe", "llava lora plain", "in_domain") in arms_of(main_study.STUDY)
    for study in (new_words.STUDY, attributes.STUDY, main_study.STUDY):
        arms = study.arms(False)
        assert all(entry.arm in arms and entry.plain in arms for entry in arms_of(study))
