"""Parts of the tests of families whose images are grids of cells (`lavender.students.families.patch_grid`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from families.geometry import parameters_zeroed, picture

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROLES: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}{%- generation %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- 'IMAGE' }}{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def template(image: str) -> str:
    """A chat template that prints `image` for an image."""
    return TEMPLATE.replace("IMAGE", image)


def text_settings(tokenizer, **settings: Any) -> dict[str, Any]:
    """A text model of three layers."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | settings


def vision_settings(**settings: Any) -> dict[str, Any]:
    """A vision tower of two layers."""
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    } | settings


def maker(
    kind: type[PreTrainedModel], config: PreTrainedConfig, tokenizer, norms: tuple[float, float] = (0.5, 1.5)
) -> Callable[[], PreTrainedModel]:
    """What makes the tiny model, the same weights each time, none of which is as unimportant as a new one may be.

    Args:
        kind, config: its class and its config.
        tokenizer: whose tokens end its answers.
        norms: the least and the most weight of what normalises queries and keys.
    """

    def make() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = kind(copy.deepcopy(config)).eval()
            for name, parameter in model.named_parameters():
                if name.endswith(("q_proj.bias", "k_proj.bias")):
                    nn.init.normal_(parameter)  # real ones are large, new ones zero
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    nn.init.uniform_(parameter, *norms)  # new ones are all 1
        assert model.generation_config is not None
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    return make


def states_at_keys(
    silenced: Callable[[Any], Iterable[nn.Module]],
) -> Callable[[PreTrainedModel, Mapping[str, Tensor]], Tensor]:
    """`Family.local_states`: what the first text layer attends to, if patches do not exchange.

    Args:
        silenced: the output projections of the attention layers of a model's vision tower.
    """

    @torch.no_grad()
    def local_states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        model = copy.deepcopy(model)
        for module in silenced(model):
            parameters_zeroed(module)
        seen: list[Tensor] = []
        layers = model.get_decoder().layers
        first = next(layer.self_attn for layer in layers if hasattr(layer, "self_attn"))
        first.k_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**inputs)
        is_key = inputs["input_ids"] == model.config.image_token_id
        return torch.stack([states[mask] for states, mask in zip(seen[0], is_key, strict=True)])

    return local_states


def square_patches(processor: Any, cell: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """`Family.patches` of squares: of views in order, of a view's cells of `cell` pixels row by row."""

    def patches(inputs: Mapping[str, Tensor]) -> Tensor:
        images = processor.image_processor
        pixels = inputs["pixel_values"].flatten(0, -4).permute(0, 2, 3, 1) * torch.tensor(images.image_std)
        pixels = (pixels + torch.tensor(images.image_mean)).unflatten(2, (-1, cell)).unflatten(1, (-1, cell))
        return pixels.transpose(2, 3).reshape(-1, cell**2, 3)

    return patches


def bicubic_blur(size: tuple[int, int]) -> tuple[float, float]:
    """Of the bicubic filter at the image's border: less than 0.03 of a pixel, old or new."""
    return 0.03 / size[0], 0.03 / size[1]


def several(
    processor: ProcessorMixin, token: str, images: list[list[tuple[int, int]]], **kwargs: Any
) -> dict[str, Tensor]:
    """A batch with as many images per sample as there are sizes."""
    texts = ["<|im_start|>user\n" + f"{token}\n" * len(own) + "what is it?<|im_end|>\n" for own in images]
    pictures = [[picture(size, seed) for seed, size in enumerate(own)] for own in images]
    made = processor(
        images=pictures,
        text=texts,
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
        **kwargs,
    )
    return dict(made)
