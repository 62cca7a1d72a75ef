"""The Aligner (§4.3, App. F): a small network that turns a word's attention into one map."""

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
    """A small network from attention, (map, channels, rows, cols), to maps, (map, rows, cols) in [0, 1] by min–max.

    | form | layers: channels, and whether a normalisation follows |
    | --- | --- |
    | light | in → width, normalised; width → in, normalised |
    | sim | in → width, width → width, width → in, all normalised |
    | deep | in → width and width → width normalised; two of width → width not; width → in, normalised |

    If `channels` is 1, the table's last layer has `width` output channels. An activation follows each layer. A final
    1 × 1 layer with a bias makes one channel. Convolutions are 3 × 3 without bias; "mlp" layers are 1 × 1, so each cell
    is transformed by itself. Normalisations have no parameters. With 32 channels and width 32, the convolutional forms
    have 18,465, 27,681 and 46,113 parameters.

    Examples:
        >>> import torch
        >>> from lavender.alignment.aligner import Aligner
        >>> Aligner(channels=8)(torch.rand(5, 8, 24, 24)).shape
        torch.Size([5, 24, 24])

    Args:
        channels: number of input channels: the attention heads, or 1 where heads are pooled first.
        width: number of hidden channels, d_h.
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
        # with one channel the final layer would be one number: min–max keeps only its sign, which hardly ever changes
        last = channels if channels > 1 else width
        for channels_in, channels_out, is_normed in ((channels, width, True), *middle, (width, last, True)):
            layers.append(nn.Conv2d(channels_in, channels_out, kernel_size=size, padding=size // 2, bias=False))
            layers += [_NORMS[norm](channels_out)] if is_normed else []
            layers.append(_ACTIVATIONS[activation]())
        super().__init__(*layers, nn.Conv2d(last, 1, kernel_size=1))

    def forward(self, input: Tensor) -> Tensor:
        return min_max(super().forward(input).squeeze(1))
