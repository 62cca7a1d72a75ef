"""Pictures with maps over them, as pixels. Maps cover the whole picture; sizes are (height, width) in pixels."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lavender.maps import to_heat

LARGEST_PICTURE = 512
"""Longest side, in pixels, of a picture in a report. Larger pictures are downscaled."""
_LARGEST_OVERLAY = 160  # pixels; maps are smooth, so more would only make the page larger


def downscaled(image: Image.Image, largest: int = LARGEST_PICTURE) -> Image.Image:
    """The picture in RGB, its longest side at most `largest` pixels."""
    picture = image.convert("RGB")
    picture.thumbnail((largest, largest))
    return picture


def desaturated(picture: Image.Image) -> Image.Image:
    """The picture with weak colours and a little darker, so that the colours of a map over it stand out."""
    return Image.blend(picture, picture.convert("L").convert("RGB"), 0.7).point(lambda value: round(0.85 * value))


def overlay_heat(picture: Image.Image, heat: Tensor) -> Image.Image:
    """The desaturated picture with a map (rows, cols) over it, in RGB."""
    layer = Image.fromarray(heat_layer(heat, (picture.height, picture.width))).resize(picture.size)
    return Image.alpha_composite(desaturated(picture).convert("RGBA"), layer).convert("RGB")


def resized_heat(heat: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A map (rows, cols) resized bilinearly to `size`, its maximum 1 (0 if it is zero everywhere): float32."""
    clamped = heat.detach().to("cpu").double().clamp_min(0)[None, None]
    return to_heat(F.interpolate(clamped, size=size, mode="bilinear", align_corners=False)[0, 0].float()).numpy()


def peak_of(heat: Tensor, size: tuple[int, int]) -> tuple[int, int] | None:
    """(row, column) of the maximum of a map resized to `size`; None for a map that is zero everywhere."""
    resized = resized_heat(heat, size)
    row, column = np.unravel_index(resized.argmax(), size)
    return (int(row), int(column)) if resized.max() > 0 else None


def heat_layer(heat: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A map in colours, to lie over a picture of `size`: uint8 (height, width, RGBA), transparent where it is 0."""
    shrink = min(1.0, _LARGEST_OVERLAY / max(size))
    return heat_colours(resized_heat(heat, (max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink)))))


def heat_colours(values: np.ndarray) -> np.ndarray:
    """The colours of a map's values in [0, 1], which a legend needs too: uint8 (…, RGBA)."""
    from matplotlib import colormaps

    colours = colormaps["inferno"](0.12 + 0.86 * values)
    colours[..., 3] = 0.9 * values**0.75
    return (255 * colours).round().astype(np.uint8)


def dim_outside(mask: np.ndarray) -> np.ndarray:
    """A layer that darkens everything outside a mask (height, width), with a light rim: uint8 (height, width, RGBA)."""
    layer = np.zeros((*mask.shape, 4), dtype=np.uint8)
    layer[~mask] = (20, 11, 53, 205)
    padded = np.pad(mask, 1)
    near = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    layer[near & ~mask] = (255, 255, 255, 235)
    return layer
