"""Train a teacher with joint attention for the world: a small Stable Diffusion 3, stored as an ordinary folder of one.

It has the shipped teacher's autoencoder, and the tokenizer and the hiding of tokens of
`lavender.world.training.teacher`. The text encoders, two small CLIPs, and the MM-DiT are trained together on the flow
from noise to picture. It is not shipped.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from lavender.world import WEIGHTS_PATH
from lavender.world.language import caption_scene
from lavender.world.scenes import SPLITS
from lavender.world.training.common import Ema, TrainingLoop, millions, warmup_stable_decay
from lavender.world.training.teacher import (
    IMAGE_SIZE,
    MAX_TOKENS,
    encode_scenes,
    train_tokenizer,
    visible_tokens,
)

log = logging.getLogger(__name__)

WIDTHS = (96, 32)
"""Widths of the two text encoders."""
T5_KEYS = 256
"""Keys of zeros in place of T5's, as the pipeline adds them."""


class LastKeyRepeats(TorchFunctionMode):
    """Inside this context, attention takes the last key and value as if they were there `times` times.

    The keys in T5's place are alike in every layer, because text has no positions in an MM-DiT. One of them with this
    weight gives the same outputs and gradients as all of them, for a third of the keys.
    """

    def __init__(self, times: int):
        super().__init__()
        self._bias = math.log(times)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[0], args[1]
            bias = query.new_zeros(1, 1, 1, key.shape[-2])
            bias[..., -1] = self._bias
            return func(*args, **{**kwargs, "attn_mask": bias})
        return func(*args, **(kwargs or {}))


def build_transformer(num_layers: int = 6) -> SD3Transformer2DModel:
    """An MM-DiT with random weights on 8 × 8 cells, each of 2 × 2 latents."""
    return SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        num_attention_heads=4,
        attention_head_dim=24,
        joint_attention_dim=sum(WIDTHS),
        caption_projection_dim=96,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    """A causal text encoder with random weights. The pipeline reads the states before its last layer."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(encoders: nn.ModuleList, ids: Tensor, visible: Tensor, t5_keys: int = T5_KEYS) -> tuple[Tensor, Tensor]:
    """Text states (row, key, width) and one vector per text, as the pipeline makes them.

    Args:
        ids: (row, token).
        visible: (row, token), what is not hidden. A hidden token's state is zero, like the keys in T5's place.
        t5_keys: the number of these; 1 for `LastKeyRepeats`.
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1) * visible[..., None]
    return F.pad(states, (0, 0, 0, t5_keys)), torch.cat([output.text_embeds for output in outputs], dim=-1)


def flow_loss(
    transformer: nn.Module, clean: Tensor, noise: Tensor, sigmas: Tensor, texts: tuple[Tensor, Tensor]
) -> Tensor:
    """The mean squared error of the predicted direction from picture to noise.

    Args:
        clean, noise: latents (row, channel, height, width).
        sigmas: (row,), the share of noise.
        texts: as `encode` returns them.
    """
    share = sigmas[:, None, None, None]
    noisy = (1 - share) * clean + share * noise
    return F.mse_loss(transformer(noisy, texts[0], texts[1], 1000 * sigmas).sample, noise - clean)


def train_joint_teacher(
    work: Path,
    out: Path,
    steps: int,
    num_scenes: int,
    batch: int = 32,
    num_layers: int = 6,
    seed: int = 0,
) -> Path:
    """Train the MM-DiT with its text encoders; write a Stable Diffusion 3 folder to `out`.

    Args:
        work: folder of checkpoints and the loss curve.
        out: folder of the weights, float32.
        steps: optimizer steps.
        num_scenes: training scenes, the first ones of the teacher's split.
        batch: scenes per step.
        num_layers: blocks of the MM-DiT.
    """
    work.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(WEIGHTS_PATH / "teacher", subfolder="vae", torch_dtype=torch.float32).eval()
    latents, scenes = encode_scenes(work / "joint_latents.pt", vae, SPLITS["teacher"][:num_scenes])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5), shift_factor=0.0)
    latents *= vae.config.scaling_factor
    tokenizer = train_tokenizer([caption_scene(scene).text for scene in scenes[:4000]])
    torch.manual_seed(seed + 1)
    transformer = build_transformer(num_layers)
    encoders = nn.ModuleList([build_text_encoder(tokenizer, width) for width in WIDTHS])
    log.info("MM-DiT %.2f M, text encoders %.2f M parameters", millions(transformer), millions(encoders))
    modules: dict[str, nn.Module] = {"transformer": transformer, "encoders": encoders}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=6e-4, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_stable_decay(steps))
    ema = Ema(modules, decay=0.998)
    loop = TrainingLoop(work / "joint_teacher.pt", modules, optimizer, schedule, steps, ema)
    for step in loop.remaining():
        rng, generator = np.random.default_rng([seed, step]), torch.Generator().manual_seed(seed * 10**6 + step)
        chosen = rng.integers(len(scenes), size=batch)
        captions = [caption_scene(scenes[index], variant=step) for index in chosen]
        texts = ["" if rng.random() < 0.1 else caption.text for caption in captions]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_offsets_mapping=True)
        pairs = zip(tokens["offset_mapping"], captions, strict=True)
        visible = np.stack([visible_tokens(offsets, caption, MAX_TOKENS, rng) for offsets, caption in pairs])
        states, pooled = encode(encoders, torch.tensor(tokens["input_ids"]), torch.from_numpy(visible), t5_keys=1)
        # the vector of the whole text makes the tokens needless: leave it out in half of the rows
        pooled = pooled * torch.from_numpy(rng.random((batch, 1)) < 0.5)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        sigmas = torch.randn(batch, generator=generator).sigmoid()
        with LastKeyRepeats(T5_KEYS):
            loss = flow_loss(transformer, latents[chosen], noise, sigmas, (states, pooled))
        loop.update(loss, {"loss": loss.item()})
    with ema.applied():
        save_pipeline(out, vae, transformer, encoders, tokenizer)
    return out


def save_pipeline(out: Path, vae: Any, transformer: Any, encoders: nn.ModuleList, tokenizer: Any) -> None:
    """Write a folder that `StableDiffusion3Pipeline.from_pretrained` loads, without T5."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    first, second = encoders
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=first.eval(),
        tokenizer=tokenizer,
        text_encoder_2=second.eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
