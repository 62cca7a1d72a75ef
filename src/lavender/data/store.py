"""MapStore: word maps on disk, quick to read at random, whole after a kill at any moment, never read wrong.

A store is a folder of a manifest and of shards; `lavender.data.store_format` says what each file holds.
Files appear whole or not at all, and every read compares the checksum of its record.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lavender.data.store_format import Manifest, Shard, key_of, read_manifest, shard_numbers, unreadable
from lavender.data.store_writer import StoreWriter
from lavender.errors import StoreError
from lavender.files import expanded
from lavender.maps import WordMaps

__all__ = ["MapStore", "StoreWriter"]


class MapStore:
    """A store, open for reading. Sees the shards that were complete when it was opened.

    Records keep the order of their shards, in which they were added. A store can be pickled: the copy opens the same
    folder.

    Attributes:
        path: its folder.
        identity: the settings that change a map.
        info: versions and names, for people.
        grid: (rows, cols) of every map.
    """

    def __init__(self, path: Path, manifest: Manifest, shards: list[Shard]):
        self.path = path
        self.identity, self.info, self.grid = manifest.identity, manifest.info, manifest.grid
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)]).tolist()
        keys = np.concatenate([np.zeros((0, 2), np.uint64), *(shard.keys for shard in shards)])
        self._order = keys[:, 0].argsort(kind="stable")
        self._keys, self._rest = keys[self._order].T.copy()

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> MapStore:
        """Open a store for reading. Every file is checked but for the maps themselves, which are when they are read.

        Args:
            path: its folder.
            verify: whether to read every map file now and compare its checksum.

        Raises:
            StoreError: no store, another format, or a missing or damaged shard (named).
        """
        path = expanded(path)
        manifest = read_manifest(path)
        try:
            numbers = shard_numbers(path)
        except OSError as error:
            raise unreadable(path, error) from error
        missing = sorted(set(range(len(numbers))) - set(numbers))
        if missing:
            got = f"{path}, which has {len(numbers)} shards up to number {numbers[-1]} and none of number {missing[0]}"
            raise StoreError(got, "all shards", "extract again: only the missing records are redone")
        shards = [Shard(path, number, manifest) for number in numbers]
        if verify:
            for shard in shards:
                shard.verify()
        return cls(path, manifest, shards)

    @staticmethod
    def writer(
        path: str | Path,
        identity: Mapping[str, Any],
        info: Mapping[str, Any],
        grid: tuple[int, int],
        records_per_shard: int = 256,
    ) -> StoreWriter:
        """Create a store, or reopen one to add to it; see `StoreWriter`."""
        return StoreWriter(expanded(path), identity, info, grid, records_per_shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return MapStore.open, (self.path,)

    def __len__(self) -> int:
        """The number of records: pairs of a picture and a text."""
        return len(self._keys)

    @property
    def num_words(self) -> int:
        """The number of maps."""
        return sum(shard.num_words for shard in self._shards)

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether there is a record of (image_id, text)."""
        return self._find(*key) is not None

    def get(self, image_id: str, text: str) -> WordMaps | None:
        """The maps of a text on a picture, or None.

        Raises:
            StoreError: the record is not what was written, or cannot be read.
        """
        place = self._find(image_id, text)
        if place is None:
            return None
        shard, row = place
        file = shard.open_file()
        try:
            return shard.record(row, file)
        finally:
            os.close(file)

    def __iter__(self) -> Iterator[WordMaps]:
        for shard in self._shards:
            file = shard.open_file()
            try:
                for row in range(len(shard)):
                    yield shard.record(row, file)
            finally:
                os.close(file)

    def _find(self, image_id: str, text: str) -> tuple[Shard, int] | None:
        try:
            key, rest = struct.unpack("<2Q", key_of(image_id, text))
        except UnicodeEncodeError:
            return None  # half a character: no store takes it
        at = int(self._keys.searchsorted(np.uint64(key)))
        while at < len(self._keys) and self._keys[at] == key:
            if self._rest[at] == rest:
                position = int(self._order[at])
                number = bisect_right(self._starts, position) - 1
                return self._shards[number], position - self._starts[number]
            at += 1
        return None
