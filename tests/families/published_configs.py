"""What decides a model's size in the config.json of published checkpoints, and that size.

For families of which the estimate of memory was compared with a published size; a new family need not be here.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from lavender.students.registry import FAMILIES

UNSUPPORTED = next(kind for kind in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) if kind not in FAMILIES)
"""The type of a vision-language model that transformers has and this library does not know."""

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
}
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
}
LLAMA_8B = LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}

# model_type → what differs from the config class's defaults, parameters in thousand millions as its card says them
PUBLISHED: dict[str, tuple[dict[str, Any], float | None]] = {
    # meta-llama/Llama-3.2-11B-Vision
    "mllama": ({"vision_config": {"image_size": 560}}, 10.67),
    # llava-hf/llava-1.5-7b-hf
    "llava": ({"text_config": LLAMA_7B, "vision_config": CLIP}, 7.06),
    # llava-hf/llava-v1.6-mistral-7b-hf
    "llava_next": (
        {"text_config": LLAMA_8B | {"model_type": "mistral", "vocab_size": 32064}, "vision_config": CLIP},
        7.57,
    ),
    # llava-hf/llava-onevision-qwen2-7b-ov-hf
    "llava_onevision": (
        {
            "text_config": QWEN2_7B | {"model_type": "qwen2", "vocab_size": 152000},
            "vision_config": SIGLIP
            | {
                "model_type": "siglip_vision_model",
                "num_hidden_layers": 26,
                "image_size": 384,
                "vision_use_head": False,
            },
        },
        8.03,
    ),
    # HuggingFaceM4/Idefics3-8B-Llama3
    "idefics3": (
        {
            "scale_factor": 2,
            "text_config": LLAMA_8B | {"vocab_size": 128259},
            "vision_config": SIGLIP | {"image_size": 364},
        },
        8.46,
    ),
    # HuggingFaceTB/SmolVLM-Instruct
    "smolvlm": (
        {
            "scale_factor": 3,
            "vision_config": SIGLIP | {"image_size": 384},
            "text_config": {
                "model_type": "llama",
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 24,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "vocab_size": 49155,
            },
        },
        2.25,
    ),
    # Qwen/Qwen2-VL-7B-Instruct
    "qwen2_vl": (
        {"text_config": QWEN2_7B, "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584}},
        8.29,
    ),
    # Qwen/Qwen2.5-VL-7B-Instruct
    "qwen2_5_vl": (
        {
            "text_config": QWEN2_7B,
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "out_hidden_size": 3584,
            },
        },
        8.29,
    ),
    # Qwen/Qwen3-VL-8B-Instruct
    "qwen3_vl": (
        {
            "text_config": {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
            },
            "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096},
        },
        8.77,
    ),
    # google/gemma-3-4b-it
    "gemma3": (
        {
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "vocab_size": 262208,
                "sliding_window": 1024,
            },
            "vision_config": SIGLIP | {"image_size": 896, "vision_use_head": False},
        },
        4.30,
    ),
    # OpenGVLab/InternVL3-8B-hf
    "internvl": (
        {
            "tie_word_embeddings": False,
            "text_config": QWEN2_7B
            | {
                "model_type": "qwen2",
                "vocab_size": 151674,
                "tie_word_embeddings": False,
            },
        },
        7.94,
    ),
    # HuggingFaceM4/idefics-9b
    "idefics": (
        {
            "vocab_size": 32000,
            "additional_vocab_size": 2,
            "cross_layer_interval": 4,
            "use_resampler": True,
            "vision_config": {
                "embed_dim": 1280,
                "image_size": 224,
                "patch_size": 14,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "intermediate_size": 5120,
            },
            "perceiver_config": {
                "use_resampler": True,
                "resampler_n_latents": 64,
                "resampler_depth": 6,
                "resampler_n_heads": 16,
                "resampler_head_dim": 96,
            },
        },
        8.93,
    ),
    # openflamingo/OpenFlamingo-9B-vitl-mpt7b, as `save_pretrained` writes it
    "open_flamingo": (
        {
            "cross_attn_every_n_layers": 4,
            "image_token_id": 50278,
            "vision_config": CLIP | {"image_size": 224},
            "language_config": {
                "model_type": "mpt",
                "d_model": 4096,
                "n_layers": 32,
                "n_heads": 32,
                "vocab_size": 50432,
            },
        },
        8.13,
    ),
    # openbmb/MiniCPM-Llama3-V-2_5, whose code is not here
    "minicpmv": (
        {
            "architectures": ["MiniCPMV"],
            "query_num": 96,
            "batch_vision_input": True,
            "version": "2.5",
            "auto_map": {
                "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
                "AutoModel": "modeling_minicpmv.MiniCPMV",
                "AutoModelForCausalLM": "modeling_minicpmv.MiniCPMV",
            },
            "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
            "vision_config": SIGLIP | {"model_type": "idefics2", "image_size": 980},
            **{name: one for name, one in LLAMA_8B.items() if name != "model_type"},
        },
        None,
    ),
}
