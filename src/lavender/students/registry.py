"""The supported families of models, by `config.model_type`. The one place that lists them."""

from __future__ import annotations

from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from lavender.errors import UnsupportedModelError
from lavender.students.base import VlmAdapter
from lavender.students.families.aya_vision import AyaVisionAdapter, Cohere2VisionAdapter
from lavender.students.families.deepseek_vl import DeepseekVlAdapter, JanusAdapter
from lavender.students.families.ernie4_5_vl import Ernie45VlMoeAdapter
from lavender.students.families.flamingo import FlamingoAdapter
from lavender.students.families.gemma3 import Gemma3Adapter
from lavender.students.families.gemma4 import Gemma4Adapter
from lavender.students.families.glm4v import Glm4vAdapter, Glm46vAdapter
from lavender.students.families.idefics import IdeficsAdapter
from lavender.students.families.idefics3 import Idefics3Adapter, SmolVlmAdapter
from lavender.students.families.internvl import InternVlAdapter
from lavender.students.families.lfm2_vl import Lfm2VlAdapter
from lavender.students.families.llava import LlavaAdapter
from lavender.students.families.llava_next import LlavaNextAdapter, LlavaOnevisionAdapter
from lavender.students.families.minicpm_v import MiniCpmVAdapter
from lavender.students.families.minicpm_v4_6 import MiniCpmV46Adapter
from lavender.students.families.mllama import MllamaAdapter
from lavender.students.families.ovis2 import Ovis2Adapter
from lavender.students.families.paddleocr_vl import PaddleOcrVlAdapter
from lavender.students.families.pixtral import LightOnOcrAdapter, Mistral3Adapter
from lavender.students.families.qwen_vl import (
    Qwen2VlAdapter,
    Qwen3VlAdapter,
    Qwen3VlMoeAdapter,
    Qwen25VlAdapter,
    Qwen35Adapter,
    Qwen35MoeAdapter,
)
from lavender.students.families.video_llama_3 import VideoLlama3Adapter

FAMILIES: dict[str, type[VlmAdapter]] = {
    family.model_type: family
    for family in (
        AyaVisionAdapter,
        Cohere2VisionAdapter,
        DeepseekVlAdapter,
        Ernie45VlMoeAdapter,
        FlamingoAdapter,
        Gemma3Adapter,
        Gemma4Adapter,
        Glm4vAdapter,
        Glm46vAdapter,
        Idefics3Adapter,
        IdeficsAdapter,
        InternVlAdapter,
        JanusAdapter,
        Lfm2VlAdapter,
        LightOnOcrAdapter,
        LlavaAdapter,
        LlavaNextAdapter,
        LlavaOnevisionAdapter,
        MiniCpmVAdapter,
        MiniCpmV46Adapter,
        Mistral3Adapter,
        MllamaAdapter,
        Ovis2Adapter,
        PaddleOcrVlAdapter,
        Qwen2VlAdapter,
        Qwen25VlAdapter,
        Qwen3VlAdapter,
        Qwen3VlMoeAdapter,
        Qwen35Adapter,
        Qwen35MoeAdapter,
        SmolVlmAdapter,
        VideoLlama3Adapter,
    )
}

VLMEVALKIT: dict[str, str] = {
    "mllama": "llama_vision",
    "llava_next": "LLaVA_Next",
    "llava_onevision": "LLaVA_OneVision_HF",
    "idefics3": "IDEFICS2",
    "smolvlm": "SmolVLM",
    "qwen2_vl": "Qwen2VLChat",
    "qwen2_5_vl": "Qwen2VLChat",
    "qwen3_vl": "Qwen3VLChat",
    "gemma3": "Gemma3",
}
"""`model_type` → class of the same models in VLMEvalKit's `vlmeval/vlm`. We know of none for the other families.

`minicpmv` is missing because each version has a class of its own there, `internvl` because `InternVLChat` loads the
checkpoints with their own code, and not transformers' format.
"""


def adapter_for(config: Any) -> VlmAdapter:
    """The adapter for a model, from its config.

    Raises:
        UnsupportedModelError: no adapter has the config's `model_type`.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"a model of type {config.model_type!r}",
            f"one of {sorted(FAMILIES)}",
            "use a supported model, or write an adapter: one file in lavender/students/families and one line in "
            "lavender/students/registry.py",
        )
    return family(config)


def auto_class(config: Any, trust_remote_code: bool = False) -> Any:
    """The Auto class of transformers that loads a model.

    Args:
        config: the model's config.
        trust_remote_code: whether code that comes with the model may run. Then the class is one that this code offers:
            image-text-to-text if possible, else causal language model, else the plain model.
    """
    offered = config.to_dict().get("auto_map") or {} if trust_remote_code is True else {}
    classes = (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel)
    return next((auto for auto in classes if auto.__name__ in offered), AutoModelForImageTextToText)
