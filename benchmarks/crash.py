"""What a map store loses when its writer is killed: nothing that was written, and nothing is there twice.

    python benchmarks/crash.py --kills 20 --json crash.json

A process writes 600 records in shards of 7 and tells after each record how many are on disk. It is killed (SIGKILL)
just before it syncs, renames or removes a file, or at a random moment, and another one goes on, until it has been
killed as often as asked; the last one is left to finish. After each kill the store is opened and every record read.

`lost`: records that were on disk before a kill and cannot be read after it, or are missing in the end. `doubled`:
records that are there more than once. `equal`: whether the store in the end holds, to the bit, what one holds that was
written without a kill, in the same files. A kill leaves to the system what was given to it: a power cut is not tried.
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


def write(folder: Path, records: list[WordMaps], told: int | None = None) -> None:
    """What an extraction does: skip what is there, add the rest. `told`: where to tell how many are on disk."""
    with MapStore.writer(folder, {"seed": 0}, {}, GRID, records_per_shard=SHARD) as writer:
        for number, one in enumerate(records, 1):
            if (one.image_id, one.text) not in writer:
                writer.add(one)
            if told is not None and number % SHARD == 0:
                os.pwrite(told, number.to_bytes(8, "little"), 0)
                time.sleep(0.001)  # a teacher takes longer


def die_at(call: str, number: int) -> None:
    """Arrange that this process is killed just before its call of that number, from 1."""
    original, count = getattr(os, call.removeprefix("os.")), iter(range(1, sys.maxsize))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    mock.patch(call, called).start()


def attempt(work: Callable[[], None], prepare: Callable[[], None], seconds: float | None) -> int:
    """Do the work in a process of its own, killed after `seconds`; its exit code."""
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
        os.kill(child, signal.SIGKILL)  # a process that has ended waits for its parent: the number is still its own
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def keys_of(folder: Path) -> Counter[tuple[str, str]]:
    """The records that can be read: none where there is no store yet, or a damaged one."""
    try:
        return Counter((one.image_id, one.text) for one in MapStore.open(folder, verify=True))
    except StoreError:
        return Counter()


def content_of(folder: Path) -> tuple[list[str], list[tuple]]:
    records = [
        (one.image_id, one.text, one.words, one.dropped, one.confidence.tolist(), one.maps.numpy().tobytes())
        for one in MapStore.open(folder)
    ]
    return sorted(path.name for path in folder.iterdir()), records


def measure(folder: Path, kills: int, num_records: int, seed: int = 0) -> dict[str, Any]:
    records, chance = [record(index) for index in range(num_records)], random.Random(seed)
    expected = [(one.image_id, one.text) for one in records]
    whole, killed, lost, doubled, done = folder / "whole", folder / "killed", set(), set(), 0
    write(whole, records)
    told = os.open(folder / "told", os.O_RDWR | os.O_CREAT)
    while done < kills:
        if done % 2:
            call, number = chance.choice(CALLS), chance.randint(1, 9)
            code = attempt(lambda: write(killed, records, told), lambda: die_at(call, number), None)  # noqa: B023
        else:
            code = attempt(lambda: write(killed, records, told), lambda: None, chance.uniform(0.005, 0.05))
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"A writer ended by itself with exit code {code}.")
        done += code != 0
        found, on_disk = keys_of(killed), int.from_bytes(os.pread(told, 8, 0), "little")
        lost |= set(expected[:on_disk]) - set(found)
        doubled |= {key for key, count in found.items() if count > 1}
        if len(found) == num_records:  # finished before it was killed often enough: begin anew
            for path in killed.iterdir():
                path.unlink()
            os.ftruncate(told, 0)
    write(killed, records)
    os.close(told)
    found = keys_of(killed)
    lost |= set(expected) - set(found)
    doubled |= {key for key, count in found.items() if count > 1}
    equal = content_of(killed) == content_of(whole)
    return {"kills": done, "lost": len(lost), "doubled": len(doubled), "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often the writer is killed (20)")
    parser.add_argument("--quick", action="store_true", help="4 kills, 100 records")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kills, records = (min(options.kills, 4), 100) if options.quick else (options.kills, 600)
        found = measure(Path(folder), kills, records)
    print(json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
