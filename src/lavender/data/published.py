"""Rows of published layouts: Karpathy's JSON, webdataset, img2dataset, and texts beside pictures."""

from __future__ import annotations

import codecs
import glob
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavender.data.tables import Row, Wanted, object_row, parquet_rows, unknown_format, unreadable
from lavender.errors import DataError
from lavender.files import JsonError, json_items, open_plain, parse_json, printable, read_plain, shown

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_IMG2DATASET = frozenset(("key", "status", "error_message", "caption", "jpg", "png", "webp"))
_MAX_JSON = 2**33  # bytes: a .json file is held in memory while it is read
_MAX_TEXT = 2**20  # bytes of the text beside a picture


def json_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    """Rows of a JSON list, or of Karpathy's JSON."""
    content, label = read_plain(path, _MAX_JSON), printable(path.name)
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise unreadable(path, "it is UTF-16, by its first two bytes; save it as UTF-8")
    text = content.decode("utf-8-sig", "surrogateescape")  # a byte that is not UTF-8 spoils only its row
    del content
    try:
        if not re.match(r"\s*\[", text):
            yield from _karpathy_rows(path, parse_json(text), wanted.split)
            return
        if wanted.split:
            raise no_split(path, wanted.split)
        for index, (values, fault) in enumerate(json_items(text)):
            name = f"{label} row {index}"
            yield Row(name, {}, fault) if fault else object_row(name, values)
    except JsonError as error:
        raise unreadable(path, error) from error


def no_split(path: Path, split: str, splits: Sequence[str] = ()) -> DataError:
    """The error of a split that is not there."""
    do = "name one of these" if splits else "name a split that is there, or leave :SPLIT out"
    has = ", ".join(splits) or "no such split"
    return DataError(f"the split {shown(split)} of {printable(path)}, which has {has}", "a split of the data", do)


def several_splits(path: Path, splits: Sequence[str]) -> DataError:
    """The error of data with several splits of which none was named."""
    do = f"name one, as {printable(path)}:{splits[0]}"
    return DataError(f"{printable(path)} with the splits {', '.join(splits)}", "one split", do)


def _karpathy_rows(path: Path, content: Any, split: str) -> Iterator[Row]:
    """Rows of dataset_coco.json or dataset_flickr30k.json: a picture and its captions. Splits are joined by +."""
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not any(isinstance(image, dict) and "sentences" in image for image in images):
        raise unknown_format(f"{printable(path)}, a JSON {type(content).__name__} where a list of rows should be")
    splits = sorted({str(image["split"]) for image in images if isinstance(image, dict) and "split" in image})
    if not split and len(splits) > 1:
        raise several_splits(path, splits)
    chosen = split.split("+") if split else splits
    if missing := [one for one in chosen if one not in splits]:
        raise no_split(path, missing[0], splits)
    folders = [path.parent, *(one for one in sorted(path.parent.iterdir()) if one.is_dir())]
    for index, image in enumerate(images):
        name = f"{printable(path.name)} image {index}"
        try:
            if splits and str(image["split"]) not in chosen:
                continue
            captions = [sentence["raw"] for sentence in image["sentences"]]
            inside = Path(image.get("filepath") or "", image["filename"])
        except (KeyError, TypeError, AttributeError) as error:
            yield Row(name, {}, f"not of Karpathy's form: {type(error).__name__} {error}")
            continue
        places = [folder / part for folder in folders for part in (inside, inside.name)]
        at = next((number for number, place in enumerate(places) if os.path.isfile(place)), 0)
        if at > 1:  # the next picture is looked for there first
            folders.insert(0, folders.pop(at // 2))
        yield Row(name, {"image": str(places[at].absolute()), "caption": captions})


def webdataset_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    """Rows of a webdataset .tar file: the columns in a sample's .json, `image` or `images`, and `text`, its .txt."""
    import datasets
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    open_plain(path).close()
    label, files = printable(path.name), {"train": [glob.escape(str(path.absolute()))]}
    try:
        with tempfile.TemporaryDirectory() as cache:  # load_dataset would do the same, and report it to the hub
            stream: Any = WebDataset(data_files=files, cache_dir=cache).as_streaming_dataset(split="train")
        pictures = [name for name, feature in stream.features.items() if isinstance(feature, datasets.Image)]
        for values in stream.decode(False):
            found = [values[name] for name in pictures if values[name] is not None]
            row = {key: value for key, value in (values.get("json") or {}).items() if value is not None} | values
            row |= {"image": found[0]} if len(found) == 1 else {"images": found}
            row |= {} if values.get("txt") is None else {"text": [values["txt"]]}
            yield Row(f"{label} {printable(values['__key__'])}", row)
    except Exception as error:  # on damaged bytes tarfile and the decoders may raise anything
        raise unreadable(path, error) from error


def is_img2dataset(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder has tables of img2dataset, of which each row has a key and the status of its download."""
    import pyarrow.parquet

    table = next((name for name in names if re.fullmatch(r"\d+\.parquet", name)), None)
    if table is None:
        return False
    try:
        return {"key", "status"} <= set(pyarrow.parquet.read_schema(folder / table).names)
    except Exception:  # a damaged file is an error where its rows are read
        return False


def img2dataset_rows(folder: Path, names: Sequence[str], wanted: Wanted) -> Iterator[Row]:
    """Rows of what img2dataset wrote: pictures in folders, tar files or the tables. Failed downloads are faults."""
    for name in names:
        if not re.fullmatch(r"\d+\.parquet", name):
            continue
        tar, files = folder / name.replace(".parquet", ".tar"), folder / name.removesuffix(".parquet")
        pictures = _pictures_in(files)
        waiting: dict[str, None] = {}
        for row in parquet_rows(folder / name, Wanted(_IMG2DATASET | wanted.columns)):
            values = row.values
            key, caption = str(values.get("key")), values.get("caption")
            described = values if caption is None else values | {"caption": [caption]}
            encoded = [values[kind] for kind in ("jpg", "png", "webp") if values.get(kind) is not None]
            if row.fault:
                yield row
            elif values.get("status") != "success":
                yield Row(row.name, {}, f"not downloaded: {values.get('error_message') or values.get('status')}")
            elif encoded:
                yield Row(row.name, described | {"image": encoded[0]})
            elif key in pictures:
                yield Row(row.name, described | {"image": str((files / pictures[key]).absolute())})
            elif os.path.isfile(tar):
                waiting[key] = None
            else:
                yield Row(row.name, {}, f"no picture {printable(files.name)}/{printable(key)}")
        for row in webdataset_rows(tar, wanted) if waiting else ():
            waiting.pop(str(row.values["__key__"]), None)
            yield row
        yield from (Row(f"{tar.name} {printable(key)}", {}, "no picture of this key") for key in waiting)


def _pictures_in(folder: Path) -> Mapping[str, str]:
    """The picture files in a folder by their names without ending; none if there is no such folder."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(PICTURE_ENDINGS)}


def has_texts(folder: Path) -> bool:
    """Whether some picture in a folder, at any depth, has a .txt file beside it."""
    for _, _, names in os.walk(folder):
        stems = {os.path.splitext(name)[0] for name in names if name.lower().endswith(PICTURE_ENDINGS)}
        if any(name.endswith(".txt") and name[:-4] in stems for name in names):
            return True
    return False


def text_rows(folder: Path) -> Iterator[Row]:
    """A row for each picture in a folder, at any depth, whose caption is the .txt file beside it."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        inside = Path(place).relative_to(folder)
        texts = {name[:-4] for name in names if name.endswith(".txt")}
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            if ending.lower() not in PICTURE_ENDINGS:
                continue
            label = printable(inside / name)
            if stem not in texts:
                yield Row(label, {}, f"no text {printable(stem)}.txt beside it")
                continue
            try:
                text = read_plain(Path(place, f"{stem}.txt"), _MAX_TEXT).decode("utf-8-sig")
            except (DataError, UnicodeDecodeError) as error:
                fault = error.got if isinstance(error, DataError) else "not UTF-8; save it as UTF-8"
                yield Row(label, {}, f"its text {printable(stem)}.txt: {fault}")
                continue
            yield Row(label, {"image": str(inside / name), "caption": [text]})
