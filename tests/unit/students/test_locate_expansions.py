"""Words in sequences whose placeholders grew into other text, with each kind of tokenizer that VLMs have.

The oracle is the expanded text itself: tokenized with offsets, it says where each word's tokens are. The locator
sees the token ids and the conversation alone.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from lavender.data.conversations import text_of
from lavender.errors import DataError
from lavender.maps import Word
from lavender.students.locate import BEYOND, CHANGED, UNKNOWN, UNSEEN, WordLocator
from lavender.words import words_of
from tokenizer_kinds import TOKENIZERS, tokenizer_of


@dataclass(frozen=True)
class Expansion:
    """What a template prints for a picture, the placeholder in it, what that becomes, and the picture's token."""

    printed: str
    placeholder: str
    becomes: str
    token: str


EXPANSIONS = {
    "mllama": Expansion("<image>", "<image>", "<image>", "<image>"),
    "llava": Expansion("<image>\n", "<image>", "<image>" * 7, "<image>"),
    "qwen": Expansion("<start><image></start>", "<image>", "<image>" * 5, "<image>"),
    "internvl": Expansion("<image>\n", "<image>", "<start>" + "<image>" * 8 + "</start>", "<image>"),
    "idefics3": Expansion(
        "<image>",
        "<image>",
        "<start><row_1_col_1><image><image><start><row_1_col_2><image><image>\n\n<start><global><image><image><start>",
        "<image>",
    ),
    "gemma3": Expansion("<start>", "<start>", "\n\n<start>" + "<patch>" * 6 + "</start>\n\n", "<patch>"),
    "gemma3, crops": Expansion(
        "<start>",
        "<start>",
        "Here is the original image \n\n<start><patch><patch></start>\n\n and here are some crops to help you see "
        "better \n\n<start><patch><patch></start>\n\n \n\n<start><patch><patch></start>\n\n",
        "<patch>",
    ),
    "minicpm": Expansion(
        "(<image>)\n",
        "<image>",
        "<row_1_col_1>0<row_1_col_2><start><image></start><start><image></start>\n<start><image></start>",
        "<image>",
    ),
}

TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{{- message['role'] + ': ' }}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- PICTURE }}{%- else %}{{- part['text'] }}{%- endif %}{%- endfor %}"
    "{{- eos_token if message['role'] == 'assistant' else '\n' }}{%- endfor %}"
)


class TextProcessor(ProcessorMixin):
    """The part of a processor that knows text."""

    def __init__(self, tokenizer, chat_template=None, image_token=""):
        self.tokenizer, self.chat_template, self.image_token = tokenizer, chat_template, image_token


@pytest.fixture(scope="module", params=[kind for kind in TOKENIZERS if kind != "unigram, always"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return tokenizer_of(request.param)


def locator_of(tokenizer, expansion: Expansion, template: str = TEMPLATE) -> WordLocator:
    processor = TextProcessor(tokenizer, template.replace("PICTURE", repr(expansion.printed)), expansion.placeholder)
    token = tokenizer.convert_tokens_to_ids(expansion.token)
    return WordLocator(processor, SimpleNamespace(image_token_id=lambda: token))  # ty: ignore[invalid-argument-type]


def turn(role: str, *parts: str | None) -> dict:
    """A message; None is a picture."""
    return {
        "role": role,
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
    }


def written(messages: list[dict], expansion: Expansion) -> tuple[str, dict[int, int]]:
    """The expanded text by hand, and where each turn's text begins."""
    text, starts = "<bos>", {}
    for number, message in enumerate(messages):
        text += message["role"] + ": "
        for part in message["content"]:
            if part["type"] == "image":
                text += expansion.printed.replace(expansion.placeholder, expansion.becomes)
            else:
                starts[number] = len(text)
                text += part["text"]
        text += "<eos>" if message["role"] == "assistant" else "\n"
    return text, starts


def encoded(tokenizer, text: str) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return torch.tensor(found["input_ids"]), found["offset_mapping"]


def expected(offsets, start: int, word: Word) -> tuple[int, ...]:
    """The rows before the tokens that have a character of the word."""
    first, last = start + word.start, start + word.end
    return tuple(
        place - 1 for place, (one, other) in enumerate(offsets) if one < last and other > first and other > one
    )


SAME = "a dog near the café"
CONVERSATIONS = {
    "one turn": [turn("user", None, "what is in the picture?"), turn("assistant", "a watering can near a crocodile.")],
    "newlines at the borders": [turn("user", "here:\n", None, "\nand now?"), turn("assistant", "no, a dog!\n\n")],
    "the answer everywhere": [
        turn("user", SAME, None, SAME),
        turn("assistant", SAME),
        turn("user", SAME),
        turn("assistant", SAME),
    ],
    "two pictures": [
        turn("user", None, None, "what?"),
        turn("assistant", SAME),
        turn("user", "and", None),
        turn("assistant", SAME),
    ],
    "pictures with a word between": [turn("user", None, " and ", None, "?"), turn("assistant", SAME)],
    "a picture last": [turn("user", "what", None), turn("assistant", "assistant: an old, well-known dog")],
}


def all_answers(messages: list[dict]) -> list[tuple[int, str, tuple[Word, ...]]]:
    texts = [(number, message["content"][-1]["text"]) for number, message in enumerate(messages) if number % 2]
    return [(number, text, words_of(text)) for number, text in texts]


def rows_of(locator, messages, answers, ids, mask=None, **options) -> tuple[list, Counter[str]]:
    dropped: Counter[str] = Counter()
    mask = torch.ones_like(ids) if mask is None else mask
    return locator.rows(messages, answers, ids, mask, dropped, **options), dropped


@pytest.mark.parametrize("case", list(CONVERSATIONS))
@pytest.mark.parametrize("family", list(EXPANSIONS))
def test_every_word_is_where_the_expanded_text_has_it(tokenizer, family, case):
    expansion, messages = EXPANSIONS[family], CONVERSATIONS[case]
    text, starts = written(messages, expansion)
    ids, offsets = encoded(tokenizer, text)
    answers = all_answers(messages)
    found, dropped = rows_of(locator_of(tokenizer, expansion), messages, answers, ids)
    assert not dropped
    wanted = [(word, expected(offsets, starts[number], word)) for number, _, words in answers for word in words]
    assert found == wanted
    assert len(wanted) > 2


@pytest.mark.parametrize("case", list(CONVERSATIONS))
@pytest.mark.parametrize("family", ["mllama", "llava", "qwen", "idefics3", "gemma3, crops"])
def test_the_rows_of_an_answer_reach_to_the_end(tokenizer, family, case):
    """Those before the tokens with a character of the last answer, and before the end token."""
    expansion, messages = EXPANSIONS[family], CONVERSATIONS[case]
    text, starts = written(messages, expansion)
    ids, offsets = encoded(tokenizer, text)
    last = len(messages) - 1
    padded = torch.cat([torch.zeros(3, dtype=torch.long), ids])
    mask = torch.cat([torch.zeros(3, dtype=torch.long), torch.ones_like(ids)])
    found = locator_of(tokenizer, expansion).rows_to_end(messages, last, padded, mask)
    wanted = [place for place, (start, end) in enumerate(offsets) if end > starts[last] and end > start]
    assert found == tuple(place + 3 - 1 for place in wanted)
    assert wanted[-1] == len(ids) - 1
    assert (
        tokenizer.decode(ids[wanted], skip_special_tokens=True).strip() == messages[last]["content"][-1]["text"].strip()
    )


def test_a_text_that_no_tokenizer_takes_has_no_rows_to_the_end(tokenizer):
    expansion = EXPANSIONS["llava"]
    locator = locator_of(tokenizer, expansion)
    for answer in ("", "a dog \ud83d"):
        messages = [turn("user", None, "what?"), turn("assistant", answer)]
        ids, _ = encoded(tokenizer, written(messages, expansion)[0].encode(errors="replace").decode())
        assert locator.rows_to_end(messages, 1, ids, torch.ones_like(ids)) == ()


@pytest.mark.parametrize("case", list(CONVERSATIONS))
@pytest.mark.parametrize("family", ["llava", "qwen", "idefics3", "gemma3"])
def test_a_space_before_every_piece(family, case):
    """Old Llama tokenizers set one after each special token, before a processor's own newline too: refused."""
    tokenizer, expansion, messages = tokenizer_of("unigram, always"), EXPANSIONS[family], CONVERSATIONS[case]
    text, starts = written(messages, expansion)
    ids, offsets = encoded(tokenizer, text)
    locator, answers = locator_of(tokenizer, expansion), all_answers(messages)
    if family == "gemma3":
        with pytest.raises(DataError, match="tokens differ"):
            rows_of(locator, messages, answers, ids)
    else:
        wanted = [(word, expected(offsets, starts[number], word)) for number, _, words in answers for word in words]
        assert rows_of(locator, messages, answers, ids)[0] == wanted


@pytest.mark.parametrize("family", list(EXPANSIONS))
def test_cut_and_padded_anywhere(tokenizer, family):
    """Whatever remains is found, whatever does not is counted; padding shifts rows."""
    expansion, messages = EXPANSIONS[family], CONVERSATIONS["two pictures"]
    locator, answers = locator_of(tokenizer, expansion), all_answers(messages)
    text, starts = written(messages, expansion)
    ids, offsets = encoded(tokenizer, text)
    wanted = [(word, expected(offsets, starts[number], word)) for number, _, words in answers for word in words]
    pad = torch.full((3,), tokenizer.pad_token_id)
    says_more = family in (
        "gemma3, crops",
        "minicpm",
    )  # cut within the processor's own sentences, a sequence may be refused
    for cut in range(len(ids), 0, -1):
        remaining = [(word, rows) for word, rows in wanted if rows[-1] + 1 < cut]
        for left, right in ((0, 0), (3, 0), (0, 3)) if cut % 19 == 0 else ((0, 0),):
            padded = torch.cat([pad[:left], ids[:cut], pad[:right]])
            mask = torch.cat([torch.zeros(left), torch.ones(cut), torch.zeros(right)]).long()
            try:
                found, dropped = rows_of(locator, messages, answers, padded, mask)
            except DataError:
                assert says_more, cut
                continue
            assert found == [(word, tuple(row + left for row in rows)) for word, rows in remaining], cut
            assert sum(dropped.values()) == len(wanted) - len(remaining)
            assert set(dropped) <= {BEYOND}


def test_words_come_after_their_picture(tokenizer):
    expansion, messages = EXPANSIONS["idefics3"], CONVERSATIONS["two pictures"]
    ids, _ = encoded(tokenizer, written(messages, expansion)[0])
    locator, answers = locator_of(tokenizer, expansion), all_answers(messages)
    first, second = (rows_of(locator, messages, [answer], ids)[0] for answer in answers)
    number = len(answers[0][2])
    both = first + second
    for pictures, found in (
        ((0, 0), both),
        ((1, 1), both),
        ((2, 2), second),
        ((0, 2), both),
        ((2, 0), second),
        ((3, 3), []),
    ):
        again, dropped = rows_of(locator, messages, answers, ids, pictures=pictures)
        assert again == found
        assert dropped == Counter({UNSEEN: 2 * number - len(found)})


def test_text_alone_has_no_words_that_see(tokenizer):
    messages = [turn("user", "what?"), turn("assistant", SAME)]
    ids, _ = encoded(tokenizer, written(messages, EXPANSIONS["qwen"])[0])
    found, dropped = rows_of(locator_of(tokenizer, EXPANSIONS["qwen"]), messages, all_answers(messages), ids)
    assert found == []
    assert dropped == {UNSEEN: len(words_of(SAME))}


def test_letters_of_several_tokens(tokenizer):
    """Chinese, of which a letter may be three tokens; the words are of the test's own."""
    answer = "看见一只狗 naïve"
    words = (Word("见", 1, 2, "", "other"), Word("只狗", 3, 5, "", "other"), Word("naïve", 6, 11, "", "other"))
    messages = [turn("user", None, "看"), turn("assistant", answer)]
    expansion = EXPANSIONS["gemma3"]
    text, starts = written(messages, expansion)
    ids, offsets = encoded(tokenizer, text)
    found, dropped = rows_of(locator_of(tokenizer, expansion), messages, [(1, answer, words)], ids)
    assert not dropped
    assert found == [(word, expected(offsets, starts[1], word)) for word in words]
    assert max(len(rows) for _, rows in found) >= 3


def test_an_answer_in_parts(tokenizer):
    """A picture stands between the parts: words of the second part alone come after it."""
    expansion = EXPANSIONS["qwen"]
    messages = [turn("user", "what?"), turn("assistant", "a dog", None, "near a crocodile")]
    text, _ = written(messages, expansion)
    ids, offsets = encoded(tokenizer, text)
    answer = text_of(messages[1]["content"])
    assert answer == "a dog near a crocodile", "a space stands for the picture"
    words = words_of(answer)[0], *words_of(answer)[2:]
    found, dropped = rows_of(locator_of(tokenizer, expansion), messages, [(1, answer, words)], ids)
    assert dropped == {UNSEEN: 1}
    assert found == [(word, expected(offsets, text.index("near a") - 6, word)) for word in words[1:]]


def test_a_start_that_the_template_does_not_print(tokenizer):
    """Some processors put the token themselves; Mllama's after the pictures, where these come first."""
    expansion, bare = EXPANSIONS["mllama"], TEMPLATE.replace("{{- bos_token }}", "")
    messages = CONVERSATIONS["one turn"]
    locator = locator_of(tokenizer, expansion, bare)
    text, starts = written(messages, expansion)
    ids, offsets = encoded(tokenizer, text)
    words = words_of(messages[1]["content"][0]["text"])
    wanted = [(word, expected(offsets, starts[1], word)) for word in words]
    bare_ids, _ = encoded(tokenizer, text.removeprefix("<bos>"))
    if torch.equal(bare_ids, ids[1:]):  # the text's first token does not know that it is the first
        assert rows_of(locator, messages, all_answers(messages), ids)[0] == wanted
    else:
        with pytest.raises(DataError, match="tokens differ"):
            rows_of(locator, messages, all_answers(messages), ids)


def test_text_that_is_not_the_conversations(tokenizer):
    """A word changed, added or missing is never taken for a cut."""
    expansion, messages = EXPANSIONS["gemma3"], CONVERSATIONS["two pictures"]
    locator, answers = locator_of(tokenizer, expansion), all_answers(messages)
    text, _ = written(messages, expansion)
    for one, other in (
        ("user: and", "user: or"),
        ("what?", "what"),
        ("user: ", "user:"),
        ("<eos>", "?"),
        ("near", "by"),
        ("<bos>", "a <bos>"),
        ("what?", "what? "),
    ):
        for changed in (text.replace(one, other, 1), other.join(text.rsplit(one, 1))):
            with pytest.raises(DataError, match="tokens differ"):
                rows_of(locator, messages, answers, encoded(tokenizer, changed)[0])


def with_template(tokenizer, template: str) -> WordLocator:
    return locator_of(tokenizer, EXPANSIONS["llava"], template)


@pytest.mark.parametrize(
    "change",
    [
        "part['text'] | upper",
        "part['text'][:3]",
        "part['text'] + part['text']",
        "'text'",
        "part['text'] | replace('a', 'b')",
    ],
)
def test_templates_that_change_an_answer(tokenizer, change):
    template = TEMPLATE.replace("{{- part['text'] }}", "{{- (" + change + ") }}")
    messages = [turn("user", None), turn("assistant", "a Dog")]
    locator = with_template(tokenizer, template)
    rendered = locator._render(messages).replace("<image>", "<image>" * 7)
    with pytest.raises(DataError, match="Got a chat template that does not print the assistant's text 'a Dog'"):
        rows_of(locator, messages, all_answers(messages), encoded(tokenizer, rendered)[0])


def test_a_template_that_puts_answers_first(tokenizer):
    """In the wrong place, yet where the template says: before the picture, where no word can see it."""
    template = TEMPLATE.replace("in messages %}", "in messages | reverse %}", 1)
    messages = [turn("user", None, "a dog?"), turn("assistant", "a dog")]
    locator = with_template(tokenizer, template)
    rendered = locator._render(messages).replace("<image>", "<image>" * 7)
    found, dropped = rows_of(locator, messages, all_answers(messages), encoded(tokenizer, rendered)[0])
    assert not found
    assert dropped == {UNSEEN: 2}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("strips", [False, True])
def test_templates_with_and_without_generation_marks(tokenizer, marked, strips):
    template = TEMPLATE.replace("part['text']", "part['text'] | trim") if strips else TEMPLATE
    if marked:
        template = template.replace(
            "{%- for part",
            "{%- if message['role'] == 'assistant' %}{%- generation %}"
            "{{- '' }}{{- message['content'][0]['text']" + (" | trim" if strips else "") + " }}{%- endgeneration %}"
            "{%- else %}{%- for part",
        ).replace("{%- endfor %}{{- eos", "{%- endfor %}{%- endif %}{{- eos")
    answer = "\n a dog, a dog "
    messages = [turn("user", None, "a dog "), turn("assistant", answer)]
    locator = with_template(tokenizer, template)
    rendered = locator._render(messages)
    start = rendered.index("assistant: ") + len("assistant: ") + 6 * len("<image>")
    assert ("assistant: a dog" in rendered) == strips
    ids, offsets = encoded(tokenizer, rendered.replace("<image>", "<image>" * 7))
    found, _ = rows_of(locator, messages, all_answers(messages), ids)
    shift = 2 if strips else 0
    assert found == [(word, expected(offsets, start - shift, word)) for word in words_of(answer)]
    assert len(found) == 4


def test_unknown_letters_have_no_tokens_that_are_text():
    """A tokenizer without bytes to fall back on."""
    backend = Tokenizer(
        BPE({"<unk>": 0, "d": 1, "o": 2, "g": 3, "do": 4, " ": 5, ":": 6}, [("d", "o")], unk_token="<unk>")
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    messages = [turn("user", None), turn("assistant", "dog cat dog")]
    expansion = EXPANSIONS["mllama"]
    ids, _ = encoded(tokenizer, written(messages, expansion)[0])
    found, dropped = rows_of(locator_of(tokenizer, expansion), messages, all_answers(messages), ids)
    assert [word.start for word, _ in found] == [0, 8]
    assert dropped == {UNKNOWN: 1}


ODD = "a cafe\u0301 dog, a nai\u0308ve \ufb01sh, a do\u200bg"


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("NFC", []),
        ("NFD", []),
        ("NFKC", []),
        ("byte-level", []),
        ("gemma", []),
        ("no accents", ["cafe\u0301", "nai\u0308ve"]),
        ("ASCII alone", ["cafe\u0301", "nai\u0308ve", "\ufb01sh"]),
    ],
)
def test_words_that_a_tokenizer_changes_are_counted(kind, changed):
    tokenizer, expansion = tokenizer_of(kind), EXPANSIONS["qwen"]
    messages = [turn("user", None, "what?"), turn("assistant", ODD)]
    ids, _ = encoded(tokenizer, written(messages, expansion)[0])
    found, dropped = rows_of(locator_of(tokenizer, expansion), messages, all_answers(messages), ids)
    words = words_of(ODD)
    assert len(words) == 8
    kept = [word for word, _ in found]
    assert [word.text for word in words if word not in kept] == changed
    assert dropped == ({CHANGED: len(changed)} if changed else {})
    for word, rows in found:
        said = unicodedata.normalize("NFKC", str(tokenizer.decode(ids[[row + 1 for row in rows]])))
        assert unicodedata.normalize("NFKC", word.text).replace("\u200b", "") in said.replace("\u200b", "")


def test_a_text_with_half_characters_has_no_rows(tokenizer):
    """No tokenizer takes it, so that the sequence is of another text."""
    messages = [turn("user", None), turn("assistant", "a \ud800 dog")]
    expansion = EXPANSIONS["qwen"]
    ids, _ = encoded(tokenizer, written(messages, expansion)[0].replace("\ud800", "?"))
    found, dropped = rows_of(locator_of(tokenizer, expansion), messages, all_answers(messages), ids)
    assert (found, dropped) == ([], {CHANGED: 2})


def test_an_answer_of_private_characters(tokenizer):
    """Templates are tried with such a character; it is one that no text has."""
    answer = "\ue000\ue000\ue000\ue001 dog \ue000\ue001"
    messages = [turn("user", None, "\ue002\ue000"), turn("assistant", answer)]
    expansion = EXPANSIONS["qwen"]
    ids, _ = encoded(tokenizer, written(messages, expansion)[0])
    found, _ = rows_of(locator_of(tokenizer, expansion), messages, all_answers(messages), ids)
    assert [word.text for word, _ in found] == ["dog"]


def test_words_of_another_text_are_refused(tokenizer):
    expansion, messages = EXPANSIONS["qwen"], CONVERSATIONS["one turn"]
    ids, _ = encoded(tokenizer, written(messages, expansion)[0])
    wrong = [Word("crocodile", 2, 11, "", "noun")]
    with pytest.raises(DataError, match="where the word 'crocodile' should be"):
        rows_of(locator_of(tokenizer, expansion), messages, [(1, "a watering can near a crocodile.", wrong)], ids)
