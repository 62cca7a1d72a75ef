"""MiniCPM-V 4.6 under the contract: views of at most 48² pixels in cells of 8, at most four slices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6ImageProcessorPil,
    MiniCPMV4_6Processor,
    PreTrainedModel,
    ProcessorMixin,
)

from families.by_hand import Keys
from families.contract import Contract
from families.geometry import Family, batch_of, parameters_zeroed, reading
from families.test_qwen3_5 import HYBRID, NORMS, eager_rows_of_attention_layers
from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.students.families.minicpm_v4_6 import MiniCpmV46Adapter
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

PATCH, CELL = 2, 4
# (height, width) → (rows, cols) of slices, by hand: at most four, as near to the picture's shape as they get; then the
# (rows, cols) of keys in the whole picture and in each slice
SIZES = {
    (300, 500): ((2, 2), (5, 8), (5, 8)),
    (97, 83): ((2, 2), (6, 5), (6, 6)),
    (51, 96): ((1, 2), (4, 8), (6, 6)),
    (120, 700): ((1, 4), (2, 14), (5, 7)),
    (300, 120): ((3, 1), (9, 4), (5, 6)),
    (37, 23): ((0, 0), (8, 5), (0, 0)),
}
MARKERS = ("image", "slice", "image_id")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|video_pad|>",
    *(f"<{slash}{name}>" for name in MARKERS for slash in ("", "/")),
)
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
    "{%- if part['type'] == 'image' %}{{- '<|image_pad|>\n' }}"
    "{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


class PicturesProcessor(MiniCPMV4_6Processor):
    """MiniCPM-V's processor without its slot for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.slice_mode, self.default_use_image_id = image_processor.slice_mode, image_processor.use_image_id
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        for name in MARKERS:
            setattr(self, f"{name}_start_token", f"<{name}>")
            setattr(self, f"{name}_end_token", f"</{name}>")


def build_processor(texts: list[str]) -> PicturesProcessor:
    tokenizer = _tokenizer(
        texts, 300, SPECIAL_TOKENS, "<|image_pad|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    images = MiniCPMV4_6ImageProcessorPil(patch_size=PATCH, scale_resolution=48, max_slice_nums=4)
    return PicturesProcessor(images, tokenizer, TEMPLATE)


def config_of(tokenizer) -> MiniCPMV4_6Config:
    """Two tower layers, with the windows merged between them."""
    text = HYBRID | {
        "model_type": "qwen3_5_text",
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 192,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": PATCH,
    }
    return MiniCPMV4_6Config(
        text_config=text,
        vision_config=vision,
        insert_layer_id=0,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )


def local_states(model, inputs) -> torch.Tensor:
    """The normalised states that enter the first decoder layer, when patches do not exchange beyond their window."""
    model = copy.deepcopy(model)
    del model.model.language_model.layers[1:]
    model.model.language_model.config.num_hidden_layers = 1
    for layer in model.model.vision_tower.encoder.layers:
        parameters_zeroed(layer.self_attn.out_proj)
    seen = []
    norm = model.model.language_model.layers[0].input_layernorm
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**inputs, use_cache=False)
    return torch.stack(
        [states[ids == model.config.image_token_id] for states, ids in zip(seen[0], inputs["input_ids"], strict=True)]
    )


def patches(inputs) -> torch.Tensor:
    """Pixels of each key: the patches of a view stand side by side, row by row."""
    keys, start = [], 0
    for rows, cols in inputs["target_sizes"].tolist():
        view = inputs["pixel_values"][0, :, :, start * PATCH : (start + rows * cols) * PATCH]
        start += rows * cols
        cells = view.unflatten(2, (rows // CELL, CELL, cols // CELL, CELL, PATCH))  # (3, PATCH, …)
        keys.append(cells.permute(2, 4, 3, 5, 1, 6, 0).flatten(2, 5).flatten(0, 1))
    return torch.cat(keys) * 0.5 + 0.5


class TestMiniCpmV46(Contract):
    adapter = MiniCpmV46Adapter
    guesses = False
    describes = "the whole picture, then slices of it row by row, in cells of 8 px among the text's tokens"
    keys = Keys((200, 174, 104), "<|image_pad|>", "<image>", "</slice>")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        processor = build_processor(captions)
        config = config_of(processor.tokenizer)

        def make() -> PreTrainedModel:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                model = MiniCPMV4_6ForConditionalGeneration(copy.deepcopy(config)).eval()
                for name, parameter in model.named_parameters():
                    if name.endswith(("q_norm.weight", "k_norm.weight")):
                        torch.nn.init.uniform_(parameter, *NORMS)
                    if "vit_merger" in name and parameter.dim() == 2:
                        torch.nn.init.normal_(parameter, std=0.02)  # new ones are fifty times as large
                # behind a norm, small states have large gradients, whose sums then differ by their order
                model.model.vision_tower.embeddings.patch_embedding.weight.data *= 10
            model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
            model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
            return model

        return Family(make, processor, tuple(SIZES), local_states, patches, lambda size: (0.0, 0.0), clear=0.4)

    eager_rows = staticmethod(eager_rows_of_attention_layers)

    def test_the_sizes_give_their_views(self, family, model):
        for size, ((rows, cols), whole, part) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            views = [whole, *[part] * (rows * cols)]
            assert inputs["target_sizes"].tolist() == [[height * CELL, width * CELL] for height, width in views]
            starts = [0]
            for height, width in views:
                starts.append(starts[-1] + height * width)
            assert len(boxes) == starts[-1]
            corners = [(float(boxes[start][0]), float(boxes[start][1])) for start in starts[:-1]]
            expected = [(0.0, 0.0)] + [(row / rows, col / cols) for row in range(rows) for col in range(cols)]
            assert corners == [pytest.approx(corner) for corner in expected]

    def test_layers_of_linear_attention_are_left_out(self, model):
        assert adapter_for(model.config).usable_layers() == (1, 3)

    def test_another_text_model_is_refused(self, model):
        model.config.text_config.model_type = "qwen3"
        with pytest.raises(UnsupportedModelError, match="Got text_config.model_type='qwen3'. Expected 'qwen3_5_text'"):
            adapter_for(model.config)

    def test_pictures_that_are_not_resized_are_refused(self, family, model, batch, monkeypatch):
        monkeypatch.setattr(family.processor.image_processor, "do_resize", False)
        with pytest.raises(ConfigError, match="that does not resize pictures"):
            adapter_for(model.config).image_boxes(batch, [[size] for size in list(SIZES)[:3]], family.processor)

    def test_more_tokens_per_view_in_the_call_alone_are_refused(self, family, model):
        one = reading((37, 23), "dog")
        text = family.processor.apply_chat_template(one.messages(), tokenize=False)
        settings: dict[str, Any] = {"downsample_mode": "4x", "return_tensors": "pt"}
        inputs = family.processor(images=[[one.image]], text=[text], **settings)
        with pytest.raises(DataError, match="set downsample_mode of the image processor as in the model's config"):
            adapter_for(model.config).image_keys(inputs)

    def test_views_are_told_by_their_markers(self, family, model):
        """Without the marker of a slice, a view would count as a picture of its own."""
        inputs = batch_of(family, [reading((51, 96), "dog")])
        part, word = (family.processor.tokenizer.convert_tokens_to_ids(token) for token in ("<slice>", "a"))
        inputs["input_ids"][inputs["input_ids"] == part] = word
        with pytest.raises(DataError, match="Got picture tokens after 'a'"):
            adapter_for(model.config).image_boxes(inputs, [[(51, 96)]], family.processor)

    def test_videos_are_refused(self, model):
        inputs = {"input_ids": torch.full((2, 40), 5), "pixel_values_videos": torch.zeros(1, 3, 2, 4)}
        with pytest.raises(DataError, match="Got a batch with videos. Expected pictures: a map is of one picture"):
            adapter_for(model.config).image_keys(inputs)
