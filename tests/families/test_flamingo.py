"""OpenFlamingo under the contract, and its published checkpoints: the same outputs, there and back."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
)

from families.asking import captured, request_of
from families.batches import sizes_of
from families.contract import Contract
from families.core import LEARN
from families.flamingo_published import Flamingo
from families.geometry import GRID, Family, batch_of, parameters_zeroed, picture, reading
from families.test_llava import CROP, blur, view
from families.training import train_two_steps
from lavender.alignment.objective import AlignmentRequest, attach
from lavender.config import AlignmentConfig
from lavender.errors import DataError, UnsupportedModelError
from lavender.evaluation.answers import end_ids, generate_answers
from lavender.students.capture import row_tensors
from lavender.students.families.flamingo import (
    FlamingoAdapter,
    FlamingoProcessor,
    convert,
    load_open_flamingo,
    published,
)
from lavender.students.families.flamingo_model import LANGUAGE_MODELS, FlamingoConfig, FlamingoForConditionalGeneration
from lavender.students.word_maps import AnsweredPicture, student_maps
from lavender.training.run import load_run
from lavender.words import words_of
from lavender.world.student_models import _tokenizer

SQUARE, PATCH, SIDE, LATENTS = 96, 8, 12, 10
SIZES = ((300, 500), (97, 133), (200, 200), (37, 23))


def build_processor(texts: list[str], images=CROP) -> FlamingoProcessor:
    """Two tokens are added to those of the language model, in the published order."""
    tokenizer = _tokenizer(texts, 300, ("<pad>", "</s>"), "<|endofchunk|>", pad_token="<pad>", eos_token="</s>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return FlamingoProcessor(images, tokenizer)


def vision_config(**rest: Any) -> CLIPVisionConfig:
    sizes = {"hidden_size": 32, "image_size": SQUARE, "num_hidden_layers": 2, "num_attention_heads": 2} | rest
    return CLIPVisionConfig(intermediate_size=64, patch_size=PATCH, **sizes)  # ty: ignore[invalid-argument-type]


def language_config(kind: str, vocabulary: int) -> Any:
    """Four layers of 64 numbers."""
    if kind == "mpt":
        return MptConfig(vocab_size=vocabulary, d_model=64, n_layers=4, n_heads=4, bos_token_id=0, eos_token_id=1)
    sizes: Any = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    if kind == "llama":
        return LlamaConfig(intermediate_size=128, num_key_value_heads=2, **sizes)
    if kind == "gpt_neox":
        return GPTNeoXConfig(intermediate_size=128, tie_word_embeddings=False, **sizes)
    return OPTConfig(ffn_dim=128, word_embed_proj_dim=64, dropout=0.0, **sizes)


def opened(model: Any) -> FlamingoForConditionalGeneration:
    """With gates open, and a perceiver whose latents differ."""
    with torch.no_grad():
        for block in model.model.gated_cross_attn_layers.values():
            block.attn_gate.fill_(0.7)
            block.ff_gate.fill_(0.4)
            for one in (block.attn.q_proj, block.attn.k_proj):
                one.weight.normal_(std=0.2)
        for attention, _ in model.model.perceiver.layers:
            attention.to_q.weight.normal_(std=0.2)
    return model


def local_states(model, inputs) -> torch.Tensor:
    """What the perceiver gets when patches do not exchange: the tower's attention silenced."""
    model = copy.deepcopy(model)
    for layer in model.model.vision_tower.encoder.layers:
        parameters_zeroed(layer.self_attn.out_proj)
    return model.model.vision_tower(pixel_values=inputs["pixel_values"].flatten(0, 1)).last_hidden_state[:, 1:]


def patches(inputs) -> torch.Tensor:
    square = inputs["pixel_values"][0, 0].permute(1, 2, 0) * torch.tensor(CROP.image_std) + torch.tensor(
        CROP.image_mean
    )
    return square.unflatten(1, (SIDE, PATCH)).unflatten(0, (SIDE, PATCH)).transpose(1, 2).reshape(-1, PATCH**2, 3)


def family_of(texts: list[str], kind: str = "llama") -> Family:
    processor = build_processor(texts)
    config = FlamingoConfig(
        language_config(kind, len(processor.tokenizer)),
        vision_config(),
        processor.image_token_id,
        cross_attn_every_n_layers=2,
        perceiver_depth=2,
        perceiver_latents=LATENTS,
    )

    def make() -> FlamingoForConditionalGeneration:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return opened(FlamingoForConditionalGeneration(copy.deepcopy(config)).eval())

    return Family(make, processor, SIZES, local_states, patches, blur, view=view)


@torch.no_grad()
def eager_rows(model, batch, request) -> torch.Tensor:
    eager, seen = copy.deepcopy(model), []
    eager.set_attn_implementation("eager")
    for block in eager.model.gated_cross_attn_layers.values():
        block.attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    eager(**batch)
    every = torch.stack(seen)[[eager_layers(model).index(layer) for layer in request.layers]]
    return torch.stack([every[:, at, :, own] for at, own in enumerate(request.rows_BR)], dim=1)


def eager_layers(model) -> list[int]:
    return [int(name) for name in model.model.gated_cross_attn_layers]


class TestFlamingo(Contract):
    adapter = FlamingoAdapter
    describes = "10 latents that look at 12 × 12 patches"

    eager_rows = staticmethod(eager_rows)

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions)

    def request_of_many(self, family, model, many, samples, layers) -> AlignmentRequest:
        """Rows see the last picture before them: of all others the words stand right behind them."""
        words: list[list[tuple[int, ...]]] = []
        for ids, mask, (own, _) in zip(many["input_ids"], many["attention_mask"], samples, strict=True):
            places = (ids == model.config.image_token_id).nonzero().flatten().tolist()
            end = int(mask.sum()) - 2
            words.append([word for at in places[:-1] for word in ((at,), (at,))])
            words[-1] += [(end, end - 2), (end - 1,)] if own else []
        pictures = [[index for index in range(len(own)) for _ in range(2)] for own, _ in samples]
        tensors = row_tensors(words, pictures)
        tensors |= FlamingoAdapter(model.config).key_tensors(many, sizes_of(samples), family.processor)
        targets = torch.rand(*tensors["present"].shape, *GRID, generator=torch.Generator().manual_seed(3))
        return AlignmentRequest(layers, tensors | {"targets": targets})

    def test_layers_are_those_with_a_block_before_them(self, model):
        adapter = FlamingoAdapter(model.config)
        assert adapter.usable_layers() == (1, 3)
        assert adapter.attention_module(model, 3) is model.model.gated_cross_attn_layers["3"].attn
        assert adapter.num_heads() == 8
        assert model.config.language_config.num_attention_heads == 4

    def test_a_latents_attention_by_hand(self, model, batch):
        request = captured(model, batch)
        perceiver = model.model.perceiver
        with torch.no_grad():
            media = local = model.model.vision_tower(batch["pixel_values"].flatten(0, 1)).last_hidden_state[:, 1:]
            latents, maps = perceiver.latents.expand(3, -1, -1), []
            for attention, mlp in perceiver.layers:
                keys = torch.cat([attention.norm_media(local), attention.norm_latents(latents)], dim=1)
                query = attention.to_q(attention.norm_latents(latents)).view(3, LATENTS, 8, 64)
                key = attention.to_kv(keys)[..., :512].view(3, -1, 8, 64)
                maps.append((torch.einsum("vnhd,vkhd->vhnk", query, key) / 8).softmax(-1).mean(1))
                latents = latents + attention(media, latents)
                latents = latents + mlp(latents)
        expected = torch.stack(maps).mean(0)[..., : SIDE**2]
        torch.testing.assert_close(request.mixing, expected / expected.sum(-1, keepdim=True), rtol=0, atol=1e-6)

    def test_gradients_reach_the_perceiver(self, family, model, batch, readings):
        head = attach(model, AlignmentConfig())
        model.train()
        output = model(**batch, attention_request=request_of(family, model, batch, readings, head.layers))
        output.attention_loss.backward()
        for attention, _ in model.model.perceiver.layers:
            assert attention.to_q.weight.grad.abs().max() > 1e-8
            assert attention.to_kv.weight.grad[:512].abs().max() > 1e-8

    @torch.no_grad()
    def test_generation_sees_the_picture_all_along(self, family, model):
        """With the cache and without, and another picture says something else."""
        one, other = (batch_of(family, [reading((200, 200), "a dog", seed)]) for seed in (1, 2))
        settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
        found = model.generate(**one, **settings)
        assert torch.equal(model.generate(**one, **settings, use_cache=False), found)
        assert model.generate(**one, **settings, num_beams=2).shape == found.shape
        assert not torch.equal(model(**other).logits, model(**one).logits)

    def test_saving_and_loading(self, family, model, readings, batch, tmp_path):
        model.save_pretrained(tmp_path)
        family.processor.save_pretrained(tmp_path)
        loaded, processor = load_run(tmp_path)
        again = batch_of(replace(family, processor=processor), readings)
        with torch.no_grad():
            # two copies of the weights: not the same bits on every CPU
            torch.testing.assert_close(loaded(**again).logits, model(**batch).logits, rtol=0, atol=1e-5)


def tiny_published(kind: str, every: int, vocabulary: int, media_token_id: int) -> tuple[Any, Any, Any]:
    """A published structure with gates open; its tower and language model, as they were before."""
    vision = CLIPVisionModel(vision_config(image_size=32)).eval()
    language = AutoModelForCausalLM.from_config(language_config(kind, vocabulary)).eval()
    parts, plain = LANGUAGE_MODELS[kind], copy.deepcopy(language)
    model = Flamingo(vision, language, f"{parts.backbone}.{parts.layers}", media_token_id, every, 2, 7).eval()
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "_gate" in name:
                one.uniform_(0.3, 1)
            elif "gated_cross_attn" in name or "perceiver" in name:
                one.add_(0.1 * torch.randn_like(one))
    return model, copy.deepcopy(vision), plain


KINDS = pytest.mark.parametrize(("kind", "every"), [("llama", 1), ("gpt_neox", 2), ("opt", 4), ("mpt", 4)])


class TestCheckpoints:
    @KINDS
    @torch.no_grad()
    def test_the_outputs_are_the_published_structures(self, kind, every, tmp_path):
        """Several pictures, text before any, padding; every weight is read."""
        theirs, vision, language = tiny_published(kind, every, 50, 49)
        checkpoint = theirs.checkpoint()
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        ours = load_open_flamingo(tmp_path / "checkpoint.pt", vision, language, 49, every).eval()
        ids = torch.randint(2, 48, (2, 12), generator=torch.Generator().manual_seed(1))
        ids[0, [2, 6]] = ids[1, 4] = 49
        mask = torch.ones_like(ids)
        mask[1, 10:] = 0
        pixels = torch.randn(2, 2, 3, 32, 32)
        expected = theirs(pixels[:, :, None], ids, mask).logits
        found = ours(ids, attention_mask=mask, pixel_values=pixels).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
        assert (ours(ids, attention_mask=mask, pixel_values=pixels * 0).logits - found).abs().max() > 1e-3

    @KINDS
    def test_weight_by_weight(self, kind, every):
        theirs, _, _ = tiny_published(kind, every, 50, 49)
        checkpoint = {name: torch.randn_like(one) for name, one in theirs.checkpoint().items()}
        converted, parts = convert(checkpoint, kind, 4), LANGUAGE_MODELS[kind]
        layers = f"lang_encoder.{parts.backbone}.{parts.layers}"
        assert len(converted) == len(checkpoint) + 4 // every  # keys and values are two
        for name, one in checkpoint.items():
            if name.startswith("perceiver."):
                assert converted[f"model.{name}"] is one
        for layer in range(every - 1, 4, every):
            ours, their = f"model.gated_cross_attn_layers.{layer}", f"{layers}.{layer}.gated_cross_attn_layer"
            for here, there in {
                "norm.weight": "attn.norm.weight",
                "norm.bias": "attn.norm.bias",
                "attn.q_proj.weight": "attn.to_q.weight",
                "attn.o_proj.weight": "attn.to_out.weight",
                "attn_gate": "attn_gate",
                "ff.0.weight": "ff.0.weight",
                "ff.0.bias": "ff.0.bias",
                "ff.1.weight": "ff.1.weight",
                "ff.3.weight": "ff.3.weight",
                "ff_gate": "ff_gate",
            }.items():
                assert converted[f"{ours}.{here}"] is checkpoint[f"{their}.{there}"]
            both = torch.cat([converted[f"{ours}.attn.{part}_proj.weight"] for part in "kv"])
            assert torch.equal(both, checkpoint[f"{their}.attn.to_kv.weight"])

    @KINDS
    def test_there_and_back(self, kind, every, tmp_path):
        theirs, vision, language = tiny_published(kind, every, 50, 49)
        checkpoint = theirs.checkpoint()
        torch.save(
            {"epoch": 3, "model_state_dict": {f"module.{name}": one for name, one in checkpoint.items()}},
            tmp_path / "checkpoint_3.pt",
        )
        back = published(load_open_flamingo(tmp_path / "checkpoint_3.pt", vision, language, 49, every))
        assert {name for name in checkpoint if "embed" not in name} <= set(back)
        for name, one in back.items():
            assert torch.equal(one, checkpoint[name]), name

    def test_embeddings_are_resized(self, tmp_path):
        """The published tokenizer has tokens that the language model was not made with."""
        theirs, vision, _ = tiny_published("gpt_neox", 2, 53, 52)
        torch.save(theirs.checkpoint(), tmp_path / "checkpoint.pt")
        language = AutoModelForCausalLM.from_config(language_config("gpt_neox", 50))
        model: Any = load_open_flamingo(tmp_path / "checkpoint.pt", vision, language, 52, 2)
        assert model.config.vocab_size == 53
        assert torch.equal(model.get_input_embeddings().weight, theirs.lang_encoder.gpt_neox.embed_in.weight)
        assert torch.equal(model.lm_head.weight, theirs.lang_encoder.lm_head.weight)

    def test_embeddings_that_were_frozen(self, tmp_path):
        """MPT's are not saved then; there is a row for <image> still."""
        theirs, vision, language = tiny_published("mpt", 4, 50, 49)
        kept = {name: one for name, one in theirs.checkpoint().items() if ".wte." not in name}
        torch.save(kept, tmp_path / "checkpoint.pt")
        before = language.get_input_embeddings().weight.clone()
        model: Any = load_open_flamingo(tmp_path / "checkpoint.pt", vision, language, 51, 4)
        assert len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == 52
        assert torch.equal(model.get_input_embeddings().weight[:50], before)

    def test_buffers_of_older_language_models_are_left_out(self):
        theirs, _, _ = tiny_published("gpt_neox", 2, 50, 49)
        checkpoint = theirs.checkpoint()
        old = "lang_encoder.gpt_neox.layers.0.decoder_layer.attention"
        more = {f"{old}.bias": torch.ones(1), f"{old}.rotary_emb.inv_freq": torch.ones(1)}
        assert convert(checkpoint | more, "gpt_neox", 4).keys() == convert(checkpoint, "gpt_neox", 4).keys()

    def test_what_does_not_fit_is_refused(self, tmp_path):
        theirs, vision, language = tiny_published("llama", 2, 50, 49)
        torch.save(theirs.checkpoint(), tmp_path / "checkpoint.pt")
        with pytest.raises(DataError, match="Do this: check cross_attn_every_n_layers"):
            load_open_flamingo(tmp_path / "checkpoint.pt", vision, language, 49, 1)
        with pytest.raises(UnsupportedModelError, match="Got a checkpoint with 'lang_encoder.transformer.x'"):
            convert({"lang_encoder.transformer.x": torch.ones(1)}, "llama", 4)
        with pytest.raises(UnsupportedModelError, match="Got a language model of type 'mosaic_gpt'"):
            convert({}, "mosaic_gpt", 4)

    def test_a_checkpoint_that_runs_code_is_refused(self, tmp_path):
        _, vision, language = tiny_published("llama", 2, 50, 49)
        torch.save({"perceiver.latents": Image.new("RGB", (2, 2))}, tmp_path / "checkpoint.pt")
        with pytest.raises(Exception, match="Weights only load failed"):
            load_open_flamingo(tmp_path / "checkpoint.pt", vision, language, 49, 2)


def test_training_another_language_model(captions, dataset, store_path, tmp_path):
    family = family_of(captions, "mpt")
    train_two_steps(family.make(), family.processor, dataset, store_path, tmp_path, **LEARN)


def looking(processor: FlamingoProcessor, order: torch.Tensor) -> FlamingoForConditionalGeneration:
    """A model whose latent i looks at patch order[i] alone, and whose text looks at bright latents.

    Of 64 numbers, 0–35 are a patch's place, one-hot, and 63 is its brightness. The text's first number is large.
    """
    config = FlamingoConfig(
        language_config("llama", len(processor.tokenizer)),
        vision_config(hidden_size=64, image_size=48, num_hidden_layers=1),
        processor.image_token_id,
        cross_attn_every_n_layers=2,
        perceiver_depth=1,
        perceiver_latents=36,
    )
    model = FlamingoForConditionalGeneration(config).eval()
    vision, (attention, mlp) = model.model.vision_tower, model.model.perceiver.layers[0]
    with torch.no_grad():
        parameters_zeroed(vision.encoder)
        vision.pre_layrnorm.forward = lambda states: states
        embeddings = vision.embeddings
        embeddings.patch_embedding.weight.zero_()[63] = 4 / (3 * PATCH**2)
        embeddings.position_embedding.weight.zero_()[1:, :36] = 20 * torch.eye(36)
        latents = model.model.perceiver.latents.zero_()
        latents[:, :36], latents[:, 50] = 20 * torch.eye(36)[order], 100  # the norm makes them weak keys of each other
        parameters_zeroed(mlp)
        for one in (attention.to_q, attention.to_kv, attention.to_out):
            one.weight.zero_()
        for head in range(0, 512, 64):
            attention.to_q.weight[head : head + 36, :36] = attention.to_kv.weight[head : head + 36, :36] = (
                5 * torch.eye(36)
            )
            attention.to_kv.weight[512 + head + 63, 63] = 5
            attention.to_out.weight[63, head + 63] = 1
        model.get_input_embeddings().weight[:, 0] = 5
        for block in model.model.gated_cross_attn_layers.values():
            parameters_zeroed(block.attn)
            block.attn.q_proj.weight[:, 0] = block.attn.k_proj.weight[:, 63] = 1
    return model


@pytest.mark.parametrize("seed", [None, 3])
def test_a_planted_patch_comes_back_through_the_latents(captions, seed):
    """One white patch of a black picture: whatever order the latents have, every word's map is that patch."""
    square = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    processor = build_processor(captions, square)
    order = torch.arange(36) if seed is None else torch.randperm(36, generator=torch.Generator().manual_seed(seed))
    model = looking(processor, order)
    for row, col in ((0, 0), (1, 4), (5, 2), (3, 3)):
        image = Image.new("RGB", (300, 300))
        image.paste((255, 255, 255), (col * 50, row * 50, col * 50 + 50, row * 50 + 50))
        maps = student_maps(model, processor, [AnsweredPicture(image, "what?", "a dog", words_of("a dog"))], (6, 6))[
            0
        ].maps
        assert len(maps) == 2
        for one in maps.flatten(1):
            assert one.argmax().item() == row * 6 + col
            assert one.sort().values[-2] < 0.1


class TestProcessor:
    def test_a_batch_of_several_pictures_and_none(self, captions):
        processor, image = build_processor(captions), picture((97, 83))
        inputs = processor(images=[[image, image], []], text=["<image>a dog<|endofchunk|><image>a cat", "sun"])
        assert inputs["pixel_values"].any(dim=(2, 3, 4)).tolist() == [[True, True], [False, False]]
        assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [2, 0]

    def test_another_number_of_pictures_is_refused(self, captions):
        with pytest.raises(DataError, match=r"Got \[1\] <image> in texts of \[2\] pictures\. Expected one for each"):
            build_processor(captions)(images=[[picture((50, 50))] * 2], text=["<image>a"])


def test_an_answer_ends_at_its_end_token(captions):
    """The config of a converted model names no end of the text. A prompt ends before the answer's blank."""
    processor = build_processor(captions)
    family = family_of(captions)
    model, end = family.make(), processor.tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    prompt = processor.apply_chat_template([{"role": "user", "content": "what?"}], tokenize=False)
    whole = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a dog"}]
    assert processor.apply_chat_template(whole, tokenize=False) == f"{prompt} a dog<|endofchunk|>"
    assert prompt == "what?"
    assert end in end_ids(model, processor)
    steps = []

    def always_end(module, args, logits):
        steps.append(logits.shape[1])
        return torch.full_like(logits, -1e4).index_fill_(-1, torch.tensor([end]), 1e4)

    model.lm_head.register_forward_hook(always_end)
    image = Image.new("RGB", (60, 40))
    assert generate_answers(model, processor, [image], ["what?"], max_new_tokens=9) == [""]
    assert len(steps) == 1
