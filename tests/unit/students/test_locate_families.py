"""Words in the batches that TRL's collator makes with each family's own processor and its own chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from families import (
    test_flamingo,
    test_gemma3,
    test_idefics,
    test_idefics3,
    test_internvl,
    test_llava_next,
    test_llava_onevision,
    test_minicpm_v,
    test_qwen3_vl,
    test_qwen_vl,
)
from lavender.errors import DataError
from lavender.students.base import VlmAdapter
from lavender.students.locate import UNSEEN, WordLocator
from lavender.students.registry import FAMILIES, adapter_for
from lavender.words import words_of
from lavender.world.student_models import build_llava, build_llava_processor

Made = tuple[ProcessorMixin, Any]


def of_family(family) -> Made:
    return family.processor, family.make().config


def llava(texts: list[str]) -> Made:
    processor = build_llava_processor(texts)
    return processor, build_llava(processor).config


def qwen3_vl(texts: list[str]) -> Made:
    processor = test_qwen3_vl.build_processor(texts)
    return processor, test_qwen3_vl.config_of(processor.tokenizer)


def minicpm_v(texts: list[str]) -> Made:
    processor = test_minicpm_v.build_processor(texts)
    return processor, test_minicpm_v.config_of(processor.tokenizer)


CROPS = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 32,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
MADE: dict[str, Callable[[list[str]], Made]] = {
    "gemma3": lambda texts: of_family(test_gemma3.family_of(texts)),
    "gemma3, crops": lambda texts: of_family(test_gemma3.family_of(texts, **CROPS)),
    "idefics": lambda texts: of_family(test_idefics.family_of(texts, test_idefics.LATENTS)),
    "idefics3": lambda texts: of_family(test_idefics3.family_of("idefics3", texts)),
    "smolvlm": lambda texts: of_family(test_idefics3.family_of("smolvlm", texts)),
    "internvl": lambda texts: of_family(test_internvl.family_of(texts)),
    "llava": llava,
    "llava_next": lambda texts: of_family(test_llava_next.family_of(texts, 48, "default")),
    "llava_onevision": lambda texts: of_family(test_llava_onevision.family_of(texts)),
    "minicpmv": minicpm_v,
    "open_flamingo": lambda texts: of_family(test_flamingo.family_of(texts)),
    "qwen2_vl": lambda texts: of_family(test_qwen_vl.family_of("qwen2_vl", texts)),
    "qwen2_5_vl": lambda texts: of_family(test_qwen_vl.family_of("qwen2_5_vl", texts)),
    "qwen3_vl": qwen3_vl,
}


@pytest.fixture(scope="module", params=[*MADE, "mllama"])
def made(request, captions, processor, make_student) -> tuple[ProcessorMixin, VlmAdapter]:
    if request.param == "mllama":
        return processor, adapter_for(make_student().config)
    own, config = MADE[request.param](captions)
    return own, adapter_for(config)


def test_every_family_is_here():
    assert {name.split(",")[0] for name in MADE} | {"mllama"} == set(FAMILIES)


def noise(*sizes: tuple[int, int]) -> list[Image.Image]:
    return [Image.effect_noise((width, height), 64).convert("RGB") for height, width in sizes]


def image(count: int = 1) -> list[dict]:
    return [{"type": "image"}] * count


def user(*parts: str | dict) -> dict:
    return {
        "role": "user",
        "content": [{"type": "text", "text": one} if isinstance(one, str) else one for one in parts],
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


def batch_of(processor: ProcessorMixin, examples: list[dict]) -> tuple[dict[str, torch.Tensor], list[list[dict]]]:
    """What TRL's collator makes, and the conversations as the alignment collator passes them on."""
    batch = DataCollatorForVisionLanguageModeling(processor)([dict(one) for one in examples])
    return batch, [prepare_multimodal_messages(one["messages"], images=one["images"]) for one in examples]


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_words_are_found_in_trls_batches(made, index):
    processor, adapter = made
    alone, (messages,) = batch_of(processor, [EXAMPLES[index]])
    ids, mask = alone["input_ids"][0], alone["attention_mask"][0]
    locator, pictures = WordLocator(processor, adapter), (ids == adapter.image_token_id()).nonzero()[:, 0].tolist()
    answers = [(turn, one["content"][0]["text"]) for turn, one in enumerate(messages) if one["role"] == "assistant"]
    last = 0
    for turn, answer in answers:
        words, dropped = words_of(answer), Counter[str]()
        found = locator.rows(messages, [(turn, answer, words)], ids, mask, dropped)
        assert not dropped
        assert [word for word, _ in found] == list(words)
        places = [place + 1 for _, rows in found for place in rows]
        assert places == sorted(set(places))
        assert places[0] > max(last, pictures[0])
        text = processor.tokenizer.decode(ids[places[0] : places[-1] + 1]).strip().rstrip(".")
        assert text == answer.strip().rstrip(".")
        # the turn's own: none of the messages before it is left to come
        head = processor.tokenizer.decode(ids[: places[0]])
        rest = processor.tokenizer.decode(ids[places[-1] + 1 :])
        assert sum(head.count(one["content"][-1]["text"].strip()) for one in messages[:turn]) >= turn
        assert all(one["content"][-1]["text"].strip() in rest for one in messages[turn + 1 :])
        last = places[-1]


def test_words_wait_for_their_picture(made):
    processor, adapter = made
    batch, (messages,) = batch_of(processor, [EXAMPLES[3]])
    ids, mask, locator = batch["input_ids"][0], batch["attention_mask"][0], WordLocator(processor, adapter)
    words, dropped = words_of("a dog"), Counter[str]()
    answers = [(1, "a dog", words), (3, "a dog\n\n", words)]
    found = locator.rows(messages, answers, ids, mask, dropped, pictures=[1, 1])
    assert [word for word, _ in found] == list(words)
    assert dropped == {UNSEEN: 2}
    assert found == locator.rows(messages, answers[1:], ids, mask, dropped)
    assert len(locator.rows(messages, answers, ids, mask, dropped, pictures=[0, 1])) == 4


def test_padding_in_a_batch_moves_nothing_else(made):
    processor, adapter = made
    locator = WordLocator(processor, adapter)
    batch, conversations = batch_of(processor, EXAMPLES)
    for index, messages in enumerate(conversations):
        alone, _ = batch_of(processor, [EXAMPLES[index]])
        turn, answer = len(messages) - 1, messages[-1]["content"][0]["text"]
        rows = [
            locator.rows(
                messages, [(turn, answer, words_of(answer))], one["input_ids"][at], one["attention_mask"][at], Counter()
            )
            for one, at in ((batch, index), (alone, 0))
        ]
        assert rows[0] == rows[1]
        assert rows[0]


def test_another_conversation_is_refused(made):
    processor, adapter = made
    batch, (messages,) = batch_of(processor, [EXAMPLES[1]])
    other = [*messages[:2], user("another question"), *messages[3:]]
    with pytest.raises(DataError, match="tokens differ"):
        WordLocator(processor, adapter).rows(
            other, [(5, "a dog", words_of("a dog"))], batch["input_ids"][0], batch["attention_mask"][0], Counter()
        )
