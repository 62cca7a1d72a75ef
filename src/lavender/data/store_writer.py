"""StoreWriter: adds records to a map store. If it is killed, only the buffered records are lost."""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from filelock import lock_descriptor
from torch import Tensor

from lavender.data.left_out import LeftOut, left_out_of
from lavender.data.made_from import MADE_FROM, with_source
from lavender.data.store_format import (
    MANIFEST,
    Manifest,
    Shard,
    index_path,
    key_of,
    maps_path,
    pack_shard,
    read_manifest,
    shard_numbers,
)
from lavender.errors import ConfigError, StoreError
from lavender.files import BINARY, NO_LINK, TEMPORARY, write_whole
from lavender.maps import WordMaps
from lavender.type_checks import unread_by

log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds for which a process of a launch waits for the lock before it says so. Others hold it while they write."""
_LOCK = "writer.lock"
_OF_LAUNCH = " of a launch"
_PREFIXES = (_LOCK, MANIFEST, "extraction.json", "shard-", TEMPORARY)
"""How the names of files begin that a writer writes or removes."""
VERSION = "teacher_version"
"""Key of what identifies the content of a teacher, where that is known."""
TINY_VAE_VERSION = "tiny_vae_version"
"""The same of its tiny autoencoder."""
VERSIONS = (VERSION, TINY_VAE_VERSION)
"""Keys that a store of an earlier release lacks, or of a pipeline in memory. Such a store fits to any version."""
UNRECORDED = {"texts": "answers"}
"""Settings that stores of earlier releases do not name in their identity, and the value that they had."""


class StoreWriter:
    """A store, open for adding records. A lock admits one writer at a time. Use it as a context manager.

    Records are buffered, and a full buffer is written as a shard. Leaving the context writes the rest as a smaller
    shard, also after an exception. If the process is killed, only the buffer is lost: run again, and skip what is `in`
    the writer. Reopening verifies every file. A reopened store keeps the info of its first writer.

    Raises:
        ConfigError: an invalid grid, or settings that JSON cannot hold.
        StoreError: the folder holds other files, a link in place of a file, or a store of another identity, grid or
            format; another process writes to it; a shard is damaged; or it cannot be written.
    """

    _is_shared = False
    """Whether another process may be about to write the first record."""

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        info: Mapping[str, Any],
        grid: tuple[int, int],
        records_per_shard: int,
    ):
        self.path = path
        self.grid = _checked_grid(grid)
        self._records_per_shard = records_per_shard
        self._buffer: list[tuple[WordMaps, np.ndarray, np.ndarray]] = []
        self._done: set[bytes] = set()
        self._num_written = 0  # maps in the shards
        self._is_noted = False  # whether it is noted what the records come from
        self._lock: int | None = None
        try:
            self._manifest = Manifest.new(identity, self.grid, info)
        except (ValueError, TypeError, RecursionError) as error:
            got = f"settings of a map store that cannot be written: {error}"
            raise ConfigError(got, "texts, finite numbers, lists and mappings", "make them so") from error
        try:
            _check_folder(path)
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self._open()
        except OSError as error:
            self.close()
            raise _unwritten(path, error, "nothing was changed") from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Check or write the manifest, remove what a killed writer left, and read the keys of all records."""
        self._numbers = set(shard_numbers(self.path))
        found = read_manifest(self.path) if os.path.lexists(self.path / MANIFEST) else None
        if found is not None and (self._numbers or self._is_shared):
            check_same(self.path, found, self._manifest)
            self._manifest = _with_versions(found, self._manifest)
        # else a store without a record takes the settings of its next writer
        if self._manifest != found:
            write_whole(self.path / MANIFEST, self._manifest.content())
        complete = {maps_path(self.path, number) for number in self._numbers}
        for file in [*self.path.glob(f"{TEMPORARY}*"), *self.path.glob("shard-*.safetensors")]:
            if file not in complete:
                file.unlink()
        for number in sorted(self._numbers):
            shard = Shard(self.path, number, self._manifest)
            if self._verifies(number):
                shard.verify()
            self._done.update(key.tobytes() for key in shard.keys)
            self._num_written += shard.num_words

    def _take_lock(self) -> int:
        return take_lock(self.path)

    def _verifies(self, number: int) -> bool:
        """Whether opening compares the checksums of a shard's records."""
        return True

    @property
    def keys(self) -> Set[bytes]:
        """`key_of` each record, including those in the buffer."""
        return self._done

    def __len__(self) -> int:
        """The number of records, including those in the buffer."""
        return len(self._done)

    @property
    def num_words(self) -> int:
        """The number of maps, including those in the buffer."""
        return self._num_written + sum(len(entry[0].words) for entry in self._buffer)

    def note_source(self, how: str, sources: Sequence[str]) -> None:
        """Add to the info of the store that a command adds records from there; see `lavender.data.made_from`.

        Raises:
            StoreError: the manifest cannot be written.
        """
        info = with_source(self._manifest.info, how, sources, has_records=bool(self._done))
        self._is_noted = True
        if info == self._manifest.info:
            return
        manifest = self._manifest._replace(info=info)
        try:
            write_whole(self.path / MANIFEST, manifest.content())
        except OSError as error:
            raise _unwritten(self.path / MANIFEST, error, "nothing was changed") from error
        self._manifest = manifest

    @cached_property
    def left_out(self) -> dict[bytes, LeftOut]:
        """`key_of` each record without a word or with dropped words → what it left out, of the shards on disk."""
        return dict(left_out_of(self.path, sorted(self._numbers)))

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether (image_id, text) has been added, by this or an earlier writer."""
        try:
            return key_of(*key) in self._done
        except UnicodeEncodeError:
            return False

    def add(self, word_maps: WordMaps) -> bool:
        """Add a record, unless the store has one of the same image and text.

        Args:
            word_maps: float maps in [0, 1] on the store's grid. They are stored with 8 bits per cell.

        Returns:
            Whether it was added.

        Raises:
            StoreError: maps on another grid, maps or confidences outside [0, 1], a text with a lone surrogate, or a
                full buffer that cannot be written.
        """
        try:
            key = key_of(word_maps.image_id, word_maps.text)
            pieces = [word.text + word.lemma + word.part_of_speech for word in word_maps.words]
            "".join(pieces + [drop.what + drop.reason for drop in word_maps.dropped]).encode()
        except UnicodeEncodeError as error:
            got = f"{word_maps.text[:60]!a}, which has half a character (a lone surrogate)"
            raise StoreError(got, "text that can be written", "repair the text") from error
        if key in self._done:
            return False
        if word_maps.grid != self.grid:
            got = f"maps on a grid of {word_maps.grid} for {word_maps.text!r}"
            raise StoreError(got, f"the grid {self.grid} of {self.path}", "resize the maps, or choose another folder")
        maps = word_maps.maps.detach().cpu().float()
        if not ((maps >= 0) & (maps <= 1)).all():  # also true of NaN
            got = f"maps from {maps.min():g} to {maps.max():g} for {word_maps.text!r}"
            raise StoreError(got, "heat in [0, 1]", "scale them with lavender.maps.to_heat")
        confidence = word_maps.confidence
        if not ((confidence >= 0) & (confidence <= 1)).all():
            got = f"the confidences {[round(value, 6) for value in confidence.tolist()]} for {word_maps.text!r}"
            raise StoreError(got, "each in [0, 1]", "scale them, or leave them out: each is then 1")
        self._buffer.append((word_maps, *quantised(maps)))
        self._done.add(key)
        if len(self._buffer) >= self._records_per_shard:
            self.flush()
        return True

    def flush(self) -> None:
        """Write the buffered records as a shard. On return they survive a kill and a power cut.

        Raises:
            StoreError: it cannot be written. Earlier shards are unchanged, and the buffer is kept.
        """
        if not self._buffer:
            return
        if MADE_FROM in self._manifest.info and not self._is_noted:
            self.note_source("extract", ())  # into a store that was merged or imported
        number = min(set(range(len(self._numbers) + 1)) - self._numbers)
        maps, index = pack_shard(self._manifest, number, self._buffer)
        try:
            write_whole(maps_path(self.path, number), maps)
            write_whole(index_path(self.path, number), index)  # last, because the shard counts once it exists
        except OSError as error:
            kept = len(self._done) - len(self._buffer)
            survives = f"the {kept} records written before are whole, the last {len(self._buffer)} are not written"
            raise _unwritten(index_path(self.path, number), error, survives) from error
        self._num_written = self.num_words
        self._buffer.clear()
        self._numbers.add(number)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's lock, which this writer does until it is closed."""
        yield

    def close(self) -> None:
        """Release the lock. Buffered records are lost."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()  # after an exception too: each buffered record is complete
        finally:
            self.close()


def quantised(maps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Maps as uint8 (word, rows, cols) and float32 scale (word,); the error is at most scale / 255 / 2."""
    scale = maps.flatten(1).amax(dim=1) if len(maps) else maps.new_zeros(0)
    share = maps / scale.clamp_min(torch.finfo(maps.dtype).tiny)[:, None, None]
    return (share * 255).round().to(torch.uint8).numpy(), scale.numpy()


def _checked_grid(grid: Any) -> tuple[int, int]:
    """Raises ConfigError."""
    try:
        rows, cols = grid
        if not all(type(size) is int and size > 0 for size in grid):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ConfigError(f"grid={grid!r}", "(rows, cols), whole numbers", "use the paper's (32, 32)") from error
    return rows, cols


def _unwritten(path: Path, error: OSError, survives: str) -> StoreError:
    got = f"{path}, which cannot be written: {error.strerror or error}; {survives}"
    return StoreError(got, "space and the right to write", "free space or choose another folder, then run again")


def _check_folder(folder: Path) -> None:
    """Refuse a file, a folder that holds other files, and links in place of the store's files."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}, which is a file", "a folder", "choose another path")
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.exists() else []
    for entry in entries:
        if entry.name.startswith(_PREFIXES) and not entry.is_file(follow_symlinks=False):
            kind = "a link" if entry.is_symlink() else "no file"
            raise StoreError(f"{folder / entry.name}, which is {kind}", "a file of a map store", "remove it")
    foreign = [
        entry.name for entry in entries if entry.name != _LOCK and not entry.name.startswith(TEMPORARY + MANIFEST)
    ]
    if foreign and MANIFEST not in foreign:
        got = f"{folder}, which holds {foreign[0]!r} and no {MANIFEST}"
        raise StoreError(got, "a map store, or an empty or new folder", "choose another folder")


def differing(stored: Manifest, wanted: Manifest) -> dict[str, tuple[Any, Any]]:
    """The settings of identity and grid that differ: (stored, wanted), with "(not set)" for one that is missing."""
    old = {**UNRECORDED, **stored.identity, "grid": list(stored.grid)}
    new = {**UNRECORDED, **wanted.identity, "grid": list(wanted.grid)}
    missing = "(not set)"
    pairs = {key: (old.get(key, missing), new.get(key, missing)) for key in sorted(old.keys() | new.keys())}
    uncompared = {key for key in VERSIONS if missing in pairs.get(key, ())}
    uncompared |= unread_by(old.get("mode")) & unread_by(new.get("mode"))  # earlier releases recorded what was given
    return {key: values for key, values in pairs.items() if values[0] != values[1] and key not in uncompared}


def _with_versions(stored: Manifest, wanted: Manifest) -> Manifest:
    """The stored manifest with the versions that it lacks: from then on the store takes no other."""
    known = {key: wanted.identity[key] for key in VERSIONS if key in wanted.identity}
    return stored._replace(identity={**known, **stored.identity})


def check_same(folder: Path, stored: Manifest, wanted: Manifest) -> None:
    """Refuse to add to a store made with other settings; name each setting that differs."""
    if found := differing(stored, wanted):
        differences = [f"{key} is {old!r} there and {new!r} here" for key, (old, new) in found.items()]
        got = f"the store {folder}, made with other settings: {'; '.join(differences)}"
        raise StoreError(got, "the same settings", "choose another folder, or set them as they are there")


def take_lock(folder: Path, of_launch: bool = False, refuses: bool = True) -> int:
    """Take the folder's lock, whose file names the process that holds it. The system releases it when that ends.

    Args:
        of_launch: this process writes with others, and holds the lock for moments. It waits for them, and says so if
            it waits long. Otherwise a process that holds the lock is a StoreError.
        refuses: of a launch: whether a writer alone, which holds the lock until it ends, is a StoreError too.
    """
    path = folder / _LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK | BINARY, 0o644)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise StoreError(f"{path}, which is another file's second name", "a file of a map store", "remove it")
        if not lock_descriptor(descriptor, blocking=False):
            _wait(descriptor, folder, of_launch, refuses)
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()}{_OF_LAUNCH if of_launch else ''}".encode())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _wait(descriptor: int, folder: Path, of_launch: bool, refuses: bool) -> None:
    """Take the lock that another process holds, or raise StoreError; see `take_lock`."""
    before, until = "", time.monotonic() + PATIENCE
    while of_launch:
        # another process may have taken the lock and not yet written its name, so the name is read twice
        before, holder = _holder(descriptor), before
        if time.monotonic() > until and holder == before:
            break
        time.sleep(0.02)
        if lock_descriptor(descriptor, blocking=False):
            return
    holder = _holder(descriptor)
    if not of_launch or (refuses and re.fullmatch(r"process \d+", holder)):
        got = f"{folder}, which {holder} is writing to"
        raise StoreError(got, "one writer at a time", "wait until it ends, or choose another folder")
    log.warning("waiting for %s, which is writing to %s", holder, folder)
    lock_descriptor(descriptor, blocking=True)


def _holder(descriptor: int) -> str:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        return f"process {os.read(descriptor, 64).decode(errors='replace')}"
    except OSError:  # on Windows a locked file cannot be read
        return "another process"
