"""IDEFICS (the first), the open Flamingo: text attends to a perceiver's latents of each picture.

Gated cross-attention layers stand between those of the language model. With `use_resampler` a picture's keys are
latents, which lie nowhere: a map is the text's attention on the latents times the latents' own on the patches.
Without it the keys are the class token and the patches themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature, IdeficsProcessor, PreTrainedModel, ProcessorMixin
from transformers.models.idefics.modeling_idefics import IdeficsAttention
from transformers.models.idefics.perceiver import IdeficsPerceiverAttention, IdeficsPerceiverResampler
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)

from lavender.errors import ConfigError, DataError
from lavender.students.base import Removable, VlmAdapter, check_pixels
from lavender.students.chat_processor import check_placeholders, texts_and_pictures, tokenize
from lavender.students.image_keys import EMPTY_BOX, KeyLayout, grid_boxes
from lavender.students.latents import latent_layout, over_patches

IDEFICS_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '\nUser:' if message['role'] == 'user' else '\nAssistant: ' }}"
    "{%- set place = namespace(after_image=false) %}"
    "{%- if message['content'] is string %}"
    "{{- ' ' + message['content'] if message['role'] == 'user' else message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}"
    "{{- '' if place.after_image else '<fake_token_around_image>' }}{{- '<image><fake_token_around_image>' }}"
    "{%- set place.after_image = true %}"
    "{%- else %}"
    "{{- ' ' if message['role'] == 'user' and not place.after_image }}{{- part['text'] }}"
    "{%- set place.after_image = false %}"
    "{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<end_of_utterance>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\nAssistant: ' }}{%- endif %}"
)
"""A conversation as idefics-9b-instruct was tuned on it; its published processor has no chat template."""


class IdeficsChatProcessor(IdeficsProcessor):
    """IDEFICS's processor for texts that a chat template has rendered: pictures stand where the text names them.

    The published one, given images and texts apart, sets every picture behind its text, where no word can see it;
    trainers call it so. Made from the published one: `IdeficsChatProcessor(old.image_processor, old.tokenizer)`.
    """

    def __init__(self, image_processor, tokenizer=None, chat_template: str | None = IDEFICS_TEMPLATE, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)
        self.chat_template = chat_template

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the published processor, with the chat template: what is exported needs nothing of ours."""
        plain = IdeficsProcessor(self.image_processor, self.tokenizer)
        plain.chat_template = self.chat_template
        return plain.save_pretrained(save_directory, push_to_hub, **kwargs)

    def __call__(
        self,
        images: Sequence[Sequence[Any]] | None = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of the model: input_ids, attention_mask, pixel_values and image_attention_mask.

        Args:
            images: the pictures of each text, in the order of its `<image>`; none at all for texts without.
            text: rendered texts, special tokens included.
            kwargs: the tokenizer's. What is meant for the image processor is its own setting here.

        Raises:
            DataError: a text with another number of `<image>` than pictures, or cut by `max_length` amid them.
        """
        texts, pictures = texts_and_pictures(images, text)
        tokens = tokenize(self.tokenizer, texts, kwargs)
        ids = tokens["input_ids"]
        named = (ids == self.image_token_id).sum(dim=1).tolist()
        check_placeholders(named, pictures, "<image>")
        most, (_, height, width) = max(1, *named), self.default_image_dims
        pixels = torch.zeros(len(texts), most, self.default_image_dims[0], height, width)
        for sample, own in enumerate(pictures):
            if own:
                pixels[sample, : len(own)] = self.image_processor(own, return_tensors="pt")
        seen, _ = image_attention_mask_for_packed_input_ids(ids.clone(), self.tokenizer, "pt")
        mask = incremental_to_binary_attention_mask(seen, "pt", num_classes=most)
        return BatchFeature(tokens | {"pixel_values": pixels, "image_attention_mask": mask})


class IdeficsAdapter(VlmAdapter):
    """Cross-attention keys: `max_num_images` pictures a sample, each its latents, or its class token and patches.

    Layers are counted among the cross-attention layers: layer i stands before decoder layer i · cross_layer_interval.
    The picture is squashed to a square, so the patches are a grid over the whole of it.
    """

    model_type = "idefics"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_model",),
        "connector": ("model.perceiver_resampler", "model.gated_cross_attn_layers"),
        "language_model": ("model", "lm_head"),
    }
    cross_attends = True
    head_norms = ("q_layer_norm", "k_layer_norm")

    def processor(self, published: Any) -> IdeficsChatProcessor:
        if isinstance(published, IdeficsChatProcessor):
            return published
        template = published.chat_template or IDEFICS_TEMPLATE
        return IdeficsChatProcessor(published.image_processor, published.tokenizer, template)

    def usable_layers(self) -> tuple[int, ...]:
        return tuple(range(self.config.num_hidden_layers // self.config.cross_layer_interval))

    def attention_module(self, model: PreTrainedModel, layer: int) -> IdeficsAttention:
        return model.model.gated_cross_attn_layers[layer].cross_attn

    def image_states(self, model: PreTrainedModel) -> nn.Module:
        return model.model.vision_model.encoder.layers[-1]  # its output is what the keys, or the latents, are made of

    def describe_keys(self) -> str:
        side, latents = self._side(), self.config.perceiver_config.resampler_n_latents
        patches = f"{side} × {side} patches"
        return f"{latents} latents that look at {patches}" if self.config.use_resampler else f"class token + {patches}"

    def keys_per_image(self) -> int:
        return self.config.perceiver_config.resampler_n_latents if self.config.use_resampler else 1 + self._side() ** 2

    def num_embeddings(self, model: PreTrainedModel) -> int:
        table: Any = model.get_input_embeddings()
        return table.num_embeddings + table.num_additional_embeddings

    def image_token_id(self) -> int:
        return self.config.vocab_size + 1  # behind <fake_token_around_image>, in every published IDEFICS

    def image_keys(self, inputs: Mapping[str, Tensor]) -> None:
        return None

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        if not isinstance(processor, IdeficsChatProcessor):
            raise ConfigError(
                f"{type(processor).__name__}, which sets pictures behind the text",
                "IdeficsChatProcessor",
                "use lavender.students.families.idefics."
                "IdeficsChatProcessor(processor.image_processor, processor.tokenizer)",
            )
        most, side = inputs["pixel_values"].shape[1], self._side()
        check_pixels(inputs, self.config.vision_config.image_size)
        numbers = [len(own) for own in image_sizes]
        found = inputs["image_attention_mask"].bool().any(dim=1).sum(dim=1).tolist()
        if found != numbers:
            raise DataError(
                f"{found} pictures in the inputs", f"{numbers}", "pass the pictures the inputs were made of"
            )
        patches = grid_boxes(side, side).float()
        if self.config.use_resampler:
            views = [[(sample * most + index, index) for index in range(own)] for sample, own in enumerate(numbers)]
            boxes = patches.expand(len(numbers) * most, -1, -1)
            latents = self.config.perceiver_config.resampler_n_latents
            return latent_layout(boxes, views, latents, most * latents)
        keys = torch.cat([torch.tensor([EMPTY_BOX]), patches])
        pictures = torch.arange(most).repeat_interleave(len(keys)).expand(len(numbers), -1)
        pictures = pictures.where(pictures < torch.tensor(numbers)[:, None], -1)
        boxes = keys.repeat(len(numbers), most, 1)
        return KeyLayout(boxes.where(pictures[..., None] >= 0, 0.0), pictures)

    def seen_from(self, inputs: Mapping[str, Tensor], layout: KeyLayout) -> Tensor:
        return inputs["image_attention_mask"].transpose(1, 2).bool()

    def resampler(self, model: PreTrainedModel) -> IdeficsPerceiverResampler | None:
        return model.model.perceiver_resampler if self.config.use_resampler else None

    def latent_attention(self, resampler: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        context, maps = args[0], []
        latents = resampler.latents.expand(len(context), -1, -1)
        for attention, feed_forward in resampler.blocks:
            maps.append(perceiver_attention(attention, context, latents))
            latents = attention(context, latents) + latents
            latents = feed_forward(latents) + latents
        # of its keys the first is the class token, and behind the patches come the latents themselves
        return over_patches(torch.stack(maps).mean(dim=0)[..., 1 : context.shape[1]])

    def hooks(self, model: PreTrainedModel) -> list[Removable]:
        """Keep requests from self-attention, whose layers bear the same numbers, and mend the loss."""
        layers = model.model.layers
        handles = [one.self_attn.register_forward_pre_hook(_without_request, with_kwargs=True) for one in layers]
        return [*handles, _AllTokens(model)]

    def _side(self) -> int:
        vision = self.config.vision_config
        if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
            raise ConfigError(
                f"image_size={vision.image_size} and patch_size={vision.patch_size}",
                "whole numbers, squares",
                "use a published IDEFICS",
            )
        return vision.image_size // vision.patch_size


def perceiver_attention(attention: IdeficsPerceiverAttention, context: Tensor, latents: Tensor) -> Tensor:
    """A perceiver layer's attention, mean over heads: float32 (view, latent, key); the latents are the last keys."""
    context, latents = attention.context_layer_norm(context), attention.latents_layer_norm(latents)
    query = attention.q_proj(latents).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
    key = attention.k_proj(torch.cat([context, latents], dim=1)).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
    if attention.qk_layer_norms:
        query, key = attention.q_layer_norm(query), attention.k_layer_norm(key)
    scores = query.float() @ key.float().transpose(-1, -2) * attention.qk_scale
    return scores.softmax(dim=-1).mean(dim=1)


def _without_request(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "attention_request"}


class _AllTokens:
    """Lets a model take its loss over all the tokens it knows, those that IDEFICS added too.

    transformers reshapes the logits by `vocab_size`, which leaves them out, and fails. TRL makes its own logits from
    the weight of the output embeddings, which leaves them out too, and is silently wrong.
    """

    bias = None

    def __init__(self, model: PreTrainedModel):
        self._model, self._before = model, model.loss_function
        model.loss_function = self._loss
        vars(model)["get_output_embeddings"] = self._itself

    @property
    def weight(self) -> Tensor:
        return torch.cat(list(self._model.get_submodule("lm_head").parameters()))  # its own and the added tokens'

    def _itself(self) -> _AllTokens:
        return self

    def remove(self) -> None:
        self._model.loss_function = self._before
        del vars(self._model)["get_output_embeddings"]

    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return self._before(logits, labels, vocab_size=logits.shape[-1], **kwargs)
