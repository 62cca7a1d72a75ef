"""A diffusion pipeline as a teacher of word maps, whatever its family.

The maps' frame is always the whole picture; `ExtractionConfig.geometry` says how much of it the teacher sees.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.errors import CaptureError, ConfigError
from lavender.maps import Dropped, Word, WordMaps, to_heat
from lavender.model_files import loading
from lavender.teachers.diffusion.aggregate import Aggregate, layer_weight, refine
from lavender.teachers.diffusion.base import Condition, Layer, LayerWeights
from lavender.teachers.diffusion.capture import WordCapture, capture_words
from lavender.teachers.diffusion.denoising import Batch, read_maps
from lavender.teachers.diffusion.registry import family_of, load_family, load_tiny_vae
from lavender.teachers.diffusion.text_windows import Window, indicator, window_of, windows
from lavender.teachers.diffusion.views import Box, Frame, frame
from lavender.words import too_long

CACHED = 256  # latents and text states that are kept for the next captions of a picture, and for repeated texts
V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class Job:
    """One picture, or what `Teacher.frame` made of it, and one text with the words that want a map."""

    image: Image.Image | Frame
    image_id: str
    text: str
    words: tuple[Word, ...]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the teacher sees of a picture: clean latents (channel, height, width) and the view they show."""

    latents: Tensor
    view: Box
    image_size: tuple[int, int]


class Teacher:
    """Word maps of given pictures and texts from a diffusion pipeline.

    Args:
        pipeline: a pipeline of a known family (`lavender.teachers.diffusion.registry`); used as it is.
        config: mode, noise, geometry, levers, grid.
        name: what to write into a store (the path or hub id it came from).

    Attributes:
        reconstruction: of `mode="null-text"`, for each text so far the mean squared error of the latents that its way
            back ended with; those of a picture have a variance of about 1.
    """

    def __init__(self, pipeline: Any, config: ExtractionConfig, name: str = "unnamed"):
        self.family = family_of(type(pipeline))(pipeline)
        self.config, self.name = config, name
        weights = config.layer_weights
        self.weights: LayerWeights = self.family.default_weights() if weights is None else weights
        # settings that don't fit this model are refused here, before any work
        self.layers((self.family.side, self.family.side))
        if config.mode != "noise":
            _ = self.family.alphas_cumprod
        self._pictures: OrderedDict[Hashable, _Seen] = OrderedDict()
        self._texts: OrderedDict[Hashable, Condition] = OrderedDict()
        self.reconstruction: list[float] = []

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: ExtractionConfig,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
        channels_last: bool = False,
    ) -> Teacher:
        """Load a folder or hub id. Weights come from safetensors only.

        Args:
            channels_last: lay convolutions out for tensor cores; changes a map in the last digits.

        Raises:
            ModelError: a part is missing, damaged, not finite, or of another pipeline.
            UnsupportedModelError: no known family.
        """
        with loading("teacher", path, consent=None):
            family = load_family(os.path.expanduser(path), dtype=dtype)
            if config.tiny_vae is not None:
                with loading("tiny_vae", config.tiny_vae, consent=None):
                    family.pipeline.vae = load_tiny_vae(config.tiny_vae, dtype=dtype)
            family.check_parts()
        family.pipeline.to(device)
        if dtype == torch.float16 and family.pipeline.vae.config.get("force_upcast"):
            family.pipeline.vae.to(torch.float32)  # as its config asks: it overflows in float16
        if channels_last:
            family.backbone.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
            family.pipeline.vae.to(memory_format=torch.channels_last)
        return cls(family.pipeline, config, name=name or str(path))

    def layers(self, image_size: tuple[int, int]) -> list[Layer]:
        """The layers that are read of a picture of (height, width) pixels, in the order in which they run."""
        # chosen on the square: of a picture in its own shape a level has a few cells more or less
        square = self.family.layers(self.family.latent_size((self.family.side, self.family.side)))
        largest = self.config.largest_layer or self.family.largest_layer
        chosen = {layer.name for layer in chosen_layers(square, self.weights, largest)}
        return [layer for layer in self.family.layers(self.family.latent_size(image_size)) if layer.name in chosen]

    @property
    def pipeline(self) -> DiffusionPipeline:
        return self.family.pipeline

    def windows(self, text: str) -> list[tuple[int, int]]:
        """Character spans that each fit the text encoder; see `lavender.teachers.diffusion.text_windows`."""
        return windows(self.family.pipeline.tokenizer, text, self.family.max_tokens)

    def frame(self, image: Image.Image) -> Frame:
        """What the teacher sees of a picture; small, so that a picture need not be held."""
        family = self.family
        return frame(image, self.config.geometry, family.side, family.unit, family.longest)

    @torch.no_grad()
    def __call__(self, jobs: Sequence[Job]) -> list[WordMaps]:
        """Maps of a batch of jobs. A job's maps do not depend on the batch it is in."""
        rows, lost = self._rows(jobs)
        seen = self._see(jobs)
        found: dict[int, list[tuple[Word, Tensor, float]]] = {index: [] for index in range(len(jobs))}
        shapes: dict[tuple[int, ...], list[Window]] = {}
        for row in rows:  # pictures of one shape go through the backbone together
            if row.words:
                shapes.setdefault(tuple(seen[row.job].latents.shape), []).append(row)
        for group in shapes.values():
            for row, maps, confidence in zip(group, *self._group(jobs, group, seen), strict=True):
                found[row.job] += zip(row.words, maps, confidence.tolist())  # noqa: B905  # columns beyond the words
        return [self._result(job, found[index], lost[index]) for index, job in enumerate(jobs)]

    def _rows(self, jobs: Sequence[Job]) -> tuple[list[Window], list[list[Word]]]:
        """The windows of all jobs, and each job's words that have no token."""
        rows, lost = [], []
        for index, job in enumerate(jobs):
            lost.append([])
            words = sorted(job.words, key=lambda word: word.start)
            starts = [word.start for word in words]
            for start, end in self.windows(job.text):
                own = words[bisect_left(starts, start) : bisect_left(starts, end)]
                row, without = window_of(
                    self.family.pipeline.tokenizer,
                    index,
                    job.text[start:end],
                    start,
                    own,
                    self.config.carrier,
                    self.family.max_tokens,
                )
                rows.append(row)
                lost[-1] += without
        return rows, lost

    def _result(self, job: Job, found: list[tuple[Word, Tensor, float]], lost: list[Word]) -> WordMaps:
        dropped = [Dropped(word.text, "the teacher's text encoder has no token for it") for word in lost]
        dropped += too_long(job.text)
        found = sorted(found, key=lambda one: one[0].start)
        if self.config.word_share < 1 and found:
            kept = max(1, round(self.config.word_share * len(found)))
            ranked = sorted(found, key=lambda one: -one[2])
            dropped += [Dropped(word.text, "among the least confident of its text") for word, _, _ in ranked[kept:]]
            found = sorted(ranked[:kept], key=lambda one: one[0].start)
        maps = to_heat(torch.stack([one for _, one, _ in found])) if found else torch.zeros(0, *self.config.grid)
        return WordMaps(
            job.image_id,
            job.text,
            tuple(word for word, _, _ in found),
            maps,
            tuple(dropped),
            confidence=torch.tensor([one for _, _, one in found]),
        )

    def _see(self, jobs: Sequence[Job], mirrored: bool = False) -> list[_Seen]:
        """What the teacher sees of each job's picture; each picture is encoded once, also over batches."""
        framed: dict[str, Frame] = {}
        for job in jobs:
            if (job.image_id, mirrored) not in self._pictures and job.image_id not in framed:
                own = job.image if isinstance(job.image, Frame) else self.frame(job.image)
                framed[job.image_id] = own.mirrored() if mirrored else own
        shapes: dict[tuple[int, int], list[str]] = {}
        for name, one in framed.items():
            shapes.setdefault(one.size, []).append(name)
        for size, names in shapes.items():
            pixels = np.stack([framed[name].pixels for name in names]).astype(np.float32)
            latents = self.family.encode_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
            for name, clean in zip(names, latents, strict=True):
                self._pictures[name, mirrored] = _Seen(clean, framed[name].view, size)
        found = [self._pictures[job.image_id, mirrored] for job in jobs]
        _trim(self._pictures)
        return found

    def _conditions(self, texts: Sequence[str]) -> Condition:
        """Conditions of texts, each encoded once while it is remembered."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            encoded = self.family.encode_texts(new)
            for index, text in enumerate(new):
                self._texts[text] = {name: one[index] for name, one in encoded.items()}
        rows = [self._texts[text] for text in texts]
        _trim(self._texts)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _group(self, jobs: Sequence[Job], rows: list[Window], seen: list[_Seen]) -> tuple[Tensor, Tensor]:
        """Maps (row, column, rows, cols) and confidences (row, column) of rows whose latents have one shape."""
        maps, confidence = self._read(jobs, rows, seen)
        if self.config.flip:
            again, also = self._read(jobs, rows, self._see(jobs, mirrored=True))
            maps, confidence = (maps + again.flip(-1)) / 2, (confidence + also) / 2
        if not maps.isfinite().all():
            raise CaptureError(
                f"NaN or infinity in the maps, computed in {str(self.family.dtype).removeprefix('torch.')}",
                "finite attention",
                "use --dtype bfloat16 or float32",
            )
        return maps.cpu(), confidence.cpu()

    def _read(self, jobs: Sequence[Job], rows: list[Window], seen: list[_Seen]) -> tuple[Tensor, Tensor]:
        family, config = self.family, self.config
        own = [seen[row.job] for row in rows]
        latents = torch.stack([one.latents for one in own])
        ids = [jobs[row.job].image_id for row in rows]
        batch = Batch(
            latents,
            self._conditions([row.text for row in rows]),
            own[0].image_size,
            self._noises(ids, latents.shape[1:]) if config.mode == "noise" else None,
            family.empty_condition() if config.mode == "null-text" else None,
        )
        reader = _Reader(self, rows, [one.view for one in own], batch)
        read_maps(family, config, batch, reader)
        if batch.led_back is not None:
            self.reconstructed(batch, batch.led_back, ids)
        return reader.result()

    def reconstructed(self, batch: Batch, led_back: Tensor, image_ids: Sequence[str]) -> None:
        """Note how far from each row's clean latents the way back of null-text ended."""
        self.reconstruction += (led_back.float() - batch.latents.float()).square().flatten(1).mean(dim=1).tolist()

    def _noises(self, image_ids: Sequence[str], shape: Sequence[int]) -> Tensor:
        """(row, noise, timestep, *shape): a pure function of the picture's content and the seed, never of the batch."""
        config = self.config
        return torch.stack(
            [
                torch.stack(
                    [
                        _noise(f"{name}/{seed}", shape).expand(len(config.timesteps), *shape)
                        for seed in range(config.seed, config.seed + config.num_noises)
                    ]
                )
                for name in image_ids
            ]
        )


class _Reader:
    """The capturing forwards of one batch, and what becomes of them."""

    def __init__(self, teacher: Teacher, rows: Sequence[Window], views: Sequence[Box], batch: Batch):
        self.family, self.config, self.batch, self.views = teacher.family, teacher.config, batch, views
        latent_size = (batch.latents.shape[-2], batch.latents.shape[-1])
        self._layers = teacher.layers(batch.image_size)
        values, counts = indicator(rows, self.family.max_tokens)
        self._indicator = values.to(self.family.device)
        self._aggregate = Aggregate(self.config, teacher.weights, views, counts.to(self.family.device))
        self._watched: list[Layer] = []
        if self.config.refine:
            finest = max(self._layers, key=lambda layer: layer.grid[0] * layer.grid[1]).grid
            self._watched = [layer for layer in self.family.self_attention(latent_size) if layer.grid == finest]
        self._image_attention: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Condition, wanted: bool) -> Tensor | None:
        repeats = len(latents) // len(self.views)
        capture = WordCapture(
            self._layers,
            self._indicator.repeat_interleave(repeats, dim=0),
            condition["states"].shape[1],
            self._aggregate.take,
            self._watched,
        )
        output = None
        with capture_words(capture, stop=not wanted):
            output = self.family.denoise(latents, timesteps, condition, self.batch.image_size)
        self._image_attention = capture.image_attention
        return output

    def result(self) -> tuple[Tensor, Tensor]:
        """Maps (row, column, rows, cols), confidences (row, column)."""
        maps = self._aggregate.maps()
        confidence = self._aggregate.agreement(maps)
        if self._watched:
            attention = [(layer, *self._image_attention[layer.name]) for layer in self._watched]
            maps = refine(maps, attention, self.views, self.config.refine)
        return maps, confidence


def chosen_layers(layers: Sequence[Layer], weights: LayerWeights, largest: int | None) -> list[Layer]:
    """The layers with a weight and at most `largest`² cells, or of any size.

    Raises:
        ConfigError: a weight for no layer, or no layer left.
    """
    names = [layer.name for layer in layers]
    for prefix in weights:
        if not any(name.startswith(prefix) for name in names):
            raise ConfigError(
                f"layer_weights for {prefix!r}",
                f"the beginning of a layer's name, such as {names[0]!r}",
                "correct or remove it",
            )
    kept = [
        layer
        for layer in layers
        if (largest is None or layer.grid[0] * layer.grid[1] <= largest**2)
        and np.any(layer_weight(weights, layer.name))
    ]
    if not kept:
        grids = sorted({layer.grid for layer in layers})
        raise ConfigError(
            f"largest_layer={largest} and layer_weights={dict(weights)}, which leave no layer",
            f"at least one of the {len(layers)} layers, on the grids {grids}",
            "change them",
        )
    return kept


def _noise(name: str, shape: Sequence[int]) -> Tensor:
    """Gaussian noise that depends on a name alone."""
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))


def _trim(cache: OrderedDict[Hashable, V]) -> None:
    while len(cache) > CACHED:
        cache.popitem(last=False)
