"""The world's suite: its items, POPE's samplings by hand, signs, and the scores of its tasks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from lavender.errors import ConfigError, DataError
from lavender.evaluation.scorers import cider
from lavender.world import suite, suite_scoring
from lavender.world.attributes import COLOURS, EdgedScene, draw_edged, is_withheld, withheld_names
from lavender.world.judging import CALIBRATION_START
from lavender.world.scenes import SPLITS, Scene, Thing, draw_scene, split_of
from lavender.world.sprites import NAMES
from lavender.world.studies.registry import NUM_HELD_OUT, SEALED_START
from lavender.world.suite import FIRST_SCENE, SCENES_PER_TASK, SUITE, Item, picture_of, scene_of, suite_items
from lavender.world.suite_pope import absent_names
from lavender.world.suite_signs import WITHHELD_WORDS, WORDS, SignScene, ask_to_read, draw_sign

FEW = {name: task for name, task in SUITE.items() if name not in ("ood_cutouts", "ood_outline", "ood_hand")}
"""Tasks whose pictures need nothing that a checkout may lack, one per kind."""


@pytest.fixture
def few(monkeypatch) -> None:
    """The suite with few items per task, so that few scenes are drawn."""
    for name in FEW:
        num_items = {"counting": 8}.get(name, 24 if name.startswith("pope_") else 12)
        monkeypatch.setitem(SUITE, name, replace(SUITE[name], num_items=num_items))


def row_of(*things: tuple[str, int], seed: int = 3_000_001) -> Scene:
    """A scene of these names, with centres at these columns of 100."""
    mask = np.zeros((5, 100), dtype=bool)
    drawn = tuple(Thing(name, (0, column - 2, 4, column + 2), False, mask) for name, column in things)
    return Scene(seed, "plain", np.zeros((5, 100, 3), np.uint8), drawn)


@pytest.mark.parametrize("name", FEW)
def test_items_are_of_the_split_and_their_answers_are_true(name, few):
    for split in ("development", "sealed"):
        items = suite_items(name, split)
        assert items
        assert items == suite_items(name, split)
        for item in items:
            assert split_of(item.seed) == split
            assert item.names == scene_of(item.drawn, item.seed).names
            _check_answer(item)
    assert suite_items(name, count=2) == suite_items(name)[:2]


def _check_answer(item: Item) -> None:
    """The answer follows from the scene, worked out in another way than the suite does."""
    scene, answer = scene_of(item.drawn, item.seed), item.answers[0]
    if item.form in ("left", "right"):
        centres = {thing.name: thing.box[1] + thing.box[3] for thing in scene.things}
        assert answer == (min if item.form == "left" else max)(centres, key=centres.__getitem__)
    elif item.form in ("top", "bottom"):
        centres = {thing.name: thing.box[0] + thing.box[2] for thing in scene.things}
        assert answer == (min if item.form == "top" else max)(centres, key=centres.__getitem__)
    elif item.form == "count":
        assert ["one", "two", "three", "four"].index(answer) + 1 == len(scene.things)
    elif answer in ("yes", "no"):
        asked = item.question.rstrip("?").split(" a ")[-1].split(" an ")[-1]
        assert asked in NAMES
        assert (asked in scene.names) == (answer == "yes")
    elif item.form == "either":
        asked = [part.partition(" ")[2] for part in item.question.removeprefix("which is here, ")[:-1].split(" or ")]
        assert [name for name in asked if name in scene.names] == [answer]
        assert len(set(asked) & set(NAMES)) == 2
    elif isinstance(scene, EdgedScene):
        assert answer == scene.colour_of(item.question.removeprefix("the ").removesuffix(" is on"))
    elif isinstance(scene, SignScene):
        assert item.answers == (scene.word,)
    elif item.form == "caption":
        assert len(item.answers) == len({*item.answers}) == 5
        assert all(name in caption for caption in item.answers for name in scene.names)
    else:
        assert item.form == "beside"
        name, side = item.question.removeprefix("the ").removesuffix(" of").rsplit(" is ", 1)
        across = sorted(scene.names, key=lambda one: sum(scene.things[scene.names.index(one)].box[1::2]))
        assert across.index(answer) - across.index(name) == (1 if side == "left" else -1)


def test_no_study_and_no_demo_has_scenes_of_the_suite():
    used = range(FIRST_SCENE, FIRST_SCENE + SCENES_PER_TASK * len(SUITE))
    assert used.stop <= len(SPLITS["development"]) == len(SPLITS["sealed"])
    assert used.start > SEALED_START + 10 * NUM_HELD_OUT
    assert used.start > CALIBRATION_START + 10 * NUM_HELD_OUT
    starts = [FIRST_SCENE + SCENES_PER_TASK * index for index in range(len(SUITE))]
    assert all(second - first == SCENES_PER_TASK for first, second in pairwise(starts))


def test_each_number_is_counted_equally_often(few):
    assert Counter(item.answers[0] for item in suite_items("counting")) == dict.fromkeys(
        ("one", "two", "three", "four"), 2
    )


def test_of_two_names_the_right_one_is_first_in_half_of_the_questions():
    """About half of 40: the seeds are fixed, so the number is always the same one."""
    drawn = [suite._either(row_of(("dog", 20), ("cat", 60), seed=3_000_001 + index)) for index in range(40)]
    first = sum(asked.question.removeprefix("which is here, ").split()[1] == asked.answer for asked in drawn)
    assert 12 <= first <= 28


def test_popes_three_splits_ask_of_the_same_pictures_half_yes(few):
    by_sampling = [suite_items(f"pope_{sampling}") for sampling in ("random", "popular", "adversarial")]
    assert len({tuple(item.seed for item in items) for items in by_sampling}) == 1
    for items in by_sampling:
        assert len(items) == 24
        assert Counter(item.answers[0] for item in items) == {"yes": 12, "no": 12}
        assert len({(item.seed, item.question) for item in items}) == 24
    asked_no = [[item.question for item in items if item.answers[0] == "no"] for items in by_sampling]
    assert len({*map(tuple, asked_no)}) == 3
    assert {len(item.names) for item in by_sampling[0]} == {3, 4}


def test_a_side_is_asked_for_where_it_is_clear():
    assert suite._at_the_side(row_of(("dog", 20), ("cat", 28)), "left") is not None
    assert suite._at_the_side(row_of(("dog", 20), ("cat", 27)), "left") is None
    assert suite._at_the_side(row_of(("dog", 20)), "left") is None
    asked = suite._at_the_side(row_of(("dog", 20), ("cat", 60), ("bus", 80)), "right")
    assert asked is not None
    assert (asked.form, asked.question, asked.answer) == ("right", "what is on the right?", "bus")


def test_a_name_may_be_answered_with_an_article():
    scene = row_of(("octopus", 20), ("cat", 60))
    asked = suite._at_the_side(scene, "left")
    assert asked is not None
    assert suite._item("plain", scene, asked).answers == ("octopus", "an octopus", "the octopus")


def test_unknown_tasks_and_other_splits_are_refused():
    with pytest.raises(ConfigError, match="Got the task 'pope'"):
        suite_items("pope")
    with pytest.raises(ConfigError, match="Got the split 'finetune'"):
        suite_items("signs", "finetune")
    with pytest.raises(ConfigError, match="Got -1 items"):
        suite_items("signs", count=-1)


# POPE


SHOWN = (("dog", "cat"), ("dog", "bus"), ("cat", "bus"), ("cat", "bus"), ("tree", "dog"))
SOME = ("tree", "dog", "cat", "bus", "cow")


def test_popular_names_by_hand():
    """Pictures with dog 3, cat 3, bus 3, tree 1, cow 0; equal ones in the order of the names."""
    assert absent_names(SHOWN, SOME, "popular", 2, seed=0) == [
        ["bus", "tree"],
        ["cat", "tree"],
        ["dog", "tree"],
        ["dog", "tree"],
        ["cat", "bus"],
    ]


def test_adversarial_names_by_hand():
    """Together: dog+bus 2, cat+tree 2, dog+cat 1. Popular names would be tree 3, dog 3, cat 3, bus 2."""
    shown = (("dog", "cat"), ("dog", "bus"), ("dog", "bus"), ("cat", "tree"), ("cat", "tree"), ("tree",))
    assert absent_names(shown, SOME, "adversarial", 2, seed=0) == [
        ["tree", "bus"],  # tree: 2 with cat; bus: 2 with dog
        ["cat", "tree"],  # cat: 1 with dog; tree: 0, like cow
        ["cat", "tree"],
        ["dog", "bus"],  # dog: 1 with cat; bus: 0, like cow
        ["dog", "bus"],
        ["cat", "dog"],  # cat: 2; dog: 0, like bus and cow
    ]


def test_random_names_are_absent_and_depend_on_the_seed():
    drawn = [absent_names(SHOWN, tuple(NAMES), "random", 3, seed=seed) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    for shown, names in zip(SHOWN, drawn[0], strict=True):
        assert len(set(names)) == 3
        assert not set(names) & set(shown)


def test_too_few_absent_names_are_refused():
    with pytest.raises(DataError, match="Got picture 0, which shows 2 of 3 names"):
        absent_names([("dog", "cat")], ("dog", "cat", "bus"), "popular", 2, seed=0)


# withheld pairs, and signs


def test_a_sixth_of_the_pairs_is_withheld_evenly():
    pairs = [(name, colour) for name in NAMES for colour in COLOURS if is_withheld(name, colour)]
    assert len(pairs) == len(NAMES) == 42
    assert set(Counter(colour for _, colour in pairs).values()) == {7}
    scene = draw_edged(3_000_041)
    assert isinstance(scene, EdgedScene)
    expected = [name for name in scene.names if is_withheld(name, scene.colour_of(name))]
    assert withheld_names(scene) == tuple(expected)


def test_unseen_combinations_are_withheld_pairs(few):
    for item in suite_items("ood_combination"):
        assert is_withheld(item.question.removeprefix("the ").removesuffix(" is on"), item.answers[0])


def test_a_sign_hides_nothing_and_lies_in_the_picture():
    for seed in SPLITS["development"][60:72]:
        scene = draw_sign(seed)
        assert isinstance(scene, SignScene)
        assert scene.board.shape == scene.pixels.shape[:2]
        assert not any((thing.mask & scene.board).any() for thing in scene.things)
        assert np.array_equal(scene.mask_of(scene.word), scene.board)
        assert len(scene.things) <= 2
        rows, columns = np.nonzero(scene.board)
        board = scene.pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(int)
        assert abs(board[0, 0] - board[1, 1]).max() > 60, "a border is drawn"
        inside = board[2:-2, 2:-2]
        letters = (abs(inside - board[1, 1]).max(axis=-1) > 60).mean()
        assert 0.1 < letters < 0.7, "letters are drawn"


def test_no_sign_of_fine_tuning_says_a_withheld_word():
    said = {draw_sign(seed).word for seed in SPLITS["finetune"][:120]}
    assert len(said) > 20
    assert not said & set(WITHHELD_WORDS)
    held_out = [draw_sign(seed) for seed in SPLITS["development"][:60]]
    forms = {ask_to_read(scene).form for scene in held_out}
    assert forms == {"read", "read a withheld word"}
    assert not set(WORDS) & set(NAMES)


# scores


def test_a_caption_is_scored_by_its_names_and_its_words():
    docs = [
        {"answers": ["a dog and a cat.", "the dog near a cat."], "names": ["dog", "cat"]},
        {"answers": ["a bus.", "here is a bus."], "names": ["bus"]},
    ]
    said = ["a dog and a cow.", "a bus."]
    scored = [suite_scoring.process_caption(doc, [text]) for doc, text in zip(docs, said, strict=True)]
    assert [one["names_f1"]["score"] for one in scored] == [0.5, 1.0]
    assert [one["names_exact"]["score"] for one in scored] == [0.0, 1.0]
    assert suite_scoring.mean([one["names_f1"] for one in scored]) == 0.75
    assert suite_scoring.names_micro_f1([one["names_micro_f1"] for one in scored]) == pytest.approx(2 * 2 / (3 + 3))
    expected = cider(said, [doc["answers"] for doc in docs]).aggregate["cider"]
    assert suite_scoring.cider_of([one["cider"] for one in scored]) == expected


def test_an_answer_is_scored_with_its_form():
    doc = {"answers": ["dog", "a dog", "the dog"], "form": "left"}
    scored = suite_scoring.process_answer(doc, ["A dog."])
    assert {metric: one["score"] for metric, one in scored.items()} == {"exact_match": 1.0, "exact_match_left": 1.0}
    assert suite_scoring.process_answer(doc, [" Dog.\n"])["exact_match"]["score"] == 1.0  # models that end with a line
    assert suite_scoring.process_answer(doc, ["a dog and a cat"])["exact_match"]["score"] == 0.0
    assert list(suite_scoring.process_answer({"answers": ["red"], "form": "colour"}, ["red"])) == ["exact_match"]


def test_reading_counts_withheld_words_apart():
    read = suite_scoring.process_reading({"answers": ["hotel"], "form": "read"}, ["hotal"])
    assert (read["exact_match"]["score"], read["anls"]["score"]) == (0.0, pytest.approx(0.8))
    assert "exact_match_withheld" not in read
    withheld = suite_scoring.process_reading({"answers": ["taxi"], "form": "read a withheld word"}, ["taxi."])
    assert withheld["exact_match_withheld"]["score"] == 1.0


def test_yes_and_no_by_hand():
    docs = [{"answers": [answer]} for answer in ("yes", "yes", "no", "no")]
    scored = [
        suite_scoring.process_yes_no(doc, [said])
        for doc, said in zip(docs, ("yes", "No.", "yes.", "a cat"), strict=True)
    ]
    assert [one["accuracy"]["score"] for one in scored] == [1.0, 0.0, 0.0, 0.0]
    values = {name: getattr(suite_scoring, name)([one[name] for one in scored]) for name in suite_scoring._YES_NO}
    assert values == {
        "accuracy": 0.25,
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "share_of_yes": 0.5,
        "share_of_other": 0.25,
    }


def test_a_picture_is_drawn_from_its_item():
    assert picture_of("plain", 3_000_041).size == draw_scene(3_000_041).image.size
    assert np.array_equal(np.asarray(picture_of("sign", 3_000_041)), draw_sign(3_000_041).pixels)
