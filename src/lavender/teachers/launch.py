"""The processes of an `accelerate launch` on one host: which samples each takes, and what they did together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from lavender.data.sample_table import SampleTable
from lavender.data.samples import Samples
from lavender.data.shared_writer import SharedStoreWriter
from lavender.errors import ConfigError, LavenderError
from lavender.files import expanded

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """One of several processes that extract a data set into one store.

    Attributes:
        rank: the number of this process, from 0. The first one writes the summary.
        num_processes: how many there are.
    """

    rank: int
    num_processes: int

    @classmethod
    def of_environment(cls) -> Launch | None:
        """The launch that started this process with accelerate or torchrun; None for a process alone.

        Raises:
            ConfigError: its processes are on several hosts, or the variables of a launch are not all there.
        """
        if os.environ.get("WORLD_SIZE", "") in ("", "1"):
            return None
        given = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK")}
        if not all(value.isdecimal() for value in given.values()):
            got = f"the environment {', '.join(f'{name}={value}' for name, value in given.items())}"
            do = "start it with accelerate launch, or unset WORLD_SIZE"
            raise ConfigError(got, "a number each, as accelerate and torchrun set them", do)
        size, here, rank = map(int, given.values())
        if here != size:
            got = f"a launch of {size} processes, {here} of them on this host"
            do = "use --engine ray, or give each host a part of the data and a store of its own"
            raise ConfigError(got, "all processes on one host, where they share the store", do)
        return cls(rank, size)

    def share(self, samples: Samples, strict: bool = False) -> Samples:
        """This process's samples. The samples of one image go to one process, which encodes it once.

        The rows that were dropped are reported by the first process. With `strict` every process refuses them.

        Raises:
            DataError: with `strict`, a row was dropped.
        """
        if strict:
            samples.check_strict()
        places = [
            place for place, number in enumerate(image_numbers(samples)) if number % self.num_processes == self.rank
        ]
        table = samples.samples
        chosen = table.select(places) if isinstance(table, SampleTable) else tuple(table[place] for place in places)
        return Samples(chosen, samples.dropped if self.rank == 0 else (), samples.outside)

    def writer(self, out: str | Path, *settings: Any) -> SharedStoreWriter:
        """The store, open for this process; `settings` are identity, info and grid."""
        return SharedStoreWriter(expanded(out), *settings, rank=self.rank, num_processes=self.num_processes)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks. It waits until every process has come here.

        Raises:
            LavenderError: another process has ended before.
        """
        from torch import distributed

        values: list[Any] = [None] * self.num_processes
        try:
            if not distributed.is_initialized():
                distributed.init_process_group("gloo", timeout=timedelta(days=365))  # the shares differ in length
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            got = f"a process of the launch that ended before the others: {' '.join(str(error).split())[:200]}"
            do = "see its message above, and run the command again; what is written stays"
            raise LavenderError(got, "all processes to finish", do) from error
        return values


def image_numbers(samples: Samples) -> Iterator[int]:
    """Per sample the number of its first image, from 0: the same for the same file. A sample without one counts too."""
    numbers: dict[bytes | int | str, int] = {}
    for place, sample in enumerate(samples):
        source = sample.sources[0] if sample.sources else place
        encoded = os.fsencode(source) if isinstance(source, Path) else source
        if isinstance(encoded, bytes):
            key = hashlib.blake2b(encoded, digest_size=16).digest()  # much smaller than a path
        else:
            key = encoded if isinstance(encoded, int) else f"image {id(encoded)}"
        yield numbers.setdefault(key, len(numbers))
