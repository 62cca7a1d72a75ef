"""Damaged map stores: bits that flip, files cut, swapped, emptied, of another store. A wrong map is never read."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fuzz.harness import forked, preload
from lavender.data.store import MapStore
from lavender.errors import StoreError
from lavender.maps import Dropped, Word, WordMaps

RECORDS = 24


def record(index: int, words: int = 3, grid: tuple[int, int] = (8, 8)) -> WordMaps:
    names = ("dog", "hat", "sky", "cup", "bed")[:words]
    text = f"{' '.join(names)} {index}"
    spans = tuple(Word(name, 4 * place, 4 * place + 3, name, "noun") for place, name in enumerate(names))
    maps = torch.rand((words, *grid), generator=torch.Generator().manual_seed(index))
    dropped = (Dropped("cat", "no token"),) if index % 3 == 0 else ()
    return WordMaps(f"{index:032x}", text, spans, maps, dropped, torch.linspace(0.2, 0.9, words))


def write(folder: Path, first: int = 0, grid: tuple[int, int] = (8, 8)) -> Path:
    with MapStore.writer(folder, {"teacher": "fuzz"}, {}, grid, records_per_shard=8) as writer:
        for index in range(first, first + RECORDS):
            writer.add(record(index, grid=grid))
    return folder


def try_all(count: int, seed: int, work: Path) -> list[str]:
    """`count` damaged stores; those that give another map, or end otherwise than with a StoreError."""
    preload()
    work.mkdir(parents=True, exist_ok=True)
    true, others = write(work / "true"), [write(work / "other", 100), write(work / "grid", 0, (4, 16))]
    expected, chance, bad = list(MapStore.open(true)), random.Random(seed), []
    for _ in range(count):
        copy = work / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(true, copy)
        name, damage = chance.choice(list(DAMAGE.items()))
        said = damage(copy, chance, others)
        ended = forked(lambda copy=copy: _read(copy, expected), work / "log")
        if fault := ended.fault() or ("" if ended.code == 0 else ended.last_line()):
            bad.append(f"stores: {name} {said}: {fault}")
    return bad


def _read(store: Path, expected: list[WordMaps]) -> int:
    """0 where every record reads as it was written or is refused, and a writer goes on with the right ones."""
    try:
        found = list(MapStore.open(store))
    except StoreError:
        found = []
    true = {(one.image_id, one.text): one for one in expected}
    for one in found:
        own = true.get((one.image_id, one.text))
        if own is None or not _same(one, own):
            print(f"another map was read for {one.text!r}")
            return 1
    try:
        with MapStore.writer(store, {"teacher": "fuzz"}, {}, (8, 8), records_per_shard=8) as writer:
            for index in range(RECORDS):
                writer.add(record(index))
        again = list(MapStore.open(store))
    except StoreError:
        return 0
    good = {
        (one.image_id, one.text) for one in again if (key := (one.image_id, one.text)) in true and _same(one, true[key])
    }
    if len(good) < RECORDS:
        print(f"a writer went on and left {RECORDS - len(good)} records out")
        return 1
    return 0


def _same(one: WordMaps, other: WordMaps) -> bool:
    same = one.words == other.words and one.dropped == other.dropped and one.maps.shape == other.maps.shape
    return same and torch.equal(one.maps, other.maps) and torch.equal(one.confidence, other.confidence)


def _files(store: Path) -> list[Path]:
    return sorted(path for path in store.iterdir() if path.is_file() and path.stat().st_size)


def _flip(store: Path, chance: random.Random, others: list[Path]) -> str:
    path = chance.choice(_files(store))
    content = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(content)), chance.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {path.name}"


def _cut(store: Path, chance: random.Random, others: list[Path]) -> str:
    path = chance.choice(_files(store))
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])
    return path.name


def _swap(store: Path, chance: random.Random, others: list[Path]) -> str:
    kind = chance.choice([".safetensors", ".parquet", ""])
    one, other = chance.sample(
        [path for path in _files(store) if path.name.startswith("shard") and path.suffix.endswith(kind)], 2
    )
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one.name}, {other.name}"


def _foreign(store: Path, chance: random.Random, others: list[Path]) -> str:
    other = chance.choice(others)
    path = chance.choice(_files(other))
    shutil.copy(path, store / path.name)
    return f"{path.name} of {other.name}"


def _gone(store: Path, chance: random.Random, others: list[Path]) -> str:
    path = chance.choice(_files(store))
    path.unlink()
    return path.name


def _noise(store: Path, chance: random.Random, others: list[Path]) -> str:
    path = chance.choice(_files(store))
    path.write_bytes(chance.randbytes(chance.choice([0, 1, 100, path.stat().st_size])))
    return path.name


DAMAGE: dict[str, Callable[[Path, random.Random, list[Path]], str]] = {
    "flipped": _flip,
    "cut": _cut,
    "swapped": _swap,
    "of another store": _foreign,
    "gone": _gone,
    "noise": _noise,
}
