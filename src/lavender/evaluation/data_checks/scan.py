"""What both checks share: one pass over the pictures of a data set, and the packages of the extra `data`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from PIL import Image

from lavender.data.images import load_image
from lavender.data.samples import Sample, Source
from lavender.errors import ConfigError, DataError
from lavender.maps import Dropped

T = TypeVar("T")

_MAX_THREADS = 8  # that decode at once: a picture of the largest size takes up to 1 GB


def extra(package: str) -> ModuleType:
    """A package of the extra `data`. Raises ConfigError if it is not installed."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        got = f"no package {error.name}, which this check needs"
        raise ConfigError(got, "the packages of the extra `data`", "pip install 'lavender-vlm[data]'") from error


def look_at_pictures(
    samples: Sequence[Sample], look: Callable[[Image.Image], T]
) -> tuple[list[tuple[T, ...] | None], list[Dropped]]:
    """Decode each picture once, in threads, and keep what `look` says about it. A file of several samples is one.

    Returns:
        For each sample what was found about its pictures, in their order, or None if one cannot be decoded; and the
        samples that have such a picture, with the reason.
    """
    keys = [
        tuple(_key(source, index, place) for place, source in enumerate(sample.sources))
        for index, sample in enumerate(samples)
    ]
    distinct = {
        key: source
        for sample, of in zip(samples, keys, strict=True)
        for key, source in zip(of, sample.sources, strict=True)
    }

    def one(source: Source) -> tuple[T | None, str]:
        try:
            return look(load_image(source, "the picture")), ""
        except DataError as error:
            return None, error.got

    with warnings.catch_warnings(), ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as pool:
        warnings.simplefilter("ignore")  # as load_image does, whose filters all threads share
        found = dict(zip(distinct, pool.map(one, distinct.values()), strict=True))
    looks: list[tuple[T, ...] | None] = []
    broken: list[Dropped] = []
    for sample, of in zip(samples, keys, strict=True):
        seen = [found[key] for key in of]
        fault = next((fault for _, fault in seen if fault), "")
        if fault:
            broken.append(Dropped(sample.name, fault))
        looks.append(None if fault else tuple(value for value, _ in seen if value is not None))
    return looks, broken


def _key(source: Source, index: int, place: int) -> object:
    return source if isinstance(source, Path) else (index, place)
