"""Words in the batches that TRL's collator makes with a family's own processor and its own chat template.

Part of the contract of every family.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from families.geometry import Family
from lavender.data.conversations import text_of
from lavender.errors import DataError
from lavender.students.base import VlmAdapter
from lavender.students.locate import UNSEEN, WordLocator
from lavender.students.registry import adapter_for
from lavender.words import words_of


def noise(*sizes: tuple[int, int]) -> list[Image.Image]:
    return [Image.effect_noise((width, height), 64).convert("RGB") for height, width in sizes]


def image(count: int = 1) -> list[dict]:
    return [{"type": "image"}] * count


def user(*parts: str | dict) -> dict:
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


SAME = "a watering can near a naïve crocodile."
EXAMPLES = [
    {"images": noise((60, 120)), "messages": [user(*image(), SAME), assistant(SAME)]},
    {
        "images": noise((90, 70)),
        "messages": [
            user(*image(), "what?"),
            assistant("a dog\n"),
            user(SAME),
            assistant("no, a dog and a cat"),
            user("a dog?"),
            assistant("a dog"),
        ],
    },
    {
        "images": noise((60, 120), (64, 64)),
        "messages": [
            user(*image(2), "two?\n"),
            assistant(SAME),
            user("and now?"),
            assistant(SAME),
        ],
    },
    {
        "images": noise((40, 60), (64, 64)),
        "messages": [
            user(*image(), "one?"),
            assistant("a dog"),
            user("then ", *image(), " this"),
            assistant("a dog\n\n"),
        ],
    },
]


def trl_batch(processor: ProcessorMixin, examples: list[dict]) -> tuple[dict[str, torch.Tensor], list[list[dict]]]:
    """What TRL's collator makes, and the conversations as the alignment collator passes them on."""
    batch = DataCollatorForVisionLanguageModeling(processor)([dict(example) for example in examples])
    conversations = [prepare_multimodal_messages(example["messages"], images=example["images"]) for example in examples]
    return batch, conversations


class Words:
    """Needs a fixture `family` of scope "class"."""

    pictures_first: ClassVar[bool] = False
    """Whether the template prints all pictures of a conversation before its text, as PaliGemma's processor does."""

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls) -> Family:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, family) -> tuple[ProcessorMixin, VlmAdapter]:
        return family.processor, adapter_for(family.make().config)

    @pytest.mark.parametrize("index", range(len(EXAMPLES)))
    def test_words_are_found_in_trls_batches(self, made, index):
        processor, adapter = made
        alone, (messages,) = trl_batch(processor, [EXAMPLES[index]])
        ids, mask = alone["input_ids"][0], alone["attention_mask"][0]
        locator, pictures = WordLocator(processor, adapter), (ids == adapter.image_token_id()).nonzero()[:, 0].tolist()
        answers = [
            (turn, message["content"][0]["text"])
            for turn, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        last = 0
        for turn, answer in answers:
            words, dropped = words_of(answer), Counter[str]()
            found = locator.rows(messages, [(turn, answer, words)], ids, mask, dropped)
            assert not dropped
            assert [word for word, _ in found] == list(words)
            places = [row + 1 for _, rows in found for row in rows]
            assert places == sorted(set(places))
            assert places[0] > max(last, pictures[0])
            text = processor.tokenizer.decode(ids[places[0] : places[-1] + 1]).strip().rstrip(".")
            assert text == answer.strip().rstrip(".")
            # the turn's own: none of the messages before it is left to come
            head = processor.tokenizer.decode(ids[: places[0]])
            rest = processor.tokenizer.decode(ids[places[-1] + 1 :])
            texts = [message["content"][-1]["text"].strip() for message in messages]
            assert sum(head.count(text) for text in texts[:turn]) >= turn
            assert all(text in rest for text in texts[turn + 1 :])
            last = places[-1]

    @pytest.mark.parametrize("index", range(len(EXAMPLES)))
    def test_the_users_words_are_found(self, made, index):
        """Each turn's in its own place, after the words of the turn before; the row at a token's own place reads it."""
        processor, adapter = made
        batch, (messages,) = trl_batch(processor, [EXAMPLES[index]])
        ids, mask, locator = batch["input_ids"][0], batch["attention_mask"][0], WordLocator(processor, adapter)
        first_picture, last = int((ids == adapter.image_token_id()).nonzero()[0]), -1
        for turn, message in enumerate(messages):
            text, dropped = text_of(message["content"]), Counter[str]()
            words = words_of(text)
            found = locator.rows(messages, [(turn, text, words)], ids, mask, dropped)
            assert not dropped
            assert [word for word, _ in found] == list(words)
            reading = [[row + 1 for row in rows] for _, rows in found]
            assert [processor.tokenizer.decode(ids[rows]).strip(" .?") for rows in reading] == [w.text for w in words]
            places = [place for rows in reading for place in rows]
            assert places == sorted(set(places))
            assert places[0] > max(last, first_picture)
            last = places[-1]

    def test_the_users_words_wait_for_their_picture(self, made):
        """ "then" stands before the second picture, "this" after it, in one turn."""
        processor, adapter = made
        batch, (messages,) = trl_batch(processor, [EXAMPLES[3]])
        ids, mask, locator = batch["input_ids"][0], batch["attention_mask"][0], WordLocator(processor, adapter)
        text, dropped = text_of(messages[2]["content"]), Counter[str]()
        assert text == "then   this"
        found = locator.rows(messages, [(2, text, words_of(text))], ids, mask, dropped, pictures=[1])
        assert [word.text for word, _ in found] == (["then"] if self.pictures_first else []) + ["this"]
        assert dropped == ({} if self.pictures_first else {UNSEEN: 1})

    def test_words_wait_for_their_picture(self, made):
        """The first answer stands before the second picture, unless the processor moves pictures to the front."""
        processor, adapter = made
        batch, (messages,) = trl_batch(processor, [EXAMPLES[3]])
        ids, mask, locator = batch["input_ids"][0], batch["attention_mask"][0], WordLocator(processor, adapter)
        words, dropped = words_of("a dog"), Counter[str]()
        answers = [(1, "a dog", words), (3, "a dog\n\n", words)]
        found = locator.rows(messages, answers, ids, mask, dropped, pictures=[1, 1])
        seen = answers if self.pictures_first else answers[1:]
        assert [word for word, _ in found] == list(words) * len(seen)
        assert dropped == ({} if self.pictures_first else {UNSEEN: 2})
        assert found == locator.rows(messages, seen, ids, mask, dropped)
        assert len(locator.rows(messages, answers, ids, mask, dropped, pictures=[0, 1])) == 4

    def test_padding_in_a_batch_moves_nothing_else(self, made):
        processor, adapter = made
        locator = WordLocator(processor, adapter)
        batch, conversations = trl_batch(processor, EXAMPLES)
        for index, messages in enumerate(conversations):
            alone, _ = trl_batch(processor, [EXAMPLES[index]])
            turn, answer = len(messages) - 1, messages[-1]["content"][0]["text"]
            answers: list[Any] = [(turn, answer, words_of(answer))]
            together, single = (
                locator.rows(messages, answers, inputs["input_ids"][at], inputs["attention_mask"][at], Counter())
                for inputs, at in ((batch, index), (alone, 0))
            )
            assert together == single
            assert together

    def test_another_conversation_is_refused(self, made):
        processor, adapter = made
        batch, (messages,) = trl_batch(processor, [EXAMPLES[1]])
        other = [*messages[:2], user("another question"), *messages[3:]]
        with pytest.raises(DataError, match="tokens differ"):
            WordLocator(processor, adapter).rows(
                other, [(5, "a dog", words_of("a dog"))], batch["input_ids"][0], batch["attention_mask"][0], Counter()
            )
