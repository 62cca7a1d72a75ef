"""Rows of published layouts: Karpathy's JSON, img2dataset, and texts beside pictures."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavender.data.columns import TEXT_COLUMNS
from lavender.data.tables import Row, Wanted, jsonl_rows, object_row, parquet_rows, unknown_format, unreadable
from lavender.data.webdataset import PICTURE_ENDINGS, webdataset_rows
from lavender.errors import DataError
from lavender.files import JsonError, json_items, parse_json, printable, read_plain, shown

_IMG2DATASET = frozenset(("key", "status", "error_message", "caption", "jpg", "png", "webp"))
_MAX_JSON = 2**33  # bytes: a .json file is held in memory while it is read
_MAX_TEXT = 2**20  # bytes of the text beside a picture


def json_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    """Rows of a JSON list, of JSON lines, or of Karpathy's JSON."""
    content, label = read_plain(path, _MAX_JSON), printable(path.name)
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise unreadable(path, "it is UTF-16, by its first two bytes; save it as UTF-8")
    text = content.decode("utf-8-sig", "surrogateescape")  # a byte that is not UTF-8 spoils only its row
    del content
    try:
        is_list, are_lines = re.match(r"\s*\[", text), _are_lines(text)
        whole = None if is_list or are_lines else parse_json(text)
        is_row = isinstance(whole, dict) and not whole.keys().isdisjoint(TEXT_COLUMNS)
        if not (is_list or are_lines or is_row):
            yield from _karpathy_rows(path, whole, wanted.split)
            return
        if wanted.split:
            raise no_split(path, wanted.split)
        if is_row:
            yield object_row(f"{label} row 0", whole)
            return
        if are_lines:
            del text
            yield from jsonl_rows(path, wanted)
            return
        for index, (values, fault) in enumerate(json_items(text)):
            name = f"{label} row {index}"
            yield Row(name, {}, fault) if fault else object_row(name, values)
    except JsonError as error:
        raise unreadable(path, error) from error


def _are_lines(text: str) -> bool:
    """Whether a text is of JSON lines: an object on the first line, and more after it."""
    start = len(text) - len(text.lstrip()) if text[:1].isspace() else 0
    end = text.find("\n", start)
    if text[start : start + 1] != "{" or end < 0 or not re.compile(r"\s*\S").match(text, end):
        return False
    try:
        parse_json(text[start:end])
    except JsonError:
        return False
    return True


def no_split(path: Path, split: str, splits: Sequence[str] = ()) -> DataError:
    """The error of a split that is not there."""
    do = "name one of these" if splits else "name a split that is there, or leave :SPLIT out"
    has = _listed(splits) or "no such split"
    return DataError(f"the split {shown(split)} of {printable(path)}, which has {has}", "a split of the data", do)


def several_splits(path: Path, splits: Sequence[str]) -> DataError:
    """The error of data with several splits of which none was named."""
    do = f"name one, as {printable(path)}:{printable(splits[0])}"
    return DataError(f"{printable(path)} with the splits {_listed(splits)}", "one split", do)


def _listed(splits: Sequence[str]) -> str:
    return ", ".join(printable(split) for split in splits[:8]) + (" …" if len(splits) > 8 else "")


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
    folders = [one for one in sorted(path.parent.iterdir()) if one.is_dir()]
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
        picture, fault = _place_of(inside, path.parent, folders)
        yield Row(name, {} if fault else {"image": str(picture.absolute()), "caption": captions}, fault)


def _place_of(inside: Path, here: Path, folders: Sequence[Path]) -> tuple[Path, str]:
    """(file of a picture, why it cannot be told): `here`, or in one of the folders, or there by its name alone."""
    for part in (inside, inside.name):
        if os.path.isfile(here / part):
            return here / part, ""
        found = [folder / part for folder in folders if os.path.isfile(folder / part)]
        if len(found) > 1:
            return found[0], f"the picture {printable(part)} is in {found[0].parent.name} and {found[1].parent.name}"
        if found:
            return found[0], ""
    return here / inside, ""


def is_img2dataset(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder has tables of img2dataset, of which each row has a key and the status of its download."""
    import pyarrow.parquet

    for name in names:
        if re.fullmatch(r"\d+\.parquet", name):
            try:
                return {"key", "status"} <= set(pyarrow.parquet.read_schema(folder / name).names)
            except Exception:  # a damaged file is an error where its rows are read
                continue
    return False


def img2dataset_rows(folder: Path, names: Sequence[str], wanted: Wanted) -> Iterator[Row]:
    """Rows of what img2dataset wrote: pictures in folders, tar files or the tables. Failed downloads are faults."""
    for name in names:
        number = re.fullmatch(r"(\d+)(?:\.tar)?", name)
        if number and f"{number[1]}.parquet" not in names:  # its download was stopped
            yield Row(printable(name), {}, f"no table {number[1]}.parquet beside it")
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
                why = printable(values.get("error_message") or values.get("status"))
                yield Row(row.name, {}, f"not downloaded: {why}")
            elif encoded:
                yield Row(row.name, described | {"image": encoded[0]})
            elif key in pictures:
                yield Row(row.name, described | {"image": str((files / pictures[key]).absolute())})
            elif os.path.isfile(tar):
                waiting[key] = None
            else:
                yield Row(row.name, {}, f"no picture {printable(files.name)}/{printable(key)}")
        for row in webdataset_rows(tar, wanted) if waiting else ():
            waiting.pop(str(row.values.get("__key__")), None)
            yield row
        yield from (Row(f"{tar.name} {printable(key)}", {}, "no picture of this key") for key in waiting)


def _pictures_in(folder: Path) -> Mapping[str, str]:
    """The picture files in a folder by their names without ending; none if there is no such folder."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(PICTURE_ENDINGS)}


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], str]]:
    """(path, sorted names of its files, why it is not read) of a folder and of those in it.

    Links to folders are not followed: they may lead anywhere, also into themselves.
    """
    errors: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=errors.append):
        folders.sort()
        yield Path(place), sorted(names), ""
        for path in (Path(place, name) for name in folders):
            if path.is_symlink():
                yield path, [], "a link to a folder, which is not followed; put the folder itself there"
    for error in errors:
        yield Path(error.filename), [], f"a folder that cannot be read: {error.strerror}"


def has_texts(folder: Path) -> bool:
    """Whether some picture in a folder, at any depth, has a .txt file beside it."""
    for _, names, _ in _walk(folder):
        stems = {os.path.splitext(name)[0] for name in names if name.lower().endswith(PICTURE_ENDINGS)}
        if any(name.endswith(".txt") and name[:-4] in stems for name in names):
            return True
    return False


def text_rows(folder: Path) -> Iterator[Row]:
    """A row for each picture in a folder, at any depth, whose caption is the .txt file beside it."""
    for place, names, fault in _walk(folder):
        inside = place.relative_to(folder)
        if fault:
            yield Row(printable(inside), {}, fault)
        texts = {name[:-4] for name in names if name.endswith(".txt")}
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending.lower() not in PICTURE_ENDINGS:
                continue
            label = printable(inside / name)
            if stem not in texts:
                yield Row(label, {}, f"no text {printable(stem)}.txt beside it")
                continue
            try:
                text = read_plain(place / f"{stem}.txt", _MAX_TEXT).decode("utf-8-sig")
            except (DataError, UnicodeDecodeError) as error:
                fault = error.got if isinstance(error, DataError) else "not UTF-8; save it as UTF-8"
                yield Row(label, {}, f"its text {printable(stem)}.txt: {fault}")
                continue
            yield Row(label, {"image": str((place / name).absolute()), "caption": [text]})
