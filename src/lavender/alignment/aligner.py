"""The Aligner (§4.3, App. F): a few small layers that turn a word's attention into one map."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from lavender.config import AlignerActivation, AlignerForm, AlignerKind, AlignerNorm
from lavender.maps import min_max

_NORMS: dict[AlignerNorm, Callable[[int], nn.Module]] = {
    "instance": nn.InstanceNorm2d,
    "batch": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels, affine=False),
    "none": lambda channels: nn.Identity(),
}
_ACTIVATIONS: dict[AlignerActivation, Callable[[], nn.Module]] = {
    "relu6": nn.ReLU6,
    "leaky-relu": lambda: nn.LeakyReLU(0.1),
}


class Aligner(nn.Sequential):
    """Maps (map, channels, rows, cols) → (map, rows, cols) in [0, 1] by min–max.

    | form | layers: channels, and whether a normalisation follows |
    | --- | --- |
    | light | in → width, normalised; width → in, normalised |
    | sim | in → width, width → width, width → in, all normalised |
    | deep | in → width and width → width normalised; two of width → width not; width → in, normalised |

    Where there is one channel in, these end with width channels. An activation follows each; a last 1 × 1 layer with a
    bias makes one channel. With convolutions the others are 3 × 3 without bias, with "mlp" 1 × 1: each cell for
    itself. Normalisations have no parameters. At 32 heads and width 32, convolutions have 18,465, 27,681 and 46,113
    parameters.
    """

    def __init__(
        self,
        channels: int,
        width: int = 32,
        form: AlignerForm = "sim",
        kind: AlignerKind = "convolution",
        norm: AlignerNorm = "instance",
        activation: AlignerActivation = "relu6",
    ):
        plain, normed = (width, width, False), (width, width, True)
        middle = {"light": [], "sim": [normed], "deep": [normed, plain, plain]}[form]
        size = 3 if kind == "convolution" else 1
        layers: list[nn.Module] = []
        # of a single channel the last layer is a number: min–max leaves its sign alone, which hardly ever turns
        last = channels if channels > 1 else width
        for channels_in, channels_out, is_normed in ((channels, width, True), *middle, (width, last, True)):
            layers.append(nn.Conv2d(channels_in, channels_out, kernel_size=size, padding=size // 2, bias=False))
            layers += [_NORMS[norm](channels_out)] if is_normed else []
            layers.append(_ACTIVATIONS[activation]())
        super().__init__(*layers, nn.Conv2d(last, 1, kernel_size=1))

    def forward(self, input: Tensor) -> Tensor:
        return min_max(super().forward(input).squeeze(1))
