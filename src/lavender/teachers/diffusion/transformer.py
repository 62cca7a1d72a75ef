"""What teachers share whose backbone is a transformer: how large their pictures are, in pixels."""

from __future__ import annotations

from torch import nn

from lavender.teachers.diffusion.base import TeacherFamily


class TransformerFamily(TeacherFamily):
    """Base of families whose pipeline has a `transformer` with a `sample_size` and a `patch_size`."""

    @property
    def backbone(self) -> nn.Module:
        return self.pipeline.transformer

    @property
    def side(self) -> int:
        return self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def unit(self) -> int:
        return self.pipeline.transformer.config.patch_size * self.pipeline.vae_scale_factor


class PackedFamily(TransformerFamily):
    """Base of families whose pipeline packs 2 × 2 cells of latents into one token before the transformer."""

    @property
    def in_channels(self) -> int:
        return self.pipeline.transformer.config.in_channels // 4

    @property
    def side(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    @property
    def unit(self) -> int:
        return 2 * self.pipeline.vae_scale_factor
