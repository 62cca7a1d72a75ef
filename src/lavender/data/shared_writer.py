"""SharedStoreWriter: several processes of one host add records to one map store at the same time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavender.data.store_format import Shard, key_of, read_manifest, shard_numbers
from lavender.data.store_writer import StoreWriter, check_same, take_lock
from lavender.errors import StoreError


class SharedStoreWriter(StoreWriter):
    """A store to which every process of a launch adds records. Use it as a context manager, like `StoreWriter`.

    A process holds the store's lock only while it opens the store and while it writes a shard. Before it writes, it
    reads the keys of the shards that the others have written since, and leaves out the records that they have. So
    shards never have the same number, no record is there twice, and a killed process loses only its own buffer.

    Opening verifies a share of the shards: together the processes verify all.

    Attributes:
        rank: the number of this process, from 0.
        num_processes: how many processes write.
        num_doubled: records of this process, and their maps, that another process had written first.

    Raises:
        ConfigError, StoreError: as `StoreWriter`. Another process of a launch that holds the lock is waited for. A
            writer alone is refused when the store is opened, and waited for when records are written; a warning of
            the logger of `lavender` names a process that is waited for longer than `PATIENCE`.
    """

    _is_shared = True

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        info: Mapping[str, Any],
        grid: tuple[int, int],
        *,
        rank: int,
        num_processes: int,
        records_per_shard: int = 256,
    ):
        self.rank, self.num_processes, self.num_doubled = rank, num_processes, (0, 0)
        super().__init__(path, identity, info, grid, records_per_shard)
        self.close()

    def flush(self) -> None:
        """As `StoreWriter.flush`, once no other process is writing."""
        if not self._buffer:
            return
        with self.locked():
            super().flush()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's lock, and know what the other processes have written. Raises as `_refresh`."""
        self._lock = take_lock(self.path, of_launch=True, refuses=False)  # what is buffered is not given up
        try:
            self._refresh()
            yield
        finally:
            self.close()

    def _refresh(self) -> None:
        """Read which records the other processes have written.

        Raises:
            StoreError: the store has other settings by now, or a damaged shard.
        """
        found = read_manifest(self.path)
        check_same(self.path, found, self._manifest)
        if found.store != self._manifest.store and self._numbers:
            got = f"the store {self.path}, which was replaced while this command wrote to it"
            raise StoreError(got, "one store until the end", "repeat the command")
        self._manifest = found  # a merge may have noted its stores
        new = sorted(set(shard_numbers(self.path)) - self._numbers)
        shards = [Shard(self.path, number, self._manifest) for number in new]
        written = {key.tobytes() for shard in shards for key in shard.keys}
        self._num_written += sum(shard.num_words for shard in shards)
        self._numbers.update(new)
        self._done |= written
        doubled = [entry for entry in self._buffer if key_of(entry[0].image_id, entry[0].text) in written]
        if doubled:
            self._buffer = [entry for entry in self._buffer if key_of(entry[0].image_id, entry[0].text) not in written]
            records, words = self.num_doubled
            self.num_doubled = records + len(doubled), words + sum(len(entry[0].words) for entry in doubled)

    def _take_lock(self) -> int:
        return take_lock(self.path, of_launch=True)

    def _verifies(self, number: int) -> bool:
        return number % self.num_processes == self.rank
