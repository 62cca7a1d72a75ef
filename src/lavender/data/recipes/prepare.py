"""`lavender data prepare`: write one of the paper's data sets, or their mixture, as train.jsonl and test.jsonl."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lavender.data.conversations import UnusableError
from lavender.data.images import picture_size
from lavender.data.recipes.sources import CAPTION_PROMPT, RECIPES, Recipe
from lavender.errors import ConfigError, DataError
from lavender.files import half_character, printable, shown, write_whole
from lavender.maps import Dropped

PAPER = ("rlaif-v", "flickr30k", "ocrvqa30k")
"""The data sets of the paper's mixture of 0.13 M samples, in the order in which they are written."""
REPORT = "prepared.json"

_MARKER = "<image>"  # readers would take it for the place of a picture
_SUFFIXES = {b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif"}


@dataclass(frozen=True)
class Settings:
    """How a data set is prepared.

    Attributes:
        captions: "one", the first caption of each picture, as the paper counts; or "all".
        test_share: the share of the pictures that test.jsonl gets, from 0 to below 1. No picture is in both files.
        seed: of the split, which is that of `datasets.Dataset.train_test_split` over the pictures.
        prompt: the question of captions; None for the authors'.

    Raises:
        ConfigError: a value out of range.
    """

    captions: str = "one"
    test_share: float = 0.1
    seed: int = 42
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.captions not in ("one", "all"):
            raise ConfigError(f"captions={self.captions!r}", "one or all", "change captions")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}", "0 or more", "change seed")
        if not 0 <= self.test_share < 1:
            raise ConfigError(f"test_share={self.test_share}", "a share from 0 to below 1", "change test_share")
        if self.prompt is not None and (not self.prompt.strip() or _MARKER in self.prompt):
            raise ConfigError(f"prompt={self.prompt!r}", f"a question without {_MARKER}", "change prompt")


@dataclass
class _Read:
    """The usable rows of a source so far. A row is (name of its source, picture, turns)."""

    rows: list[tuple[str, str, Sequence[tuple[str, str]]]] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    pictures: dict[str, None] = field(default_factory=dict)  # an ordered set
    other_captions: int = 0


def prepare(
    name: str,
    source: Path,
    out: Path,
    settings: Settings | None = None,
    strict: bool = False,
    on_row: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Write a data set of the paper as `out`/train.jsonl and `out`/test.jsonl.

    Each line has `image`, `messages` and `origin`, the row of the source. Pictures that are files stay where they are
    and are named by their absolute paths; pictures inside parquet files are written to `out`/images as they are, so
    that their pixels do not change. Pictures are checked by their headers and not decoded.

    Args:
        name: a name of `RECIPES`, or "paper" for the three of `PAPER`.
        source: the published files; for "paper" a folder with a folder or link named as each data set.
        out: the folder to write to. What an earlier call wrote there is replaced.
        settings: see `Settings`.
        strict: raise if the number of usable items is not the paper's. Then no .jsonl is written.
        on_row: called after each row.

    Returns:
        What was found, expected, kept and dropped of each data set; also written to `out`/prepared.json.

    Raises:
        ConfigError: no recipe of this name.
        DataError: the source has another layout, cannot be read, or has too few usable pictures to split; `out` holds
            a train.jsonl or test.jsonl of something else; or as `strict` says.
    """
    settings = settings or Settings()
    sources = _sources(name, source)
    _check_settings(settings, [RECIPES[one] for one in sources], name)
    _check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    reads, sets = {}, {}
    held_out: set[str] = set()
    for one, path in sources.items():
        prompt = settings.prompt or CAPTION_PROMPT
        reads[one] = _read(RECIPES[one], path, prompt, out, settings.captions, on_row)
        sets[one] = _summary(RECIPES[one], reads[one], path, prompt)
        if strict:
            _check_strict(one, sets[one], reads[one].dropped)
        held_out |= _held_out(one, reads[one], settings)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for one, read in reads.items():
        for origin, picture, turns in read.rows:
            split = "test" if picture in held_out else "train"
            sets[one][split] += 1
            lines[split].append(_line(f"{one}: {origin}", picture, turns))
    numbers = {split: len(lines[split]) for split in lines}
    report: dict[str, Any] = {"recipe": name, "settings": asdict(settings), "sets": sets, **numbers}
    # first the report, by which the next call knows that the other files are ours
    write_whole(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for split in lines:  # both, so that never one is of this call and the other of an earlier one
        (out / f"{split}.jsonl").unlink(missing_ok=True)
    for split in lines:
        if lines[split]:
            write_whole(out / f"{split}.jsonl", "".join(lines[split]))
    return report


def _sources(name: str, source: Path) -> dict[str, Path]:
    if name in RECIPES:
        return {name: source}
    if name != "paper":
        raise ConfigError(f"the data set {name!r}", f"one of {', '.join((*RECIPES, 'paper'))}", "choose one of them")
    if missing := [one for one in PAPER if not (source / one).exists()]:
        got = f"{printable(source)} without {' and '.join(missing)}"
        raise DataError(got, f"a folder with {', '.join(PAPER)}", "put a folder or a link of each name there")
    return {one: source / one for one in PAPER}


def _check_settings(settings: Settings, recipes: Sequence[Recipe], name: str) -> None:
    """Refuse a setting that would change nothing. Raises ConfigError."""
    if settings.prompt is not None and not any(recipe.has_captions for recipe in recipes):
        got = f"prompt={settings.prompt!r} for {name}, which has questions of its own"
        raise ConfigError(got, "a data set of captions", "leave the prompt out")
    if settings.captions == "all" and not any(recipe.counted == "pictures" for recipe in recipes):
        got = f"captions=all for {name}, which has one text per row"
        raise ConfigError(got, "flickr30k or paper", "leave captions out")


def _check_out(out: Path) -> None:
    """Refuse a folder whose .jsonl files another program wrote. Raises DataError."""
    files = [f"{split}.jsonl" for split in ("train", "test") if (out / f"{split}.jsonl").exists()]
    if files and not (out / REPORT).is_file():
        got = f"{printable(out)} with {files[0]} and without {REPORT}"
        raise DataError(got, "a new folder, or one that this command wrote", "choose another folder for --out")


def _read(recipe: Recipe, source: Path, prompt: str, out: Path, captions: str, on_row: Callable[[], object]) -> _Read:
    read = _Read()
    fault_of_file = lru_cache(maxsize=100)(_fault)  # a picture's captions follow each other
    first_only = captions == "one" and recipe.counted == "pictures"
    for row in recipe.read(source, prompt):
        on_row()
        if isinstance(row, Dropped):
            read.dropped.append(row)
            continue
        try:
            turns = [(_text(question, "question"), _text(answer, "answer")) for question, answer in row.turns]
            if not turns:
                raise UnusableError("no question")
            fault = fault_of_file(row.picture) if isinstance(row.picture, Path) else _fault(row.picture)
            picture = _picture(row.picture, fault, out)
        except UnusableError as error:
            read.dropped.append(Dropped(row.name, str(error)))
            continue
        if first_only and picture in read.pictures:
            read.other_captions += 1
            continue
        read.pictures[picture] = None
        read.rows.append((row.name, picture, turns))
        if recipe.stops and len(read.rows) == recipe.expected:
            break
    return read


def _text(value: Any, what: str) -> str:
    """A text without the spaces around it, as in the authors' code. Raises UnusableError."""
    if not isinstance(value, str) or not value.strip():
        raise UnusableError(f"the {what} {shown(value)}, not a text")
    if fault := half_character(value):
        raise UnusableError(f"the {what} with {fault}")
    if _MARKER in value:
        raise UnusableError(f"the {what} with {_MARKER}, which marks the place of a picture")
    return value.strip()


def _picture(picture: Path | bytes, fault: str, out: Path) -> str:
    """The picture as train.jsonl names it. Raises UnusableError if it has a fault."""
    if fault:
        raise UnusableError(fault)
    if isinstance(picture, Path):
        if half := half_character(str(picture.absolute())):
            raise UnusableError(f"the picture's path with {half}")
        return str(picture.absolute())
    digest = hashlib.blake2b(picture, digest_size=16).hexdigest()
    suffix = next((suffix for start, suffix in _SUFFIXES.items() if picture.startswith(start)), ".jpg")
    name = f"images/{digest[:2]}/{digest}{suffix}"
    path = out / name
    if not path.is_file() or path.stat().st_size != len(picture):  # a call that was stopped may have cut it
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    return name


def _fault(picture: Path | bytes) -> str:
    """Why a picture cannot be used, by its header, or ""."""
    try:
        picture_size(picture, "the picture")
    except DataError as error:
        return error.got
    return ""


def _held_out(name: str, read: _Read, settings: Settings) -> set[str]:
    """The pictures of test.jsonl."""
    from datasets import Dataset

    pictures = list(read.pictures)
    if settings.test_share == 0 and pictures:
        return set()
    if math.ceil(settings.test_share * len(pictures)) >= len(pictures):
        got = f"{name} with {len(pictures)} usable pictures{_first(read.dropped)}"
        raise DataError(got, "more than test.jsonl gets", "check --source, or lower --test-share")
    rows = Dataset.from_dict({"index": range(len(pictures))})
    test = rows.train_test_split(test_size=settings.test_share, shuffle=True, seed=settings.seed)["test"]
    return {pictures[index] for index in test["index"]}


def _first(dropped: Sequence[Dropped]) -> str:
    """How many rows were dropped, and the first of them, for a message."""
    if not dropped:
        return ""
    return f" and {len(dropped):,} rows dropped; the first, {dropped[0].what}: {dropped[0].reason}"


def _summary(recipe: Recipe, read: _Read, source: Path, prompt: str) -> dict[str, Any]:
    found = len(read.pictures) if recipe.counted == "pictures" else len(read.rows)
    return {
        "source": str(source.absolute()),
        "prompt": prompt if recipe.has_captions else None,
        "counted": recipe.counted,
        "found": found,
        "expected": recipe.expected,
        "pictures": len(read.pictures),
        "samples": len(read.rows),
        "other_captions": read.other_captions,
        "train": 0,
        "test": 0,
        "dropped": [asdict(drop) for drop in read.dropped],
    }


def _check_strict(name: str, summary: dict[str, Any], dropped: Sequence[Dropped]) -> None:
    if summary["found"] == summary["expected"]:
        return
    got = f"{name} with {summary['found']:,} {summary['counted']}{_first(dropped)}"
    raise DataError(got, f"{summary['expected']:,}, as strict asks", "get the missing ones, or leave strict out")


def _line(origin: str, picture: str, turns: Sequence[tuple[str, str]]) -> str:
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        place = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*place, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return json.dumps({"image": picture, "messages": messages, "origin": origin}, ensure_ascii=False) + "\n"
