"""The world's students: small models of real classes, with 1.4 M to 1.5 M parameters, and their processors.

`mllama` cross-attends to tiles of the picture. In `llava`, patches are tokens among the text's tokens. `STUDENTS` has
one `StudentFamily` per family: how to build it, and what differs in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from lavender.world.language import CAPTION_PROMPT as CAPTION_PROMPT

VOCABULARY = 460
TILE_SIZE, MAX_TILES = 64, 2  # pixels per side and tiles per picture, Mllama
SQUARE_SIZE = 80  # pixels per side of the picture, LLaVA
PATCH_SIZE = 8  # pixels per side, both

_MLLAMA_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
MLLAMA_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}{%- generation %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}{%- endgeneration %}"
    "{%- else %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|image|>' }}{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAVA_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{- 'ASSISTANT:' }}{%- generation %}{{- ' ' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}"
    "{{- eos_token }}{%- endgeneration %}"
    "{%- else %}{{- message['role'] | upper + ': ' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<image>\n' }}{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- ' ' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
)


@dataclass(frozen=True)
class StudentFamily:
    """What differs between the families.

    Attributes:
        build_processor: texts → a processor whose tokenizer is trained on them.
        build_model: processor → a model with random weights.
        image_token: the picture's placeholder in the text, and how often the processor repeats it.
        vision: model → its vision tower and projector, which are trained first and alone.
        patches: model, image inputs → the projected patch states, (image, patch, width), and which patches show a part
            of the picture rather than padding, bool (image, patch).
        complete: processor, text batch, image inputs → the batch with the family's other inputs.
    """

    build_processor: Callable[..., Any]
    build_model: Callable[[Any], PreTrainedModel]
    image_token: tuple[str, int]
    vision: Callable[[Any], list[torch.nn.Module]]
    patches: Callable[[Any, Mapping[str, Tensor]], tuple[Tensor, Tensor]]
    complete: Callable[[Any, dict[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


def _tokenizer(texts: list[str], vocabulary: int, special_tokens: tuple[str, ...], image_token: str, **roles: str):
    """Train a byte-level BPE tokenizer on the texts."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special_tokens),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=512,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        **roles,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]})
    return tokenizer


def _set_generation_tokens(model: PreTrainedModel, tokenizer) -> None:
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )


def build_mllama_processor(texts: list[str], vocabulary: int = VOCABULARY) -> MllamaProcessor:
    """A processor as Llama-3.2-Vision has it, with at most two tiles of 64 × 64 pixels."""
    tokenizer = _tokenizer(
        texts,
        vocabulary,
        _MLLAMA_SPECIAL_TOKENS,
        "<|image|>",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    images = MllamaImageProcessorPil(size={"height": TILE_SIZE, "width": TILE_SIZE}, max_image_tiles=MAX_TILES)
    return MllamaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=MLLAMA_TEMPLATE)


def build_mllama(processor: MllamaProcessor) -> MllamaForConditionalGeneration:
    """An Mllama model with 3 + 1 vision layers and 4 text layers, of which two cross-attend with open gates."""
    tokenizer = processor.tokenizer
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    vision = MllamaVisionConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_global_layers=1,
        attention_heads=4,
        intermediate_size=384,
        image_size=TILE_SIZE,
        patch_size=PATCH_SIZE,
        max_num_tiles=MAX_TILES,
        intermediate_layers_indices=[1],
        vision_output_dim=192,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )
    text = MllamaTextConfig(
        vocab_size=image_token,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=384,
        cross_attention_layers=[1, 3],
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            parameter.data.fill_(0.7)
    _set_generation_tokens(model, tokenizer)
    return model


def new_beside_tower(
    trained: MllamaForConditionalGeneration, processor: MllamaProcessor, seed: int
) -> MllamaForConditionalGeneration:
    """An Mllama model with the vision tower of a trained one and random weights elsewhere.

    These are the projector, the cross-attention and the text model. The same seed gives the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_mllama(processor)
    model.model.vision_model.load_state_dict(trained.model.vision_model.state_dict())
    return model


def _mllama_patches(model: MllamaForConditionalGeneration, images: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    states = model.model.multi_modal_projector(model.model.vision_model(**images).last_hidden_state)
    states = states.flatten(0, 1)[:, :, 1:]  # (image, tile, patch, width), without class tokens
    shown = images["aspect_ratio_mask"][:, 0, :, None].expand(states.shape[:3])
    return states.flatten(1, 2), shown.flatten(1, 2).bool()


def _mllama_complete(processor: MllamaProcessor, batch: dict[str, Tensor], images: Mapping[str, Tensor]):
    spans = [get_cross_attention_token_mask(row, processor.image_token_id) for row in batch["input_ids"].tolist()]
    num_tiles = [[count] for count in images["aspect_ratio_mask"][:, 0].sum(-1).tolist()]
    mask = convert_sparse_cross_attention_mask_to_dense(spans, num_tiles, MAX_TILES, batch["input_ids"].shape[1])
    return batch | {"cross_attention_mask": torch.from_numpy(mask)}


def build_llava_processor(texts: list[str], vocabulary: int = VOCABULARY) -> LlavaProcessor:
    """A processor as LLaVA-1.5 has it, but it squashes the picture to a square, so that nothing is cut off."""
    tokenizer = _tokenizer(
        texts,
        vocabulary,
        ("<s>", "</s>", "<pad>"),
        "<image>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    square = {"height": SQUARE_SIZE, "width": SQUARE_SIZE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def build_llava(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A LLaVA model with 4 vision layers, of which the last is not used (as in LLaVA-1.5), and 4 text layers."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        image_size=SQUARE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=384,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SQUARE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config)
    _set_generation_tokens(model, tokenizer)
    return model


def _llava_patches(model: LlavaForConditionalGeneration, images: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    states = torch.stack(list(model.get_image_features(**images).pooler_output))
    return states, torch.ones(states.shape[:2], dtype=torch.bool)


STUDENTS: dict[str, StudentFamily] = {
    "mllama": StudentFamily(
        build_mllama_processor,
        build_mllama,
        ("<|image|>", 1),
        lambda model: [model.model.vision_model, model.model.multi_modal_projector],
        _mllama_patches,
        _mllama_complete,
    ),
    "llava": StudentFamily(
        build_llava_processor,
        build_llava,
        ("<image>", (SQUARE_SIZE // PATCH_SIZE) ** 2),
        lambda model: [model.model.vision_tower, model.model.multi_modal_projector],
        _llava_patches,
        lambda processor, batch, images: batch,
    ),
}


def conversation(prompt: str, answer: str | None = None) -> list[dict]:
    """Chat messages: a user turn with one picture and a prompt and, if given, the assistant's answer."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    return turns + ([{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else [])


def text_batch(
    family: StudentFamily, processor: ProcessorMixin, pairs: list[tuple[str, str]], images: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Model inputs of (prompt, answer) pairs, except the image inputs themselves.

    Args:
        pairs: one prompt and answer per picture.
        images: the image processor's tensors of these pictures.

    Returns:
        `input_ids`, `attention_mask` and `labels`, (pair, token), padded right, and the family's other inputs. Labels
        are -100 outside the answer.
    """
    tokenizer, rows = processor.tokenizer, []
    token, count = family.image_token
    for prompt, answer in pairs:
        head = processor.apply_chat_template(conversation(prompt), add_generation_prompt=True)
        tail = processor.apply_chat_template(conversation(prompt, answer))[len(head) :]
        head = head.replace(token, token * count)
        rows.append([tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, tail)])
    length = max(len(head) + len(tail) for head, tail in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    for index, (head, tail) in enumerate(rows):
        size = len(head) + len(tail)
        ids[index, :size], attention[index, :size] = torch.tensor(head + tail), 1
        labels[index, len(head) : size] = torch.tensor(tail)
    return family.complete(processor, {"input_ids": ids, "attention_mask": attention, "labels": labels}, images)
