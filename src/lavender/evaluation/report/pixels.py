"""Pictures and maps as data addresses of a page, small enough that a page of 200 pictures stays below 10 MB."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lavender.drawing import LARGEST_PICTURE, downscaled, heat_colours, resized_heat

PAGE_BYTES = 9_500_000
"""What a page may take. Where it would take more, its pictures are reduced, and maps by their number."""
_SIDES = (LARGEST_PICTURE, 384, 288, 224, 160)
_QUALITY = 82
_SMALL, _FEW_COLOURS = 40_000, 4096  # pixels and colours of pictures that a PNG may hold in fewer bytes
_DETAILS = {400: (160, 64), 2000: (64, 64), 4000: (32, 32)}
"""Most maps on a page → pixels of each map's longest side, and its number of colours. Browsers interpolate."""
_LEAST_DETAIL = (16, 16)
_CELL_BYTES, _REST_BYTES, _LEAST_PICTURES = 300, 300_000, 1_000_000  # text around a map; around all; of all pictures


def bytes_for_pictures(layers: Sequence[str]) -> int:
    """What is left of `PAGE_BYTES` for the pictures of a page with these map addresses."""
    return max(_LEAST_PICTURES, PAGE_BYTES - _REST_BYTES - sum(len(layer) + _CELL_BYTES for layer in layers))


def picture_addresses(pictures: Sequence[Image.Image], most_bytes: int = PAGE_BYTES) -> list[str]:
    """Each picture as a JPEG or PNG, in the largest of some sizes in which all fit.

    In the smallest size, a side of 160 pixels, they may take more than `most_bytes`.
    """
    encoded: list[tuple[str, bytes]] = []
    for side in _SIDES:
        encoded = [_smaller(downscaled(picture, side)) for picture in pictures]
        if sum(4 * len(content) // 3 for _, content in encoded) <= most_bytes:
            break
    return [_address(kind, content) for kind, content in encoded]


def _smaller(picture: Image.Image) -> tuple[str, bytes]:
    """(format, file): a JPEG; or, if it is smaller, a PNG, which keeps every pixel. Large photographs are not tried."""
    files = []
    settings: dict[str, dict[str, Any]] = {"jpeg": {"quality": _QUALITY}}
    if picture.width * picture.height <= _SMALL or picture.getcolors(_FEW_COLOURS):
        settings["png"] = {"optimize": True}
    for kind, options in settings.items():
        buffer = BytesIO()
        picture.save(buffer, kind, **options)
        files.append((kind, buffer.getvalue()))
    return min(files, key=lambda file: len(file[1]))


def map_detail(number: int) -> tuple[int, int]:
    """(pixels of the longest side, number of colours) in which a page draws each of a number of maps."""
    return next((detail for most, detail in _DETAILS.items() if number <= most), _LEAST_DETAIL)


def map_address(heat: Tensor, size: tuple[int, int], detail: tuple[int, int]) -> str:
    """A map in colours, transparent where it is 0, as a PNG to lie over a picture of `size` (height, width).

    Args:
        heat: non-negative (rows, cols).
        size: of the picture. The drawing has its shape.
        detail: of `map_detail`.
    """
    side, levels = detail
    shrink = min(1.0, side / max(size))
    values = resized_heat(heat, (max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))))
    image = Image.fromarray((values * (levels - 1)).round().astype(np.uint8), "P")
    colours = heat_colours(np.linspace(0, 1, levels))
    image.putpalette(colours[:, :3].tobytes())
    return _png(image, transparency=colours[:, 3].tobytes(), bits=(levels - 1).bit_length())


def layer_address(layer: np.ndarray) -> str:
    """A layer uint8 (height, width, RGBA) as a PNG."""
    return _png(Image.fromarray(layer))


def _png(image: Image.Image, **settings: Any) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True, **settings)
    return _address("png", buffer.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
