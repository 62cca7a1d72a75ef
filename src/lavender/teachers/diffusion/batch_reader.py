"""`BatchReader`: the forwards of one batch under capture, and the maps that they give."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.teachers.diffusion.aggregate import Aggregate, refine
from lavender.teachers.diffusion.base import Condition, Layer, LayerWeights, TeacherFamily
from lavender.teachers.diffusion.capture import WordCapture, capture_words
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
        values, counts = indicator(rows, family.max_tokens)
        self._indicator = values.to(family.device)
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
        capture = WordCapture(
            self._layers,
            self._indicator.repeat_interleave(repeats, dim=0),
            condition["states"].shape[1],
            self._aggregate.add,
            self._image_layers,
        )
        output = None
        with capture_words(capture, stop=not needs_output):
            output = self.family.denoise(latents, timesteps, condition, self.batch.image_size)
        self._image_attention = capture.image_attention
        return output

    def result(self) -> tuple[Tensor, Tensor]:
        """The mean over the forwards so far: maps (row, column, rows, cols) and confidences (row, column)."""
        maps = self._aggregate.maps()
        confidence = self._aggregate.agreement(maps)
        if self._image_layers:
            attention = [(layer, *self._image_attention[layer.name]) for layer in self._image_layers]
            maps = refine(maps, attention, self.boxes, self.config.refine)
        return maps, confidence
