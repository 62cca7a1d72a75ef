"""MiniCPM-Llama3-V-2.5 under the contract, its structure re-created: slices of about 48² pixels, patches of 8."""

from __future__ import annotations

import copy
import json
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from command_line import lavender
from families.asking import captured, request_of
from families.by_hand import Keys
from families.contract import Contract
from families.core import KINDS
from families.geometry import Family, batch_of, parameters_zeroed, picture
from families.minicpm_v_published import MiniCPMV, MiniCPMVConfig, MiniCPMVImageProcessor
from lavender.alignment.objective import attach
from lavender.config import AlignmentConfig
from lavender.errors import ConfigError, DataError
from lavender.students.families.minicpm_v import (
    MiniCpmVAdapter,
    MiniCpmVChatProcessor,
    SliceSettings,
    _as_data,
    slice_grid,
    slices_of,
)
from lavender.students.word_maps import AnsweredPicture, capturing, student_maps
from lavender.words import words_of
from lavender.world.student_models import _tokenizer

LATENTS, PATCH, RESOLUTION = 8, 8, 48
# (height, width) → (rows, cols) of slices, by hand: the shape nearest the picture's among one part fewer or more
SIZES = {(300, 500): (2, 4), (97, 83): (2, 2), (60, 50): (2, 1), (120, 900): (1, 8), (40, 45): None, (23, 61): None}
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<image>",
    "</image>",
    "<slice>",
    "</slice>",
)
PUBLISHED = SliceSettings(9, 448, 14)


def build_processor(texts: list[str]) -> MiniCpmVChatProcessor:
    tokenizer = _tokenizer(
        texts,
        300,
        SPECIAL_TOKENS,
        "<unk>",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
    )
    images = MiniCPMVImageProcessor(scale_resolution=RESOLUTION, patch_size=PATCH, image_feature_size=LATENTS)
    return MiniCpmVChatProcessor(images, tokenizer)


def config_of(tokenizer, **rest) -> MiniCPMVConfig:
    return MiniCPMVConfig(
        vocab_size=len(tokenizer),
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
        image_token_id=tokenizer.convert_tokens_to_ids("<unk>"),
        **(
            {
                "hidden_size": 64,
                "num_key_value_heads": 2,
                "query_num": LATENTS,
                "vision_config": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 560,
                    "patch_size": PATCH,
                },
            }
            | rest
        ),
    )


class Flat(MiniCPMV):
    """Takes its inputs one by one, as the contract passes them; lavender's own hook then finds nothing to do."""

    def __init__(self, config):
        super().__init__(config)
        self.register_forward_pre_hook(_as_data, with_kwargs=True)

    def generate(self, **inputs):  # ty: ignore[incompatible-method-override]
        names = ("input_ids", "pixel_values", "tgt_sizes", "image_bound", "attention_mask")
        data = {name: inputs.pop(name) for name in names}
        return super().generate(data, attention_mask=data["attention_mask"], **inputs)


def local_states(model, inputs) -> torch.Tensor:
    """What the resampler gets when patches do not exchange: the tower's attention silenced."""
    model, seen = copy.deepcopy(model), []
    for layer in model.vpm.encoder.layers:
        parameters_zeroed(layer.self_attn.out_proj)
    model.resampler.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.get_vllm_embedding(inputs)
    return seen[0].flatten(0, 1)[None]


def patches(inputs) -> torch.Tensor:
    strips = [one.unflatten(2, (-1, PATCH)).permute(2, 1, 3, 0).flatten(1, 2) for one in inputs["pixel_values"][0]]
    return pad_sequence([strip * 0.5 + 0.5 for strip in strips], batch_first=True).flatten(0, 1)


def blur(size: tuple[int, int]) -> tuple[float, float]:
    """Of the bicubic filter at the picture's border, as for LLaVA: less than 0.03 of a pixel, old or new."""
    return 0.03 / size[0], 0.03 / size[1]


class TestMiniCpmV(Contract):
    adapter = MiniCpmVAdapter
    describes = "8 latents for the picture and for each of its slices, among the text's tokens"
    keys = Keys((9 * LATENTS, 5 * LATENTS, 3 * LATENTS), "<unk>", "<image>", "</image></slice>")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        processor = build_processor(captions)
        config = config_of(processor.tokenizer)

        def make() -> Flat:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                return Flat(copy.deepcopy(config)).eval()

        return Family(make, processor, tuple(SIZES), local_states, patches, blur, clear=0.35)

    def test_batch_order_and_company_change_nothing(self, family, model, readings):
        """But in the published code, whose tower sees the padding of smaller slices: company changes its logits."""
        alone, together = batch_of(family, readings[1:2]), batch_of(family, readings)
        length = alone["input_ids"].shape[1]
        with torch.no_grad():
            assert (model(**alone).logits[0] - model(**together).logits[1, :length]).abs().max() > 1e-3
        model.every_patch_is_seen = False
        super().test_batch_order_and_company_change_nothing(family, model, readings)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_keys_are_the_slices_tokens(self, family, model, readings, side):
        batch, tokenizer = batch_of(family, readings, side), family.processor.tokenizer
        keys = MiniCpmVAdapter(model.config).image_keys(batch)
        assert (keys >= 0).sum(dim=1).tolist() == [9 * LATENTS, 5 * LATENTS, 3 * LATENTS]
        for ids, own in zip(batch["input_ids"].tolist(), keys.tolist(), strict=True):
            places = [place for place in own if place >= 0]
            assert places == [place for place, token in enumerate(ids) if tokenizer.decode(token) == "<unk>"]
            assert own == places + [-1] * (len(own) - len(places))
            whole, first = places[:LATENTS], places[LATENTS : 2 * LATENTS]
            assert tokenizer.decode(ids[whole[0] - 1 : first[0]]) == f"<image>{'<unk>' * LATENTS}</image><slice><image>"
            assert tokenizer.decode(ids[places[-1] + 1 : places[-1] + 3]) == "</image></slice>"

    def test_the_layout_of_slices(self, family, model):
        """300 × 500 pixels: the whole as 37 × 61, and 2 × 4 parts of 150 × 125, each as 52 × 43."""
        inputs, _ = self.boxes_of(family, model, (300, 500))
        assert inputs["tgt_sizes"][0].tolist() == [[5, 8]] + [[6, 5]] * 8
        layout = MiniCpmVAdapter(model.config).image_boxes(inputs, [[(300, 500)]], family.processor)
        assert layout.boxes.shape == (9, 40, 4)
        assert layout.boxes[0, 39].tolist() == pytest.approx([0.8, 0.875, 1, 1])
        assert layout.boxes[1:, 30:].abs().sum() == 0
        assert layout.boxes[1 + 4 + 2, 0].tolist() == pytest.approx([0.5, 0.5, 0.5 + 0.5 / 6, 0.5 + 0.25 / 5])
        assert layout.views is not None
        assert layout.views.tolist() == [[view for view in range(9) for _ in range(LATENTS)]]

    def test_a_latents_attention_is_that_of_torch(self, model, batch):
        request = captured(model, batch)
        found = model.resampler.weights_for_tests
        assert request.mixing is not None
        assert found.shape == request.mixing.shape == (9 + 5 + 3, LATENTS, 40)
        assert (found == 0).any()  # slices of fewer patches
        torch.testing.assert_close(request.mixing, found, rtol=0, atol=1e-6)

    def test_gradients_reach_the_resampler(self, family, model, batch, readings):
        head = attach(model, AlignmentConfig())
        model.train()
        output = model(**batch, attention_request=request_of(family, model, batch, readings, head.layers))
        output.attention_loss.backward()
        gradient = model.resampler.attn.in_proj_weight.grad
        assert gradient[:64].abs().max() > 1e-8
        assert gradient[64:128].abs().max() > 1e-8

    def test_the_published_forward_takes_one_dict(self, family, model, batch):
        """Inside, what trainers pass one by one comes as the published code wants it; both ways are the same."""
        plain = MiniCPMV(copy.deepcopy(model.config)).eval()
        plain.load_state_dict(model.state_dict())
        with pytest.raises(TypeError, match="'data'"), torch.no_grad():
            plain(**batch)
        places = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            expected = plain(dict(batch) | {"position_ids": places}, attention_mask=batch["attention_mask"]).logits
            with capturing(plain):
                assert torch.equal(plain(**batch).logits, expected)
        assert not plain._forward_pre_hooks

    @pytest.mark.parametrize("match", ["label", "exact"])
    def test_matching(self, family, model, batch, readings, match):
        head = attach(model, AlignmentConfig(match=match))
        request = request_of(family, model, batch, readings, head.layers)
        model(**batch, attention_request=request)
        assert request.matched.sum() == (5 if match == "label" else 0)  # a random model predicts no word

    def test_inspect_reads_the_config_alone(self, model, tmp_path):
        """The weights of a model with its own code cannot be counted; with that code see `test_loading`."""
        config = model.config.to_dict() | {"auto_map": {"AutoConfig": "own.Config"}, "architectures": ["MiniCPMV"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        facts = json.loads(lavender("inspect", tmp_path).out)
        assert facts["family"] == "minicpmv"
        assert facts["usable_layers"] == list(MiniCpmVAdapter(model.config).usable_layers())
        assert facts["image_keys"] == self.describes
        assert facts["parameters"] is None

    @KINDS
    def test_training(self, family, model, dataset, store_path, tmp_path, alignment):
        """The published forward gets its one dict."""
        published = MiniCPMV(copy.deepcopy(model.config))
        super().test_training(family, published, dataset, store_path, tmp_path, alignment)

    def test_what_does_not_fit_is_refused(self, family, model):
        inputs, _ = self.boxes_of(family, model, (300, 500))
        adapter = MiniCpmVAdapter(model.config)
        with pytest.raises(DataError, match=r"Got slices of \[\[5, 8\], \[6, 5\]"):
            adapter.image_boxes(inputs, [[(500, 300)]], family.processor)
        short = dict(inputs) | {"image_bound": [inputs["image_bound"][0] - torch.tensor([0, 3])]}
        with pytest.raises(DataError) as caught:
            adapter.image_keys(short)
        assert str(caught.value) == (
            "Got slices of [5] tokens in the text. Expected 8 tokens a slice. Do this: set the image processor's "
            "image_feature_size to the model's query_num."
        )
        published = Mock(image_processor=family.processor.image_processor, tokenizer=family.processor.tokenizer)
        with pytest.raises(ConfigError, match=r"Got Mock, which takes one text at a time\. Expected MiniCpmVChatPro"):
            adapter.image_boxes(inputs, [[(300, 500)]], published)
        adapter.image_boxes(inputs, [[(300, 500)]], adapter.processor(published))
        model.config.image_token_id = 128002
        with pytest.raises(ConfigError, match=r"Do this: set model.config.image_token_id = \d+\."):
            adapter.image_boxes(inputs, [[(300, 500)]], family.processor)
        model.config.batch_vision_input = False
        with pytest.raises(ConfigError, match="set model.config.batch_vision_input = True"), capturing(model):
            pass


class TestSlices:
    """(height, width) in pixels, with the published settings: 448 pixels, patches of 14, at most 9 slices."""

    @pytest.mark.parametrize(
        ("size", "grid"),
        [
            ((448, 448), None),
            ((449, 448), (2, 1)),
            ((600, 800), (2, 2)),  # 2.4 slices wanted: 2, 3 or 4
            ((1344, 1344), (3, 3)),
            ((3000, 4000), (3, 3)),  # 9 or 8; 4:3 is nearer 1:1 than 4:2
            ((500, 4000), (1, 8)),
            ((4000, 500), (8, 1)),
        ],
    )
    def test_grids_by_hand(self, size, grid):
        assert slice_grid(size, PUBLISHED) == grid

    def test_a_small_picture_is_enlarged(self):
        # 100 × 200 pixels: 448 / √2 = 316 rows of 632 columns, 22.6 and 45.1 patches
        assert slices_of((100, 200), PUBLISHED) == [((0, 0, 1, 1), 23, 45)]

    def test_a_large_one_is_cut(self):
        # 387 × 516 pixels both the whole and each quarter, 27.6 × 36.9 patches
        whole, *parts = slices_of((600, 800), PUBLISHED)
        assert whole == ((0, 0, 1, 1), 28, 37)
        assert parts == [((top, left, top + 0.5, left + 0.5), 28, 37) for top in (0, 0.5) for left in (0, 0.5)]

    def test_they_are_the_published_processors(self):
        images, generator = MiniCPMVImageProcessor(), torch.Generator().manual_seed(4)
        for height, width in torch.randint(20, 1800, (60, 2), generator=generator).tolist():
            parts, grid = images.slice_image(Image.new("L", (width, height)))
            assert slice_grid((height, width), PUBLISHED) == (grid if grid is None else grid[::-1])
            found = [(one.rows * 14, one.cols * 14) for one in slices_of((height, width), PUBLISHED)]
            assert found == [(part.height, part.width) for part in parts], (height, width)


class TestProcessor:
    def test_a_batch_of_several_pictures_and_none(self, captions):
        processor = build_processor(captions)
        small, large = picture((40, 45)), picture((97, 83))
        texts = ["a (<image>./</image>) b (<image>./</image>)", "a dog", "(<image>./</image>) a"]
        inputs = processor(images=[[small, large], [], [small]], text=texts)
        assert [len(own) for own in inputs["pixel_values"]] == [1 + 5, 0, 1]
        assert [own.tolist() for own in inputs["tgt_sizes"]][1:] == [[], [[6, 6]]]
        assert [(own[:, 1] - own[:, 0]).tolist() for own in inputs["image_bound"]] == [[LATENTS] * 6, [], [LATENTS]]
        assert inputs["pixel_values"][2][0].shape == (3, PATCH, 36 * PATCH)

    def test_later_placeholders_too(self, captions):
        """Version 2.6 writes <slice> around each slice."""
        processor = build_processor(captions)
        whole, part = (f"<{name}>{'<unk>' * LATENTS}</{name}>" for name in ("image", "slice"))
        processor.image_processor.get_slice_image_placeholder = lambda size: whole + part * 2 + "\n" + part * 2
        bounds = processor(images=[[picture((97, 83))]], text=["(<image>./</image>)"])["image_bound"][0]
        starts = torch.tensor([1, 11, 21, 32, 42])
        assert torch.equal(bounds, torch.stack([starts, starts + LATENTS], dim=1))

    def test_what_does_not_fit_is_refused(self, captions):
        processor, image = build_processor(captions), picture((97, 83))
        with pytest.raises(DataError, match=r"Got \[1\] \(<image>./</image>\) in texts of \[2\] pictures"):
            processor(images=[[image, image]], text=["(<image>./</image>)"])
        with pytest.raises(DataError, match=r"Got 2 whole slices in a text of 5"):
            processor(images=[[image]], text=["(<image>./</image>)"], truncation=True, max_length=25)


def looking(processor: MiniCpmVChatProcessor) -> MiniCPMV:
    """A model whose latent i looks at the i-th place of each slice, and whose text looks at bright latents.

    A place's number is read from its position; a patch's brightness is the last number of its state.
    """
    model = MiniCPMV(
        config_of(processor.tokenizer, hidden_size=128, num_key_value_heads=4, query_num=36, heads=1)
    ).eval()
    resampler, embeddings = model.resampler, model.vpm.embeddings
    with torch.no_grad():
        parameters_zeroed(model.vpm.encoder)
        model.vpm.post_layernorm.forward = lambda states: states
        embeddings.patch_embedding.weight.zero_()[31] = 1 / (3 * PATCH**2)
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.zero_()
        resampler.kv_proj.weight.zero_()[127, 31] = 1
        for norm in (resampler.ln_q, resampler.ln_kv, resampler.ln_post):
            norm.forward = lambda states: states
        places = resampler.pos_embed[:6, :6].flatten(0, 1)
        centred = places - places.mean(0)
        resampler.query.copy_(centred)
        attention = resampler.attn
        attention.in_proj_weight.copy_(torch.cat([torch.eye(128)] * 3))
        attention.in_proj_weight[:128] *= 300  # sharp
        attention.in_proj_weight[128 + 127] = 0  # brightness is no place
        attention.in_proj_bias.zero_()
        attention.out_proj.weight.copy_(torch.eye(128))
        attention.out_proj.bias.zero_()
        resampler.proj.zero_()[127, 127] = 8
        model.llm.model.embed_tokens.weight.zero_()[:, 0] = 8
        for layer in model.llm.model.layers:
            parameters_zeroed(layer.mlp)
            parameters_zeroed(layer.self_attn)
            layer.input_layernorm.weight.fill_(1)
            layer.self_attn.q_proj.weight[15::32, 0] = 4  # the slowest pair of a head's rotation: hardly turned
            layer.self_attn.k_proj.weight[15::32, 127] = 4
    return model


@torch.no_grad()
def test_a_planted_patch_comes_back_through_the_latents(captions):
    """One white cell of a black picture of 2 × 2 slices: whatever slice it is in, every word's map is that cell."""
    processor = build_processor(captions)
    processor.image_processor.image_feature_size = 36
    model = looking(processor)
    for row, col in ((0, 0), (1, 4), (5, 2), (3, 3)):
        image = Image.new("RGB", (96, 96))
        image.paste((255, 255, 255), (col * 16, row * 16, col * 16 + 16, row * 16 + 16))
        maps = student_maps(model, processor, [AnsweredPicture(image, "what?", "a dog", words_of("a dog"))], (6, 6))[
            0
        ].maps
        assert len(maps) == 2
        for one in maps.flatten(1):
            assert one.argmax().item() == row * 6 + col
            assert one.sort().values[-2] < 0.3
