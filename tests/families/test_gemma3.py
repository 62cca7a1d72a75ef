"""Gemma 3 under the contract: squares of 96 pixels, 12 × 12 soft tokens of 2 × 2 patches; and with pan-and-scan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedModel,
)

from families.asking import captured, eager_rows
from families.by_hand import Keys
from families.contract import Contract
from families.core import LEARN
from families.geometry import Family, Geometry, batch_of, parameters_zeroed, picture, reading
from families.training import train_two_steps
from families.words import Words
from lavender.alignment.examples import Screen
from lavender.errors import ConfigError, DataError
from lavender.students.families.gemma3 import Gemma3Adapter, PanAndScan, crop_frames, pan_and_scan_settings
from lavender.students.registry import adapter_for
from lavender.training.settings import set_image_processor
from lavender.world.student_models import _tokenizer

SQUARE, PATCH, SIDE, WINDOW = 96, 4, 12, 200
CELLS = SIDE * SIDE
SIZES = ((300, 500), (500, 300), (120, 900), (200, 200), (37, 23), (97, 133))
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{- '<start_of_turn>model\n' }}{%- generation %}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] | trim }}{%- endfor %}{%- endif %}"
    "{{- '<end_of_turn>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<start_of_turn>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<start_of_image>' }}{%- else %}{{- part['text'] | trim }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<end_of_turn>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 50,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


def build_processor(texts: list[str], **images_kwargs: Any) -> Gemma3Processor:
    """Newlines merge as in Gemma's vocabulary: those before a picture are one token with the text's own."""
    roles: Any = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer(
        [*texts, *["\n\n\n"] * 50],
        310,
        SPECIAL_TOKENS,
        "<image_soft_token>",
        bos_token="<bos>",
        eos_token="<end_of_turn>",
        pad_token="<pad>",
        extra_special_tokens=roles,
    )
    images = Gemma3ImageProcessorPil(size={"height": SQUARE, "width": SQUARE})
    processor: Any = Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=CELLS)
    processor.images_kwargs = processor.images_kwargs | images_kwargs
    return processor


def config_of(tokenizer) -> Gemma3Config:
    """Two layers that see, four that read, of which one sees everything; heads wider than hidden / heads."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "intermediate_size": 192,
        "sliding_window": WINDOW,
        "max_position_embeddings": 1024,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "image_size": SQUARE,
        "patch_size": PATCH,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vision_use_head": False,
    }
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=CELLS,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )


def local_states(model, inputs) -> torch.Tensor:
    """What the first text layer attends to, when patches do not exchange: the tower's attention silenced."""
    model = copy.deepcopy(model)
    del model.model.language_model.layers[1:]
    model.model.language_model.config.num_hidden_layers = 1
    for layer in model.model.vision_tower.encoder.layers:
        parameters_zeroed(layer.self_attn.out_proj)
    seen = []
    attention = model.model.language_model.layers[0].self_attn
    handle = attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    return torch.stack(
        [states[ids == model.config.image_token_id] for states, ids in zip(seen[0], inputs["input_ids"], strict=True)]
    )


def patches(inputs) -> torch.Tensor:
    """Pixels of each key: of views in order, of a view's cells row by row."""
    pixels = inputs["pixel_values"].permute(0, 2, 3, 1) * 0.5 + 0.5
    cell = SQUARE // SIDE
    return pixels.unflatten(2, (SIDE, cell)).unflatten(1, (SIDE, cell)).transpose(2, 3).reshape(-1, cell**2, 3)


def blur(size: tuple[int, int]) -> tuple[float, float]:
    """The bilinear filter keeps a ramp as it is, but for half a pixel at the border of a picture that is enlarged.

    There the new pixels all have the colour of half a pixel, 1/4 too much in the mean. They are 48 / n of a key's 8,
    where n pixels become 96: the key is 1.5 / n of a pixel off. A picture that is made smaller: less than 0.0002.
    """
    height, width = (1.5 / side**2 if side < SQUARE else 0.0 for side in size)
    return height, width


def family_of(texts: list[str], **images_kwargs: Any) -> Family:
    processor = build_processor(texts, **images_kwargs)
    config = config_of(processor.tokenizer)

    def make() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = Gemma3ForConditionalGeneration(copy.deepcopy(config)).eval()
            torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # new ones are zero
            for name, parameter in model.named_parameters():
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    torch.nn.init.uniform_(parameter, -0.5, 0.5)  # new ones are all zero, which stands for 1
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return model

    return Family(make, processor, SIZES, local_states, patches, blur=blur, clear=0.4)


def several(processor: Gemma3Processor, images: list[list[tuple[int, int]]], **kwargs: Any) -> dict[str, torch.Tensor]:
    """A batch with as many pictures a sample as there are sizes."""
    texts = ["<start_of_turn>user\n" + "<start_of_image>" * len(own) + "what is it?<end_of_turn>\n" for own in images]
    pictures = [[picture(size, seed) for seed, size in enumerate(own)] for own in images]
    inputs = processor(
        images=pictures,
        text=texts,
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
        **kwargs,
    )
    return dict(inputs)


class TestGemma3(Contract):
    adapter = Gemma3Adapter
    describes = (
        "one square of 96 px, 12 × 12 soft tokens among the text's, and as many for each crop of pan-and-scan; "
        "3 of 4 layers see only the last 200 tokens"
    )
    keys = Keys((CELLS, CELLS, CELLS), "<image_soft_token>", "\n\n\n<start_of_image>", "<end_of_image>")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions)

    def test_rows_see_what_their_layer_lets_them(self, family, model):
        """In a picture both ways, after it causal, and in sliding layers nothing that is a window or more back."""
        batch, adapter = several(family.processor, [[(300, 500), (200, 200)]]), Gemma3Adapter(model.config)
        assert adapter.usable_layers() == (0, 1, 2, 3)
        keys = adapter.image_keys(batch)[0]
        places = torch.stack([keys[0] - 1, keys[100], keys[244], keys[287] + 5])
        before, first, second, after = captured(model, batch, rows=places[None]).stacked()[:, 0].unbind(2)
        assert before.abs().sum() == 0
        for layer in range(4):
            window = 400 if layer == 1 else WINDOW
            for rows, place, last in ((first, places[1], 144), (second, places[2], 288), (after, places[3], 288)):
                seen = (keys > place - window) & (torch.arange(288) < last)
                assert rows[layer, :, seen].min() > 0
                assert rows[layer, :, ~seen].abs().sum() == 0
            assert seen.sum() == (288 if layer == 1 else 191)  # 200 less 5 behind the pictures and 4 between them

    @torch.no_grad()
    def test_a_batch_without_token_types(self, family, model):
        """Without them the model attends causally, in full layers by the kernel's own means: no mask."""
        batch = batch_of(family, [reading((300, 500), "a dog", seed) for seed in (1, 2)])
        assert batch["attention_mask"].all()
        del batch["token_type_ids"]
        keys = Gemma3Adapter(model.config).image_keys(batch)
        request = captured(model, batch, rows=torch.tensor([[int(keys[0, 10]), 160], [159, 158]]))
        assert request.stacked()[1, 0, :, 0, 11:].abs().sum() == 0
        torch.testing.assert_close(request.stacked(), eager_rows(family.make(), batch, request), rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_none_one_and_two_pictures(self, family, model):
        sizes = [[], [(300, 500)], [(200, 200), (120, 900)]]
        batch, adapter = several(family.processor, sizes), adapter_for(model.config)
        tensors = adapter.key_tensors(batch, sizes, family.processor)
        assert tensors["pictures"].tolist() == [[-1] * 288, [0] * 144 + [-1] * 144, [0] * 144 + [1] * 144]
        assert torch.equal(tensors["boxes"][2, :144], tensors["boxes"][2, 144:])
        assert tensors["boxes"][1, 13].tolist() == pytest.approx([1 / 12, 1 / 12, 2 / 12, 2 / 12])
        first, last = tensors["keys"][2, [0, 287]].tolist()
        rows = torch.tensor([[2, 3, 4], [2, 152, 155], [first + 5, first + 150, last + 2]])
        request = captured(model, batch, rows=rows)
        torch.testing.assert_close(request.stacked(), eager_rows(model, batch, request), rtol=0, atol=1e-6)
        assert request.stacked()[:, 0].abs().sum() == 0
        one, other, after = request.stacked()[1, 2].unbind(1)  # of the layer that sees everything
        assert one[:, :144].min() > 0
        assert one[:, 144:].abs().sum() == 0  # a picture does not see a later one
        assert other.min() > 0
        assert after.min() > 0

    @pytest.mark.parametrize("count", [143, 287])
    def test_a_cut_picture_is_refused(self, model, count):
        adapter, ids = adapter_for(model.config), torch.full((2, 300), 5)
        ids[0, 7 : 7 + 144] = ids[1, 3 : 3 + count] = adapter.image_token_id()
        with pytest.raises(DataError) as caught:
            adapter.image_keys({"input_ids": ids, "pixel_values": torch.zeros(3, 3, 96, 96)})
        assert str(caught.value) == (
            f"Got {count} picture tokens in a sample. Expected 144 for each picture or crop. "
            "Do this: raise max_length (or set it to None) if it cuts pictures."
        )

    @pytest.mark.parametrize("views", [1, 3])
    def test_pictures_without_their_tokens_are_refused(self, model, views):
        adapter, ids = adapter_for(model.config), torch.full((1, 300), 5)
        ids[0, 7 : 7 + 288] = adapter.image_token_id()
        with pytest.raises(DataError) as caught:
            adapter.image_keys({"input_ids": ids, "pixel_values": torch.zeros(views, 3, 96, 96)})
        assert str(caught.value) == (
            f"Got 288 picture tokens in a batch. Expected {views * 144}: {views} pictures and crops of 144. "
            "Do this: raise max_length (or set it to None) if it cuts pictures."
        )

    def test_pan_and_scan_in_the_call_is_refused(self, family, model):
        """What it was is in no input, and the boxes would be wrong."""
        sizes = [[(120, 900)]]
        batch = several(family.processor, sizes, images_kwargs=SCAN)
        assert len(batch["pixel_values"]) == 5
        with pytest.raises(DataError) as caught:
            adapter_for(model.config).image_boxes(batch, sizes, family.processor)
        assert str(caught.value) == (
            "Got 5 pictures and crops in the tokens of a sample. Expected 1, of pictures of [(120, 900)] px with the "
            "processor's images_kwargs. Do this: give the batch and the sizes of the same samples, and set "
            "pan-and-scan in processor.images_kwargs and not in the call."
        )


class TestWordsAmidCrops(Words):
    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions, **(SCAN | {"pan_and_scan_min_crop_size": 32}))


class TestPanAndScan(Geometry):
    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions, **SCAN)

    def test_crops_add_keys(self, family, model):
        """Four of 900 pixels' width, two of 500, none of a square."""
        for size, views in (((120, 900), 5), ((300, 500), 3), ((500, 300), 3), ((200, 200), 1), ((37, 23), 1)):
            inputs, boxes = self.boxes_of(family, model, size)
            assert len(inputs["pixel_values"]) == views
            assert boxes.shape == (views * CELLS, 4)

    def test_several_pictures(self, family, model):
        sizes = [[], [(200, 200), (300, 500)], [(120, 900)]]
        batch = several(family.processor, sizes)
        tensors = adapter_for(model.config).key_tensors(batch, sizes, family.processor)
        pictures = tensors["pictures"]
        assert pictures[0].unique().tolist() == [-1]
        assert pictures[1].tolist() == [0] * CELLS + [1] * (3 * CELLS) + [-1] * CELLS
        assert pictures[2].tolist() == [0] * (5 * CELLS)
        # the first cell of the second crop of 500 pixels: from column 250, a twelfth of 250 wide
        assert tensors["boxes"][1, 3 * CELLS].tolist() == pytest.approx([0, 0.5, 1 / 12, 0.5 + 1 / 24])


@pytest.mark.parametrize(
    ("size", "crops"),
    [
        # 900 / 120 = 7.5, half up 8, at most 4: 225 columns each
        ((120, 900), [(0, 0, 1, 0.25), (0, 0.25, 1, 0.5), (0, 0.5, 1, 0.75), (0, 0.75, 1, 1)]),
        # 500 / 300 = 1.67, 2
        ((500, 300), [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]),
        # 331 / 100 = 3.31, 3: 111 columns, and 109 for the last
        ((100, 331), [(0, 0, 1, 111 / 331), (0, 111 / 331, 1, 222 / 331), (0, 222 / 331, 1, 1)]),
        # too near to a square; crops of 23 rows are too small
        ((200, 230), []),
        ((37, 23), []),
    ],
)
def test_crops_by_hand(size, crops):
    found = crop_frames(size, PanAndScan(50, 4, 1.2))
    assert len(found) == len(crops)
    for one, expected in zip(found, crops, strict=True):
        assert one == pytest.approx(expected)


def test_a_border_that_no_whole_cell_fits_is_not_seen(captions):
    """100 pixels are 25 patches of 4, of which 24 make 12 cells: 96 pixels."""
    processor: Any = build_processor(captions)
    config: Any = config_of(processor.tokenizer)
    config.vision_config.image_size = 100
    processor.image_processor.size = {"height": 100, "width": 100}
    adapter, sizes = Gemma3Adapter(config), [[(300, 500)]]
    boxes = adapter.image_boxes(several(processor, sizes), sizes, processor).boxes[0]
    assert boxes[0].tolist() == pytest.approx([0, 0, 0.08, 0.08])
    assert boxes[-1].tolist() == pytest.approx([0.88, 0.88, 0.96, 0.96])


def test_settings_of_the_processor_win(captions):
    """As in the call: `images_kwargs` first, then the image processor's attributes; the defaults are Gemma 3's."""
    processor: Any = build_processor(captions)
    assert pan_and_scan_settings(processor) is None
    processor.image_processor.do_pan_and_scan = True
    assert pan_and_scan_settings(processor) is None
    assert len(several(processor, [[(120, 900)]])["pixel_values"]) == 1
    processor.images_kwargs = processor.images_kwargs | {"do_pan_and_scan": True}
    assert pan_and_scan_settings(processor) == (256, 4, 1.2)
    processor.images_kwargs = {}
    with pytest.raises(ConfigError) as caught:
        pan_and_scan_settings(processor)
    assert str(caught.value) == (
        "Got do_pan_and_scan=True without ['pan_and_scan_min_crop_size', 'pan_and_scan_max_num_crops', "
        "'pan_and_scan_min_ratio_to_activate']. Expected a number for each. "
        "Do this: set them in processor.images_kwargs."
    )


def test_crops_are_not_switched_on_in_a_run_file(captions):
    with pytest.raises(ConfigError, match="itself sets False"):
        set_image_processor(build_processor(captions), {"do_pan_and_scan": True})


def test_crops_count_in_the_length_of_a_sample(captions):
    """transformers counts the whole picture alone."""
    family = family_of(captions, **(SCAN | {"pan_and_scan_min_crop_size": 16}))
    processor: Any = family.processor
    adapter = adapter_for(family.make().config)
    turns = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a red dog"}]
    sample = {"images": [Image.new("RGB", (900, 120))], "messages": turns}
    length = several(processor, [[(120, 900)]])["input_ids"].shape[1]
    assert Screen(processor, adapter, max_length=length - 20).is_long(sample)
    assert not Screen(processor, adapter, max_length=length + 60).is_long(sample)


def test_training_with_crops(captions, dataset, store_path, tmp_path):
    """TRL's collator and the trainer carry token types, and crops."""
    family = family_of(captions, **SCAN)
    model, given = family.make(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    train_two_steps(model, family.processor, dataset, store_path, tmp_path, **LEARN)
    for inputs in given:
        assert torch.equal(inputs["token_type_ids"] == 1, inputs["input_ids"] == model.config.image_token_id)
