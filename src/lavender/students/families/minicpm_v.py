"""MiniCPM-Llama3-V-2.5: slices of the picture, each resampled to 96 latents that stand in the text.

The published code comes with the checkpoint (`trust_remote_code=True`) and is not part of transformers. This adapter
works on its modules: `vpm` (the tower), `resampler` (one attention layer) and `llm` (a plain LlamaForCausalLM).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.students.base import Removable, VlmAdapter
from lavender.students.chat_processor import (
    check_placeholders,
    replace_placeholders,
    texts_and_pictures,
    tokenize,
)
from lavender.students.image_keys import KeyLayout, grid_boxes
from lavender.students.latents import latent_layout

VERSION = "2.5"
PLACEHOLDER = "(<image>./</image>)"
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<unk>", 128002  # of the published tokenizer
MINICPM_V_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- bos_token if loop.first }}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{{- '\n' if not loop.first }}"
    "{%- if part['type'] == 'image' %}{{- '(<image>./</image>)' }}{%- else %}{{- part['text'] | trim }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
"""The published template, with pictures where the published `chat` writes them."""


class MiniCpmVChatProcessor(ProcessorMixin):
    """MiniCPM-V's processor for batches, and for texts that a chat template has rendered.

    The published one takes one text at a time and makes no attention mask. Made from it:
    `MiniCpmVChatProcessor(old.image_processor, old.tokenizer)`.
    """

    image_token = PLACEHOLDER

    def __init__(self, image_processor, tokenizer, chat_template: str | None = MINICPM_V_TEMPLATE):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.published: Any = None

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the published processor with its code, where this was made from one: an export needs nothing of ours."""
        if self.published is None:
            return super().save_pretrained(save_directory, push_to_hub, **kwargs)
        return self.published.save_pretrained(save_directory, push_to_hub, **kwargs)

    def __call__(
        self,
        images: Sequence[Sequence[Any]] | None = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of the model: input_ids, attention_mask, and of each sample pixel_values, tgt_sizes, image_bound.

        Args:
            images: the pictures of each text, in the order of its placeholders; none at all for texts without.
            text: rendered texts, special tokens included.
            kwargs: the tokenizer's.

        Raises:
            DataError: a text with another number of placeholders than pictures, or cut by `max_length` amid them.
        """
        texts, pictures = texts_and_pictures(images, text)
        check_placeholders([one.count(PLACEHOLDER) for one in texts], pictures, PLACEHOLDER, cut=False)
        seen = [self.image_processor(own) if own else {} for own in pictures]
        written = [
            replace_placeholders(one, PLACEHOLDER, self._slice_placeholders(own))
            for one, own in zip(texts, seen, strict=True)
        ]
        tokens = tokenize(self.tokenizer, [one for one, _ in written], kwargs, [spans for _, spans in written])
        slices = [list(own["pixel_values"][0]) if own else [] for own in seen]
        return BatchFeature(
            tokens
            | {
                "pixel_values": [[torch.as_tensor(one) for one in own] for own in slices],
                "tgt_sizes": [
                    torch.as_tensor(own["tgt_sizes"][0]).view(-1, 2) if own else torch.zeros(0, 2, dtype=torch.int32)
                    for own in seen
                ],
                "image_bound": [
                    self._bounds(ids, len(own)) for ids, own in zip(tokens["input_ids"], slices, strict=True)
                ],
            },
            skip_tensor_conversion=["pixel_values", "tgt_sizes", "image_bound"],  # of each sample another shape
        )

    def _slice_placeholders(self, seen: Mapping[str, Any]) -> list[str]:
        """What stands in the text for each picture: a placeholder per slice."""
        sizes = seen["image_sizes"][0] if seen else []
        return [self.image_processor.get_slice_image_placeholder(size) for size in sizes]

    def _bounds(self, ids: Tensor, slices: int) -> Tensor:
        """Where each slice's latents begin and end: long (slice, 2), end exclusive."""
        images = self.image_processor
        marks = ((images.im_start_token, images.slice_start_token), (images.im_end_token, images.slice_end_token))
        starts, ends = (torch.isin(ids, torch.tensor(self.tokenizer.convert_tokens_to_ids(one))) for one in marks)
        # 2.5 writes one <slice> around all slices and <image> around each; later versions <slice> around each
        inside = ids == self.tokenizer.convert_tokens_to_ids(images.unk_token)
        first = (inside & starts.roll(1)).nonzero().flatten()
        last = (ends & inside.roll(1)).nonzero().flatten()
        if not len(first) == len(last) == slices:
            raise DataError(
                f"{len(last)} whole slices in a text of {slices}",
                "all of them",
                "raise max_length, or set it to None, if it cuts pictures",
            )
        return torch.stack([first, last], dim=1)


class MiniCpmVAdapter(VlmAdapter):
    """Self-attention keys: `query_num` latents a slice; the whole picture's first, then those of its parts, row-major.

    Each slice is squashed to whole patches, of its own shape, and cuts nothing off; so its patches are a grid.
    """

    model_type = "minicpmv"
    parts = {  # noqa: RUF012
        "vision_tower": ("vpm",),
        "connector": ("resampler",),
        "language_model": ("llm",),
    }

    def __init__(self, config: Any):
        version = getattr(config, "version", None)
        if str(version) != VERSION:
            name = "MiniCPM-V 2 or older, which names no version" if version is None else f"MiniCPM-V {version}"
            raise UnsupportedModelError(
                f"{name}: its model type is MiniCPM-Llama3-V-2.5's, {self.model_type!r}, and its parts are others",
                f"version: {VERSION} in its config",
                "use MiniCPM-Llama3-V-2.5, or another family",
            )
        super().__init__(config)

    def processor(self, published: Any) -> MiniCpmVChatProcessor:
        if isinstance(published, MiniCpmVChatProcessor):
            return published
        made = MiniCpmVChatProcessor(published.image_processor, published.tokenizer)
        made.published = published
        return made

    def load(self, auto: Any, path: str, **settings: Any) -> Any:
        """The published code is of transformers 4. In 5 it says too little of tied weights, and nothing ties them.

        And 5 leaves buffers that no checkpoint holds as they come from memory: the patches' places are set again.
        """
        assert settings["trust_remote_code"] is True, "without it AutoConfig has refused this model"
        own: Any = get_class_from_dynamic_module(self.config.auto_map[auto.__name__], path)
        own.all_tied_weights_keys = {}
        model = super().load(auto, path, **settings)
        places = model.resampler.pos_embed
        model.resampler._set_2d_pos_cache(model.resampler.max_size, places.device)
        model.resampler.pos_embed = model.resampler.pos_embed.to(places)
        return model

    def usable_layers(self) -> tuple[int, ...]:
        return tuple(range(self.config.num_hidden_layers))

    def attention_module(self, model: Any, layer: int) -> nn.Module:
        return model.llm.model.layers[layer].self_attn

    def describe_keys(self) -> str:
        return f"{self.config.query_num} latents for the picture and for each of its slices, among the text's tokens"

    def image_token_id(self) -> int:
        """That of the published tokenizer, unless the config has an `image_token_id` of its own."""
        return getattr(self.config, "image_token_id", IMAGE_TOKEN_ID)

    def token_ids(self, inputs: Mapping[str, Any]) -> Tensor:
        return inputs.get("data", inputs)["input_ids"]  # see `hooks`

    def image_keys(self, inputs: Mapping[str, Any]) -> Tensor:
        wrong = {end - start for own in inputs["image_bound"] for start, end in own.tolist()} - {self.config.query_num}
        if wrong:
            raise DataError(
                f"slices of {sorted(wrong)} tokens in the text",
                f"{self.config.query_num} tokens a slice",
                "set the image processor's image_feature_size to the model's query_num",
            )
        keys = [
            torch.cat([torch.zeros(0, dtype=torch.long), *(torch.arange(start, end) for start, end in own.tolist())])
            for own in inputs["image_bound"]
        ]
        return pad_sequence(keys, batch_first=True, padding_value=-1).to(inputs["input_ids"].device)

    def image_boxes(
        self, inputs: Mapping[str, Any], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        if not isinstance(processor, MiniCpmVChatProcessor):
            raise ConfigError(
                f"{type(processor).__name__}, which takes one text at a time",
                "MiniCpmVChatProcessor",
                "use lavender.students.families.minicpm_v."
                "MiniCpmVChatProcessor(processor.image_processor, processor.tokenizer)",
            )
        settings = SliceSettings.of(processor.image_processor)
        known = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if known != self.image_token_id():
            raise ConfigError(
                f"{IMAGE_TOKEN} as token {known}",
                f"{self.image_token_id()}, as the published tokenizer has it",
                f"set model.config.image_token_id = {known}",
            )
        boxes: list[Tensor] = []
        views: list[list[tuple[int, int]]] = []
        for sizes, found in zip(image_sizes, inputs["tgt_sizes"], strict=True):
            slices = [(picture, one) for picture, size in enumerate(sizes) for one in slices_of(size, settings)]
            expected = [[one.rows, one.cols] for _, one in slices]
            if expected != found.tolist():
                raise DataError(
                    f"slices of {found.tolist()} patches for pictures of {sizes} pixels",
                    str(expected),
                    "pass the pictures' sizes before the processor, and the processor that made the inputs",
                )
            views.append([(len(boxes) + index, picture) for index, (picture, _) in enumerate(slices)])
            boxes += [grid_boxes(one.rows, one.cols, one.frame).float() for _, one in slices]
        padded = pad_sequence(boxes, batch_first=True) if boxes else torch.zeros(0, 0, 4)
        return latent_layout(padded, views, self.config.query_num)

    def resampler(self, model: Any) -> nn.Module:
        if not getattr(self.config, "batch_vision_input", True):
            raise ConfigError(
                "batch_vision_input=False, which resamples one slice at a time",
                "all slices at once",
                "set model.config.batch_vision_input = True",
            )
        return model.resampler

    def latent_attention(self, resampler: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        states = args[0] if args else kwargs["x"]
        sizes = (args[1] if len(args) > 1 else kwargs["tgt_sizes"]).tolist()
        places = [resampler.pos_embed[:rows, :cols].flatten(0, 1) for rows, cols in sizes]
        own = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        keys = resampler.ln_kv(resampler.kv_proj(states))
        position = torch.zeros_like(keys)
        for view, place in enumerate(places):
            own[view, : len(place)] = True
            position[view, : len(place)] = place.to(keys)
        attention, width = resampler.attn, resampler.attn.embed_dim
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        query_ND = linear(resampler.ln_q(resampler.query), weight[:width], bias[:width])
        key_VPD = linear(keys + position, weight[width : 2 * width], bias[width : 2 * width])
        query_HND = query_ND.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        key_VHPD = key_VPD.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        scores = query_HND.float() @ key_VHPD.float().transpose(-1, -2) * query_HND.shape[-1] ** -0.5
        return scores.masked_fill(~own[:, None, None], -torch.inf).softmax(dim=-1).mean(dim=1)

    def hooks(self, model: PreTrainedModel) -> list[Removable]:
        """The published forward wants its inputs in one dict, `data`; trainers pass them one by one.

        And they ask for what only the language model has: its backbone and its generation config.
        """
        return [model.register_forward_pre_hook(_as_data, with_kwargs=True), _LanguageModelsParts(model)]


class _LanguageModelsParts:
    """Lends a model what trainers ask for: its language model's backbone, which TRL runs without the head, and more.

    And LoRA with checkpointing lets the embeddings' output require gradients. The published code writes the latents
    into that output itself, which torch allows in a copy alone.
    """

    names = (
        "base_model_prefix",
        "backbone_with_pictures",
        "generation_config",
        "prepare_inputs_for_generation",
        "enable_input_require_grads",
    )

    def __init__(self, model: Any):
        self._model = model
        self._before = {name: value for name, value in vars(model).items() if name in self.names}
        model.base_model_prefix = "backbone_with_pictures"
        vars(model)["backbone_with_pictures"] = self._backbone
        vars(model).setdefault("generation_config", model.llm.generation_config)
        vars(model)["prepare_inputs_for_generation"] = model.llm.prepare_inputs_for_generation
        vars(model)["enable_input_require_grads"] = self._require_grads

    def _backbone(self, data: Mapping[str, Any], **kwargs: Any) -> Any:
        states, _ = self._model.get_vllm_embedding(data)
        places = data["position_ids"].long()
        return self._model.llm.model(input_ids=None, position_ids=places, inputs_embeds=states, **kwargs)

    def _require_grads(self) -> None:
        type(self._model).enable_input_require_grads(self._model)
        embeddings = self._model.get_input_embeddings()
        copied = embeddings.register_forward_hook(_cloned)
        self._model._require_grads_hooks.append(copied)  # which disable_input_require_grads removes

    def remove(self) -> None:
        for name in self.names:
            if name in self._before:
                vars(self._model)[name] = self._before[name]
            else:
                del vars(self._model)[name]


def _cloned(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.clone()


DATA = ("input_ids", "pixel_values", "tgt_sizes", "image_bound", "position_ids")


def _as_data(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if args or "data" in kwargs:
        return None
    data = {name: kwargs[name] for name in DATA if name in kwargs}
    if "position_ids" not in data:
        data["position_ids"] = (kwargs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    rest = {name: value for name, value in kwargs.items() if name not in DATA}
    if rest.get("inputs_embeds") is None:  # PEFT names all that a language model takes
        rest.pop("inputs_embeds", None)
    return args, {"data": data} | rest


class SliceSettings(NamedTuple):
    """The image processor's: at most so many slices, their side in pixels if square, and a patch's side."""

    max_slices: int
    resolution: int
    patch: int

    @classmethod
    def of(cls, images: Any) -> SliceSettings:
        if not images.slice_mode:
            raise ConfigError("slice_mode=False in the image processor", "True, as published", "set it")
        return cls(images.max_slice_nums, images.scale_resolution, images.patch_size)


class Slice(NamedTuple):
    """What part of the picture a slice shows, (top, left, bottom, right) as shares, and its grid of patches."""

    frame: tuple[float, float, float, float]
    rows: int
    cols: int


def slices_of(image_size: tuple[int, int], settings: SliceSettings) -> list[Slice]:
    """A picture's slices, the whole first, as the published processor makes them of (height, width) pixels."""
    height, width = image_size
    grid = slice_grid(image_size, settings)
    whole = _patches(height, width, settings, enlarge=grid is None)
    slices = [Slice((0.0, 0.0, 1.0, 1.0), *whole)]
    if grid is not None:
        rows, cols = grid
        # the picture is squashed so that its parts are of one size, of about the wanted number of pixels
        part = _patches(_nearest(height, rows) / rows, _nearest(width, cols) / cols, settings, enlarge=True)
        slices += [
            Slice((row / rows, col / cols, (row + 1) / rows, (col + 1) / cols), *part)
            for row in range(rows)
            for col in range(cols)
        ]
    return slices


def slice_grid(image_size: tuple[int, int], settings: SliceSettings) -> tuple[int, int] | None:
    """(rows, cols) of the parts a picture of (height, width) pixels is cut into; None if it is small enough.

    So many parts as its pixels ask for, one fewer or one more; of those the grid whose shape is nearest the picture's.
    """
    height, width = image_size
    wanted = min(math.ceil(width * height / settings.resolution**2), settings.max_slices)
    if wanted <= 1:
        return None
    grids = [
        (parts // cols, cols)
        for parts in (wanted - 1, wanted, wanted + 1)
        if 1 < parts <= settings.max_slices
        for cols in range(1, parts + 1)
        if parts % cols == 0
    ]
    aspect = math.log(width / height)
    return min(grids, key=lambda grid: abs(aspect - math.log(grid[1] / grid[0])))


def _patches(height: float, width: float, settings: SliceSettings, enlarge: bool) -> tuple[int, int]:
    """(rows, cols) of patches of a slice: its pixels brought to the wanted number, the aspect kept, then rounded."""
    if enlarge or width * height > settings.resolution**2:
        aspect = width / height
        height = int(settings.resolution / math.sqrt(aspect))
        width = int(height * aspect)
    return _nearest(height, settings.patch) // settings.patch, _nearest(width, settings.patch) // settings.patch


def _nearest(length: float, unit: int) -> int:
    """The multiple of `unit` nearest a length, but not 0."""
    return max(round(length / unit) * unit, unit)
