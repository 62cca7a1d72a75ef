"""Size and speed of a map store, and whether it notices a flipped bit.

    python benchmarks/store.py --json store.json
    python benchmarks/store.py --quick --json store.json     # 2,000 records and 200 flipped bits

Speed is measured on a store of 100,000 records with five random maps of 32 × 32 each, whose files are in the page
cache. Reported are the fastest random reads by picture and text (over groups of 100), the faster of two passes over the
store, and the fastest of five openings. `bytes_per_map` is the size of all files per map.

Damage: one bit is flipped in a copy of a store of three shards: in a map file, a table or the manifest. Then every
record is read. The flip is "silent" if something else is read without an error: a map, word, text, confidence, the grid
or the identity. It is "harmless" if everything is read as before, and "noticed" if reading raises an error.
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
from typing import Any

import torch

from lavender.data.store import MapStore
from lavender.errors import StoreError
from lavender.maps import Dropped, Word, WordMaps

GRID, NAMES = (32, 32), ("dog", "hat", "sky", "cup", "bed")
IDENTITY = {"teacher": "random", "grid": list(GRID), "seed": 0}
NUM_DISTINCT = 500  # records with maps of their own; the other records repeat these maps
FILE_SHARES = {"shard-*.safetensors": 0.5, "shard-*.parquet": 0.25, "manifest.json": 0.25}


def record(index: int, grid: tuple[int, int] = GRID) -> WordMaps:
    text = f"{' '.join(NAMES)} {index}"
    words = tuple(Word(name, 4 * at, 4 * at + 3, name, "noun") for at, name in enumerate(NAMES))
    maps = torch.rand((len(words), *grid), generator=torch.Generator().manual_seed(index))
    dropped = (Dropped("cat", "no token"),) if index % 3 == 0 else ()
    return WordMaps(f"{index:032x}", text, words, maps, dropped, torch.linspace(0.2, 0.9, len(words)))


def measure_speed(folder: Path, num_records: int) -> dict[str, float]:
    """Size and speed of a store; see the module's docstring."""
    drawn = [record(index) for index in range(min(NUM_DISTINCT, num_records))]
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
    groups = [keys[start : start + 100] for start in range(0, min(len(keys), 20_000), 100)]
    reading = min(_seconds(lambda group=group: [store.get(*key) for key in group]) / len(group) for group in groups)
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


def measure_damage(folder: Path, flips: int, seed: int = 0) -> dict[str, Any]:
    """How many flipped bits are silent, harmless and noticed, by kind of file."""
    intact, copy = folder / "intact", folder / "copy"
    with MapStore.writer(intact, IDENTITY, {"made by": "a benchmark"}, (8, 8), records_per_shard=4) as writer:
        for index in range(12):
            writer.add(record(index, (8, 8)))
    expected, chance = _content(intact), random.Random(seed)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in FILE_SHARES}
    for kind in chance.choices(list(FILE_SHARES), list(FILE_SHARES.values()), k=flips):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(intact, copy)
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
    """Everything that can be read from a store, to compare."""
    store = MapStore.open(folder)
    records = [
        (
            word_maps.image_id,
            word_maps.text,
            word_maps.words,
            word_maps.dropped,
            word_maps.confidence.numpy().tobytes(),
            word_maps.maps.shape,
            word_maps.maps.numpy().tobytes(),
        )
        for word_maps in store
    ]
    lost = [record[:2] for record in records if store.get(*record[:2]) is None]
    return store.grid, store.identity, store.info, store.num_words, records, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 records and 200 flips")
    parser.add_argument("--records", type=int, help="records of the store whose speed is measured (100,000)")
    parser.add_argument("--flips", type=int, help="flipped bits (2,000)")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        numbers: dict[str, Any] = measure_speed(
            Path(folder) / "speed", options.records or (2000 if options.quick else 100_000)
        )
        numbers |= measure_damage(Path(folder), options.flips or (200 if options.quick else 2000))
    print(json.dumps(numbers, indent=1))
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
