"""What a family's test file says of it by hand: its line for people, its keys. And what every family goes through:
two steps of training, `lavender inspect` of its config. Part of the contract of every family.
"""

from __future__ import annotations

import json
from typing import ClassVar, NamedTuple

import pytest
import torch

from command_line import lavender
from families.asking import captured
from families.core import KINDS, EagerRows
from families.geometry import batch_of, reading
from families.training import train_two_steps
from lavender.cli.main import DONE
from lavender.students.base import VlmAdapter
from lavender.students.registry import adapter_for


class Keys(NamedTuple):
    """The image keys of a family whose pictures are part of the sequence.

    Attributes:
        counts: how many keys each of the first three of the family's `sizes` has.
        token: the text of the token that stands at a key.
        before: how the text before a picture's first key ends.
        after: how the text after a picture's last key begins.
    """

    counts: tuple[int, int, int]
    token: str
    before: str
    after: str


class ByHand(EagerRows):
    """Collected as a part of the contract only, whose fixtures it uses."""

    adapter: ClassVar[type[VlmAdapter]]
    """The family's adapter, which its test file is of."""
    describes: ClassVar[str]
    """What `describe_keys` says of the tiny model."""
    keys: ClassVar[Keys | None] = None
    """None where layers attend to pictures alone (cross-attention)."""

    def test_what_people_read(self, model):
        assert type(adapter_for(model.config)) is self.adapter
        assert adapter_for(model.config).describe_keys() == self.describes

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_keys_are_the_pictures_tokens_and_padding(self, family, model, readings, side):
        batch, tokenizer = batch_of(family, readings, side), family.processor.tokenizer
        adapter = adapter_for(model.config)
        found = adapter.image_keys(batch)
        assert (found is None) == (self.keys is None) == adapter.cross_attends
        if found is None or self.keys is None:
            return
        for ids, positions, count in zip(batch["input_ids"].tolist(), found.tolist(), self.keys.counts, strict=True):
            real = [place for place, token in enumerate(ids) if token == adapter.image_token_id()]
            assert len(real) == count
            assert positions == real + [-1] * (max(self.keys.counts) - count)
            assert {tokenizer.decode(ids[place]) for place in real} == {self.keys.token}
            assert tokenizer.decode(ids[: real[0]]).endswith(self.keys.before)
            assert tokenizer.decode(ids[real[-1] + 1 :]).startswith(self.keys.after)

    @torch.no_grad()
    def test_a_batch_without_padding(self, family, model):
        """A kernel that is told "causal" gets no mask; the rows are still those of eager attention."""
        batch = batch_of(family, [reading(family.sizes[0], "a dog", seed) for seed in (1, 2)])
        assert batch["attention_mask"].all()
        last = batch["input_ids"].shape[1] - 2
        request = captured(model, batch, rows=torch.tensor([[last // 2, last], [last - 1, last * 2 // 3]]))
        torch.testing.assert_close(request.stacked(), self.eager_rows(family.make(), batch, request), rtol=0, atol=1e-6)

    @KINDS
    def test_training(self, family, model, dataset, store_path, tmp_path, alignment):
        """TRL's collator gives the processor what it wants, and carries what the model and the adapter need."""
        train_two_steps(model, family.processor, dataset, store_path, tmp_path, **alignment)

    def test_inspect_reads_the_config_alone(self, model, tmp_path):
        """`lavender inspect` counts the weights without them, and knows the layers and the line for people."""
        model.config.save_pretrained(tmp_path)
        ran = lavender("inspect", tmp_path)
        assert ran.code == DONE, ran.err
        facts, adapter = json.loads(ran.out), adapter_for(model.config)
        assert facts["family"] == adapter.model_type
        assert facts["class"] == type(model).__name__
        assert facts["image_keys"] == self.describes
        assert facts["usable_layers"] == list(adapter.usable_layers())
        assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert facts["memory"]["learn"] > 0
