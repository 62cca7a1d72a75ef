"""Words of an answer in a rendered, tokenized, padded conversation: which rows predict them."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lavender.data.conversations import text_of
from lavender.errors import DataError
from lavender.students.locate import WordLocator
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture
from lavender.words import words_of
from lavender.world.student_models import MLLAMA_TEMPLATE, conversation

PROMPT = "is a dog here, a dog?"
ANSWER = "a watering can near a crocodile"


@pytest.fixture(scope="module")
def adapter(make_student):
    return adapter_for(make_student().config)


@pytest.fixture(scope="module")
def locator(processor, adapter) -> WordLocator:
    return WordLocator(processor, adapter)


def encode(processor, conversations: list[list[dict]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask (sample, token) of conversations, tokenized without pictures."""
    texts = [processor.apply_chat_template(one, tokenize=False) for one in conversations]
    encoded = processor.tokenizer(texts, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def predicted(processor, ids: torch.Tensor, rows: tuple[int, ...]) -> str:
    """The text of the tokens that rows predict, for which they stand one place to the left."""
    return processor.tokenizer.decode(ids[[row + 1 for row in rows]]).strip()


def locate(locator, messages, answers, ids, mask) -> tuple[list, Counter]:
    dropped: Counter[str] = Counter()
    return locator.rows(messages, answers, ids, mask, dropped), dropped


@pytest.mark.parametrize("side", ["left", "right"])
def test_words_of_several_tokens_and_padding(processor, locator, side):
    messages = conversation(PROMPT, ANSWER)
    longer = conversation(PROMPT, ANSWER * 3)
    ids, mask = encode(processor, [messages, longer], side)
    assert mask[0].sum() < mask[1].sum()
    found, dropped = locate(locator, messages, [(1, ANSWER, words_of(ANSWER))], ids[0], mask[0])
    assert dropped == {}
    assert [word.text for word, _ in found] == ANSWER.split()
    assert [predicted(processor, ids[0], rows) for _, rows in found] == ANSWER.split()
    assert max(len(rows) for _, rows in found) > 2
    last = int(mask[0].nonzero()[-1])
    assert found[-1][1][-1] == last - 2  # the last token but <|eot_id|>
    every = [row for _, rows in found for row in rows]
    assert every == sorted(set(every))
    between = set(range(every[0], every[-1] + 1)) - set(every)
    assert {processor.tokenizer.decode(ids[0, row + 1]) for row in between} <= {" "}  # a token that is a space alone


def test_padding_moves_rows_and_nothing_else(processor, locator):
    messages = conversation(PROMPT, ANSWER)
    rows = {}
    for side in ("left", "right"):
        ids, mask = encode(processor, [messages, conversation(PROMPT, ANSWER * 3)], side)
        shift = int(mask[0].argmax())
        found, _ = locate(locator, messages, [(1, ANSWER, words_of(ANSWER))], ids[0], mask[0])
        rows[side] = [tuple(row - shift for row in own) for _, own in found]
    assert shift == 0
    assert rows["left"] == rows["right"]


def test_words_beyond_a_cut_are_counted(processor, locator):
    messages = conversation(PROMPT, ANSWER)
    ids, mask = encode(processor, [messages])
    words = words_of(ANSWER)
    whole, _ = locate(locator, messages, [(1, ANSWER, words)], ids[0], mask[0])
    for cut in range(int(ids.shape[1]), whole[0][1][0], -1):  # cut ever more, to before the first word
        found, dropped = locate(locator, messages, [(1, ANSWER, words)], ids[0, :cut], mask[0, :cut])
        expected = [(word, rows) for word, rows in whole if rows[-1] + 1 < cut]
        assert found == expected
        assert dropped["word beyond max_length"] == len(words) - len(expected)
    assert found == []


def test_an_answer_that_also_stands_in_the_prompt(processor, locator):
    messages = conversation("a dog", "a dog")
    ids, mask = encode(processor, [messages])
    found, _ = locate(locator, messages, [(1, "a dog", words_of("a dog"))], ids[0], mask[0])
    answer_begins = int((ids[0] == processor.tokenizer.convert_tokens_to_ids("<|end_header_id|>")).nonzero()[-1])
    assert found[0][1][0] > answer_begins
    assert [predicted(processor, ids[0], rows) for _, rows in found] == ["a", "dog"]


def test_an_answer_that_is_the_name_of_its_role(processor, locator):
    messages = conversation("who?", "assistant")
    ids, mask = encode(processor, [messages])
    found, _ = locate(locator, messages, [(1, "assistant", words_of("assistant"))], ids[0], mask[0])
    end = int((ids[0] == processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")).nonzero()[-1])
    assert predicted(processor, ids[0], found[0][1]) == "assistant"
    assert found[0][1][-1] + 1 == end - 1


def test_several_turns(processor, locator):
    answers = ["a dog", "no, a dog", "a dog"]
    messages = []
    for turn, answer in enumerate(answers):
        messages += conversation(f"question {turn}: a dog", answer)
        if turn:
            messages[-2]["content"] = messages[-2]["content"][1:]  # one picture, in the first turn
    ids, mask = encode(processor, [messages])
    ends = (ids[0] == processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")).nonzero().flatten().tolist()
    rows = []
    for turn, answer in enumerate(answers):
        found, _ = locate(locator, messages, [(2 * turn + 1, answer, words_of(answer))], ids[0], mask[0])
        assert " ".join(predicted(processor, ids[0], own) for _, own in found) == answer.replace(",", "")
        assert ends[2 * turn] < found[0][1][0] < found[-1][1][-1] < ends[2 * turn + 1]
        rows += found
    together = [(2 * turn + 1, answer, words_of(answer)) for turn, answer in enumerate(answers)]
    assert locate(locator, messages, together, ids[0], mask[0])[0] == rows


def stripping(processor):
    """A processor whose template strips texts, as Llama-3.2-Vision's does."""
    other = copy.copy(processor)
    other.chat_template = MLLAMA_TEMPLATE.replace("part['text'] }}", "part['text'] | trim }}")
    assert other.chat_template != MLLAMA_TEMPLATE
    return other


@pytest.mark.parametrize("answer", ["  a dog", "a dog \n", "\n\na dog", " a dog "])
def test_templates_that_strip(processor, adapter, answer):
    strips = stripping(processor)
    messages = conversation("a dog? ", answer)
    ids, mask = encode(strips, [messages])
    found, _ = locate(WordLocator(strips, adapter), messages, [(1, answer, words_of(answer))], ids[0], mask[0])
    assert [predicted(processor, ids[0], rows) for _, rows in found] == ["a", "dog"]
    end = int((ids[0] == processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")).nonzero()[-1])
    assert found[-1][1][-1] + 1 == end - 1


def test_a_template_that_changes_the_answer_is_refused(processor, adapter):
    shouting = copy.copy(processor)
    shouting.chat_template = MLLAMA_TEMPLATE.replace("part['text'] }}", "part['text'] | upper }}")
    messages = conversation("hm?", "a dog")
    ids, mask = encode(shouting, [messages])
    with pytest.raises(DataError, match="Got a chat template that does not print the assistant's text 'a dog'"):
        locate(WordLocator(shouting, adapter), messages, [(1, "a dog", words_of("a dog"))], ids[0], mask[0])


def test_tokens_of_another_conversation_are_refused(processor, locator):
    messages = conversation(PROMPT, ANSWER)
    ids, mask = encode(processor, [conversation(PROMPT, "a dog")])
    with pytest.raises(DataError, match="Got a batch whose tokens differ from the tokenized conversation"):
        locate(locator, messages, [(1, ANSWER, words_of(ANSWER))], ids[0], mask[0])
    ids, mask = encode(processor, [messages])
    with pytest.raises(DataError, match="Got a batch whose tokens differ"):  # one token more than it has
        longer = torch.cat([ids[0], ids[0, -1:]])
        locate(locator, messages, [(1, ANSWER, words_of(ANSWER))], longer, torch.ones_like(longer))


def test_repeated_picture_tokens_do_not_matter(processor, locator):
    """Many processors repeat the placeholder, once for each patch."""
    messages = conversation(PROMPT, ANSWER)
    ids, mask = encode(processor, [messages])
    place = int((ids[0] == processor.image_token_id).nonzero()[0])
    repeated = torch.cat([ids[0, :place], ids[0, place].repeat(7), ids[0, place + 1 :]])
    found, _ = locate(locator, messages, [(1, ANSWER, words_of(ANSWER))], ids[0], mask[0])
    again, _ = locate(locator, messages, [(1, ANSWER, words_of(ANSWER))], repeated, torch.ones_like(repeated))
    assert [tuple(row + 6 for row in rows) for _, rows in found] == [rows for _, rows in again]


def test_words_before_the_picture_are_counted(processor, locator):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hello?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        *conversation("and here?", "a dog"),
    ]
    ids, mask = encode(processor, [messages])
    answers = [(1, "a dog", words_of("a dog")), (3, "a dog", words_of("a dog"))]
    found, dropped = locate(locator, messages, answers, ids[0], mask[0])
    place = int((ids[0] == processor.image_token_id).nonzero()[0])
    assert len(found) == 2
    assert all(rows[0] > place for _, rows in found)
    assert dropped == {"word before the picture, which its row cannot see": 2}


def test_letters_of_several_bytes(processor, locator):
    answer = "a café — naïve 🐕 dog"
    messages = conversation("ü?", answer)
    ids, mask = encode(processor, [messages])
    found, _ = locate(locator, messages, [(1, answer, words_of(answer))], ids[0], mask[0])
    assert [predicted(processor, ids[0], rows) for _, rows in found] == ["a", "café", "naïve", "dog"]


def test_a_slow_tokenizer_is_refused(adapter):
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(DataError, match="Got the slow tokenizer Slow. Expected a fast tokenizer"):
        WordLocator(SimpleNamespace(tokenizer=slow), adapter)  # ty: ignore[invalid-argument-type]


def test_text_of_messages():
    assert text_of("a dog") == "a dog"
    assert text_of([{"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "ab"
    assert text_of([{"type": "image", "text": None}, {"type": "text", "text": "a"}]) == "a"  # as data sets fill gaps
    assert text_of(None) == ""


def test_an_answered_picture_asks_about_one_picture():
    messages = AnsweredPicture(Image.new("RGB", (16, 16)), "what?", "a dog", ()).messages()
    assert messages == conversation("what?", "a dog")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_is_searched_once(processor, adapter, side, monkeypatch):
    """The same tokens with other padding have the same words; other words, texts or tokens are searched anew."""
    locator = WordLocator(processor, adapter)
    searched = []
    search = locator._locate
    monkeypatch.setattr(locator, "_locate", lambda *given: searched.append(given) or search(*given))
    messages, words = conversation(PROMPT, ANSWER), words_of(ANSWER)
    ids, mask = encode(processor, [messages, conversation(PROMPT, ANSWER * 3)], side)
    short = mask[0].bool()
    alone = locate(locator, messages, [(1, ANSWER, words)], ids[0][short], mask[0][short])
    padded = locate(locator, messages, [(1, ANSWER, words)], ids[0], mask[0])
    assert len(searched) == 1
    shift = int((~short).sum()) if side == "left" else 0
    assert padded == ([(word, tuple(row + shift for row in rows)) for word, rows in alone[0]], alone[1])
    assert locate(locator, messages, [(1, ANSWER, words[1:])], ids[0], mask[0])[0] == padded[0][1:]
    cut = mask[0] & (torch.arange(len(ids[0])) < int(short.nonzero()[-1]) - 3)
    for _ in range(2):  # what is dropped is counted again
        found, dropped = locate(locator, messages, [(1, ANSWER, words)], ids[0], cut)
        assert sum(dropped.values()) + len(found) == len(words)
        assert dropped
    assert len(searched) == 3


def test_the_words_that_are_remembered_are_bounded(processor, adapter, monkeypatch):
    monkeypatch.setattr("lavender.students.locate._REMEMBERED", 20)
    locator = WordLocator(processor, adapter)
    for number in range(1, 9):
        answer = " ".join(["dog"] * number)
        messages = conversation(PROMPT, answer)
        ids, mask = encode(processor, [messages])
        found, _ = locate(locator, messages, [(1, answer, words_of(answer))], ids[0], mask[0])
        assert len(found) == number
        held = [sum(map(len, known.places)) for known in locator._known.values()]
        assert sum(held) + len(held) == locator._num_known <= 20
        assert held[-1] == number
