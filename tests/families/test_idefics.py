"""IDEFICS under the contract: one square of 48 pixels, patches of 8, with a perceiver's latents and without."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
)
from trl.trainer.utils import add_fused_lm_head

from families.asking import captured, request_of
from families.batches import sizes_of
from families.contract import Contract
from families.geometry import GRID, Family, parameters_zeroed, picture
from lavender.alignment.objective import AlignmentRequest, attach
from lavender.config import AlignmentConfig
from lavender.evaluation.answers import end_ids
from lavender.students.capture import AttentionRequest, row_tensors
from lavender.students.families.idefics import IdeficsAdapter, IdeficsChatProcessor
from lavender.students.word_maps import AnsweredPicture, capturing, student_maps
from lavender.words import words_of
from lavender.world.student_models import _tokenizer

SQUARE, PATCH, SIDE, LATENTS = 48, 8, 6, 10
SIZES = ((300, 500), (97, 83), (200, 200), (37, 53))
MARK = "<fake_token_around_image><image><fake_token_around_image>"


def build_processor(texts: list[str]) -> IdeficsChatProcessor:
    """Its special tokens are the last of the vocabulary, in the order of the published ones."""
    tokenizer = _tokenizer(
        texts,
        300,
        ("<unk>", "<s>", "</s>"),
        "<fake_token_around_image>",
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.add_tokens(["<image>", "<end_of_utterance>"], special_tokens=True)
    return IdeficsChatProcessor(IdeficsImageProcessorPil(image_size=SQUARE), tokenizer)


def config_of(tokenizer, latents: int | None = LATENTS, **rest: Any) -> IdeficsConfig:
    """Four layers, of which the first and the third follow one that sees; gates opened."""
    return IdeficsConfig(
        vocab_size=len(tokenizer) - 3,
        additional_vocab_size=3,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=2,
        alpha_initializer="ones",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_resampler=latents is not None,
        initializer_range=0.1,
        vision_config={
            "embed_dim": 64,
            "image_size": SQUARE,
            "patch_size": PATCH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        },
        perceiver_config={
            "use_resampler": latents is not None,
            "resampler_n_latents": latents or 1,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "qk_layer_norms_perceiver": True,
        },
        **({"qk_layer_norms": True, "alpha_type": "vector"} | rest),  # ty: ignore[invalid-argument-type]
    )


def patch_states(model, inputs) -> torch.Tensor:
    """What the tower gives when patches do not exchange, its attention silenced: class token and patches."""
    model = copy.deepcopy(model)
    for layer in model.model.vision_model.encoder.layers:
        parameters_zeroed(layer.self_attn.out_proj)
    pixels = inputs["pixel_values"].flatten(0, 1)
    return model.model.vision_model(pixel_values=pixels).last_hidden_state


def pixels_of(inputs) -> torch.Tensor:
    images = IdeficsImageProcessorPil()
    square = inputs["pixel_values"][0, 0].permute(1, 2, 0) * torch.tensor(images.image_std)
    square = square + torch.tensor(images.image_mean)
    return square.unflatten(1, (SIDE, PATCH)).unflatten(0, (SIDE, PATCH)).transpose(1, 2).reshape(-1, PATCH**2, 3)


def blur(size: tuple[int, int]) -> tuple[float, float]:
    """Of the bicubic filter at the picture's border, as for LLaVA: less than 0.03 of a pixel, old or new."""
    return 0.03 / size[0], 0.03 / size[1]


def family_of(texts: list[str], latents: int | None) -> Family:
    processor = build_processor(texts)
    config = config_of(processor.tokenizer, latents)

    def make() -> IdeficsForVisionText2Text:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return IdeficsForVisionText2Text(copy.deepcopy(config)).eval()

    def patches(inputs) -> torch.Tensor:
        found = pixels_of(inputs)
        return found if latents else torch.cat([torch.zeros_like(found[:1]), found])

    return Family(
        make,
        processor,
        SIZES,
        patches=patches,
        blur=blur,
        clear=0.4,
        local_states=lambda model, inputs: patch_states(model, inputs)[:, 1 if latents else 0 :],
    )


@torch.no_grad()
def eager_rows(model, batch, request) -> torch.Tensor:
    """The rows of a request by transformers' own slow kernel, which returns those of self-attention alone."""
    eager, seen = copy.deepcopy(model), []
    eager.set_attn_implementation("eager")
    for layer in eager.model.gated_cross_attn_layers:
        layer.cross_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    eager(**batch)
    every = torch.stack(seen)  # (layer, sample, head, token, key)
    every = every[list(request.layers)]
    return torch.stack([every[:, at, :, own] for at, own in enumerate(request.rows_BR)], dim=1)


class LastPictureAlone(Contract):
    """Rows see the last picture before them. The tower is frozen: nothing before its layers has a gradient."""

    adapter = IdeficsAdapter

    eager_rows = staticmethod(eager_rows)

    def request_of_many(self, family, model, many, samples, layers) -> AlignmentRequest:
        """Of all pictures but the last the words stand right behind them."""
        adapter = IdeficsAdapter(model.config)
        words: list[list[tuple[int, ...]]] = []
        for ids, mask, (own, _) in zip(many["input_ids"], many["attention_mask"], samples, strict=True):
            places, end = (ids == adapter.image_token_id()).nonzero().flatten().tolist(), int(mask.sum()) - 2
            words.append([word for at in places[:-1] for word in ((at, at + 1), (at,))])
            words[-1] += [(end, end - 2), (end - 1,)] if own else []
        pictures = [[index for index in range(len(own)) for _ in range(2)] for own, _ in samples]
        tensors = row_tensors(words, pictures) | adapter.key_tensors(many, sizes_of(samples), family.processor)
        targets = torch.rand(*tensors["present"].shape, *GRID, generator=torch.Generator().manual_seed(3))
        return AlignmentRequest(layers, tensors | {"targets": targets})

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    def test_reentrant_checkpointing_is_noticed(self, family, batch, readings):
        super().test_reentrant_checkpointing_is_noticed(family, batch, readings)


class TestIdefics(LastPictureAlone):
    describes = "10 latents that look at 6 × 6 patches"

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions, LATENTS)

    def test_rows_are_of_the_layers_that_see(self, model, batch):
        request = captured(model, batch)
        assert request.stacked().shape == (2, 3, 4, 2, LATENTS)

    def test_layers_are_counted_among_those_that_see(self, model):
        adapter = IdeficsAdapter(model.config)
        assert adapter.usable_layers() == (0, 1)
        assert adapter.attention_module(model, 1) is model.model.gated_cross_attn_layers[1].cross_attn
        assert model.model.layers[1].self_attn.layer_idx == 1  # the same number, another layer

    def test_a_latents_attention_is_that_of_the_perceiver(self, model, batch):
        """By the perceiver's own code, with values that count: what a latent takes from a patch."""
        request = captured(model, batch)
        resampler = model.model.perceiver_resampler
        with torch.no_grad():
            context = model.model.vision_model(pixel_values=batch["pixel_values"].flatten(0, 1)).last_hidden_state
            latents, weights = resampler.latents.repeat(3, 1, 1), []
            for attention, mlp in resampler.blocks:
                weights.append(taken(attention, context, latents))
                latents = latents + attention(context, latents)
                latents = latents + mlp(latents)
        whole = torch.stack(weights).mean(0)  # class token, patches, latents
        patches = whole[:, :, 1 : 1 + SIDE**2]
        assert whole.shape[-1] == 1 + SIDE**2 + LATENTS
        torch.testing.assert_close(whole.sum(-1), torch.ones(3, LATENTS))
        torch.testing.assert_close(request.mixing, patches / patches.sum(-1, keepdim=True), rtol=0, atol=1e-5)

    def test_gradients_reach_the_perceiver(self, family, model, batch, readings):
        head = attach(model, AlignmentConfig())
        model.train()
        output = model(**batch, attention_request=request_of(family, model, batch, readings, head.layers))
        output.attention_loss.backward()
        for attention, _ in model.model.perceiver_resampler.blocks:
            for projection in (attention.q_proj, attention.k_proj):
                assert projection.weight.grad.abs().max() > 1e-8

    def test_the_loss_is_over_the_added_tokens_too(self, model, batch):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with pytest.raises(RuntimeError, match="is invalid for input"):  # of transformers 5.23: no training without us
            model(**batch, labels=labels)
        with capturing(model), torch.no_grad():
            output = model(**batch, labels=labels)
        expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:])
        torch.testing.assert_close(output.loss, expected)

    def test_trls_loss_is_over_the_added_tokens_too(self, model, batch):
        """TRL makes its logits itself, from the weight of the output embeddings."""
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        before = model.get_output_embeddings()
        with torch.no_grad(), capturing(model):
            logits = model(**batch).logits
            add_fused_lm_head(model)
            output = model(**batch, labels=labels, fused_lm_head=True)
        expected = -torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
        )
        assert (labels >= model.config.vocab_size).any()
        torch.testing.assert_close(output.log_probs, expected, rtol=0, atol=1e-5)
        assert model.get_output_embeddings() is before

    def test_the_layout_of_several_pictures_and_none(self, family, model):
        adapter = IdeficsAdapter(model.config)
        small, large = picture((97, 83)), picture((300, 500))
        texts = [f"<s>User:{MARK} and {MARK} a dog", "<s>User: a dog", f"<s>User:{MARK} a cat"]
        inputs = family.processor(images=[[small, large], [], [large]], text=texts, padding=True)
        layout = adapter.image_boxes(inputs, [[(97, 83), (300, 500)], [], [(300, 500)]], family.processor)
        assert layout.boxes.shape == (6, SIDE**2, 4)  # three samples of two pictures, some of padding
        assert layout.views is not None
        assert layout.pictures.shape == layout.views.shape == (3, 2 * LATENTS)
        assert layout.pictures.unique_consecutive(dim=1).tolist() == [[0, 1], [-1, -1], [0, -1]]
        assert layout.views.unique_consecutive(dim=1).tolist() == [[0, 1], [-1, -1], [4, -1]]
        seen = adapter.seen_from(inputs, layout)
        images = [(ids == adapter.image_token_id()).nonzero().flatten().tolist() for ids in inputs["input_ids"]]
        length = inputs["input_ids"].shape[1]
        assert [len(own) for own in images] == [2, 0, 1]
        first, second = images[0]
        assert seen[0].nonzero().tolist() == [[0, at] for at in range(first, second)] + [
            [1, at] for at in range(second, length)
        ]
        assert not seen[1].any()
        assert seen[2].nonzero().tolist() == [[0, at] for at in range(images[2][0], length)]
        request = AttentionRequest(torch.full((3, 1), length - 1), (0, 1))
        with capturing(model), torch.no_grad():
            model(**inputs, attention_request=request)
        assert request.mixing is not None
        assert request.mixing.shape == (6, LATENTS, SIDE**2)
        mass = request.stacked()[0, :, :, 0].unflatten(-1, (2, LATENTS)).sum(-1)
        torch.testing.assert_close(mass[0], torch.tensor([0.0, 1.0]).expand(4, 2))
        torch.testing.assert_close(mass[2], torch.tensor([1.0, 0.0]).expand(4, 2))


def taken(attention, context, latents) -> torch.Tensor:
    """How much of each key a perceiver's latents take, mean over heads, by its own forward: (view, latent, key).

    Values become one-hot numbers of the keys, a head at a time, and the output projection passes them on.
    """
    probe, heads, width = copy.deepcopy(attention), attention.n_heads, attention.head_dim
    keys = context.shape[1] + latents.shape[1]
    assert probe.output_proj.weight.shape[1] == heads * width
    weights = []
    for start in range(0, keys, width):  # so many keys at once as a head has numbers
        values = torch.zeros(keys, heads * width)
        for key in range(start, min(start + width, keys)):
            values[key, key - start :: width] = 1
        probe.v_proj.forward = lambda states, values=values: values.expand(len(states), -1, -1)
        seen = []
        handle = probe.output_proj.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        probe(context, latents)
        handle.remove()
        weights.append(seen[0].unflatten(-1, (heads, width)).mean(-2))
    return torch.cat(weights, dim=-1)[..., :keys]


class TestWithoutResampler(LastPictureAlone):
    """Keys are the class token and the patches."""

    describes = "class token + 6 × 6 patches"

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions, None)

    def test_rows_are_of_the_layers_that_see(self, model, batch):
        request = captured(model, batch)
        assert request.mixing is None
        assert request.stacked().shape == (2, 3, 4, 2, 1 + SIDE**2)

    def test_the_layout_of_several_pictures_and_none(self, family, model):
        adapter, large = IdeficsAdapter(model.config), picture((300, 500))
        texts = [f"<s>User:{MARK} and {MARK} a dog", "<s>User: a dog", f"<s>User:{MARK} a cat"]
        inputs = family.processor(images=[[large, large], [], [large]], text=texts, padding=True)
        layout = adapter.image_boxes(inputs, [[(300, 500)] * 2, [], [(300, 500)]], family.processor)
        assert layout.boxes.shape == (3, 2 * 37, 4)
        assert layout.pictures.unique_consecutive(dim=1).tolist() == [[0, 1], [-1, -1], [0, -1]]
        assert layout.boxes[:, [0, 37]].abs().sum() == 0  # class tokens
        assert layout.boxes[0, 1 + 7].tolist() == pytest.approx([1 / 6, 1 / 6, 2 / 6, 2 / 6])
        assert layout.boxes[1].abs().sum() == layout.boxes[2, 37:].abs().sum() == 0


def looking(processor: IdeficsChatProcessor, order: torch.Tensor) -> IdeficsForVisionText2Text:
    """A model whose latent i looks at patch order[i] alone, and whose text looks at bright latents.

    Of 64 numbers, 0–35 are a patch's place, one-hot, and 63 is its brightness. The text's first number is large.
    """
    config = config_of(processor.tokenizer, SIDE**2, qk_layer_norms=False, alpha_type="float")
    perceiver: Any = config.perceiver_config
    perceiver.qk_layer_norms_perceiver = False
    perceiver.resampler_depth, perceiver.resampler_n_heads, perceiver.resampler_head_dim = 1, 1, 64
    model = IdeficsForVisionText2Text(config).eval()
    vision, (attention, mlp) = model.model.vision_model, model.model.perceiver_resampler.blocks[0]
    with torch.no_grad():
        parameters_zeroed(vision.encoder)
        vision.pre_layrnorm.forward = lambda states: states
        embeddings = vision.embeddings
        embeddings.patch_embedding.weight.zero_()[63] = 4 / (3 * PATCH**2)
        embeddings.position_embedding.weight.zero_()[1:, :36] = 20 * torch.eye(36)
        embeddings.class_embedding.zero_()
        latents = model.model.perceiver_resampler.latents.zero_()
        latents[:, :36], latents[:, 50] = 20 * torch.eye(36)[order], 100  # the norm makes them weak keys of each other
        parameters_zeroed(mlp)
        parameters_zeroed(attention)
        for norm in (attention.context_layer_norm, attention.latents_layer_norm):
            norm.weight.fill_(1)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[:36, :36] = 5 * torch.eye(36)
        attention.v_proj.weight[63, 63] = attention.output_proj.weight[63, 63] = 5
        model.model.embed_tokens.weight[:, 0] = model.model.embed_tokens.additional_embedding.weight[:, 0] = 5
        for layer in model.model.gated_cross_attn_layers:
            parameters_zeroed(layer.mlp)
            cross = layer.cross_attn
            parameters_zeroed(cross)
            cross.q_proj.weight[:, 0] = 1
            cross.k_proj.weight[:, 63] = 1
    return model


@pytest.mark.parametrize("seed", [None, 3])
def test_a_planted_patch_comes_back_through_the_latents(captions, seed):
    """One white patch of a black picture: whatever order the latents have, every word's map is that patch."""
    processor = build_processor(captions)
    order = torch.arange(36) if seed is None else torch.randperm(36, generator=torch.Generator().manual_seed(seed))
    model = looking(processor, order)
    for row, col in ((0, 0), (1, 4), (5, 2), (3, 3)):
        image = Image.new("RGB", (600, 300))
        image.paste((255, 255, 255), (col * 100, row * 50, col * 100 + 100, row * 50 + 50))
        maps = student_maps(model, processor, [AnsweredPicture(image, "what?", "a dog", words_of("a dog"))], (6, 6))[
            0
        ].maps
        assert len(maps) == 2
        for one in maps.flatten(1):
            assert one.argmax().item() == row * 6 + col
            assert one.sort().values[-2] < 0.1


def test_the_template_as_the_model_was_tuned(captions):
    """A system prompt is nobody's turn, and a prompt ends before the answer's blank."""
    processor = build_processor(captions)
    asked = [{"role": "system", "content": "be short."}, {"role": "user", "content": "what?"}]
    whole = [*asked, {"role": "assistant", "content": "a dog"}]
    prompt = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    rendered = processor.apply_chat_template(whole, tokenize=False)
    start = processor.tokenizer.bos_token
    assert prompt == f"{start}be short.\nUser: what?<end_of_utterance>\nAssistant:"
    assert rendered == f"{prompt} a dog<end_of_utterance>"
    assert processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>") in end_ids(
        SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[1, 2])), processor
    )
