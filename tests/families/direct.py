"""The losses of the attention itself and attention forcing, in every family: part of the contract."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families.asking import cast, request_of
from lavender.alignment.objective import attach
from lavender.config import AlignmentConfig
from lavender.students.registry import adapter_for

STEP = 1e-3
"""Of the finite differences. Some models normalise in float32 even in float64, so a smaller step would be noise."""


def use_all_experts(model: PreTrainedModel) -> None:
    """Make mixtures of experts smooth, and able to compute in float64.

    Which experts a token gets jumps with its states, and the grouped product of torch knows no float64.
    """
    model.set_experts_implementation("eager")
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = module.num_experts


class DirectLosses:
    """Collected as a part of the contract only, whose fixtures it uses."""

    @pytest.mark.parametrize("forced", [False, True], ids=["", "forced"])
    @pytest.mark.parametrize("kind", ["mass", "kl"])
    def test_gradients_are_those_of_finite_differences(self, family, model, batch, readings, kind, forced):
        """Along a random direction of the decoder's parameters, of L_att and of something that depends on the output.

        Towers are left out: some of them round, resample or compute positions without gradient.
        """
        model, inputs = model.double(), cast(batch, torch.float64)
        use_all_experts(model)
        head = attach(model, AlignmentConfig(attention_loss=kind, sharpen=2))
        assert not list(head.parameters())

        def objective() -> Tensor:
            request = request_of(family, model, batch, readings, head.layers)
            request.forced = request.present if forced else None
            output = model(**inputs, attention_request=request)
            # an embedding's row of padding gets no gradient, so its logits are left out
            logits = output.logits[batch["attention_mask"].bool()]
            return output.attention_loss + logits.double().square().mean()

        generator = torch.Generator().manual_seed(1)
        adapter = adapter_for(model.config)
        parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and adapter.part_of(name) == "language_model"
        ]
        directions = [
            parameter.square().mean().sqrt() * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            for parameter in parameters
        ]
        gradients = torch.autograd.grad(objective(), parameters, allow_unused=True)
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
        values = []
        with torch.no_grad():
            for shift in (STEP, -2 * STEP):
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += shift * direction
                values.append(objective())
        expected = (values[0] - values[1]) / (2 * STEP)
        torch.testing.assert_close(slope, expected, rtol=0.02, atol=2e-3)

    @torch.no_grad()
    def test_forcing_no_word_changes_no_bit(self, family, model, batch, readings):
        plain = model(**batch).logits
        head = attach(model, AlignmentConfig(attention_loss="mass"))
        request = request_of(family, model, batch, readings, head.layers)
        request.forced = torch.zeros_like(request.present)
        assert torch.equal(model(**batch, attention_request=request).logits, plain)
        request = request_of(family, model, batch, readings, head.layers)
        request.forced = request.present
        forced = model(**batch, attention_request=request).logits
        assert not torch.equal(forced, plain)
        first = int(request.rows_BR.min())
        assert torch.equal(forced[:, :first], plain[:, :first]), "rows before the first forced one are the model's own"

    @pytest.mark.parametrize("kind", ["mass", "kl"])
    def test_the_loss_is_of_the_level(self, family, model, batch, readings, kind: Literal["mass", "kl"]):
        """It equals the formula on the captured rows, laid out by hand on the maps' grid."""
        head = attach(model, AlignmentConfig(attention_loss=kind, pooling="mean-mean", sharpen=1.0))
        request = request_of(family, model, batch, readings, head.layers)
        loss = model(**batch, attention_request=request).attention_loss
        assert loss.item() == pytest.approx(request.losses.sum().item(), rel=1e-5)
        if kind == "mass" and int(request.layout.pictures.max()) == 0 and not self.has_blank_keys(request):
            torch.testing.assert_close(request.losses, -torch.log(request.map_shares), rtol=1e-3, atol=1e-4)
        assert (request.map_shares > 0).all()
        assert (request.map_shares < 1).all()

    @staticmethod
    def has_blank_keys(request) -> bool:
        """Whether some keys show nothing of the picture, such as class tokens, or reach beyond it."""
        boxes = request.layout.boxes[request.layout.pictures >= 0] if request.layout.views is None else None
        if boxes is None:
            return False
        areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        return bool((areas <= 0).any() or (boxes < -1e-6).any() or (boxes > 1 + 1e-6).any())
