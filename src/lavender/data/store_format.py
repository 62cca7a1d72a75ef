"""The files of a map store: their content and their checksums.

    manifest.json               format, id of the store, identity (settings that change a map), grid, info, checksum
    shard-00000.safetensors     "maps": uint8 (word, rows, cols), and "scale": float32 (word,)
                                "records": uint8, a line of JSON per record
                                "ends": int64 (record,), where each line ends
                                "first_row": int64 (record,), the first map of each record
                                "crc32": uint32 (record,), the checksum of each record
                                "keys": uint64 (record, 2), the hash by which each record is found
    shard-00000.parquet         the lines as a table, for people and other tools

A map is `maps / 255 * scale`, where scale is its maximum. The .parquet file of a shard is written last, and the shard
counts once it exists. Every read compares the checksum of its record, which covers the whole record. Opening a store
compares the checksums of the manifest, of each table, and of the columns ends, first_row, crc32 and keys. That last one
is in the header of the .safetensors file, with the id of the store and the number of the shard.
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

from lavender.data.made_from import again
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
_COLUMNS = ("ends", "first_row", "crc32", "keys")  # read when a store is opened
_MANIFEST_TYPES = {"format": int, "store": str, "identity": dict, "grid": list, "info": dict}


class Manifest(NamedTuple):
    """The content of manifest.json.

    Attributes:
        store: the random id of the store, which its shards repeat.
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
        """The manifest of a new store. Raises ValueError or TypeError for values that JSON cannot hold."""
        values = json.loads(json.dumps([dict(identity), dict(info)], allow_nan=False))  # lists, not tuples
        return cls(secrets.token_hex(16), values[0], grid, values[1])

    def content(self) -> bytes:
        """The bytes of the file, with its checksum last."""
        values = {"format": FORMAT, **self._asdict(), "grid": list(self.grid)}
        return (json.dumps(values | {"checksum": _blake2b(json.dumps(values).encode())}, indent=2) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json. Raises StoreError if it is missing, damaged, or of another format."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        do = "check the path, or make a store with `lavender extract`"
        raise StoreError(f"{folder}, which has no {MANIFEST}", "the folder of a map store", do)
    try:
        content = read_whole(path)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        values = json.loads(content)
        if values["format"] != FORMAT and "checksum" not in values:
            raise _other_format(folder, values["format"])
        wrong = [name for name, kind in _MANIFEST_TYPES.items() if type(values[name]) is not kind]
        if wrong:
            raise ValueError(f"its {wrong[0]} is {values[wrong[0]]!r}")
        grid = values["grid"]
        if len(grid) != 2 or not all(type(size) is int and size > 0 for size in grid):
            raise ValueError(f"its grid is {grid!r}")
        manifest = Manifest(values["store"], values["identity"], (grid[0], grid[1]), values["info"])
        if values["format"] == FORMAT and manifest.content() != content:
            raise ValueError("its checksum is not that of what was written")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        do = "restore the file from a copy, or make the store again in another folder"
        raise StoreError(f"{path}, which is damaged: {error!r}", "the manifest of a map store", do) from error
    if values["format"] != FORMAT:
        raise _other_format(folder, values["format"])
    return manifest


def _other_format(folder: Path, version: object) -> StoreError:
    is_older = type(version) is int and version < FORMAT
    do = "make the store again in another folder" if is_older else "use the release that wrote it"
    return StoreError(f"{folder} in format {version}", f"format {FORMAT}", do)


def shard_numbers(folder: Path) -> list[int]:
    """The numbers of the shards, from the names of the .parquet files, in order. Raises StoreError for an odd name."""
    numbers = []
    for name in os.listdir(folder):
        if name.startswith("shard-") and name.endswith(".parquet"):
            match = re.fullmatch(r"shard-(\d{5,9})\.parquet", name)
            if not match or index_path(folder, int(match[1])).name != name:
                got = f"{folder / name}, which no store writes"
                raise StoreError(got, "shard-00000.parquet and so on", "remove it")
            numbers.append(int(match[1]))
    return sorted(numbers)


def index_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.parquet"


def maps_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def key_of(image_id: str, text: str) -> bytes:
    """A 16-byte hash that identifies a record. Raises UnicodeEncodeError for lone surrogates."""
    return hashlib.blake2b(f"{len(image_id)} {image_id}{text}".encode(), digest_size=16).digest()


def pack_shard(
    manifest: Manifest, number: int, records: Sequence[tuple[WordMaps, np.ndarray, np.ndarray]]
) -> tuple[bytes, bytes]:
    """The bytes of the two files of a shard, .safetensors and .parquet.

    Args:
        manifest: of the store.
        number: of the shard.
        records: each with its maps, uint8 (word, rows, cols), and their scale, float32 (word,).
    """
    seed, lines, checksums = _seed(manifest, number), [], []
    for record, maps, scale in records:
        lines.append((_line(record) + "\n").encode())
        checksums.append(_crc32((lines[-1], scale.tobytes(), maps.tobytes()), seed))
    num_words = [len(record.words) for record, _, _ in records]
    keys = b"".join(key_of(record.image_id, record.text) for record, _, _ in records)
    columns = {
        "ends": np.cumsum([len(line) for line in lines], dtype=np.int64),
        "first_row": np.cumsum([0, *num_words[:-1]], dtype=np.int64),
        "crc32": np.array(checksums, np.uint32),
        "keys": np.frombuffer(keys, "<u8").reshape(-1, 2),
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
    """A record without its maps, as JSON."""
    words = [
        [word.text, int(word.start), int(word.end), word.lemma, word.part_of_speech, confidence]
        for word, confidence in zip(record.words, record.confidence.tolist(), strict=True)
    ]
    dropped = [[drop.what, drop.reason] for drop in record.dropped]
    return json.dumps([record.image_id, record.text, words, dropped], ensure_ascii=False, separators=(",", ":"))


def _table(records: Sequence[WordMaps], seed: int) -> bytes:
    """The bytes of the .parquet file, with its checksum in the place reserved for it."""
    rows = [
        {
            "image_id": record.image_id,
            "text": record.text,
            "words": [
                vars(word) | {"confidence": confidence}
                for word, confidence in zip(record.words, record.confidence.tolist(), strict=True)
            ],
            "dropped": [vars(drop) for drop in record.dropped],
        }
        for record in records
    ]
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, _INDEX, compression="zstd", store_schema=False) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=_INDEX))
        writer.add_key_value_metadata({"seal": _SEAL.decode() + "0" * 32})
    return _sealed(sink.getvalue().to_pybytes(), seed)


def _sealed(content: bytes, seed: int) -> bytes:
    """The bytes of a .parquet file with the right checksum in its place."""
    place = content.rindex(_SEAL) + len(_SEAL)
    checksum = _blake2b(b"%d " % seed + content[:place] + content[place + 32 :])
    return content[:place] + checksum.encode() + content[place + 32 :]


def _blake2b(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _seed(manifest: Manifest, number: int) -> int:
    """The start value of a shard's checksums, so that the same content in another shard has other checksums."""
    return zlib.crc32(f"{manifest.store} {number}".encode())


def _crc32(parts: Iterable[bytes], start: int) -> int:
    for part in parts:
        start = zlib.crc32(part, start)
    return start


class Shard:
    """A shard, open for reading. The places of its records are in memory, the records on disk.

    Opening it checks everything but the records; each record is checked when it is read.

    Attributes:
        keys: `key_of` each record as two numbers, uint64 (record, 2).
        checksums: of each record, uint32.
        num_words: the number of maps.
    """

    def __init__(self, folder: Path, number: int, manifest: Manifest):
        """Raises StoreError for a damaged shard, and for a shard of another store or number."""
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
        """A file descriptor for `record`, which the caller closes. Raises StoreError."""
        try:
            return os.open(self._path, READ)
        except FileNotFoundError as error:
            raise self._damaged(f"{Path(self._path).name} is missing") from error
        except OSError as error:
            raise unreadable(Path(self._path), error) from error

    def record(self, row: int, file: int) -> WordMaps:
        """A record as it was added. Raises StoreError if it is damaged or cannot be read."""
        line, scale, maps = self._checked(row, file)
        try:
            image_id, text, words, dropped = json.loads(line.decode())
            confidence = [word[5] for word in words]
            maxima = np.frombuffer(scale, "<f4")
            for value in (*confidence, *maxima.tolist()):
                if not 0 <= value <= 1:  # also true of NaN
                    raise ValueError(f"a scale or confidence of {value}")
            heat = np.frombuffer(maps, np.uint8).reshape(len(words), *self._manifest.grid).astype(np.float32)
            heat /= _STEPS
            heat *= maxima[:, None, None]
            return WordMaps(
                image_id,
                text,
                tuple([Word(*word[:5]) for word in words]),
                torch.from_numpy(heat),
                tuple([Dropped(*drop) for drop in dropped]),
                torch.from_numpy(np.array(confidence, np.float32)),
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
        """The bytes of a record's line, scales and maps. Raises StoreError if their checksum is wrong."""
        begin, first, cells = self._ends[row], self._first_row[row], self._cells
        number = self._first_row[row + 1] - first
        try:
            line = read_at(file, self._ends[row + 1] - begin, self._records_at + begin)
            scale = read_at(file, 4 * number, self._scale_at + 4 * first)
            maps = read_at(file, number * cells, self._maps_at + first * cells)
        except OSError as error:
            raise unreadable(Path(self._path), error) from error
        if zlib.crc32(maps, zlib.crc32(scale, zlib.crc32(line, self._seed))) != self.checksums[row]:
            raise self._damaged(
                f"the checksum of record {row} of {Path(self._path).name} is not that of what was written"
            )
        return line, scale, maps

    def _check_table(self) -> None:
        """Compare the checksum of the .parquet file. Raises StoreError."""
        path = index_path(self._folder, self._number)
        try:
            content = read_whole(path)
        except OSError as error:
            raise unreadable(path, error) from error
        if _SEAL not in content or _sealed(content, self._seed) != content:
            raise self._damaged(f"the checksum of {path.name} is not that of what was written for this shard")

    def _read_header(self, file: int) -> None:
        """Read where everything lies in the .safetensors file.

        The safetensors library tells no offsets, and a read at an offset is ten times as fast as its slices. Raises
        ValueError, and the errors that an odd header leads to.
        """
        length = int.from_bytes(read_at(file, 8, 0), "little")
        header = json.loads(read_at(file, min(length, 2**16), 8))
        metadata = header.pop("__metadata__")
        if (metadata["store"], metadata["shard"]) != (self._manifest.store, str(self._number)):
            is_ours = metadata["store"] == self._manifest.store
            what = f"shard {metadata['shard']}" if is_ours else "a shard of another store"
            do = f"put the files back where they were written, or {self._redo()}"
            raise StoreError(f"{self._path}, which was written as {what}", "the files of one store", do)
        (rows,), (number,), (size,) = (header[name]["shape"] for name in ("scale", "crc32", "records"))
        expected = {
            "maps": ("U8", [rows, *self._manifest.grid]),
            "scale": ("F32", [rows]),
            "records": ("U8", [size]),
            "ends": ("I64", [number]),
            "first_row": ("I64", [number]),
            "crc32": ("U32", [number]),
            "keys": ("U64", [number, 2]),
        }
        tensors = {name: (tensor["dtype"], tensor["shape"]) for name, tensor in header.items()}
        if tensors != expected:
            raise ValueError(f"it holds {tensors}, expected {expected}")
        places = {name: 8 + length + tensor["data_offsets"][0] for name, tensor in header.items()}
        sizes = {name: _BYTES[kind] * math.prod(shape) for name, (kind, shape) in expected.items()}
        end = 8 + length
        for name in sorted(places, key=lambda name: (places[name], sizes[name])):
            if places[name] != end:
                raise ValueError(f"its {name!r} is at {places[name]}, expected {end}")
            end += sizes[name]
        if os.fstat(file).st_size != end:
            raise ValueError(f"it has {os.fstat(file).st_size} bytes, expected {end}")
        columns = [read_at(file, sizes[name], places[name]) for name in _COLUMNS]
        if str(_crc32(columns, self._seed)) != metadata["crc32"]:
            raise ValueError("the checksum of its index is not that of what was written")
        self._ends, self._first_row = array("q", bytes(8) + columns[0]), array("q", columns[1])
        self._first_row.append(rows)
        self.checksums, self.keys = array("I", columns[2]), np.frombuffer(columns[3], "<u8").reshape(-1, 2)
        self._records_at, self._scale_at, self._maps_at = places["records"], places["scale"], places["maps"]
        self._cells, self.num_words = math.prod(self._manifest.grid), rows

    def _damaged(self, reason: str) -> StoreError:
        got = f"shard-{self._number:05d} of {self._folder}, which is damaged: {reason}"
        return StoreError(got, "a whole shard", self._redo())

    def _redo(self) -> str:
        index, maps = index_path(self._folder, self._number).name, maps_path(self._folder, self._number).name
        return f"delete {index} and {maps} and {again(self._manifest.info)}: only their records are redone"


def unreadable(path: Path, error: OSError) -> StoreError:
    """The error of a file that the system cannot read."""
    got = f"{path}, which cannot be read: {error.strerror or error}"
    return StoreError(got, "a file that can be read", "check the path, the disk and the rights")
