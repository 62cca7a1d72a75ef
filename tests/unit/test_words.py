"""Words of a text: spans, lemmas, parts of speech; which tokens a word has."""

from __future__ import annotations

import unicodedata

import pytest

from lavender.words import LONGEST, content_words, same_root, subjects_and_objects, token_span, too_long, words_of


def parts(text: str) -> list[tuple[str, str, str]]:
    return [(word.text, word.lemma, word.part_of_speech) for word in words_of(text)]


def test_spans_lemmas_and_parts_of_speech():
    text = "A dog chases two small cats, happily."
    words = words_of(text)
    assert [(word.start, word.end) for word in words] == [
        (0, 1),
        (2, 5),
        (6, 12),
        (13, 16),
        (17, 22),
        (23, 27),
        (29, 36),
    ]
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
        ("Geese", "goose", "noun"),
        ("and", "and", "other"),
        ("mice", "mouse", "noun"),
        ("ran", "run", "verb"),
    ]


@pytest.mark.parametrize("word", ["red-haired", "children's", "don’t", "mother-in-law's", "Hawai\u02bbi"])
def test_hyphens_and_apostrophes_stay_inside_a_word(word):
    text = f"the {word}-"
    assert [(one.text, one.start, one.end) for one in words_of(text)][1:] == [(word, 4, 4 + len(word))]


def test_numbers_and_signs_are_no_words_and_cut_words():
    assert [word.text for word in words_of("3 x2 v2.0 a_b ... 'dog' - MP3")] == ["x", "v", "a", "b", "dog", "MP"]


@pytest.mark.parametrize("text", ["7th", "1980s", "10am", "50mm", "3D", "747s", "2½x", "4 x 5k", "9ft"])
def test_letters_after_a_digit_are_no_word(text):
    assert [word.text for word in words_of(text)] in ([], ["x"])  # "4 x 5k" has an x of its own
    assert [word.text for word in words_of(f"a {text}-high tower of the {text} century")] == [
        *["a", *(["x"] if " x " in text else []), "high", "tower", "of", "the"],
        *[*(["x"] if " x " in text else []), "century"],
    ]


def test_marks_of_scripts_without_spaces_join_no_word():
    assert [word.text for word in words_of("スーパーmarket, 佐々dog and すゝcat")] == ["market", "dog", "and", "cat"]


VERBS = ("is", "are", "do", "does", "ca", "wo", "ai", "has")
PRONOUNS = ("it's", "that's", "there's", "what's", "who's", "here's", "let's", "I'm", "he'll", "you've", "they're")
CONTRACTIONS = [*(f"{verb}n't" for verb in VERBS), *PRONOUNS]


@pytest.mark.parametrize("sign", ["'", "\u2019", "\u02bc", "&rsquo;"])
def test_contractions_name_nothing(sign):
    for word in CONTRACTIONS:
        written = word.replace("'", sign)
        for text in (f"{written[0].upper()}{written[1:]} a dog.", f"I think {written} a big dog"):
            found = [one for one in words_of(text) if one.text.lower() == written.lower()]
            assert [one.part_of_speech for one in found] == ["other"], text
            assert len(words_of(text)) == len(text.split()), text


@pytest.mark.parametrize("text", ["he cannot", "theres it", "he dont", "do n't", "it 's", "ISN'T", "y'all"])
def test_contractions_written_otherwise_name_nothing(text):
    assert content_words(text, ("noun", "adjective")) == ()


@pytest.mark.parametrize("sign", ["'", "\u2019", "\uff07", "`", "&#39;"])
def test_a_possessive_is_its_noun(sign):
    text = "the dog's bowl, a woman's hat, James's children's toys, two dogs' balls, the dog'll run".replace("'", sign)
    nouns = {one.lemma: one for one in words_of(text) if one.part_of_speech == "noun"}
    assert list(nouns) == ["dog", "bowl", "woman", "hat", "james", "child", "toy", "ball"]
    assert [text[one.start : one.end] for one in nouns.values()] == [one.text for one in nouns.values()]
    assert nouns["woman"].text == f"woman{sign}s"  # with its clitic
    assert words_of(f"the dogs{sign} balls")[1].text == "dogs"
    assert [one.text for one in content_words("the man 's dog", ("noun",))] == ["man", "dog"]


def test_names_and_words_with_apostrophes():
    assert parts("O’Brien likes rock’n’roll at five o’clock") == [
        ("O’Brien", "o'brien", "noun"),
        ("likes", "like", "verb"),
        ("rock’n’roll", "rock'n'roll", "noun"),
        ("at", "at", "other"),
        ("five", "five", "other"),
        ("o’clock", "o'clock", "other"),
    ]


@pytest.mark.parametrize(
    ("text", "lemmas"),
    [
        ("a nai\u0308ve dog", ["a", "naïve", "dog"]),
        ("A\u030angstro\u0308m", ["ångström"]),
        ("d\u0301\u0302og", ["dog"]),
        ("d\u00adog d\u200bog do\u200dg \ufeffdog\u2060", ["dog"] * 4),
        ("t\u2011shirt t\u2010shirt", ["t-shirt"] * 2),
        ("\ufb01sh", ["fish"]),
        ("\uff44\uff4f\uff47 \U0001d41d\U0001d428\U0001d420", ["dog"] * 2),
        ("caf&eacute;&nbsp;&amp;&amp;nbsp;dog", ["café", "dog"]),
        ("&lt;b&gt;dog&lt;/b&gt;", ["dog"]),
        ("dog&amp cat &unknown; R&D", ["dog", "cat", "unknown", "r", "d"]),
        ("AT&T;", ["at", "t"]),
        ("<b>dog</b><br/>cat<a href='x y'>hat</a><!-- no -->", ["dog", "cat", "hat"]),
        ("<|endoftext|>dog</s><image> [INST]cat[/INST] <|a b|>", ["dog", "cat"]),
        ("a<b and c>d", ["a", "b", "and", "c", "d"]),
        ("dogs < cats > hats", ["dog", "cat", "hat"]),
        ("dog https://cat.example/hat?x=y, (www.hat.com) cat", ["dog", "cat"]),
        ("me@dog.com @cat #dog", ["dog"]),
        ("dog IMG_1234.jpg a/b/cat.PNG ../cat/hat ~/cat C:\\cat", ["dog"]),
        ("dog.com and/or cat. The hat", ["and", "or", "cat", "the", "hat"]),
        ("一只dog在 كلبdog", ["dog", "dog"]),
        ("x² dog™ ½ 1º", ["x", "dog"]),
        ("\ud800dog \ud83d\ude00", ["dog"]),
        ("dog\u2028cat\x00hat", ["dog", "cat", "hat"]),
    ],
)
def test_what_is_a_word_and_how_it_is_read(text, lemmas):
    words = words_of(text)
    assert [word.lemma for word in words] == lemmas
    assert all(text[word.start : word.end] == word.text for word in words)


@pytest.mark.parametrize("text", ["eine schöne Brücke über den Fluß", "Người đàn ông với con chó", "a café’s señor"])
def test_accents_apart_are_the_same_words(text):
    composed, apart = (words_of(unicodedata.normalize(form, text)) for form in ("NFC", "NFD"))
    assert [(one.lemma, one.part_of_speech) for one in apart] == [(one.lemma, one.part_of_speech) for one in composed]
    assert [unicodedata.normalize("NFC", one.text) for one in apart] == [one.text for one in composed]
    assert len(composed) == len(text.split())


def test_a_word_without_end_is_left_out_and_named():
    text = f"a {'x' * 6000} dog, {'狗' * 100} {'ab' * (LONGEST // 2)}"
    assert [word.text for word in words_of(text)] == ["a", "dog", "ab" * (LONGEST // 2)]
    assert [(one.what, one.reason) for one in too_long(text)] == [("x" * 20 + "…", "a word of more than 64 characters")]


@pytest.mark.parametrize("part", ["&", "<", "<a ", "a@", "a.", "@", "http:", "&amp;", "\u200b", "e\u0301", "[", "' "])
def test_a_long_text_takes_linear_time(part):
    """Each of these is a beginning of what is left out; a search that began anew at each would never end."""
    text = part * (1000 if part[0] in "aeh<'" else 20_000)
    assert all(text[word.start : word.end] == word.text for word in words_of(text))


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
        (" dogs", "Dog.", True),
        ("geese", "goose", True),
        ("ran", "run", True),
        ("rides", "rode", True),
        ("dog", "cat", False),
        ("", "dog", False),
        ("!", "!", False),
        ("dog house", "dog", True),
    ],
)
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
        ("In the park there's a dog", ["dog"]),
        ("In the park the dog isn’t with a cat", []),
        ("the dog's ball", ["ball"]),
        ("the dog 's ball", ["ball"]),
        ("with a cat https://x.org/a;b dog", []),
        ("with a cat &amp; a dog", []),
    ],
)
def test_subjects_and_objects(text, heads):
    starts = subjects_and_objects(text)
    assert [word.text for word in words_of(text) if word.start in starts] == heads
