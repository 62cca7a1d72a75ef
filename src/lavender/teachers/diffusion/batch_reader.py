"""`BatchReader`: the forwards of one batch under capture, and the maps that they give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.teachers.diffusion.aggregate import Aggregate, refine
from lavender.teachers.diffusion.base import Condition, Layer, LayerWeights, TeacherFamily
from lavender.teachers.diffusion.capture import WordCapture, capture_words
from lavender.teachers.diffusion.concepts import ConceptCapture, capture_concepts
from lavender.teachers.diffusion.denoising import Batch
from lavender.teachers.diffusion.text_windows import Window, indicator
from lavender.teachers.diffusion.views import Box


class BatchReader:
    """Runs forwards of the backbone and aggregates their attention; it is the `read` of `denoising.read_maps`.

    Args:
        layers: the layers that are read, in the order in which they run.
        weights: see `ExtractionConfig.layer_weights`.
        rows: per row of the batch, its window of text.
        boxes: per row, the part of its picture that the latents show.
    """

    def __init__(
        self,
        family: TeacherFamily,
        config: ExtractionConfig,
        layers: Sequence[Layer],
        weights: LayerWeights,
        rows: Sequence[Window],
        boxes: Sequence[Box],
        batch: Batch,
    ):
        self.family, self.config, self.batch, self.boxes = family, config, batch, boxes
        self._layers = layers
        values, counts = indicator(rows, family.word_keys)
        self._indicator = values.to(family.device)
        if config.space == "output":  # the columns are words, each of one concept, and their mean
            is_word = (values[..., :-1].sum(dim=1) > 0).float()
            counts = torch.cat([is_word, is_word.sum(dim=1, keepdim=True)], dim=1)
        self._aggregate = Aggregate(config, weights, boxes, counts.to(family.device))
        self._image_layers: list[Layer] = []
        if config.refine:
            latent_size = (batch.latents.shape[-2], batch.latents.shape[-1])
            finest = max(layers, key=lambda layer: layer.grid[0] * layer.grid[1]).grid
            self._image_layers = [layer for layer in family.self_attention(latent_size) if layer.grid == finest]
        self._image_attention: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Condition, needs_output: bool) -> Tensor | None:
        """Run one forward; without `needs_output` it stops after the last layer that is read, and returns None."""
        repeats = len(latents) // len(self.boxes)
        indicator, num_text_keys = self._indicator.repeat_interleave(repeats, dim=0), condition["states"].shape[1]
        if self.config.space == "output":
            capture = ConceptCapture(*self._blocks(latents), indicator[..., :-1], num_text_keys, self._aggregate.add)
            context = capture_concepts(capture, stop=not needs_output)
        else:
            capture = WordCapture(self._layers, indicator, num_text_keys, self._aggregate.add, self._image_layers)
            context = capture_words(capture, stop=not needs_output)
        output = None
        with context:
            output = self.family.denoise(latents, timesteps, condition, self.batch.image_size)
        if isinstance(capture, WordCapture):
            self._image_attention = capture.image_attention
        return output

    def _blocks(self, latents: Tensor) -> tuple[list[Layer], list[str]]:
        """The blocks through which concepts run, up to the last that is read; and the names of those read."""
        read = [layer.name for layer in self._layers]
        every = self.family.concept_layers((latents.shape[-2], latents.shape[-1]))
        last = max(index for index, layer in enumerate(every) if layer.name in read)
        return every[: last + 1], read

    def result(self) -> tuple[Tensor, Tensor]:
        """The mean over the forwards so far: maps (row, column, rows, cols) and confidences (row, column)."""
        maps = self._aggregate.maps()
        confidence = self._aggregate.agreement(maps)
        if self._image_layers:
            attention = [(layer, *self._image_attention[layer.name]) for layer in self._image_layers]
            maps = refine(maps, attention, self.boxes, self.config.refine)
        return maps, confidence
