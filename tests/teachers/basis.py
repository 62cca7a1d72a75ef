"""What the parts of the contract share: what a backbone is given, what it shows, what could be left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavender.config import ExtractionConfig
from lavender.maps import WordMaps
from lavender.teachers.diffusion.base import Condition, Layer, TeacherFamily
from lavender.teachers.diffusion.capture import WordCapture, capture_words
from lavender.teachers.diffusion.registry import family_of
from lavender.words import words_of
from teachers.explicit import Reading, Rotate, indicator_of
from teachers.pipelines import TEXTS, fresh, shared, tokenizer

GRID = (11, 13)
ROUNDING = 1e-4
"""The largest difference of a map (0 to 1) that float32 may make when a model sees another batch, or is another copy.

Its kernels then add in another order, which depends on the CPU and its threads too: up to 1.3e-5 with the deepest text
encoder here. What takes another row's map by mistake differs by more than ten times this."""
CONTRAST_ROUNDING = 1e-3
"""The same with `competition="contrast"`: a map is then a small difference, whose maximum becomes 1."""
SIZES = pytest.mark.parametrize("size", [(16, 16), (12, 20), (24, 12)])
LEVERS: tuple[dict[str, Any], ...] = (
    {},
    {"timesteps": (300, 50), "num_noises": 2, "geometry": "aspect"},
    {"geometry": "letterbox", "refine": 1, "competition": "contrast"},
    {"geometry": "crop", "flip": True, "head_share": 0.5, "competition": "share", "carrier": "own+next"},
)


def plain(**settings: Any) -> ExtractionConfig:
    """Every layer alike; and what a test sets."""
    every: dict[str, Any] = {"grid": GRID, "timesteps": (300,), "layer_weights": {}, "largest_layer": 64}
    return ExtractionConfig(**every | settings)


def given_of(family: TeacherFamily, size: tuple[int, int]) -> tuple[Tensor, Tensor, Condition, tuple[int, int]]:
    """What `denoise` takes, for two rows with latents of (height, width)."""
    factor = family.pipeline.vae_scale_factor
    latents = torch.randn(2, family.in_channels, *size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        condition = family.encode_texts(TEXTS[:2])
    return latents, torch.tensor([100, 700]), condition, (size[0] * factor, size[1] * factor)


def indicators(readings: Sequence[Reading] | None = None, num_words: int | None = None) -> Tensor:
    """E (row, token, word) of the words of two texts; or of each text's first word again and again."""
    both = [indicator_of(text, words_of(text), readings).float() for text in TEXTS[:2]]
    if num_words is not None:
        both = [one[:, :1].expand(-1, num_words) for one in both]
    width = max(one.shape[1] for one in both)
    return torch.stack([F.pad(one, (0, width - one.shape[1])) for one in both])


def any_indicators(family: TeacherFamily) -> Tensor:
    """E (row, token, word) of a few keys, whichever words they carry."""
    return torch.eye(family.word_keys)[None, :, 1:8].expand(2, -1, -1)


def captured(
    family: TeacherFamily,
    size: tuple[int, int],
    layers: list[Layer] | None = None,
    stop: bool = False,
    words_BTW: Tensor | None = None,
) -> tuple[dict[str, Tensor], Any]:
    """Maps of each layer (row, head, cell, word), and what the backbone gave."""
    given, maps, output = given_of(family, size), {}, None
    capture = WordCapture(
        family.layers(size) if layers is None else layers,
        any_indicators(family) if words_BTW is None else words_BTW,
        given[2]["states"].shape[1],
        lambda layer, one: maps.__setitem__(layer.name, one),
    )
    with torch.no_grad(), capture_words(capture, stop):
        output = family.denoise(*given)
    return maps, output


def traces(family: TeacherFamily) -> list:
    """All that a teacher could leave behind in a pipeline."""
    backbone: Any = family.backbone
    parts = [one for one in family.pipeline.components.values() if isinstance(one, torch.nn.Module)]
    hooks = [
        (name, list(one._forward_hooks), list(one._forward_pre_hooks), one.training)
        for part in parts
        for name, one in part.named_modules()
    ]
    asking = [parameter.requires_grad for part in parts for parameter in part.parameters()]
    gradients = [parameter.grad for part in parts for parameter in part.parameters()]
    return [
        hooks,
        asking,
        gradients,
        {name: id(one) for name, one in backbone.attn_processors.items()},
        copy.deepcopy(dict(backbone.config)),
        dict(family.pipeline.scheduler.config),
    ]


def same(one: WordMaps, other: WordMaps, atol: float = ROUNDING) -> None:
    assert (one.image_id, one.text, one.words, one.dropped) == (other.image_id, other.text, other.words, other.dropped)
    torch.testing.assert_close(one.maps, other.maps, rtol=0, atol=atol)
    torch.testing.assert_close(one.confidence, other.confidence, rtol=0, atol=1e-6)


class Bypass:
    """An attention processor that computes nothing, and so never calls torch's attention."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        joint = encoder_hidden_states is not None and getattr(attn, "add_k_proj", None) is not None
        return (hidden_states, encoder_hidden_states) if joint else hidden_states


class Largest(TorchDispatchMode):
    """The shapes of all tensors that are made inside."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(one.shape) for one in tree_leaves(output) if isinstance(one, Tensor)}
        return output


class Basis:
    """A family's pipeline. Its test file gives `build`, a function of `pipelines`, and `latent_sizes`.

    Attributes:
        refine: the `refine` of tests that spread maps; 0 for families that refuse it.
        counts: keys of words of the first two texts.
        settings: what every config of the family needs.
        rounding: the largest difference of heat in bfloat16; more for a deep text encoder.
    """

    rounding: ClassVar[float] = 0.1
    settings: ClassVar[dict[str, Any]] = {}
    refine: ClassVar[int] = 1
    counts: ClassVar[Sequence[dict[str, int]]] = ({"zebra": 5, "umbrellas": 3}, {"red": 1, "grasshopper": 6})

    def config(self, **settings: Any) -> ExtractionConfig:
        return ExtractionConfig(**self.settings | settings)

    def plain(self, **settings: Any) -> ExtractionConfig:
        return plain(**self.settings | settings)

    @pytest.fixture
    def readings(self, pipeline) -> list[Reading]:
        """The text encoders whose states are keys."""
        return [Reading(tokenizer())]

    @pytest.fixture
    def rotate(self) -> Rotate | None:
        """Rotary positions, by hand."""
        return None

    def text_mask(self, condition: Condition) -> Tensor | None:
        """1 where a key of the text counts, else 0: (row, key)."""
        return None

    @pytest.fixture(scope="class")
    @classmethod
    def pipeline(cls, build: Callable[[], Any]) -> Any:
        """Shared by all tests: not to be changed."""
        return shared(build)

    @pytest.fixture
    def family(self, pipeline) -> TeacherFamily:
        return family_of(type(pipeline))(pipeline)

    @pytest.fixture
    def own(self, build: Callable[[], Any]) -> Any:
        """A family whose pipeline a test may change."""
        pipeline = fresh(build)
        return family_of(type(pipeline))(pipeline)
