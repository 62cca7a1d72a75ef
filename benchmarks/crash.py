"""Whether a map store loses or doubles records when a process that writes it, or works for the writer, is killed.

    python benchmarks/crash.py --kills 20 --json crash.json
    python benchmarks/crash.py --kills 100 --engine ranks --json crash.json   # two processes write one store
    python benchmarks/crash.py --kills 100 --engine ray --json crash.json     # workers of a Ray cluster are killed
    python benchmarks/crash.py --quick --json crash.json     # 4 kills, 100 records

A process writes 600 records in shards of 7, and reports after each shard how many records are on disk. It is killed
(SIGKILL) just before it opens, syncs, renames or removes a file, or at a random moment. Another process continues. This
repeats until the number of kills is reached; the last process finishes. After each round every record is read. With
`--engine ranks` two processes write half of the records each, and each is killed so.

With `--engine ray` two workers make the records, 7 per task, and one process writes them. Workers are killed at random
moments of their tasks, also while Ray sends the results. The records are made here, and no teacher runs.

- `kills`: processes killed.
- `lost`: records that were on disk before a kill and cannot be read after it, or are missing at the end.
- `doubled`: records that the store holds more than once.
- `equal`: whether the store at the end is equal to one written without a kill: to the bit and in the same files. With
  `ranks` and `ray` the order of the records, and so their shards, may differ.

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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lavender.data.shared_writer import SharedStoreWriter
from lavender.data.store import MapStore
from lavender.errors import StoreError
from lavender.files import TEMPORARY
from lavender.maps import Dropped, Word, WordMaps

GRID, SHARD, RANKS = (16, 16), 7, 2
NAMES = ("dog", "hat", "sky")
CALLS = ("os.fsync", "os.replace", "os.unlink", "os.open")


def record(index: int) -> WordMaps:
    names = NAMES[: index % 4]
    text = f"{' '.join(names)} {index}"
    words = tuple(Word(name, 4 * at, 4 * at + 3, name, "noun") for at, name in enumerate(names))
    maps = torch.rand((len(words), *GRID), generator=torch.Generator().manual_seed(index))
    return WordMaps(f"{index:032x}", text, words, maps, (Dropped("cat", "no token"),) if index % 3 == 0 else ())


def write(folder: Path, records: list[WordMaps], progress: int | None = None, rank: int | None = None) -> None:
    """Write the records that are missing, as an extraction does.

    Args:
        progress: descriptor of a file that receives the number of records on disk, of each rank at its place.
        rank: of several processes that write; None: this process writes alone.
    """
    settings: dict[str, Any] = {"identity": {"seed": 0}, "info": {}, "grid": GRID, "records_per_shard": SHARD}
    if rank is None:
        opened = MapStore.writer(folder, **settings)
    else:
        opened = SharedStoreWriter(folder, **settings, rank=rank, num_processes=RANKS)
    with opened as writer:
        for number, word_maps in enumerate(records, 1):
            if (word_maps.image_id, word_maps.text) not in writer:
                writer.add(word_maps)
            if progress is not None and number % SHARD == 0:
                os.pwrite(progress, number.to_bytes(8, "little"), 8 * (rank or 0))
                time.sleep(0.001)  # less than a teacher takes


def die_at(call: str, number: int) -> None:
    """Kill this process just before its n-th call of a function of `os`, from 1."""
    original, count = getattr(os, call.removeprefix("os.")), iter(range(1, sys.maxsize))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    mock.patch(call, called).start()


def start(work: Callable[[], None], prepare: Callable[[], None]) -> int:
    """Do the work in a child process; its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare()
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def end(child: int, kill: bool = False) -> bool:
    """Wait until a child process has ended; whether it was killed."""
    if kill:
        os.kill(child, signal.SIGKILL)  # safe if it has ended: its id is not reused before waitpid
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"A writer ended by itself with exit code {code}.")
    return code != 0


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


def measure(folder: Path, kills: int, num_records: int, ranks: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Write one store without a kill and one with kills; see the module's docstring for the numbers.

    Args:
        ranks: how many processes write the store together; None: one alone.
    """
    records, chance = [record(index) for index in range(num_records)], random.Random(seed)
    shares = [(records, None)] if ranks is None else [(records[rank::ranks], rank) for rank in range(ranks)]
    intact, killed, lost, doubled, num_kills = folder / "intact", folder / "killed", set(), set(), 0
    write(intact, records)
    progress = os.open(folder / "progress", os.O_RDWR | os.O_CREAT)
    while num_kills < kills:
        children = []
        for share, rank in shares:
            call, number = chance.choice(CALLS), chance.randint(1, 9)
            at_a_moment = chance.random() < 0.5
            prepare = (lambda: None) if at_a_moment else partial(die_at, call, number)
            children.append((start(partial(write, killed, share, progress, rank), prepare), at_a_moment))
        for child, at_a_moment in children:
            if at_a_moment:
                time.sleep(chance.uniform(0.005, 0.05))
            num_kills += end(child, kill=at_a_moment)
        readable = keys_of(killed)
        for share, rank in shares:
            on_disk = int.from_bytes(os.pread(progress, 8, 8 * (rank or 0)), "little")
            lost |= set(keys(share[:on_disk])) - set(readable)
        doubled |= {key for key, count in readable.items() if count > 1}
        if len(readable) == num_records:  # finished before the number of kills was reached: start again
            for path in killed.iterdir():
                path.unlink()
            os.ftruncate(progress, 0)
    for child in [start(partial(write, killed, share, None, rank), lambda: None) for share, rank in shares]:
        end(child)
    os.close(progress)
    return {"kills": num_kills, **compare(killed, intact, lost, doubled, in_order=ranks is None)}


def measure_ray(folder: Path, kills: int, num_records: int) -> dict[str, Any]:
    """As `measure`, with records that the workers of a Ray cluster make while they are killed."""
    from lavender.teachers.ray_pool import run_on_ray

    records = [record(index) for index in range(num_records)]
    tasks = [list(range(first, min(first + SHARD, num_records))) for first in range(0, num_records, SHARD)]
    lost, doubled, equal, rounds = set(), set(), True, 0
    write(folder / "intact", records)
    (folder / "kills").mkdir()
    while (num_kills := len(list((folder / "kills").iterdir()))) < kills:
        found, rounds = folder / f"round {rounds}", rounds + 1
        with MapStore.writer(found, {"seed": 0}, {}, GRID, records_per_shard=SHARD) as writer:
            for word_maps in run_on_ray(tasks, Fragile(folder / "kills", kills), workers=RANKS, gpu=False):
                writer.add(word_maps)
        numbers = compare(found, folder / "intact", lost, doubled, in_order=False)
        equal &= numbers["equal"]
    return {"kills": num_kills, "lost": len(lost), "doubled": len(doubled), "equal": equal}


@dataclass
class Fragile:
    """Makes records; about every third task kills its worker within a fifth of a second.

    Attributes:
        folder: gets a file per kill.
        kills: with so many files there, no more workers are killed.
    """

    folder: Path
    kills: int

    def __call__(self, indices: list[int]) -> Iterator[WordMaps]:
        chance = random.Random()
        if chance.random() < 0.3 and len(list(self.folder.iterdir())) < self.kills:
            threading.Timer(chance.uniform(0, 0.2), self._die).start()
        for index in indices:
            time.sleep(0.02)
            yield record(index)

    def _die(self) -> None:
        (self.folder / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def keys(records: Iterable[WordMaps]) -> list[tuple[str, str]]:
    return [(word_maps.image_id, word_maps.text) for word_maps in records]


def compare(found: Path, intact: Path, lost: set, doubled: set, in_order: bool) -> dict[str, Any]:
    """What the store at the end lacks, in addition to what was lost and doubled on the way, which is updated."""
    readable = keys_of(found)
    lost |= set(keys_of(intact)) - set(readable)
    doubled |= {key for key, count in readable.items() if count > 1}
    (names, records), (expected_names, expected) = content_of(found), content_of(intact)
    if not in_order:
        names, expected_names = [name for name in names if name.startswith(TEMPORARY)], []
        records, expected = sorted(records, key=lambda one: one[:2]), sorted(expected, key=lambda one: one[:2])
    return {"lost": len(lost), "doubled": len(doubled), "equal": (names, records) == (expected_names, expected)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many processes are killed (20)")
    parser.add_argument("--engine", choices=("one", "ranks", "ray"), default="one", help="what writes (one)")
    parser.add_argument("--quick", action="store_true", help="4 kills, 100 records")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder  # for Ray's logs, which it would leave behind
        kills, records = (min(options.kills, 4), 100) if options.quick else (options.kills, 600)
        if options.engine == "ray":
            numbers = measure_ray(Path(folder), kills, records)
        else:
            numbers = measure(Path(folder), kills, records, RANKS if options.engine == "ranks" else None)
    print(json.dumps(numbers))
    if options.json:
        options.json.write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
