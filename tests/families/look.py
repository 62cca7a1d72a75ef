"""`lavender look` on every family: layers, heads and levels, and the likelihood of an answer. Part of the contract."""

from __future__ import annotations

import pytest
import torch

from families.geometry import Family, batch_of, reading
from lavender.evaluation.faithfulness import answer_score
from lavender.evaluation.look.attention import ANSWER, QUESTION, read_attention
from lavender.maps import to_heat
from lavender.students.registry import adapter_for
from lavender.students.word_maps import student_maps
from lavender.words import words_of


class Look:
    """Collected as a part of the contract only, whose fixtures it uses."""

    def test_the_attention_of_each_layer_and_head_has_the_mean_of_the_word_maps(self, family: Family, model):
        one = reading(family.sizes[0], "a dog and a cat", 0)
        adapter = adapter_for(model.config)
        seen = read_attention(model, family.processor, one, words_of(one.prompt))
        (maps,) = student_maps(model, family.processor, [one])
        answers = [index for index, entry in enumerate(seen.words) if entry.turn == ANSWER]
        assert tuple(seen.words[index].word for index in answers) == maps.words
        assert {entry.turn for entry in seen.words} == {ANSWER, QUESTION}
        assert seen.maps_WLH.shape[1:3] == (len(adapter.usable_layers()), adapter.num_heads())
        assert seen.layers == adapter.usable_layers()
        torch.testing.assert_close(to_heat(seen.maps_WLH[answers].mean(dim=(1, 2))), maps.maps, atol=1e-4, rtol=1e-4)
        placed = seen.maps_WLH.sum(dim=(3, 4))
        assert (placed > 0).any()
        assert (placed <= seen.on_picture_WLH + 1e-5).all()
        assert (seen.on_picture_WLH <= 1 + 1e-5).all()
        assert seen.sees_picture_alone == (adapter.image_keys(batch_of(family, [one])) is None)
        if seen.sees_picture_alone:
            torch.testing.assert_close(seen.on_picture_WLH, torch.ones_like(seen.on_picture_WLH), atol=1e-5, rtol=0)
        else:
            assert seen.on_picture_WLH.max() < 1  # the first token, at least, is there too

    @torch.no_grad()
    def test_the_likelihood_of_an_answer_is_that_of_its_tokens(self, family: Family, model):
        one = reading(family.sizes[0], "a dog and a cat", 0)
        score, words = answer_score(model, family.processor, one)
        (values,) = score([one.image]).tolist()
        inputs = batch_of(family, [one])
        ids, logits = inputs["input_ids"][0], model(**inputs).logits[0].double().log_softmax(dim=-1)
        decode = family.processor.tokenizer.decode
        spans = [
            (first, last)
            for last in range(len(ids), max(0, len(ids) - 12), -1)
            for first in range(last - 1, max(0, last - 16), -1)
            if decode(ids[first:last]).strip() == one.answer
        ]
        first, last = min(spans, key=lambda span: span[1] - span[0])
        by_hand = [float(logits[at - 1, ids[at]]) for at in range(first, last)]
        assert values[0] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)
        assert [word.text for word in words] == [word.text for word in one.words]
        assert len(values) == 1 + len(words)
        assert all(value < 0 for value in values)
