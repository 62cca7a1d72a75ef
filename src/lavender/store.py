"""MapStore: word maps on disk, quick to read at random and whole after a kill at any moment.

A store is a folder:

    manifest.json               format, identity (settings that change a map), grid, info (versions, names)
    shard-00000.safetensors     "maps": uint8 (word, rows, cols); "scale": float32 (word,)
    shard-00000.parquet         a row for each record: image_id, text, first_row, words, dropped

A map is `maps / 255 * scale`, its scale being its maximum. The words of a record are a list column
(one struct a word, empty where there is none); its maps are the rows from `first_row` on.

Every file is written under a temporary name, synced and renamed. The .parquet file of a shard comes
last and holds the checksum of the other: a shard counts from the moment its .parquet exists.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lavender.errors import StoreError
from lavender.maps import Dropped, Word, WordMaps

FORMAT = 2  # 2: a confidence for each word
_MANIFEST, _LOCK, _TEMPORARY = "manifest.json", "writer.lock", ".tmp-"
_CHECKSUM = b"maps_blake2b"
_WORD = pa.struct(
    {
        "text": pa.string(),
        "start": pa.int32(),
        "end": pa.int32(),
        "lemma": pa.string(),
        "part_of_speech": pa.string(),
        "confidence": pa.float32(),
    }
)
_DROPPED = pa.struct({"what": pa.string(), "reason": pa.string()})
_INDEX = pa.schema(
    {
        "image_id": pa.string(),
        "text": pa.string(),
        "first_row": pa.int64(),
        "words": pa.list_(_WORD),
        "dropped": pa.list_(_DROPPED),
    }
)


class MapStore:
    """A store, open for reading. Sees the shards that were complete when it was opened.

    Records keep the order in which they were added. A store can be pickled: the copy opens the same folder.

    Attributes:
        path: its folder.
        identity: the settings that change a map.
        info: versions and names, for people.
        grid: (rows, cols) of every map.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], shards: list[Path], index: list[pa.Table]):
        self.path = path
        self.identity: dict[str, Any] = manifest["identity"]
        self.info: dict[str, Any] = manifest["info"]
        self.grid: tuple[int, int] = tuple(manifest["grid"])
        self._shards = shards
        self._shard_of = [number for number, table in enumerate(index) for _ in range(len(table))]
        self._index = pa.concat_tables([_INDEX.empty_table(), *index]).combine_chunks()
        self._position = {key: position for position, key in enumerate(_keys(self._index))}
        self._files: dict[int, safe_open] = {}

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> MapStore:
        """Open a store for reading.

        Args:
            path: its folder.
            verify: whether to read every map file and compare its checksum.

        Raises:
            StoreError: no store, a newer format, or a damaged shard (named).
        """
        path = Path(path)
        manifest = _read_manifest(path)
        shards = _complete_shards(path)
        tables = [_read_index(shard) for shard in shards]
        if verify:
            for shard, table in zip(shards, tables, strict=True):
                _verify(shard, table)
        return cls(path, manifest, shards, [table.replace_schema_metadata(None) for table in tables])

    @staticmethod
    def writer(
        path: str | Path,
        identity: Mapping[str, Any],
        info: Mapping[str, Any],
        grid: tuple[int, int],
        records_per_shard: int = 256,
    ) -> StoreWriter:
        """Create a store, or reopen one to add to it; see `StoreWriter`."""
        return StoreWriter(Path(path), identity, info, grid, records_per_shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return MapStore.open, (self.path,)

    def __len__(self) -> int:
        """The number of records: pairs of a picture and a text."""
        return len(self._index)

    @property
    def num_words(self) -> int:
        """The number of maps."""
        return sum(len(words.flatten()) for words in self._index["words"].chunks)

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether there is a record of (image_id, text)."""
        return key in self._position

    def get(self, image_id: str, text: str) -> WordMaps | None:
        """The maps of a text on a picture, or None. Raises StoreError if their shard cannot be read."""
        position = self._position.get((image_id, text))
        return None if position is None else self._record(position)

    def __iter__(self) -> Iterator[WordMaps]:
        return (self._record(position) for position in range(len(self)))

    def _record(self, position: int) -> WordMaps:
        record = {name: self._index[name][position].as_py() for name in _INDEX.names}
        confidence = torch.tensor([word.pop("confidence") for word in record["words"]])
        words = tuple(Word(**word) for word in record["words"])
        dropped = tuple(Dropped(**one) for one in record["dropped"])
        maps = self._maps(self._shard_of[position], record["first_row"], len(words))
        return WordMaps(record["image_id"], record["text"], words, maps, dropped, confidence)

    def _maps(self, shard: int, first_row: int, num_words: int) -> Tensor:
        """float32 (word, rows, cols)."""
        if not num_words:
            return torch.zeros(0, *self.grid)
        try:
            if shard not in self._files:
                self._files[shard] = safe_open(_maps_path(self._shards[shard]), framework="pt")
            rows = slice(first_row, first_row + num_words)
            stored = self._files[shard].get_slice("maps")[rows]
            scale = self._files[shard].get_slice("scale")[rows]
        except (OSError, SafetensorError) as error:
            raise _damaged(self._shards[shard], str(error)) from error
        return stored.float() / 255 * scale[:, None, None]


class StoreWriter:
    """A store, open for adding records; one at a time, held by a lock. Use it as a context manager.

    Records are buffered; a full buffer becomes a shard. Leaving the context writes the rest as a smaller shard, also
    after an exception. A kill loses the buffer and nothing else: run again, and skip what is `in` the writer.
    On reopening, the info of the store stays that of its first writer.

    Raises:
        StoreError: the folder holds something else, or a store of another identity, grid or format, or
            another writer has it.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        info: Mapping[str, Any],
        grid: tuple[int, int],
        records_per_shard: int,
    ):
        self.path = path
        self.grid = grid
        self._records_per_shard = records_per_shard
        self._buffer: list[tuple[WordMaps, Tensor, Tensor]] = []
        _check_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path)
        try:
            wanted = {"format": FORMAT, "identity": dict(identity), "grid": list(grid), "info": dict(info)}
            self._open(json.loads(json.dumps(wanted)))  # compare as JSON reads it: lists, not tuples
        except BaseException:
            self.close()
            raise

    def _open(self, wanted: dict[str, Any]) -> None:
        """Check or write the manifest, remove what a kill left behind, and learn what is there."""
        if (self.path / _MANIFEST).exists():
            _check_same(self.path, _read_manifest(self.path), wanted)
        else:
            _write(self.path / _MANIFEST, (json.dumps(wanted, indent=2) + "\n").encode())
        shards = _complete_shards(self.path)
        whole = {_maps_path(shard) for shard in shards}
        for file in [*self.path.glob(f"{_TEMPORARY}*"), *self.path.glob("shard-*.safetensors")]:
            if file not in whole:
                file.unlink()
        self._done = {key for shard in shards for key in _keys(_read_index(shard))}
        self._next_shard = int(shards[-1].stem.removeprefix("shard-")) + 1 if shards else 0

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether (image_id, text) has been added, by this writer or one before."""
        return key in self._done

    def add(self, word_maps: WordMaps) -> bool:
        """Add a record; False, and nothing is added, if its picture and text have one.

        Raises:
            StoreError: maps of another grid, or not in [0, 1].
        """
        key = (word_maps.image_id, word_maps.text)
        if key in self._done:
            return False
        if word_maps.grid != self.grid:
            got = f"maps on a grid of {word_maps.grid} for {word_maps.text!r}"
            raise StoreError(got, f"the grid {self.grid} of {self.path}", "resize the maps, or choose another folder")
        maps = word_maps.maps.detach().cpu().float()
        if not ((maps >= 0) & (maps <= 1)).all():  # NaN is neither
            got = f"maps from {maps.min():g} to {maps.max():g} for {word_maps.text!r}"
            raise StoreError(got, "heat in [0, 1]", "scale them with lavender.maps.to_heat")
        self._buffer.append((word_maps, *_quantised(maps)))
        self._done.add(key)
        if len(self._buffer) >= self._records_per_shard:
            self.flush()
        return True

    def flush(self) -> None:
        """Write the buffered records as a shard. On return they survive a kill and a power cut."""
        if not self._buffer:
            return
        shard = self.path / f"shard-{self._next_shard:05d}.parquet"
        maps = torch.cat([stored for _, stored, _ in self._buffer])
        content = save({"maps": maps, "scale": torch.cat([scale for _, _, scale in self._buffer])})
        index = _index_of([word_maps for word_maps, _, _ in self._buffer])
        index = index.replace_schema_metadata({_CHECKSUM: _checksum(content)})
        sink = pa.BufferOutputStream()
        pq.write_table(index, sink, compression="zstd", write_page_checksum=True)
        _write(_maps_path(shard), content)
        _write(shard, sink.getvalue().to_pybytes())  # last: now the shard counts
        self._buffer.clear()
        self._next_shard += 1

    def close(self) -> None:
        """Release the lock. What was not flushed is lost."""
        os.close(self._lock)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()  # after an exception too: each buffered record is complete
        finally:
            self.close()


def _quantised(maps: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (word, rows, cols) and float32 scale (word,); off by at most scale / 255 / 2."""
    scale = maps.flatten(1).amax(dim=1) if len(maps) else maps.new_zeros(0)
    share = maps / scale.clamp_min(torch.finfo(maps.dtype).tiny)[:, None, None]
    return (share * 255).round().to(torch.uint8), scale


def _index_of(records: list[WordMaps]) -> pa.Table:
    rows, first_row = [], 0
    for record in records:
        sure = record.confidence.tolist()
        words = [asdict(word) | {"confidence": one} for word, one in zip(record.words, sure, strict=True)]
        dropped = [asdict(one) for one in record.dropped]
        rows.append((record.image_id, record.text, first_row, words, dropped))
        first_row += len(words)
    return pa.Table.from_pylist([dict(zip(_INDEX.names, row, strict=True)) for row in rows], schema=_INDEX)


def _keys(index: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(index["image_id"].to_pylist(), index["text"].to_pylist(), strict=True)


def _maps_path(shard: Path) -> Path:
    return shard.with_suffix(".safetensors")


def _complete_shards(folder: Path) -> list[Path]:
    """The .parquet files, in order."""
    return sorted(folder.glob("shard-*.parquet"))


def _read_index(shard: Path) -> pa.Table:
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise _damaged(shard, str(error)) from error
    if table.schema != _INDEX or _CHECKSUM not in (table.schema.metadata or {}):
        raise _damaged(shard, f"its columns are {table.column_names}")
    return table


def _verify(shard: Path, index: pa.Table) -> None:
    maps_path = _maps_path(shard)
    if not maps_path.exists():
        raise _damaged(shard, f"{maps_path.name} is missing")
    if _checksum(maps_path.read_bytes()) != index.schema.metadata[_CHECKSUM]:
        raise _damaged(shard, f"the checksum of {maps_path.name} is not that of what was written")


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()


def _damaged(shard: Path, reason: str) -> StoreError:
    do = f"delete {shard.stem}.parquet and {shard.stem}.safetensors and extract again: only their records are redone"
    return StoreError(f"{shard.stem} of {shard.parent}, which is damaged: {reason}", "a whole shard", do)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.exists():
        do = "check the path, or make a store with `lavender extract`"
        raise StoreError(f"{folder}, which has no {_MANIFEST}", "the folder of a map store", do)
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        do = "restore the file, or extract to another folder"
        raise StoreError(f"{path}, which is damaged: {error!r}", "the manifest of a map store", do) from error
    if version != FORMAT:
        raise StoreError(f"{folder} in format {version}", f"format {FORMAT}", "use the release that wrote it")
    return manifest


def _check_folder(folder: Path) -> None:
    """Refuse a file, and a folder with other content than a store, or than the beginning of one."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}, which is a file", "a folder", "choose another path")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in names if name not in (_LOCK, _TEMPORARY + _MANIFEST)]
    if foreign and _MANIFEST not in foreign:
        got = f"{folder}, which holds {foreign[0]!r} and no {_MANIFEST}"
        raise StoreError(got, "a map store, or an empty or new folder", "choose another folder")


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to add to a store made with other settings; name each one that differs."""
    old = {**found["identity"], "grid": found["grid"]}
    new = {**wanted["identity"], "grid": wanted["grid"]}
    missing = "(not set)"
    differences = [
        f"{key} is {old.get(key, missing)!r} there and {new.get(key, missing)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    ]
    if differences:
        got = f"the store {folder}, made with other settings: {'; '.join(differences)}"
        raise StoreError(got, "the same settings", "choose another folder, or set them as they are there")


def _lock(folder: Path) -> int:
    """Hold the folder's lock, whose file names the holder. The system releases it however the holder ends."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode()
        os.close(descriptor)
        got = f"{folder}, which process {holder} is writing to"
        raise StoreError(got, "one writer at a time", "wait until it ends, or choose another folder") from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whenever the machine stops."""
    temporary = path.with_name(_TEMPORARY + path.name)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too must survive a power cut
    finally:
        os.close(folder)
