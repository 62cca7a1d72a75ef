"""Tiny pipelines with transformers as backbones: see `teachers.pipelines`."""

from __future__ import annotations

from functools import cache
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import processors
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from teachers.pipelines import TOKENS, stable_diffusion_3, text_encoder, tokenizer, vae

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'-/()[]{}<>|*\""
WORDS = ("a", "the", "and", "on", "near", "two", "red", "dog", "apple", "table", "house", "ze", "grass", "umbrella")


@cache
def t5_tokenizer() -> T5Tokenizer:
    """T5's kind: no start token, an end token, pieces of words. "zebra" is ▁ze·bra, "grasshopper" ▁grass·hopper."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *((one, -8.0) for one in LETTERS)]
    pieces += [*(("▁" + word, -2.0) for word in WORDS), ("bra", -3.0), ("hopper", -3.0)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def t5_encoder(width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def flux(guidance: bool = True) -> FluxPipeline:
    """Flux 1: two double-stream and two single-stream blocks."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=24,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(4, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=text_encoder(24),
        tokenizer=tokenizer(),
        text_encoder_2=t5_encoder(20),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer.eval(),
    )


def flux_schnell() -> Any:
    return flux(guidance=False)


def stable_diffusion_3_t5() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 with T5, whose states have the width of the joint attention."""
    parts = dict(stable_diffusion_3(qk_norm="rms_norm").components)
    parts |= {"text_encoder_3": t5_encoder(48), "tokenizer_3": t5_tokenizer()}
    return StableDiffusion3Pipeline(**parts)


def pixart_sigma() -> PixArtSigmaPipeline:
    """Two blocks with self- and cross-attention; half of its output is the learned variance."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=16,
        caption_channels=20,
        use_additional_conditions=False,
        interpolation_scale=1,
    )
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(20),
        vae=vae(4),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


@cache
def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's kind: a start token, spaces as ▁ before words, bytes for unknown characters."""
    known = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    known += ["\n", "▁", *LETTERS]
    merges: Any = [*(("▁", letter) for letter in LETTERS), ("r", "e"), ("b", "r"), ("br", "a")]
    known += [first + second for first, second in merges]
    made: Any = GemmaTokenizer(vocab={piece: index for index, piece in enumerate(known)}, merges=merges)
    start = [("<bos>", made.bos_token_id)]
    made._tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", start)
    return made


def sana() -> SanaPipeline:
    """Two blocks of linear self-attention and cross-attention."""
    encoder = Gemma2Config(
        vocab_size=len(gemma_tokenizer()),
        hidden_size=20,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=20,
        sample_size=16,
    )
    for block in transformer.transformer_blocks:  # else attention is nearly flat
        block.attn2.to_q.weight.data *= 4
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41407,
    )
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=Gemma2Model(encoder).eval(),
        vae=autoencoder.eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    )


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


@cache
def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's kind: byte-level pieces, no start token, and a chat template like Qwen3's."""
    pieces = [chr(code) for code in range(33, 127)]
    pieces += [chr(code) for code in (*range(161, 173), *range(174, 324))]  # GPT-2's signs for the other bytes
    merges: Any = [*(("Ġ", letter) for letter in LETTERS), ("r", "e"), ("b", "r"), ("br", "a")]
    pieces += [first + second for first, second in merges]
    made = Qwen2Tokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.pad_token, made.chat_template = "<|endoftext|>", CHAT
    return made


def flux_2_klein() -> Flux2KleinPipeline:
    """Flux 2 Klein: one double-stream block, one single-stream block, and the text encoder's layers 9, 18 and 27."""
    encoder = Qwen3Config(
        vocab_size=len(qwen_tokenizer()),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    autoencoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    autoencoder.bn.running_mean.normal_(0, 0.1)
    autoencoder.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder.eval(),
        text_encoder=Qwen3ForCausalLM(encoder).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer.eval(),
    )


def qwen_image() -> QwenImagePipeline:
    """Qwen-Image: two joint blocks, and an autoencoder of videos with two levels."""
    encoder = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(qwen_tokenizer()),
            "hidden_size": 20,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 20},
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 4, 4),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.1, 0.5, -0.3],
        latents_std=[2.8, 1.4, 2.3, 1.1],
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer.eval(),
    )
