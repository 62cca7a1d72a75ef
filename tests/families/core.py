"""The decisive part of the contract: what every second text model, tower or setting of a family keeps too.

Logits unchanged, rows exact, gradients that reach q and k, the padding's side, checkpointing, places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from families.asking import captured, eager_rows, request_of
from families.geometry import Geometry, batch_of, reading
from lavender.alignment.objective import attach
from lavender.config import AlignmentConfig
from lavender.students.capture import AttentionRequest
from lavender.students.kernels import set_kernel
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture, capturing

ANSWERS = ("a dog and a cat", "one red apple near the tiny house", "sun")
PUBLISHED: dict[str, Any] = {"attention_loss": "published"}
LEARN: dict[str, Any] = PUBLISHED | {"pooling": "learn"}
KINDS = pytest.mark.parametrize("alignment", [{}, LEARN], ids=["default", "learn"])
"""The default loss, which adds nothing to the model; and one that adds an Aligner and projections."""


class EagerRows:
    @staticmethod
    def eager_rows(model, batch: Mapping[str, Tensor], request: AttentionRequest) -> Tensor:
        """A family overrides this where transformers returns the rows of other layers, or none."""
        return eager_rows(model, batch, request)


class Core(EagerRows, Geometry):
    """Collected as a subclass only."""

    @pytest.fixture(scope="class")
    @classmethod
    def readings(cls, family) -> list[AnsweredPicture]:
        """Three pictures of different shapes, answers of different lengths."""
        return [reading(size, answer, seed) for seed, (size, answer) in enumerate(zip(family.sizes, ANSWERS))]  # noqa: B905

    @pytest.fixture(scope="class")
    @classmethod
    def batch(cls, family, readings) -> dict[str, Tensor]:
        return batch_of(family, readings)

    @pytest.mark.parametrize("kernel", ["sdpa", "eager"])
    @torch.no_grad()
    def test_logits_are_the_same_bits_with_capture(self, model, batch, kernel):
        set_kernel(model, kernel)
        adapter, plain, rows = (
            adapter_for(model.config),
            model(**batch).logits,
            torch.tensor([[5, 9], [8, 7], [12, 11]]),
        )
        request = AttentionRequest(rows, adapter.usable_layers(), adapter.image_keys(batch))
        with capturing(model):
            assert torch.equal(model(**batch).logits, plain)  # installed, not asked
            assert torch.equal(model(**batch, attention_request=request).logits, plain)
        assert tuple(request.rows) == adapter.usable_layers()
        assert torch.equal(model(**batch).logits, plain)

    @pytest.mark.parametrize("kernel", ["sdpa", "eager"])
    def test_rows_are_those_of_eager_attention(self, model, batch, kernel):
        set_kernel(model, kernel)
        request = captured(model, batch)
        assert request.stacked().dtype == torch.float32
        torch.testing.assert_close(request.stacked(), self.eager_rows(model, batch, request), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("alignment", [{}, PUBLISHED], ids=["default", "published"])
    def test_gradients_of_the_loss_reach_queries_and_keys_of_every_layer(
        self, family, model, batch, readings, alignment
    ):
        adapter, head = adapter_for(model.config), attach(model, AlignmentConfig(**alignment))
        assert bool(list(head.parameters())) == bool(alignment)
        model.train()
        output = model(**batch, attention_request=request_of(family, model, batch, readings, head.layers))
        output.attention_loss.backward()
        assert head.layers == adapter.usable_layers()
        for layer in head.layers:
            attention = adapter.attention_module(model, layer)
            for projection in (attention.q_proj, attention.k_proj):
                assert projection.weight.grad.abs().max() > 1e-8
                assert projection.weight.grad.isfinite().all()
        assert all(one.grad is not None and one.grad.isfinite().all() for one in head.parameters())

    def test_padding_side_changes_nothing(self, family, model, readings):
        stacked = []
        for side in ("left", "right"):
            batch = batch_of(family, readings, side)
            lengths = batch["attention_mask"].sum(1)
            shift = batch["attention_mask"].shape[1] - lengths if side == "left" else torch.zeros_like(lengths)
            assert shift.unique().numel() == (3 if side == "left" else 1)
            rows = lengths[:, None] - torch.tensor([[2, 3, 5]]) + shift[:, None]
            stacked.append(captured(model, batch, rows=rows).stacked())
        torch.testing.assert_close(*stacked, rtol=0, atol=1e-5)

    def gradients(self, family, batch, readings, alignment: dict[str, Any], **checkpointing: Any) -> dict[str, Tensor]:
        model = family.make()
        torch.manual_seed(7)
        head = attach(model, AlignmentConfig(**alignment))
        if checkpointing:
            model.activation_checkpointing_enable(checkpointing)
        model.train()
        output = model(**batch, attention_request=request_of(family, model, batch, readings, head.layers))
        (output.attention_loss + output.logits.square().mean()).backward()
        return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    @KINDS
    def test_checkpointing_without_reentry_gives_equal_gradients(self, family, batch, readings, alignment):
        plain = self.gradients(family, batch, readings, alignment)
        checkpointed = self.gradients(family, batch, readings, alignment, use_reentrant=False)
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            # float32 sums over many tokens; a gradient that is lost or counted twice differs by its own size. That of a
            # key's bias is nothing but rounding: attention does not depend on it
            atol = max(1e-7, 1e-5 * float(gradient.abs().max()))
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=atol, msg=name)
