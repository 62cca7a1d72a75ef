"""`Teacher`: a diffusion pipeline of any supported family that gives word maps.

Maps always cover the whole picture; `ExtractionConfig.geometry` sets which part of it the teacher sees.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.data.fingerprints import digest_of_pipeline
from lavender.data.images import image_id, load_image, named
from lavender.errors import CaptureError, ConfigError
from lavender.maps import Dropped, Word, WordMaps, to_heat
from lavender.model_files import loading
from lavender.teachers.diffusion.base import Condition, Layer, LayerWeights
from lavender.teachers.diffusion.batch_reader import BatchReader
from lavender.teachers.diffusion.denoising import Batch, read_maps
from lavender.teachers.diffusion.layer_weights import choose_layers
from lavender.teachers.diffusion.registry import check_pipeline, family_of, load_family, load_tiny_vae
from lavender.teachers.diffusion.text_windows import Window, window_of, windows
from lavender.teachers.diffusion.views import Box, View, view_of
from lavender.words import content_words, too_long

CACHED = 256
"""How many encoded pictures and texts are kept, for further captions of a picture and for repeated texts."""
V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class Job:
    """One picture and one text, with the words to map.

    Attributes:
        image: the picture, RGB, or the view that `Teacher.view` made of it.
        image_id: `lavender.data.images.image_id` of the picture. It seeds the noise, and identifies the maps.
        text: the text.
        words: words of the text, see `lavender.words.content_words`.
    """

    image: Image.Image | View
    image_id: str
    text: str
    words: tuple[Word, ...]


@dataclass(frozen=True, eq=False)
class _EncodedView:
    """A view of a picture: clean latents (channel, height, width), the view's box and its (height, width) in pixels."""

    latents: Tensor
    box: Box
    image_size: tuple[int, int]


class Teacher:
    """A diffusion model that says, for each word of a text, where it is in a picture (the paper's Eq. 13–14).

    `maps` takes one picture and one text. Calling the teacher with a list of `Job` maps a batch, and
    `lavender.extract` maps a data set.

    Examples:
        >>> from PIL import Image
        >>> from lavender import Teacher
        >>> from lavender.world import TEACHER_PATH
        >>> teacher = Teacher.from_pretrained(TEACHER_PATH)
        >>> maps = teacher.maps(Image.new("RGB", (96, 64), "red"), "a red dog")
        >>> [word.text for word in maps.words], tuple(maps.maps.shape)
        (['red', 'dog'], (2, 32, 32))

    Args:
        pipeline: a pipeline of diffusers, used as it is. `lavender.teachers.diffusion.registry.FAMILIES` are supported.
        config: how maps are made; by default `ExtractionConfig()`.
        name: recorded in map stores; `from_pretrained` takes the path or hub id.

    Attributes:
        family: the `TeacherFamily` around the pipeline.
        weights: the layer weights in use: the config's, else the family's default.
        reconstruction: with `mode="null-text"`, per window of text so far, the mean squared error of the latents that
            the denoising ended with. A picture's latents have a variance of about 1.

    Raises:
        UnsupportedModelError: no supported family has this pipeline class, or the tokenizer is slow.
        ModelError: the pipeline's parts do not fit each other, or it was trained on another kind of noise.
        ConfigError: the config does not fit the model: a layer weight that matches no layer, or a mode that the family
            does not have.
    """

    def __init__(self, pipeline: Any, config: ExtractionConfig | None = None, name: str = "unnamed"):
        self.family = family_of(type(pipeline))(pipeline)
        self.config, self.name = config or ExtractionConfig(), name
        check_pipeline(pipeline, self.config)
        self.family.check_parts()
        # refuse settings that do not fit this model before any work
        self.family.check_t5(self.config.t5)
        self.weights: LayerWeights = self._layer_weights()
        self.layers((self.family.side, self.family.side))
        if self.config.mode != "noise":
            _ = self.family.alphas_cumprod
        if self.config.refine:
            self.family.self_attention(self.family.latent_size((self.family.side, self.family.side)))
        self._pictures: OrderedDict[Hashable, _EncodedView] = OrderedDict()
        self._texts: OrderedDict[Hashable, Condition] = OrderedDict()
        self.reconstruction: list[float] = []
        self._path: str | None = None  # from_pretrained's

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: ExtractionConfig | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
        channels_last: bool = False,
    ) -> Teacher:
        """Load a pipeline. Weights come from safetensors only, and no remote code is run.

        Args:
            path: a folder or hub id.
            config: how maps are made; by default `ExtractionConfig()`.
            device: such as "cuda".
            dtype: of all weights. With float16, an autoencoder that overflows in it stays in float32.
            name: recorded in map stores; by default the path.
            channels_last: store convolutions in channels-last order for tensor cores; a map's last digits change.

        Raises:
            ModelError: a part is missing, damaged, not finite, or of another pipeline.
            UnsupportedModelError: no supported family has this pipeline class, or the tokenizer is slow.
            ConfigError: the config does not fit the model.
        """
        config = config or ExtractionConfig()
        with loading("teacher", path, consent=None):
            family = load_family(os.path.expanduser(path), t5=config.t5, dtype=dtype)
            if config.tiny_vae is not None:
                family.pipeline.vae = load_tiny_vae(family, config.tiny_vae, dtype=dtype)
        family.pipeline.to(device)
        if dtype == torch.float16 and family.pipeline.vae.config.get("force_upcast"):
            family.pipeline.vae.to(torch.float32)
        if channels_last:
            family.backbone.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
            family.pipeline.vae.to(memory_format=torch.channels_last)
        with loading("teacher", path, consent=None):  # which encodes a text
            teacher = cls(family.pipeline, config, name=name or str(path))
        teacher._path = os.path.abspath(folder) if os.path.isdir(folder := os.path.expanduser(path)) else str(path)
        return teacher

    @cached_property
    def version(self) -> str | None:
        """What identifies the content of a loaded teacher, `digest_of_pipeline`; None for a pipeline as it is."""
        return None if self._path is None else digest_of_pipeline(self._path)

    def layers(self, image_size: tuple[int, int]) -> list[Layer]:
        """The layers that are read for a view of (height, width) pixels, in the order in which they run."""
        # chosen on the square, because a non-square view can have a few cells more or less in a layer
        square = self.candidates((self.family.side, self.family.side))
        largest = self.config.largest_layer or self.family.largest_layer
        chosen = {layer.name for layer in choose_layers(square, self.weights, largest)}
        return [layer for layer in self.candidates(image_size) if layer.name in chosen]

    def _layer_weights(self) -> LayerWeights:
        """The config's `layer_weights` or `expert_layer`, else the family's default."""
        if self.config.layer_weights is not None:
            return self.config.layer_weights
        expert = self.config.expert_layer
        if expert is None:
            return self.family.concept_weights() if self.config.space == "output" else self.family.default_weights()
        names = [layer.name for layer in self.candidates((self.family.side, self.family.side))]
        if expert >= len(names):
            raise ConfigError(
                f"expert_layer={expert}", f"a layer from 0 to {len(names) - 1}", "count the layers as they run"
            )
        return {name: float(index == expert) for index, name in enumerate(names)}

    def candidates(self, image_size: tuple[int, int]) -> list[Layer]:
        """All layers that could be read for a view of (height, width) pixels, in the order in which they run."""
        size = self.family.latent_size(image_size)
        return self.family.concept_layers(size) if self.config.space == "output" else self.family.layers(size)

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline of diffusers."""
        return self.family.pipeline

    def windows(self, text: str) -> list[tuple[int, int]]:
        """Spans of characters that each fit the text encoder; see `lavender.teachers.diffusion.text_windows`."""
        return windows(self.family.tokenizer, self.family.as_encoded(text), self.family.max_tokens)

    def view(self, image: Image.Image) -> View:
        """What the teacher sees of a picture. It is small, so a batch can be prepared without holding its pictures."""
        family = self.family
        return view_of(image, self.config.geometry, family.side, family.unit, family.longest)

    def maps(self, image: Image.Image | Path | str | bytes, text: str) -> WordMaps:
        """Map the content words of one text on one picture.

        The words are those whose part of speech is in `config.parts_of_speech`.

        Args:
            image: a picture, the path of a file, or an encoded file. EXIF orientation is applied.
            text: such as a caption; any length.

        Returns:
            Maps of the words, float32 (word, rows, cols) with maximum 1, on `config.grid`. There are no words if the
            text has no content word. Words that were left out are in `dropped`, with the reason.

        Raises:
            DataError: the picture cannot be decoded.
            CaptureError, ConfigError: as calling the teacher with jobs.
        """
        picture = load_image(image, named(image, "the image"))
        words = content_words(text, self.config.parts_of_speech)
        (maps,) = self([Job(picture, image_id(picture), text, words)])
        return dataclasses.replace(maps, image=picture)

    @torch.no_grad()
    def __call__(self, jobs: Sequence[Job]) -> list[WordMaps]:
        """Map the words of a list of jobs, in batches of one shape of view and at most `config.batch_size` texts.

        The maps of a job do not depend on the other jobs.

        Returns:
            The maps of each job, in the order of the jobs; see `maps`.

        Raises:
            CaptureError: the maps are not finite, or the attention cannot be read.
            ConfigError: the latents are not finite, or `layer_weights` has another number of heads than a layer.
        """
        rows, without_token = self._windows_of(jobs)
        views = [self._encode_views(jobs, mirrored) for mirrored in ((False, True) if self.config.flip else (False,))]
        mapped: list[list[tuple[Word, Tensor, float]]] = [[] for _ in jobs]
        shapes: dict[tuple[int, ...], list[Window]] = {}
        for row in rows:  # views of one shape go through the backbone together
            if row.words:
                shapes.setdefault(tuple(views[0][row.job].latents.shape), []).append(row)
        size = self.config.batch_size
        groups = [group[start : start + size] for group in shapes.values() for start in range(0, len(group), size)]
        for group in groups:
            for row, maps, confidence in zip(group, *self._map_rows(jobs, group, views), strict=True):
                mapped[row.job] += zip(row.words, maps, confidence.tolist())  # noqa: B905  # columns beyond the words
        return [self._word_maps(job, mapped[index], without_token[index]) for index, job in enumerate(jobs)]

    def _windows_of(self, jobs: Sequence[Job]) -> tuple[list[Window], list[list[Word]]]:
        """The windows of all jobs, and per job the words that have no token."""
        rows, without_token = [], []
        for index, job in enumerate(jobs):
            without_token.append([])
            words = sorted(job.words, key=lambda word: word.start)
            starts = [word.start for word in words]
            for start, end in self.windows(job.text):
                window, lost = window_of(
                    self.family.token_offsets,
                    index,
                    job.text[start:end],
                    start,
                    words[bisect_left(starts, start) : bisect_left(starts, end)],
                    self.config.carrier,
                )
                rows.append(window)
                without_token[-1] += lost
        return rows, without_token

    def _word_maps(self, job: Job, mapped: list[tuple[Word, Tensor, float]], without_token: list[Word]) -> WordMaps:
        """The result of a job from its words' maps and confidences, in any order and scale."""
        dropped = [Dropped(word.text, "the teacher's text encoder has no token for it") for word in without_token]
        dropped += too_long(job.text)
        mapped = sorted(mapped, key=lambda entry: entry[0].start)
        if self.config.word_share < 1 and mapped:
            num_kept = max(1, round(self.config.word_share * len(mapped)))
            ranked = sorted(mapped, key=lambda entry: -entry[2])
            dropped += [Dropped(word.text, "among the least confident of its text") for word, _, _ in ranked[num_kept:]]
            mapped = sorted(ranked[:num_kept], key=lambda entry: entry[0].start)
        heat = to_heat(torch.stack([maps for _, maps, _ in mapped])) if mapped else torch.zeros(0, *self.config.grid)
        return WordMaps(
            job.image_id,
            job.text,
            tuple(word for word, _, _ in mapped),
            heat,
            tuple(dropped),
            confidence=torch.tensor([confidence for _, _, confidence in mapped]),
        )

    def _encode_views(self, jobs: Sequence[Job], mirrored: bool = False) -> list[_EncodedView]:
        """The encoded view of each job's picture. Each picture is encoded once, also across batches."""
        new: dict[str, View] = {}
        for job in jobs:
            if (job.image_id, mirrored) not in self._pictures and job.image_id not in new:
                view = job.image if isinstance(job.image, View) else self.view(job.image)
                new[job.image_id] = view.mirrored() if mirrored else view
        sizes: dict[tuple[int, int], list[str]] = {}
        for identity, view in new.items():
            sizes.setdefault(view.size, []).append(identity)
        for size, identities in sizes.items():
            pixels = np.stack([new[identity].pixels for identity in identities]).astype(np.float32)
            latents = self.family.encode_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
            for identity, clean in zip(identities, latents, strict=True):
                self._pictures[identity, mirrored] = _EncodedView(clean, new[identity].box, size)
        views = [self._pictures[job.image_id, mirrored] for job in jobs]
        _trim(self._pictures)
        return views

    def _conditions(self, texts: Sequence[str]) -> Condition:
        """The conditions of texts. Each text is encoded once while it is cached."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            encoded = self.family.encode_texts(new)
            for index, text in enumerate(new):
                self._texts[text] = {name: tensor[index] for name, tensor in encoded.items()}
        rows = [self._texts[text] for text in texts]
        _trim(self._texts)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _map_rows(
        self, jobs: Sequence[Job], rows: list[Window], views: list[list[_EncodedView]]
    ) -> tuple[Tensor, Tensor]:
        """Maps (row, column, rows, cols) and confidences (row, column) of rows whose latents have one shape."""
        maps, confidence = self._run_mode(jobs, rows, views[0])
        for mirrored in views[1:]:
            flipped, flipped_confidence = self._run_mode(jobs, rows, mirrored)
            maps, confidence = (maps + flipped.flip(-1)) / 2, (confidence + flipped_confidence) / 2
        if not maps.isfinite().all():
            raise CaptureError(
                f"NaN or infinity in the maps, computed in {str(self.family.dtype).removeprefix('torch.')}",
                "finite attention",
                "use --dtype bfloat16 or float32",
            )
        return maps.cpu(), confidence.cpu()

    def _run_mode(self, jobs: Sequence[Job], rows: list[Window], views: list[_EncodedView]) -> tuple[Tensor, Tensor]:
        """As `_map_rows`, for the views as given: without flipping, on the backbone's device, unchecked."""
        family, config = self.family, self.config
        row_views = [views[row.job] for row in rows]
        latents = torch.stack([view.latents for view in row_views])
        image_ids = [jobs[row.job].image_id for row in rows]
        batch = Batch(
            latents,
            self._conditions([row.text for row in rows]),
            row_views[0].image_size,
            self._noise_of(image_ids, latents.shape[1:]) if config.mode == "noise" else None,
            family.empty_condition() if config.mode == "null-text" else None,
        )
        layers, boxes = self.layers(batch.image_size), [view.box for view in row_views]
        reader = BatchReader(family, config, layers, self.weights, rows, boxes, batch)
        read_maps(family, config, batch, reader)
        if batch.reconstruction is not None:
            self.record_reconstruction(batch, batch.reconstruction, image_ids)
        return reader.result()

    def record_reconstruction(self, batch: Batch, reconstruction: Tensor, image_ids: Sequence[str]) -> None:
        """Add each row's error to `self.reconstruction`. Called once per null-text batch; subclasses may extend it.

        Args:
            reconstruction: (row, channel, height, width), what null-text's denoising ended with.
            image_ids: per row, the picture's identity.
        """
        errors = (reconstruction.float() - batch.latents.float()).square().flatten(1).mean(dim=1)
        self.reconstruction += errors.tolist()

    def _noise_of(self, image_ids: Sequence[str], shape: Sequence[int]) -> Tensor:
        """(row, noise, timestep, *shape): depends on the picture's content and the seed, never on the batch."""
        config = self.config
        return torch.stack(
            [
                torch.stack(
                    [
                        _gaussian(f"{identity}/{seed}", shape).expand(len(config.timesteps), *shape)
                        for seed in range(config.seed, config.seed + config.num_noises)
                    ]
                )
                for identity in image_ids
            ]
        )


def _gaussian(name: str, shape: Sequence[int]) -> Tensor:
    """Gaussian noise that depends on a name alone."""
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))


def _trim(cache: OrderedDict[Hashable, V]) -> None:
    """Remove the oldest entries beyond `CACHED`."""
    while len(cache) > CACHED:
        cache.popitem(last=False)
