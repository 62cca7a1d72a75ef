"""Which attention layers are read, and how much each layer and head counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lavender.errors import ConfigError
from lavender.teachers.diffusion.base import Layer, LayerWeights


def choose_layers(layers: Sequence[Layer], weights: LayerWeights, largest: int | None) -> list[Layer]:
    """The layers with a weight above 0 and at most `largest` × `largest` cells.

    Args:
        layers: the candidates, in the order in which they run.
        weights: see `ExtractionConfig.layer_weights`.
        largest: None sets no limit.

    Raises:
        ConfigError: a weight matches no layer, or no layer is left.
    """
    names = [layer.name for layer in layers]
    for prefix in weights:
        if not any(name.startswith(prefix) for name in names):
            raise ConfigError(
                f"layer_weights for {prefix!r}",
                f"the beginning of a layer's name, such as {names[0]!r}",
                "correct or remove it",
            )
    chosen = [
        layer
        for layer in layers
        if (largest is None or layer.grid[0] * layer.grid[1] <= largest**2)
        and np.any(layer_weight(weights, layer.name))
    ]
    if not chosen:
        grids = sorted({layer.grid for layer in layers})
        raise ConfigError(
            f"largest_layer={largest} and layer_weights={dict(weights)}, which leave no layer",
            f"at least one of the {len(layers)} layers, on the grids {grids}",
            "change them",
        )
    return chosen


def head_weights(weights: LayerWeights, name: str, heads: int) -> list[float]:
    """The weight of each of a layer's `heads` heads: that of the longest matching prefix of its name, else 1.

    Raises:
        ConfigError: the layer has another number of heads than weights are given.
    """
    weight = layer_weight(weights, name)
    if isinstance(weight, (int, float)):
        return [float(weight)] * heads
    if len(weight) != heads:
        raise ConfigError(
            f"{len(weight)} weights for the {heads} heads of layer {name}",
            "one number, or one number per head",
            "change layer_weights",
        )
    return [float(number) for number in weight]


def layer_weight(weights: LayerWeights, name: str) -> float | Sequence[float]:
    """What is given for a layer: one number, or one number per head."""
    matching = [prefix for prefix in weights if name.startswith(prefix)]
    return weights[max(matching, key=len)] if matching else 1.0
