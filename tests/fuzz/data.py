"""Odd rows, files, pictures and annotations: each is read, or dropped by name, or one DataError, and soon.

`try_all` runs seeded cases in a process of its own, which is killed if a case takes too long. There an audit hook
sees whatever starts a program, opens a connection or writes outside the folder.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 20.0
"""Seconds after which a case counts as a hang."""
SECRET = "s3cret"
"""Stands in each file outside of the data folder, and may stand in no message."""
_MEMORY = 8 * 2**30


def try_all(count: int, seed: int, work: Path) -> list[str]:
    """What went wrong in `count` seeded cases; [] when all hold. `work` is an empty folder to write into."""
    bad, start = [], 0
    while start < count:
        start = _run_some(start, count, seed, work, bad)
    return bad


def _run_some(start: int, count: int, seed: int, work: Path, bad: list[str]) -> int:
    """Cases from `start` on, until all are done or one takes the process along; where to go on."""
    command = [sys.executable, "-P", "-W", "ignore", __file__, str(start), str(count), str(seed), str(work)]
    with (
        (work / "errors.txt").open("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as child,
    ):
        assert child.stdout is not None
        at, said = start - 1, ""
        deadline = time.monotonic() + 300  # the imports, also on a busy machine
        while select.select([child.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
            line = child.stdout.readline().decode()
            if not line:
                break
            deadline = time.monotonic() + LIMIT
            if line.startswith("case "):
                _, number, said = line.rstrip("\n").split(" ", 2)
                at = int(number)
            elif line.startswith("bad "):
                bad.append(f"seed {seed} case {at} ({said}): {line[4:].strip()}")
            elif line.startswith("done"):
                child.wait(60)
                return count
        hung = child.poll() is None and time.monotonic() >= deadline
        child.kill()
        child.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
        bad.append(f"seed {seed} case {at} ({said}): {'hangs' if hung else f'ends the process: {last}'}")
        return at + 1 if at >= start else count


Case = Callable[[random.Random, Path], str]
"""Does one thing in a folder; "" where it holds, else what is wrong."""


def _odd_values(rng: random.Random, outside: Path) -> list[Any]:
    deep: Any = []
    for _ in range(rng.choice((3, 300, 900))):
        deep = [deep]
    return [
        None,
        "",
        " ",
        0,
        5,
        -1,
        1.5,
        True,
        math.nan,
        math.inf,
        10**30,
        [],
        {},
        [None],
        [[]],
        [""],
        ["a.png"],
        ["a.png"] * 2,
        {"a": 1},
        {"bytes": None, "path": None},
        {"bytes": "x"},
        {"bytes": [1, 2]},
        {"path": 5},
        {"path": str(outside)},
        "a.png",
        "no.png",
        "f.png",
        "d.png",
        "loop.png",
        "zero.png",
        "out.png",
        "../outside.png",
        str(outside),
        "~/a.png",
        "~nobody-here/a.png",
        "x" * 300 + ".png",
        "x/" * 3000,
        "a\0.png",
        "\ud800",
        "A dog \ud83d here.",
        "\udcff.png",
        ".",
        "..",
        "a.png/",
        "http://x/y.png",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "data:,",
        "data:image/png;base64,@",
        "/9j/" + "A" * 96,
        "iVBORw0KGgo" + "A" * 93,
        "[",
        "[" * 50_000,
        '["a.png"]',
        '["A dog.", "A cat."]',
        "['A dog.']",
        "9" * 5000,
        "A dog.",
        "d" * 100_000,
        "A\u2028dog",
        "A\x0cdog\x85here",
        "<image>",
        "<image>" * 3,
        "{{ 7*7 }}",
        "\x1b[31m",
        "\n",
        deep,
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}],
        [{"role": ["user"], "content": "x"}],
        [{"role": {}, "content": "x"}],
        [{"role": "user", "content": [{"type": ["text"]}]}],
    ]


def _row(rng: random.Random, odd: list[Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if rng.random() < 0.9:
        row[rng.choice(("image", "images", "file_name"))] = "a.png" if rng.random() < 0.4 else rng.choice(odd)
    for _ in range(rng.choice((1, 1, 2))):
        column = rng.choice(
            ("text", "caption", "messages", "conversations", "prompt", "completion", "system", "instruction", "output")
        )
        if column in ("messages", "conversations") and rng.random() < 0.6:
            row[column] = [_turn(rng, odd) for _ in range(rng.randrange(5))]
        else:
            row[column] = rng.choice(odd)
    if rng.random() < 0.2:
        pair = {
            "word": rng.choice(("dog", "a dog", rng.choice(odd))),
            "about": rng.choice(("cat", "a", rng.choice(odd))),
        }
        row["about"] = rng.choice(
            ([pair], [pair, pair], {"dog": "cat"}, json.dumps([pair], default=str), rng.choice(odd))
        )
    if rng.random() < 0.1:
        row[rng.choice(("video", "videos", "tools", "", "x", "\0", "\ud800"))] = rng.choice(odd)
    return row


def _turn(rng: random.Random, odd: list[Any]) -> Any:
    role = rng.choice(
        ("user", "assistant", "user", "assistant", "system", "human", "gpt", "tool", None, 5, ["user"], {})
    )
    parts = (
        {"type": "text", "text": "A dog."},
        {"type": "image"},
        {"type": "image", "index": rng.choice(odd)},
        {"type": "image", rng.choice(("image", "path", "url", "base64")): rng.choice(odd)},
        {"type": "image_url", "image_url": rng.choice(("a.png", {"url": rng.choice(odd)}, rng.choice(odd)))},
        {"type": "video"},
        {"type": "text", "text": rng.choice(odd)},
        {"type": rng.choice(odd)},
    )
    content = rng.choice(("A dog.", "<image>A cat?", rng.choice(odd), [rng.choice(parts) for _ in range(3)]))
    return rng.choice(({"role": role, "content": content}, {"from": role, "value": content}, rng.choice(odd)))


def _folder(rng: random.Random, folder: Path) -> Path:
    """Pictures of every kind, and a file beside the folder that is none of its business."""
    from PIL import Image

    data, outside = folder / "data", folder / "outside.png"
    (data / "d.png").mkdir(parents=True)
    Image.new("RGB", (9, 11), (rng.randrange(256), 2, 3)).save(data / "a.png")
    beginning = rng.choice(
        (b"root:x:0:0:", b"P5\n", b"P2 9 9 ", b"II*\0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"%!PS-")
    )
    outside.write_bytes(beginning + SECRET.encode() * 20)
    os.mkfifo(data / "f.png")
    os.symlink("loop.png", data / "loop.png")
    os.symlink("/dev/zero", data / "zero.png")
    os.symlink("../outside.png", data / "out.png")
    return outside


def _accounted(path: Path, number: int | None) -> str:
    """Read a data set, and count its rows: each is a sample or a drop."""
    from lavender.data.samples import read_samples, readable, to_dataset
    from lavender.errors import DataError

    try:
        samples = read_samples(path)
        names = {one.name.split(" caption ")[0] for one in samples} | {one.what for one in samples.dropped}
        if number is not None and len(names) != number:
            return f"{len(names)} of {number} rows are accounted for"
        faults = [said for one in samples.dropped if (said := _unfit(f"{one.what}: {one.reason}"))]
        if faults:
            return faults[0]
        kept = readable(samples)
        if len(kept) + len(kept.dropped) != len(samples) + len(samples.dropped):
            return "readable loses samples"
        to_dataset(kept)
        return next((said for one in kept.dropped if (said := _unfit(one.reason))), "")
    except DataError as error:
        return _unfit(str(error), path.name)


def _unfit(message: str, name: str = "") -> str:
    """What a message must not be."""
    if SECRET in message:
        return f"quotes a file outside: {message[:200]!r}"
    if len(message) > 3000 or not message.isprintable():
        return f"a message of {len(message)} characters, some perhaps unprintable: {message[:200]!a}"
    return "" if name in message else f"an error without the name of the file: {message[:200]!r}"


def rows(rng: random.Random, folder: Path) -> str:
    """A good row and some odd ones, in each format."""
    odd = _odd_values(rng, _folder(rng, folder))
    made = [{"image": "a.png", "text": "A dog."}, *(_row(rng, odd) for _ in range(rng.randrange(1, 4)))]
    kind = rng.choice(("jsonl", "jsonl", "json", "csv", "parquet"))
    path, number = folder / "data" / f"rows.{kind}", len(made)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
    elif kind == "json":
        path.write_text(json.dumps(made))
    elif kind == "csv":
        columns = list(dict.fromkeys(key for row in made for key in row))
        with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            table = csv.writer(file)
            table.writerow(columns)
            table.writerows(
                [one if isinstance(one := row.get(key, ""), str) else json.dumps(one) for key in columns]
                for row in made
            )
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            pq.write_table(pa.Table.from_pylist(made[1:2]), path)
        except Exception:  # what Arrow cannot hold is in no file
            return ""
        number = 1
    return _accounted(path, number)


def lines(rng: random.Random, folder: Path) -> str:
    """Raw lines, among which one is as they should not be."""
    _folder(rng, folder)
    good = '{"image": "a.png", "text": "A dog."}'
    half = good[: rng.randrange(1, len(good))]
    odd = rng.choice(
        (
            '{"image": "a.png", "text": ' + "9" * 5000 + "}",
            "[" * 100_000,
            '{"a": ' * 50_000,
            '{"image": NaN, "text": "x"}',
            '{"image": "a.png", "image": "b.png", "text": "x"}',
            "5",
            "null",
            "[1]",
            "\ufeff{}",
            "\0",
            half,
            "'",
            '"',
            '{"image": "a.png", "text": 1e999999}',
            '{"image": "a.png", "messages": "' + "[" * 60_000 + '"}',
            '{"a": "\\ud800"}',
            '{"image": "a.png", "text": "a\u2028dog"}',
            '{"image": "a.png", "text": "' + "a dog " * 300_000 + '"}',
        )
    )
    kind = rng.choice(("jsonl", "jsonl", "json", "csv"))
    path = folder / "data" / f"lines.{kind}"
    if kind == "jsonl":
        content, number = f"{good}\n{odd}\n{good}\n", 3
    elif kind == "json":
        content, number = f"[{good},{odd},{good}]", None
    else:
        content, number = f"image,text\na.png,A dog.\na.png,{odd}\na.png,A cat.\n", None
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"))
    path.write_bytes(content.encode(encoding, "surrogatepass"))
    return _accounted(path, number if encoding.startswith("utf-8") else None)


def damaged(rng: random.Random, folder: Path) -> str:
    """A table whose bytes were changed or cut; a folder of shards, of which some are missing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _folder(rng, folder)
    kind = rng.choice(("jsonl", "json", "csv", "parquet", "shards"))
    path = folder / "data" / f"damaged.{kind}"
    table = {"image": ["a.png"] * 20, "text": [f"A dog {index}, “very” small." for index in range(20)]}
    made = [{key: table[key][index] for key in table} for index in range(20)]
    if kind == "shards":
        count = rng.randrange(2, 6)
        kept = rng.sample(range(count), rng.randrange(1, count + 1))
        for index in kept:
            pq.write_table(pa.table(table), folder / "data" / f"x-{index:05}-of-{count:05}.parquet")
        return _accounted(folder / "data", 20 * count)  # all of them, or an error
    if kind == "parquet":
        pq.write_table(pa.table(table), path)
    elif kind == "csv":
        path.write_text("image,text\n" + "".join(f'"{row["image"]}","{row["text"]}"\n' for row in made))
    else:
        path.write_text(json.dumps(made) if kind == "json" else "".join(json.dumps(row) + "\n" for row in made))
    path.write_bytes(content := _changed(rng, path.read_bytes()))
    number = len([one for one in content.replace(b"\r", b"\n").split(b"\n") if one.strip(b" \t\v\f\x1c\x1d\x1e\x1f")])
    exact = kind == "jsonl" and content[:2] not in (b"\xff\xfe", b"\xfe\xff") and b"\xc2" not in content
    return _accounted(path, number if exact else None)


def _changed(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    if rng.random() < 0.3:
        return bytes(changed[: rng.randrange(len(changed))])
    for _ in range(rng.choice((1, 1, 3, 20))):
        changed[rng.randrange(len(changed))] = rng.choice((0, 10, 34, 44, 255, rng.randrange(256)))
    return bytes(changed)


def special(rng: random.Random, folder: Path) -> str:
    """Paths that are no plain files, as data and as pictures."""
    outside = _folder(rng, folder)
    kind, place = rng.choice(("jsonl", "json", "csv", "parquet")), rng.choice(("file", "folder", "picture"))
    path = folder / "data" / (f"x.{kind}" if place == "file" else f"metadata.{kind.replace('json', 'jsonl')[:5]}")
    if kind == "parquet" and place != "file":
        path = path.with_name("metadata.parquet")
    if place == "picture":
        from lavender.data.images import load_image
        from lavender.errors import DataError

        name = rng.choice(("f.png", "loop.png", "zero.png", "d.png", "out.png", "x" * 300, "a\0b", "\ud800"))
        source: Any = rng.choice((folder / "data" / name, str(folder / "data" / name), {"bytes": None, "path": name}))
        try:
            load_image(source, "the picture")
        except DataError as error:
            return _unfit(str(error), "the picture" if name != "\ud800" else "")
        return "a picture that is none is read"
    match rng.choice(("pipe", "folder", "loop", "zero", "dangling", "sparse", "secret", "empty")):
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "loop":
            os.symlink(path.name, path)
        case "zero":
            os.symlink("/dev/zero", path)
        case "dangling":
            os.symlink("nowhere", path)
        case "secret":
            os.symlink(outside, path)
        case "sparse":
            path.touch()
            os.truncate(path, 300 * 2**30)
        case "empty":
            path.touch()
    said = _accounted(path if place == "file" else path.parent, None)
    return "" if "without the name" in said and place == "folder" else said


def pictures(rng: random.Random, folder: Path) -> str:
    """Pictures of each format and mode, damaged; headers that promise much; formats that start programs."""
    from PIL import Image

    from lavender.data.images import load_image
    from lavender.errors import DataError

    form, mode = rng.choice(
        (
            ("PNG", "RGB"),
            ("PNG", "RGBA"),
            ("PNG", "P"),
            ("PNG", "LA"),
            ("PNG", "I;16"),
            ("PNG", "1"),
            ("JPEG", "RGB"),
            ("JPEG", "CMYK"),
            ("JPEG", "L"),
            ("WEBP", "RGB"),
            ("WEBP", "RGBA"),
            ("GIF", "P"),
            ("BMP", "RGB"),
            ("BMP", "P"),
            ("TIFF", "RGB"),
            ("TIFF", "CMYK"),
            ("TIFF", "F"),
            ("TIFF", "I;16B"),
            ("TIFF", "LAB"),
            ("TIFF", "I"),
            ("PPM", "RGB"),
            ("PPM", "L"),
            ("ICO", "RGB"),
            ("TGA", "RGB"),
            ("EPS", "RGB"),
            ("PDF", "RGB"),
            ("JPEG2000", "RGB"),
            ("MPO", "RGB"),
        )
    )
    size = rng.choice(((64, 48), (64, 48), (9, 11), (1, 1), (3000, 8)))
    image = (
        Image.new(mode, size)
        if mode in ("LAB", "F", "I", "I;16", "I;16B")
        else Image.effect_noise(size, 90).convert(mode)
    )
    buffer = io.BytesIO()
    options: dict[str, Any] = (
        {"save_all": True, "append_images": [image]}
        if form in ("GIF", "WEBP", "TIFF", "MPO") and rng.random() < 0.3
        else {}
    )
    exif = Image.Exif()
    exif[0x0112] = rng.choice((1, 3, 6, 8, 9, 0))
    try:
        image.save(buffer, form, exif=exif.tobytes(), **options)
    except (TypeError, OSError, ValueError):  # this format takes no EXIF, or not this mode or size
        buffer = io.BytesIO(b"no picture")
    content = buffer.getvalue()
    if rng.random() < 0.7:
        content = _changed(rng, content)
    if rng.random() < 0.2:
        content = _promising(rng)
    try:
        loaded = load_image(content, "the picture")
    except DataError as error:
        return _unfit(str(error), "the picture")
    return "" if loaded.mode == "RGB" and min(loaded.size) >= 8 else f"{loaded}"


def _promising(rng: random.Random) -> bytes:
    """Headers of pictures far larger than their files."""
    import struct
    import zlib

    wide, high = rng.choice(((10**5, 10**5), (65535, 65535), (20_000, 6000), (2**31 - 1, 2), (9999, 9999)))
    head = struct.pack(">IIBBBBB", wide, high, 8, 6, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    tags = [
        (256, 4, 1, wide),
        (257, 4, 1, high),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (279, 4, 1, 9),
    ]
    tiff = (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + b"\0" * 4
    )
    return rng.choice(
        (
            png,
            tiff,
            f"P6 {wide} {high} 255\n".encode(),
            f"P3 {wide} {high} 65535\n".encode() + b"1 " * 99,
            f"P4 {wide} {high}\n".encode(),
            b"GIF89a"
            + struct.pack("<HHBBB", wide & 0xFFFF, high & 0xFFFF, 0, 0, 0)
            + b",\0\0\0\0"
            + b"\xff\xff\xff\xff\0\x08\0;",
            b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, wide, high, 1, 24, 0, 0, 0, 0, 0, 0) + b"\0" * 50,
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n",
        )
    )


def _odd_node(rng: random.Random) -> Any:
    return rng.choice(
        (
            None,
            -1,
            0,
            2**70,
            1.5,
            math.nan,
            "",
            "x",
            "../../outside.png",
            "/etc/passwd",
            "a\0b",
            "\ud800",
            "x" * 300,
            [],
            {},
            [[]],
            [None],
            True,
            {"id": []},
        )
    )


def _replaced(rng: random.Random, node: Any) -> Any:
    """A copy of a JSON tree with one node made odd, lost, or there twice."""
    if isinstance(node, (dict, list)) and node and rng.random() < 0.85:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        copy = dict(node) if isinstance(node, dict) else list(node)
        if rng.random() < 0.1:
            del copy[key]
        elif isinstance(copy, list) and rng.random() < 0.1:
            copy.append(copy[key])
        else:
            copy[key] = _replaced(rng, node[key])
        return copy
    return _odd_node(rng)


def coco(rng: random.Random, folder: Path) -> str:
    """COCO's files with one thing in them changed."""
    import numpy as np
    from PIL import Image

    from lavender.errors import DataError
    from lavender.teachers.annotations.coco import CocoPanoptic

    _folder(rng, folder)
    annotations = folder / "annotations"
    for name in ("annotations/panoptic_val2017", "val2017"):
        (folder / name).mkdir(parents=True)
    mask = np.zeros((11, 9, 3), np.uint8)
    mask[2:5, 3:7, 0] = 7
    Image.fromarray(mask).save(annotations / "panoptic_val2017" / "1.png")
    Image.new("RGB", (9, 11)).save(folder / "val2017" / "1.jpg")
    panoptic: Any = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 11, "width": 9}],
        "annotations": [
            {"image_id": 1, "file_name": "1.png", "segments_info": [{"id": 7, "category_id": 3, "area": 12}]}
        ],
        "categories": [{"id": 3, "name": "dog", "isthing": 1}, {"id": 4, "name": "wall-tile", "isthing": 0}],
    }
    captions: Any = {
        "annotations": [{"id": 1, "image_id": 1, "caption": "A dog."}, {"id": 2, "image_id": 1, "caption": "A wall."}]
    }
    which = rng.choice(("panoptic", "captions", "mask", "bytes"))
    if which == "panoptic":
        panoptic = _replaced(rng, panoptic)
    if which == "captions":
        captions = _replaced(rng, captions)
    (annotations / "panoptic_val2017.json").write_text(json.dumps(panoptic))
    (annotations / "captions_val2017.json").write_text(json.dumps(captions))
    if which in ("mask", "bytes"):
        path = annotations / (
            "panoptic_val2017/1.png"
            if which == "mask"
            else rng.choice(("panoptic_val2017.json", "captions_val2017.json"))
        )
        path.write_bytes(_changed(rng, path.read_bytes()))
    try:
        return _read_layout(CocoPanoptic(annotations / "panoptic_val2017.json"))
    except DataError as error:
        return _unfit(str(error))


def entities(rng: random.Random, folder: Path) -> str:
    """The files of Flickr30k Entities with one thing in them changed."""
    from PIL import Image

    from lavender.errors import DataError
    from lavender.teachers.annotations.flickr import Flickr30kEntities

    for name in ("Sentences", "Annotations", "images"):
        (folder / name).mkdir()
    Image.new("RGB", (9, 11)).save(folder / "images" / "1.jpg")
    mark = "[/EN#5/animals A dog]"
    sentence = rng.choice(
        (
            f"{mark} runs .",
            f"{mark} runs\u2028on and\x85on\x0c .",
            "[/EN#",
            "[/EN#1/" * 50_000,
            mark * 3000,
            "[" * 99,
            "\0",
        )
    )
    number = rng.choice(("2", "2", "nan", "inf", "-1e400", "1e300", "-5", "", "9" * 5000, "0x1"))
    box = f"<bndbox><xmin>1</xmin><ymin>{number}</ymin><xmax>4</xmax><ymax>5</ymax></bndbox>"
    thing = f"<object><name>5</name>{box}</object>" * rng.choice((1, 1, 1, 2000))
    head = rng.choice(
        ("", "", "", '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>', "<a>" * 50_000)
    )
    size = f"<size><width>9</width><height>{rng.choice(('11', '11', number))}</height></size>"
    xml = f"{head}<annotation>{size}{thing}</annotation>"
    (folder / "Sentences" / "1.txt").write_text(sentence + "\n" + "A cat .\n")
    (folder / "Annotations" / "1.xml").write_text(xml)
    (folder / "train.txt").write_text(rng.choice(("1\n", "1\n../../outside\n", "\0\n", "x" * 300 + "\n1\n")))
    if rng.random() < 0.4:
        path = folder / rng.choice(("Sentences/1.txt", "Annotations/1.xml", "train.txt"))
        path.write_bytes(_changed(rng, path.read_bytes()))
    try:
        return _read_layout(Flickr30kEntities(folder, split=rng.choice((None, "train", "val"))))
    except DataError as error:
        return _unfit(str(error))


def _read_layout(layout: Any) -> str:
    from lavender.errors import DataError
    from lavender.teachers.annotations.regions import cell_shares

    samples = layout.samples()
    for sample in samples:
        try:
            marked = layout.read(layout.key(sample.source))
            if all(0 < side < 10_000 for side in marked.size):
                for _, region in marked.find(sample.answers[0]).words:
                    cell_shares(region, marked.size, (4, 4))
        except DataError as error:
            if said := _unfit(str(error)):
                return said
    return next((said for one in samples.dropped if (said := _unfit(f"{one.what}: {one.reason}"))), "")


def _tar(rng: random.Random, path: Path, keys: list[str]) -> None:
    """A webdataset whose samples have odd files."""
    import tarfile

    with tarfile.open(path, "w") as archive:
        for key in keys:
            for ending in rng.sample(("jpg", "PNG", "txt", "json", "0.png", "cls", "txt", "\udcff", "x" * 200), 3):
                content = rng.choice((b"", b"A dog.", b"\xff", b"{", b"[" * 50_000, b'{"text": 5, "image": "a.png"}'))
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                info.type = rng.choice((tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE))
                archive.addfile(info, io.BytesIO(content))


def published(rng: random.Random, folder: Path) -> str:
    """Published layouts with odd values: webdataset, img2dataset, Karpathy's JSON, texts beside pictures; a recipe."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lavender.data.recipes import RECIPES, Settings, prepare
    from lavender.errors import DataError

    odd, data = _odd_values(rng, _folder(rng, folder)), folder / "data"
    kind = rng.choice(("tar", "tar", "img2dataset", "karpathy", "texts"))
    path = data
    if kind == "tar":
        path = data / "x.tar"
        _tar(rng, path, [rng.choice(("0", "a/b", "é", "..", "0")) for _ in range(4)])
        path.write_bytes(_changed(rng, path.read_bytes()) if rng.random() < 0.5 else path.read_bytes())
    elif kind == "img2dataset":
        table: list[dict[str, Any]] = [{"key": f"{key}", "status": "success", "caption": "A dog."} for key in range(3)]
        table[0] |= {"status": rng.choice(("failed", None, "\n")), "caption": None}
        pq.write_table(pa.Table.from_pylist(table), data / "00000.parquet")
        _tar(rng, data / "00000.tar", ["0", "1", "3"])
    elif kind == "karpathy":
        path = data / "dataset_coco.json"
        image = {"filename": "a.png", "split": "train", "sentences": [{"raw": "A dog."}]}
        images = [image, image | {rng.choice(list(image)): rng.choice(odd)}, rng.choice(odd)]
        path.write_text(json.dumps({"images": images}))
    else:
        (data / "a.txt").write_bytes(rng.choice((b"A dog.", b"\xff", b"", b"\0", b"A " * 2**20)))
        os.symlink(rng.choice((".", "..", "/proc/self", "/dev")), data / "b")
    said = _accounted(path, None)
    if said and "without the name" not in said:
        return said
    try:
        prepare(rng.choice(list(RECIPES)), path, folder / "out", Settings(test_share=0))
    except DataError as error:
        return _unfit(str(error))
    return ""


CASES: tuple[Case, ...] = (rows, rows, lines, damaged, special, pictures, pictures, coco, entities, published)
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "socket.connect")


def _watch(work: Path, seen: list[str]) -> None:
    """Note what starts a program, connects, or writes outside the folder."""
    inside = str(work)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN:
            seen.append(f"{event} {arguments[:2]!r}"[:200])
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)) and arguments[2] is not None:
            path = os.fsdecode(arguments[0])
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not os.path.abspath(path).startswith(inside):
                seen.append(f"writes {path!r}"[:200])

    sys.addaudithook(hook)


def _child(start: int, count: int, seed: int, work: Path) -> None:
    import resource

    import datasets

    from lavender.words import content_words

    datasets.disable_caching()
    content_words("a dog", ("noun",))  # the tagger is loaded once
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    seen: list[str] = []
    _watch(work, seen)
    names = {case: name for name, case in globals().items() if case in CASES}
    for index in range(start, count):
        rng = random.Random(f"{seed}/{index}")
        case = rng.choice(CASES)
        print(f"case {index} {names[case]}", flush=True)
        with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as folder:
            try:
                said = case(rng, Path(folder))
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
        for one in (said, *seen):
            if one:
                print("bad", ascii(one)[:400], flush=True)
        seen.clear()
    print("done", flush=True)


if __name__ == "__main__":
    _child(*(int(one) for one in sys.argv[1:4]), Path(sys.argv[4]))
