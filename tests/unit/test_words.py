"""Words of a text: spans, lemmas, parts of speech; which tokens a word has."""

from __future__ import annotations

import pytest

from lavender.words import content_words, same_root, subjects_and_objects, token_span, words_of


def parts(text: str) -> list[tuple[str, str, str]]:
    return [(word.text, word.lemma, word.part_of_speech) for word in words_of(text)]


def test_spans_lemmas_and_parts_of_speech():
    text = "A dog chases two small cats, happily."
    words = words_of(text)
    assert [(word.start, word.end) for word in words] == [
        (0, 1), (2, 5), (6, 12), (13, 16), (17, 22), (23, 27), (29, 36),
    ]  # fmt: skip
    assert parts(text) == [
        ("A", "a", "other"),
        ("dog", "dog", "noun"),
        ("chases", "chase", "verb"),
        ("two", "two", "other"),
        ("small", "small", "adjective"),
        ("cats", "cat", "noun"),
        ("happily", "happily", "other"),
    ]


def test_irregular_lemmas_and_lower_case():
    assert parts("The Geese and mice ran")[1:] == [
        ("Geese", "goose", "noun"), ("and", "and", "other"), ("mice", "mouse", "noun"), ("ran", "run", "verb"),
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["red-haired", "children's", "don’t", "mother-in-law's"])
def test_hyphens_and_apostrophes_stay_inside_a_word(word):
    text = f"the {word}-"
    assert [(one.text, one.start, one.end) for one in words_of(text)][1:] == [(word, 4, 4 + len(word))]


def test_numbers_and_signs_are_no_words_and_cut_words():
    assert [word.text for word in words_of("3 x2 v2.0 a_b ... 'dog' - 7th")] == ["x", "v", "a", "b", "dog", "th"]


@pytest.mark.parametrize("text", ["", "   \n", "犬が走る。", "Собака бежит", "1, 2 — 3!", "🐕"])
def test_a_text_without_latin_letters_has_no_words(text):
    assert words_of(text) == ()
    assert content_words(text, ("noun", "adjective", "verb", "other")) == ()


def test_latin_words_between_others_keep_their_place():
    assert [(word.text, word.start) for word in words_of("狗 dog 猫 Hündin")] == [("dog", 2), ("Hündin", 8)]


def test_two_thousand_words():
    text = " ".join(["dog", "runs"] * 1000)
    words = words_of(text)
    assert len(words) == 2000
    assert (words[1998].start, words[1999].end) == (999 * 9, len(text))
    assert all(text[word.start : word.end] == word.text for word in words)


def test_content_words_are_chosen_by_part_of_speech_and_keep_repetitions():
    text = "a small dog chases a small dog"
    assert [word.text for word in content_words(text, ("noun",))] == ["dog", "dog"]
    assert [word.start for word in content_words(text, ("noun",))] == [8, 27]
    assert [word.text for word in content_words(text, ("verb", "adjective"))] == ["small", "chases", "small"]
    assert content_words(text, ()) == ()


def test_token_span_is_overlap():
    #           special  "a"     " do"   "gs"    "."     special
    offsets = [(0, 0), (0, 1), (1, 4), (4, 6), (6, 7), (0, 0)]
    assert token_span(offsets, 2, 6) == [2, 3]  # " do" begins before the word
    assert token_span(offsets, 0, 1) == [1]  # ends where " do" begins
    assert token_span(offsets, 4, 5) == [3]  # a part of one token
    assert token_span(offsets, 6, 7) == [4]
    assert token_span(offsets, 7, 9) == []


def test_a_token_over_two_words_belongs_to_both():
    offsets = [(0, 7), (7, 9)]
    assert token_span(offsets, 0, 3) == [0]
    assert token_span(offsets, 4, 9) == [0, 1]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (" dogs", "Dog.", True), ("geese", "goose", True), ("ran", "run", True), ("rides", "rode", True),
        ("dog", "cat", False), ("", "dog", False), ("!", "!", False), ("dog house", "dog", True),
    ],
)  # fmt: skip
def test_forms_of_one_word(one, other, same):
    assert same_root(one, other) == same


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        ("A man in a red shirt is riding a brown horse on the beach", ["man", "horse"]),
        ("Two dogs chase a ball", ["dogs", "ball"]),
        ("On the left there is a cat and a dog", ["cat", "dog"]),
        ("The woman gives the boy an apple", ["woman", "boy", "apple"]),
        ("a red car next to a small house", ["car"]),
        ("a photo of a cat", ["photo"]),
        ("Children eating ice cream in the park", ["Children", "cream"]),
        ("in the park. he sees dogs", ["dogs"]),
        ("with a cat and a hat; a dog", ["dog"]),
        ("in front of", []),
        ("", []),
    ],
)
def test_subjects_and_objects(text, heads):
    starts = subjects_and_objects(text)
    assert [word.text for word in words_of(text) if word.start in starts] == heads
