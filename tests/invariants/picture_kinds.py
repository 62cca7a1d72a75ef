"""Pictures as they lie in data sets: each kind with the upright RGB pixels that it shows, found without lavender."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from families.geometry import picture

SIZE = (60, 100)  # (height, width)
TURNED = 6  # EXIF: to be turned by 90° clockwise


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def on_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    share = opacity[..., None] / 255
    return colours * share + 255 * (1 - share)


def kinds(folder: Path) -> dict[str, tuple[Any, np.ndarray]]:
    """name → (as it comes, pixels (height, width, 3))."""
    colours = np.asarray(picture(SIZE, 4))
    grey = np.asarray(picture(SIZE, 5).convert("L"))
    opacity = np.asarray(picture(SIZE, 6).convert("L"))
    as_grey = np.repeat(grey[..., None], 3, axis=2)
    turned = encoded(picture(SIZE, 4), "JPEG", quality=95, exif=exif(TURNED))
    (folder / "turned.jpg").write_bytes(turned)
    upright = np.rot90(np.asarray(Image.open(BytesIO(turned)).convert("RGB")), -1)
    clear = Image.fromarray(np.dstack([colours, opacity]), "RGBA")
    clear.save(folder / "clear.png")
    two = Image.fromarray((grey > 128).astype(np.uint8), "P")
    two.putpalette([10, 20, 30, 200, 210, 220])
    palette = np.where(grey[..., None] > 128, [200, 210, 220], 255)  # the first colour is transparent
    cmyk = picture(SIZE, 4).convert("CMYK")
    return {
        "16-bit grey PNG": (encoded(Image.fromarray(grey.astype(np.uint16) * 257)), as_grey),
        "float TIFF": (encoded(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"), as_grey),
        "turned, decoded": (Image.open(BytesIO(turned)), upright),
        "turned, a path": (str(folder / "turned.jpg"), upright),
        "turned, bytes": (turned, upright),
        "turned, a struct": ({"bytes": turned, "path": "turned.jpg"}, upright),
        "turned, a struct with a path": ({"bytes": None, "path": str(folder / "turned.jpg")}, upright),
        "RGBA": (clear, on_white(colours, opacity)),
        "RGBA, a path": (folder / "clear.png", on_white(colours, opacity)),
        "LA": (Image.fromarray(np.dstack([grey, opacity]), "LA"), on_white(as_grey, opacity)),
        "palette with transparency": (Image.open(BytesIO(encoded(two, transparency=0))), palette),
        "CMYK": (cmyk, np.asarray(cmyk.convert("RGB"))),
        "grey": (Image.fromarray(grey), as_grey),
        "RGB": (picture(SIZE, 4), colours),
    }


NAMES = (
    "16-bit grey PNG",
    "float TIFF",
    "turned, decoded",
    "turned, a path",
    "turned, bytes",
    "turned, a struct",
    "turned, a struct with a path",
    "RGBA",
    "RGBA, a path",
    "LA",
    "palette with transparency",
    "CMYK",
    "grey",
    "RGB",
)
