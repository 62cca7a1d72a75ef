"""Pictures: decoded once and in one way, and known by their content.

Teacher and student must see the same pixels, or a map lies on the wrong place. So everything that
decodes a picture does it here: as a person sees it (EXIF orientation applied), in 8-bit RGB.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from lavender.errors import DataError

MIN_SIDE = 8
"""The shortest side of a usable picture, in pixels."""
MAX_PIXELS = 100_000_000
"""The most pixels (width × height) that are decoded."""

_FIX_FILE = "repair or replace the file, or remove its row from the data set"


def load_image(source: Image.Image | Path | str | bytes | Mapping, name: str) -> Image.Image:
    """Decode a picture fully: upright by its EXIF orientation, RGB, transparency on white.

    Grey of 16 bits is scaled to 8, not clipped. A TIFF of floats may be in [0, 1], [0, 255] or [0, 65535].

    Args:
        source: a picture, the path of a file, an encoded file, or the `datasets` struct
            {"bytes": …, "path": …}.
        name: what to call the picture in an error.

    Raises:
        DataError: missing, empty, truncated, not a picture, several frames, a side under `MIN_SIDE`
            or more than `MAX_PIXELS` (this one before anything is decoded).
    """
    with warnings.catch_warnings():
        # Pillow warns of large pictures and of damaged EXIF; the first has an error below, the second harms no pixel.
        warnings.simplefilter("ignore")
        try:
            image = _open(source, name)
            _check_header(image, name)
            return _to_rgb(ImageOps.exif_transpose(image), name)
        except DataError:
            raise
        except Image.DecompressionBombError as error:
            raise _too_large(name, str(error)) from error
        except (
            Exception
        ) as error:  # on damaged bytes a decoder may raise anything: OSError, SyntaxError, struct.error …
            raise DataError(f"{name}, which cannot be decoded: {error}", "a whole picture file", _FIX_FILE) from error


def picture_size(source: Image.Image | Path | str | bytes | Mapping, name: str) -> tuple[int, int]:
    """(height, width) of a picture as `load_image` returns it, from its header: nothing is decoded.

    Raises:
        DataError: what `load_image` refuses, but for what only decoding shows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(source, name)
            _check_header(image, name)
            lies = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{name}, whose header cannot be read: {error}", "a picture file", _FIX_FILE) from error
    return (image.width, image.height) if lies else (image.height, image.width)


def image_id(image: Image.Image) -> str:
    """32 hexadecimal digits of the picture's content: size and RGB pixels. Joins maps with samples.

    Two files with the same pixels have the same id. The pixels of a JPEG depend on its decoder, so
    extract and train with the same Pillow.
    """
    if image.mode != "RGB":
        raise ValueError(f"Got a picture of mode {image.mode!r}; expected RGB, as load_image returns it.")
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def _open(source: Image.Image | Path | str | bytes | Mapping, name: str) -> Image.Image:
    """The picture with its header read and its pixels, unless it came decoded, still encoded."""
    if isinstance(source, Image.Image):
        return source
    encoded: Path | str | bytes | None
    if isinstance(source, Mapping):
        encoded = source.get("path") if source.get("bytes") is None else source["bytes"]
    else:
        encoded = source
    if encoded is None:
        raise DataError(f"{name}, whose struct has neither bytes nor path", "one of the two", _FIX_FILE)
    if not isinstance(encoded, bytes):
        if not Path(encoded).is_file():
            raise DataError(f"{name}, whose file {encoded} does not exist", "a picture file", "check the path")
        encoded = Path(encoded).read_bytes()
    if not encoded:
        raise DataError(f"{name}, which is empty (0 bytes)", "a picture file", _FIX_FILE)
    try:
        return Image.open(BytesIO(encoded))
    except Image.UnidentifiedImageError as error:
        got = f"{name}, which is no picture, or only its beginning: it begins with {encoded[:8]!r}"
        raise DataError(got, "a picture that Pillow can read", _FIX_FILE) from error


def _check_header(image: Image.Image, name: str) -> None:
    """Refuse a picture for its size or its frames, before decoding."""
    size = f"{image.width} × {image.height} pixels (width × height)"
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, size)
    if min(image.size) < MIN_SIDE:
        raise DataError(
            f"{name} with {size}", f"at least {MIN_SIDE} pixels on each side", "remove it from the data set"
        )
    # The further frames of an MPO, as many phones write it, are depth or a preview; the first is the picture.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        got = f"{name}, a {image.format} of {frames} frames (animated, or of several pages)"
        raise DataError(got, "a still picture", "save the frame that the text describes as a file of its own")


def _too_large(name: str, size: str) -> DataError:
    return DataError(f"{name} with {size}", f"at most {MAX_PIXELS:,} pixels", "scale the picture down")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_rgb(image, name)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image  # Pillow's only way out of premultiplied grey
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _grey_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Scale grey of more than 8 bits to 8: 65535 (or a float picture's 1.0) becomes 255."""
    grey = np.asarray(image).astype(np.float64)
    low, high = grey.min(), grey.max()
    if not (low >= 0 and high <= 65535):  # also true of NaN
        got = f"{name}, mode {image.mode!r} with values from {low:g} to {high:g}"
        raise DataError(got, "grey from 0 to 65535", "save it with 8 or 16 bits a pixel")
    if image.mode.startswith("I;16") or high > 255:
        grey = grey / 257
    elif image.mode == "F" and high <= 1:
        grey = grey * 255
    return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
