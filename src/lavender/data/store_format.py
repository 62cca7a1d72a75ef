"""The files of a map store: what they hold, and how a byte that is not what was written is noticed.

    manifest.json           format, the store's own id, identity (settings that change a map), grid, info, checksum
    shard-00000.safetensors     "maps": uint8 (word, rows, cols) and "scale": float32 (word,);
                                "records": uint8, a line of JSON for each record; "ends", "first_row", "crc32" and
                                "keys": int64, int64, uint32 (record,) and uint64 (record, 2), where each line ends,
                                the record's first map, its checksum, and what it is found by
    shard-00000.parquet         the lines as a table, for people and other tools

A map is `maps / 255 * scale`, its scale being its maximum. The .parquet file of a shard comes last: the shard counts
from the moment it exists. A record's checksum is over all that it holds; every read compares it. What stands for a
whole shard has a checksum that is compared when a store is opened: the columns by which records are found (in the
header, beside the store's id and the shard's number), the table, the manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save

from lavender.errors import StoreError
from lavender.files import READ, read_at, read_whole
from lavender.maps import Dropped, Word, WordMaps

FORMAT = 3  # 3: a checksum for each record, the manifest and the index; 2: a confidence for each word
MANIFEST = "manifest.json"
_SEAL = b"blake2b:"
_STEPS = np.float32(255)
_BYTES = {"U8": 1, "F32": 4, "U32": 4, "I64": 8, "U64": 8}
_INDEX = pa.schema(
    {
        "image_id": pa.string(),
        "text": pa.string(),
        "words": pa.list_(
            pa.struct(
                {
                    "text": pa.string(),
                    "start": pa.int32(),
                    "end": pa.int32(),
                    "lemma": pa.string(),
                    "part_of_speech": pa.string(),
                    "confidence": pa.float32(),
                }
            )
        ),
        "dropped": pa.list_(pa.struct({"what": pa.string(), "reason": pa.string()})),
    }
)
_COLUMNS = ("ends", "first_row", "crc32", "keys")  # of a record, read when a store is opened
_MANIFEST_TYPES = {"format": int, "store": str, "identity": dict, "grid": list, "info": dict}


class Manifest(NamedTuple):
    """What a store says of itself.

    Attributes:
        store: its own id, drawn when it was made; its shards carry it.
        identity: the settings that change a map.
        grid: (rows, cols) of every map.
        info: versions and names, for people.
    """

    store: str
    identity: dict[str, Any]
    grid: tuple[int, int]
    info: dict[str, Any]

    @classmethod
    def new(cls, identity: Mapping[str, Any], grid: tuple[int, int], info: Mapping[str, Any]) -> Manifest:
        """Of a store that is yet to be made. Raises ValueError or TypeError for what JSON can't hold."""
        same = json.loads(json.dumps([dict(identity), dict(info)], allow_nan=False))  # lists, not tuples
        return cls(secrets.token_hex(16), same[0], grid, same[1])

    def content(self) -> bytes:
        """The file, its checksum last."""
        said = {"format": FORMAT, **self._asdict(), "grid": list(self.grid)}
        return (json.dumps(said | {"checksum": _blake2b(json.dumps(said).encode())}, indent=2) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Raises StoreError: none, damaged, or of another format."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        do = "check the path, or make a store with `lavender extract`"
        raise StoreError(f"{folder}, which has no {MANIFEST}", "the folder of a map store", do)
    try:
        content = read_whole(path)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        said = json.loads(content)
        if said["format"] != FORMAT and "checksum" not in said:
            raise _of_another_format(folder, said["format"])
        wrong = [name for name, kind in _MANIFEST_TYPES.items() if type(said[name]) is not kind]
        if wrong:
            raise ValueError(f"its {wrong[0]} is {said[wrong[0]]!r}")
        grid = said["grid"]
        if len(grid) != 2 or not all(type(one) is int and one > 0 for one in grid):
            raise ValueError(f"its grid is {grid!r}")
        manifest = Manifest(said["store"], said["identity"], (grid[0], grid[1]), said["info"])
        if said["format"] == FORMAT and manifest.content() != content:
            raise ValueError("its checksum is not that of what was written")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        do = "restore the file from a copy, or extract to another folder"
        raise StoreError(f"{path}, which is damaged: {error!r}", "the manifest of a map store", do) from error
    if said["format"] != FORMAT:
        raise _of_another_format(folder, said["format"])
    return manifest


def _of_another_format(folder: Path, version: object) -> StoreError:
    is_older = type(version) is int and version < FORMAT
    do = "extract again to another folder" if is_older else "use the release that wrote it"
    return StoreError(f"{folder} in format {version}", f"format {FORMAT}", do)


def shard_numbers(folder: Path) -> list[int]:
    """Those of the .parquet files, in order. Raises StoreError for one of another name."""
    numbers = []
    for name in os.listdir(folder):
        if name.startswith("shard-") and name.endswith(".parquet"):
            found = re.fullmatch(r"shard-(\d{5,9})\.parquet", name)
            if not found or index_path(folder, int(found[1])).name != name:
                raise StoreError(
                    f"{folder / name}, which no store writes", "shard-00000.parquet and so on", "remove it"
                )
            numbers.append(int(found[1]))
    return sorted(numbers)


def index_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.parquet"


def maps_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def key_of(image_id: str, text: str) -> bytes:
    """16 bytes that stand for a record. Raises UnicodeEncodeError for half characters."""
    return hashlib.blake2b(f"{len(image_id)} {image_id}{text}".encode(), digest_size=16).digest()


def pack_shard(
    manifest: Manifest, number: int, records: Sequence[tuple[WordMaps, np.ndarray, np.ndarray]]
) -> tuple[bytes, bytes]:
    """The two files of a shard, .safetensors and .parquet.

    Args:
        records: each with its maps uint8 (word, rows, cols) and their scale float32 (word,).
    """
    seed, lines, checksums = _seed(manifest, number), [], []
    for record, maps, scale in records:
        lines.append((_line(record) + "\n").encode())
        checksums.append(_crc32((lines[-1], scale.tobytes(), maps.tobytes()), seed))
    words = [len(record.words) for record, _, _ in records]
    columns = {
        "ends": np.cumsum([len(line) for line in lines], dtype=np.int64),
        "first_row": np.cumsum([0, *words[:-1]], dtype=np.int64),
        "crc32": np.array(checksums, np.uint32),
        "keys": np.frombuffer(b"".join(key_of(one.image_id, one.text) for one, _, _ in records), "<u8").reshape(-1, 2),
    }
    tensors = columns | {
        "maps": np.concatenate([maps for _, maps, _ in records]),
        "scale": np.concatenate([scale for _, _, scale in records]),
        "records": np.frombuffer(b"".join(lines), np.uint8),
    }
    checksum = _crc32([columns[name].tobytes() for name in _COLUMNS], seed)
    metadata = {"store": manifest.store, "shard": str(number), "crc32": str(checksum)}
    return save(tensors, metadata), _table([record for record, _, _ in records], seed)


def _line(record: WordMaps) -> str:
    sure = record.confidence.tolist()
    words = [
        [word.text, int(word.start), int(word.end), word.lemma, word.part_of_speech, one]
        for word, one in zip(record.words, sure, strict=True)
    ]
    dropped = [[one.what, one.reason] for one in record.dropped]
    return json.dumps([record.image_id, record.text, words, dropped], ensure_ascii=False, separators=(",", ":"))


def _table(records: Sequence[WordMaps], seed: int) -> bytes:
    """The .parquet file, with a checksum of its own in the place that is left for it."""
    rows = [
        {
            "image_id": record.image_id,
            "text": record.text,
            "words": [
                vars(word) | {"confidence": one}
                for word, one in zip(record.words, record.confidence.tolist(), strict=True)
            ],
            "dropped": [vars(one) for one in record.dropped],
        }
        for record in records
    ]
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, _INDEX, compression="zstd", store_schema=False) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=_INDEX))
        writer.add_key_value_metadata({"seal": _SEAL.decode() + "0" * 32})
    return _sealed(sink.getvalue().to_pybytes(), seed)


def _sealed(content: bytes, seed: int) -> bytes:
    at = content.rindex(_SEAL) + len(_SEAL)
    checksum = _blake2b(b"%d " % seed + content[:at] + content[at + 32 :])
    return content[:at] + checksum.encode() + content[at + 32 :]


def _blake2b(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _seed(manifest: Manifest, number: int) -> int:
    """What a shard's checksums begin with: the same content elsewhere has others."""
    return zlib.crc32(f"{manifest.store} {number}".encode())


def _crc32(parts: Iterable[bytes], start: int) -> int:
    for part in parts:
        start = zlib.crc32(part, start)
    return start


class Shard:
    """One shard, open for reading: where its records lie, in memory; the records on disk.

    Opening it checks all but the records; reading one checks it.

    Attributes:
        keys: `key_of` each record as two numbers, uint64 (record, 2).
        num_words: the number of its maps.
    """

    def __init__(self, folder: Path, number: int, manifest: Manifest):
        """Raises StoreError for a damaged shard, and for one of another store or number."""
        self._folder, self._number, self._manifest = folder, number, manifest
        self._path, self._seed = str(maps_path(folder, number)), _seed(manifest, number)
        file = self.open_file()
        try:
            self._read_header(file)
        except OSError as error:
            raise unreadable(Path(self._path), error) from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise self._damaged(f"{Path(self._path).name}: {error}") from error
        finally:
            os.close(file)
        self._check_table()

    def __len__(self) -> int:
        return len(self.keys)

    def open_file(self) -> int:
        """A descriptor for `record`, to be closed. Raises StoreError."""
        try:
            return os.open(self._path, READ)
        except FileNotFoundError as error:
            raise self._damaged(f"{Path(self._path).name} is missing") from error
        except OSError as error:
            raise unreadable(Path(self._path), error) from error

    def record(self, row: int, file: int) -> WordMaps:
        """A record as it was added. Raises StoreError where it is not what was written."""
        line, scale, maps = self._checked(row, file)
        try:
            image_id, text, said, dropped = json.loads(line.decode())
            sure = [one[5] for one in said]
            top = np.frombuffer(scale, "<f4")
            for one in (*sure, *top.tolist()):
                if not 0 <= one <= 1:  # NaN is neither
                    raise ValueError(f"a scale or confidence of {one}")
            heat = np.frombuffer(maps, np.uint8).reshape(len(said), *self._manifest.grid).astype(np.float32)
            heat /= _STEPS
            heat *= top[:, None, None]
            return WordMaps(
                image_id,
                text,
                tuple([Word(*one[:5]) for one in said]),
                torch.from_numpy(heat),
                tuple([Dropped(*one) for one in dropped]),
                torch.from_numpy(np.array(sure, np.float32)),
            )
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            raise self._damaged(f"record {row}: {error}") from error

    def verify(self) -> None:
        """Compare the checksum of every record. Raises StoreError."""
        file = self.open_file()
        try:
            for row in range(len(self)):
                self._checked(row, file)
        finally:
            os.close(file)

    def _checked(self, row: int, file: int) -> tuple[bytes, bytes, bytes]:
        """A record's line, scales and maps as bytes."""
        begin, first, cells = self._ends[row], self._first_row[row], self._cells
        number = self._first_row[row + 1] - first
        try:
            line = read_at(file, self._ends[row + 1] - begin, self._records_at + begin)
            scale = read_at(file, 4 * number, self._scale_at + 4 * first)
            maps = read_at(file, number * cells, self._maps_at + first * cells)
        except OSError as error:
            raise unreadable(Path(self._path), error) from error
        if zlib.crc32(maps, zlib.crc32(scale, zlib.crc32(line, self._seed))) != self._crc32[row]:
            raise self._damaged(
                f"the checksum of record {row} of {Path(self._path).name} is not that of what was written"
            )
        return line, scale, maps

    def _check_table(self) -> None:
        path = index_path(self._folder, self._number)
        try:
            content = read_whole(path)
        except OSError as error:
            raise unreadable(path, error) from error
        if _SEAL not in content or _sealed(content, self._seed) != content:
            raise self._damaged(f"the checksum of {path.name} is not that of what was written for this shard")

    def _read_header(self, file: int) -> None:
        """Learn where everything is. By hand, for safetensors tells no offsets, and a read at an offset is ten times
        as quick as its slices. Raises ValueError and what a strange header leads to.
        """
        length = int.from_bytes(read_at(file, 8, 0), "little")
        header = json.loads(read_at(file, min(length, 2**16), 8))
        said = header.pop("__metadata__")
        if (said["store"], said["shard"]) != (self._manifest.store, str(self._number)):
            what = f"shard {said['shard']}" if said["store"] == self._manifest.store else "a shard of another store"
            do = f"put the files back where they were written, or {self._redo()}"
            raise StoreError(f"{self._path}, which was written as {what}", "the files of one store", do)
        (rows,), (number,), (size,) = (header[name]["shape"] for name in ("scale", "crc32", "records"))
        wanted = {
            "maps": ("U8", [rows, *self._manifest.grid]),
            "scale": ("F32", [rows]),
            "records": ("U8", [size]),
            "ends": ("I64", [number]),
            "first_row": ("I64", [number]),
            "crc32": ("U32", [number]),
            "keys": ("U64", [number, 2]),
        }
        found = {name: (one["dtype"], one["shape"]) for name, one in header.items()}
        if found != wanted:
            raise ValueError(f"it holds {found}, expected {wanted}")
        places = {name: 8 + length + one["data_offsets"][0] for name, one in header.items()}
        sizes = {name: _BYTES[kind] * math.prod(shape) for name, (kind, shape) in wanted.items()}
        end = 8 + length
        for name in sorted(places, key=lambda name: (places[name], sizes[name])):
            if places[name] != end:
                raise ValueError(f"its {name!r} is at {places[name]}, expected {end}")
            end += sizes[name]
        if os.fstat(file).st_size != end:
            raise ValueError(f"it has {os.fstat(file).st_size} bytes, expected {end}")
        columns = [read_at(file, sizes[name], places[name]) for name in _COLUMNS]
        if str(_crc32(columns, self._seed)) != said["crc32"]:
            raise ValueError("the checksum of its index is not that of what was written")
        self._ends, self._first_row = array("q", bytes(8) + columns[0]), array("q", columns[1])
        self._first_row.append(rows)
        self._crc32, self.keys = array("I", columns[2]), np.frombuffer(columns[3], "<u8").reshape(-1, 2)
        self._records_at, self._scale_at, self._maps_at = places["records"], places["scale"], places["maps"]
        self._cells, self.num_words = math.prod(self._manifest.grid), rows

    def _damaged(self, reason: str) -> StoreError:
        got = f"shard-{self._number:05d} of {self._folder}, which is damaged: {reason}"
        return StoreError(got, "a whole shard", self._redo())

    def _redo(self) -> str:
        index, maps = index_path(self._folder, self._number).name, maps_path(self._folder, self._number).name
        return f"delete {index} and {maps} and extract again: only their records are redone"


def unreadable(path: Path, error: OSError) -> StoreError:
    """What cannot be read at all."""
    got = f"{path}, which cannot be read: {error.strerror or error}"
    return StoreError(got, "a file that can be read", "check the path, the disk and the rights")
