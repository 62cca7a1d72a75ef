"""Stable Diffusion 1.x and 2.x under the contract."""

from __future__ import annotations

import pytest

from teachers import pipelines
from teachers.contract import Contract

SIXTEENS = {"square": ((64, 64), (16, 16)), "wide": ((150, 70), (12, 24)), "tall": ((60, 110), (20, 12))}
EIGHTS = {"square": ((64, 64), (16, 16)), "wide": ((150, 70), (10, 24)), "tall": ((60, 110), (22, 12))}


class TestStableDiffusion1(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return pipelines.stable_diffusion

    @pytest.fixture
    def latent_sizes(self):
        """Pictures of (width, height), and latents of (height, width): 64² pixels in the same shape, by sixteens."""
        return SIXTEENS


class TestStableDiffusion2(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return pipelines.stable_diffusion_2

    @pytest.fixture
    def latent_sizes(self):
        return EIGHTS
