"""The entry point by which lmms-eval finds our models: `lmms-eval --model lavender --model_args pretrained=RUN`."""

from __future__ import annotations

from typing import Any

MODELS = "lavender.evaluation.harness.models"


def manifests() -> list[Any]:
    """What lmms-eval asks for in its group of entry points `lmms_eval.models`: the model's name and its classes."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="lavender",
            chat_class_path=f"{MODELS}.ChatModel",
            simple_class_path=f"{MODELS}.RankingModel",
        )
    ]
