"""Writes a store while being killed. Run by test_store.py: `store_victim.py FOLDER`.

Each attempt is a forked process that resumes the store and is killed by SIGKILL: first just before
its n-th rename, then at random moments. The last attempt is left to finish. Forking pays the imports once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from lavender.data.store import MapStore
from lavender.maps import Dropped, Word, WordMaps

IDENTITY, INFO, GRID, NUM_RECORDS = {"mode": "noise", "grid": (5, 7)}, {"teacher": "tiny"}, (5, 7), 60


def record(index: int) -> WordMaps:
    """Record `index` of the data set: 0 to 3 words, maps that depend on the index alone."""
    names = ("dog", "hat", "sky")[: index % 4]
    text = f"{' '.join(names)} {index}"
    words = tuple(Word(name, 4 * at, 4 * at + 3, name, "noun") for at, name in enumerate(names))
    maps = torch.rand((len(words), *GRID), generator=torch.Generator().manual_seed(index))
    dropped = (Dropped("cat", "no token"),) if index % 3 == 0 else ()
    return WordMaps(f"{index:032x}", text, words, maps, dropped)


def write(folder: Path) -> None:
    """What an extraction does: skip what is done, compute and add the rest."""
    with MapStore.writer(folder, IDENTITY, INFO, GRID, records_per_shard=7) as writer:
        for index in range(NUM_RECORDS):
            one = record(index)
            if (one.image_id, one.text) not in writer:
                time.sleep(0.0005)
                writer.add(one)


def die_before_rename(number: int) -> None:
    """Arrange that this process is killed just before its rename of that number, from 1."""
    rename, count = os.replace, iter(range(1, sys.maxsize))

    def replace(source, target):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    mock.patch("os.replace", replace).start()


def attempt(folder: Path, rename: int | None) -> int:
    """Start a process that writes; its id."""
    child = os.fork()
    if child == 0:
        try:
            if rename is not None:
                die_before_rename(rename)
            write(folder)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child


def main() -> None:
    folder = Path(sys.argv[1])
    codes = {"at_rename": [], "at_random": [], "left_alone": []}
    for rename in (1, 2, 3, 2, 1, 4):  # before the manifest, before map files, before indexes
        codes["at_rename"].append(exit_code(attempt(folder, rename)))
    for _ in range(8):
        child = attempt(folder, None)
        time.sleep(random.uniform(0.001, 0.012))
        os.kill(child, signal.SIGKILL)  # it may have finished: then its exit code stays 0
        codes["at_random"].append(exit_code(child))
    codes["left_alone"].append(exit_code(attempt(folder, None)))
    print(json.dumps(codes))


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
