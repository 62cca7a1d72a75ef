"""Scenes with coloured edges, and the texts about them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import maximum_filter

from lavender.world import attributes
from lavender.world.attributes import (
    COLOURS,
    NAMES_WITHOUT_COLOUR,
    EdgedScene,
    ask_about_colour,
    ask_about_place,
    bind_colours,
    draw_edged,
    pairs_said,
)
from lavender.world.scenes import SPLITS, Scene, Thing, draw_scene
from lavender.world.sprites import NAMES

SEEDS = SPLITS["development"][40:52]


def scene_of(seed: int, *things: tuple[str, str]) -> EdgedScene:
    """A scene of these names and colours, with a mask of one pixel each."""
    masks = np.eye(len(things), 13, dtype=bool)[:, None].repeat(5, axis=1)
    drawn = tuple(Thing(name, (0, index, 1, index + 1), False, masks[index]) for index, (name, _) in enumerate(things))
    return EdgedScene(seed, "plain", np.zeros((5, 13, 3), np.uint8), drawn, tuple(colour for _, colour in things))


def row_of(*things: tuple[str, int], seed: int = 3_000_001) -> Scene:
    """A scene of these names, with centres at these columns of 100."""
    mask = np.zeros((5, 100), dtype=bool)
    drawn = tuple(Thing(name, (0, column - 2, 4, column + 2), False, mask) for name, column in things)
    return Scene(seed, "plain", np.zeros((5, 100, 3), np.uint8), drawn)


def test_a_scene_by_its_seed():
    scene = draw_edged(3_000_041)
    assert scene.names == ("octopus", "crab", "sailboat")
    assert scene.colours == ("white", "red", "purple")
    assert scene.colour_of("crab") == "red"
    assert np.array_equal(draw_edged(3_000_041).pixels, scene.pixels)
    assert draw_scene(3_000_041).names == ("house", "strawberry", "bus")  # the plain scene shows other things


def test_no_name_says_a_colour():
    assert set(NAMES) - set(NAMES_WITHOUT_COLOUR) == {"red apple", "green apple", "fire engine"}
    assert not [name for name in NAMES_WITHOUT_COLOUR if any(colour in name for colour in COLOURS)]


def test_two_to_four_things_each_with_a_colour_of_its_own():
    scenes = [draw_edged(seed) for seed in SEEDS]
    assert {len(scene.things) for scene in scenes} == {2, 3, 4}
    for scene in scenes:
        assert len(scene.colours) == len(set(scene.colours)) == len(scene.things) == len(set(scene.names))
        assert set(scene.colours) <= set(COLOURS)
        assert set(scene.names) <= set(NAMES_WITHOUT_COLOUR)


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_an_edge_is_three_pixels_around_the_thing(seed, monkeypatch):
    """Things keep their own pixels, and so does what is farther away. Where edges meet, the later one counts."""
    scene = draw_edged(seed)
    with monkeypatch.context() as patched:
        patched.setattr(attributes, "binary_dilation", lambda mask, **settings: np.zeros_like(mask))
        plain = draw_edged(seed)
    expected = plain.pixels.copy()
    is_thing = np.any([thing.mask for thing in scene.things], axis=0)
    for thing, colour in zip(scene.things, scene.colours, strict=True):
        near = maximum_filter(thing.mask, size=7, mode="constant") & ~is_thing  # 3 pixels to every side
        expected[near] = COLOURS[colour]
        assert (scene.pixels[near] == COLOURS[colour]).all(axis=-1).mean() > 0.3, "the edge is seen"
    assert np.array_equal(scene.pixels, expected)
    assert not np.array_equal(plain.pixels, expected)


def test_a_seed_of_no_split_is_refused():
    with pytest.raises(ValueError, match="Got seed 9000000. Expected a seed of a split"):
        draw_edged(9_000_000)


def test_a_question_is_about_one_thing_of_the_scene():
    scene = draw_edged(3_000_042)
    assert dict(zip(scene.names, scene.colours, strict=True))["cow"] == "blue"
    question = ask_about_colour(scene)
    assert (question.question, question.answer, question.name) == ("the cow is on", "blue", "cow")
    asked = {ask_about_colour(scene, variant).name for variant in range(30)}
    assert asked == set(scene.names)
    for variant in range(5):
        question = ask_about_colour(scene, variant)
        assert question.name is not None
        assert question.question == f"the {question.name} is on"
        assert question.answer == scene.colour_of(question.name)


DOG_AND_CAT = {("the dog is left of", "the cat"), ("the cat is right of", "the dog")}
CAT_AND_COW = {("the cat is left of", "the cow"), ("the cow is right of", "the cat")}


@pytest.mark.parametrize(
    ("things", "questions"),
    [
        ([("cow", 60), ("dog", 10), ("cat", 30)], DOG_AND_CAT | CAT_AND_COW),
        ([("dog", 10), ("cat", 18), ("cow", 26)], DOG_AND_CAT | CAT_AND_COW),  # gaps of 8 are wide enough
        ([("dog", 10), ("cat", 17), ("cow", 60)], None),  # the dog and the cat are both left of the cow
        ([("dog", 10), ("cat", 40), ("pig", 73), ("cow", 70)], DOG_AND_CAT),  # the cow and the pig are not told apart
        ([("dog", 10), ("pig", 12), ("cat", 40), ("cow", 70)], CAT_AND_COW),
        ([("dog", 10), ("cat", 40)], None),  # "the other one" would do
        ([("dog", 10)], None),
    ],
)
def test_the_answer_is_the_next_thing_to_the_side(things, questions):
    asked = [ask_about_place(row_of(*things), variant) for variant in range(60)]
    if questions is None:
        assert asked == [None] * 60
    else:
        assert {(question.question, question.answer) for question in asked if question is not None} == questions
        assert None not in asked


def test_questions_about_places_of_drawn_scenes():
    """No thing's centre lies between the two things, nor within 8 pixels of either."""
    asked = {}
    for seed in SPLITS["development"][40:80]:
        scene = draw_edged(seed)
        question = ask_about_place(scene)
        if question is None:
            continue
        assert len(scene.things) > 2
        centres = {thing.name: (thing.box[1] + thing.box[3]) / 2 for thing in scene.things}
        name, answer = question.name, question.answer.removeprefix("the ")
        assert name is not None
        left, right = sorted((centres[name], centres[answer]))
        assert question.question == f"the {name} is {'left' if left == centres[name] else 'right'} of"
        assert right - left >= 8
        others = [centre for other, centre in centres.items() if other not in (name, answer)]
        assert all(centre <= left - 8 or centre >= right + 8 for centre in others)
        asked[seed] = (question.question, question.answer)
    assert len(asked) == 15
    assert asked[3_000_042] == ("the cow is right of", "the palm tree")


def test_a_caption_binds_every_thing_to_its_colour():
    scene = scene_of(3_000_001, ("owl", "white"), ("hot dog", "red"), ("dog", "blue"))
    texts = {bind_colours(scene, variant)[0] for variant in range(40)}
    assert len(texts) == 6  # every order
    assert "an owl on white and a hot dog on red and a dog on blue." in texts
    text, about = bind_colours(scene)
    assert sorted(text.removesuffix(".").split(" and ")) == ["a dog on blue", "a hot dog on red", "an owl on white"]
    order = {"owl": text.index("owl"), "hot dog": text.index("hot dog"), "dog": text.index("dog on blue")}
    assert [entry["about"] for entry in about] == sorted(order, key=lambda name: order[name])
    assert {entry["about"]: entry["word"] for entry in about} == {"owl": "white", "hot dog": "red", "dog": "blue"}


def test_what_a_caption_binds_is_read_from_it():
    for seed in SEEDS:
        scene = draw_edged(seed)
        assert pairs_said(bind_colours(scene)[0]) == set(zip(scene.names, scene.colours, strict=True))


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a dog on red and an owl on white.", {("dog", "red"), ("owl", "white")}),
        ("a hot dog on red", {("hot dog", "red")}),
        ("dog on red and dog on blue.", {("dog", "red"), ("dog", "blue")}),
        ("a dog on red and a dog on red.", {("dog", "red")}),
        ("a dog on pink and a cat on blue.", {("cat", "blue")}),
        ("a unicorn on red.", set()),
        ("a dog and a cat on blue.", {("cat", "blue")}),
        ("a dog on red on blue.", set()),
        ("", set()),
    ],
)
def test_pairs_by_hand(text, pairs):
    assert pairs_said(text) == pairs
