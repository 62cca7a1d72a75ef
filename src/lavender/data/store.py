"""MapStore: word maps on disk, with fast random access, checksums, and no damage if the writer is killed.

A store is a folder with a manifest and shards; `lavender.data.store_format` describes each file. Files are written
completely or not at all, and every read compares the checksum of its record.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lavender.config import ROLES
from lavender.data.made_from import again
from lavender.data.store_format import Manifest, Shard, key_of, read_manifest, shard_numbers, unreadable
from lavender.data.store_writer import UNRECORDED, StoreWriter
from lavender.errors import DataError, StoreError
from lavender.files import expanded
from lavender.maps import WordMaps

__all__ = ["MapStore", "SeveralStores", "StoreWriter"]


class MapStore:
    """A store of word maps, open for reading. It sees the shards that were complete when it was opened.

    Iterating yields the records in the order in which they were added. A store can be pickled: the copy opens the same
    folder. A record takes rows × cols + 4 bytes per map, and its texts; maps have 8 bits per cell.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from lavender import MapStore, WordMaps
        >>> from lavender.maps import Word
        >>> maps = WordMaps("0f3a", "a dog", (Word("dog", 2, 5, "dog", "noun"),), torch.ones(1, 2, 3))
        >>> with TemporaryDirectory() as folder:
        ...     with MapStore.writer(folder, identity={"teacher": "example"}, info={}, grid=(2, 3)) as writer:
        ...         _ = writer.add(maps)
        ...     store = MapStore.open(folder)
        ...     print(len(store), ("0f3a", "a dog") in store, store.get("0f3a", "a dog").maps.shape)
        1 True torch.Size([1, 2, 3])

    Attributes:
        path: the folder.
        identity: the settings that change a map.
        info: versions and names, for people.
        grid: (rows, cols) of every map.
        shards: the open shards, in the order of their numbers.
    """

    def __init__(self, path: Path, manifest: Manifest, shards: list[Shard]):
        self.path = path
        self.identity, self.info, self.grid = manifest.identity, manifest.info, manifest.grid
        self.shards = shards
        self._starts = np.cumsum([0, *map(len, shards)]).tolist()
        keys = np.concatenate([np.zeros((0, 2), np.uint64), *(shard.keys for shard in shards)])
        self._order = keys[:, 0].argsort(kind="stable")
        self._keys, self._rest = keys[self._order].T.copy()

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> MapStore:
        """Open a store for reading. Everything but the maps is checked now; maps are checked when they are read.

        Args:
            path: the folder.
            verify: also read every map now and compare its checksum.

        Raises:
            StoreError: no store, another format, or a missing or damaged shard, which the message names.
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
            raise StoreError(got, "all shards", f"{again(manifest.info)}: only the missing records are redone")
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
        """Create a store, or reopen one to add records.

        Args:
            path: the folder; new, empty, or a store with the same identity and grid.
            identity: the settings that change a map, as JSON values.
            info: versions and names, for people. A reopened store keeps its own.
            grid: (rows, cols) of every map.
            records_per_shard: how many records are buffered and written together.

        Raises:
            ConfigError, StoreError: see `StoreWriter`.
        """
        return StoreWriter(expanded(path), identity, info, grid, records_per_shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return MapStore.open, (self.path,)

    def __len__(self) -> int:
        """The number of records, which are pairs of an image and a text."""
        return len(self._keys)

    @property
    def roles(self) -> frozenset[str] | None:
        """The roles whose turns were mapped, "user" or "assistant"; None if the store's identity does not tell."""
        texts = self.identity.get("texts", UNRECORDED["texts"] if "teacher" in self.identity else None)
        return frozenset(ROLES[texts]) if texts in ROLES else None

    @property
    def fingerprint(self) -> str:
        """A digest of the settings and records. It reads no map, and changes when the store grows or is made again."""
        digest = hashlib.blake2b(json.dumps([self.identity, self.grid], sort_keys=True).encode(), digest_size=16)
        for shard in self.shards:
            digest.update(shard.keys.tobytes())
            digest.update(shard.checksums.tobytes())
        return digest.hexdigest()

    @property
    def num_words(self) -> int:
        """The number of maps."""
        return sum(shard.num_words for shard in self.shards)

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether there is a record of (image_id, text)."""
        return self._find(*key) is not None

    def get(self, image_id: str, text: str) -> WordMaps | None:
        """The maps of a text on an image; None if the store has no such record.

        Args:
            image_id: content hash of the image, see `lavender.data.image_id`.
            text: the exact text.

        Raises:
            StoreError: the record is damaged or cannot be read.
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
        for shard in self.shards:
            file = shard.open_file()
            try:
                for row in range(len(shard)):
                    yield shard.record(row, file)
            finally:
                os.close(file)

    def _find(self, image_id: str, text: str) -> tuple[Shard, int] | None:
        """The shard of a record, and its row there."""
        try:
            key, rest = struct.unpack("<2Q", key_of(image_id, text))
        except UnicodeEncodeError:
            return None  # a lone surrogate, which no store accepts
        place = int(self._keys.searchsorted(np.uint64(key)))
        while place < len(self._keys) and self._keys[place] == key:
            if self._rest[place] == rest:
                position = int(self._order[place])
                number = bisect_right(self._starts, position) - 1
                return self.shards[number], position - self._starts[number]
            place += 1
        return None


class SeveralStores:
    """Several map stores used as one. The first store that has a picture and a text answers.

    Raises:
        DataError: no store, or stores of different grids.
    """

    def __init__(self, *stores: MapStore):
        if len({store.grid for store in stores}) != 1:
            grids = ", ".join("{} of {} × {} cells".format(store.path, *store.grid) for store in stores)
            do = "leave out those of another grid, or extract them again with the same --grid"
            raise DataError(f"the map stores {grids or 'of an empty list'}", "map stores of one grid", do)
        self._stores, self.grid = stores, stores[0].grid

    @classmethod
    def open(cls, paths: str | Path | Sequence[str | Path]) -> SeveralStores:
        """The stores in these folders, or in this one.

        Raises:
            DataError: no folder, or stores of different grids.
            StoreError: as `MapStore.open`.
        """
        listed = [paths] if isinstance(paths, (str, Path)) else paths
        return cls(*[MapStore.open(path) for path in dict.fromkeys(listed)])

    @property
    def stores(self) -> tuple[MapStore, ...]:
        """The stores, in their order."""
        return self._stores

    @property
    def paths(self) -> list[Path]:
        """The folders of the stores."""
        return [store.path for store in self._stores]

    @property
    def roles(self) -> frozenset[str] | None:
        """As of `MapStore`: the roles whose turns a store has."""
        known = [store.roles for store in self._stores]
        return None if None in known else frozenset().union(*(roles for roles in known if roles is not None))

    def get(self, image_id: str, text: str) -> WordMaps | None:
        """The record of a picture and a text; None if no store has it."""
        records = (store.get(image_id, text) for store in self._stores)
        return next((maps for maps in records if maps is not None), None)
