"""Mllama under the contract, with tiles: 64 pixels, patches of 8, four tiles at most."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import MllamaForConditionalGeneration, MllamaImageProcessorPil, MllamaProcessor
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from families.contract import Contract
from families.geometry import Family, batch_of, parameters_zeroed, picture, reading
from lavender.errors import CaptureError, DataError, UnsupportedModelError
from lavender.students.capture import AttentionRequest
from lavender.students.families.mllama import MllamaAdapter, tile_boxes
from lavender.students.registry import FAMILIES, adapter_for
from lavender.students.word_maps import capturing

TILE, PATCH, MAX_TILES, SIDE = 64, 8, 4, 8
# (height, width) → (rows, cols) of tiles: all eight arrangements, with pictures smaller than a tile and much larger.
SIZES = {
    (300, 500): (2, 2),
    (110, 60): (2, 1),
    (61, 170): (1, 3),
    (500, 300): (2, 2),
    (120, 900): (1, 4),
    (200, 200): (2, 2),
    (60, 110): (1, 2),
    (170, 61): (3, 1),
    (290, 67): (4, 1),
    (60, 50): (1, 1),
    (37, 23): (1, 1),
}


def resized(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels after the processor, from its rule: at least a tile wide, at most the canvas."""
    tiles = SIZES[size]
    target = [min(max(side, TILE), count * TILE) for side, count in zip(size, tiles, strict=True)]
    scale = min(target[0] / size[0], target[1] / size[1])
    return min(int(size[0] * scale + 1e-9), target[0]), min(int(size[1] * scale + 1e-9), target[1])


def blur(size: tuple[int, int]) -> tuple[float, float]:
    """How far a patch at the picture's border is off, since the filter finds nothing beyond it; shares of the picture.

    Shrinking: the triangle of a border pixel (half-width: one new pixel) is cut half a new pixel from its middle. It
    loses 1/8 of its mass, which lay 2/3 pixel away, and moves by 1/8 · 2/3 ÷ 7/8 = 2/21 of a new pixel; that is one of
    a patch's eight. Enlarging: all new pixels within half an old one of the border show the border's pixel.
    What remains is rounding to 8 bits, before and after: the 0.002.
    """

    def of_side(old: int, new: int) -> float:
        if new < old:
            return 2 / 21 / PATCH / new
        return sum(max(0.0, 0.5 - (index + 0.5) * old / new) for index in range(PATCH)) / PATCH / old

    height, width = resized(size)
    return of_side(size[0], height), of_side(size[1], width)


def patches(inputs) -> torch.Tensor:
    """Pixels of each key: a class token (zeros), then the tile's patches row-major; tile by tile."""
    processor = MllamaImageProcessorPil()
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    tiles = inputs["pixel_values"][0, 0].permute(0, 2, 3, 1) * std + mean
    tiles = tiles * inputs["aspect_ratio_mask"][0, 0][:, None, None, None]  # unused tiles are not black but nothing
    cut = tiles.unflatten(2, (SIDE, PATCH)).unflatten(1, (SIDE, PATCH)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return torch.cat([torch.zeros(MAX_TILES, 1, PATCH * PATCH, 3), cut], dim=1).flatten(0, 1)


def local_states(model, inputs) -> torch.Tensor:
    """What the text layers attend to, when patches do not exchange: attention and its MLPs silenced."""
    model = copy.deepcopy(model)
    tower = model.model.vision_model
    for layer in [*tower.transformer.layers, *tower.global_transformer.layers]:
        parameters_zeroed(layer.self_attn.o_proj)
    seen = []
    attention = adapter_for(model.config).attention_module(model, 1)
    handle = attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    return seen[0].reshape(inputs["input_ids"].shape[0], -1, seen[0].shape[-1])


class TestMllama(Contract):
    adapter = MllamaAdapter
    guesses = False
    describes = "up to 4 tiles of 64 px, each 1 class token + 8 × 8 patches"

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, processor, make_student) -> Family:
        config = make_student().config
        config.vision_config.max_num_tiles = MAX_TILES
        config.vision_config.supported_aspect_ratios = [
            list(ratio) for ratio in get_all_supported_aspect_ratios(MAX_TILES)
        ]
        images = MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=MAX_TILES)

        def make() -> MllamaForConditionalGeneration:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                model = MllamaForConditionalGeneration(copy.deepcopy(config)).eval()
            for name, parameter in model.named_parameters():
                if name.endswith("gate"):
                    parameter.data.fill_(0.7)
            return model

        four = MllamaProcessor(images, processor.tokenizer, chat_template=processor.chat_template)
        return Family(make, four, tuple(SIZES), local_states, patches, blur)

    def test_the_sizes_use_every_arrangement(self, family, model):
        found = {}
        for size in SIZES:
            inputs, _ = self.boxes_of(family, model, size)
            found[size] = get_all_supported_aspect_ratios(MAX_TILES)[int(inputs["aspect_ratio_ids"]) - 1]
        assert found == SIZES
        assert set(found.values()) == set(get_all_supported_aspect_ratios(MAX_TILES))

    def test_keys_are_as_many_as_the_attention_has(self, family, model, batch):
        layers = adapter_for(model.config).usable_layers()
        assert layers == (1, 3)
        request = AttentionRequest(torch.tensor([[30]] * 3), layers)
        assert adapter_for(model.config).image_keys(batch) is None
        with torch.no_grad(), capturing(model):
            model(**batch, attention_request=request)
        assert request.stacked().shape == (2, 3, 8, 1, MAX_TILES * (1 + SIDE * SIDE))
        boxes = adapter_for(model.config).image_boxes(batch, [[one] for one in SIZES][:3], family.processor).boxes
        assert boxes.shape == (3, MAX_TILES * 65, 4)
        for sample, num_tiles in enumerate((4, 2, 3)):
            rows_LHK = request.stacked()[:, sample, :, 0].unflatten(-1, (MAX_TILES, 65))
            used = torch.arange(MAX_TILES) < num_tiles
            assert rows_LHK[:, :, ~used].abs().sum() == 0
            torch.testing.assert_close(rows_LHK.sum((-1, -2)), torch.ones(2, 8))
            empty = (boxes[sample] == 0).all(-1).view(MAX_TILES, 65)
            assert empty[:, 0].all()
            assert empty[~used].all()
            assert not empty[used][:, 1:].any()

    def test_boxes_by_hand(self):
        # 120 × 900 on 1 × 4 tiles becomes 34 × 256 pixels: patch rows are 8/34 high, columns 8/256 wide
        boxes = tile_boxes((120, 900), (1, 4), MAX_TILES, TILE, PATCH).view(4, 65, 4)
        assert boxes[:, 0].tolist() == [[0, 0, 0, 0]] * 4
        assert boxes[0, 1].tolist() == pytest.approx([0, 0, 8 / 34, 8 / 256])
        assert boxes[2, 1 + 3 * 8 + 5].tolist() == pytest.approx([24 / 34, 168 / 256, 32 / 34, 176 / 256])
        assert boxes[3, 64].tolist() == pytest.approx([56 / 34, 248 / 256, 64 / 34, 1])
        # 2 × 1 tiles: the second lies below the first; 500 × 300 becomes 106 × 64
        boxes = tile_boxes((500, 300), (2, 1), MAX_TILES, TILE, PATCH).view(4, 65, 4)
        assert boxes[1, 1].tolist() == pytest.approx([64 / 106, 0, 72 / 106, 8 / 64])
        assert boxes[2:].abs().sum() == 0

    def test_a_border_that_no_patch_fits_is_not_seen(self):
        boxes = tile_boxes((70, 70), (1, 1), 1, 70, 16)[1:]
        assert boxes.amax().item() == pytest.approx(64 / 70)

    def test_another_number_of_pictures_is_refused(self, family, model):
        adapter, inputs = adapter_for(model.config), {"aspect_ratio_ids": torch.tensor([[1, 2], [1, 0]])}
        with pytest.raises(DataError, match=r"Got \[2, 1\] pictures in the inputs. Expected \[1, 1\]"):
            adapter.image_boxes(inputs, [[(64, 64)]] * 2, family.processor)

    @torch.no_grad()
    def test_a_batch_without_its_mask_is_refused(self, family, model):
        batch = batch_of(family, [reading((300, 500), "a dog")])
        request = AttentionRequest(torch.tensor([[30]]), (1, 3))
        del batch["cross_attention_mask"]
        with pytest.raises(CaptureError, match="Got no attention mask in layer 1"), capturing(model):
            model(**batch, attention_request=request)

    @torch.no_grad()
    def test_a_batch_without_pictures_is_refused(self, family, model):
        ids = family.processor.tokenizer("a dog and a cat", return_tensors="pt")
        request = AttentionRequest(torch.tensor([[3]]), (1, 3))
        with capturing(model):
            model(**ids, attention_request=request)
        with pytest.raises(CaptureError, match=r"Got no attention from layers \[1, 3\]"):
            request.stacked()

    def test_an_unknown_family_is_refused(self, model):
        with pytest.raises(UnsupportedModelError) as caught:
            adapter_for(type("Config", (), {"model_type": "llama"})())
        assert f"Got a model of type 'llama'. Expected one of {sorted(FAMILIES)}." in str(caught.value)
        assert {"llava", "mllama", "qwen2_vl"} < set(FAMILIES)

    def test_a_picture_of_every_size_has_its_whole_in_view(self, family, model):
        """Uniform attention over a picture's patches covers it evenly, up to the border that is cut or padded."""
        for size in SIZES:
            _, boxes = self.boxes_of(family, model, size, picture(size))
            area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum()
            used = SIZES[size][0] * SIZES[size][1] * TILE * TILE
            height, width = resized(size)
            assert area.item() == pytest.approx(used / (height * width), rel=1e-5), size
