"""WordMaps: what teacher, disk and student have in common.

One picture, one text, and for each mapped word where it is in the picture. Teacher, store and
student know this type and not each other.

Frame: the whole picture, as a person sees it (EXIF orientation applied), squashed onto a grid of
(rows, cols). Row 0 is the top, column 0 the left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Word:
    """A word of a text.

    Attributes:
        text: the word as written.
        start, end: its half-open span of characters, `text == caption[start:end]`.
        lemma: its dictionary form, lower case.
        part_of_speech: "noun", "adjective", "verb" or "other".
    """

    text: str
    start: int
    end: int
    lemma: str
    part_of_speech: str


@dataclass(frozen=True)
class Dropped:
    """Something that was left out, and why. Every drop is reported; nothing is skipped silently."""

    what: str
    reason: str


@dataclass(frozen=True, eq=False)
class WordMaps:
    """Heat maps (max 1, or all zero) of some words of one text on one picture.

    Attributes:
        image_id: `lavender.data.images.image_id` of the picture: its content, not its name.
        text: the text whose words are mapped (in training: the answer, or label).
        words: the mapped words, in order of appearance; one entry for each occurrence.
        maps: float32 (word, rows, cols) in [0, 1].
        dropped: words that should have had a map and have none.
        confidence: float32 (word,) in [0, 1], how sure the teacher's map is; 1 where its maker doesn't say.
    """

    image_id: str
    text: str
    words: tuple[Word, ...]
    maps: Tensor
    dropped: tuple[Dropped, ...] = field(default=())
    confidence: Tensor = field(default_factory=lambda: torch.ones(0))
    image: Image.Image | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.confidence.shape[0]:
            object.__setattr__(self, "confidence", torch.ones(len(self.words)))
        if self.confidence.shape != (len(self.words),):
            raise ValueError(f"Got {tuple(self.confidence.shape)} confidences for {len(self.words)} words.")
        if self.maps.ndim != 3 or len(self.words) != self.maps.shape[0]:
            raise ValueError(
                f"Got maps {tuple(self.maps.shape)} for {len(self.words)} words; expected (word, rows, cols)."
            )
        for word in self.words:
            if not 0 <= word.start < word.end <= len(self.text) or self.text[word.start : word.end] != word.text:
                raise ValueError(f"Got word {word.text!r} at {word.start}:{word.end}, which is not in {self.text!r}.")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.maps.shape[1], self.maps.shape[2]

    def map_of(self, start: int, end: int) -> Tensor | None:
        """The mean map of the words inside a character span, (rows, cols), or None where none is mapped."""
        inside = [index for index, word in enumerate(self.words) if word.start < end and word.end > start]
        return self.maps[inside].mean(dim=0) if inside else None


def to_heat(maps: Tensor) -> Tensor:
    """Divide each map (..., rows, cols) by its maximum. A map that is zero everywhere stays zero."""
    return maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def min_max(maps: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale each map (..., rows, cols) to [0, 1] by its own minimum and maximum; a flat map becomes 0."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low + eps)


def to_distribution(maps: Tensor) -> Tensor:
    """Divide each map (..., rows, cols) by its sum. A map that is zero everywhere becomes uniform."""
    total = maps.sum(dim=(-2, -1), keepdim=True)
    uniform = torch.full_like(maps, 1 / (maps.shape[-1] * maps.shape[-2]))
    return torch.where(total > 0, maps / total.clamp_min(torch.finfo(maps.dtype).tiny), uniform)


def entropy(maps: Tensor) -> Tensor:
    """Eq. 23: H = −Σ a·log a in nats, of each map (..., rows, cols) summed to 1."""
    return torch.special.entr(to_distribution(maps)).sum(dim=(-2, -1))


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation over cells of each pair of maps (..., rows, cols). NaN for a flat map: it has none."""
    ours, theirs = (one.double() - one.double().mean(dim=(-2, -1), keepdim=True) for one in (first, second))
    scale = ours.square().sum(dim=(-2, -1)) * theirs.square().sum(dim=(-2, -1))
    return (ours * theirs).sum(dim=(-2, -1)) / scale.sqrt()
