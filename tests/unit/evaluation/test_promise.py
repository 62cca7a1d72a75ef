"""Verdicts from figures: where each of them begins, what it says, and how often verdicts were right."""

from __future__ import annotations

from typing import Any

import pytest

from lavender.evaluation.promise import LEAST_GAIN, LEAST_READ, Verdict, hits, promise


def figure(mean: float, margin: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "margin": margin}


def group(words: int = 100, **figures: Any) -> dict[str, Any]:
    plain = {
        "words": words,
        "pictures": 50,
        "loss": {"whole": figure(1.5)},
        "gain_of_place": figure(0.0),
        "over_control": figure(2.0),
        "attention_mass": figure(0.15),
        "read": {"there": figure(0.9), "control": figure(0.1), "whole": figure(0.1)},
        "gain_of_reading": figure(0.8),
        "read_words": words,
        "read_forms": 5,
        "read_pictures": 50,
        "alone": {},
    }
    return plain | figures


def result(known: dict | None, new: dict | None = None, hidden: dict | None = None) -> dict[str, Any]:
    words = sum(figures["words"] for figures in (known, new) if figures)
    return {"samples": 64, "groups": {"all": {"words": words}, "known": known, "new": new}, "hidden": hidden}


NOT_LOCAL, LOCAL = {"part": 0.1, "all": 2.0}, {"part": 1.0, "all": 2.0}


@pytest.mark.parametrize(
    ("figures", "hidden", "verdict", "says"),
    [
        ({"gain_of_place": figure(LEAST_GAIN + 0.02)}, None, "pays", "Align"),
        ({"gain_of_place": figure(LEAST_GAIN - 0.02)}, None, "no gain", "15% of its attention"),
        ({"gain_of_place": figure(0.5, 0.5)}, None, "cannot say", "check about 282 samples"),
        ({"gain_of_place": figure(LEAST_GAIN, 0.5)}, None, "cannot say", "check more than 7041 samples"),
        ({"pictures": 4}, None, "cannot say", "(--limit 128)"),
        ({"over_control": figure(0.0)}, NOT_LOCAL, "no gain", "all over the picture"),
        ({"over_control": figure(0.0)}, LOCAL, "cannot say", "the maps say nothing"),
        ({"over_control": figure(0.5, 1.0)}, LOCAL, "cannot say", "check about 282 samples"),
        ({"over_control": figure(0.0)}, {"part": 0.1, "all": 0.2}, "cannot say", "does not use the picture"),
    ],
)
def test_known_words(figures, hidden, verdict, says):
    found = promise(result(group(**figures), hidden=hidden))
    assert found.verdict == verdict
    assert says in found.reasons["known"]


UNREAD: dict[str, Any] = {"read": None, "gain_of_reading": None, "read_words": 0, "read_forms": 0, "read_pictures": 0}
LITTLE: dict[str, Any] = {"gain_of_reading": figure(LEAST_READ - 0.02)}


@pytest.mark.parametrize(
    ("figures", "known", "hidden", "verdict", "says"),
    [
        ({}, group(), None, "pays", "90% of the new words right from their places"),
        ({}, None, LOCAL, "pays", "90% of the new words right from their places"),
        ({}, group(over_control=figure(0.0)), NOT_LOCAL, "cannot say", "does not read known words from their places"),
        (LITTLE, group(), None, "no gain", "tell no more"),
        (LITTLE, group(over_control=figure(0.0)), NOT_LOCAL, "no gain", "keeps no thing in its place"),
        (LITTLE, group(over_control=figure(0.0)), LOCAL, "cannot say", "do not show these words"),
        (LITTLE | {"read_forms": 90}, group(), None, "cannot say", "too few samples per word (100 of 90 words)"),
        ({"gain_of_reading": figure(0.2, 0.2)}, group(), None, "cannot say", "check about 126 samples"),
        (UNREAD, group(), None, "cannot say", "that recur, beside another new word"),
        (UNREAD, group(over_control=figure(0.0)), NOT_LOCAL, "no gain", "no reading of new words"),
    ],
)
def test_new_words(figures, known, hidden, verdict, says):
    found = promise(result(known, group(**figures), hidden))
    assert found.verdict == verdict
    assert says in found.reasons["new"]


def test_a_few_new_words_decide_nothing_unless_they_pay():
    """Words like "there is" are as hard to predict as new names."""
    unclear = {"gain_of_reading": figure(0.2, 0.2)}
    assert promise(result(group(), group(24, **unclear))).verdict == "no gain"
    assert promise(result(group(), group(26, **unclear))).verdict == "cannot say"
    assert promise(result(group(), group(5))).verdict == "pays"


def test_a_new_word_that_has_none_to_be_told_from_cannot_say():
    """More samples of it would not help."""
    found = promise(result(group(), group(**UNREAD, alone={"wug": 100})))
    assert found.verdict == "cannot say"
    assert "nothing to tell wug from" in found.reasons["new"]
    assert "at least one other such word" in found.reasons["new"]
    assert "--limit" not in found.reasons["new"]
    few_read: dict[str, Any] = LITTLE | {"read_words": 40, "alone": {"wug": 60}}
    assert promise(result(group(), group(**few_read))).verdict == "cannot say"
    most_read: dict[str, Any] = LITTLE | {"read_words": 60, "alone": {"wug": 40}}
    assert promise(result(group(), group(**most_read))).verdict == "no gain"


@pytest.mark.parametrize(
    "few",
    [
        {"words": 1, "pictures": 1, "over_control": {"mean": 2.0, "margin": None}},
        {"words": 40, "pictures": 7, "over_control": figure(0.0)},
        {"words": 19, "pictures": 19, "over_control": figure(0.0)},
    ],
)
def test_few_known_words_do_not_speak_against_new_ones(few):
    found = promise(result(group(**few), group(80), LOCAL))
    assert found.verdict == "pays"
    assert "Align these words" in found.reasons["new"]


def test_enough_known_words_speak_against_new_ones():
    known = group(words=20, pictures=8, over_control=figure(0.0))
    assert promise(result(known, group(80), LOCAL)).verdict == "cannot say"


def test_hit_rate():
    outcomes: list[tuple[Verdict, bool]] = [("pays", True), ("pays", False), ("no gain", False), ("no gain", False)]
    outcomes.append(("cannot say", True))
    assert hits(outcomes) == {"right": 3, "wrong": 1, "open": 1, "hit_rate": 0.75}
    assert hits([("cannot say", True)])["hit_rate"] is None
