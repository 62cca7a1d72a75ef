"""Parts of `extraction_speed.py`: teachers of real sizes with random weights, and the forwards that are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lavender.config import ExtractionConfig
from lavender.teachers.diffusion.aggregate import Aggregate
from lavender.teachers.diffusion.base import Layer
from lavender.teachers.diffusion.capture import WordCapture, capture_words
from lavender.teachers.diffusion.teacher import Teacher
from lavender.teachers.diffusion.text_windows import indicator, window_of
from lavender.teachers.diffusion.views import WHOLE
from lavender.words import content_words
from lavender.world import TEACHER_PATH
from lavender.world.training.teacher import build_scheduler

TEXT = "a small brown dog runs beside a red bicycle in front of an old house"
SIDES = {"sd1": 512, "sdxl": 1024, "sd3": 1024}


def build(name: str, side: int, device: str = "cpu") -> Any:
    """A pipeline of the real configuration with random weights; SD3 without T5.

    Args:
        name: a key of `SIDES`.
        side: of the square picture, in pixels.
    """
    tokenizer = CLIPTokenizer.from_pretrained(TEACHER_PATH / "tokenizer", model_max_length=77)
    with torch.device(device):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16 if name == "sd3" else 4,
            sample_size=side,
        ).eval()
        backbone = {"sd1": _sd1, "sdxl": _sdxl, "sd3": _sd3}[name](side // 8).eval()
        small, large = _text_config(tokenizer, 768, 12, "quick_gelu"), _text_config(tokenizer, 1280, 32, "gelu")
        first = CLIPTextModelWithProjection if name == "sd3" else CLIPTextModel
        encoder = first(small).eval()
        second = CLIPTextModelWithProjection(large).eval() if name != "sd1" else None
    if name == "sd3":
        return StableDiffusion3Pipeline(
            backbone,
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae,
            encoder,
            tokenizer,
            second,
            tokenizer,
            None,
            None,
        )
    if name == "sdxl":
        return StableDiffusionXLPipeline(
            vae, encoder, second, tokenizer, tokenizer, backbone, build_scheduler(), add_watermarker=False
        )
    return StableDiffusionPipeline(
        vae, encoder, tokenizer, backbone, build_scheduler(), None, None, requires_safety_checker=False
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _sd1(latents: int) -> torch.nn.Module:
    return UNet2DConditionModel(sample_size=latents, cross_attention_dim=768, attention_head_dim=8)


def _sdxl(latents: int) -> torch.nn.Module:
    return UNet2DConditionModel(
        sample_size=latents,
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _sd3(latents: int) -> torch.nn.Module:
    return SD3Transformer2DModel(
        sample_size=latents,
        num_layers=24,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )


@dataclass
class Forward:
    """One forward of the backbone on `rows` random latents, in the ways that are compared."""

    teacher: Teacher
    rows: int

    def __post_init__(self) -> None:
        family, self.config = self.teacher.family, self.teacher.config
        self.family = family
        self.image_size = (family.side, family.side)
        self.size = family.latent_size(self.image_size)
        self.backbone: Any = family.backbone
        channels = self.backbone.config.in_channels
        self.latents = torch.randn(self.rows, channels, *self.size, device=family.device, dtype=family.dtype)
        self.timesteps = torch.full((self.rows,), self.config.timesteps[0], device=family.device)
        with torch.no_grad():
            self.condition = family.encode_texts([TEXT] * self.rows)
        words = content_words(TEXT, self.config.parts_of_speech)
        window, lost = window_of(family.token_offsets, 0, TEXT, 0, words, self.config.carrier)
        assert not lost
        values, self.counts = indicator([window] * self.rows, family.word_keys)
        self.values = values.to(family.device)
        self.layers = self.teacher.layers(self.image_size)

    def bare(self) -> Tensor:
        """The forward without any capture."""
        return self.family.predict(self.latents, self.timesteps, self.condition, self.image_size)

    def captured(self, stop: bool = False) -> Tensor | None:
        """The forward with `Teacher`'s capture. With `stop` it ends after the last captured layer, without output."""
        output, _ = self.maps(self.config, stop)
        return output

    def maps(self, config: ExtractionConfig, stop: bool = False) -> tuple[Tensor | None, Tensor]:
        """The output and the words' maps, (row, word, rows, cols), by the same steps as `Teacher`."""
        counts = self.counts.to(self.family.device)
        aggregate = Aggregate(config, self.teacher.weights, [WHOLE] * self.rows, counts)
        keys = self.condition["states"].shape[1]
        output = None
        with capture_words(WordCapture(self.layers, self.values, keys, aggregate.add), stop):
            output = self.bare()
        maps = aggregate.maps()
        aggregate.agreement(maps)
        return output, maps

    def materialised(self, self_attention: bool = False) -> Tensor:
        """The forward of the reference, `Materialise`."""
        return self.materialise(self_attention)[0]

    def materialise(self, self_attention: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and the maps that the reference keeps: layer → (row, head, token, rows, cols)."""
        kept: dict[str, Tensor] = {}
        layers: list[tuple[Any, bool]] = [(layer, True) for layer in self.family.layers(self.size)]
        if self_attention:
            layers += [(layer, False) for layer in self.family.self_attention(self.size)]
        before = self.backbone.attn_processors
        for layer, is_cross in layers:
            layer.module.set_processor(Materialise(layer, self.size if is_cross else None, kept))
        try:
            return self.bare(), kept
        finally:
            self.backbone.set_attn_processor(before)


class Materialise:
    """The reference: an attention processor that computes the softmax explicitly and keeps all of it. UNets only.

    As in DAAM, the maps of every cross-attention layer, head and token (padding included) are enlarged to the latents'
    size. As in prompt-to-prompt, self-attention of layers up to 32 × 32 cells is kept as well.

    Args:
        layer: the layer to record.
        size: (rows, cols) to enlarge the maps to; None keeps their size.
        kept: layer name → maps, which is filled.
    """

    def __init__(self, layer: Layer, size: tuple[int, int] | None, kept: dict[str, Tensor]):
        self.layer, self.size, self.kept = layer, size, kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(project(states))
            for project, states in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        weights_ACT = attn.get_attention_scores(query, key, attention_mask)
        rows, cols = self.layer.grid
        if self.size is not None or rows * cols <= 32**2:
            maps = weights_ACT.transpose(1, 2).unflatten(-1, self.layer.grid)
            if self.size is not None:
                maps = F.interpolate(maps, size=self.size, mode="bilinear", align_corners=False)
            self.kept[self.layer.name] = maps.unflatten(0, (len(hidden_states), -1))
        return attn.to_out[0](attn.batch_to_head_dim(weights_ACT @ value))


def check_same_maps(forward: Forward) -> float:
    """Largest absolute difference between the captured maps and the same maps computed from the reference's."""
    config = replace(forward.config, grid=forward.size)  # the grid on which the reference's layers are averaged
    _, maps = forward.maps(config)
    _, kept = forward.materialise()
    mean_map = torch.stack([kept[layer.name].float().mean(dim=1) for layer in forward.layers]).mean(dim=0)
    expected = torch.einsum("btrc,btw->bwrc", mean_map, forward.values)[:, :-1]
    difference = (maps - expected).abs().max().item()
    if forward.family.dtype == torch.float32:
        assert difference < 1e-5, f"the captured maps differ by {difference} from those of the explicit softmax"
    return difference
