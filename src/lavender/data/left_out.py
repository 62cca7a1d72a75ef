"""What the records of a map store left out, read from the tables of its shards, without a map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lavender.data.store_format import index_path, key_of, unreadable
from lavender.maps import Dropped


class LeftOut(NamedTuple):
    """What a record left out: its dropped words, or everything if it has no word."""

    has_words: bool
    dropped: tuple[Dropped, ...]


def left_out_of(folder: Path, numbers: Iterable[int]) -> Iterator[tuple[bytes, LeftOut]]:
    """`key_of` each record of these shards that has no word or dropped words, and what it left out.

    Raises:
        StoreError: the table of a shard cannot be read.
    """
    known: dict[object, LeftOut] = {}  # equal ones are one object: annotations leave out the same words again and again
    for number in numbers:
        path = index_path(folder, number)
        try:
            table = pq.read_table(path, columns=["image_id", "text", "words", "dropped"])
        except OSError as error:
            raise unreadable(path, error) from error
        num_words, num_dropped = (
            np.asarray(table[name].combine_chunks().value_lengths()) for name in ("words", "dropped")
        )
        rows = np.flatnonzero((num_words == 0) | (num_dropped > 0))
        left = table.select(["image_id", "text", "dropped"]).take(pa.array(rows)).to_pylist()
        for row, words in zip(left, num_words[rows].tolist(), strict=True):
            found = LeftOut(words > 0, tuple(Dropped(**drop) for drop in row["dropped"]))
            yield key_of(row["image_id"], row["text"]), known.setdefault(found, found)
