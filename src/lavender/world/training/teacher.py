"""Train the world's teacher: a small Stable Diffusion model, stored as an ordinary Stable Diffusion folder.

All classes are the real ones: AutoencoderKL, UNet2DConditionModel with cross-attention at two resolutions, a causal
CLIPTextModel, and a CLIP tokenizer whose byte-pair merges come from captions.

Two choices differ from a plain recipe. Both make a name's own tokens carry the name:

- Captions vary around their nouns (see `lavender.world.language`).
- In training, tokens outside names are often hidden from the UNet: function words, end and padding tokens. They depend
  on every noun before them, because the text encoder is causal. At inference the UNet sees all tokens.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lavender.world.language import Caption, caption_scene
from lavender.world.scenes import SPLITS, Scene
from lavender.world.training.common import (
    Ema,
    TrainingLoop,
    millions,
    scene_batches,
    warmup_stable_decay,
    without_pixels,
)

log = logging.getLogger(__name__)

IMAGE_SIZE = 64  # pixels per side
MAX_TOKENS = 48
VOCABULARY = 480  # so small that the longer names split into several tokens


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Train a CLIP tokenizer on captions. The same captions give the same tokenizer, in every process.

    The trainer numbers the letters that end words in the order of a hash table, which differs from process to process,
    and it breaks ties between pairs by these numbers. So they are numbered before, as "special tokens" of the trainer.
    """
    blank = CLIPTokenizer()
    backend = Tokenizer(BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    backend.normalizer = blank.backend_tokenizer.normalizer
    backend.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    last_letters = {
        word[-1]
        for caption in captions
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption))
    }
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in sorted(last_letters))],
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    learned = json.loads(backend.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for letter in alphabet:  # so that every byte has a token, also at the end of a word
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    merges: list[Any] = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_vae() -> AutoencoderKL:
    """An autoencoder with random weights: 3 × 64 × 64 pixels to 4 × 16 × 16 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet with random weights, which cross-attends at 16 × 16 and 8 × 8 cells."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A causal text encoder with random weights and states of width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            attention_dropout=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def squash(image: Image.Image) -> np.ndarray:
    """The whole picture resized to the teacher's square, float32 (3, 64, 64) from -1 to 1."""
    square = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(square, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def train_vae(work: Path, steps: int, batch: int = 16, seed: int = 0) -> AutoencoderKL:
    """Train the autoencoder with an L1 reconstruction loss and Stable Diffusion's KL weight, 1e-6."""
    torch.manual_seed(seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    loop = TrainingLoop(work / "vae.pt", {"vae": vae}, optimizer, schedule, steps)
    for step in loop.remaining():
        (scenes,) = scene_batches(SPLITS["teacher"][step * batch : (step + 1) * batch], batch)
        pixels = torch.from_numpy(np.stack([squash(scene.image) for scene in scenes]))
        posterior = vae.encode(pixels).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(reconstruction, pixels) + 1e-6 * posterior.kl().mean()
        loop.update(loss, {"vae_l1": loss.item()})
    vae.eval()
    return vae


@torch.no_grad()
def encode_scenes(path: Path, vae: AutoencoderKL, seeds: range) -> tuple[torch.Tensor, list[Scene]]:
    """Unscaled latents (the posterior's mean), (len(seeds), 4, 16, 16), and the scenes without pixels.

    They are saved at `path`, and read from there when a stopped training continues.
    """
    if path.exists():
        saved = torch.load(path, weights_only=False)
        if saved["seeds"] == seeds:
            return saved["latents"], saved["scenes"]
    latents, kept = [], []
    for group in scene_batches(seeds, 64):
        pixels = torch.from_numpy(np.stack([squash(scene.image) for scene in group]))
        latents.append(vae.encode(pixels).latent_dist.mean)
        kept += without_pixels(group)
    saved = {"seeds": seeds, "latents": torch.cat(latents), "scenes": kept}
    torch.save(saved, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
    return saved["latents"], kept


def visible_tokens(
    offsets: list[tuple[int, int]], caption: Caption, length: int, rng: np.random.Generator
) -> np.ndarray:
    """Which tokens the UNet sees in a training step, bool (length,): always the start token and the names' tokens.

    Args:
        offsets: half-open character span of each token; empty for special tokens.
    """
    visible = rng.random(length) < 0.6
    visible[0] = True
    tail = sum(end > start for start, end in offsets) + 1  # index of the end token
    if rng.random() < 0.6:
        visible[tail:] = False
    for position, (start, end) in enumerate(offsets):
        if end > start and any(start < mention.end and end > mention.start for mention in caption.mentions):
            visible[position] = True
    return visible


def sample_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Half of them uniform, half from the middle of the schedule, where the text has most influence."""
    uniform = torch.randint(0, 1000, (count,), generator=generator)
    middle = torch.randint(150, 750, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.5, uniform, middle)


def train_teacher(
    work: Path, out: Path, steps: int, vae_steps: int, num_scenes: int, batch: int = 32, seed: int = 0
) -> Path:
    """Train autoencoder, tokenizer, text encoder and UNet; write a Stable Diffusion folder to `out`.

    Args:
        work: folder of checkpoints and loss curves.
        out: folder of the weights, float32.
        steps, vae_steps: optimizer steps of the UNet with its text encoder, and of the autoencoder.
        num_scenes: training scenes, the first ones of the teacher's split.
        batch: scenes per step.
    """
    work.mkdir(parents=True, exist_ok=True)
    began = time.time()
    vae = train_vae(work, vae_steps, seed=seed)
    seeds = SPLITS["teacher"][:num_scenes]
    latents, scenes = encode_scenes(work / "latents.pt", vae, seeds)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents *= vae.config.scaling_factor
    tokenizer = train_tokenizer([caption_scene(scene).text for scene in scenes[:4000]])
    torch.manual_seed(seed + 1)
    unet, text_encoder, scheduler = build_unet(), build_text_encoder(tokenizer), build_scheduler()
    log.info("UNet %.2f M, text encoder %.2f M parameters", millions(unet), millions(text_encoder))
    modules = {"unet": unet, "text_encoder": text_encoder}
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=6e-4, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_stable_decay(steps))
    ema = Ema(modules, decay=0.998)
    loop = TrainingLoop(work / "teacher.pt", modules, optimizer, schedule, steps, ema)
    unet.to(memory_format=torch.channels_last)
    for step in loop.remaining():
        rng, generator = np.random.default_rng([seed, step]), torch.Generator().manual_seed(seed * 10**6 + step)
        chosen = rng.integers(len(scenes), size=batch)
        captions = [caption_scene(scenes[index], variant=step) for index in chosen]
        texts = ["" if rng.random() < 0.1 else caption.text for caption in captions]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_offsets_mapping=True)
        ids, offsets = torch.tensor(tokens["input_ids"]), tokens["offset_mapping"]
        visible = np.stack(
            [visible_tokens(pairs, caption, MAX_TOKENS, rng) for pairs, caption in zip(offsets, captions, strict=True)]
        )
        noise = torch.randn(latents[chosen].shape, generator=generator)
        timesteps = sample_timesteps(batch, generator)
        noisy = scheduler.add_noise(latents[chosen], noise, timesteps)
        text_states = text_encoder(ids).last_hidden_state
        predicted = unet(noisy, timesteps, text_states, encoder_attention_mask=torch.from_numpy(visible)).sample
        loss = F.mse_loss(predicted, noise)
        loop.update(loss, {"loss": loss.item()})
    with ema.applied():
        save_pipeline(out, vae, unet, text_encoder, tokenizer, scheduler)
    log.info("teacher done in %.0f s", time.time() - began)
    return out


def save_pipeline(out: Path, vae, unet, text_encoder, tokenizer, scheduler) -> None:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` loads.

    What the last call of the tokenizer left in it, padding and truncation, is not written.
    """
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
