"""Odd texts through everything that reads words: each word is found, or dropped and counted; nothing raises.

A text is put together from what real captions and broken files have. What holds is the same for all: spans are of the
text as written, and of all words none is lost without a count.
"""

from __future__ import annotations

import random
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from lavender.config import ExtractionConfig
from lavender.students.locate import WordLocator
from lavender.teachers.diffusion.teacher import Job, Teacher
from lavender.words import content_words, encodable, same_root, subjects_and_objects, too_long, words_of
from lavender.world import TEACHER_PATH
from tokenizer_kinds import NORMALISING, TOKENIZERS, tokenizer_of

_WRITTEN = (
    "a dog|two cats|red|house|on|the|in a park|runs|!|.|, |; |\n|\r\n|\t|  |'|(|)|-|_|#dog|@cat|50%|x2|v2.0|0123456789|"
    "isn't|dog's|dogs'|O'Brien|rock'n'roll|let's|n't|'s|isn\u2019t|dog\u2019s|it`s|o\u02bcclock|cannot|dont|"
    "caf\u00e9|cafe\u0301|nai\u0308ve|\u1ec7|e\u0323\u0302|A\u030a|\u0301|d\u0301\u0302\u0303og|\u0130|\u00df|\u0149|"
    "d\u00adog|d\u200bog|d\u200dog|\ufeffdog|dog\u2060|t\u2011shirt|t\u2010shirt|\u202edog\u202c|\ufe0f|\u00a0|\u2028|"
    "\ufb01sh|\uff44\uff4f\uff47|\U0001d41d\U0001d428\U0001d420|\u00b2|\u2122|\u00bd|\u2163|\u00aa|\u216b|\u3000|"
    "&amp;|&nbsp;|&#39;|&eacute;|&amp;nbsp;|&#xD800;|&dog;|&|<b>|</b>|<br/>|<a href='x y'>|<!-- x -->|<|>|"
    "https://dog.example/cat?x=1|www.dog.com|me@dog.org|IMG_1234.jpg|../etc/passwd|C:\\dog\\cat.png|dog.com|"
    "\u4e00\u53ea\u72d7|\u72d7dog|\u0643\u0644\u0628|\u0e2b\u0e21\u0e32|\u0421\u043e\u0431\u0430|\u1112\u1161\u11ab|"
    "\U0001f436|\U0001f469\u200d\U0001f469\u200d\U0001f467|\U0001f1e9\U0001f1ea|\ud800|\udc00|\ud83d\ude00|"
    "\x00|\x07|\x1b[31m|\x7f|\x85|\ue000|\ue000\ue000\ue000|\uffff|\ufffe|\ufffd|\U0010ffff|\U000e0041|"
    "<s>|</s>|<eos>|<unk>|[UNK]|[INST]|{{ 7 * 7 }}|{% raw %}"
)
_SPECIAL = ("<|endoftext|>", "<|startoftext|>", "<|im_end|>")
_LONG = ("x" * 65, "ab-" * 40, "x" * 6000, "ACGT" * 100, "\u72d7" * 100, "1234567890" * 20, "e\u0301" * 99)
PARTS = (*_WRITTEN.split("|"), *_SPECIAL, *_LONG)
FORMS: tuple[Literal["NFC", "NFD", "NFKC"], ...] = ("NFC", "NFD", "NFKC")
TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{{- message['role'] + ': ' }}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<start><image></start>' }}{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{{- eos_token if message['role'] == 'assistant' else '\n' }}{%- endfor %}"
)
KINDS = (*(kind for kind in TOKENIZERS if kind != "unigram, always"), *NORMALISING)
EVERY = 8  # one text in so many goes through the teacher's model


def try_all(count: int, seed: int, work: Path) -> list[str]:
    """The bad outcomes of `count` texts, each with its text.

    Args:
        work: an empty folder; texts need none.
    """
    del work
    chance = random.Random(seed)
    locators = {kind: _Student(tokenizer_of(kind)) for kind in KINDS}
    teacher = Teacher.from_pretrained(TEACHER_PATH, ExtractionConfig(grid=(4, 4), timesteps=(300,)))
    bad: list[str] = []
    for number in range(count):
        text = odd_text(chance)
        checks: list[Callable[[str], str]] = [_read, *(own.locate for own in locators.values())]
        if number % EVERY == 0:
            checks.append(lambda own: _teach(teacher, own))
        for name, check in zip(["words", *KINDS, "teacher"], checks, strict=False):
            try:
                fault = check(text)
            except Exception:
                fault = traceback.format_exc(limit=-3)
            if fault:
                bad.append(f"text {number}, {name}: {fault} {text[:200]!a}")
    return bad


def odd_text(chance: random.Random) -> str:
    """A few or many parts, with or without spaces between them, sometimes in another form of Unicode."""
    parts = [_part(chance) for _ in range(chance.choice([1, 2, 3, 5, 10, 40]))]
    text = chance.choice(["", " ", " ", " "]).join(parts)
    return text if chance.random() < 0.4 else unicodedata.normalize(chance.choice(FORMS), text)


def _part(chance: random.Random) -> str:
    if chance.random() < 0.85:
        return chance.choice(PARTS)
    first = chance.choice([0, 0x80, 0x250, 0x590, 0x900, 0x1E00, 0x2000, 0x3000, 0xD700, 0xFB00, 0x1F300])
    return "".join(chr(first + chance.randrange(0x300)) for _ in range(chance.randrange(1, 12)))


def _read(text: str) -> str:
    """What is wrong with the words of a text; "" where all holds."""
    words = words_of(text)
    nouns = content_words(text, ("noun",))
    spans = [(word.start, word.end) for word in words]
    if any(text[word.start : word.end] != word.text or not word.text for word in words):
        return "spans are not of the text as written"
    if spans != sorted(spans) or any(one[1] > other[0] for one, other in pairwise(spans)):
        return "words overlap or are out of order"
    if set(nouns) - set(words) or subjects_and_objects(text) - {word.start for word in words}:
        return "nouns or heads that are no words"
    return "" if same_root(text, text) == bool(words) else "a text that has not the root of itself"


class _ProcessorOfText(ProcessorMixin):
    """The part of a processor that knows text."""

    def __init__(self, tokenizer, chat_template=None):
        self.tokenizer, self.chat_template, self.image_token = tokenizer, chat_template, "<image>"


class _Student:
    """A locator, and the sequence that a processor would make of a conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        token = tokenizer.convert_tokens_to_ids("<image>")
        adapter = SimpleNamespace(image_token_id=lambda: token)
        self._locator = WordLocator(_ProcessorOfText(tokenizer, TEMPLATE), adapter)  # ty: ignore[invalid-argument-type]
        self._tokenizer = tokenizer

    def locate(self, text: str) -> str:
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
        rendered = f"<bos>user: <start>{'<image>' * 4}</start>what?\nassistant: {encodable(text)}<eos>"
        ids = torch.tensor(self._tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
        words, dropped = words_of(text), Counter[str]()
        found = self._locator.rows(messages, [(1, text, words)], ids, torch.ones_like(ids), dropped)
        if len(found) + dropped.total() != len(words):
            return f"{len(words)} words: {len(found)} found and {dropped.total()} counted"
        if any(not 0 <= row < len(ids) - 1 for _, rows in found for row in rows):
            return "rows outside of the sequence"
        return ""


def _teach(teacher: Teacher, text: str) -> str:
    words = words_of(text)
    maps = teacher([Job(Image.new("RGB", (64, 64), (200, 30, 30)), "red", text, words)])[0]
    expected = len(words) + len(too_long(text))
    if len(maps.words) + len(maps.dropped) != expected:
        return f"{expected} words: {len(maps.words)} mapped and {len(maps.dropped)} dropped"
    return "" if maps.maps.isfinite().all() else "maps that are not finite"
