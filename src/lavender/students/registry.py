"""The families we know, by `config.model_type`."""

from __future__ import annotations

from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from lavender.errors import UnsupportedModelError
from lavender.students.base import VlmAdapter
from lavender.students.families.flamingo import FlamingoAdapter
from lavender.students.families.gemma3 import Gemma3Adapter
from lavender.students.families.idefics import IdeficsAdapter
from lavender.students.families.idefics3 import Idefics3Adapter, SmolVlmAdapter
from lavender.students.families.internvl import InternVlAdapter
from lavender.students.families.llava import LlavaAdapter
from lavender.students.families.llava_next import LlavaNextAdapter, LlavaOnevisionAdapter
from lavender.students.families.minicpm_v import MiniCpmVAdapter
from lavender.students.families.mllama import MllamaAdapter
from lavender.students.families.qwen_vl import Qwen2VlAdapter, Qwen3VlAdapter, Qwen25VlAdapter

FAMILIES: dict[str, type[VlmAdapter]] = {
    family.model_type: family
    for family in (
        FlamingoAdapter,
        Gemma3Adapter,
        Idefics3Adapter,
        IdeficsAdapter,
        InternVlAdapter,
        LlavaAdapter,
        LlavaNextAdapter,
        LlavaOnevisionAdapter,
        MiniCpmVAdapter,
        MllamaAdapter,
        Qwen2VlAdapter,
        Qwen25VlAdapter,
        Qwen3VlAdapter,
        SmolVlmAdapter,
    )
}


def adapter_for(config: Any) -> VlmAdapter:
    """The adapter of a model's config. Raises UnsupportedModelError for a family without one."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"a model of type {config.model_type!r}",
            f"one of {sorted(FAMILIES)}",
            "use a supported model, or write an adapter: one file in lavender/vlm and one line in its registry",
        )
    return family(config)


def auto_class(config: Any, trust_remote_code: bool = False) -> Any:
    """Which of transformers' Auto classes loads a model; of one whose own code may run, the best that its code offers.

    OpenFlamingo is known to them since this module was imported.
    """
    offered = config.to_dict().get("auto_map") or {} if trust_remote_code is True else {}
    classes = (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel)
    return next((one for one in classes if one.__name__ in offered), AutoModelForImageTextToText)
