"""How much memory a run needs, roughly, from a model's shapes alone. An estimate, with what it assumes.

Bytes; one sample a step. Frozen weights are in bfloat16, as published checkpoints are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lavender.alignment.aligner import Aligner
from lavender.config import AlignmentConfig
from lavender.students.base import VlmAdapter
from lavender.training.run_config import LoraSettings

NUM_WORDS, TOKENS_A_WORD, GRID = 16, 2, 32
TEXT_TOKENS, ASSUMED_KEYS = 256, 1024
HALF, SINGLE = 2, 4  # bytes of a number
FOUR_BITS = 0.5 + 1 / 64  # of a packed one, with a byte for each 64 of them
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""TRL's loss computes logits in tiles of this size, and the gradient of the output layer in float32."""


def footprint(model: nn.Module, adapter: VlmAdapter, keys: int | None, tokens: int | None) -> dict[str, Any]:
    """Bytes by part of full tuning, of the same with weights of 16 bits, of LoRA and of QLoRA; and what they assume.

    `learn` is what `pooling="learn"` needs in addition.

    Args:
        model: the model's modules; no weights are looked at.
        keys: image keys of a picture, as a sample has shown; None assumes the family's number.
        tokens: the length of that sample.
    """
    keys_in_config = adapter.keys_per_image()
    source = "in the sample" if keys is not None else "from the config" if keys_in_config else "assumed"
    keys = keys or keys_in_config or ASSUMED_KEYS
    tokens = tokens or TEXT_TOKENS + (0 if adapter.cross_attends else keys)
    parameters = sum(one.numel() for one in model.parameters())
    lora, num_lora = LoraSettings(), _lora_parameters(model)
    text = adapter.config.get_text_config()
    alignment = {"alignment: attention rows": _rows(adapter, keys), "alignment: maps, Aligner": _maps(adapter)}
    output = SINGLE * text.vocab_size * text.hidden_size

    def tuned(weights: int, number: int, stored: int, activations: int) -> dict[str, int]:
        return {
            "weights": weights,
            "gradients": stored * number,
            "optimiser": 2 * stored * number,
            "activations": activations,
            **alignment,
        }

    half, packed = _activations(text, tokens, HALF), _packed_parameters(model)
    quantized = round(FOUR_BITS * packed) + HALF * (parameters - packed + num_lora)
    return {
        "full": tuned(SINGLE * parameters, parameters, SINGLE, _activations(text, tokens, SINGLE) + output),
        "full_16_bit": tuned(HALF * parameters, parameters, HALF, half + output),
        "lora": tuned(HALF * parameters + SINGLE * num_lora, num_lora, SINGLE, half),
        "qlora": tuned(quantized, num_lora, HALF, half),
        "learn": 4 * SINGLE * _parallel_parameters(model, adapter),
        "lora_parameters": num_lora,
        "assumptions": [
            f"one sample of {tokens} tokens a step, one picture of {keys} image keys ({source})",
            "full tuning: weights, gradients and AdamW's two states in float32, computing in bfloat16 (dtype: float32, "
            "bf16: true); of 16 bits: all in bfloat16, where small steps are rounded away; no sharding",
            f"LoRA of rank {lora.r} on {', '.join(lora.target_modules)}, in float32: {num_lora:,} parameters; all else "
            "in bfloat16",
            "QLoRA: linear layers but the output layer in 4 bits, quantised twice; LoRA in bfloat16, as TRL has it",
            "gradient checkpointing, TRL's default; TRL's loss, which makes logits in tiles; the vision tower's "
            "activations are not counted",
            f"{NUM_WORDS} words of {TOKENS_A_WORD} tokens: rows × image keys × heads × layers × 4 bytes, and maps of "
            f"{GRID} × {GRID} through the default Aligner on each usable layer (fewer layers: `layers`)",
        ],
    }


def _lora_parameters(model: nn.Module) -> int:
    settings = LoraSettings()
    return sum(
        settings.r * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in settings.target_modules
    )


def _packed_parameters(model: Any) -> int:
    """Weights that bitsandbytes packs: of linear layers but the output layer."""
    head = model.get_output_embeddings()
    return sum(one.weight.numel() for one in model.modules() if isinstance(one, nn.Linear) and one is not head)


def _parallel_parameters(model: Any, adapter: VlmAdapter) -> int:
    modules = [adapter.attention_module(model, layer) for layer in adapter.usable_layers()]
    return sum(
        one.numel() for module in modules for part in (module.q_proj, module.k_proj) for one in part.parameters()
    )


def _activations(text: Any, tokens: int, stored: int) -> int:
    """Each layer's input, of the weights' type; one layer's own tensors, computed again; a tile of logits."""
    inputs = stored * tokens * text.hidden_size * text.num_hidden_layers
    one_layer = HALF * tokens * (8 * text.hidden_size + 4 * text.intermediate_size)
    return inputs + one_layer + HALF * min(tokens, TILE_TOKENS) * min(text.vocab_size, TILE_VOCABULARY)


def _rows(adapter: VlmAdapter, keys: int) -> int:
    return SINGLE * NUM_WORDS * TOKENS_A_WORD * keys * adapter.num_heads() * len(adapter.usable_layers())


def _maps(adapter: VlmAdapter) -> int:
    """Each layer's maps, one channel a head; what the Aligner keeps of each of its layers; and its parameters."""
    heads = adapter.num_heads()
    aligner = Aligner(heads, AlignmentConfig().aligner_width)
    channels = sum(module.out_channels for module in aligner if isinstance(module, nn.Conv2d))
    kept = heads + 3 * channels  # of each layer its convolution, its norm, its activation
    maps = SINGLE * NUM_WORDS * GRID**2 * len(adapter.usable_layers()) * kept
    return maps + 4 * SINGLE * sum(one.numel() for one in aligner.parameters())
