"""Decode images in one way, and identify them by their content.

Teacher and student must see the same pixels, or maps are misplaced. So every image is decoded here: upright (EXIF
orientation applied), in 8-bit RGB.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from lavender.errors import DataError
from lavender.files import IMAGE_FORMATS, MISSING, expanded, fault_of, printable, read_plain

MIN_SIDE = 8
"""The shortest side of a usable image, in pixels."""
MAX_PIXELS = 100_000_000
"""The most pixels (width × height) of an image."""
MAX_BYTES = 2**30
"""The most bytes of an image file."""

_MAX_JPEG_WORK = 20 * MAX_PIXELS  # pixels × scans: a small progressive file may ask for hours of decoding
_FIX_FILE = "repair or replace the file; of a data set, you can also remove its row"
_BEGINNINGS = re.compile(rb"\x89PNG|\xff\xd8\xff|RIFF|GIF8|BM|II\*\0|MM\0\*|P[1-6]\s")
_MIN_BASE64 = 64  # characters of the smallest image
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: Image.Image | Path | str | bytes | Mapping, name: str) -> Image.Image:
    """Decode an image: upright by its EXIF orientation, RGB, transparency on white, without metadata.

    16-bit grey is scaled to 8 bits, not clipped. A TIFF of floats may be in [0, 1], [0, 255] or [0, 65535].

    Examples:
        >>> from PIL import Image
        >>> image = load_image(Image.new("RGBA", (40, 30)), "the example")
        >>> image.mode, image.size, image.getpixel((0, 0))
        ('RGB', (40, 30), (255, 255, 255))

    Args:
        source: an image, the path of a file, the bytes of a file, or the `datasets` struct {"bytes": …, "path": …}.
        name: what to call the image in an error.

    Returns:
        An RGB image, decoded fully.

    Raises:
        DataError: missing, empty, truncated, none of `IMAGE_FORMATS`, several frames, a side under `MIN_SIDE`, a file
            of more than `MAX_BYTES`, or more than `MAX_PIXELS` (checked before decoding). The message quotes no
            content of the file, because a path may lead to any file.
    """
    with decoding(name):
        image = _open(source, name)
        _check_header(image, name)
        image.load()
        rgb = _to_rgb(_upright(image), name)
        rgb.info.clear()  # the orientation too, which must not be applied again
        return rgb


def named(source: Image.Image | Path | str | bytes | Mapping, name: str) -> str:
    """What an error calls an image: a name, and its file if it has one.

    Examples:
        >>> named("photo.jpg", "the picture"), named(b"", "the picture")
        ('the picture photo.jpg', 'the picture')
    """
    path = source.get("path") if isinstance(source, Mapping) and source.get("bytes") is None else source
    return f"{name} {printable(path)}" if isinstance(path, (str, Path)) else name


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn any error of a decoder into a DataError, and silence its warnings. Threads may decode at the same time."""
    with _settings_of_pillow:
        try:
            yield
        except DataError:
            raise
        except Image.DecompressionBombError as error:
            raise _too_large(name, "far more pixels") from error
        except Exception as error:  # OSError, SyntaxError, struct.error …; their messages may quote the file
            why = f"it is damaged ({type(error).__name__})"
            why = "it is truncated" if "truncated" in str(error) else why
            why = "it does not fit into the memory" if isinstance(error, MemoryError) else why
            raise DataError(f"{name}, which cannot be decoded: {why}", "a whole picture file", _FIX_FILE) from error


class _SettingsOfPillow:
    """Settings of the whole process while any thread decodes: the first one sets them, the last one restores them.

    With `LOAD_TRUNCATED_IMAGES` Pillow decodes a truncated file, grey below the break. Some libraries set it when they
    are imported (lmms-eval does). Here it is off. Pillow warns of large images, which are refused, and of damaged EXIF,
    which harms no pixel.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, ExitStack()
        if hasattr(os, "register_at_fork"):  # a child has no other thread that would restore them
            os.register_at_fork(after_in_child=self._restore_in_child)

    def _restore_in_child(self) -> None:
        self._before.close()
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
                self._before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                ImageFile.LOAD_TRUNCATED_IMAGES = False

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._before.close()


_settings_of_pillow = _SettingsOfPillow()


def open_encoded(encoded: bytes, name: str, formats: tuple[str, ...] = IMAGE_FORMATS) -> Image.Image:
    """Open an image without decoding its pixels. Raises DataError; use within `decoding`."""
    if not encoded:
        raise DataError(f"{name}, which is empty (0 bytes)", "a picture file", _FIX_FILE)
    if len(encoded) > MAX_BYTES:
        raise DataError(f"{name} of {len(encoded):,} bytes", f"at most {MAX_BYTES:,} bytes", "scale the picture down")
    try:
        image = Image.open(BytesIO(encoded), formats=formats)
    except Image.UnidentifiedImageError as error:
        got = f"{name}, {len(encoded):,} bytes that are no picture of a known format, or only its beginning"
        raise DataError(got, f"one of {', '.join(formats)}", _FIX_FILE) from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, _size(image))
    scans = encoded.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
    if image.width * image.height * scans > _MAX_JPEG_WORK:
        got = f"{name}, a JPEG of {_size(image)} in {scans} passes"
        raise DataError(got, f"at most {_MAX_JPEG_WORK:,} pixels in all passes", "save it as another file")
    return image


def stored_orientation(path: Path, name: str) -> tuple[int, tuple[int, int]]:
    """The EXIF orientation of an image file (1 if it has none) and its size (height, width) as stored."""
    with decoding(name):
        image = open_encoded(read_plain(path, MAX_BYTES), name)
        return _orientation(image), _stored_size(image)


def embedded(text: str) -> bytes | None:
    """The image file in a data URI ("data:image/png;base64,…") or in bare base64; None for any other text.

    Raises:
        ValueError: a data URI without base64.
    """
    if text[:5].lower() == "data:":
        kind, comma, body = text.partition(",")
        encoded = _from_base64(unquote(body)) if comma and kind.lower().endswith(";base64") else None
        if not encoded:
            raise ValueError(f"the picture is the data address {printable(text[:60])}, which holds no base64")
        return encoded
    encoded = _from_base64(text) if len(text) >= _MIN_BASE64 else None
    return encoded if encoded and _BEGINNINGS.match(encoded) else None


def _from_base64(text: str) -> bytes | None:
    """The bytes of a base64 text, also with line breaks, in the URL-safe alphabet, or without padding; else None."""
    letters = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def picture_size(source: Image.Image | Path | str | bytes | Mapping, name: str) -> tuple[int, int]:
    """(height, width) in pixels of the image that `load_image` would return, from the header alone.

    Raises:
        DataError: as `load_image`, except for what only decoding shows.
    """
    with decoding(name):
        image = _open(source, name)
        _check_header(image, name)
        height, width = _stored_size(image)
        is_turned = _orientation(image) in (5, 6, 7, 8)
    return (width, height) if is_turned else (height, width)


def image_id(image: Image.Image) -> str:
    """A hash of the image's size and RGB pixels, by which maps and samples are joined.

    Two files with the same pixels have the same id. The pixels of a JPEG depend on its decoder, so extract and train
    with the same version of Pillow.

    Examples:
        >>> from PIL import Image
        >>> image_id(Image.new("RGB", (40, 30)))
        '66b99e25cf92c89fbc1f9e430a77ea2b'

    Args:
        image: an RGB image, as `load_image` returns it.

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: the image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"Got a picture of mode {image.mode!r}; expected RGB, as load_image returns it.")
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def _open(source: Image.Image | Path | str | bytes | Mapping, name: str) -> Image.Image:
    """The image with its header read; its pixels are not yet decoded, unless they came decoded."""
    if isinstance(source, Image.Image):
        if source.format == "EPS" and getattr(source, "tile", None):
            raise DataError(f"{name}, an EPS not yet decoded", f"one of {', '.join(IMAGE_FORMATS)}", _FIX_FILE)
        return source
    encoded: Path | str | bytes | None
    if isinstance(source, Mapping):
        encoded = source.get("path") if source.get("bytes") is None else source["bytes"]
    else:
        encoded = source
    if encoded is None:
        raise DataError(f"{name}, whose struct has neither bytes nor path", "one of the two", _FIX_FILE)
    if isinstance(encoded, (str, Path)):
        encoded = _content(expanded(encoded), name)
    if not isinstance(encoded, bytes):
        raise DataError(f"{name}, which is a {type(encoded).__name__}", "a path or an encoded picture", _FIX_FILE)
    return open_encoded(encoded, name)


def _content(path: Path, name: str) -> bytes:
    if fault := fault_of(path):
        is_missing = fault.startswith(MISSING)
        file = "which" if printable(path) in name else f"whose file {printable(path)}"
        got = f"{name}, {file} does not exist" if is_missing else f"{name}: {fault}"
        raise DataError(got, "a picture file", "check the path")
    try:
        return read_plain(path, MAX_BYTES)
    except DataError as error:
        raise DataError(f"{name}: {error.got}", error.expected, error.do) from error


def _size(image: Image.Image) -> str:
    return f"{image.width} × {image.height} pixels (width × height)"


def _check_header(image: Image.Image, name: str) -> None:
    """Refuse an image for its size or its number of frames, before decoding."""
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, _size(image))
    if min(image.size) < MIN_SIDE:
        raise DataError(
            f"{name} with {_size(image)}",
            f"at least {MIN_SIDE} pixels on each side",
            "take a larger picture; of a data set, remove it",
        )
    # The other frames of an MPO, which many phones write, are depth or a preview; the first is the image.
    # The frames are not counted, because that would read a whole GIF.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        got = f"{name}, a {image.format} of several frames (animated, or of several pages)"
        raise DataError(got, "a still picture", "save the frame that the text describes as a file of its own")


def _too_large(name: str, size: str) -> DataError:
    return DataError(f"{name} with {size}", f"at most {MAX_PIXELS:,} pixels", "scale the picture down")


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) as stored. Pillow gives the upright size of a TIFF before it decodes it and drops the tag."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and _orientation(image) in (5, 6, 7, 8):
        return image.tag_v2[TiffImagePlugin.IMAGELENGTH], image.tag_v2[TiffImagePlugin.IMAGEWIDTH]
    return image.height, image.width


def _upright(image: Image.Image) -> Image.Image:
    """Turn a decoded image upright. ImageOps.exif_transpose also writes metadata, which fails on odd ones."""
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_rgb(image, name)
    if image.mode == "LAB":
        got = f"{name} in the mode {image.mode!r}"
        raise DataError(got, "RGB, grey, a palette or CMYK", "save it as RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image  # Pillow converts premultiplied grey to LA alone
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _grey_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Scale grey of more than 8 bits to 8 bits: 65535, or 1.0 of a float image, becomes 255."""
    grey = np.asarray(image).astype(np.float64)
    low, high = grey.min(), grey.max()
    if not (low >= 0 and high <= 65535):  # also true of NaN
        got = f"{name}, mode {image.mode!r} with values from {low:g} to {high:g}"
        raise DataError(got, "grey from 0 to 65535", "save it with 8 or 16 bits per pixel")
    if image.mode.startswith("I;16") or high > 255:
        grey /= 257  # in place, because the largest image takes 0.8 GB here
    elif image.mode == "F" and high <= 1:
        grey *= 255
    return Image.fromarray(np.rint(grey, out=grey).astype(np.uint8)).convert("RGB")
