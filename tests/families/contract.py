"""What must hold for every family of students. A family's test file subclasses `Contract` and gives its fixtures.

1 logits unchanged · 2 rows exact · 3 gradients reach q and k · 4 the model is restored · 5 the place of every
image key · 6 padding side and batch order change nothing · 7 checkpointing.

Pictures are named by (height, width) in pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from lavender.alignment_data import row_tensors
from lavender.attention import Reading, capturing, student_maps
from lavender.config import AlignmentConfig, Pooling
from lavender.errors import CaptureError, ConfigError, UnsupportedModelError
from lavender.objective import HEAD_NAME, AlignmentRequest, attach, detach
from lavender.pooling import to_grid
from lavender.vlm.base import VlmAdapter
from lavender.vlm.capture import AttentionRequest, install, set_kernel
from lavender.vlm.registry import adapter_for
from lavender.words import words_of

GRID = (11, 13)
ANSWERS = ("a dog and a cat", "one red apple near the tiny house", "sun")


@dataclass(frozen=True)
class Family:
    """What a family's tests must bring.

    Attributes:
        make: makes a tiny model of random weights, each time the same, in eval mode.
        processor: its processor.
        sizes: (height, width) of pictures that together use every arrangement the processor knows.
        local_states: from the model and a batch's inputs, one vector for each image key that depends on the
            key's own pixels alone, (sample, key, width), in the order of attention. Found without lavender.
        patches: from a picture's inputs, the pixels of each image key, un-normalised to [0, 1]:
            (key, pixel, 3), zeros where a key shows none. Found without lavender.
        blur: how far the processor may shift a patch's mean colour, in shares of the picture, of each size.
    """

    make: Callable[[], PreTrainedModel]
    processor: ProcessorMixin
    sizes: tuple[tuple[int, int], ...]
    local_states: Callable[[PreTrainedModel, Mapping[str, Tensor]], Tensor]
    patches: Callable[[Mapping[str, Tensor]], Tensor]
    blur: Callable[[tuple[int, int]], tuple[float, float]]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Noise in big dots, so that neighbouring patches differ."""
    dots = np.random.default_rng(seed).integers(256, size=(5, 7, 3), dtype=np.uint8)
    return Image.fromarray(dots).resize((size[1], size[0]), Image.Resampling.NEAREST)


def coordinates(size: tuple[int, int]) -> Image.Image:
    """Red is x and green is y, as shares of the picture; blue is 1, and 0 nowhere but in padding."""
    rows, cols = (np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1]
    x, y = np.broadcast_to(cols, size), np.broadcast_to(rows[:, None], size)
    return Image.fromarray(np.rint(255 * np.stack([x, y, np.ones(size)], axis=-1)).astype(np.uint8))


def reading(size: tuple[int, int], answer: str, seed: int = 0) -> Reading:
    return Reading(picture(size, seed), "what is it?", answer, words_of(answer))


def batch_of(family: Family, readings: list[Reading], side: str = "right") -> dict[str, Tensor]:
    """The model's inputs for a batch of readings, by the real processor."""
    texts = [family.processor.apply_chat_template(one.messages(), tokenize=False) for one in readings]
    return dict(
        family.processor(
            images=[[one.image] for one in readings], text=texts, padding=True, padding_side=side,
            add_special_tokens=False, return_tensors="pt",
        )
    )  # fmt: skip


def request_of(adapter: VlmAdapter, batch: Mapping[str, Tensor], readings: list[Reading], layers) -> AlignmentRequest:
    """An alignment request of two words a sample (one in the last), rows near the end, random targets."""
    end = int(batch["attention_mask"].sum(1).min()) - 2
    words = [[(end, end - 3), (end - 1,)]] * (len(readings) - 1) + [[(end - 2,)]]
    tensors = row_tensors(words)
    targets = torch.rand(*tensors["present"].shape, *GRID, generator=torch.Generator().manual_seed(3))
    boxes = adapter.image_boxes(batch, [(one.image.height, one.image.width) for one in readings])
    return AlignmentRequest(layers, tensors | {"targets": targets, "boxes": boxes})


def traces(model: PreTrainedModel) -> list:
    """All that lavender could leave behind in a model."""
    hooks = [(name, len(one._forward_hooks), len(one._forward_pre_hooks)) for name, one in model.named_modules()]
    kernels = [model.config.get_text_config()._attn_implementation, model.config.vision_config._attn_implementation]
    return [hooks, list(model.state_dict()), kernels, model.config.to_dict(), model.training]


class Contract:
    """Collected as a subclass only. A subclass has a fixture `family` of scope "class"."""

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls) -> Family:
        raise NotImplementedError

    @pytest.fixture
    def model(self, family) -> PreTrainedModel:
        return family.make()

    @pytest.fixture(scope="class")
    @classmethod
    def readings(cls, family) -> list[Reading]:
        """Three pictures of different shapes, answers of different lengths."""
        return [reading(size, answer, seed) for seed, (size, answer) in enumerate(zip(family.sizes, ANSWERS))]  # noqa: B905

    @pytest.fixture(scope="class")
    @classmethod
    def batch(cls, family, readings) -> dict[str, Tensor]:
        return batch_of(family, readings)

    # 1

    @torch.no_grad()
    def test_logits_are_the_same_bits_with_capture(self, model, batch):
        layers = adapter_for(model.config).usable_layers()
        plain = model(**batch).logits
        request = AttentionRequest(torch.tensor([[5, 9], [8, 7], [12, 11]]), layers)
        with capturing(model):
            assert torch.equal(model(**batch).logits, plain)  # installed, not asked
            assert torch.equal(model(**batch, attention_request=request).logits, plain)
        assert tuple(request.rows) == layers
        assert torch.equal(model(**batch).logits, plain)

    @torch.no_grad()
    def test_generation_is_the_same_with_capture(self, model, batch):
        one = {name: tensor[:1] for name, tensor in batch.items()}
        plain = model.generate(**one, max_new_tokens=5, do_sample=False)
        with capturing(model):
            assert torch.equal(model.generate(**one, max_new_tokens=5, do_sample=False), plain)

    @pytest.mark.parametrize("pooling", ["layer-mean", "learn"])
    def test_logits_are_the_same_bits_with_the_objective(self, model, batch, readings, pooling):
        adapter, plain = adapter_for(model.config), model(**batch).logits
        head = attach(model, AlignmentConfig(pooling=pooling))
        output = model(**batch, attention_request=request_of(adapter, batch, readings, head.layers))
        assert torch.equal(output.logits, plain)
        assert 0 < output.attention_loss.item() < 2 * 3  # five words, each below one
        assert "attention_loss" not in model(**batch)

    # 2

    @torch.no_grad()
    def test_rows_are_those_of_eager_attention(self, model, batch):
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        expected = eager(**batch, output_attentions=True).attentions
        layers = adapter_for(model.config).usable_layers()
        request = AttentionRequest(torch.tensor([[5, 9], [8, 7], [12, 11]]), layers)
        with capturing(model):
            model(**batch, attention_request=request)
        stacked = request.stacked()
        assert stacked.dtype == torch.float32
        for rows_BHRK, layer in zip(stacked, layers, strict=True):
            for sample, rows in enumerate(request.rows_BR.tolist()):
                torch.testing.assert_close(rows_BHRK[sample], expected[layer][sample][:, rows], rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_chosen_layers_alone_are_captured(self, model, batch):
        last = adapter_for(model.config).layers(adapter_for(model.config).usable_layers()[-1:])
        request = AttentionRequest(torch.tensor([[5], [8], [12]]), last)
        with capturing(model):
            model(**batch, attention_request=request)
        assert tuple(request.rows) == last

    def test_a_layer_that_does_not_see_the_picture_is_refused(self, model):
        adapter = adapter_for(model.config)
        with pytest.raises(ConfigError, match=r"of which \[101\] do not see the picture") as caught:
            adapter.layers((*adapter.usable_layers(), 101))
        assert f"Expected some of {adapter.usable_layers()}." in str(caught.value)

    # 3

    def test_gradients_of_the_loss_reach_queries_and_keys_of_every_layer(self, model, batch, readings):
        adapter, head = adapter_for(model.config), attach(model, AlignmentConfig())
        model.train()
        output = model(**batch, attention_request=request_of(adapter, batch, readings, head.layers))
        output.attention_loss.backward()
        assert head.layers == adapter.usable_layers()
        for layer in head.layers:
            attention = adapter.attention_module(model, layer)
            for projection in (attention.q_proj, attention.k_proj):
                assert projection.weight.grad.abs().max() > 1e-8
                assert projection.weight.grad.isfinite().all()
        assert all(one.grad is not None and one.grad.isfinite().all() for one in head.parameters())

    def test_learned_projections_alone_get_the_gradient(self, model, batch, readings):
        """The last layer's own projections get none; earlier ones get it through the hidden states."""
        adapter, head = adapter_for(model.config), attach(model, AlignmentConfig(pooling="learn"))
        model.train()
        model(**batch, attention_request=request_of(adapter, batch, readings, head.layers)).attention_loss.backward()
        for layer in head.layers:
            attention = adapter.attention_module(model, layer)
            parallel = attention.get_submodule("alignment_parallel")
            assert parallel.query.weight.grad.abs().max() > 1e-8
            assert parallel.key.weight.grad.abs().max() > 1e-8
            assert torch.equal(parallel.query.weight, attention.q_proj.weight)
        assert attention.q_proj.weight.grad is None
        assert attention.k_proj.weight.grad is None

    @torch.no_grad()
    def test_learned_projections_begin_as_the_models_own(self, model, batch, readings):
        adapter = adapter_for(model.config)
        losses, rows = [], []
        for pooling in ("layer-mean", "learn"):
            torch.manual_seed(7)
            head = attach(model, AlignmentConfig(pooling=pooling))
            request = request_of(adapter, batch, readings, head.layers)
            losses.append(model(**batch, attention_request=request).attention_loss)
            rows.append(request.stacked())
            detach(model)
        torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)

    # 4

    @pytest.mark.parametrize("pooling", ["layer-mean", "learn"])
    def test_detach_leaves_the_model_as_it_was(self, model, pooling):
        before = traces(model)
        attach(model, AlignmentConfig(pooling=pooling))
        assert traces(model) != before
        with pytest.raises(ConfigError, match="Got a model with an alignment head"):
            attach(model, AlignmentConfig())
        detach(model)
        assert traces(model) == before

    def test_the_model_is_restored_after_an_exception(self, model):
        before = traces(model)
        with pytest.raises(KeyError, match="mine"), capturing(model):
            assert traces(model) != before
            raise KeyError("mine")
        assert traces(model) == before

    def test_the_model_is_restored_after_failed_maps(self, family, model, readings):
        model.train()
        before = traces(model)
        wrong = Reading(readings[0].image, "what?", "a dog", words_of("a very different text of many words, here"))
        bad = Reading(Image.new("RGB", (40, 50)), "what?", None, wrong.words)  # ty: ignore[invalid-argument-type]
        with pytest.raises(Exception):  # noqa: B017, PT011
            student_maps(model, family.processor, [readings[0], bad], GRID)
        assert traces(model) == before

    def test_install_names_the_kernel_that_was_there(self, model):
        before = traces(model)
        assert install(model) == "sdpa"
        assert install(model) == "lavender_sdpa"
        set_kernel(model, "sdpa")
        assert traces(model) == before

    @pytest.mark.parametrize("pooling", ["layer-mean", "learn"])
    def test_maps_of_a_model_in_alignment(self, family, model, batch, readings, pooling):
        """They show the model's own attention, never the parallel one, and alignment goes on afterwards."""
        adapter = adapter_for(model.config)
        own = student_maps(model, family.processor, readings, GRID)
        head = attach(model, AlignmentConfig(pooling=pooling))
        for name, parameter in model.named_parameters():
            if "alignment_parallel" in name:
                parameter.data = torch.randn_like(parameter)
        before = traces(model)
        during = student_maps(model, family.processor, readings, GRID)
        assert traces(model) == before
        for one, other in zip(during, own, strict=True):
            assert torch.equal(one.maps, other.maps)
        output = model(**batch, attention_request=request_of(adapter, batch, readings, head.layers))
        assert output.attention_loss > 0

    def test_another_kernel_is_refused(self, model):
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedModelError, match="load the model with attn_implementation='sdpa'"):
            attach(model, AlignmentConfig())
        assert HEAD_NAME not in dict(model.named_children())

    # 5

    def boxes_of(self, family, model, size, image=None) -> tuple[dict[str, Tensor], Tensor]:
        """A picture's inputs and the boxes (key, 4) of its keys."""
        one = Reading(picture(size) if image is None else image, "what?", "dog", words_of("dog"))
        inputs = batch_of(family, [one])
        return inputs, adapter_for(model.config).image_boxes(inputs, [size])[0]

    def test_every_patch_shows_what_its_box_says(self, family, model):
        for size in family.sizes:
            inputs, boxes = self.boxes_of(family, model, size, coordinates(size))
            colours = family.patches(inputs).double()
            inside = to_grid(torch.eye(len(boxes))[None, None, None], boxes[None], (1, 1)).flatten().double()
            # blue is 1 in the picture and 0 in padding: its mean is the share of the box inside the picture
            torch.testing.assert_close(colours[..., 2].mean(1), inside, rtol=0, atol=1e-5, msg=f"{size}")
            whole = inside > 1 - 1e-6
            assert whole.sum() >= 16
            centre = (boxes[whole, :2] + boxes[whole, 2:]) / 2
            found = colours[whole][..., [1, 0]].mean(1)  # green is y, red is x
            error = (found - centre).abs().amax(dim=0)
            blur = family.blur(size)
            assert error[0] <= 0.002 + blur[0], f"rows of {size}: {error[0]:.5f}"
            assert error[1] <= 0.002 + blur[1], f"columns of {size}: {error[1]:.5f}"

    def test_a_planted_patch_comes_back_at_its_cell(self, family, model):
        """Repaint one cell: the keys whose states change are those that lie there, in the order of attention."""
        grid = (3, 5)
        for size in family.sizes:
            image = picture(size)
            for row, col in ((0, 0), (0, 4), (1, 2), (2, 1), (2, 4)):
                top, bottom = round(row * size[0] / 3), round((row + 1) * size[0] / 3)
                left, right = round(col * size[1] / 5), round((col + 1) * size[1] / 5)
                planted = image.copy()
                planted.paste((255, 255, 255), (left, top, right, bottom))
                inputs, boxes = self.boxes_of(family, model, size, image)
                changed, _ = self.boxes_of(family, model, size, planted)
                with torch.no_grad():
                    before, after = family.local_states(model, inputs), family.local_states(model, changed)
                attention = (after - before)[0].norm(dim=-1)
                assert attention.max() > 0
                maps = to_grid((attention / attention.sum())[None, None, None, None], boxes[None], grid).flatten()
                assert maps.argmax().item() == row * 5 + col, f"cell {row, col} of {size}"
                assert maps[row * 5 + col] > 0.5 * maps.sum(), f"cell {row, col} of {size}"

    def test_attention_on_one_key_comes_back_in_its_box(self, family, model):
        for size in family.sizes:
            _, boxes = self.boxes_of(family, model, size)
            maps = to_grid(torch.eye(len(boxes))[None, None, None], boxes[None], GRID)[0, 0, 0]
            top, left, bottom, right = boxes.unbind(-1)
            middle_row, middle_col = (top + bottom) / 2 * GRID[0], (left + right) / 2 * GRID[1]
            inside = (bottom > top) & (middle_row < GRID[0]) & (middle_col < GRID[1])
            assert inside.any()
            for index in inside.nonzero().flatten().tolist():
                assert maps[index, int(middle_row[index]), int(middle_col[index])] > 0
            assert maps[bottom <= top].abs().sum() == 0
            assert maps[(top >= 1) | (left >= 1)].abs().sum() == 0

    # 6

    def test_batch_order_and_company_change_nothing(self, family, model, readings):
        together = student_maps(model, family.processor, readings, GRID)
        backwards = student_maps(model, family.processor, readings[::-1], GRID)[::-1]
        alone = student_maps(model, family.processor, readings, GRID, batch_size=1)
        for one, *others, given in zip(together, backwards, alone, readings, strict=True):
            assert one.words == given.words
            for other in others:
                assert other.words == one.words
                torch.testing.assert_close(other.maps, one.maps, rtol=0, atol=1e-5)
        assert (together[0].maps[0] - together[1].maps[0]).abs().max() > 1e-3

    @torch.no_grad()
    def test_padding_side_changes_nothing(self, family, model, readings):
        layers, captured = adapter_for(model.config).usable_layers(), []
        for side in ("left", "right"):
            batch = batch_of(family, readings, side)
            lengths = batch["attention_mask"].sum(1)
            shift = batch["attention_mask"].shape[1] - lengths if side == "left" else torch.zeros_like(lengths)
            assert shift.unique().numel() == (3 if side == "left" else 1)
            rows = lengths[:, None] - torch.tensor([[2, 3, 5]]) + shift[:, None]
            request = AttentionRequest(rows, layers)
            with capturing(model):
                model(**batch, attention_request=request)
            captured.append(request.stacked())
        torch.testing.assert_close(*captured, rtol=0, atol=1e-5)

    def test_no_words_no_maps(self, family, model, readings):
        maps = student_maps(model, family.processor, [Reading(readings[0].image, "what?", "12!", ())], GRID)[0]
        assert maps.maps.shape == (0, *GRID)

    # 7

    def gradients(self, family, batch, readings, pooling: Pooling, **checkpointing: Any) -> dict[str, Tensor]:
        model = family.make()
        adapter = adapter_for(model.config)
        torch.manual_seed(7)
        head = attach(model, AlignmentConfig(pooling=pooling))
        if checkpointing:
            model.activation_checkpointing_enable(checkpointing)
        model.train()
        output = model(**batch, attention_request=request_of(adapter, batch, readings, head.layers))
        (output.attention_loss + output.logits.square().mean()).backward()
        return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    @pytest.mark.parametrize("pooling", ["layer-mean", "learn"])
    def test_checkpointing_without_reentry_gives_equal_gradients(self, family, batch, readings, pooling):
        plain = self.gradients(family, batch, readings, pooling)
        checkpointed = self.gradients(family, batch, readings, pooling, use_reentrant=False)
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)

    def test_reentrant_checkpointing_is_noticed(self, family, batch, readings):
        with pytest.raises(CaptureError, match="Got attention rows without gradient while training"):
            self.gradients(family, batch, readings, "layer-mean", use_reentrant=True)


def parameters_zeroed(module: nn.Module) -> None:
    """Silence a module whose output is added to a residual stream."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
