"""LFM2-VL under the contract, where torchvision is: tiles of 32 pixels, cells of 2 × 2 patches of 4 pixels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration, Lfm2VlProcessor

from families.by_hand import Keys
from families.contract import Contract
from families.core import EagerRows
from families.geometry import Family
from families.grids import (
    ROLES,
    SPECIAL_TOKENS,
    maker,
    states_at_keys,
    template,
    text_settings,
    vision_settings,
)
from lavender.students.families.lfm2_vl import Lfm2VlAdapter
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

PATCH, MERGE, TILE = 4, 2, 32
CELL = PATCH * MERGE
# (height, width) → (rows, cols) of tiles, and of the cells of the whole image, by hand. At most 36 cells of 8 px, of
# which more than twice as many are cut. 1.67 is nearest to 3:2; 48 × 44 has 6 × 6 cells (5.5 rounds to even).
SIZES = {
    (300, 500): ((2, 3), (4, 7)),
    (500, 300): ((3, 2), (7, 4)),
    (120, 900): ((1, 6), (2, 16)),
    (48, 44): ((1, 1), (6, 6)),
    (31, 49): ((1, 1), (4, 6)),
}
LABELS = tuple(f"<|img_row_{row}_col_{col}|>" for row in range(1, 7) for col in range(1, 7))
TOKENS = {"image_token": "<image>"}


def family_of(texts: list[str]) -> Family:
    pytest.importorskip("torchvision", reason="LFM2-VL's image processor needs torchvision")
    from transformers.models.lfm2_vl.image_processing_lfm2_vl import Lfm2VlImageProcessor

    roles: Any = ROLES | {"extra_special_tokens": TOKENS}
    special = (*SPECIAL_TOKENS, "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *LABELS)
    tokenizer = _tokenizer(texts, 340, special, "<image>", **roles)
    images = Lfm2VlImageProcessor(
        encoder_patch_size=PATCH,
        downsample_factor=MERGE,
        tile_size=TILE,
        max_tiles=6,
        min_image_tokens=16,
        max_image_tokens=36,
    )
    processor: Any = Lfm2VlProcessor(images, tokenizer, chat_template=template("<image>\n"))
    layers = ["full_attention", "conv", "full_attention"]
    config = Lfm2VlConfig(
        text_config=text_settings(tokenizer, model_type="lfm2", layer_types=layers, block_auto_adjust_ff_dim=False),
        vision_config=vision_settings(
            model_type="siglip2_vision_model", patch_size=PATCH, num_patches=64, vision_use_head=False
        ),
        projector_hidden_size=64,
        downsample_factor=MERGE,
        image_token_id=processor.image_token_id,
    )

    def patches(inputs: Mapping[str, Tensor]) -> Tensor:
        """Pixels of each key: of views in order, of a view's cells row by row."""
        keys = []
        for pixels, (rows, cols) in zip(inputs["pixel_values"], inputs["spatial_shapes"].tolist(), strict=True):
            grid = (
                pixels[: rows * cols].unflatten(-1, (-1, 3)).unflatten(0, (rows // MERGE, MERGE, cols // MERGE, MERGE))
            )
            keys.append(grid.transpose(1, 2).reshape(rows * cols // MERGE**2, -1, 3))
        return torch.cat(keys) * 0.5 + 0.5

    return Family(
        maker(Lfm2VlForConditionalGeneration, config, tokenizer),
        processor,
        tuple(SIZES),
        states_at_keys(lambda model: [layer.self_attn.out_proj for layer in model.model.vision_tower.encoder.layers]),
        patches,
        blur,
        clear=0.3,
    )


def blur(size: tuple[int, int]) -> tuple[float, float]:
    """The bilinear filter keeps a ramp as it is, but for half a pixel, old or new, at the border: see Gemma 3's."""
    height, width = (1.5 / side**2 if side < 64 else 0.0 for side in size)
    return height, width


class TestLfm2Vl(Contract):
    adapter = Lfm2VlAdapter
    describes = "tiles row by row, then the whole image in its own shape, cells of 8 px among the text's tokens"
    keys = Keys((6 * 16 + 28, 6 * 16 + 28, 6 * 16 + 32), "<image>", "<|img_row_1_col_1|>", "<|image_end|>")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions)

    @staticmethod
    def eager_rows(model, batch, request) -> Tensor:
        """Convolutions return no rows: those of the layers with attention, numbered as the model's layers."""
        moved = copy.copy(request)
        usable = adapter_for(model.config).usable_layers()
        moved.layers = tuple(usable.index(layer) for layer in request.layers)
        return EagerRows.eager_rows(model, batch, moved)

    def test_the_sizes_give_their_views(self, family, model):
        for size, ((rows, cols), (high, wide)) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            tiles = [[8, 8]] * (rows * cols) if rows * cols > 1 else []
            assert inputs["spatial_shapes"].tolist() == [*tiles, [high * MERGE, wide * MERGE]]
            assert boxes.shape == (len(tiles) * 16 + high * wide, 4)
            assert boxes[-1].tolist() == pytest.approx([1 - 1 / high, 1 - 1 / wide, 1, 1])
            if tiles:  # the second cell of the second row of the last tile
                top, left = (rows - 1 + 1 / 4) / rows, (cols - 1 + 1 / 4) / cols
                found = boxes[(len(tiles) - 1) * 16 + 5].tolist()
                assert found == pytest.approx([top, left, top + 1 / 4 / rows, left + 1 / 4 / cols])

    def test_convolutions_are_left_out(self, model):
        assert adapter_for(model.config).usable_layers() == (0, 2)
        assert not hasattr(model.model.language_model.layers[1], "self_attn")
