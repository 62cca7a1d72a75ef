"""OpenFlamingo's published structure, re-created for tests in plain torch: its modules' names and what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def feed_forward(dim):
    wide, back = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
    return nn.Sequential(nn.LayerNorm(dim), wide, nn.GELU(), back)


def split(states, heads):
    return states.view(*states.shape[:-1], heads, -1).transpose(-2, -3)


class PerceiverAttention(nn.Module):
    def __init__(self, dim, dim_head=64, heads=8):
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * heads * 2, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)

    def forward(self, x, latents):  # (batch, media, patch, dim), (batch, media, latent, dim)
        x, latents = self.norm_media(x), self.norm_latents(latents)
        k, v = self.to_kv(torch.cat((x, latents), dim=-2)).chunk(2, dim=-1)
        q, k, v = split(self.to_q(latents) * self.scale, self.heads), split(k, self.heads), split(v, self.heads)
        weights = (q @ k.transpose(-1, -2)).softmax(dim=-1)
        return self.to_out((weights @ v).transpose(-2, -3).flatten(-2))


class PerceiverResampler(nn.Module):
    def __init__(self, dim, depth=6, num_latents=64):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(nn.ModuleList([PerceiverAttention(dim), feed_forward(dim)]) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):  # (batch, media, frame, patch, dim)
        x = x.flatten(2, 3)
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        layers: Any = self.layers
        for attn, ff in layers:
            latents = attn(x, latents) + latents
            latents = ff(latents) + latents
        return self.norm(latents)


class MaskedCrossAttention(nn.Module):
    def __init__(self, dim, dim_visual, dim_head=64, heads=8):
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim_visual, dim_head * heads * 2, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)

    def forward(self, x, media, media_locations):
        count, latents = media.shape[1:3]
        q = split(self.to_q(self.norm(x)) * self.scale, self.heads)
        k, v = (split(one, self.heads) for one in self.to_kv(media.flatten(1, 2)).chunk(2, dim=-1))
        text_time = media_locations.cumsum(dim=-1)
        media_time = (torch.arange(count) + 1).repeat_interleave(latents)
        scores = (q @ k.transpose(-1, -2)).masked_fill(
            (text_time[:, None, :, None] != media_time), -torch.finfo(torch.float32).max
        )
        weights = scores.softmax(dim=-1).masked_fill((text_time == 0)[:, None, :, None], 0.0)
        return self.to_out((weights @ v).transpose(-2, -3).flatten(-2))


class GatedCrossAttentionBlock(nn.Module):
    def __init__(self, dim, dim_visual):
        super().__init__()
        self.attn = MaskedCrossAttention(dim, dim_visual)
        self.attn_gate = nn.Parameter(torch.tensor([0.0]))
        self.ff = feed_forward(dim)
        self.ff_gate = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x, media, media_locations):
        x = self.attn(x, media, media_locations) * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x


class FlamingoLayer(nn.Module):
    def __init__(self, gated_cross_attn_layer, decoder_layer):
        super().__init__()
        self.gated_cross_attn_layer, self.decoder_layer = gated_cross_attn_layer, decoder_layer
        self.vis_x = self.media_locations = None

    def forward(self, lang_x, *args, **kwargs):
        if self.gated_cross_attn_layer is not None:
            lang_x = self.gated_cross_attn_layer(lang_x, self.vis_x, self.media_locations)
        return self.decoder_layer(lang_x, *args, **kwargs)


class Flamingo(nn.Module):
    """Of a causal language model of transformers, whose layers it wraps in place, and a CLIP tower."""

    def __init__(self, vision_encoder, lang_encoder, layers_name, media_token_id, every, depth, num_latents):
        super().__init__()
        self.vision_encoder, self.lang_encoder, self.media_token_id = vision_encoder, lang_encoder, media_token_id
        dim, vis_dim = lang_encoder.config.hidden_size, vision_encoder.config.hidden_size
        self.perceiver = PerceiverResampler(vis_dim, depth, num_latents)
        layers = lang_encoder.get_submodule(layers_name)
        for index, layer in enumerate(layers):
            block = GatedCrossAttentionBlock(dim, vis_dim) if (index + 1) % every == 0 else None
            layers[index] = FlamingoLayer(block, layer)
        self.layers = list(layers)

    def forward(self, vision_x, lang_x, attention_mask):  # vision_x (batch, media, frame = 1, 3, height, width)
        tokens = self.vision_encoder(pixel_values=vision_x.flatten(0, 2)).last_hidden_state[:, 1:]
        media = self.perceiver(tokens.unflatten(0, vision_x.shape[:3]))
        for layer in self.layers:
            layer.vis_x, layer.media_locations = media, lang_x == self.media_token_id
        return self.lang_encoder(input_ids=lang_x, attention_mask=attention_mask)

    def checkpoint(self):
        """What its training saves: all that is trained, and the language model's embeddings."""
        kept = ("perceiver.", "gated_cross_attn_layer.", "embed", ".wte.")
        state = self.state_dict()
        if "lang_encoder.gpt_neox.embed_in.weight" in state:  # its head had this name then
            state["lang_encoder.embed_out.weight"] = state["lang_encoder.lm_head.weight"]
        names = [name for name in state if any(one in name for one in kept) and not name.startswith("vision_encoder.")]
        return {name: state[name].clone() for name in names}
