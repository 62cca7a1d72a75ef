"""Which noun an adjective describes."""

from __future__ import annotations

import pytest

from lavender.alignment.attributes import described_nouns


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a small red dog", {"small": "dog", "red": "dog"}),
        ("a small, red dog and a blue cat", {"small": "dog", "red": "dog", "blue": "cat"}),
        ("two black and white dogs", {"black": "dogs", "white": "dogs"}),
        ("A red fire truck by an old brick building.", {"red": "truck", "old": "building"}),
        ("red dogs, blue cats and white pigs", {"red": "dogs", "blue": "cats", "white": "pigs"}),
        ("a dog's red collar", {"red": "collar"}),
        ("a red dog's collar", {"red": "dog's"}),
        ("the dog is red", {"red": "dog"}),
        ("the dog is red and the cat is blue", {"red": "dog", "blue": "cat"}),
        ("the big dogs were very small and brown", {"big": "dogs", "small": "dogs", "brown": "dogs"}),
        ("the dog is red and small cats run", {"red": "dog", "small": "cats"}),
        ("the dog is red, small cats run", {"red": "dog", "small": "cats"}),
        ("there is a yellow bus", {"yellow": "bus"}),
        ("Is the dog red or brown?", {"red": "dog", "brown": "dog"}),
        ("A cat. Are the two dogs small?", {"small": "dogs"}),
        ("What color is the big dog?", {"big": "dog"}),
        # not sure
        ("a dog on red and a cat on blue", {"red": None, "blue": None}),
        ("the dog on the mat is red", {"red": None}),
        ("a dog and a cat are red", {"red": None}),
        ("A man riding a horse is old.", {"old": None}),
        ("the woman wearing a blue hat is young", {"blue": "hat", "young": None}),
        ("the man who has a dog is tall", {"tall": None}),
        ("The cat chasing the mouse was brown.", {"brown": None}),
        ("the woman who can often carry a bag is tall", {"tall": None}),
        ("a dog which ate a bone is small", {"small": None}),
        ("You can see the car is blue", {"blue": "car"}),
        ("I think the dog is brown", {"brown": "dog"}),
        ("The image shows the wall is white", {"white": "wall"}),
        ("it is red", {"red": None}),
        ("is it red?", {"red": None}),
        ("the cat looks happy", {"happy": None}),
        ("the dog that is brown sits", {"brown": None}),
        ("the red one", {"red": None}),
        ("is the picture a dog small?", {"small": None}),
        ("the sky is clear. Blue dogs", {"Blue": "dogs"}),
        ("something red, cats and dogs", {"red": None}),
        ("is the dog on the mat small?", {"small": None}),
        ("this is a dog small", {"small": None}),
        ("no adjective", {}),
        ("", {}),
    ],
)
def test_the_noun_of_an_adjective(text, expected):
    found = {adjective.text: noun and noun.text for adjective, noun in described_nouns(text).items()}
    assert found == expected


def test_of_equal_words_each_has_its_own():
    """Words are told apart by their characters."""
    text = "a red dog and a red cat"
    assert {adjective.start: noun and noun.start for adjective, noun in described_nouns(text).items()} == {2: 6, 16: 20}
