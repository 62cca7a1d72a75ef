"""Extract the word maps of a data set into a store: resumable, estimated first, every drop named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

from lavender.config import ExtractionConfig
from lavender.data import Sample, Samples
from lavender.diffusion.teacher import Job, Teacher
from lavender.errors import DataError
from lavender.images import image_id
from lavender.maps import Dropped, WordMaps
from lavender.store import MapStore, StoreWriter
from lavender.words import content_words

FLUSH_SECONDS = 20.0  # a kill loses at most this much work


@dataclass
class Summary:
    """What an extraction did. `dropped` names every sample and word that got no map, with the reason."""

    records: int = 0
    words: int = 0
    already_there: int = 0
    seconds: float = 0.0
    dropped: list[Dropped] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False))


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
    """Write the maps of every answer of every sample to the store at `out`.

    Stopped at any moment and started again, it goes on where it was, and ends with the same records.

    Args:
        strict: raise DataError at the first sample that cannot be used, instead of counting it.
        on_estimate: called once, after the first batch.
        on_progress: called with the number of texts done since the last call.
    """
    began, summary = time.monotonic(), Summary(dropped=list(samples.dropped))
    if strict and samples.dropped:
        _refuse(samples.dropped[0])
    config = teacher.config
    identity = {"teacher": teacher.name, **config.identity()}
    info = {name: version(name) for name in ("lavender-vlm", "diffusers", "torch")}
    with MapStore.writer(out, identity, info, config.grid) as writer:
        jobs = _jobs(samples, config, writer, summary, strict, on_progress)
        first, flushed = True, began
        while batch := list(islice(jobs, config.batch_size)):
            started = time.monotonic()
            for maps in teacher(batch):
                writer.add(maps)
                summary.records += 1
                summary.words += len(maps.words)
                summary.dropped += [Dropped(f"{one.what!r} in {maps.text[:60]!r}", one.reason) for one in maps.dropped]
            if first:
                seconds = time.monotonic() - started
                on_estimate(_estimate(samples, summary.already_there, batch, seconds, config))
                first = False
            on_progress(len(batch))
            if time.monotonic() - flushed > FLUSH_SECONDS:
                writer.flush()
                flushed = time.monotonic()
    summary.seconds = time.monotonic() - began
    summary.write(Path(out) / "extraction.json")
    return summary


def _jobs(
    samples: Iterable[Sample],
    config: ExtractionConfig,
    writer: StoreWriter,
    summary: Summary,
    strict: bool,
    on_progress: Callable[[int], None],
) -> Iterator[Job]:
    """The texts that still need a pass of the teacher. Texts without a word are recorded at once, mapless."""
    seen: set[tuple[str, str]] = set()
    for sample in samples:
        try:
            image = sample.load()
        except DataError as error:
            if strict:
                raise
            summary.dropped.append(Dropped(sample.name, str(error)))
            on_progress(len(sample.answers))
            continue
        identity = image_id(image)
        for answer in sample.answers:
            if (identity, answer) in seen or (identity, answer) in writer:
                summary.already_there += 1
                on_progress(1)
                continue
            seen.add((identity, answer))
            words = content_words(answer, config.parts_of_speech)
            if words:
                yield Job(image, identity, answer, words)
                continue
            drop = Dropped(
                f"{sample.name}: {answer[:60]!r}", f"no word that is a {' or '.join(config.parts_of_speech)}"
            )
            if strict:
                _refuse(drop)
            summary.dropped.append(drop)
            writer.add(WordMaps(identity, answer, (), torch.zeros(0, *config.grid)))
            summary.records += 1
            on_progress(1)


def _estimate(
    samples: Samples, already_there: int, batch: list[Job], seconds: float, config: ExtractionConfig
) -> Estimate:
    texts = sum(len(sample.answers) for sample in samples) - already_there
    words = sum(len(job.words) for job in batch) / len(batch)
    size = words * (config.grid[0] * config.grid[1] + 64) / 1e6
    return Estimate(texts, texts * seconds / len(batch), texts * size)


def _refuse(drop: Dropped) -> None:
    raise DataError(f"{drop.what}: {drop.reason}", "every sample to be usable, as strict asks", "mend or remove it")
