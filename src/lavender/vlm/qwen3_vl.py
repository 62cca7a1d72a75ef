"""Qwen3-VL: pictures of any shape as in Qwen2-VL, whose cells also reach the first layers from amid the tower."""

from __future__ import annotations

from lavender.vlm.qwen_vl import Qwen2VlAdapter


class Qwen3VlAdapter(Qwen2VlAdapter):
    """As Qwen2-VL: the same image processor, its patches of 16 px.

    DeepStack adds states of earlier tower layers to the outputs of the first text layers, at the keys' own positions:
    a key still shows the cell that its box says. Videos are refused as for Qwen2-VL, though here each frame stands in
    the text by itself.
    """

    model_type = "qwen3_vl"
