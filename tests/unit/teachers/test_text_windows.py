"""Texts for the teacher: windows of long ones, and which tokens carry which word."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTokenizer

from lavender.teachers.diffusion.base import tokenized
from lavender.teachers.diffusion.text_windows import Window, indicator, window_of, windows
from lavender.words import words_of
from lavender.world import TEACHER_PATH

LONG = " ".join(["A dog sits near a cat. the red apple is here;", "is it? yes!\n\n"] * 40)
LIMIT = 48


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """The world's: CLIP's, of 48 tokens, in which longer words have several."""
    return CLIPTokenizer.from_pretrained(TEACHER_PATH / "tokenizer")


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "A dog. ",
        "  a dog\n",
        "...",
        "",
        "wow!!! a dog?! no",
        LONG,
        LONG.replace(".", "").replace(";", ""),
        "one sentence " * 80,
        "犬。" * 60,
        "no-end" * 30 + " and then a dog",
    ],
)
def test_windows_join_to_the_text(tokenizer, text):
    spans = windows(tokenizer, text, LIMIT)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(start < end for start, end in spans)


@pytest.mark.parametrize("text", [LONG, LONG.replace(".", ""), "one sentence " * 80])
@pytest.mark.parametrize("limit", [48, 19])
def test_windows_fit_the_text_encoder(tokenizer, text, limit):
    spans = windows(tokenizer, text, limit)
    assert max(len(tokenizer(text[start:end])["input_ids"]) for start, end in spans) <= limit
    total = len(tokenizer(text, verbose=False)["input_ids"])
    assert len(spans) <= 3 * total / (limit - 2)  # they are filled, at least by a third
    assert all(text[end - 1] in " \n" or end == len(text) for _, end in spans)  # no word is cut


def test_sentences_stay_whole_where_they_fit(tokenizer):
    for start, end in windows(tokenizer, "a dog is here. " * 20, LIMIT):
        assert start % 15 == 0
        assert end % 15 == 0


def window(tokenizer, text: str, carrier="own", start: int = 0, words=None):
    given = words_of(text) if words is None else words
    return window_of(lambda part: tokenized(tokenizer, part, LIMIT), 3, text, start, given, carrier)


def test_tokens_of_words_by_hand(tokenizer):
    """Start, then each word's pieces in order (a · z e b r a · , · a · dog), the end."""
    text = "a zebra, a dog"
    row, lost = window(tokenizer, text)
    assert (row.job, row.text, lost) == (3, text, [])
    assert [word.text for word in row.words] == ["a", "zebra", "a", "dog"]
    assert list(row.tokens) == [(1,), (2, 3, 4, 5, 6), (8,), (9,)]
    assert row.content == tuple(range(1, 10))  # neither start nor end


def test_the_next_token_also_carries_a_word(tokenizer):
    own, _ = window(tokenizer, "a zebra, a dog")
    more, _ = window(tokenizer, "a zebra, a dog", carrier="own+next")
    for narrow, wide in zip(own.tokens[:-1], more.tokens[:-1], strict=True):
        assert wide == (*narrow, narrow[-1] + 1)
    assert more.tokens[-1] == own.tokens[-1]  # after the last word there is only the end, which is no token of the text
    assert more.content == own.content


def test_words_stand_where_they_stand_in_the_whole_text(tokenizer):
    text = "one dog. a cat"
    words = words_of(text)
    row, lost = window(tokenizer, text[9:], start=9, words=words[2:])
    assert not lost
    assert [word.start for word in row.words] == [9, 11]
    assert row.tokens[1][0] == row.tokens[0][-1] + 1


def test_a_word_beyond_the_limit_is_lost_and_told(tokenizer):
    text = "xq" * 30 + "-dog and cat"
    row, lost = window(tokenizer, text)
    assert [word.text for word in row.words] == ["xq" * 30 + "-dog"]
    assert [word.text for word in lost] == ["and", "cat"]
    assert max(row.tokens[0]) == LIMIT - 2


@pytest.mark.parametrize(
    "text", ["a \ud800 dog", "\udfffdog", "a cafe\u0301 dog", "\ufeffa d\u00adog\x00", "a \u0130 dog"]
)
def test_words_of_odd_texts_have_their_tokens(tokenizer, text):
    assert windows(tokenizer, text, LIMIT) == [(0, len(text))]
    row, lost = window(tokenizer, text)
    assert [word.text for word in (*row.words, *lost)] == [word.text for word in words_of(text)]
    assert not lost
    row.text.encode()


def test_a_text_that_tokens_of_pieces_overfill_is_still_filled(tokenizer):
    """Signs side by side may be one token where each has its own by itself."""
    text = "a dog.) " * 20
    spans = windows(tokenizer, text, 19)
    counts = [len(tokenizer(text[start:end])["input_ids"]) for start, end in spans]
    assert max(counts) <= 19
    assert all(len(tokenizer(text[start : end + 8])["input_ids"]) > 19 for start, end in spans[:-1])


def test_indicator_by_hand():
    """Two rows with one and two words, seven tokens; the last column is the mean of all the text's."""
    words = words_of("a dog")
    rows = [
        Window(0, "a", words[:1], ((1, 2),), (1, 2, 3)),
        Window(1, "b", words, ((1,), (2, 4, 5)), (1, 2, 3, 4)),
    ]
    values, counts = indicator(rows, 7)
    third = 1 / 3
    assert counts.tolist() == [[2, 1, 3], [1, 3, 4]]
    torch.testing.assert_close(
        values[0].T,
        torch.tensor(
            [
                [0, 0.5, 0.5, 0, 0, 0, 0],
                [0] * 7,
                [0, third, third, third, 0, 0, 0],
            ]
        ),
    )
    torch.testing.assert_close(
        values[1].T,
        torch.tensor(
            [
                [0, 1.0, 0, 0, 0, 0, 0],
                [0, 0, third, 0, third, third, 0],
                [0, 0.25, 0.25, 0.25, 0.25, 0, 0],
            ]
        ),
    )


def test_columns_are_those_of_one_window(tokenizer):
    """A long text has no more columns than its widest window has words, and so costs no more than its length."""
    text = " ".join(["the dog and red cats."] * 40)
    words = words_of(text)
    rows = [
        window(tokenizer, text[start:end], "own", start, [word for word in words if start <= word.start < end])[0]
        for start, end in windows(tokenizer, text, LIMIT)
    ]
    values, _ = indicator(rows, LIMIT)
    assert values.shape[2] == max(len(row.words) for row in rows) + 1 <= LIMIT - 1
    assert sum(len(row.words) for row in rows) == len(words) == 200
