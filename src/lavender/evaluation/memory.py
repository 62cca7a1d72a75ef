"""Estimate how much memory a run needs, from the shapes of a model alone, and state the assumptions.

In bytes, for one sample per step. Frozen weights are in bfloat16, as in published checkpoints.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lavender.alignment.aligner import Aligner
from lavender.config import AlignmentConfig
from lavender.students.base import VlmAdapter
from lavender.training.run_config import LoraSettings, RunConfig

NUM_WORDS, TOKENS_PER_WORD, GRID = 16, 2, 32
TEXT_TOKENS, ASSUMED_KEYS = 256, 1024
HALF, SINGLE = 2, 4  # bytes per number
FOUR_BITS = 0.5 + 1 / 64  # bytes per packed number: 4 bits, and one byte of scale per 64 numbers
DIRECT = "alignment: default loss"
_PER_SAMPLE = ("activations", DIRECT)
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""TRL's loss computes logits in tiles of this size. It computes the output layer's gradient in float32."""


def footprint(model: nn.Module, adapter: VlmAdapter, keys: int | None, tokens: int | None) -> dict[str, Any]:
    """Bytes needed by full tuning (in 32 and 16 bits), LoRA and QLoRA.

    Args:
        model: the model; its weights may be on the meta device.
        adapter: the adapter of its family.
        keys: image keys per picture, counted in a sample. None takes the number in the config, or assumes one.
        tokens: length of that sample, in tokens. None assumes one.

    Returns:
        `full`, `full_16_bit`, `lora` and `qlora`: bytes by use, with the default loss. `published`: bytes that a
        published loss needs in addition, for rows of all heads and its Aligner; `learn`: those that `pooling="learn"`
        adds to that. `lora_parameters` and `packed_parameters`: how many LoRA adds and QLoRA packs. `assumptions`.
    """
    keys_in_config = adapter.keys_per_image()
    source = "in the sample" if keys is not None else "from the config" if keys_in_config else "assumed"
    keys = keys or keys_in_config or ASSUMED_KEYS
    tokens = tokens or TEXT_TOKENS + (0 if adapter.cross_attends else keys)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lora, num_lora = LoraSettings(), _lora_parameters(model)
    text = adapter.config.get_text_config()
    rows, num_layers = _rows(adapter, keys), len(adapter.usable_layers())
    alignment = {DIRECT: _words(adapter, keys) + rows // num_layers}  # a layer's heads at a time
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
        "published": rows + _maps(adapter),
        "learn": 4 * SINGLE * _parallel_parameters(model, adapter),
        "lora_parameters": num_lora,
        "packed_parameters": packed,
        "assumptions": [
            f"one sample of {tokens} tokens per step, one picture of {keys} image keys ({source})",
            "full tuning: weights, gradients and AdamW's two states in float32, computing in bfloat16 (dtype: float32, "
            "bf16: true); of 16 bits: all in bfloat16, where small steps are rounded away; no sharding",
            f"LoRA of rank {lora.r} on {', '.join(lora.target_modules)}, in float32: {num_lora:,} parameters; all else "
            "in bfloat16",
            "QLoRA: linear layers but the output layer in 4 bits, quantised twice; LoRA in bfloat16, as TRL has it",
            "gradient checkpointing, TRL's default; TRL's loss, which makes logits in tiles; the vision tower's "
            "activations are not counted",
            f"{NUM_WORDS} words of {TOKENS_PER_WORD} tokens: rows × image keys × 4 bytes, the mean over heads, on each "
            "usable layer (fewer layers: `layers`), and the heads of one layer at a time",
            "attention_loss: published: the rows of all heads and layers, and maps of "
            f"{GRID} × {GRID} through the default Aligner on each usable layer",
        ],
    }


def footprint_of_run(
    run: RunConfig, config: AlignmentConfig, setups: dict[str, Any], trained: int, batch_size: int
) -> dict[str, int]:
    """Bytes that a run needs on each device, by use.

    Args:
        run: its settings.
        config: its settings of alignment.
        setups: `footprint` of its model.
        trained: number of its trained parameters.
        batch_size: samples per device and step.
    """
    half = run.dtype in ("bfloat16", "float16", "half")
    name = "qlora" if run.quantization else "lora" if run.peft_settings() else "full_16_bit" if half else "full"
    needed = {use: size * (batch_size if use in _PER_SAMPLE else 1) for use, size in setups[name].items()}
    if name == "lora" and not half:
        needed["weights"] += (SINGLE - HALF) * setups["full"]["weights"] // SINGLE
    if (run.quantization or {}).get("load_in_8bit"):
        needed["weights"] += round((1 - FOUR_BITS) * setups["packed_parameters"])
    stored = HALF if name in ("qlora", "full_16_bit") else SINGLE
    needed |= {"gradients": stored * trained, "optimiser": 2 * stored * trained}
    if config.align_weight == 0:
        del needed[DIRECT]
    elif not config.is_direct:
        needed["alignment: published loss"] = batch_size * setups["published"]
    if config.pooling == "learn":
        needed["alignment: learned projections"] = setups["learn"]
    return needed


def _lora_parameters(model: nn.Module) -> int:
    settings = LoraSettings()
    return sum(
        settings.r * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in settings.target_modules
    )


def _packed_parameters(model: Any) -> int:
    """Number of weights that bitsandbytes packs: those of all linear layers but the output layer."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return sum(module.weight.numel() for module in linear)


def _parallel_parameters(model: Any, adapter: VlmAdapter) -> int:
    attentions = [adapter.attention_module(model, layer) for layer in adapter.usable_layers()]
    projections = [projection for attention in attentions for projection in (attention.q_proj, attention.k_proj)]
    return sum(parameter.numel() for projection in projections for parameter in projection.parameters())


def _activations(text: Any, tokens: int, stored: int) -> int:
    """Bytes of activations: the input of each layer, the tensors of one layer (recomputed), and one tile of logits."""
    inputs = stored * tokens * text.hidden_size * text.num_hidden_layers
    one_layer = HALF * tokens * (8 * text.hidden_size + 4 * _feed_forward_width(text))
    return inputs + one_layer + HALF * min(tokens, TILE_TOKENS) * min(text.vocab_size, TILE_VOCABULARY)


def _feed_forward_width(text: Any) -> int:
    """Width of a layer's feed-forward network for one token; of experts, the sum over those that the token uses."""
    names = ("intermediate_size", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    dense, experts, width, shared = (getattr(text, name, None) or 0 for name in names)
    width = max(width) if isinstance(width, list) else width  # some have other experts for pictures
    return max(dense, experts * width + shared)


def _rows(adapter: VlmAdapter, keys: int) -> int:
    return SINGLE * NUM_WORDS * TOKENS_PER_WORD * keys * adapter.num_heads() * len(adapter.usable_layers())


def _words(adapter: VlmAdapter, keys: int) -> int:
    """Bytes of the rows' mean over heads, on each layer, and of the maps on the keys: what the default loss keeps."""
    return SINGLE * NUM_WORDS * keys * (TOKENS_PER_WORD * len(adapter.usable_layers()) + 1)


def _maps(adapter: VlmAdapter) -> int:
    """Bytes of the maps, one channel per head, of the Aligner's activations, and of its parameters with AdamW."""
    heads = adapter.num_heads()
    aligner = Aligner(heads, AlignmentConfig().aligner_width)
    channels = sum(module.out_channels for module in aligner if isinstance(module, nn.Conv2d))
    kept = heads + 3 * channels  # results of each convolution, its norm and its activation
    maps = SINGLE * NUM_WORDS * GRID**2 * len(adapter.usable_layers()) * kept
    return maps + 4 * SINGLE * sum(parameter.numel() for parameter in aligner.parameters())
