"""Whether a map store loses or doubles records when its writer is killed.

    python benchmarks/crash.py --kills 20 --json crash.json
    python benchmarks/crash.py --quick --json crash.json     # 4 kills, 100 records

A process writes 600 records in shards of 7, and reports after each shard how many records are on disk. It is killed
(SIGKILL) just before it opens, syncs, renames or removes a file, or at a random moment. Another process continues. This
repeats until the number of kills is reached; the last process finishes. After each kill every record is read.

- `lost`: records that were on disk before a kill and cannot be read after it, or are missing at the end.
- `doubled`: records that the store holds more than once.
- `equal`: whether the store at the end is equal, to the bit and in the same files, to one written without a kill.

A power cut is not simulated: after a kill, the operating system still writes what it was given.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lavender.data.store import MapStore
from lavender.errors import StoreError
from lavender.maps import Dropped, Word, WordMaps

GRID, SHARD = (16, 16), 7
NAMES = ("dog", "hat", "sky")
CALLS = ("os.fsync", "os.replace", "os.unlink", "os.open")


def record(index: int) -> WordMaps:
    names = NAMES[: index % 4]
    text = f"{' '.join(names)} {index}"
    words = tuple(Word(name, 4 * at, 4 * at + 3, name, "noun") for at, name in enumerate(names))
    maps = torch.rand((len(words), *GRID), generator=torch.Generator().manual_seed(index))
    return WordMaps(f"{index:032x}", text, words, maps, (Dropped("cat", "no token"),) if index % 3 == 0 else ())


def write(folder: Path, records: list[WordMaps], progress: int | None = None) -> None:
    """Write the records that are missing, as an extraction does.

    Args:
        progress: descriptor of a file that receives the number of records on disk.
    """
    with MapStore.writer(folder, {"seed": 0}, {}, GRID, records_per_shard=SHARD) as writer:
        for number, word_maps in enumerate(records, 1):
            if (word_maps.image_id, word_maps.text) not in writer:
                writer.add(word_maps)
            if progress is not None and number % SHARD == 0:
                os.pwrite(progress, number.to_bytes(8, "little"), 0)
                time.sleep(0.001)  # less than a teacher takes


def die_at(call: str, number: int) -> None:
    """Kill this process just before its n-th call of a function of `os`, from 1."""
    original, count = getattr(os, call.removeprefix("os.")), iter(range(1, sys.maxsize))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    mock.patch(call, called).start()


def attempt(work: Callable[[], None], prepare: Callable[[], None], seconds: float | None) -> int:
    """Do the work in a child process, which is killed after `seconds`; the child's exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare()
            work()
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # safe if it has ended: its id is not reused before waitpid
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def keys_of(folder: Path) -> Counter[tuple[str, str]]:
    """How often each record can be read: none if the store is missing or damaged."""
    try:
        return Counter((word_maps.image_id, word_maps.text) for word_maps in MapStore.open(folder, verify=True))
    except StoreError:
        return Counter()


def content_of(folder: Path) -> tuple[list[str], list[tuple]]:
    """The store's file names, and everything in its records."""
    records = [
        (
            word_maps.image_id,
            word_maps.text,
            word_maps.words,
            word_maps.dropped,
            word_maps.confidence.tolist(),
            word_maps.maps.numpy().tobytes(),
        )
        for word_maps in MapStore.open(folder)
    ]
    return sorted(path.name for path in folder.iterdir()), records


def measure(folder: Path, kills: int, num_records: int, seed: int = 0) -> dict[str, Any]:
    """Write one store without a kill and one with kills; see the module's docstring for the numbers."""
    records, chance = [record(index) for index in range(num_records)], random.Random(seed)
    expected = [(word_maps.image_id, word_maps.text) for word_maps in records]
    intact, killed, lost, doubled, num_kills = folder / "intact", folder / "killed", set(), set(), 0
    write(intact, records)
    progress = os.open(folder / "progress", os.O_RDWR | os.O_CREAT)
    while num_kills < kills:
        if num_kills % 2:
            call, number = chance.choice(CALLS), chance.randint(1, 9)
            code = attempt(lambda: write(killed, records, progress), lambda: die_at(call, number), None)  # noqa: B023
        else:
            code = attempt(lambda: write(killed, records, progress), lambda: None, chance.uniform(0.005, 0.05))
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"A writer ended by itself with exit code {code}.")
        num_kills += code != 0
        readable, on_disk = keys_of(killed), int.from_bytes(os.pread(progress, 8, 0), "little")
        lost |= set(expected[:on_disk]) - set(readable)
        doubled |= {key for key, count in readable.items() if count > 1}
        if len(readable) == num_records:  # finished before the number of kills was reached: start again
            for path in killed.iterdir():
                path.unlink()
            os.ftruncate(progress, 0)
    write(killed, records)
    os.close(progress)
    readable = keys_of(killed)
    lost |= set(expected) - set(readable)
    doubled |= {key for key, count in readable.items() if count > 1}
    equal = content_of(killed) == content_of(intact)
    return {"kills": num_kills, "lost": len(lost), "doubled": len(doubled), "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often the writer is killed (20)")
    parser.add_argument("--quick", action="store_true", help="4 kills, 100 records")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kills, records = (min(options.kills, 4), 100) if options.quick else (options.kills, 600)
        numbers = measure(Path(folder), kills, records)
    print(json.dumps(numbers))
    if options.json:
        options.json.write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
