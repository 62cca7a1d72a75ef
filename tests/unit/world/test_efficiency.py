"""How many samples plain fine-tuning needs for the score of a recipe."""

from __future__ import annotations

import pytest

from lavender.world.studies.efficiency import efficiency, equal_plain_size
from lavender.world.studies.study import METRICS

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
    assert efficiency(scores, "new_names", ("plain", "recipe"), "captions") == [
        f"25 captions with the recipe: {name} 0.375; plain fine-tuning needs about 50",
        f"100 captions with the recipe: {name} 0.625; plain fine-tuning has this mean at no size of this study",
    ]


def test_arms_of_other_tasks_do_not_count():
    scores = {
        "questions plain 400": {"answers": [0.25]},
        "questions plain 1600": {"answers": [0.75]},
        "places plain 800": {"answers": [0.5]},
        "questions recipe 400": {"answers": [0.5]},
        "questions recipe, masks 400": {"answers": [1.0]},
    }
    found = efficiency(scores, "answers", ("questions plain", "questions recipe"), "questions")
    assert found == [f"400 questions with the recipe: {METRICS['answers']} 0.500; plain fine-tuning needs about 800"]
