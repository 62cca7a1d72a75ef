"""Pictures: what decodes to which pixels, and what each refusal says."""

from __future__ import annotations

import base64
import hashlib
import os
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile

from lavender.data import images
from lavender.data.images import image_id, load_image, picture_size, stored_orientation
from lavender.errors import DataError
from lavender.files import IMAGE_FORMATS

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
    assert f"a folder, not a file: {tmp_path}" in refusal(tmp_path)
    (tmp_path / "empty.png").touch()
    assert "which is empty (0 bytes)" in refusal(tmp_path / "empty.png")
    assert "which is empty (0 bytes)" in refusal(b"")
    assert "neither bytes nor path" in refusal({"bytes": None, "path": None})


def test_not_a_picture():
    message = refusal(b"<html>404 not found</html>")
    assert "26 bytes that are no picture of a known format, or only its beginning. Expected one of PNG, JPEG" in message
    assert "Do this: repair or replace the file" in message


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated(form, tolerant, monkeypatch):
    """Also where another library has told Pillow to decode truncated files."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    content = encoded(noise(67, 61), form)
    message = refusal(content[: len(content) // 2])
    assert "cannot be decoded" in message or "only its beginning" in message
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


def test_threads_decode_under_settings_that_are_restored(monkeypatch):
    """48 threads at once: every truncated file is refused, and the process has its settings again."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    filters = warnings.filters[:]
    whole = encoded(noise(67, 61), "JPEG")
    start = threading.Barrier(48)

    def is_refused(index: int) -> bool:
        start.wait()
        try:
            load_image(whole if index % 2 else whole[: len(whole) // 2], "a")
        except DataError:
            return True
        return False

    with ThreadPoolExecutor(48) as pool:
        assert list(pool.map(is_refused, range(48))) == [True, False] * 24
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert warnings.filters == filters


def test_a_child_of_a_process_that_decodes_has_pillows_own_settings(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    settings = images._SettingsOfPillow()
    settings.__enter__()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    settings._restore_in_child()  # as after a fork: the thread that decoded is not in the child
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    with settings:
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("form", ["TIFF", "JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_of_turned_files(form, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a"
    path.write_bytes(encoded(noise(40, 30), form, exif=exif))
    upright = load_image(path, "a")
    assert picture_size(path, "a") == (upright.height, upright.width) == ((40, 30) if orientation > 4 else (30, 40))
    assert stored_orientation(path, "a") == (orientation, (30, 40))


def test_several_frames():
    frames = [noise(), Image.new("RGB", (13, 11), RED), Image.new("RGB", (13, 11), BLUE)]
    message = refusal(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert "a GIF of several frames" in message
    assert "Expected a still picture" in message
    assert "a WEBP of several frames" in refusal(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
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


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n0 0 64 64 rectfill\nshowpage\n%%EOF\n"


def test_an_eps_starts_no_program(tmp_path, monkeypatch):
    """Pillow gives it to Ghostscript, whatever the ending of its name."""
    started, program = tmp_path / "started", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho ran >> {started}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "a.png").write_bytes(EPS)
    opened = Image.open(BytesIO(EPS))
    for source in (EPS, tmp_path / "a.png", {"bytes": EPS, "path": "a.png"}):
        assert "no picture of a known format" in refusal(source)
    assert "an EPS not yet decoded" in refusal(opened)
    assert not started.exists()


@pytest.mark.parametrize("form", ["ICO", "TGA", "PCX", "JPEG2000", "PDF", "SGI", "DDS"])
def test_formats_that_are_not_named_are_refused(form):
    assert "Expected one of PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM" in refusal(encoded(noise(32, 32), form))


@pytest.mark.parametrize("form", IMAGE_FORMATS)
def test_formats_that_are_named_are_read(form):
    assert load_image(encoded(noise(), form), "a").size == (13, 11)


def test_what_is_no_plain_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    assert "a pipe, not a file" in refusal(tmp_path / "pipe.png")
    assert "a device, not a file" in refusal(tmp_path / "zero.png")
    assert "links that lead in a circle" in refusal(str(tmp_path / "loop.png"))
    assert "a name too long for a file" in refusal(tmp_path / ("x" * 300))
    assert "a name that no file can have" in refusal("a\0b")
    assert "which is a int" in refusal({"bytes": None, "path": 5})


def test_files_larger_than_the_limit_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 300 * 2**30)
    assert "Expected at most 1,073,741,824 bytes" in refusal(tmp_path / "sparse.png")
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    assert "Expected at most 100 bytes" in refusal(encoded(noise()))


def test_a_jpeg_of_very_many_passes_is_refused(monkeypatch):
    content = encoded(noise(64, 64), "JPEG", progressive=True)
    assert load_image(content, "a").size == (64, 64)
    monkeypatch.setattr(images, "_MAX_JPEG_WORK", 64 * 64 * 3)
    assert "a JPEG of 64 × 64 pixels (width × height) in" in refusal(content)


def test_lab_is_refused_by_its_name():
    assert "in the mode 'LAB'" in refusal(encoded(Image.new("LAB", (11, 13)), "TIFF"))


def test_nothing_of_the_metadata_stays():
    """Else an orientation would be applied once more, by whoever looks at the loaded picture."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "s3cret"
    loaded = load_image(encoded(noise(), "JPEG", exif=exif, comment=b"hi", dpi=(72, 72)), "a")
    assert loaded.size == (11, 13)
    assert loaded.info == {}
    assert not loaded.getexif()
    source = noise()
    source.info["dpi"] = (1, 1)
    load_image(source, "a")
    assert source.info == {"dpi": (1, 1)}


def test_odd_metadata_harm_no_pixel():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 100
    content = exif.tobytes()
    assert load_image(encoded(noise(), "JPEG", exif=content), "a").size == (11, 13)
    assert load_image(encoded(noise(), "JPEG", exif=content[:40]), "a").size == (11, 13)
    exif[0x0112] = 99
    assert load_image(encoded(noise(), "JPEG", exif=exif), "a").size == (13, 11)


def test_embedded_pictures():
    content = encoded(noise())
    code = base64.b64encode(content).decode()
    assert images.embedded(code) == images.embedded(f"data:image/png;base64,{code}") == content
    assert images.embedded("train/0001.png") is None
    assert images.embedded("A" * 400) is None  # base64, but of no picture
    with pytest.raises(ValueError, match="which holds no base64"):
        images.embedded("data:text/plain,hello")
