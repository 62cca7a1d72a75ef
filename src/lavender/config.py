"""Every setting of extraction and alignment, with its check. Nothing else validates settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from lavender.errors import ConfigError

MODES = ("noise", "ddim")
POOLINGS = ("layer-mean", "learn")
MATCHES = ("label", "exact")
PARTS_OF_SPEECH = ("noun", "adjective", "verb", "other")

Mode = Literal["noise", "ddim"]
Pooling = Literal["layer-mean", "learn"]
Match = Literal["label", "exact"]
T = TypeVar("T")


@dataclass(frozen=True)
class ExtractionConfig:
    """How word maps are made from a diffusion model.

    Attributes:
        mode: "noise" adds noise once at `timestep` and runs the UNet once; "ddim" captures during
            DDIM inversion, `num_steps` UNet passes (the paper's recipe without the optimisation).
        timestep: of 1000; how much noise `mode="noise"` adds.
        num_steps: inversion steps of `mode="ddim"`.
        seed: of the noise. The noise of a picture depends on its content and this seed, never on its batch.
        grid: (rows, cols) of the stored maps; the paper's is 32 × 32.
        batch_size: pictures a UNet pass.
        parts_of_speech: which words get a map.
    """

    mode: Mode = "noise"
    timestep: int = 100
    num_steps: int = 10
    seed: int = 0
    grid: tuple[int, int] = (32, 32)
    batch_size: int = 8
    parts_of_speech: tuple[str, ...] = ("noun", "adjective", "verb")

    def __post_init__(self) -> None:
        if not isinstance(self.grid, (tuple, list)):
            raise ConfigError(f"grid={self.grid!r}", "(rows, cols)", "use the paper's (32, 32)")
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "parts_of_speech", tuple(self.parts_of_speech))
        _one_of("mode", self.mode, MODES)
        _whole("timestep", self.timestep, 0, 999)
        _whole("num_steps", self.num_steps, 1, 1000)
        _whole("seed", self.seed, 0, 2**32 - 1)
        _whole("batch_size", self.batch_size, 1, 4096)
        if len(self.grid) != 2 or min(self.grid) < 2 or max(self.grid) > 256:
            raise ConfigError(f"grid={self.grid}", "(rows, cols), each from 2 to 256", "use the paper's (32, 32)")
        for part in self.parts_of_speech:
            _one_of("parts_of_speech", part, PARTS_OF_SPEECH)

    def identity(self) -> dict[str, Any]:
        """The settings that change a map. Two stores with the same identity can be joined."""
        return {key: value for key, value in asdict(self).items() if key != "batch_size"}


@dataclass(frozen=True)
class AlignmentConfig:
    """How the student's attention is pulled towards the maps: L = L_VLM + align_weight · L_att.

    Attributes:
        align_weight: the paper's λ, on the mean over cells and matched words; 0 is plain fine-tuning.
        pooling: "layer-mean" sends each layer's heads through the Aligner and averages over layers;
            "learn" does the same with new query and key projections beside the pretrained ones (Eq. 15–16).
        match: "label" aligns every word of the answer that has a map; "exact" (the paper's) only those that the
            student predicts at that moment: where it is about to say something else, its attention is left alone.
        layers: indices of the decoder layers to align, or None for all that see the picture.
        aligner_width: channels of the Aligner's hidden convolutions, d_h.
        min_coverage: training stops before the first step if a smaller share of samples has maps.
    """

    align_weight: float = 10.0
    pooling: Pooling = "layer-mean"
    match: Match = "label"
    layers: tuple[int, ...] | None = None
    aligner_width: int = 32
    min_coverage: float = 0.5

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("match", self.match, MATCHES)
        _between("align_weight", self.align_weight, 0, 1e9)
        _whole("aligner_width", self.aligner_width, 1, 4096)
        _between("min_coverage", self.min_coverage, 0, 1)


def from_mapping(cls: type[T], settings: Mapping[str, Any], where: str) -> T:
    """Build a config dataclass from a mapping; a misspelt key is an error that names the nearest right one."""
    check_keys(settings, [one.name for one in fields(cls)], where)  # ty: ignore[invalid-argument-type]
    return cls(**settings)


def check_keys(settings: Mapping[str, Any], allowed: list[str], where: str) -> None:
    """Raise ConfigError for a key that is not allowed, with the nearest one that is."""
    for key in settings:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=3)
            hint = f"write {near[0]!r} instead" if near else "remove it, or look it up in the documentation"
            known = sorted(set(near if near and len(allowed) > 20 else allowed))
            raise ConfigError(f"the key {key!r} in {where}", f"a known key, such as {', '.join(known)}", hint)


def _one_of(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ConfigError(f"{name}={value!r}", f"one of {options}", f"set {name} to one of them")


def _between(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}", f"a number from {low} to {high}", f"change {name}")


def _whole(name: str, value: float, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}", f"a whole number from {low} to {high}", f"change {name}")


assert get_args(Mode) == MODES
assert get_args(Pooling) == POOLINGS
assert get_args(Match) == MATCHES
