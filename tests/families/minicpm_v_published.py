"""MiniCPM-Llama3-V-2.5's structure as its checkpoint publishes it, re-created for tests: names, forward, slices."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, Idefics2VisionConfig, LlamaConfig, LlamaForCausalLM, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel


class MiniCPMVConfig(LlamaConfig):
    model_type = "minicpmv"

    def __init__(
        self,
        query_num=96,
        batch_vision_input=True,
        vision_config=None,
        image_token_id=128002,
        heads=4,
        version="2.5",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.heads_for_tests = heads  # the published: a head for each 128 numbers
        self.version = version
        self.query_num, self.batch_vision_input, self.image_token_id = query_num, batch_vision_input, image_token_id
        self.vision_config = Idefics2VisionConfig(**(vision_config or {}))


def sincos(width: int, rows: int, cols: int) -> torch.Tensor:
    """(row, col, width): sines and cosines of the column in the first half, of the row in the second."""
    rates = 1 / 10_000 ** (torch.arange(width // 4, device="cpu") / (width / 4))  # the published: numpy
    col, row = (torch.arange(n, device="cpu")[:, None] * rates for n in (cols, rows))
    of_col, of_row = (torch.cat([one.sin(), one.cos()], dim=1) for one in (col, row))
    return torch.cat([of_col[None].expand(rows, -1, -1), of_row[:, None].expand(-1, cols, -1)], dim=2)


class Resampler(nn.Module):
    def __init__(self, num_queries: int, embed_dim: int, num_heads: int, kv_dim: int, max_size=(70, 70)):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.query = nn.Parameter(torch.randn(num_queries, embed_dim))
        self.kv_proj = nn.Linear(kv_dim, embed_dim, bias=False)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads)
        self.ln_q, self.ln_kv, self.ln_post = norm(embed_dim), norm(embed_dim), norm(embed_dim)
        self.proj = nn.Parameter(embed_dim**-0.5 * torch.randn(embed_dim, embed_dim))
        self.max_size, self.embed_dim = max_size, embed_dim
        self._set_2d_pos_cache(max_size)

    def _set_2d_pos_cache(self, max_size, device: Any = "cpu"):
        self.pos_embed: Any
        self.register_buffer("pos_embed", sincos(self.embed_dim, *max_size).to(device), persistent=False)

    def forward(self, x, tgt_sizes: Any = None):
        lengths = tgt_sizes[:, 0] * tgt_sizes[:, 1]
        mask = torch.arange(int(lengths.max())) >= lengths[:, None]
        places = pad_sequence([self.pos_embed[:h, :w].reshape(h * w, -1) for h, w in tgt_sizes.tolist()])
        x = self.ln_kv(self.kv_proj(x)).permute(1, 0, 2)
        query = self.ln_q(self.query)[:, None].expand(-1, x.shape[1], -1)
        out, weights = self.attn(query, x + places.to(x.dtype), x, key_padding_mask=mask)
        self.weights_for_tests = weights  # (slice, latent, patch), mean over heads
        return self.ln_post(out.permute(1, 0, 2)) @ self.proj


class MiniCPMV(LlamaPreTrainedModel):
    config_class = MiniCPMVConfig
    every_patch_is_seen = True  # the published slip: the mask's axis of length 1 is indexed, so padding counts

    def __init__(self, config):
        super().__init__(config)
        self.llm: Any = LlamaForCausalLM(config)
        self.vpm = Idefics2VisionTransformer(config.vision_config)
        self.resampler = Resampler(
            config.query_num, config.hidden_size, config.heads_for_tests, config.vision_config.hidden_size
        )

    def get_decoder(self):
        return self.llm

    def get_output_embeddings(self):
        return self.llm.lm_head

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def get_vllm_embedding(self, data):
        strips = [one.flatten(end_dim=1).permute(1, 0) for own in data["pixel_values"] for one in own]
        embedding = self.llm.model.embed_tokens(data["input_ids"])
        if not strips:
            return embedding, []
        sizes = torch.vstack(list(data["tgt_sizes"])).int()
        pixels = pad_sequence(strips, batch_first=True)
        pixels = pixels.permute(0, 2, 1).reshape(len(strips), 3, -1, pixels.shape[1])
        mask = torch.zeros(len(strips), 1, int((sizes[:, 0] * sizes[:, 1]).max()), dtype=torch.bool)
        for index, (h, w) in enumerate(sizes.tolist()):
            mask[index, 0, slice(None) if self.every_patch_is_seen else slice(h * w)] = True
        seen = self.vpm(pixels.type(embedding.dtype), patch_attention_mask=mask).last_hidden_state
        latents = self.resampler(seen, sizes)
        start = 0
        for sample, own in enumerate(data["pixel_values"]):
            if len(own):
                places = torch.cat([torch.arange(a, b) for a, b in data["image_bound"][sample].tolist()])
                states = latents[start : start + len(own)].flatten(0, 1)
                embedding[sample].scatter_(0, places[:, None].repeat(1, embedding.shape[-1]), states)
            start += len(own)
        return embedding, latents

    def forward(self, data, **kwargs):
        states, _ = self.get_vllm_embedding(data)
        return self.llm(input_ids=None, position_ids=data["position_ids"].long(), inputs_embeds=states, **kwargs)

    def generate(self, model_inputs, **kwargs):
        return self.llm.generate(inputs_embeds=self.get_vllm_embedding(model_inputs)[0], **kwargs)


class MiniCPMVImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, max_slice_nums=9, scale_resolution=448, patch_size=14, image_feature_size=96, **kwargs):
        super().__init__(**kwargs)
        self.max_slice_nums, self.scale_resolution, self.patch_size = max_slice_nums, scale_resolution, patch_size
        self.image_feature_size, self.slice_mode = image_feature_size, True
        self.im_start_token, self.im_end_token, self.unk_token = "<image>", "</image>", "<unk>"
        self.slice_start_token, self.slice_end_token = "<slice>", "</slice>"

    def __call__(self, images, **kwargs: Any):  # ty: ignore[incompatible-method-override]
        pixels, sizes = [], []
        for image in images:
            for part in self.slice_image(image)[0]:
                array = torch.from_numpy(np.array(part.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
                rows, cols = (side // self.patch_size for side in array.shape[1:])
                patches = array.unflatten(2, (cols, -1)).unflatten(1, (rows, -1)).permute(0, 2, 1, 3, 4)
                pixels.append(patches.flatten(2))  # (3, patch, rows · cols · patch), patch after patch
                sizes.append([rows, cols])
        return BatchFeature(
            {
                "pixel_values": [pixels],
                "image_sizes": [[one.size for one in images]],
                "tgt_sizes": [np.array(sizes)],
            }
        )

    def slice_image(self, image):
        """The source image and its patches, as PIL images, and the grid (columns, rows)."""
        width, height = image.size
        grid = self.get_sliced_grid(image.size)
        if grid is None:
            return [image.resize(self.find_best_resize(image.size, True), Image.Resampling.BICUBIC)], None
        source = image.resize(self.find_best_resize(image.size, False), Image.Resampling.BICUBIC)
        refined = (self.ensure_divide(width, grid[0]) / grid[0], self.ensure_divide(height, grid[1]) / grid[1])
        part = self.find_best_resize(refined, True)
        large = image.resize((part[0] * grid[0], part[1] * grid[1]), Image.Resampling.BICUBIC)
        crops = [
            large.crop((x, y, x + part[0], y + part[1]))
            for y in range(0, large.height, part[1])
            for x in range(0, large.width, part[0])
        ]
        return [source, *crops], grid

    def find_best_resize(self, size, allow_upscale):
        width, height = size
        if width * height > self.scale_resolution * self.scale_resolution or allow_upscale:
            ratio = width / height
            height = int(self.scale_resolution / math.sqrt(ratio))
            width = int(height * ratio)
        return self.ensure_divide(width, self.patch_size), self.ensure_divide(height, self.patch_size)

    def ensure_divide(self, length, unit):
        return max(round(length / unit) * unit, unit)

    def get_sliced_grid(self, size):
        multiple = min(math.ceil(size[0] * size[1] / self.scale_resolution**2), self.max_slice_nums)
        if multiple <= 1:
            return None
        best, least = (1, 1), math.inf
        for number in (multiple - 1, multiple, multiple + 1):
            if number == 1 or number > self.max_slice_nums:
                continue
            for across in range(1, number + 1):
                error = abs(math.log(size[0] / size[1]) - math.log(across / (number // across)))
                if number % across == 0 and error < least:
                    best, least = (across, number // across), error
        return best

    def get_slice_image_placeholder(self, size):
        one = f"<image>{'<unk>' * self.image_feature_size}</image>"
        grid = self.get_sliced_grid(size)
        return one if grid is None else f"{one}<slice>" + "\n".join([one * grid[0]] * grid[1]) + "</slice>"


class MiniCPMVProcessor(ProcessorMixin):
    """One text at a time, without an attention mask; lavender takes its parts alone."""

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer)


def save_as_published(folder, model, processor) -> None:
    """The checkpoint's folder: weights, and this file as the code that comes with it."""
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    code = Path(__file__)
    shutil.copy(code, folder)
    names = {
        "config.json": {
            "AutoConfig": MiniCPMVConfig,
            "AutoModel": MiniCPMV,
            "AutoModelForCausalLM": MiniCPMV,
        },
        "preprocessor_config.json": {"AutoProcessor": MiniCPMVProcessor, "AutoImageProcessor": MiniCPMVImageProcessor},
    }
    for file, classes in names.items():
        settings = json.loads((folder / file).read_text())
        settings["auto_map"] = {name: f"{code.stem}.{one.__name__}" for name, one in classes.items()}
        (folder / file).write_text(json.dumps(settings))
