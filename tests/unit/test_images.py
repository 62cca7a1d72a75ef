"""Pictures: what decodes to which pixels, and what each refusal says."""

from __future__ import annotations

import hashlib
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from lavender import images
from lavender.errors import DataError
from lavender.images import image_id, load_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(width: int = 13, height: int = 11) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def refusal(source, name: str = "cats.csv line 3") -> str:
    with pytest.raises(DataError) as caught:
        load_image(source, name)
    assert "cats.csv line 3" in str(caught.value)
    return str(caught.value)


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    image = noise()
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    structs = [{"bytes": encoded(image), "path": "gone.png"}, {"bytes": None, "path": str(path)}]
    for source in (image, path, str(path), encoded(image), *structs):
        loaded = load_image(source, "a")
        assert loaded.mode == "RGB"
        assert loaded.tobytes() == image.tobytes()


def test_orientation_is_applied_once():
    image = Image.new("RGB", (13, 11), BLUE)
    image.paste(RED, (0, 0, 13, 3))  # red at the top of the stored picture
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90°: what is stored on top is seen on the right
    upright = load_image(encoded(image, exif=exif), "a")
    assert upright.size == (11, 13)
    assert upright.getpixel((10, 6)) == RED
    assert upright.getpixel((0, 6)) == BLUE
    assert load_image(upright, "a").tobytes() == upright.tobytes()


def test_transparency_lies_on_white():
    half_red = Image.new("RGBA", (11, 13), (255, 0, 0, 128))
    assert load_image(encoded(half_red), "a").getpixel((0, 0)) == (255, 127, 127)
    clear_grey = Image.new("LA", (11, 13), (10, 0))
    assert load_image(encoded(clear_grey), "a").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (11, 13), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert load_image(encoded(palette, transparency=1), "a").getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(palette), "a").getpixel((0, 0)) == (9, 9, 9)
    assert load_image(clear_grey.convert("La"), "a").getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_is_converted():
    assert load_image(encoded(Image.new("CMYK", (11, 13), (0, 255, 255, 0)), "TIFF"), "a").getpixel((0, 0)) == RED


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled_not_clipped(form):
    grey = np.full((11, 13), 257, dtype=np.uint16)
    grey[0, :3] = (0, 100 * 257, 65535)
    loaded = load_image(encoded(Image.fromarray(grey), form), "a")
    assert [loaded.getpixel((x, 0)) for x in range(4)] == [(0, 0, 0), (100, 100, 100), (255, 255, 255), (1, 1, 1)]


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int32, (0, 200, 255), (0, 200, 255)),
        (np.int32, (0, 514, 65535), (0, 2, 255)),
        (np.float32, (0, 0.2, 1.0), (0, 51, 255)),
        (np.float32, (0, 51, 102), (0, 51, 102)),
        (np.float32, (0, 514, 65535), (0, 2, 255)),
    ],
)
def test_wide_grey(dtype, values, expected):
    grey = np.zeros((11, 13), dtype=dtype)
    grey[0, :3] = values
    loaded = load_image(Image.fromarray(grey), "a")
    assert tuple(np.asarray(loaded)[0, :3, 0]) == expected


def test_grey_out_of_range_is_refused():
    assert "mode 'F' with values from -2 to -2" in refusal(Image.fromarray(np.full((11, 13), -2, np.float32)))
    assert "from nan to nan" in refusal(Image.fromarray(np.full((11, 13), np.nan, np.float32)))
    assert "mode 'I' with values from 65536 to 65536" in refusal(Image.fromarray(np.full((11, 13), 65536, np.int32)))


def test_missing_and_empty(tmp_path):
    assert f"{tmp_path / 'no.png'} does not exist" in refusal(tmp_path / "no.png")
    assert "does not exist" in refusal(tmp_path)
    (tmp_path / "empty.png").touch()
    assert "which is empty (0 bytes)" in refusal(tmp_path / "empty.png")
    assert "which is empty (0 bytes)" in refusal(b"")
    assert "neither bytes nor path" in refusal({"bytes": None, "path": None})


def test_not_a_picture():
    message = refusal(b"<html>404 not found</html>")
    assert "which is no picture, or only its beginning: it begins with b'<html>40'" in message
    assert "Do this: repair or replace the file" in message


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated(form):
    content = encoded(noise(67, 61), form)
    message = refusal(content[: len(content) // 2])
    assert "cannot be decoded" in message or "begins with" in message


def test_several_frames():
    frames = [noise(), Image.new("RGB", (13, 11), RED), Image.new("RGB", (13, 11), BLUE)]
    message = refusal(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert "a GIF of 3 frames" in message
    assert "Expected a still picture" in message
    assert "a WEBP of 3 frames" in refusal(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    phone = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert load_image(phone, "a").size == (13, 11)


def test_size_limits(monkeypatch):
    message = refusal(encoded(noise(7, 13)))
    assert "7 × 13 pixels (width × height)" in message
    assert "at least 8 pixels" in message
    assert load_image(noise(8, 8), "a").size == (8, 8)
    monkeypatch.setattr(images, "MAX_PIXELS", 13 * 11 - 1)
    assert "13 × 11 pixels" in refusal(encoded(noise()))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds no pixel: only a check before decoding can refuse it for its size."""
    content = bytearray(encoded(noise()))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("width", [10_001, 20_000], ids=["Pillow warns", "Pillow refuses"])
def test_a_decompression_bomb_is_refused_by_its_header(width):
    message = refusal(png_header(width, 10_000))
    assert "at most 100,000,000 pixels" in message
    assert "scale the picture down" in message


def test_image_id_is_of_size_and_pixels():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (1, 2, 3))
    assert image_id(image) == hashlib.blake2b(b"2x1:\0\0\0\1\2\3", digest_size=16).hexdigest()
    assert image_id(noise()) == image_id(load_image(encoded(noise()), "another name"))
    assert image_id(Image.new("RGB", (2, 3))) != image_id(Image.new("RGB", (3, 2)))
    with pytest.raises(ValueError, match="mode 'L'; expected RGB"):
        image_id(Image.new("L", (2, 3)))
