"""Qwen2-VL and Qwen2.5-VL under the contract: cells of 8 pixels, each of 2 × 2 patches, and at most 144 of them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from families.asking import captured, request_of
from families.by_hand import Keys
from families.contract import Contract
from families.geometry import Family, batch_of, parameters_zeroed
from lavender.alignment.objective import AlignmentRequest, attach, detach
from lavender.config import AlignmentConfig
from lavender.errors import DataError
from lavender.students.families.qwen_vl import Qwen2VlAdapter, Qwen25VlAdapter
from lavender.world.student_models import _tokenizer

PATCH, MERGE = 4, 2
# (height, width) → (rows, cols) of keys, by hand: the nearest whole cells, or the most of that shape within 96² pixels;
# pictures below 48² pixels are enlarged.
SIZES = {
    (300, 500): (9, 15),
    (97, 83): (12, 10),
    (51, 96): (6, 12),
    (120, 700): (4, 28),
    (200, 200): (12, 12),
    (37, 23): (8, 5),
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}{%- generation %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


class PicturesProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without its slot for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor(texts: list[str]) -> PicturesProcessor:
    tokenizer = _tokenizer(
        texts, 300, SPECIAL_TOKENS, "<|image_pad|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 48 * 48, "longest_edge": 96 * 96}
    )
    return PicturesProcessor(images, tokenizer, TEMPLATE)


def config_of(kind: str, tokenizer) -> Qwen2VLConfig | Qwen2_5_VLConfig:
    """Two layers that see, three that read; Qwen2.5 looks through windows of 4 × 4 cells first."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": MERGE}
    tokens = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    if kind == "qwen2_vl":
        return Qwen2VLConfig(
            text_config=text, vision_config=vision | {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}, **tokens
        )
    windows = {
        "hidden_size": 64,
        "out_hidden_size": 128,
        "intermediate_size": 128,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision | windows, **tokens)


def local_states(model, inputs) -> torch.Tensor:
    """What the first text layer attends to, when patches do not exchange: the tower's attention silenced."""
    model = copy.deepcopy(model)
    for block in model.model.visual.blocks:
        parameters_zeroed(block.attn.proj)
    return key_states(model, inputs)


def key_states(model, inputs) -> torch.Tensor:
    """What the first text layer attends to at the picture tokens. The model loses its other layers."""
    del model.model.language_model.layers[1:]
    seen = []
    attention = model.model.language_model.layers[0].self_attn
    handle = attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    return torch.stack(
        [states[ids == model.config.image_token_id] for states, ids in zip(seen[0], inputs["input_ids"], strict=True)]
    )


def patches(inputs) -> torch.Tensor:
    """Pixels of each key: its patches follow one another, and each holds the picture twice, as if in time."""
    images = Qwen2VLImageProcessorPil()
    keys = inputs["pixel_values"].unflatten(1, (3, 2, PATCH**2))
    assert torch.equal(keys[:, :, 0], keys[:, :, 1])
    pixels = keys[:, :, 0].transpose(1, 2).unflatten(0, (-1, MERGE**2)).flatten(1, 2)
    return pixels * torch.tensor(images.image_std) + torch.tensor(images.image_mean)


def blur(size: tuple[int, int]) -> tuple[float, float]:
    """Of the bicubic filter at the picture's border, as for LLaVA: less than 0.03 of a pixel, old or new."""
    return 0.03 / size[0], 0.03 / size[1]


def family_of(kind: str, texts: list[str]) -> Family:
    processor = build_processor(texts)
    config = config_of(kind, processor.tokenizer)
    model_class = Qwen2VLForConditionalGeneration if kind == "qwen2_vl" else Qwen2_5_VLForConditionalGeneration

    def make() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = model_class(copy.deepcopy(config)).eval()  # ty: ignore[invalid-argument-type]
            for name, parameter in model.named_parameters():
                if name.endswith(("q_proj.bias", "k_proj.bias")):
                    torch.nn.init.normal_(parameter)  # real ones are large, new ones zero
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return model

    return Family(make, processor, tuple(SIZES), local_states, patches, blur, clear=0.4)


class TestQwen2Vl(Contract):
    adapter = Qwen2VlAdapter
    describes = "a grid of the picture's own shape, cells of 8 px among the text's tokens"
    keys = Keys((135, 120, 72), "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")

    kind = "qwen2_vl"

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(cls.kind, captions)

    def test_the_sizes_give_their_grids(self, family, model):
        for size, (rows, cols) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            assert inputs["image_grid_thw"].tolist() == [[1, rows * MERGE, cols * MERGE]]
            assert boxes.shape == (rows * cols, 4)
            assert boxes[cols + 1].tolist() == pytest.approx([1 / rows, 1 / cols, 2 / rows, 2 / cols])
            assert boxes[-1, 2:].tolist() == [1, 1]

    def test_padding_of_keys_has_empty_boxes(self, family, model, batch):
        boxes = Qwen2VlAdapter(model.config).image_boxes(batch, [[size] for size in SIZES][:3], family.processor).boxes
        for sample, count in zip(boxes, (135, 120, 72), strict=True):
            assert (sample[:count, 2:] > sample[:count, :2]).all()
            assert sample[count:].abs().sum() == 0

    def test_rows_see_the_picture_up_to_themselves(self, model, batch):
        adapter = Qwen2VlAdapter(model.config)
        assert adapter.usable_layers() == (0, 1, 2)
        keys = adapter.image_keys(batch)
        rows = torch.stack([keys[:, 0] - 1, keys[:, 10], keys.amax(dim=1) + 1], dim=1)
        before, within, after = captured(model, batch, rows=rows).stacked()[:, :, :, :, :72].unbind(3)
        assert before.abs().sum() == 0
        assert within[..., :11].min() > 0
        assert within[..., 11:].abs().sum() == 0
        assert after.min() > 0

    @pytest.mark.parametrize("pooling", ["layer-mean", "flow-sum", "flow-multi", "learn"])
    @torch.no_grad()
    def test_padding_of_keys_changes_no_loss(self, family, model, readings, batch, pooling):
        """The map of a word in a small picture is the same beside a larger one."""
        torch.manual_seed(7)
        head = attach(model, AlignmentConfig(attention_loss="published", pooling=pooling))
        request = request_of(family, model, batch, readings, head.layers)
        model(**batch, attention_request=request)
        together = head.maps(request)[-1]
        alone = batch_of(family, readings[-1:])
        tensors = {
            "rows": request.rows_BR,
            "shares": request.shares,
            "targets": request.targets,
            "weights": request.weights,
        }
        tensors |= {"present": request.present, "word_pictures": request.word_pictures}
        tensors = {name: one[-1:] for name, one in tensors.items()}
        keys = Qwen2VlAdapter(model.config).key_tensors(alone, [[list(SIZES)[2]]], family.processor)
        own = AlignmentRequest(head.layers, tensors | keys)
        model(**alone, attention_request=own)
        assert own.layout.boxes.shape[1] < request.layout.boxes.shape[1]
        assert torch.equal(own.text_positions()[0], request.text_positions()[-1])
        torch.testing.assert_close(head.maps(own)[0], together, rtol=0, atol=1e-5)
        detach(model)

    @pytest.mark.parametrize("count", [0, 11, 24])
    def test_another_number_of_picture_tokens_is_refused(self, model, count):
        """None, a picture that is cut, one too many."""
        adapter, ids = Qwen2VlAdapter(model.config), torch.full((2, 40), 5)
        ids[0, 7 : 7 + 12] = ids[1, 3 : 3 + count] = adapter.image_token_id()
        with pytest.raises(DataError) as caught:
            adapter.image_keys({"input_ids": ids, "image_grid_thw": torch.tensor([[1, 6, 8], [1, 8, 6]])})
        assert str(caught.value) == (
            f"Got {count + 12} picture tokens in a batch. Expected 24, a token for each cell of its pictures. "
            "Do this: raise max_length (or set it to None) if it cuts pictures."
        )

    @pytest.mark.parametrize("grids", [{}, {"image_grid_thw": torch.tensor([[1, 6, 8]] * 3)}])
    def test_another_number_of_pictures_is_refused(self, family, model, grids):
        adapter, inputs = Qwen2VlAdapter(model.config), {"input_ids": torch.full((2, 40), 5)} | grids
        message = f"Got {3 if grids else 0} pictures in the inputs. Expected 2."
        with pytest.raises(DataError, match=message):
            adapter.image_boxes(inputs, [[(48, 64)]] * 2, family.processor)

    def test_videos_are_refused(self, model):
        inputs = {"input_ids": torch.full((2, 40), 5), "video_grid_thw": torch.tensor([[2, 6, 8]] * 2)}
        with pytest.raises(DataError) as caught:
            Qwen2VlAdapter(model.config).image_keys(inputs)
        assert str(caught.value) == (
            "Got a batch with videos. Expected pictures: a map is of one picture, and a key of a video shows "
            "several frames. Do this: drop the samples with videos."
        )


class TestQwen25Vl(TestQwen2Vl):
    adapter = Qwen25VlAdapter
    kind = "qwen2_5_vl"
