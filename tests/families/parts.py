"""The parts of a model that can be frozen, where each family has them: part of the contract of every family."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from torch import nn

from families.asking import request_of
from lavender.alignment.objective import attach, is_alignment_part
from lavender.config import AlignmentConfig
from lavender.students.base import PARTS
from lavender.students.registry import adapter_for
from lavender.training.trainable import check_trained, freeze, peft_config_of, trained_parameters


class Parts:
    """Collected as a part of the contract only, whose fixtures it uses."""

    def test_every_weight_is_in_one_part(self, model):
        """And the tower is the one that transformers names, where it knows one."""
        adapter = adapter_for(model.config)
        parts = {name: adapter.part_of(name) for name, _ in model.named_parameters()}
        assert set(parts.values()) == set(PARTS)
        tower = model.get_encoder(modality="image")
        if tower is not model:
            inside = {id(one) for one in tower.parameters()}
            own = {name for name, one in model.named_parameters() if id(one) in inside}
            seeing = {name for name, part in parts.items() if part == "vision_tower"}
            assert seeing <= own
            assert {parts[name] for name in own - seeing} <= {"connector"}  # some have it inside
        whole = trained_parameters(model)
        assert sum(size for _, size in whole.values()) == sum(one.numel() for one in model.parameters())

    @pytest.mark.parametrize("trains", PARTS)
    def test_one_part_trains_alone(self, family, model, batch, readings, trains):
        """The alignment loss reaches it, wherever it lies: rows carry gradient through queries or keys."""
        frozen = [part for part in PARTS if part != trains]
        model.requires_grad_(True)  # IDEFICS' own config freezes some of it
        freeze(model, frozen)
        head, adapter = attach(model, AlignmentConfig()), adapter_for(model.config)
        model.train()
        output = model(**batch, attention_request=request_of(family, model, batch, readings, head.layers))
        output.attention_loss.backward()
        moved = [
            name
            for name, one in model.named_parameters()
            if one.grad is not None and one.grad.abs().max() > 0 and not is_alignment_part(name)
        ]
        assert moved
        assert {adapter.part_of(name) for name in moved} == {trains}
        still = [one for name, one in model.named_parameters() if adapter.part_of(name) in frozen]
        assert all(one.grad is None for one in still)
        counts = trained_parameters(model)
        assert counts[trains][0] == counts[trains][1]
        assert [counts[part][0] for part in frozen] == [0, 0]

    @pytest.mark.parametrize("frozen", [["vision_tower"], ["vision_tower", "connector"], ["language_model"]])
    def test_adapters_stay_out_of_frozen_parts(self, model, frozen):
        """Even where every linear layer is to have one."""
        freeze(model, frozen)
        linear = [name for name, one in model.named_modules() if type(one) is nn.Linear and "lm_head" not in name]
        config = peft_config_of({"peft_type": "LORA", "target_modules": linear}, model, frozen)
        attach(model, AlignmentConfig())  # which lends MiniCPM-V what PEFT asks for
        tuned = get_peft_model(model, config)
        adapter = adapter_for(model.config)
        found = {adapter.part_of(name) for name, one in tuned.get_base_model().named_parameters() if one.requires_grad}
        assert found
        assert not found & set(frozen)
        assert next(iter(check_trained(tuned, frozen).parameters)) == "vision_tower"
