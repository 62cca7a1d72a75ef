"""MiniCPM-Llama3-V-2.5 (`openbmb/MiniCPM-Llama3-V-2_5`): 96 latents of a resampler per slice of the picture.

The published code comes with the checkpoint (`trust_remote_code=True`) and is not part of transformers. This adapter
works on its modules: `vpm` (the vision tower), `resampler` (one attention layer) and `llm` (a plain LlamaForCausalLM).
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
from lavender.students.chat_processor import check_placeholders, replace_placeholders, texts_and_pictures, tokenize
from lavender.students.families.self_attention import Box, tile_frames
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
"""The published template, with pictures where the published `chat` method writes them."""


class MiniCpmVChatProcessor(ProcessorMixin):
    """MiniCPM-V's processor for batches of rendered conversations.

    The published processor takes one text at a time and makes no attention mask. Make this one from it:
    `MiniCpmVChatProcessor(published.image_processor, published.tokenizer)`.
    """

    image_token = PLACEHOLDER

    def __init__(self, image_processor, tokenizer, chat_template: str | None = MINICPM_V_TEMPLATE):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.published: Any = None

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the published processor with its code, if there is one: an export then needs no Lavender."""
        if self.published is None:
            return super().save_pretrained(save_directory, push_to_hub, **kwargs)
        return self.published.save_pretrained(save_directory, push_to_hub, **kwargs)

    def __call__(
        self,
        images: Sequence[Sequence[Any]] | None = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of the model.

        Args:
            images: the pictures of each text, in the order of its placeholders; None for texts without pictures.
            text: rendered texts, special tokens included.
            kwargs: arguments of the tokenizer.

        Returns:
            input_ids and attention_mask, long (sample, token), and a list with an entry per sample of: pixel_values,
            a list of slices (3, height, width); tgt_sizes, (slice, 2), rows and columns of patches; image_bound,
            long (slice, 2), where the latents of a slice begin and end in the text.

        Raises:
            DataError: the number of placeholders is not that of the pictures, or `max_length` cuts a picture.
        """
        texts, pictures = texts_and_pictures(images, text)
        check_placeholders([text.count(PLACEHOLDER) for text in texts], pictures, PLACEHOLDER, cut=False)
        processed = [self.image_processor(sample) if sample else {} for sample in pictures]
        replaced = [
            replace_placeholders(text, PLACEHOLDER, self._slice_placeholders(sample))
            for text, sample in zip(texts, processed, strict=True)
        ]
        tokens = tokenize(self.tokenizer, [text for text, _ in replaced], kwargs, [spans for _, spans in replaced])
        slices = [list(map(torch.as_tensor, sample["pixel_values"][0])) if sample else [] for sample in processed]
        no_sizes = torch.zeros(0, 2, dtype=torch.int32)
        sizes = [torch.as_tensor(sample["tgt_sizes"][0]).view(-1, 2) if sample else no_sizes for sample in processed]
        bounds = [self._bounds(ids, len(sample)) for ids, sample in zip(tokens["input_ids"], slices, strict=True)]
        ragged: dict[str, list[Any]] = {"pixel_values": slices, "tgt_sizes": sizes, "image_bound": bounds}
        return BatchFeature(tokens | ragged, skip_tensor_conversion=list(ragged))

    def _slice_placeholders(self, processed: Mapping[str, Any]) -> list[str]:
        """The text that stands for each picture of a sample: a placeholder per slice."""
        sizes = processed["image_sizes"][0] if processed else []
        return [self.image_processor.get_slice_image_placeholder(size) for size in sizes]

    def _bounds(self, ids: Tensor, slices: int) -> Tensor:
        """Where the latents of each slice begin and end: long (slice, 2), end exclusive."""
        images = self.image_processor
        marks = ((images.im_start_token, images.slice_start_token), (images.im_end_token, images.slice_end_token))
        starts, ends = (torch.isin(ids, torch.tensor(self.tokenizer.convert_tokens_to_ids(pair))) for pair in marks)
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
    """Image keys: `query_num` latents (96) per slice; the whole picture first, then its parts, row by row.

    Each slice is resized to whole patches in its own shape, and nothing is cropped, so its patches are an exact grid. A
    map is the attention on the latents times the latents' attention on the patches.
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
        """Load the model, and repair two things of its code, which was written for transformers 4.

        The code lacks the list of tied weights that transformers 5 reads; no weights are tied. And transformers 5
        leaves buffers that no checkpoint holds uninitialised: the position embeddings of the patches are computed
        again.
        """
        assert settings["trust_remote_code"] is True, "without it AutoConfig has refused this model"
        model_class: Any = get_class_from_dynamic_module(self.config.auto_map[auto.__name__], path)
        model_class.all_tied_weights_keys = {}
        model = super().load(auto, path, **settings)
        positions = model.resampler.pos_embed
        model.resampler._set_2d_pos_cache(model.resampler.max_size, positions.device)
        model.resampler.pos_embed = model.resampler.pos_embed.to(positions)
        return model

    def usable_layers(self) -> tuple[int, ...]:
        return tuple(range(self.config.num_hidden_layers))

    def attention_module(self, model: Any, layer: int) -> nn.Module:
        return model.llm.model.layers[layer].self_attn

    def describe_keys(self) -> str:
        return f"{self.config.query_num} latents for the picture and for each of its slices, among the text's tokens"

    def image_token_id(self) -> int:
        return getattr(self.config, "image_token_id", IMAGE_TOKEN_ID)  # else that of the published tokenizer

    def backbone(self, model: PreTrainedModel) -> nn.Module:
        return model.get_submodule("llm.model")

    def token_ids(self, inputs: Mapping[str, Any]) -> Tensor:
        return inputs.get("data", inputs)["input_ids"]  # see `hooks`

    def image_keys(self, inputs: Mapping[str, Any]) -> Tensor:
        bounds: list[list[list[int]]] = [sample.tolist() for sample in inputs["image_bound"]]
        wrong = {end - start for sample in bounds for start, end in sample} - {self.config.query_num}
        if wrong:
            raise DataError(
                f"slices of {sorted(wrong)} tokens in the text",
                f"{self.config.query_num} tokens a slice",
                "set the image processor's image_feature_size to the model's query_num",
            )
        keys = [
            torch.tensor([place for start, end in sample for place in range(start, end)], dtype=torch.long)
            for sample in bounds
        ]
        return pad_sequence(keys, batch_first=True, padding_value=-1).to(inputs["input_ids"].device)

    def image_boxes(
        self, inputs: Mapping[str, Any], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        if not isinstance(processor, MiniCpmVChatProcessor):
            raise ConfigError(
                f"{type(processor).__name__}, which takes one text at a time",
                "MiniCpmVChatProcessor",
                "make one of processor.image_processor and processor.tokenizer (lavender.students.families.minicpm_v)",
            )
        settings = SliceSettings.of(processor.image_processor)
        token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if token_id != self.image_token_id():
            raise ConfigError(
                f"{IMAGE_TOKEN} as token {token_id}",
                f"{self.image_token_id()}, as the published tokenizer has it",
                f"set model.config.image_token_id = {token_id}",
            )
        boxes: list[Tensor] = []
        views: list[list[tuple[int, int]]] = []
        for sizes, found in zip(image_sizes, inputs["tgt_sizes"], strict=True):
            slices = [(picture, part) for picture, size in enumerate(sizes) for part in slices_of(size, settings)]
            expected = [[part.rows, part.cols] for _, part in slices]
            if expected != found.tolist():
                raise DataError(
                    f"slices of {found.tolist()} patches for pictures of {sizes} pixels",
                    str(expected),
                    "pass the pictures' sizes before the processor, and the processor that made the inputs",
                )
            views.append([(len(boxes) + index, picture) for index, (picture, _) in enumerate(slices)])
            boxes += [grid_boxes(part.rows, part.cols, part.frame).float() for _, part in slices]
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
        is_patch = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        keys = resampler.ln_kv(resampler.kv_proj(states))
        position = torch.zeros_like(keys)
        for view, (rows, cols) in enumerate(sizes):
            is_patch[view, : rows * cols] = True
            position[view, : rows * cols] = resampler.pos_embed[:rows, :cols].flatten(0, 1).to(keys)
        attention, width = resampler.attn, resampler.attn.embed_dim
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        query_ND = linear(resampler.ln_q(resampler.query), weight[:width], bias[:width])
        key_VPD = linear(keys + position, weight[width : 2 * width], bias[width : 2 * width])
        query_HND = query_ND.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        key_VHPD = key_VPD.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        scores = query_HND.float() @ key_VHPD.float().transpose(-1, -2) * query_HND.shape[-1] ** -0.5
        return scores.masked_fill(~is_patch[:, None, None], -torch.inf).softmax(dim=-1).mean(dim=1)

    def hooks(self, model: PreTrainedModel) -> list[Removable]:
        """Pack the inputs into the dict `data`, as the published forward takes them, and add what trainers expect."""
        return [model.register_forward_pre_hook(_as_data, with_kwargs=True), _TrainerAttributes(model)]


class _TrainerAttributes:
    """Adds the attributes that trainers expect from a model, and removes them again.

    TRL runs the backbone of the language model without its head; generation needs its config and input preparation.
    LoRA with checkpointing makes the output of the embeddings require gradients. The published code writes the latents
    into that output in place, which torch allows only in a copy.
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
    """Settings of the image processor: most slices per picture, side of a square slice and of a patch in pixels."""

    max_slices: int
    resolution: int
    patch: int

    @classmethod
    def of(cls, images: Any) -> SliceSettings:
        if not images.slice_mode:
            raise ConfigError("slice_mode=False in the image processor", "True, as published", "set it")
        return cls(images.max_slice_nums, images.scale_resolution, images.patch_size)


class Slice(NamedTuple):
    """The part of the picture that a slice shows, and its grid of patches."""

    frame: Box
    rows: int
    cols: int


def slices_of(image_size: tuple[int, int], settings: SliceSettings) -> list[Slice]:
    """The slices that the published processor makes of a picture of (height, width) pixels, the whole picture first."""
    height, width = image_size
    grid = slice_grid(image_size, settings)
    whole = Slice((0.0, 0.0, 1.0, 1.0), *_patches(height, width, settings, enlarge=grid is None))
    if grid is None:
        return [whole]
    rows, cols = grid
    # the picture is resized so that its parts have one size, of about the wanted number of pixels
    part = _patches(_nearest(height, rows) / rows, _nearest(width, cols) / cols, settings, enlarge=True)
    return [whole, *(Slice(frame, *part) for frame in tile_frames(rows, cols, 1.0))]


def slice_grid(image_size: tuple[int, int], settings: SliceSettings) -> tuple[int, int] | None:
    """(rows, cols) of the parts that a picture of (height, width) pixels is cut into; None if it is small enough.

    The number of parts is that of the picture's pixels by `resolution`², or one fewer or more; of these grids, the one
    whose aspect is nearest to the picture's.
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
    """(rows, cols) of a slice's patches: resized to `resolution`² pixels with the aspect kept, then rounded."""
    if enlarge or width * height > settings.resolution**2:
        aspect = width / height
        height = int(settings.resolution / math.sqrt(aspect))
        width = int(height * aspect)
    return _nearest(height, settings.patch) // settings.patch, _nearest(width, settings.patch) // settings.patch


def _nearest(length: float, unit: int) -> int:
    """The positive multiple of `unit` that is nearest to a length."""
    return max(round(length / unit) * unit, unit)
