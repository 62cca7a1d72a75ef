"""Extract the word maps of a data set into a store: resumable, estimated first, every drop named."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image

from lavender.config import ExtractionConfig
from lavender.data.images import image_id
from lavender.data.samples import Sample, Samples
from lavender.data.store import MapStore, StoreWriter
from lavender.errors import DataError
from lavender.maps import Dropped, WordMaps
from lavender.teachers.diffusion.teacher import Job, Teacher
from lavender.teachers.summary import FLUSH_SECONDS, History, Summary
from lavender.words import content_words, too_long

READ_AHEAD = 4  # batches of pictures, small already, that wait for the teacher


@dataclass(frozen=True)
class Estimate:
    """Time and disk of what is still to do, measured on the first batch."""

    texts: int
    seconds: float
    megabytes: float


def extract(
    samples: Samples,
    teacher: Teacher,
    out: str | Path,
    *,
    strict: bool = False,
    on_estimate: Callable[[Estimate], None] = lambda estimate: None,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> Summary:
    """Write the maps of every answer on every picture before it to the store at `out`.

    A sample whose pictures cannot all be read is dropped, as training drops it. One of text alone needs no map.
    Stopped at any moment and started again, it goes on where it was, and ends with the same records. Their maps
    may differ in the last of their 8 bits, for batches are then cut in other places.

    Example:
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from lavender import Teacher, extract, read_samples
        >>> from lavender.world import TEACHER_PATH
        >>> row = {"image": Image.new("RGB", (96, 64), "red"), "text": "a red dog"}
        >>> summary = extract(read_samples(Dataset.from_list([row])), Teacher.from_pretrained(TEACHER_PATH), "maps")
        >>> summary.records, summary.words, summary.dropped
        (1, 2, [])

    Args:
        strict: raise DataError at the first sample that cannot be used, instead of counting it.
        on_estimate: called once, after the first batch.
        on_progress: called with the number of texts done since the last call.
    """
    began, summary = time.monotonic(), Summary(dropped=list(samples.dropped))
    summary.without_picture = sum(not sample.sources for sample in samples)
    if strict:
        samples.check_strict()
    config, led_before = teacher.config, len(teacher.reconstruction)
    identity = {"teacher": teacher.name, **config.identity()}
    info = {name: version(name) for name in ("lavender-vlm", "diffusers", "torch")}
    info["dtype"] = str(teacher.family.dtype).removeprefix("torch.")
    with MapStore.writer(out, identity, info, config.grid) as writer:
        history = History(out)
        items = _ahead(_read(samples, teacher, writer, strict), config.batch_size * READ_AHEAD)
        first, flushed = True, began
        for batch in _batches(_jobs(items, writer, summary, on_progress), config.batch_size):
            started = time.monotonic()
            for maps in teacher(batch):
                writer.add(maps)
                summary.records += 1
                summary.words += len(maps.words)
                summary.dropped += _words_dropped(maps)
            if first:
                seconds = time.monotonic() - started
                on_estimate(_estimate(samples, summary.already_there, batch, seconds, config))
                first = False
            on_progress(len(batch))
            if time.monotonic() - flushed > FLUSH_SECONDS:
                writer.flush()
                flushed = time.monotonic()
        in_store = len(writer)
    summary.seconds = time.monotonic() - began
    if led_back := teacher.reconstruction[led_before:]:
        summary.reconstruction = fmean(led_back)
    history.add(summary, in_store)
    return summary


@dataclass(frozen=True)
class _Item:
    """One answer on one picture: a job, or why there is none; without either the store has it already.

    Attributes:
        mapless: the record of a text without a word.
        texts: how many of a sample's pairs this stands for (all, where a picture can't be read).
    """

    job: Job | None = None
    drop: Dropped | None = None
    mapless: WordMaps | None = None
    texts: int = 1


def _read(samples: Iterable[Sample], teacher: Teacher, writer: StoreWriter, strict: bool) -> Iterator[_Item]:
    """Every pair of every sample: pictures decoded, known by content and made small; words found."""
    seen: set[tuple[str, str]] = set()
    for sample in samples:
        try:
            images = sample.load()
        except DataError as error:
            if strict:
                raise
            yield _Item(drop=Dropped(sample.name, str(error)), texts=len(sample.pairs))
            continue
        if images and not sample.pairs:
            drop = Dropped(sample.name, "no answer after a picture")
            if strict:
                _refuse(drop)
            yield _Item(drop=drop, texts=0)
        yield from _pairs(sample, images, teacher, writer, seen, strict)


def _pairs(
    sample: Sample,
    images: Sequence[Image.Image],
    teacher: Teacher,
    writer: StoreWriter,
    seen: set[tuple[str, str]],
    strict: bool,
) -> Iterator[_Item]:
    config = teacher.config
    identities, framed = [image_id(image) for image in images], {}
    for index, answer in sample.pairs:
        key = identities[index], answer
        if key in seen or key in writer:
            yield _Item()
            continue
        seen.add(key)
        if words := content_words(answer, config.parts_of_speech):
            if index not in framed:
                framed[index] = teacher.view(images[index])
            yield _Item(Job(framed[index], *key, words))
            continue
        drop = Dropped(f"{sample.name}: {answer[:60]!r}", f"no word that is a {' or '.join(config.parts_of_speech)}")
        if strict:
            _refuse(drop)
        yield _Item(drop=drop, mapless=WordMaps(*key, (), torch.zeros(0, *config.grid), too_long(answer)))


def _words_dropped(maps: WordMaps) -> list[Dropped]:
    return [Dropped(f"{one.what!r} in {maps.text[:60]!r}", one.reason) for one in maps.dropped]


def _jobs(
    items: Iterable[_Item], writer: StoreWriter, summary: Summary, on_progress: Callable[[int], None]
) -> Iterator[Job]:
    """The texts that still need a pass of the teacher. What needs none is counted and recorded at once."""
    for item in items:
        if item.job is not None:
            yield item.job
            continue
        if item.drop is None:
            summary.already_there += 1
        else:
            summary.dropped.append(item.drop)
        if item.mapless is not None:
            writer.add(item.mapless)
            summary.dropped += _words_dropped(item.mapless)
            summary.records += 1
        on_progress(item.texts)


def _batches(jobs: Iterator[Job], size: int) -> Iterator[list[Job]]:
    """Batches of jobs, those of one shape together: the teacher runs each shape apart."""
    error: DataError | None = None
    while error is None:
        window: list[Job] = []
        try:
            window.extend(islice(jobs, size * READ_AHEAD))
        except DataError as found:  # strict; what came before it is still done
            error = found
        if not window and error is None:
            return
        window.sort(key=lambda job: job.image.size)
        for start in range(0, len(window), size):
            yield window[start : start + size]
    raise error


def _ahead(items: Iterator[_Item], size: int) -> Iterator[_Item]:
    """The same items, read in a thread while the teacher works. An error comes in its place, after what it follows."""
    ready: queue.Queue[tuple[_Item | None, BaseException | None]] = queue.Queue(size)
    stop = threading.Event()

    def put(item: _Item | None, error: BaseException | None = None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
        except BaseException as error:  # given to the reader, whatever it is
            put(None, error)
        else:
            put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        thread.join()


def _estimate(
    samples: Samples, already_there: int, batch: list[Job], seconds: float, config: ExtractionConfig
) -> Estimate:
    texts = sum(len(sample.pairs) for sample in samples) - already_there
    words = sum(len(job.words) for job in batch) / len(batch)
    size = words * (config.grid[0] * config.grid[1] + 64) / 1e6
    return Estimate(texts, texts * seconds / len(batch), texts * size)


def _refuse(drop: Dropped) -> None:
    raise DataError(f"{drop.what}: {drop.reason}", "every sample to be usable, as strict asks", "mend or remove it")
