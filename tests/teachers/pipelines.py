"""Tiny pipelines of the real classes with random weights, made in the process; and pictures and jobs for them.

A pipeline is built once and shared: a test that changes one takes its own from `fresh`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lavender.data.images import image_id
from lavender.maps import Word
from lavender.teachers.diffusion.teacher import Job
from lavender.words import words_of
from lavender.world import TEACHER_PATH

TEXTS = (
    "a zebra near two umbrellas",
    "the red apple, a dog and a grasshopper on a table",
    "sun",
)
TOKENS = 77
PADDING_TOKENS = 256  # that SD3's pipeline puts where T5 would be
SHARPENED = ("to_q", "to_k", "add_q_proj", "add_k_proj", "to_qkv_mlp_proj")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@cache
def tokenizer() -> CLIPTokenizer:
    """CLIP's with the world's vocabulary, in which longer words have several tokens."""
    return CLIPTokenizer.from_pretrained(TEACHER_PATH / "tokenizer", model_max_length=TOKENS)


def text_encoder(width: int, projected: bool = False) -> Any:
    known = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(known),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
        pad_token_id=known.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(channels: int = 4, **settings: Any) -> AutoencoderKL:
    """One latent for 4 × 4 pixels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        **settings,
    ).eval()


def stable_diffusion() -> StableDiffusionPipeline:
    """As Stable Diffusion 1.x: ε-prediction, PNDM, and a deepest level without attention. Latents 16 × 16."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(24),
        tokenizer=tokenizer(),
        unet=unet.eval(),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_2() -> StableDiffusionPipeline:
    """As Stable Diffusion 2.x: v-prediction, heads of one width at every level, linear projections."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(24),
        tokenizer=tokenizer(),
        unet=unet.eval(),
        scheduler=DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """Two text encoders, no attention at the first level, a deeper level with two layers a block."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24 + 16,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=text_encoder(24),
        text_encoder_2=text_encoder(16, projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **BETAS),
        add_watermarker=False,
    )


def stable_diffusion_3(**settings: Any) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 (3.5 with `qk_norm` and `dual_attention_layers`), without T5."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=12,
        joint_attention_dim=48,
        caption_projection_dim=24,
        pooled_projection_dim=24 + 16,
        pos_embed_max_size=24,
        **settings,
    )
    return StableDiffusion3Pipeline(
        vae=vae(8, shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=text_encoder(24, projected=True),
        text_encoder_2=text_encoder(16, projected=True),
        text_encoder_3=None,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=None,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def stable_diffusion_35() -> StableDiffusion3Pipeline:
    return stable_diffusion_3(qk_norm="rms_norm", dual_attention_layers=(0,))


@cache
def shared(build: Callable[[], Any]) -> Any:
    """The pipeline of a builder, with random weights that are far from flat attention; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        pipeline = build()
        for name, parameter in pipeline.components[_backbone(pipeline)].named_parameters():
            if not name.endswith("weight"):
                continue
            if "norm_" in name:  # of queries and keys: else all ones, and no test of them
                torch.nn.init.uniform_(parameter, 0.5, 3)
            elif name.split(".")[-2] in SHARPENED:
                parameter.data *= 2
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fresh(build: Callable[[], Any]) -> Any:
    """A copy of the shared pipeline, to be changed."""
    pipeline = shared(build)
    parts = {name: copy.deepcopy(one) for name, one in pipeline.components.items()}
    settings = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    if "add_watermarker" in type(pipeline).__init__.__annotations__:
        settings = {"add_watermarker": False}
    return type(pipeline)(**parts, **settings)


def _backbone(pipeline: Any) -> str:
    return "transformer" if "transformer" in pipeline.components else "unet"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Large random patches of colour."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(patches.numpy()).resize((width, height), Image.Resampling.NEAREST)


def job(image: Image.Image, text: str, words: tuple[Word, ...] | None = None) -> Job:
    return Job(image, image_id(image), text, words_of(text) if words is None else words)


def jobs() -> list[Job]:
    """Three pictures of different shapes; one of them has two texts."""
    pictures = [picture(64, 64, 1), picture(150, 70, 2), picture(60, 110, 3)]
    return [*(job(*one) for one in zip(pictures, TEXTS, strict=True)), job(pictures[1], TEXTS[0])]
