"""OpenFlamingo (`openflamingo/OpenFlamingo-9B-vitl-mpt7b`, 4B): text cross-attends to 64 latents of the last picture.

The adapter, the processor, and reading and writing of published checkpoints. The model is in `flamingo_model`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    CLIPVisionModel,
    PreTrainedModel,
    ProcessorMixin,
)

from lavender.errors import DataError, UnsupportedModelError
from lavender.students.base import VlmAdapter, check_pixels
from lavender.students.chat_processor import check_placeholders, texts_and_pictures, tokenize
from lavender.students.families.flamingo_model import (
    LANGUAGE_MODELS,
    FlamingoConfig,
    FlamingoForConditionalGeneration,
    LanguageParts,
    PerceiverResampler,
    as_state,
)
from lavender.students.families.llava import seen_frame
from lavender.students.image_keys import KeyLayout, grid_boxes
from lavender.students.latents import latent_layout, over_patches

IMAGE_TOKEN, END_TOKEN = "<image>", "<|endofchunk|>"
FLAMINGO_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- ' ' if message['role'] == 'assistant' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{{- '<image>' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|endofchunk|>' if message['role'] == 'assistant' else ' ' if message['role'] == 'system' }}"
    "{%- endfor %}"
)
"""Renders `<image>question answer<|endofchunk|>`: OpenFlamingo has no roles.

A prompt ends before the blank, which tokenizers put into the answer's first token.
"""


class FlamingoProcessor(ProcessorMixin):
    """CLIP's image processor and the language model's tokenizer, with the tokens `<image>` and `<|endofchunk|>`.

    Attributes:
        end_tokens: what ends an answer; the model's config does not name it.
    """

    end_tokens = (END_TOKEN,)

    def __init__(self, image_processor, tokenizer, chat_template: str | None = FLAMINGO_TEMPLATE):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.image_token_id = IMAGE_TOKEN, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __call__(
        self,
        images: Sequence[Sequence[Any]] | None = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of the model.

        Args:
            images: the pictures of each text, in the order of its `<image>`; None for texts without pictures.
            text: rendered texts, special tokens included.
            kwargs: arguments of the tokenizer.

        Returns:
            input_ids and attention_mask, long (sample, token); pixel_values (sample, picture, 3, height, width), zeros
            for padding.

        Raises:
            DataError: the number of `<image>` is not that of the pictures, or `max_length` cuts some of them.
        """
        texts, pictures = texts_and_pictures(images, text)
        tokens = tokenize(self.tokenizer, texts, kwargs)
        named = (tokens["input_ids"] == self.image_token_id).sum(dim=1).tolist()
        check_placeholders(named, pictures, IMAGE_TOKEN)
        crop = self.image_processor.crop_size
        pixels = torch.zeros(len(texts), max(1, *named), 3, crop["height"], crop["width"])
        for index, sample in enumerate(pictures):
            if sample:
                pixels[index, : len(sample)] = self.image_processor(sample, return_tensors="pt")["pixel_values"]
        return BatchFeature(tokens | {"pixel_values": pixels})


class FlamingoAdapter(VlmAdapter):
    """Image keys: `perceiver_latents` (64) per picture; every sample has those of as many pictures as the largest one.

    Layers are the decoder layers that have a gated cross-attention block before them. CLIP's image processor crops the
    centre square of a picture. A map is the attention on the latents times the latents' attention on the patches.
    """

    model_type = "open_flamingo"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_tower",),
        "connector": ("model.perceiver", "model.gated_cross_attn_layers"),
        "language_model": ("model.language_model", "lm_head"),
    }
    cross_attends = True

    def usable_layers(self) -> tuple[int, ...]:
        every = self.config.cross_attn_every_n_layers
        return tuple(range(every - 1, self.config.num_hidden_layers, every))

    def attention_module(self, model: PreTrainedModel, layer: int) -> nn.Module:
        return model.model.gated_cross_attn_layers[str(layer)].attn

    def num_heads(self) -> int:
        return self.config.cross_attention_heads

    def describe_keys(self) -> str:
        side = self._side()
        return f"{self.config.perceiver_latents} latents that look at {side} × {side} patches"

    def keys_per_image(self) -> int:
        return self.config.perceiver_latents

    def image_token_id(self) -> int:
        return self.config.image_token_id

    def image_keys(self, inputs: Mapping[str, Tensor]) -> None:
        return None

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        found = (inputs["input_ids"] == self.config.image_token_id).sum(dim=1).tolist()
        numbers = list(map(len, image_sizes))
        if found != numbers:
            raise DataError(
                f"{found} pictures in the inputs", f"{numbers}", "pass the pictures the inputs were made of"
            )
        most, side = inputs["pixel_values"].shape[1], self._side()
        check_pixels(inputs, self.config.vision_config.image_size)
        covered = (side * self.config.vision_config.patch_size,) * 2
        boxes = torch.zeros(len(numbers) * most, side * side, 4)
        views: list[list[tuple[int, int]]] = []
        for sample, sizes in enumerate(image_sizes):
            views.append([(sample * most + index, index) for index in range(len(sizes))])
            for (view, _), size in zip(views[-1], sizes, strict=True):
                boxes[view] = grid_boxes(side, side, seen_frame(size, processor.image_processor, covered)).float()
        return latent_layout(boxes, views, self.config.perceiver_latents, most * self.config.perceiver_latents)

    def seen_from(self, inputs: Mapping[str, Tensor], layout: KeyLayout) -> Tensor:
        last = (inputs["input_ids"] == self.config.image_token_id).cumsum(dim=1)[:, None]
        return last == torch.arange(1, inputs["pixel_values"].shape[1] + 1, device=last.device)[:, None]

    def resampler(self, model: PreTrainedModel) -> PerceiverResampler:
        return model.model.perceiver

    def latent_attention(self, resampler: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        media, maps = args[0], []
        latents = resampler.latents.expand(len(media), -1, -1)
        for attention, mlp in resampler.layers:
            maps.append(attention.weights(media, latents)[0].mean(dim=1))
            latents = attention(media, latents) + latents
            latents = mlp(latents) + latents
        return over_patches(torch.stack(maps).mean(dim=0)[..., : media.shape[1]])  # the latents follow the patches

    def _side(self) -> int:
        return self.config.vision_config.image_size // self.config.vision_config.patch_size


def convert(state: Mapping[str, Tensor], language_model_type: str, layers: int) -> dict[str, Tensor]:
    """The weights of a published checkpoint, under the names of `FlamingoForConditionalGeneration`.

    A checkpoint holds the perceiver, the blocks and the embeddings, which were trained; the other weights come from
    the language model.

    Raises:
        UnsupportedModelError: a language model that transformers does not have, or a weight that has no place here.
    """
    parts = _parts(language_model_type)
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(BUFFERS):
            continue
        if ".attn.to_kv." in name:  # keys and values are one matrix there
            block = _our_name(name.replace("to_kv", "{}_proj"), parts, layers)
            for part, half in zip("kv", value.chunk(2), strict=True):
                converted[block.format(part)] = half.clone()
        else:
            converted[_our_name(name, parts, layers)] = value
    return converted


def published(model: FlamingoForConditionalGeneration) -> dict[str, Tensor]:
    """The trained weights as OpenFlamingo's own code loads them, with `strict=False`: the inverse of `convert`."""
    config, state = model.config, model.state_dict()
    parts = _parts(config.language_config.model_type)
    layers = f"lang_encoder.{parts.backbone}.{parts.layers}"
    weights = {
        name.removeprefix("model."): weight for name, weight in state.items() if name.startswith("model.perceiver.")
    }
    for name, weight in state.items():
        block = re.fullmatch(r"model\.gated_cross_attn_layers\.(\d+)\.(.+)", name)
        if block is None or ".k_proj." in name:
            continue
        inside = block[2]
        if ".v_proj." in name:
            inside, weight = (
                inside.replace("v_proj", "to_kv"),
                torch.cat([state[name.replace("v_proj", "k_proj")], weight]),
            )
        for name_here, name_there in INSIDE_BLOCKS.items():
            inside = inside.replace(name_here, name_there)
        weights[f"{layers}.{block[1]}.gated_cross_attn_layer.{inside}"] = weight
    embeddings = f"{parts.embeddings}.weight"
    weights[f"lang_encoder.{parts.backbone}.{embeddings}"] = state[f"model.language_model.{embeddings}"]
    if not config.tie_word_embeddings and "embed" in parts.head:  # what its own training saves
        weights[f"lang_encoder.{parts.head}.weight"] = state["lm_head.weight"]
    return weights


def load_open_flamingo(
    path: str | Path,
    vision: CLIPVisionModel,
    language: Any,
    image_token_id: int,
    cross_attn_every_n_layers: int = 1,
) -> FlamingoForConditionalGeneration:
    """Load a published OpenFlamingo from its checkpoint and the two models that it was built on.

    Args:
        path: the published `checkpoint.pt`, or one that OpenFlamingo's training wrote.
        vision: the vision tower; openai/clip-vit-large-patch14 for all published checkpoints.
        language: the causal language model, of a class of transformers; it becomes part of the result, and its
            embeddings are resized.
        image_token_id: id of `<image>` in the tokenizer to which `<|endofchunk|>` and `<image>` were added.
        cross_attn_every_n_layers: as published for the checkpoint: 1, 2 or 4.

    Raises:
        UnsupportedModelError: the language model is of another kind than LANGUAGE_MODELS, or a weight has no place.
        DataError: the checkpoint lacks weights, or they are of other shapes: another model's, or another spacing.
    """
    parts = _parts(language.config.model_type)
    state = as_state(torch.load(path, weights_only=True, map_location="cpu"))
    converted = convert(state, language.config.model_type, language.config.num_hidden_layers)
    embeddings = converted.get(f"model.language_model.{parts.embeddings}.weight")
    rows = language.config.vocab_size if embeddings is None else len(embeddings)  # frozen ones may not be saved
    language.resize_token_embeddings(max(rows, image_token_id + 1), mean_resizing=False)
    depths = [int(name.split(".")[3]) for name in converted if name.startswith("model.perceiver.layers.")]
    config = FlamingoConfig(
        language.config,
        vision.config,
        image_token_id,
        cross_attn_every_n_layers,
        perceiver_depth=1 + max(depths, default=0),
        perceiver_latents=len(converted["model.perceiver.latents"]),
    )
    model = FlamingoForConditionalGeneration(config, vision, language.get_submodule(parts.backbone))
    model.lm_head.weight = language.get_output_embeddings().weight
    missing = [
        name
        for name in model.state_dict()
        if name.startswith(("model.perceiver.", "model.gated_cross_attn_layers.")) and name not in converted
    ]
    expected = model.state_dict()
    wrong = [name for name, weight in converted.items() if name not in expected or expected[name].shape != weight.shape]
    if missing or wrong:
        raise DataError(
            f"a checkpoint without {missing[:3]} and with {wrong[:3]} that do not fit",
            "one of this very model",
            "check cross_attn_every_n_layers, and the vision and language models it was trained on",
        )
    model.load_state_dict(converted, strict=False)
    return model


BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
"""Buffers that older language models saved with their weights: not learned, and computed again today."""
INSIDE_BLOCKS = {"attn.q_proj": "attn.to_q", "attn.o_proj": "attn.to_out", "norm.": "attn.norm."}
"""Names in a block here → the published names, except keys and values, which are one matrix there."""


def _parts(language_model_type: str) -> LanguageParts:
    if language_model_type not in LANGUAGE_MODELS:
        raise UnsupportedModelError(
            f"a language model of type {language_model_type!r}",
            f"one of {sorted(LANGUAGE_MODELS)}",
            "take a checkpoint built on one of them (the 3B ones are built on remote code)",
        )
    return LANGUAGE_MODELS[language_model_type]


def _our_name(name: str, parts: LanguageParts, layers: int) -> str:
    backbone = f"lang_encoder.{parts.backbone}."
    start = re.escape(f"{backbone}{parts.layers}.")
    block = re.fullmatch(start + r"(\d+)\.(gated_cross_attn|decoder)_layer\.(.+)", name)
    if block is not None and int(block[1]) < layers:
        if block[2] == "decoder":
            return f"model.language_model.{parts.layers}.{block[1]}.{block[3]}"
        inside = block[3]
        for name_here, name_there in INSIDE_BLOCKS.items():
            inside = re.sub(f"^{re.escape(name_there)}", name_here, inside)
        return f"model.gated_cross_attn_layers.{block[1]}.{inside}"
    if name.startswith("perceiver."):
        return f"model.{name}"
    if name == f"lang_encoder.{parts.head}.weight":
        return "lm_head.weight"
    if block is None and name.startswith(backbone):
        return f"model.language_model.{name.removeprefix(backbone)}"
    raise UnsupportedModelError(
        f"a checkpoint with {name!r}",
        "the weights of an OpenFlamingo on this language model",
        "check that the language model is the one it was trained on",
    )


AutoConfig.register(FlamingoConfig.model_type, FlamingoConfig, exist_ok=True)
AutoModelForImageTextToText.register(FlamingoConfig, FlamingoForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FlamingoConfig, FlamingoProcessor, exist_ok=True)
