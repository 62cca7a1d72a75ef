"""Extract a diffusion teacher's word maps of a data set into a store: resumable, with an estimate of time and disk."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from PIL import Image

from lavender.config import ExtractionConfig, PartOfSpeech, Texts
from lavender.data.fingerprints import digest_of_model
from lavender.data.images import image_id
from lavender.data.left_out import LeftOut
from lavender.data.samples import Sample, Samples
from lavender.data.store_format import key_of
from lavender.data.store_writer import TINY_VAE_VERSION, VERSION
from lavender.errors import DataError
from lavender.maps import Dropped, WordMaps
from lavender.teachers.diffusion.teacher import Job, Teacher
from lavender.teachers.extraction_loop import Step, write_maps
from lavender.teachers.launch import Launch
from lavender.teachers.summary import Summary
from lavender.words import content_words, too_long

READ_AHEAD = 4
"""How many batches of images, already resized, may wait for the teacher."""


class Done(Protocol):
    """What a store has, as `StoreWriter` tells it.

    Attributes:
        left_out: `key_of` each record without a word or with dropped words → what it left out.
    """

    @property
    def left_out(self) -> Mapping[bytes, LeftOut]: ...

    def __contains__(self, key: tuple[str, str], /) -> bool:
        """Whether there is a record of (image_id, text)."""
        ...


@dataclass(frozen=True)
class Estimate:
    """Time and disk space of the remaining texts, from the first batch.

    Attributes:
        texts: different pairs of an image and a text that are still to do; in a launch, by this process.
        seconds: expected duration.
        megabytes: expected size of their maps.
    """

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
    launch: Launch | None = None,
) -> Summary:
    """Write the maps of every text, on every image before it, to the store at `out`.

    The teacher's config names the texts: answers, questions or all; a question is also mapped on the images in it. A
    text on an image has one record, so a prompt that every sample repeats is mapped once per image.

    A sample is dropped if one of its images cannot be read, as in training. Text-only samples need no maps. After an
    interruption the same call continues where it stopped and ends with the same records. Their maps may differ in the
    last of their 8 bits, because the batches differ.

    Examples:
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from lavender import Teacher, extract, read_samples
        >>> from lavender.world import TEACHER_PATH
        >>> row = {"image": Image.new("RGB", (96, 64), "red"), "text": "a red dog"}
        >>> summary = extract(read_samples(Dataset.from_list([row])), Teacher.from_pretrained(TEACHER_PATH), "maps")
        >>> summary.records, summary.words, summary.dropped
        (1, 2, [])

    Args:
        samples: the data set, from `read_samples`.
        teacher: what makes the maps; its config names the parts of speech, the grid and the batch size.
        out: folder of the store.
        strict: raise DataError at the first sample that cannot be used, instead of counting it as dropped.
        on_estimate: called once, after the first batch.
        on_progress: called with the number of texts done since the last call.
        launch: `lavender.teachers.launch.Launch.of_environment()` in a script that accelerate starts several times on
            one host. Each process maps its share of the samples with its own teacher, and all write to the store.

    Returns:
        The counts of this run, with `launch` of all its processes. Its `dropped` names what has no map, and why.

    Raises:
        DataError: with `strict`, a sample that cannot be used.
        StoreError: the folder holds another store, or cannot be written.
        LavenderError: another process of the launch has ended before.
    """
    if launch is not None:
        samples = launch.share(samples, strict)
    return write_maps(
        samples,
        out,
        lambda writer: steps_of(samples, teacher, writer, strict, on_estimate),
        identity=identity_of(teacher.name, teacher.version, teacher.config),
        info=store_info(teacher.family.dtype),
        grid=teacher.config.grid,
        strict=strict,
        on_progress=on_progress,
        launch=launch,
    )


def identity_of(name: str, teacher_version: str | None, config: ExtractionConfig) -> dict[str, Any]:
    """What a store's maps are made by: the teacher's name, what identifies its content, and the settings."""
    known = {} if teacher_version is None else {VERSION: teacher_version}
    if config.tiny_vae is not None:
        known[TINY_VAE_VERSION] = digest_of_model(config.tiny_vae)
    return {"teacher": name} | known | config.identity()


def store_info(dtype: torch.dtype) -> dict[str, str]:
    """What a store records for people: versions, and the type of the teacher's numbers."""
    info = {name: version(name) for name in ("lavender-vlm", "diffusers", "torch")}
    return info | {"dtype": str(dtype).removeprefix("torch.")}


def steps_of(
    samples: Samples,
    teacher: Teacher,
    done: Done,
    strict: bool,
    on_estimate: Callable[[Estimate], None] = lambda estimate: None,
) -> Generator[Step, None, None]:
    """Run the teacher on the samples, batch by batch, without the pairs (image id, text) that are done."""
    size = teacher.config.batch_size
    items = _read(samples, teacher, done, strict)
    already_there, is_first = 0, True
    for window in _windows(_prefetch(items, size * READ_AHEAD), size * READ_AHEAD):
        if isinstance(window, Step):
            already_there += window.already_there - window.repeated
            yield window
            continue
        window.sort(key=lambda job: job.image.size)  # the teacher runs each shape apart
        for start in range(0, len(window), size):
            batch, num_errors = window[start : start + size], len(teacher.reconstruction)
            started = time.monotonic()
            maps = teacher(batch)
            if is_first:
                remaining = num_different(samples, teacher.config.texts) - already_there
                on_estimate(_estimate(remaining, batch, time.monotonic() - started, teacher.config))
                is_first = False
            dropped = [_dropped_words(record.text, record.dropped) for record in maps]
            errors = teacher.reconstruction[num_errors:]
            yield Step(len(batch), maps, dropped_of_maps=dropped, reconstruction=errors)


def _read(samples: Iterable[Sample], teacher: Teacher, done: Done, strict: bool) -> Iterator[Job | Step]:
    """Every pair of every sample: images decoded, hashed and resized, words found."""
    seen: set[tuple[str, str]] = set()
    texts = teacher.config.texts
    for sample in samples:
        try:
            images = sample.load()
        except DataError as error:
            if strict:
                raise
            yield Step(len(sample.pairs_of(texts)), dropped=[Dropped(sample.name, str(error))])
            continue
        if images and not sample.pairs_of(texts):
            drop = Dropped(sample.name, f"no {'answer' if texts == 'answers' else 'text'} after a picture")
            if strict:
                _refuse(drop)
            yield Step(0, dropped=[drop])
        yield from _pairs(sample, images, teacher, done, seen, strict)


def _pairs(
    sample: Sample,
    images: Sequence[Image.Image],
    teacher: Teacher,
    done: Done,
    seen: set[tuple[str, str]],
    strict: bool,
) -> Iterator[Job | Step]:
    """A job for each pair of a sample that is new and has a word to map."""
    config = teacher.config
    image_ids, views = [image_id(image) for image in images], {}
    for index, text in sample.pairs_of(config.texts):
        key = image_ids[index], text
        if key in seen:
            yield Step(already_there=1, repeated=1)
            continue
        seen.add(key)
        if key in done:
            before = done.left_out.get(key_of(*key))
            dropped = [] if before is None else _left_out(sample, text, before, config.parts_of_speech, strict)
            yield Step(already_there=1, dropped_before=[(key, dropped)])
            continue
        if words := content_words(text, config.parts_of_speech):
            if index not in views:
                views[index] = teacher.view(images[index])
            yield Job(views[index], *key, words)
            continue
        record = WordMaps(*key, (), torch.zeros(0, *config.grid), too_long(text))
        dropped = _left_out(sample, text, LeftOut(False, record.dropped), config.parts_of_speech, strict)
        yield Step(maps=[record], dropped_of_maps=[dropped])


def _left_out(
    sample: Sample, text: str, record: LeftOut, parts_of_speech: Sequence[PartOfSpeech], strict: bool
) -> list[Dropped]:
    """What the record of a text left out, by name. Raises DataError if strict and an answer has no word to map."""
    words = _dropped_words(text, record.dropped)
    if record.has_words or text not in sample.answers or content_words(text, parts_of_speech):
        return words  # a question may name nothing: "what is it?"
    drop = Dropped(f"{sample.name}: {text[:60]!r}", f"no word that is a {' or '.join(parts_of_speech)}")
    if strict:
        _refuse(drop)
    return [drop, *words]


def _dropped_words(text: str, dropped: Iterable[Dropped]) -> list[Dropped]:
    return [Dropped(f"{drop.what!r} in {text[:60]!r}", drop.reason) for drop in dropped]


def _windows(items: Iterator[Job | Step], size: int) -> Iterator[list[Job] | Step]:
    """Steps as they come, jobs in lists of `size`."""
    jobs: list[Job] = []
    try:
        for item in items:
            if isinstance(item, Step):
                yield item
                continue
            jobs.append(item)
            if len(jobs) == size:
                yield jobs
                jobs = []
    except DataError:  # with strict: what came before it is still extracted
        if jobs:
            yield jobs
        raise
    if jobs:
        yield jobs


def _prefetch(items: Iterator[Job | Step], size: int) -> Iterator[Job | Step]:
    """The same items, read in a thread while the teacher works. An error is raised after the items before it."""
    ready: queue.Queue[tuple[Job | Step | None, BaseException | None]] = queue.Queue(size)
    stop = threading.Event()

    def put(item: Job | Step | None, error: BaseException | None = None) -> None:
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
        except BaseException as error:  # raised again by the reader
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


def num_different(samples: Iterable[Sample], texts: Texts) -> int:
    """The number of different pairs of an image and a text, where images are the same if they are the same file."""
    sources: dict[Any, int] = {}
    different = set()
    for sample in samples:
        for index, text in sample.pairs_of(texts):
            source = sample.sources[index]
            key = hash(source) if isinstance(source, (Path, bytes)) else id(source)  # not the file itself: all are kept
            different.add((sources.setdefault(key, len(sources)), hash(text)))
    return len(different)


def _estimate(texts: int, batch: list[Job], seconds: float, config: ExtractionConfig) -> Estimate:
    words = sum(len(job.words) for job in batch) / len(batch)
    size = words * (config.grid[0] * config.grid[1] + 64) / 1e6
    return Estimate(texts, texts * seconds / len(batch), texts * size)


def _refuse(drop: Dropped) -> NoReturn:
    raise DataError(f"{drop.what}: {drop.reason}", "every sample to be usable, as strict asks", "repair or remove it")
