"""The demo without a model: its runs, the choice of its pictures, its scores, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lavender.evaluation.compare import Observed
from lavender.maps import WordMaps
from lavender.training.run_config import read_run
from lavender.words import words_of
from lavender.world import STUDENT_PATHS, demo, judging
from lavender.world.language import caption_scene
from lavender.world.scenes import Scene, Thing, scenes
from lavender.world.sprites import NEW_NAMES
from lavender.world.studies import new_words

SIZE = (20, 30)


def drawn(seed: int, *names: str) -> Scene:
    """The n-th thing covers 4 rows × 5 columns, from column 5n on."""
    things = []
    for index, name in enumerate(names):
        mask = np.zeros(SIZE, dtype=bool)
        mask[10:14, 5 * index : 5 * index + 5] = True
        things.append(Thing(name, (10, 5 * index, 14, 5 * index + 5), False, mask))
    return Scene(seed, "plain", np.zeros((*SIZE, 3), dtype=np.uint8), tuple(things))


def students(new: float, known: float, all_names: float) -> dict[str, dict[str, Any]]:
    """Scores of the three students. Plain has 0.5 everywhere, the base 0.25."""
    plain = dict.fromkeys(new_words.METRICS_SHOWN, 0.5)
    aligned = plain | {"new_names": new, "known_names": known, "all_names": all_names}
    return {"base": dict.fromkeys(plain, 0.25), "plain": plain, "aligned": aligned}


def test_its_runs_are_arms_of_the_study_at_a_seed_of_their_own():
    of_study = new_words.arms(quick=False)
    assert {"plain": of_study["plain 100"], "aligned": of_study["recipe 100"]} == demo.ARMS
    assert demo.SEED not in (*new_words.STUDY.seeds, *new_words.STUDY.quick_seeds)


def test_its_run_files_differ_in_alignment_alone(tmp_path):
    runs = {}
    for arm in demo.ARMS:
        (tmp_path / f"{arm}.yaml").write_text(yaml.safe_dump(demo.run_settings(tmp_path, arm)))
        run = runs[arm] = read_run(tmp_path / f"{arm}.yaml")
        assert run.model == str(STUDENT_PATHS["mllama_new_words"])
        assert run.freeze == ["vision_tower", "connector"]
        assert run.out == str(tmp_path / arm)
        assert (run.replay_data, run.replay_share) == (str(tmp_path / "replayed"), 0.5)
        assert (run.training["seed"], run.training["max_steps"]) == (0, 400)
    plain, aligned = (dict(runs[arm].training) for arm in ("plain", "aligned"))
    assert plain["align_weight"] == 0
    recipe = dict(new_words.FORMS["recipe"])
    assert {key: aligned[key] for key in recipe} == recipe
    different = {key for key in plain | aligned if plain.get(key) != aligned.get(key)}
    assert different == {"align_weight"}


def test_its_pictures_are_the_first_that_the_rule_takes(monkeypatch):
    new, known = NEW_NAMES[0], "dog"
    assert known not in NEW_NAMES
    held_out = [
        drawn(1, new),
        drawn(2, known, "cat"),
        drawn(3, known, new),
        drawn(4, new, known, "cat", "cow"),
        drawn(5, known, "cat", new),
        drawn(6, NEW_NAMES[1], new),
        drawn(7, new, "cat"),
    ]
    plain = [f"a {known}."] * 6 + [f"a {new}."]
    aligned = [f"a {new}."] * 5 + [f"a {known} and a {new}.", f"the {new}, a cat and a {NEW_NAMES[1]}."]
    assert demo.chosen_scenes(held_out, plain, aligned) == [2, 4, 5]
    assert demo.chosen_scenes(held_out, aligned, plain) == [2, 4, 5]  # which of them is right does not count
    monkeypatch.setattr(demo, "NUM_PANELS", 2)
    assert demo.chosen_scenes(held_out, plain, aligned) == [2, 4]


def test_enough_held_out_scenes_fit_the_rule():
    held_out = list(scenes("development", 100))
    chosen = demo.chosen_scenes(held_out, [""] * 100, [f"a {NEW_NAMES[0]}, a {NEW_NAMES[1]}."] * 100)
    assert len(chosen) == demo.NUM_PANELS


def test_a_new_name_is_marked_in_the_pictures():
    scene = drawn(7, "dog", NEW_NAMES[0])
    text = caption_scene(scene).text
    words = words_of(text)
    maps = WordMaps("image", text, words, torch.ones(len(words), 4, 6))

    class Teacher:
        config = judging.ExtractionConfig()

        def __call__(self, jobs):
            return [maps for _ in jobs]

    said = {"base": "a dog.", "plain": "a dog.", "aligned": f"a {NEW_NAMES[0]}."}
    observed = {arm: Observed([answer], [maps]) for arm, answer in said.items()}
    (panel,) = demo._panels([scene], Teacher(), observed)  # ty: ignore[invalid-argument-type]
    assert {row.word for row in panel.rows} == {"dog", f"{NEW_NAMES[0]} (new)"}
    assert panel.answers == said
    assert all(row.mask is not None and row.mask.sum() == 20 for row in panel.rows)


def test_the_table_fits_a_terminal():
    lines = demo.summary_of(students(0.69, 0.4, 0.7215)).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["base", "plain", "aligned"]
    assert [line.split()[-3:] for line in lines[1:4]] == [
        ["0.250", "0.500", "0.690"],
        ["0.250", "0.500", "0.400"],
        ["0.250", "0.500", "0.722"],
    ]
    assert len({len(line) for line in lines[: 1 + len(new_words.METRICS_SHOWN)]}) == 1


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (
            (0.69, 0.4, 0.5),
            "new things better (F1 0.690, plain 0.500), known things worse (F1 0.400, plain 0.500), and all things "
            "together equally well (F1 0.500, plain 0.500)",
        ),
        (
            (0.4, 0.5004, 0.51),
            "new things worse (F1 0.400, plain 0.500), known things equally well (F1 0.500, plain 0.500), and all "
            "things together better (F1 0.510, plain 0.500)",
        ),
    ],
)
def test_the_sentence_says_what_the_scores_say(scores, said):
    sentence = demo.meaning_of(students(*scores))
    assert said in sentence
    assert "This is one seed" in sentence


def test_scores_of_new_and_known_names_by_hand(monkeypatch):
    """Three scenes, of which the student names some things right. Its attention is on the first thing of each."""
    new, other = NEW_NAMES[:2]
    held_out = [drawn(1, new), drawn(2, "dog", new), drawn(3, "cat", "dog")]
    answers = [f"a {other}.", f"a dog and a {new}.", "a cat."]
    heat = torch.zeros(4, 6)
    heat[2, 0] = 1.0
    losses: list[int] = []

    def student_maps(model, processor, pictures, **settings):
        return [
            WordMaps("image", picture.answer, picture.words, heat.expand(len(picture.words), 4, 6))
            for picture in pictures
        ]

    def answer_nll(model, processor, pictures, **settings):
        losses.append(len(pictures))
        return 1.25

    monkeypatch.setattr(judging, "load_run", lambda path: (None, None))
    monkeypatch.setattr(judging, "generate_answers", lambda *arguments, **settings: answers)
    monkeypatch.setattr(judging, "student_maps", student_maps)
    monkeypatch.setattr(judging, "answer_nll", answer_nll)
    scores, observed = judging.score_new_words(Path("run"), held_out)
    assert observed.answers == answers
    assert scores["new_names"] == pytest.approx(0.5)  # one right of two said and two there
    assert scores["known_names"] == pytest.approx(0.8)  # two right of two said and three there
    assert scores["all_names"] == pytest.approx(6 / 9)  # three right of four said and five there
    assert scores["single_things"] == 0
    assert (scores["known_loss"], losses) == (1.25, [1])  # one scene has known names alone
    assert scores["new_pointing"] == 0.5
    assert scores["pointing"] == pytest.approx(3 / 5)
    assert 0 < scores["new_attention_mass"] < scores["attention_mass"] < 1
