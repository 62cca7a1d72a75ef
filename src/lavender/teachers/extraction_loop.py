"""The loop of every extraction: write maps to a store, count what was done, flush, and record the run at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lavender.data.samples import Samples
from lavender.data.store import MapStore, StoreWriter
from lavender.maps import Dropped, WordMaps
from lavender.teachers.summary import FLUSH_SECONDS, History, Summary


@dataclass(frozen=True)
class Step:
    """What became of some texts of a data set.

    Attributes:
        texts: how many pairs of an image and a text this settles, for the progress bar.
        maps: records to write.
        dropped: what could not be used.
        already_there: how many of the texts the store already has, or will have from this run.
        repeated: how many of these came up in this run before.
        reconstruction: the mean squared errors of null-text inversion, see `Summary.reconstruction`.
    """

    texts: int = 1
    maps: Sequence[WordMaps] = ()
    dropped: Sequence[Dropped] = ()
    already_there: int = 0
    repeated: int = 0
    reconstruction: Sequence[float] = ()


def write_maps(
    samples: Samples,
    out: str | Path,
    steps: Callable[[StoreWriter], Generator[Step, None, None]],
    *,
    identity: Mapping[str, Any],
    info: Mapping[str, Any],
    grid: tuple[int, int],
    strict: bool,
    on_progress: Callable[[int], None],
) -> Summary:
    """Write what `steps` makes to the store at `out`. After an interruption the same call continues where it stopped.

    Args:
        samples: the data set, for the counts of the summary.
        steps: makes the maps, given the open store. It skips what is `in` the store. It is closed after an error.
        identity, info, grid: of the store; see `MapStore.writer`.
        strict: refuse a data set with dropped rows before any work.
        on_progress: called with the number of texts of each step.

    Raises:
        DataError: with `strict`, a row was dropped; and whatever `steps` raises.
        StoreError: the folder holds another store, or cannot be written.
    """
    began = time.monotonic()
    summary = Summary(dropped=list(samples.dropped), without_picture=sum(not sample.sources for sample in samples))
    if strict:
        samples.check_strict()
    errors: list[float] = []
    with MapStore.writer(out, identity, info, grid) as writer:
        history = History(out)
        flushed = time.monotonic()
        with closing(steps(writer)) as running:
            for step in running:
                for maps in step.maps:
                    writer.add(maps)
                    summary.records += 1
                    summary.words += len(maps.words)
                summary.dropped += step.dropped
                summary.already_there += step.already_there
                errors += step.reconstruction
                on_progress(step.texts)
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    writer.flush()
                    flushed = time.monotonic()
        in_store = len(writer)
    summary.reconstruction = fmean(errors) if errors else None
    summary.seconds = time.monotonic() - began
    history.add(summary, in_store)
    return summary
