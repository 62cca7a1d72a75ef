"""What a map store costs and whether damage is noticed: size, speed, and what a flipped bit does.

    python benchmarks/store.py --json store.json

Speed is of a store of records with five random maps of 32 × 32 each (100,000; `--quick`: 2,000), in the process's own
memory of files: random reads by picture and text in a random order, the lowest of parts of 100; a walk through a whole
store; opening, the lowest of five times. `bytes_per_map` is all files of the store over its maps.

Damage: in a fresh copy of a store of three shards one bit is flipped, in a map file, a table or the manifest; the copy
is opened and every record read. Silent is a flip after which something else is read and no error is raised: a map,
word, text, confidence, the grid or the identity. Harmless is one that changes nothing that is read.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from lavender.data.store import MapStore
from lavender.errors import StoreError
from lavender.maps import Dropped, Word, WordMaps

GRID, NAMES = (32, 32), ("dog", "hat", "sky", "cup", "bed")
IDENTITY = {"teacher": "random", "grid": list(GRID), "seed": 0}
DIFFERENT = 500  # maps are drawn for so many records; the rest has those of another
KINDS = {"shard-*.safetensors": 0.5, "shard-*.parquet": 0.25, "manifest.json": 0.25}


def record(index: int, grid: tuple[int, int] = GRID) -> WordMaps:
    text = f"{' '.join(NAMES)} {index}"
    words = tuple(Word(name, 4 * at, 4 * at + 3, name, "noun") for at, name in enumerate(NAMES))
    maps = torch.rand((len(words), *grid), generator=torch.Generator().manual_seed(index))
    dropped = (Dropped("cat", "no token"),) if index % 3 == 0 else ()
    return WordMaps(f"{index:032x}", text, words, maps, dropped, torch.linspace(0.2, 0.9, len(words)))


def measure_speed(folder: Path, num_records: int) -> dict[str, float]:
    drawn = [record(index) for index in range(min(DIFFERENT, num_records))]
    began = time.perf_counter()
    with MapStore.writer(folder, IDENTITY, {}, GRID) as writer:
        for index in range(num_records):
            writer.add(replace(drawn[index % len(drawn)], image_id=f"{index:032x}"))
    written = time.perf_counter() - began
    size = sum(path.stat().st_size for path in folder.iterdir())
    opening = min(_seconds(lambda: MapStore.open(folder)) for _ in range(5))
    store = MapStore.open(folder)
    sequential = min(_seconds(lambda: [None for _ in store]) for _ in range(2))
    keys = [(f"{index:032x}", drawn[index % len(drawn)].text) for index in range(num_records)]
    random.Random(0).shuffle(keys)
    parts = [keys[at : at + 100] for at in range(0, min(len(keys), 20_000), 100)]
    reading = min(_seconds(lambda part=part: [store.get(*key) for key in part]) / len(part) for part in parts)
    return {
        "records": num_records,
        "bytes_per_map": size / store.num_words,
        "random_read_us": reading * 1e6,
        "open_100k_s": opening,
        "sequential_per_s": num_records / sequential,
        "written_per_s": num_records / written,
    }


def _seconds(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure_damage(folder: Path, flips: int, seed: int = 0) -> dict[str, object]:
    whole, copy = folder / "whole", folder / "copy"
    with MapStore.writer(whole, IDENTITY, {"made by": "a benchmark"}, (8, 8), records_per_shard=4) as writer:
        for index in range(12):
            writer.add(record(index, (8, 8)))
    expected, chance = _content(whole), random.Random(seed)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for kind in chance.choices(list(KINDS), KINDS.values(), k=flips):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        path = chance.choice(sorted(copy.glob(kind)))
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            outcomes[kind]["harmless" if _content(copy) == expected else "silent"] += 1
        except StoreError:
            outcomes[kind]["noticed"] += 1
    silent = sum(counts["silent"] for counts in outcomes.values())
    return {
        "flips": flips,
        "silent": silent,
        "flips_by_file": {kind: dict(counts) for kind, counts in outcomes.items()},
    }


def _content(folder: Path) -> tuple:
    """All that reading a store gives, to compare."""
    store = MapStore.open(folder)
    records = [
        (
            one.image_id,
            one.text,
            one.words,
            one.dropped,
            one.confidence.numpy().tobytes(),
            one.maps.shape,
            one.maps.numpy().tobytes(),
        )
        for one in store
    ]
    for one in records:
        if store.get(*one[:2]) is None:
            records.append(("lost", *one[:2]))
    return store.grid, store.identity, store.info, store.num_words, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 records and 200 flips")
    parser.add_argument("--records", type=int, help="records of the store whose speed is measured")
    parser.add_argument("--flips", type=int, help="flipped bits")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure_speed(Path(folder) / "speed", options.records or (2000 if options.quick else 100_000))
        found |= measure_damage(Path(folder), options.flips or (200 if options.quick else 2000))
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
