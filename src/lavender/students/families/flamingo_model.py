"""OpenFlamingo for transformers 5: CLIP, a perceiver, a language model, and gated cross-attention before its layers.

The published package pins torch 2.0.1, and its models are no `PreTrainedModel`. IDEFICS has a similar structure, but
its blocks, norms and feed-forwards differ, so it cannot hold the weights. Therefore the structure is written again
here, on the language models of transformers. `flamingo.load_open_flamingo` reads a published checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward


class FlamingoConfig(PreTrainedConfig):
    """Config of OpenFlamingo. The defaults of the perceiver and the heads are those of all published checkpoints.

    Args:
        language_config: config of the language model. It is not called `text_config`, so that the capturing kernel is
            set for the cross-attention and not for the language model.
        image_token_id: id of `<image>`, which stands for a picture.
        cross_attn_every_n_layers: 1 in the 3B checkpoints, 2 in the 4B, 4 in the 9B; before layers n−1, 2n−1 and so on.
    """

    model_type = "open_flamingo"
    sub_configs = {"language_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        language_config: dict | PreTrainedConfig | None = None,
        vision_config: dict | PreTrainedConfig | None = None,
        image_token_id: int = 0,
        cross_attn_every_n_layers: int = 1,
        perceiver_depth: int = 6,
        perceiver_latents: int = 64,
        cross_attention_heads: int = 8,
        cross_attention_head_dim: int = 64,
        **kwargs: Any,
    ):
        language, vision = _config(language_config, "llama"), _config(vision_config, "clip_vision_model")
        super().__init__(**({"tie_word_embeddings": language.tie_word_embeddings} | kwargs))
        self.language_config, self.vision_config = language, vision  # with the kernels they have
        self.image_token_id, self.cross_attn_every_n_layers = image_token_id, cross_attn_every_n_layers
        self.perceiver_depth, self.perceiver_latents = perceiver_depth, perceiver_latents
        self.cross_attention_heads, self.cross_attention_head_dim = cross_attention_heads, cross_attention_head_dim

    @property
    def num_hidden_layers(self) -> int:
        return self.language_config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.language_config.hidden_size

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forwards in the gated blocks; those of the language models are no wider."""
        return 4 * self.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.language_config.vocab_size


def _config(given: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        return given
    given = dict(given or {})
    return AutoConfig.for_model(given.pop("model_type", default), **given)


class LanguageParts(NamedTuple):
    """Names of the parts of a language model: the backbone, its layers and embeddings, and the head."""

    backbone: str
    layers: str
    embeddings: str
    head: str


LANGUAGE_MODELS = {
    "llama": LanguageParts("model", "layers", "embed_tokens", "lm_head"),
    "gpt_neox": LanguageParts("gpt_neox", "layers", "embed_in", "embed_out"),
    "opt": LanguageParts("model", "decoder.layers", "decoder.embed_tokens", "lm_head"),
    "mpt": LanguageParts("transformer", "blocks", "wte", "lm_head"),
}


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
    )


class PerceiverAttention(nn.Module):
    """Latents attend to the picture's patches and to themselves."""

    def __init__(self, width: int, heads: int = 8, head_dim: int = 64):
        super().__init__()
        self.heads = heads
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def weights(self, media: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The attention, float32 (view, head, latent, key), and the values, (view, head, key, width of a head)."""
        media, latents = self.norm_media(media), self.norm_latents(latents)
        key, value = self.to_kv(torch.cat([media, latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            states.unflatten(-1, (self.heads, -1)).transpose(1, 2) for states in (self.to_q(latents), key, value)
        )
        scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
        return scores.softmax(dim=-1), value

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        weights, value = self.weights(media, latents)
        return self.to_out((weights.to(value) @ value).transpose(1, 2).flatten(2))


class PerceiverResampler(nn.Module):
    """Patches (view, patch, width) → latents (view, latent, width)."""

    def __init__(self, width: int, depth: int, num_latents: int):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width), feed_forward(width)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, media: Tensor) -> Tensor:
        latents = self.latents.expand(len(media), -1, -1)
        for attention, mlp in cast(Any, self.layers):
            latents = attention(media, latents) + latents
            latents = mlp(latents) + latents
        return self.norm(latents)


class CrossAttention(nn.Module):
    """Attention of text on latents. Its kernel is the model's `attn_implementation`."""

    def __init__(self, config: FlamingoConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.cross_attention_head_dim
        self.scaling, self.is_causal = self.head_dim**-0.5, False
        inner, seen = config.cross_attention_heads * self.head_dim, config.vision_config.hidden_size
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj, self.v_proj = nn.Linear(seen, inner, bias=False), nn.Linear(seen, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, key_value_states: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for states in (self.q_proj(hidden_states), self.k_proj(key_value_states), self.v_proj(key_value_states))
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        states, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(states.flatten(2)), weights


class GatedCrossAttentionBlock(GradientCheckpointingLayer):
    """Cross-attention and feed-forward before a layer of the language model. With gates at 0 it changes nothing."""

    def __init__(self, config: FlamingoConfig, layer_idx: int):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(config.hidden_size), CrossAttention(config, layer_idx)
        self.ff = feed_forward(config.hidden_size)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: Tensor, media: Tensor, mask: Tensor, seen: Tensor, **kwargs: Any) -> Tensor:
        states = self.norm(hidden_states)
        attended, _ = self.attn(hidden_states=states, key_value_states=media, attention_mask=mask, **kwargs)
        hidden_states = attended.masked_fill(~seen[..., None], 0) * self.attn_gate.tanh() + hidden_states
        return self.ff(hidden_states) * self.ff_gate.tanh() + hidden_states


@dataclass
class FlamingoModelOutput(BaseModelOutputWithPast):
    """`image_latents`: (sample, picture, latent, width), to be given again instead of the pixels."""

    image_latents: Tensor | None = None


@dataclass
class FlamingoOutput(CausalLMOutputWithPast):
    """`image_latents`: (sample, picture, latent, width), to be given again instead of the pixels."""

    image_latents: Tensor | None = None


class FlamingoPreTrainedModel(PreTrainedModel):
    config_class = FlamingoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["GatedCrossAttentionBlock"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=0.02)
        elif isinstance(module, PerceiverResampler):
            module.latents.normal_()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


class FlamingoModel(FlamingoPreTrainedModel):
    """The model without its head. The blocks run in hooks of the language model's layers, which stay unchanged."""

    def __init__(self, config: FlamingoConfig, vision: PreTrainedModel | None = None, language: Any = None):
        super().__init__(config)
        self.vision_tower = vision or AutoModel.from_config(config.vision_config)
        self.language_model = language or AutoModel.from_config(config.language_config)
        # the same objects, so that a setting in one is seen in the other
        config.vision_config, config.language_config = self.vision_tower.config, self.language_model.config
        self.perceiver = PerceiverResampler(
            config.vision_config.hidden_size, config.perceiver_depth, config.perceiver_latents
        )
        every = config.cross_attn_every_n_layers
        places = range(every - 1, config.num_hidden_layers, every)
        self.gated_cross_attn_layers = nn.ModuleDict(
            {str(place): GatedCrossAttentionBlock(config, place) for place in places}
        )
        layers = self.language_model.get_submodule(LANGUAGE_MODELS[config.language_config.model_type].layers)
        for place in places:
            layers[place].register_forward_pre_hook(partial(self._cross, str(place)), with_kwargs=True)
        self._seen: dict[str, Any] | None = None
        self.post_init()

    def _cross(self, place: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        assert self._seen is not None, "the language model of a Flamingo runs as its part alone"
        given = dict(kwargs)
        states, *rest = args or (given.pop("hidden_states"),)
        return (self.gated_cross_attn_layers[place](states, **self._seen), *rest), given

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> FlamingoModel:
        return self

    def latents(self, pixel_values: Tensor) -> Tensor:
        """Latents of pictures (sample, picture, 3, height, width): (sample, picture, latent, width)."""
        pixels = pixel_values.flatten(0, 1).to(self.dtype)
        patches = self.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]  # without the class token
        return self.perceiver(patches).unflatten(0, pixel_values.shape[:2])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_latents: Tensor | None = None,
        picture_of_token: Tensor | None = None,
        attention_request: Any = None,
        **kwargs: Any,
    ) -> FlamingoModelOutput:
        """The language model's states.

        Args:
            pixel_values: (sample, picture, 3, height, width); zeros where a sample has fewer pictures than another.
            image_latents: instead of `pixel_values`, as an earlier forward returned them.
            picture_of_token: long (sample, token): how many pictures have begun at a token, which sees the last of
                them; counted in `input_ids` if not given.
        """
        if image_latents is None:
            assert pixel_values is not None, "pixel_values or image_latents"
            image_latents = self.latents(pixel_values)
        if picture_of_token is None:
            picture_of_token = (input_ids == self.config.image_token_id).cumsum(dim=1)
        pictures = torch.arange(1, image_latents.shape[1] + 1, device=input_ids.device)
        sees = (picture_of_token[..., None] == pictures).repeat_interleave(image_latents.shape[2], dim=2)
        media = image_latents.flatten(1, 2)
        # the least number instead of -inf: a row before any picture sees nothing, and must not become NaN
        mask = torch.zeros_like(sees, dtype=media.dtype).masked_fill(~sees, torch.finfo(media.dtype).min)[:, None]
        self._seen = {
            "media": media,
            "mask": mask,
            "seen": picture_of_token > 0,
            "attention_request": attention_request,
        }
        try:
            output = self.language_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        finally:
            self._seen = None
        return FlamingoModelOutput(
            last_hidden_state=output.last_hidden_state,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_latents=image_latents,
        )


class FlamingoForConditionalGeneration(FlamingoPreTrainedModel, GenerationMixin):
    def __init__(self, config: FlamingoConfig, vision: PreTrainedModel | None = None, language: Any = None):
        super().__init__(config)
        self.model = FlamingoModel(config, vision, language)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            name = LANGUAGE_MODELS[config.language_config.model_type].embeddings
            self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        self.post_init()

    def get_decoder(self) -> FlamingoModel:
        return self.model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_latents: Tensor | None = None,
        picture_of_token: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> FlamingoOutput:
        """As `FlamingoModel`, with logits and, if labels are given, the loss."""
        counted = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        output = self.model(input_ids, attention_mask, pixel_values, image_latents, picture_of_token, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **counted)
        return FlamingoOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_latents=output.image_latents,
        )

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        pictures = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_latents")}
        prepare: Any = super().prepare_inputs_for_generation
        inputs = prepare(input_ids, *args, **kwargs)
        begun = (input_ids == self.config.image_token_id).cumsum(dim=1)
        inputs["picture_of_token"] = begun[:, -inputs["input_ids"].shape[1] :]
        given = "pixel_values" if pictures["image_latents"] is None else "image_latents"
        return inputs | {given: pictures[given]}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args: Any, **kwargs: Any) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return model_kwargs | {"image_latents": outputs.image_latents}


def as_state(loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of what a checkpoint file holds: a published one itself, or one that training has wrapped."""
    state = loaded.get("model_state_dict", loaded)
    return {name.removeprefix("module."): value for name, value in state.items()}
