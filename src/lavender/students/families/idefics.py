"""IDEFICS, the first version (`HuggingFaceM4/idefics-9b`, 80b): text cross-attends to a resampler's latents.

Gated cross-attention layers stand between the layers of the language model. With `use_resampler` the image keys are
latents, which have no place in the picture: a map is the text's attention on the latents times the latents' attention
on the patches. Without it the keys are the class token and the patches.
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
    "{{- '\nUser:' if message['role'] == 'user' else '\nAssistant: ' if message['role'] == 'assistant' }}"
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
    "{{- '<end_of_utterance>' if message['role'] != 'system' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\nAssistant:' }}{%- endif %}"
)
"""The format of conversations that idefics-9b-instruct was tuned on; its published processor has no chat template.

A prompt ends before the blank, which the tokenizer puts into the answer's first token.
"""


class IdeficsChatProcessor(IdeficsProcessor):
    """IDEFICS's processor for rendered conversations: pictures stand where the text names them.

    Trainers pass images and texts apart. The published processor then puts every picture behind its text, where no word
    can see it. Make this one from it: `IdeficsChatProcessor(published.image_processor, published.tokenizer)`.

    Attributes:
        end_tokens: what ends an answer, beside the end of the text.
    """

    end_tokens = ("<end_of_utterance>",)

    def __init__(self, image_processor, tokenizer=None, chat_template: str | None = IDEFICS_TEMPLATE, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)
        self.chat_template = chat_template

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the published processor with the chat template: an export then needs no Lavender."""
        plain = IdeficsProcessor(self.image_processor, self.tokenizer)
        plain.chat_template = self.chat_template
        return plain.save_pretrained(save_directory, push_to_hub, **kwargs)

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
            kwargs: arguments of the tokenizer; the image processor uses its own settings.

        Returns:
            input_ids and attention_mask, long (sample, token); pixel_values (sample, picture, 3, height, width), zeros
            for padding; image_attention_mask, bool (sample, token, picture), which pictures a token sees.

        Raises:
            DataError: the number of `<image>` is not that of the pictures, or `max_length` cuts some of them.
        """
        texts, pictures = texts_and_pictures(images, text)
        tokens = tokenize(self.tokenizer, texts, kwargs)
        ids = tokens["input_ids"]
        named = (ids == self.image_token_id).sum(dim=1).tolist()
        check_placeholders(named, pictures, "<image>")
        most, (_, height, width) = max(1, *named), self.default_image_dims
        pixels = torch.zeros(len(texts), most, self.default_image_dims[0], height, width)
        for index, sample in enumerate(pictures):
            if sample:
                pixels[index, : len(sample)] = self.image_processor(sample, return_tensors="pt")
        seen, _ = image_attention_mask_for_packed_input_ids(ids.clone(), self.tokenizer, "pt")
        mask = incremental_to_binary_attention_mask(seen, "pt", num_classes=most)
        return BatchFeature(tokens | {"pixel_values": pixels, "image_attention_mask": mask})


class IdeficsAdapter(VlmAdapter):
    """Image keys: per picture its latents, or without resampler its class token and side × side patches.

    Every sample has the keys of as many pictures as the sample with the most. Layers are indices of cross-attention
    layers: layer i stands before decoder layer i · cross_layer_interval. The picture is squashed to a square, so the
    patches are a grid over the whole picture.
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
        return model.model.vision_model.encoder.layers[-1]  # the keys, or the latents, are computed from its output

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
        numbers = list(map(len, image_sizes))
        found = inputs["image_attention_mask"].bool().any(dim=1).sum(dim=1).tolist()
        if found != numbers:
            raise DataError(
                f"{found} pictures in the inputs", f"{numbers}", "pass the pictures the inputs were made of"
            )
        patches = grid_boxes(side, side).float()
        if self.config.use_resampler:
            views = [
                [(sample * most + index, index) for index in range(number)] for sample, number in enumerate(numbers)
            ]
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
        # the first key is the class token, and the latents themselves follow the patches
        return over_patches(torch.stack(maps).mean(dim=0)[..., 1 : context.shape[1]])

    def hooks(self, model: PreTrainedModel) -> list[Removable]:
        """Keep requests from self-attention layers, which have the same indices, and correct the loss."""
        handles = [
            layer.self_attn.register_forward_pre_hook(_without_request, with_kwargs=True)
            for layer in model.model.layers
        ]
        return [*handles, _LossOverAllTokens(model)]

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
    """Attention of a perceiver layer, mean over heads: float32 (view, latent, key); the last keys are the latents."""
    context, latents = attention.context_layer_norm(context), attention.latents_layer_norm(latents)
    query = attention.q_proj(latents).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
    key = attention.k_proj(torch.cat([context, latents], dim=1)).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
    if attention.qk_layer_norms:
        query, key = attention.q_layer_norm(query), attention.k_layer_norm(key)
    scores = query.float() @ key.float().transpose(-1, -2) * attention.qk_scale
    return scores.softmax(dim=-1).mean(dim=1)


def _without_request(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "attention_request"}


class _LossOverAllTokens:
    """Makes the loss of a model cover all its tokens, including those that IDEFICS added.

    transformers reshapes the logits by `vocab_size`, which leaves the added tokens out, and fails. TRL computes logits
    from the weight of the output embeddings, which leaves them out too, and is silently wrong.
    """

    bias = None

    def __init__(self, model: PreTrainedModel):
        self._model, self._before = model, model.loss_function
        model.loss_function = self._loss
        vars(model)["get_output_embeddings"] = self._itself

    @property
    def weight(self) -> Tensor:
        return torch.cat(list(self._model.get_submodule("lm_head").parameters()))  # its own and the added tokens'

    def __call__(self, states: Tensor) -> Tensor:
        """The logits of all tokens."""
        return nn.functional.linear(states, self.weight)

    def _itself(self) -> _LossOverAllTokens:
        return self

    def remove(self) -> None:
        self._model.loss_function = self._before
        del vars(self._model)["get_output_embeddings"]

    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return self._before(logits, labels, vocab_size=logits.shape[-1], **kwargs)
