"""The Aligner (§4.3): a few convolutions that turn a word's attention of all heads into one map."""

from __future__ import annotations

from torch import Tensor, nn

from lavender.maps import min_max


class Aligner(nn.Sequential):
    """The paper's `sim` form with 3 × 3 convolutions: heads → width → width → heads → 1.

    Each convolution but the last is followed by instance normalisation (not affine) and ReLU6; the
    last is 1 × 1 with a bias. 27,681 parameters at 32 heads and width 32.

    Maps (map, heads, rows, cols) → (map, rows, cols) in [0, 1].
    """

    def __init__(self, num_heads: int, width: int = 32):
        layers: list[nn.Module] = []
        for channels_in, channels_out in ((num_heads, width), (width, width), (width, num_heads)):
            layers += [
                nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
                nn.InstanceNorm2d(channels_out),
                nn.ReLU6(),
            ]
        super().__init__(*layers, nn.Conv2d(num_heads, 1, kernel_size=1))

    def forward(self, input: Tensor) -> Tensor:
        return min_max(super().forward(input).squeeze(1))
