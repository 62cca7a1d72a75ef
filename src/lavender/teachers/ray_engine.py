"""Extraction on a Ray cluster: workers make the maps, and this process alone writes them to the store.

It leaves out what the store has, so a task that runs twice changes nothing.
"""

from __future__ import annotations

import os
import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavender.config import ExtractionConfig
from lavender.data.fingerprints import digest_of_pipeline
from lavender.data.left_out import LeftOut
from lavender.data.samples import Sample, Samples
from lavender.data.store_format import key_of
from lavender.errors import ConfigError, DataError
from lavender.files import expanded
from lavender.teachers.diffusion.teacher import Teacher
from lavender.teachers.extract import identity_of, steps_of, store_info
from lavender.teachers.extraction_loop import Step, write_maps
from lavender.teachers.launch import image_numbers
from lavender.teachers.ray_pool import run_on_ray
from lavender.teachers.summary import Summary

TASK_BATCHES = 8
"""How many of the teacher's batches a task has, at one text per sample. A worker that dies loses this much work."""


@dataclass(frozen=True)
class TeacherPlan:
    """How each worker loads its teacher: the arguments of `Teacher.from_pretrained`.

    Attributes:
        path: a folder, which every host must see, or a hub id.
        config: how maps are made.
        device: of the workers; with "cuda" each has a GPU of its own.
        dtype: of all weights.
        name: recorded in the store.
    """

    path: str
    config: ExtractionConfig
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    name: str | None = None

    def load(self) -> Teacher:
        """Raises what `Teacher.from_pretrained` does."""
        return Teacher.from_pretrained(self.path, self.config, self.device, self.dtype, self.name)


def extract_on_ray(
    samples: Samples,
    plan: TeacherPlan,
    out: str | Path,
    *,
    workers: int | None = None,
    samples_per_task: int | None = None,
    strict: bool = False,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> Summary:
    """As `lavender.extract`, with the teachers on a Ray cluster. The store has the same records.

    Maps may differ from those of one process in the last of their 8 bits, because the batches differ; with a batch size
    of 1 they do not. The cluster is the one that RAY_ADDRESS names, else one that is started on this host for the time
    of the call. On other hosts lavender must be installed, and images must have the same paths.

    Args:
        samples: the data set.
        plan: how a worker loads its teacher.
        out: folder of the store, on this host.
        workers: how many teachers there are at once. Default: one per GPU of the cluster, or, with another device, one
            per CPU but one.
        samples_per_task: what a worker maps at a time. Default: `TASK_BATCHES` times the batch size.
        strict: as of `lavender.extract`.
        on_progress: called with the number of texts done since the last call.

    Returns:
        The counts of this run, as of `lavender.extract`.

    Raises:
        ConfigError: Ray is not installed, or a number is not positive.
        DataError: with `strict`, a sample that cannot be used; an image that a worker's host does not have.
        StoreError: the folder holds another store, or cannot be written.
        LavenderError: Ray failed; a task's worker died each time.
        ModelError, UnsupportedModelError, CaptureError: of the workers' teachers.
    """
    size = plan.config.batch_size * TASK_BATCHES if samples_per_task is None else samples_per_task
    if size < 1:
        raise ConfigError(f"samples_per_task={size}", "a number from 1", "change it, or leave it out")
    plan = replace(plan, name=plan.name or plan.path)
    identity = identity_of(str(plan.name), digest_of_pipeline(plan.path), plan.config)
    tiny_vae = plan.config.tiny_vae and _place(plan.config.tiny_vae)  # a worker has another working folder
    plan = replace(plan, path=_place(plan.path), config=replace(plan.config, tiny_vae=tiny_vae))
    return write_maps(
        samples,
        out,
        lambda writer: run_on_ray(
            _Tasks(samples, size),
            _Mapper(plan, strict, _Keys(writer.keys, writer.left_out)),
            workers=workers,
            gpu=plan.device.startswith("cuda"),
        ),
        identity=identity,
        info=store_info(plan.dtype),
        grid=plan.config.grid,
        strict=strict,
        on_progress=on_progress,
    )


class _Mapper:
    """The work of extraction: from samples to their steps."""

    def __init__(self, plan: TeacherPlan, strict: bool, done: _Keys):
        self._plan, self._strict, self._done = plan, strict, done
        self._teacher: Teacher | None = None

    def __call__(self, samples: list[Sample]) -> Iterator[Step]:
        for sample in samples:
            for source in sample.sources:
                if isinstance(source, Path) and not os.path.exists(source):
                    got = f"{source} of {sample.name}, which the host {platform.node()} does not have"
                    raise DataError(got, "images at the same path on every host", "put them on a shared file system")
        if self._teacher is None:
            self._teacher = self._plan.load()
        yield from steps_of(Samples(samples), self._teacher, self._done, self._strict)


class _Keys:
    """The pairs (image id, text) of a store, in 16 bytes each, and what its records left out."""

    def __init__(self, keys: Iterable[bytes], left_out: Mapping[bytes, LeftOut]):
        self.left_out = left_out
        self._keys = np.frombuffer(b"".join(sorted(keys)), "V16")

    def __contains__(self, key: tuple[str, str]) -> bool:
        try:
            wanted = key_of(*key)
        except UnicodeEncodeError:
            return False
        place = bisect_left(self._keys, wanted, key=bytes)
        return place < len(self._keys) and bytes(self._keys[place]) == wanted


class _Tasks(Sequence[list[Sample]]):
    """Lists of at least `size` samples, the last perhaps of fewer. The samples of one image are in one list.

    Each is made when it is asked for: samples may hold the images themselves.
    """

    def __init__(self, samples: Samples, size: int):
        self._samples = samples.samples
        numbers = list(image_numbers(samples))
        self._places: list[list[int]] = []
        last = -1
        for place in sorted(range(len(numbers)), key=numbers.__getitem__):
            if not self._places or (len(self._places[-1]) >= size and numbers[place] != last):
                self._places.append([])
            self._places[-1].append(place)
            last = numbers[place]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        return [_absolute(self._samples[place]) for place in self._places[number]]


def _place(path: str) -> str:
    """The absolute path of what is on this host; a hub id as it is."""
    here = expanded(path)
    return str(here.absolute()) if here.exists() else path


def _absolute(sample: Sample) -> Sample:
    """The sample with absolute paths: a worker may have another working directory."""
    sources = tuple(source.absolute() if isinstance(source, Path) else source for source in sample.sources)
    return replace(sample, sources=sources)
