"""What both checks share: one pass over the pictures of a data set, and the packages of the extra `data`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from PIL import Image
from tqdm import tqdm

from lavender.data.images import load_image, named
from lavender.data.samples import Sample, Source
from lavender.errors import ConfigError, DataError
from lavender.maps import Dropped

T = TypeVar("T")

SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Kanji, kana and Chinese characters, for a regular expression. Each is a word: no spaces part their words."""
_MAX_THREADS = 8  # that decode at once: a picture of the largest size takes up to 1 GB
_AT_ONCE = 64  # samples whose encoded pictures are in memory


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
    """Decode each picture, in threads, and keep what `look` says about it. A file of several samples is decoded once.

    A terminal shows a progress bar. The pictures themselves are not kept.

    Returns:
        For each sample what was found about its pictures, in their order, or None if one cannot be decoded; and the
        samples that have such a picture, with the reason.
    """

    def one(source: Source, name: str) -> tuple[T | None, str]:
        try:
            return look(load_image(source, name)), ""
        except DataError as error:
            return None, error.got

    looks: list[tuple[T, ...] | None] = []
    broken: list[Dropped] = []
    found: dict[object, tuple[T | None, str]] = {}
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    bar = tqdm(total=len(samples), desc="pictures", unit="sample", leave=False, disable=None)
    with bar, warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # as load_image does, whose filters all threads share
        numbered = enumerate(samples)
        while part := list(islice(numbered, _AT_ONCE)):
            new: dict[object, tuple[Source, str]] = {}
            for index, sample in part:
                for place, source in enumerate(sample.sources):
                    if (key := _key(source, index, place)) not in found:
                        new[key] = source, _name(sample, place)
            found |= zip(new, pool.map(one, *zip(*new.values(), strict=True)) if new else (), strict=True)
            for index, sample in part:
                seen = [found[_key(source, index, place)] for place, source in enumerate(sample.sources)]
                fault = next((fault for _, fault in seen if fault), "")
                if fault:
                    broken.append(Dropped(sample.name, fault))
                looks.append(None if fault else tuple(value for value, _ in seen if value is not None))
            for key in new:
                if not isinstance(key, Path):
                    del found[key]
            bar.update(len(part))
    return looks, broken


def _key(source: Source, index: int, place: int) -> object:
    return source if isinstance(source, Path) else (index, place)


def _name(sample: Sample, place: int) -> str:
    """What a reason calls a picture: by its file if it has one."""
    source = sample.sources[place]
    is_one_of_several = len(sample.sources) > 1 and not isinstance(source, Path)
    return f"picture {place + 1}" if is_one_of_several else named(source, "the picture")
