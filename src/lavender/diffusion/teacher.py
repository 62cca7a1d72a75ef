"""A Stable Diffusion pipeline as a teacher of word maps.

Geometry: the whole picture is squashed onto the pipeline's own square, so the maps' frame is the
whole picture. Nothing is cropped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.diffusion.capture import capture_words, layer_grid
from lavender.errors import UnsupportedModelError
from lavender.maps import Dropped, Word, WordMaps, to_heat
from lavender.words import token_span

# Stable Diffusion's 64 × 64 maps are nearly uniform; the paper's recipe reads 16 × 16.
LARGEST_LAYER_ROWS = 32
_SENTENCE = re.compile(r"[^.!?;\n]*[.!?;\n]+\s*|[^.!?;\n]+$")


@dataclass(frozen=True, eq=False)
class Job:
    """One picture and one text with the words that want a map."""

    image: Image.Image
    image_id: str
    text: str
    words: tuple[Word, ...]


class Teacher:
    """Word maps of given pictures and texts from a Stable Diffusion pipeline.

    Args:
        pipeline: the pipeline; its modules are used as they are and never changed.
        config: mode, noise, grid.
        name: what to write into a store (the path or hub id it came from).
    """

    def __init__(self, pipeline: StableDiffusionPipeline, config: ExtractionConfig, name: str = "unnamed"):
        if type(pipeline) is not StableDiffusionPipeline:
            raise UnsupportedModelError(
                f"a {type(pipeline).__name__}",
                "a StableDiffusionPipeline (Stable Diffusion 1.x or 2.x)",
                "use such a teacher; other families are not supported yet",
            )
        self.pipeline, self.config, self.name = pipeline, config, name
        self.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: ExtractionConfig,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
    ) -> Teacher:
        """Load a folder or hub id. Weights come from safetensors only."""
        pipeline = StableDiffusionPipeline.from_pretrained(
            path, safety_checker=None, requires_safety_checker=False, use_safetensors=True, dtype=dtype
        )
        pipeline.to(device)
        return cls(pipeline, config, name=name or str(path))

    @torch.inference_mode()
    def __call__(self, jobs: Sequence[Job]) -> list[WordMaps]:
        """Maps of a batch of jobs. A job's maps do not depend on the batch it is in."""
        rows: list[tuple[int, int, int]] = []  # job, first and last character of its window
        for index, job in enumerate(jobs):
            rows += [(index, start, end) for start, end in self.windows(job.text)]
        tokens = self.pipeline.tokenizer(
            [jobs[index].text[start:end] for index, start, end in rows],
            padding="max_length", max_length=self._max_tokens, truncation=True,
            return_offsets_mapping=True, return_tensors="pt",
        )  # fmt: skip
        indicator, places, dropped = self._indicator(jobs, rows, tokens["offset_mapping"].tolist())
        latents = self._latents(jobs)[[index for index, _, _ in rows]]
        states = self.pipeline.text_encoder(tokens["input_ids"].to(self._device))[0]
        noise = torch.stack([self._noise(jobs[index].image_id, latents.shape[1:]) for index, _, _ in rows])
        maps = self._run(latents, states, indicator.to(self._device), noise.to(latents)).cpu()
        results = []
        for index, job in enumerate(jobs):
            kept = [word for word in job.words if (index, word.start) in places]
            own = [maps[places[index, word.start]] for word in kept]
            stacked = to_heat(torch.stack(own)) if own else torch.zeros(0, *self.config.grid)
            results.append(WordMaps(job.image_id, job.text, tuple(kept), stacked, tuple(dropped[index])))
        return results

    def windows(self, text: str) -> list[tuple[int, int]]:
        """Character spans that each fit the text encoder, cut at the ends of sentences, else between words."""
        limit = self._max_tokens - 2
        pieces: list[tuple[int, int]] = []
        for sentence in _SENTENCE.finditer(text):
            if self._num_tokens(sentence.group()) <= limit:
                pieces.append(sentence.span())
            else:
                pieces += [
                    (sentence.start() + one.start(), sentence.start() + one.end())
                    for one in re.finditer(r"\s*\S+\s*", sentence.group())
                ]
        spans: list[tuple[int, int]] = []
        for start, end in pieces:
            if spans and self._num_tokens(text[spans[-1][0] : end]) <= limit:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        return spans

    def _num_tokens(self, text: str) -> int:
        return len(self.pipeline.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @property
    def _max_tokens(self) -> int:
        return self.pipeline.tokenizer.model_max_length

    @property
    def _device(self) -> torch.device:
        return self.pipeline.unet.device

    def _indicator(self, jobs, rows, offsets):
        """E (row, token, word), where each word's map will be found, and the words that have no token.

        Slots count the words of a row alone, so a long text in many windows stays cheap.
        """
        columns: list[list[list[int]]] = []  # row → slot → tokens of the word
        places: dict[tuple[int, int], tuple[int, int]] = {}
        for row, (index, start, end) in enumerate(rows):
            columns.append([])
            for word in jobs[index].words:
                if start <= word.start < end:
                    span = token_span(offsets[row], word.start - start, word.end - start)
                    if span:
                        places[index, word.start] = (row, len(columns[row]))
                        columns[row].append(span)
        indicator = torch.zeros(len(rows), self._max_tokens, max([1, *map(len, columns)]))
        for row, spans in enumerate(columns):
            for slot, span in enumerate(spans):
                indicator[row, span, slot] = 1 / len(span)
        dropped = [
            [
                Dropped(word.text, "the teacher's text encoder has no token for it")
                for word in job.words
                if (index, word.start) not in places
            ]
            for index, job in enumerate(jobs)
        ]
        return indicator, places, dropped

    def _latents(self, jobs: Sequence[Job]) -> Tensor:
        """Scaled latents of the jobs' pictures (job, channel, height, width); each picture is encoded once."""
        vae = self.pipeline.vae
        side = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        first = {job.image_id: job.image for job in reversed(jobs)}
        order = {image_id: position for position, image_id in enumerate(first)}
        pixels = np.stack([
            np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32).transpose(2, 0, 1)
            for image in first.values()
        ])  # fmt: skip
        batch = (torch.from_numpy(pixels) / 127.5 - 1).to(self._device, vae.dtype)
        latents = vae.encode(batch).latent_dist.mode() * vae.config.scaling_factor
        return latents[[order[job.image_id] for job in jobs]].to(self.pipeline.unet.dtype)

    def _noise(self, image_id: str, shape: tuple[int, ...]) -> Tensor:
        """Gaussian noise that depends on the picture's content and the seed, not on the batch."""
        digest = hashlib.blake2b(f"{image_id}/{self.config.seed}".encode(), digest_size=7).digest()
        return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))

    def _run(self, latents: Tensor, states: Tensor, indicator: Tensor, noise: Tensor) -> Tensor:
        """Maps (row, word, rows, cols): mean over heads, layers and passes."""
        if self.config.mode == "noise":
            timestep = torch.tensor(self.config.timestep, device=latents.device)
            noisy = self.scheduler.add_noise(latents, noise, timestep[None])
            return self._pass(noisy, timestep, states, indicator)[1]
        inverse = DDIMInverseScheduler.from_config(self.scheduler.config)
        inverse.set_timesteps(self.config.num_steps, device=latents.device)
        total = torch.zeros(())
        for timestep in inverse.timesteps:
            predicted, maps = self._pass(latents, timestep, states, indicator)
            latents = inverse.step(predicted, timestep, latents).prev_sample
            total = total + maps
        return total / self.config.num_steps

    def _pass(self, latents: Tensor, timestep: Tensor, states: Tensor, indicator: Tensor) -> tuple[Tensor, Tensor]:
        """One UNet pass: its prediction, and maps (row, word, rows, cols) averaged over layers."""
        unet = self.pipeline.unet
        with capture_words(unet, indicator) as layers:
            predicted = unet(latents, timestep, states).sample
        resized = []
        for layer in layers.values():
            rows, cols = layer_grid(layer.shape[1], *latents.shape[-2:])
            if rows <= LARGEST_LAYER_ROWS:
                grid = layer.transpose(1, 2).unflatten(-1, (rows, cols))
                resized.append(F.interpolate(grid, size=self.config.grid, mode="bilinear", align_corners=False))
        return predicted, torch.stack(resized).mean(dim=0)
