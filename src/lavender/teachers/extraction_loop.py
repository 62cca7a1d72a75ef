"""The loop of every extraction: write maps to a store, count what was done, flush, and record the run at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from lavender.data.samples import Samples
from lavender.data.shared_writer import SharedStoreWriter
from lavender.data.store import MapStore, StoreWriter
from lavender.maps import Dropped, WordMaps
from lavender.teachers.launch import Launch
from lavender.teachers.summary import FLUSH_SECONDS, History, Summary

Drops = tuple[tuple[str, str] | None, Sequence[Dropped]]
"""What is dropped of a record, which its (image id, text) names; or of none."""


@dataclass(frozen=True)
class Step:
    """What became of some texts of a data set.

    Attributes:
        texts: how many pairs of an image and a text this settles, for the progress bar.
        maps: records to write.
        dropped: what could not be used, apart from that of the records.
        dropped_of_maps: what is dropped of each record of `maps`, or () for all. It is counted once, also if several
            processes make the record.
        already_there: how many of the texts the store already has, or will have from this run.
        dropped_before: what was dropped of records that the store had before this run. So the summary names it as if
            an extraction that was stopped had not been.
        repeated: how many of these came up in this run before.
        reconstruction: the mean squared errors of null-text inversion, see `Summary.reconstruction`.
    """

    texts: int = 1
    maps: Sequence[WordMaps] = ()
    dropped: Sequence[Dropped] = ()
    dropped_of_maps: Sequence[Sequence[Dropped]] = ()
    already_there: int = 0
    dropped_before: Sequence[Drops] = ()
    repeated: int = 0
    reconstruction: Sequence[float] = ()

    def drops(self) -> Iterable[Drops]:
        """What is dropped: of no record, then of each."""
        yield None, self.dropped
        if self.dropped_of_maps:
            for maps, dropped in zip(self.maps, self.dropped_of_maps, strict=True):
                yield (maps.image_id, maps.text), dropped
        yield from self.dropped_before


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
    launch: Launch | None = None,
) -> Summary:
    """Write what `steps` makes to the store at `out`. After an interruption the same call continues where it stopped.

    Args:
        samples: the data set, for the counts of the summary.
        steps: makes the maps, given the open store. It skips what is `in` the store. It is closed after an error.
        identity, info, grid: of the store; see `MapStore.writer`.
        strict: refuse a data set with dropped rows before any work.
        on_progress: called with the number of texts of each step.
        launch: the processes that write to the store together; each is given its own samples.

    Returns:
        The counts of this run: with `launch`, of all its processes.

    Raises:
        DataError: with `strict`, a row was dropped; and whatever `steps` raises.
        StoreError: the folder holds another store, or cannot be written.
        LavenderError: another process of the launch has ended before.
    """
    began = time.monotonic()
    summary = Summary(without_picture=sum(not sample.sources for sample in samples))
    if strict:
        samples.check_strict()
    errors: list[float] = []
    drops: list[Drops] = [(None, samples.dropped)]
    open_writer = MapStore.writer if launch is None else launch.writer
    with open_writer(out, identity, info, grid) as writer:
        History(out)  # a damaged one is reported before the work
        flushed = time.monotonic()
        with closing(steps(writer)) as running:
            for step in running:
                for maps in step.maps:
                    _add(writer, maps, summary)
                drops += [(record, dropped) for record, dropped in step.drops() if dropped]
                summary.already_there += step.already_there
                errors += step.reconstruction
                on_progress(step.texts)
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    writer.flush()
                    flushed = time.monotonic()
        writer.flush()
        summary.seconds = time.monotonic() - began
        if isinstance(writer, SharedStoreWriter) and launch is not None:
            summary, errors, drops = _of_all(launch, writer, summary, errors, drops)
        summary.dropped, summary.reconstruction = _named_once(drops), fmean(errors) if errors else None
        if launch is None or launch.rank == 0:
            with writer.locked():
                History(out).add(summary, len(writer), writer.num_words)  # another launch may have written it since
    return summary


def _add(writer: StoreWriter, maps: WordMaps, summary: Summary) -> None:
    """Add a record and count it. The store may have it from samples that were mapped elsewhere at the same time."""
    if writer.add(maps):
        summary.records += 1
        summary.words += len(maps.words)
    else:
        summary.already_there += 1


def _of_all(
    launch: Launch, writer: SharedStoreWriter, summary: Summary, errors: list[float], drops: list[Drops]
) -> tuple[Summary, list[float], list[Drops]]:
    """The summary, reconstruction errors and drops of all processes, from those of this one."""
    records, words = writer.num_doubled  # another process had written them first
    summary.records -= records
    summary.words -= words
    summary.already_there += records
    summaries, all_errors, all_drops = zip(*launch.gather((summary, errors, drops)), strict=True)
    return _together(summaries), list(chain.from_iterable(all_errors)), list(chain.from_iterable(all_drops))


def _together(summaries: Sequence[Summary]) -> Summary:
    """What the processes of a launch did."""
    return Summary(
        records=sum(one.records for one in summaries),
        words=sum(one.words for one in summaries),
        already_there=sum(one.already_there for one in summaries),
        without_picture=sum(one.without_picture for one in summaries),
        seconds=max(one.seconds for one in summaries),
    )


def _named_once(drops: Sequence[Drops]) -> list[Dropped]:
    """All that is dropped. What several processes, or tasks, dropped of the same record is there once."""
    named: dict[object, Sequence[Dropped]] = {}
    for record, dropped in drops:
        named.setdefault(record or object(), dropped)
    return list(chain.from_iterable(named.values()))
