"""LLaVA under the contract: one square of 96 pixels, patches of 8; and its geometry with other ways to a square."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    Dinov2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PixtralVisionConfig,
)
from transformers.image_processing_backends import TorchvisionBackend

from families.asking import captured, eager_rows, request_of
from families.by_hand import Keys
from families.contract import Contract
from families.core import KINDS
from families.geometry import Family, Geometry, batch_of, parameters_zeroed, reading
from families.words import Words
from lavender.alignment.objective import attach
from lavender.config import AlignmentConfig
from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.evaluation.inspect import inspect_target
from lavender.students.families.llava import LlavaAdapter, seen_frame
from lavender.students.image_keys import grid_boxes
from lavender.students.registry import adapter_for
from lavender.world.student_models import build_llava, build_llava_processor

SQUARE, PATCH, SIDE = 96, 8, 12
EDGE, FIXED = {"shortest_edge": SQUARE}, {"height": SQUARE, "width": SQUARE}
SIZES = ((300, 500), (500, 300), (120, 900), (200, 200), (37, 23), (97, 133), (133, 97))

CROP = CLIPImageProcessorPil(size=EDGE, crop_size=FIXED)  # as LLaVA-1.5 has it: the longer side is cut
# Padding has the colour of the mean. Here it is black, so that it has no blue.
PAD = LlavaImageProcessorPil(do_pad=True, size=EDGE, crop_size=FIXED, image_mean=(0.0, 0.0, 0.0))
SQUASH = CLIPImageProcessorPil(size=FIXED, crop_size=FIXED, do_center_crop=False)
AS_IT_IS = CLIPImageProcessorPil(do_resize=False, crop_size=FIXED)  # cut where larger than the square, else padded


def view_of_crop(resized: tuple[int, int]) -> tuple[float, float, float, float]:
    """What a centre crop leaves: a side longer than the square loses as many pixels at both ends, or one more last."""
    first = [max(0, side - SQUARE) // 2 / side for side in resized]
    last = [min(1.0, start + SQUARE / side) for start, side in zip(first, resized, strict=True)]
    return first[0], first[1], last[0], last[1]


def view(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """LLaVA-1.5: the shorter side becomes the square's, the longer one keeps the aspect and is cut."""
    return view_of_crop((int(SQUARE * size[0] / min(size)), int(SQUARE * size[1] / min(size))))


def blur(size: tuple[int, int]) -> tuple[float, float]:
    """The bicubic filter keeps a ramp as it is, but for the border, where it finds nothing beyond.

    Its lobes have two signs: how far the border's new pixel is off, the next ones almost take back. From the filter's
    formula, the mean of a patch is off by less than 0.03 pixels of the picture; most when 23 become 96.
    """
    return 0.03 / size[0], 0.03 / size[1]


def filter_pixel(size: tuple[int, int]) -> float:
    """The unit of the filter's width: a pixel, the larger of old and new, in those of the picture; for `PAD`."""
    return max(1.0, max(size) / SQUARE)


def spill_of_pad(size: tuple[int, int]) -> float:
    """Padding and picture mix at their edge: a patch takes from its neighbour less than 1/8 of the filter's pixel.

    Half a pixel from the edge, 0.081 of the filter's weight is on the other side. One pixel from it the filter has
    overshot by 0.042, which is cut off where it is below black.
    """
    return filter_pixel(size) / 8 / (PATCH * max(size) / SQUARE)


def blur_of_pad(size: tuple[int, int]) -> tuple[float, float]:
    """What spills lies 4.5 pixels from the patch's middle; among the patch's 8, 0.081 · 4.5 / 8 moves it by 0.046."""
    return 0.05 * filter_pixel(size) / size[0], 0.05 * filter_pixel(size) / size[1]


def local_states(model, inputs) -> torch.Tensor:
    """What the first text layer attends to, when patches do not exchange: the tower's attention silenced."""
    model = copy.deepcopy(model)
    del model.model.language_model.layers[1:]
    for layer in model.model.vision_tower.encoder.layers:
        parameters_zeroed(layer.self_attn.out_proj)
    seen = []
    attention = model.model.language_model.layers[0].self_attn
    handle = attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    return torch.stack(
        [
            states[ids == model.config.image_token_index]
            for states, ids in zip(seen[0], inputs["input_ids"], strict=True)
        ]
    )


def family_of(texts: list[str], images, **rest) -> Family:
    """A LLaVA whose pictures an image processor makes square."""
    processor = build_llava_processor(texts, vocabulary=300)
    processor = LlavaProcessor(
        images,
        processor.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )
    with torch.random.fork_rng():
        config = build_llava(processor).config
    vision: Any = config.vision_config
    vision.image_size, vision.patch_size = SQUARE, PATCH
    config.image_seq_length = SIDE * SIDE

    def make() -> LlavaForConditionalGeneration:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return LlavaForConditionalGeneration(copy.deepcopy(config)).eval()

    def patches(inputs) -> torch.Tensor:
        square = inputs["pixel_values"][0].permute(1, 2, 0) * torch.tensor(images.image_std)
        square = square + torch.tensor(images.image_mean)
        return square.unflatten(1, (SIDE, PATCH)).unflatten(0, (SIDE, PATCH)).transpose(1, 2).reshape(-1, PATCH**2, 3)

    return Family(make, processor, local_states=local_states, patches=patches, **rest)


class TestLlava(Contract):
    adapter = LlavaAdapter
    describes = "one square of 96 px, 12 × 12 patches among the text's tokens"
    keys = Keys((144, 144, 144), "<image>", "<s>USER: ", "\n")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions, CROP, sizes=SIZES, blur=blur, view=view)

    def test_what_is_in_view_by_hand(self):
        # 300 × 500 becomes 96 × 160: columns 32 to 128 are left; 133 × 97 becomes 131 × 96: rows 17 to 113
        assert view((300, 500)) == pytest.approx((0, 32 / 160, 1, 128 / 160))
        assert view((133, 97)) == pytest.approx((17 / 131, 0, 113 / 131, 1))

    def test_rows_see_the_picture_up_to_themselves(self, model, batch):
        """Each layer sees text and picture: the kept columns are a part of the whole, and none is from the future."""
        adapter = LlavaAdapter(model.config)
        assert adapter.usable_layers() == (0, 1, 2, 3)
        keys = adapter.image_keys(batch)
        rows = torch.stack([keys[:, 0] - 1, keys[:, 10], keys[:, -1] + 1], dim=1)
        before, within, after = captured(model, batch, rows=rows).stacked().unbind(3)
        assert before.shape == (4, 3, 8, SIDE * SIDE)
        assert before.abs().sum() == 0
        assert within[..., :11].min() > 0
        assert within[..., 11:].abs().sum() == 0
        assert after.min() > 0
        assert ((after.sum(-1) > 0.5) & (after.sum(-1) < 1)).all()

    @KINDS
    def test_the_kernel_gets_no_mask_of_a_batch_without_padding(self, family, model, alignment):
        """The kernel is told "causal" and gets no mask: the rows still see nothing after themselves."""
        readings, masks = [reading((300, 500), "a dog", seed) for seed in (1, 2)], []
        batch = batch_of(family, readings)
        assert batch["attention_mask"].all()
        head = attach(model, AlignmentConfig(**alignment))
        for layer in head.layers:
            adapter_for(model.config).attention_module(model, layer).register_forward_pre_hook(
                lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
            )
        request = request_of(family, model, batch, readings, head.layers)
        request.rows_BR[0, 0] = 20  # amid the picture
        model(**batch, attention_request=request)
        assert masks == [None] * len(head.layers)
        assert (request.stacked() == 0).any()
        expected = eager_rows(family.make(), batch, request)
        expected = expected.mean(dim=2, keepdim=True) if head.config.is_direct else expected
        torch.testing.assert_close(request.stacked(), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("count", [143, 287])
    def test_another_number_of_picture_tokens_is_refused(self, family, model, count):
        """The last picture is cut."""
        adapter, ids = adapter_for(model.config), torch.full((2, 300), 5)
        ids[0, 7 : 7 + 144] = ids[1, 3 : 3 + count] = adapter.image_token_id()
        with pytest.raises(DataError) as caught:
            adapter.image_keys({"input_ids": ids})
        assert str(caught.value) == (
            f"Got {count} picture tokens in a sample. Expected 144 for each picture, of 12 × 12 patches. "
            "Do this: raise max_length (or set it to None) if it cuts pictures; else load the model's own processor."
        )

    def test_keys_with_a_class_token_are_refused(self, model, batch):
        model.config.vision_feature_select_strategy = "full"
        with pytest.raises(UnsupportedModelError) as caught:
            adapter_for(model.config).image_keys(batch)
        assert str(caught.value) == (
            "Got vision_feature_select_strategy='full' with a clip_vision_model. Expected 'default', which leaves the "
            "class token out. Do this: load a model with that strategy."
        )

    def test_pictures_of_another_size_than_the_towers_are_refused(self, family, model, batch):
        """Its tower knows places of 12 × 12 patches; transformers itself refuses them amid training."""
        batch["pixel_values"] = batch["pixel_values"][..., :64, :64]
        with pytest.raises(ConfigError, match=r"pictures 64 px high and 64 px wide\. Expected 96 × 96 px"):
            adapter_for(model.config).image_keys(batch)


def interpolating(texts: list[str], told: int) -> Family:
    """A LLaVA whose tower is DINOv2, as told for pictures of so many pixels, and gets squares of 96."""
    plain = family_of(texts, SQUASH, sizes=SIZES, blur=blur)
    vision = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=told, patch_size=PATCH
    )

    def make() -> LlavaForConditionalGeneration:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            config: Any = plain.make().config
            config.vision_config = vision
            return LlavaForConditionalGeneration(config).eval()

    return dataclasses.replace(plain, make=make)


@pytest.mark.parametrize("told", [56, 224])
def test_a_tower_that_interpolates_places_has_the_grid_of_its_pixels(captions, told, tmp_path):
    """And so has the estimate of memory: keys are those of the sample, whatever the config's size."""
    family = interpolating(captions, told)
    model, sizes = family.make(), [(300, 500), (133, 97)]
    readings = [reading(size, "a dog", seed) for seed, size in enumerate(sizes)]
    batch = batch_of(family, readings)
    adapter = LlavaAdapter(model.config)
    keys, layout = adapter.image_keys(batch), adapter.image_boxes(batch, [[size] for size in sizes], family.processor)
    assert keys.shape == (2, SIDE * SIDE)
    torch.testing.assert_close(layout.boxes[1], grid_boxes(SIDE, SIDE).float())
    rows = keys[:, -1:] + 1
    assert captured(model, batch, rows=rows).stacked().shape[-1] == SIDE * SIDE
    assert f"{told // PATCH} × {told // PATCH} if that is {told} px as in the config" in adapter.describe_keys()
    for part in (model.config, family.processor):
        part.save_pretrained(tmp_path)
    facts = inspect_target(str(tmp_path))
    assert facts["sample"]["image_keys"] == SIDE * SIDE
    assert f"{SIDE * SIDE} image keys (in the sample)" in facts["memory"]["assumptions"][0]


class TestPicturesFirst(Words):
    """A template that prints all pictures of a conversation before its text, as PaliGemma's processor does."""

    pictures_first = True

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        family = family_of(captions, CROP, sizes=SIZES, blur=blur)
        family.processor.chat_template = (
            "{{- '<s>' }}{%- for message in messages %}{%- for part in message['content'] %}"
            "{{- '<image>' if part['type'] == 'image' }}{%- endfor %}{%- endfor %}"
            "{%- for message in messages %}{%- for part in message['content'] %}"
            "{{- part['text'] + '\n' if part['type'] == 'text' }}{%- endfor %}{%- endfor %}"
        )
        return family


class TestOtherSquares(Geometry):
    """Other ways to make a picture square: padding it first, squashing it, cutting or padding it as it is."""

    @pytest.fixture(scope="class", params=["pad", "squash", "as it is"])
    @classmethod
    def family(cls, captions, request) -> Family:
        if request.param == "pad":
            sizes = ((300, 500), (500, 300), (130, 300), (200, 200), (36, 23), (97, 133))
            return family_of(captions, PAD, sizes=sizes, blur=blur_of_pad, clear=0.3, spill=spill_of_pad)
        if request.param == "squash":
            return family_of(captions, SQUASH, sizes=SIZES, blur=blur)
        sizes = ((500, 101), (96, 96), (80, 121), (75, 95), (97, 95))
        return family_of(captions, AS_IT_IS, sizes=sizes, blur=lambda size: (0.0, 0.0), view=view_of_crop)


@pytest.mark.parametrize(
    ("images", "size", "frame"),
    [
        # 96 × 160, of which columns 32 to 128
        (CROP, (300, 500), (0, 32 / 160, 1, 128 / 160)),
        # 131 × 96, of which rows 17 to 113
        (CROP, (133, 97), (17 / 131, 0, 113 / 131, 1)),
        (CROP, (200, 200), (0, 0, 1, 1)),
        # 100 rows of padding above and below
        (PAD, (300, 500), (-100 / 300, 0, 400 / 300, 1)),
        # 14 columns of padding, 7 of them at the left
        (PAD, (37, 23), (0, -7 / 23, 1, 30 / 23)),
        # 13 columns of padding, 6 of them at the left
        (PAD, (36, 23), (0, -6 / 23, 1, 30 / 23)),
        (SQUASH, (120, 900), (0, 0, 1, 1)),
        (AS_IT_IS, (100, 201), (2 / 100, 52 / 201, 98 / 100, 148 / 201)),
        # larger than the picture: 59 rows of padding, 30 of them above; 73 columns, 37 of them at the left
        (AS_IT_IS, (37, 23), (-30 / 37, -37 / 23, 66 / 37, 59 / 23)),
        # 100 × 50 pixels: 2 rows are cut above, 23 columns padded at the left
        (CLIPImageProcessorPil(size={"shortest_edge": 50}, crop_size=FIXED), (200, 100), (0.02, -0.46, 0.98, 1.46)),
        (CLIPImageProcessorPil(do_resize=False, do_center_crop=False), (96, 96), (0, 0, 1, 1)),
    ],
)
def test_seen_frame_by_hand(images, size, frame):
    assert seen_frame(size, images, (SQUARE, SQUARE)) == pytest.approx(frame)


def test_torchvision_pads_the_smaller_half_first():
    """As its `center_crop` says; it is not installed here. 59 rows of padding, 29 of them above; 73 columns, 36."""
    images = type("OnTorchvision", (TorchvisionBackend,), vars(AS_IT_IS) | {"__init__": lambda self: None})()
    assert seen_frame((37, 23), images, (SQUARE, SQUARE)) == pytest.approx((-29 / 37, -36 / 23, 67 / 37, 60 / 23))
    assert seen_frame((100, 201), images, (SQUARE, SQUARE)) == seen_frame((100, 201), AS_IT_IS, (SQUARE, SQUARE))


def test_a_pixtral_tower_is_refused_by_name():
    """Whatever its strategy: no other one would help."""
    config: Any = LlavaConfig(vision_config=PixtralVisionConfig(), vision_feature_select_strategy="full")
    with pytest.raises(UnsupportedModelError, match="Got a LLaVA with the tower of pixtral, which makes a grid"):
        LlavaAdapter(config).image_keys({"input_ids": torch.full((1, 9), 5), "pixel_values": torch.zeros(1, 3, 64, 48)})


def test_a_border_that_no_patch_fits_is_not_seen():
    images = CLIPImageProcessorPil(size={"height": 100, "width": 100}, do_center_crop=False)
    assert seen_frame((300, 500), images, (96, 96)) == pytest.approx((0, 0, 0.96, 0.96))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"do_pad": True, "size": EDGE},
            "Got do_pad=True in CLIPImageProcessorPil, which pads at the end. Expected LLaVA's own image processor. "
            "Do this: set do_pad=False, or load LlavaImageProcessor.",
        ),
        (
            {"size": {"shortest_edge": 96, "longest_edge": 151}},
            "Got the image processor's size {'longest_edge': 151, 'shortest_edge': 96}. Expected height and width, or "
            "shortest_edge alone. Do this: change its size.",
        ),
        ({"size": {"longest_edge": 96}}, "Got the image processor's size {'longest_edge': 96}."),
    ],
)
def test_other_ways_to_a_square_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        seen_frame((300, 500), CLIPImageProcessorPil(crop_size=FIXED, **settings), (SQUARE, SQUARE))
    assert str(caught.value).startswith(message)
