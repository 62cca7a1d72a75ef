"""Check, count and merge map stores: what `lavender store verify`, `stats` and `merge` do."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lavender.data.made_from import without_sources
from lavender.data.store import MapStore, SeveralStores
from lavender.data.store_format import MANIFEST, Shard, index_path, maps_path, read_manifest, shard_numbers
from lavender.data.store_writer import VERSIONS, differing
from lavender.errors import ConfigError, StoreError
from lavender.files import TEMPORARY, expanded, file_error, read_whole, shown
from lavender.maps import WordMaps

MAX_STEPS = 2
"""Steps of 1/255 by which a cell of two equal maps may differ: what rounding on two machines leaves."""
MAX_CONFIDENCE = 0.01
"""The same for a confidence."""
NUM_NAMED = 10
_BINS = 1000  # of confidence, so that its quantiles need no list of all words


@dataclass(frozen=True)
class Verified:
    """What reading a whole store found.

    Attributes:
        records: records that are whole.
        words: their word maps.
        faults: what is missing, damaged or twice in the store; one text each.
    """

    records: int
    words: int
    faults: tuple[str, ...]


def verify(path: str | Path) -> Verified:
    """Read every record of a store, compare its checksum and decode it. Unlike `MapStore.open`, name every fault.

    The records are also counted: `extraction.json`, if there is one, says how many there were when an extraction ended.

    Raises:
        StoreError: no store at the path, a damaged manifest, or a file with the name of a shard that no store writes.
    """
    path = expanded(path)
    manifest, numbers = read_manifest(path), shard_numbers(path)
    absent = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
    faults = [f"shard {number} is missing" for number in absent if not maps_path(path, number).exists()]
    records = words = 0
    keys = [np.zeros((0, 2), np.uint64)]
    for number in numbers:
        try:
            shard = Shard(path, number, manifest)
        except StoreError as error:
            faults.append(error.got)
            continue
        keys.append(shard.keys)
        for record in _records(shard, range(len(shard))):
            if isinstance(record, StoreError):
                faults.append(record.got)
            else:
                records, words = records + 1, words + len(record.words)
    for file in sorted(path.glob("shard-*.safetensors")):  # after the reading, in which a writer may have gone on
        if not (table := file.with_suffix(".parquet")).exists():
            faults.append(f"{file.name} has no {table.name}, which is lost, or its writer was killed or is not done")
    number, distinct = sum(map(len, keys)), len(np.unique(np.concatenate(keys), axis=0))
    if number > distinct:
        faults.append(f"records that are there twice: {number - distinct}; a merge to a new store takes each once")
    if not faults and distinct < (counted := _counted(path)):
        faults.append(f"{counted - distinct} of the {counted} records are missing that extraction.json counts")
    return Verified(records, words, tuple(faults))


def _counted(path: Path) -> int:
    """The records that a store had when an extraction ended last; 0 if that is not recorded."""
    try:
        number = json.loads(read_whole(path / "extraction.json"))["in_store"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return number if type(number) is int else 0


def _records(shard: Shard, rows: Iterable[int]) -> Iterator[WordMaps | StoreError]:
    """These records of a shard, each read or the reason why it cannot be."""
    file = shard.open_file()
    try:
        for row in rows:
            try:
                yield shard.record(row, file)
            except StoreError as error:
                yield error
    finally:
        os.close(file)


def stats(store: str | Path | MapStore) -> dict[str, Any]:
    """Counts of a store, from its tables: no map is read, and memory does not grow with the maps.

    Args:
        store: its folder, or the open store.

    Returns:
        JSON values: numbers of records, images, words and left-out words; words per text; words by part of speech and
        the most frequent lemmas; bytes; mean and quantiles of the confidence, to a thousandth (None without a word);
        grid (rows, cols), identity and info.

    Raises:
        StoreError: no store at the path, or a damaged one.
    """
    store = store if isinstance(store, MapStore) else MapStore.open(store)
    tally = _Tally()
    size = 0
    for number in range(len(store.shards)):
        files = index_path(store.path, number), maps_path(store.path, number)
        size += sum(file.stat().st_size for file in files)
        tally.add(pq.read_table(files[0], columns=["image_id", "words", "dropped"]))
    return {
        "records": len(store),
        "images": len(np.unique(np.concatenate([np.zeros(0, np.uint64), *tally.images]))),
        "words": store.num_words,
        "words_per_text": _quantiles(tally.lengths),
        "parts_of_speech": dict(tally.parts_of_speech.most_common()),
        "lemmas": len(tally.lemmas),
        "most_frequent": dict(tally.lemmas.most_common(NUM_NAMED)),
        "left_out": dict(tally.left_out.most_common()),
        "confidence": _quantiles(tally.confidence, 1 / _BINS),
        "bytes": size,
        "grid": list(store.grid),
        "identity": store.identity,
        "info": store.info,
    }


class _Tally:
    """Counts over the tables of the shards."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []
        self.lengths = np.zeros(0, np.int64)
        self.confidence = np.zeros(_BINS + 1, np.int64)
        self.parts_of_speech: Counter[str] = Counter()
        self.lemmas: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def add(self, table: pa.Table) -> None:
        """Add the records of one shard."""
        images = table["image_id"].to_pylist()
        hashes = [hashlib.blake2b(image.encode(), digest_size=8).digest() for image in images]
        self.images.append(np.unique(np.frombuffer(b"".join(hashes), np.uint64)))
        words = table["words"].combine_chunks()
        number = np.bincount(np.asarray(words.value_lengths(), np.int64), minlength=len(self.lengths))
        number[: len(self.lengths)] += self.lengths
        self.lengths = number
        flat = words.flatten()
        self.lemmas.update(flat.field("lemma").to_pylist())
        self.parts_of_speech.update(flat.field("part_of_speech").to_pylist())
        bins = np.rint(np.asarray(flat.field("confidence"), np.float64) * _BINS).astype(np.int64)
        self.confidence += np.bincount(bins, minlength=_BINS + 1)
        self.left_out.update(table["dropped"].combine_chunks().flatten().field("reason").to_pylist())


def _quantiles(counts: np.ndarray, unit: float = 1) -> dict[str, float] | None:
    """Mean and quantiles of the numbers 0, 1, … that occur so often, in this unit; None if there is none."""
    total, upto = int(counts.sum()), counts.cumsum()
    if not total:
        return None
    found = {"mean": float(counts @ np.arange(len(counts))) / total}
    for name, share in {"min": 0, "10%": 0.1, "median": 0.5, "90%": 0.9, "max": 1}.items():
        found[name] = float(upto.searchsorted(round(share * (total - 1)), side="right"))
    return {name: round(value * unit, 3) for name, value in found.items()}


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        records: records in the store at the end.
        added: records written by this merge.
        repeated: records that a store before in the list, or the written store, had already.
    """

    records: int
    added: int
    repeated: int


def merge(paths: Sequence[str | Path], out: str | Path) -> Merged:
    """Write the records of several stores to one. Nothing is written unless all fit together.

    Stores fit if they have the same identity and grid, and equal records of what several of them have: the same words,
    cells that differ by at most `MAX_STEPS` steps of 1/255, and confidences that differ by at most `MAX_CONFIDENCE`.
    A store without a teacher's version fits to any; the result has the version that one of the others has.
    Of equal records the first is taken. A new store appears when it is complete. To add to a store that is there,
    repeat the call after an interruption.

    Args:
        paths: the stores.
        out: a new or empty folder, or a store of the same identity, to which records are added. It may lack shards.

    Raises:
        ConfigError: no store.
        FileError: `out` cannot be written.
        StoreError: a damaged store, another identity or grid, or different maps of the same image and text.
    """
    if not paths:
        raise ConfigError("no store to merge", "one or more", "name the stores")
    out = expanded(out)
    folders = list(dict.fromkeys(Path(os.path.realpath(expanded(path))) for path in paths))
    stores = [MapStore.open(folder, verify=True) for folder in folders]
    before = [_with_gaps(out), *stores] if os.path.lexists(out / MANIFEST) else stores
    firsts = {key: next((store for store in before if key in store.identity), before[0]) for key in VERSIONS}
    for store in before:
        for first in firsts.values():
            _check_fits(first.path, store.path)
    repeated = _repeated(before)
    known = {key: first.identity[key] for key, first in firsts.items() if key in first.identity}
    identity, info, grid = before[0].identity | known, _common([store.info for store in stores]), before[0].grid
    with store_folder(out) as folder, MapStore.writer(folder, identity, info, grid) as writer:
        writer.note_source("merge", [str(path) for path in folders])
        added = sum(writer.add(record) for store in stores for record in store)
        return Merged(len(writer), added, repeated)


def _with_gaps(path: Path) -> MapStore:
    """A store that may lack shards, as a writer takes it."""
    manifest = read_manifest(path)
    return MapStore(path, manifest, [Shard(path, number, manifest) for number in shard_numbers(path)])


@contextmanager
def store_folder(out: Path) -> Iterator[Path]:
    """Where to write a store: `out` if it is a store, to which records are added, else a `whole_folder` for it."""
    if os.path.lexists(out / MANIFEST):
        yield out
        return
    with whole_folder(out, MANIFEST) as folder:
        try:
            yield folder
        except StoreError as error:
            if isinstance(error.__cause__, OSError):  # it says that what was written before is kept
                raise file_error(error.__cause__, out) from error
            raise


@contextmanager
def whole_folder(out: Path, last: str) -> Iterator[Path]:
    """A temporary folder, whose files appear at `out` when it is complete, and are removed after an error.

    Args:
        out: a new or empty folder, which may be a link or a mount.
        last: the file without which the others do not count. It comes last to a folder that is there already.

    Raises:
        StoreError: `out` is a file, or holds files.
    """
    is_new = not os.path.lexists(out)
    if not is_new and not (out.is_dir() and not any(out.iterdir())):
        left = [path.name for path in out.iterdir() if path.name.startswith(TEMPORARY)] if out.is_dir() else []
        if left and len(left) == len(list(out.iterdir())):
            got = f"{out}, which holds {left[0]}, as a command leaves it that was killed or is running still"
            raise StoreError(got, "a new or empty folder", "remove what is in it once no command writes there")
        raise StoreError(f"{out}, which is there already", "a new or empty folder", "choose another folder")
    folder = (out.parent if is_new else out) / f"{TEMPORARY}{out.name}-{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    try:
        yield folder
        if is_new:
            os.replace(folder, out)
        else:
            for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
                os.replace(path, out / path.name)
            folder.rmdir()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_fits(first: Path, other: Path) -> None:
    if found := differing(read_manifest(first), read_manifest(other)):
        differences = [f"{key} is {old!r} and {new!r}" for key, (old, new) in found.items()]
        got = f"{first} and {other}, made with different settings: {'; '.join(differences)}"
        do = "merge those with the same settings; training takes both if their grids are equal: maps: [FIRST, SECOND]"
        raise StoreError(got, "stores made with the same settings", do)


def _repeated(stores: Sequence[MapStore]) -> int:
    """How many records an earlier store has too. Raises StoreError if they differ."""
    repeated, faults = 0, []
    seen: set[bytes] = set()
    for number, store in enumerate(stores):
        for shard in store.shards:
            twice = [row for row, key in enumerate(shard.keys) if key.tobytes() in seen]
            for record in _records(shard, twice):
                if isinstance(record, StoreError):
                    raise record
                other = SeveralStores(*stores[:number]).get(record.image_id, record.text)
                repeated += 1
                if other is None or not _is_same(record, other):
                    faults.append(f"{shown(record.text)} on the image {record.image_id[:12]} of {store.path}")
        seen.update(key.tobytes() for shard in store.shards for key in shard.keys)
    if faults:
        named = "; ".join(faults[:NUM_NAMED]) + ("; …" if len(faults) > NUM_NAMED else "")
        raise StoreError(
            f"{len(faults)} of {repeated} repeated records that differ from those of an earlier store: {named}",
            "equal maps of the same image and text",
            "leave one of the stores out, or train with all of them: `maps: [FIRST, SECOND]`, the first one answers",
        )
    return repeated


def _is_same(first: WordMaps, second: WordMaps) -> bool:
    """Whether two records have the same words, and maps and confidences that differ by no more than rounding does."""
    if first.words != second.words:
        return False
    is_near = (first.maps - second.maps).abs().amax() <= MAX_STEPS / 255 + 1e-6 if len(first.words) else True
    return bool(is_near) and bool(((first.confidence - second.confidence).abs() <= MAX_CONFIDENCE).all())


def _common(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The info of a merged store: values on which the stores agree; of other entries, the list of values."""
    merged = {}
    for name in dict.fromkeys(name for info in infos for name in without_sources(info)):
        values: list[Any] = []
        for info in infos:
            if name in info and info[name] not in values:
                values.append(info[name])
        merged[name] = values[0] if len(values) == 1 else values
    return merged
