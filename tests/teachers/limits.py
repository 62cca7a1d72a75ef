"""The contract's second half: a planted patch comes back at its place; what is refused, overflows, or is rounded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from PIL import Image, ImageDraw
from torch import Tensor

from lavender.config import Geometry
from lavender.errors import CaptureError, ConfigError, ModelError, UnsupportedModelError
from lavender.teachers.diffusion import batch_reader
from lavender.teachers.diffusion.aggregate import Aggregate
from lavender.teachers.diffusion.base import Layer
from lavender.teachers.diffusion.registry import family_of
from lavender.teachers.diffusion.teacher import Teacher
from lavender.words import words_of
from teachers.basis import (
    GRID,
    ROUNDING,
    Basis,
    Bypass,
    captured,
)
from teachers.explicit import PARTS
from teachers.pipelines import job, jobs, picture


class Limits(Basis):
    """Inherited by `Contract`."""

    # 5

    @pytest.mark.parametrize("geometry", ["squash", "crop", "letterbox", "aspect"])
    @pytest.mark.parametrize("sides", [(160, 80), (80, 160), (96, 96)])
    def test_a_planted_patch_comes_back_at_its_place(self, pipeline, monkeypatch, geometry: Geometry, sides):
        """Latents that are the picture's brightness, and layers that attend to what is bright."""
        family_class, latents = family_of(type(pipeline)), []
        factor, channels = pipeline.vae_scale_factor, family_class(pipeline).in_channels
        width, height = sides
        image = Image.new("RGB", sides)
        box = (width * 4 // 8, height * 2 // 8, width * 6 // 8 - 1, height * 4 // 8 - 1)
        ImageDraw.Draw(image).rectangle(box, fill=(255, 255, 255))

        def encode(self, pixels: Tensor) -> Tensor:
            latents.append(F.avg_pool2d(pixels.mean(dim=1, keepdim=True), factor).clamp_min(0))
            return latents[-1].expand(-1, channels, -1, -1)

        class Bright(Aggregate):
            def add(self, layer: Layer, maps_BHCW: Tensor) -> None:
                bright = F.adaptive_avg_pool2d(latents[-1], layer.grid).flatten(2).transpose(1, 2)[:, None]
                super().add(layer, bright.expand(maps_BHCW.shape))

        monkeypatch.setattr(family_class, "encode_pixels", encode)
        monkeypatch.setattr(batch_reader, "Aggregate", Bright)
        every = family_class(pipeline).layers((16, 16))
        finest = max(layer.grid for layer in every)
        weights = {layer.name: float(layer.grid == finest) for layer in every}
        config = self.config(grid=(8, 8), geometry=geometry, layer_weights=weights)
        (found,) = Teacher(pipeline, config)([job(image, "a dog")])
        heat = found.maps[1]
        share = heat / heat.sum()
        middle = (torch.arange(8) + 0.5) / 8
        centre = (share.sum(1) @ middle).item(), (share.sum(0) @ middle).item()
        assert centre == pytest.approx((3 / 8, 5 / 8), abs=0.03)
        assert heat[2:4, 4:6].min() > 0.5
        assert heat[2:4, 4:6].sum() > 0.6 * heat.sum()
        if geometry == "crop" and width != height:
            outside = heat[:, [0, 1, 6, 7]] if width > height else heat[[0, 1, 6, 7]]
            assert outside.abs().max() == 0

    def test_a_pictures_shape_does_not_change_which_layers_are_read(self, pipeline):
        """A level that is just small enough on the square has a few cells more for a picture in its own shape."""
        family = family_of(type(pipeline))(pipeline)
        finest = max(layer.grid[0] for layer in family.layers((16, 16)))
        teacher = Teacher(pipeline, self.plain(largest_layer=finest, geometry="aspect"))
        names = [layer.name for layer in family.layers((16, 16))]
        for sides in ((64, 64), (100, 60), (60, 100), (150, 70), (300, 100)):
            view = teacher.view(picture(*sides))
            assert [layer.name for layer in teacher.layers(view.size)] == names

    @pytest.mark.parametrize("sides", [(8, 6000), (6000, 8)])
    def test_a_picture_of_an_extreme_shape_has_no_more_pixels_than_others(self, pipeline, sides):
        teacher = Teacher(pipeline, self.config(grid=GRID, geometry="aspect"))
        height, width = teacher.view(picture(*sides)).size
        assert height * width <= teacher.family.side**2
        assert min(height, width) == teacher.family.unit
        (found,) = teacher([job(picture(*sides), "a dog")])
        assert found.maps.amax(dim=(1, 2)).tolist() == [1, 1]

    # 6

    def test_custom_processors_that_compute_otherwise_are_refused(self, own):
        own.backbone.set_attn_processor(Bypass())
        count = len(own.layers((16, 16)))
        with pytest.raises(CaptureError) as caught:
            captured(own, (16, 16))
        assert f"Got {count} of {count} attention layers not seen" in str(caught.value)
        assert "Do this: remove custom attention processors and attention backends: load the pipeline again." in str(
            caught.value
        )

    def test_arguments_by_name_are_understood(self, family, monkeypatch):
        """Processors call torch's attention with arguments by place or by name."""
        expected, _ = captured(family, (16, 16))

        def named(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
            return F.scaled_dot_product_attention(query=query, key=key, value=value, **options)

        functions = vars(F) | {"scaled_dot_product_attention": named}
        monkeypatch.setattr(attention_processor, "F", SimpleNamespace(**functions))
        maps, _ = captured(family, (16, 16))
        assert list(maps) == list(expected)
        assert all(torch.equal(maps[name], one) for name, one in expected.items())

    def test_a_weight_for_no_layer_is_refused(self, pipeline):
        config = self.plain(layer_weights={"side_blocks": 1.0})
        with pytest.raises(ConfigError, match="Got layer_weights for 'side_blocks'. Expected the beginning of a layer"):
            Teacher(pipeline, config)(jobs()[:1])

    def test_levers_that_leave_no_layer_are_refused(self, pipeline):
        with pytest.raises(ConfigError, match="Got largest_layer=1 and layer_weights={}, which leave no layer"):
            Teacher(pipeline, self.config(grid=GRID, largest_layer=1, layer_weights={}))(jobs()[:1])

    def test_a_pipeline_without_a_part_is_refused(self, own):
        own.pipeline.text_encoder = None
        with pytest.raises(ModelError, match=r"Got a \w+ without text_encoder\. Expected a pipeline with the parts"):
            Teacher(own.pipeline, self.plain())

    def test_a_subclass_of_the_pipeline_is_refused(self, own):
        class Other(type(own.pipeline)):
            pass

        own.pipeline.__class__ = Other
        with pytest.raises(UnsupportedModelError, match="Got a Other. Expected one of StableDiffusionPipeline, "):
            Teacher(own.pipeline, self.config())

    @pytest.mark.parametrize("words", [None, ()])
    def test_a_text_without_words_has_no_map_and_costs_no_forward(self, pipeline, words):
        teacher = Teacher(pipeline, self.plain())
        (found,) = teacher([job(picture(64, 64), "a dog" if words == () else "12, 34!", words)])
        assert found.words == ()
        assert found.maps.shape == (0, *GRID)
        assert found.confidence.shape == (0,)
        assert teacher.family.forwards == 0

    def test_a_long_text_is_read_in_windows_that_share_a_latent(self, pipeline, monkeypatch):
        encoded, encode, sentence = [], pipeline.vae.encode, "a red dog near the table. "
        monkeypatch.setattr(pipeline.vae, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
        teacher = Teacher(pipeline, self.plain())
        tokens = len(teacher.family.tokenizer(sentence, add_special_tokens=False)["input_ids"])
        text = sentence * (teacher.family.max_tokens // tokens + 2) + "a zebra and a house"
        (found,) = teacher([job(picture(64, 64), text)])
        assert len(teacher.family.tokenizer(text, verbose=False)["input_ids"]) > teacher.family.max_tokens
        assert encoded == [1]
        assert teacher.family.forwards == len(teacher.windows(text)) == 2
        assert found.words == words_of(text)
        assert found.dropped == ()
        start, end = teacher.windows(text)[1]  # a window's maps are those of its text alone
        (last,) = Teacher(pipeline, self.plain())([job(picture(64, 64), text[start:end])])
        torch.testing.assert_close(found.maps[-len(last.words) :], last.maps, rtol=0, atol=ROUNDING)

    @torch.no_grad()
    def test_an_overflow_of_the_encoder_is_a_clear_error(self, own):
        own.pipeline.to(torch.float16)
        own.pipeline.vae.encoder.conv_out.weight.fill_(6e4)
        with pytest.raises(ConfigError) as caught:
            Teacher(own.pipeline, self.plain())(jobs()[:1])
        assert str(caught.value) == (
            "Got NaN or infinity in the latents, encoded in float16. Expected finite latents. "
            "Do this: use --dtype bfloat16 or float32."
        )

    @torch.no_grad()
    def test_an_overflow_of_the_backbone_is_a_clear_error(self, own):
        own.pipeline.to(torch.float16)
        for layer in own.layers((16, 16)):
            for name, part in layer.module.named_children():
                if name in PARTS:
                    part.weight.mul_(6e4)
        with pytest.raises(CaptureError, match="Got NaN or infinity in the maps, computed in float16"):
            Teacher(own.pipeline, self.plain())(jobs()[:1])

    def test_maps_in_bfloat16_are_close(self, own, pipeline):
        """Eight bits of mantissa. Heat, whose maximum is 1, differs by little, on average by less than 0.02."""
        own.pipeline.to(torch.bfloat16)
        exact, rounded = (Teacher(one, self.plain())(jobs()) for one in (pipeline, own.pipeline))
        for one, other in zip(exact, rounded, strict=True):
            assert other.maps.dtype == torch.float32
            assert (one.maps - other.maps).abs().max() < self.rounding
            assert (one.maps - other.maps).abs().mean() < 0.02
