"""Answers of every family as benchmarks ask for them: in batches, without a picture, and by the loss of options."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from families.geometry import Family, picture
from lavender.evaluation.answers import answer_batch, answering, continuation_loss


def question(text: str, *sizes: tuple[int, int]) -> list[dict]:
    parts = [{"type": "image", "image": picture(size, seed)} for seed, size in enumerate(sizes)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


class Answers:
    """Collected as a part of the contract only, whose fixtures it uses."""

    def test_an_answer_is_the_same_alone_and_in_a_batch(self, family: Family, model):
        """Questions of several lengths about pictures of several sizes; and some without a picture."""
        sizes = (family.sizes * 2)[:2]
        asked = [question(text, size) for text, size in zip(("what is it?", "a dog and a cat?"), sizes, strict=True)]
        for conversations in (asked, [question("what is it?"), question("a dog and a cat?")]):
            with answering(model, family.processor):
                alone = [answer_batch(model, family.processor, [one], 4)[0] for one in conversations]
                assert answer_batch(model, family.processor, conversations, 4) == alone

    def test_the_loss_of_an_option_is_that_of_its_tokens(self, family: Family, model):
        processor, asked = family.processor, question("what is it?", family.sizes[0])
        loss, _ = continuation_loss(model, processor, asked, "a dog")
        prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}
        answered: list[dict] = [*asked, answer]
        text = processor.apply_chat_template(answered, continue_final_message=True, tokenize=False)
        images = [[asked[0]["content"][0]["image"]]]
        inputs = processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
        option = text.removeprefix(prompt)  # some templates begin an answer with a space
        count = len(processor.tokenizer(option, add_special_tokens=False)["input_ids"])
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -count - 1 : -1].float()
        expected = cross_entropy(logits, inputs["input_ids"][0, -count:]).item()
        assert loss == pytest.approx(expected, rel=1e-4)  # float32
