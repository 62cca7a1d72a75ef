"""Samples with several pictures and with none, LoRA and bfloat16: part of the contract of every family."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor

from families.asking import captured, cast
from families.core import EagerRows
from families.geometry import GRID, Family, laid, picture
from lavender.alignment.objective import TRAINED_PARTS, AlignmentRequest, attach, detach
from lavender.config import AlignmentConfig
from lavender.evaluation.leave_out import VIEWS, Case, logits_keeping, measure
from lavender.students.capture import AttentionRequest, row_tensors
from lavender.students.image_keys import KeyLayout
from lavender.students.registry import adapter_for
from lavender.students.word_maps import capturing
from lavender.training.trainable import name_all_linear

BFLOAT16 = 0.06  # of a row's mass: eager rounds to 8 bits, and so do the layers before, in another order


def batch_of_many(family: Family, samples: list[tuple[list[Image.Image], str]], side: str = "right") -> dict:
    """The model's inputs for samples of several pictures, or none, and an answer; by the real processor."""
    asked = {"type": "text", "text": "what is it?"}
    conversations: list[list[Any]] = [
        [
            {"role": "user", "content": [{"type": "image"}] * len(own) + [asked]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        for own, answer in samples
    ]
    texts = [family.processor.apply_chat_template(one, tokenize=False) for one in conversations]
    images = [own for own, _ in samples]
    return dict(
        family.processor(
            images=images if any(images) else None,
            text=texts,
            padding=True,
            padding_side=side,
            add_special_tokens=False,
            return_tensors="pt",
        )
    )


def sizes_of(samples: list[tuple[list[Image.Image], str]]) -> list[list[tuple[int, int]]]:
    return [[(one.height, one.width) for one in own] for own, _ in samples]


def boxes_and_pictures(layout: KeyLayout) -> tuple[Tensor, Tensor]:
    """Of one sample: the boxes (key, 4) of its keys and their pictures (key,); of a resampler, those of its patches."""
    if layout.views is None:
        return layout.boxes[0], layout.pictures[0]
    owners = [int(layout.pictures[layout.views == view][0]) for view in range(len(layout.boxes))]
    return layout.boxes.flatten(0, 1), torch.tensor(owners).repeat_interleave(layout.boxes.shape[1])


class Batches(EagerRows):
    """Collected as a part of the contract only, whose fixtures it uses."""

    @pytest.fixture(scope="class")
    @classmethod
    def samples(cls, family) -> list[tuple[list[Image.Image], str]]:
        """Two pictures, none, one."""
        first, second, third = (picture(size, seed) for seed, size in enumerate(family.sizes[:3]))
        return [([first, second], "a dog and a cat"), ([], "one red apple near the tiny house"), ([third], "sun")]

    @pytest.fixture(scope="class")
    @classmethod
    def many(cls, family, samples) -> dict[str, Tensor]:
        return batch_of_many(family, samples)

    def request_of_many(self, family, model, many, samples, layers) -> AlignmentRequest:
        """Two words of each picture, as many as there are: a row near the end, another one before it."""
        ends = (many["attention_mask"].sum(1) - 2).tolist()
        words = [[(end, end - 2), (end - 1,)] * len(own) for end, (own, _) in zip(ends, samples, strict=True)]
        pictures = [[index for index in range(len(own)) for _ in range(2)] for own, _ in samples]
        tensors = row_tensors(words, pictures) | adapter_for(model.config).key_tensors(
            many, sizes_of(samples), family.processor
        )
        targets = torch.rand(*tensors["present"].shape, *GRID, generator=torch.Generator().manual_seed(3))
        return AlignmentRequest(layers, tensors | {"targets": targets})

    def test_rows_of_several_pictures_and_none(self, family, model, many):
        adapter, ends = adapter_for(model.config), many["attention_mask"].sum(1)
        rows = torch.stack([ends - 2, ends - 4], dim=1)
        request = AttentionRequest(rows, adapter.usable_layers(), adapter.image_keys(many))
        with torch.no_grad():
            plain = model(**many).logits
            with capturing(model):
                assert torch.equal(model(**many, attention_request=request).logits, plain)
        torch.testing.assert_close(request.stacked(), self.eager_rows(model, many, request), rtol=0, atol=1e-6)
        if request.keys_BK is not None:
            assert request.stacked()[:, 1].abs().sum() == 0

    @pytest.mark.parametrize("pooling", ["layer-mean", "mean-mean", "flow-multi", "learn"])
    def test_a_word_is_laid_on_its_own_picture(self, family, model, many, samples, pooling):
        """The loss is finite and trains; a sample without a picture has no word, and changes nothing."""
        plain = model(**many).logits
        torch.manual_seed(7)
        head = attach(model, AlignmentConfig(attention_loss="published", pooling=pooling))
        model.train()
        request = self.request_of_many(family, model, many, samples, head.layers)
        output = model(**many, attention_request=request)
        assert torch.equal(output.logits, plain) or model.config.get_text_config().attention_dropout
        assert request.present.tolist() == [[True] * 4, [False] * 4, [True, True, False, False]]
        assert 0 < output.attention_loss < 6  # six words, each below one
        attention = head.attention(request)
        assert attention.shape[1:2] + attention.shape[3:] == (3, 4, *GRID)
        assert (attention[:, 0].flatten(3).sum(-1).amin(dim=(0, 1)) > 0).all()
        assert (attention[:, 0, :, 0] - attention[:, 0, :, 2]).abs().max() > 1e-4  # the same rows, another picture
        output.attention_loss.backward()
        assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)

    def test_the_default_loss_trains_with_several_pictures(self, family, model, many, samples):
        """It is finite and trains."""
        head = attach(model, AlignmentConfig())
        model.train()
        request = self.request_of_many(family, model, many, samples, head.layers)
        loss = model(**many, attention_request=request).attention_loss
        loss.backward()
        assert loss > 0
        assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)

    @pytest.mark.parametrize("alignment", [{}, {"attention_loss": "published"}], ids=["default", "published"])
    def test_a_batch_without_pictures(self, family, model, samples, alignment):
        """No word, so no loss; yet attached to the Aligner, if there is one: every process must use its parameters."""
        batch = batch_of_many(family, [([], answer) for _, answer in samples])
        plain = model(**batch).logits
        head = attach(model, AlignmentConfig(**alignment)).train()
        keys = adapter_for(model.config).key_tensors(batch, [[], [], []], family.processor)
        tensors = row_tensors([[], [], []]) | keys | {"targets": torch.zeros(3, 1, *GRID)}
        output = model(**batch, attention_request=AlignmentRequest(head.layers, tensors))
        assert torch.equal(output.logits, plain)
        assert output.attention_loss == 0
        if alignment:
            output.attention_loss.backward()
        assert bool(list(head.parameters())) == bool(alignment)
        assert all(one.grad is not None for one in head.parameters())

    def test_a_picture_alone_and_beside_another(self, family, model):
        """The boxes of a picture do not depend on its company."""
        adapter, (first, second) = adapter_for(model.config), family.sizes[:2]
        both = batch_of_many(family, [([picture(first), picture(second, 1)], "sun")])
        layout = adapter.image_boxes(both, [[first, second]], family.processor)
        boxes, pictures = boxes_and_pictures(layout)
        for index, size in enumerate((first, second)):
            alone = batch_of_many(family, [([picture(size, index)], "sun")])
            own = boxes[pictures == index]
            expected, _ = boxes_and_pictures(adapter.image_boxes(alone, [[size]], family.processor))
            if len(own) == len(expected):  # some processors cut fewer tiles where there are several pictures
                torch.testing.assert_close(own, expected)

    @torch.no_grad()
    def test_a_planted_patch_comes_back_on_its_own_picture(self, family, model):
        """Repaint a cell of the second picture: the keys that change are its own, and lie at that cell."""
        size = family.sizes[0]
        images = [picture(size), picture(size, 1)]
        layout = adapter_for(model.config).image_boxes(
            batch_of_many(family, [(images, "sun")]), [[size, size]], family.processor
        )
        boxes, pictures = boxes_and_pictures(layout)
        before = family.local_states(model, batch_of_many(family, [(images, "sun")])).flatten(0, 1)
        for planted in range(2):
            changed = [one.copy() for one in images]
            (y, x) = size[0] / 3, size[1] / 5
            changed[planted].paste((255, 255, 255), (round(2 * x), round(y), round(3 * x), round(2 * y)))
            after = family.local_states(model, batch_of_many(family, [(changed, "sun")])).flatten(0, 1)
            difference = (after - before).norm(dim=-1)
            own = pictures == planted
            assert difference[own].max() > 0
            assert difference[~own].max() < 1e-5 * difference.max()
            maps = laid((difference[own] / difference.sum())[None], boxes[own], (3, 5)).flatten()
            assert maps.argmax().item() == 7
            assert maps[7] > family.clear * maps.sum()

    @torch.no_grad()
    def test_the_check_replaces_the_keys_it_means(self, family, model, batch, readings):
        """What the language model gets: a kept key's own state, and elsewhere the mean."""
        adapter, seen = adapter_for(model.config), []
        real = adapter.image_boxes(batch, [[size] for size in family.sizes[:3]], family.processor).pictures >= 0
        kept = torch.rand(int(real.sum()), generator=torch.Generator().manual_seed(2)) < 0.3
        plain, everything = model(**batch).logits, torch.ones_like(kept)
        assert torch.equal(logits_keeping(model, adapter, batch, everything), plain)
        if (keys := adapter.image_keys(batch)) is None:
            module = adapter.resampler(model) or adapter.image_states(model)
            assert not torch.equal(logits_keeping(model, adapter, batch, kept), plain)
            assert not module._forward_hooks
            if adapter.resampler(model) is None:
                return
            key_projection = adapter.attention_module(model, adapter.usable_layers()[0]).k_proj
            for mask in (None, kept):
                handle = key_projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
                logits_keeping(model, adapter, batch, mask)
                handle.remove()
            whole, part = (states.flatten(0, -2) for states in seen)
            torch.testing.assert_close(part[kept], whole[kept], rtol=0, atol=0)
            torch.testing.assert_close(part[~kept], whole.mean(0).expand_as(part[~kept]))
            return
        decoder = model.get_decoder()
        layers = getattr(decoder, "model", decoder).layers
        for mask in (None, kept):
            handle = layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            logits_keeping(model, adapter, batch, mask)
            handle.remove()
        samples = real.nonzero()[:, 0]
        whole, part = (one[samples, keys[real]] for one in seen)
        torch.testing.assert_close(part[kept], whole[kept], rtol=0, atol=0)
        torch.testing.assert_close(part[~kept], whole.mean(0).expand_as(part[~kept]))
        others = torch.ones(seen[0].shape[:2], dtype=torch.bool)
        others[samples, keys[real]] = False
        assert torch.equal(seen[0][others], seen[1][others])
        assert not model.get_decoder()._forward_pre_hooks

    def test_words_are_predicted_from_parts_of_a_picture(self, family, model, readings):
        """What `lavender check` measures: with a map that is 1 everywhere, all attention lies on it."""
        maps = torch.cat([torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(4)), torch.ones(1, 4, 4)])
        cases = [Case(own, index, word, maps) for index, own in enumerate(readings) for word in own.words]
        dropped: Counter[str] = Counter()
        measured = measure(model, family.processor, cases, dropped)
        assert measured is not None
        assert len(measured.cases) == len(cases) - dropped.total()
        assert set(measured.losses) == {"whole", *VIEWS}
        assert all(values.isfinite().all() and (values > 0).all() for values in measured.losses.values())
        assert (measured.losses["there"] - measured.losses["elsewhere"]).abs().max() > 0
        torch.testing.assert_close(measured.chance, torch.ones_like(measured.chance))
        assert ((measured.level > 0) & (measured.level < 1)).all()
        assert ((measured.area > 0) & (measured.area <= 1)).all()
        assert all(states.isfinite().all() and len(states) == len(cases) for states in measured.features.values())

    def test_lora(self, family, model, batch):
        """Rows are those of eager attention with the adapter in place, and the loss trains the adapter alone."""
        adapter = adapter_for(model.config)
        names = {id(module): name for name, module in model.named_modules()}
        attentions = [adapter.attention_module(model, layer) for layer in adapter.usable_layers()]
        targets = [f"{names[id(one)]}.{part}" for one in attentions for part in ("q_proj", "v_proj")]
        head = attach(model, AlignmentConfig())
        head_parts = [name for name, _ in model.named_modules() if name.startswith("alignment_head")]
        assert head_parts
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        ends = batch["attention_mask"].sum(1).min().item() - 2
        tensors = row_tensors([[(ends,), (ends - 1,)]] * 3)
        sizes = [[size] for size in family.sizes[:3]]
        tensors |= adapter.key_tensors(batch, sizes, family.processor)
        request = AlignmentRequest(head.layers, tensors | {"targets": torch.rand(3, 2, *GRID)})
        tuned.train()
        tuned(**batch, attention_request=request).attention_loss.backward()
        for module in attentions:
            for part in ("lora_A", "lora_B"):
                assert module.q_proj.get_submodule(part).default.weight.grad.abs().max() > 0
            assert module.q_proj.base_layer.weight.grad is None
        detach(model)
        model.eval()
        request = captured(model, batch)
        torch.testing.assert_close(request.stacked(), self.eager_rows(model, batch, request), rtol=0, atol=1e-6)

    def test_all_linear_of_peft(self, model, batch):
        """LoRA on every linear layer of the model, and none on the output layer or on what alignment adds."""
        config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=[*TRAINED_PARTS])
        linear = {name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
        expected = {name for name in linear if "lm_head" not in name.split(".")}
        name_all_linear(config, model)
        attach(model, AlignmentConfig(attention_loss="published", pooling="learn", aligner_kind="mlp"))
        tuned = get_peft_model(model, config)
        found = {
            name.partition(".lora_A.")[0].removeprefix("base_model.model.")
            for name, _ in tuned.named_parameters()
            if ".lora_A." in name
        }
        assert found == expected
        assert torch.isfinite(tuned(**batch).logits).all()

    @torch.no_grad()
    def test_heads_are_pooled_in_the_capture(self, model, batch):
        every = captured(model, batch)
        for heads, expected in (("mean", every.stacked().mean(2)), ("max", every.stacked().amax(2))):
            request = AttentionRequest(every.rows_BR, every.layers, every.keys_BK)
            request.heads = heads
            with capturing(model):
                model(**batch, attention_request=request)
            assert request.stacked().shape[2] == 1
            torch.testing.assert_close(request.stacked()[:, :, 0], expected, rtol=1e-5, atol=1e-6)

    def test_rows_in_bfloat16(self, family, model, batch):
        """The captured rows are of float32 from the model's own queries and keys; eager's are rounded."""
        model.to(torch.bfloat16)
        inputs = cast(batch, torch.bfloat16)
        request = captured(model, inputs)
        rows, eager = request.stacked(), self.eager_rows(model, inputs, request).float()
        assert rows.dtype == torch.float32
        moved = (rows - eager).abs().sum(dim=-1) / eager.sum(dim=-1).clamp_min(1e-6)
        assert moved.max() < BFLOAT16
