"""WordMaps: for each mapped word of a text, where it is in the image. Teacher, store and student share this type.

A map covers the whole upright image (EXIF orientation applied), squashed onto a grid of (rows, cols). Row 0 is the
top, column 0 the left.
"""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps
from torch import Tensor

from lavender.errors import DataError
from lavender.files import IMAGE_FORMATS, expanded, fault_of, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 40
"""The most words that `WordMaps.plot` and a notebook show."""
_COLUMNS = 4  # panels per row of a plot
_PLOT_SIDE, _HTML_SIDE = 320, 200  # pixels of a panel's longest side
_MAX_HTML_TEXT = 1000  # characters


@dataclass(frozen=True)
class Word:
    """A word of a text.

    Attributes:
        text: the word as written.
        start, end: its half-open span of characters: `text == caption[start:end]`.
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
    """Something that was left out.

    Attributes:
        what: its name: a word, a sample, a row of a file.
        reason: why it was left out.
    """

    what: str
    reason: str


@dataclass(frozen=True, eq=False)
class WordMaps:
    """Heat maps of some words of one text on one image. The maximum of a map is 1, or 0 if it is zero everywhere.

    Examples:
        >>> import torch
        >>> from lavender.maps import Word, WordMaps
        >>> dog = Word("dog", start=2, end=5, lemma="dog", part_of_speech="noun")
        >>> maps = WordMaps("0f3a", "a dog", (dog,), torch.tensor([[[0.0, 1.0], [0.5, 0.0]]]))
        >>> maps.grid, maps.map_of(2, 5).argmax().item()
        ((2, 2), 1)

    Attributes:
        image_id: content hash of the image, see `lavender.data.images.image_id`.
        text: the text whose words are mapped. In training this is the answer.
        words: the mapped words in order of appearance, one entry per occurrence.
        maps: float32 (word, rows, cols) in [0, 1].
        dropped: words that should have a map and have none.
        confidence: float32 (word,) in [0, 1], how sure the teacher is of each map. Default: 1 for each word.
        image: the image, if known. It is neither stored nor compared; `plot` and notebooks show it.

    Raises:
        ValueError: shapes that do not fit the words, or a word that is not at its place in the text.
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
        """(rows, cols) of every map."""
        return self.maps.shape[1], self.maps.shape[2]

    def map_of(self, start: int, end: int) -> Tensor | None:
        """The mean map (rows, cols) of the words that overlap a span of characters; None if no word does."""
        overlapping = [index for index, word in enumerate(self.words) if word.start < end and word.end > start]
        return self.maps[overlapping].mean(dim=0) if overlapping else None

    def plot(
        self, image: Image.Image | str | Path | None = None, axes: Sequence[Axes] | None = None, columns: int = _COLUMNS
    ) -> Figure:
        """Draw each word's map over the image, one panel per word; without an image, the maps alone.

        At most `MAX_PANELS` words are drawn, the first of the text.

        Examples:
            >>> import torch
            >>> from lavender.maps import Word, WordMaps
            >>> dog = Word("dog", 2, 5, "dog", "noun")
            >>> figure = WordMaps("0f3a", "a dog", (dog,), torch.rand(1, 4, 4)).plot()
            >>> [axes.get_title() for axes in figure.axes]
            ['dog']

        Args:
            image: the image, or the path of its file. Default: the attribute `image`.
            axes: where to draw, one per word; words beyond them are left out. Default: a new figure.
            columns: panels per row of a new figure.

        Returns:
            The figure, for `savefig` or `matplotlib.pyplot.show()`.

        Raises:
            DataError: the path is not an image file.
        """
        import matplotlib
        from matplotlib import pyplot

        panels = list(self._panels(_upright(self.image if image is None else image), _PLOT_SIDE))
        if axes is None:
            columns = max(1, min(columns, len(panels)))
            rows = -(-len(panels) // columns)
            title = textwrap.fill(printable(self.text), 22 * columns + 10)
            height = 2.4 * panels[0][1].height / panels[0][1].width + 0.3  # inches: a panel and its title
            size = 2.4 * columns, rows * height + 0.2 * (title.count("\n") + 2)
            figure, grid = pyplot.subplots(rows, columns, squeeze=False, layout="constrained", figsize=size)
            figure.suptitle(title, fontsize="medium", parse_math=False)
            axes = grid.ravel().tolist()
            if "inline" in matplotlib.get_backend():
                pyplot.close(figure)  # a notebook shows open figures at the end of a cell, and this one as its value
        for panel_axes, (title, pixels) in zip(axes, panels, strict=False):
            panel_axes.imshow(pixels)
            panel_axes.set_title(title, fontsize="medium", parse_math=False)
        for panel_axes in axes:
            panel_axes.axis("off")
        figure = axes[0].get_figure(root=True)
        assert figure is not None
        return figure

    def _panels(self, image: Image.Image | None, side: int) -> Iterator[tuple[str, Image.Image]]:
        """(title, pixels) of each word's panel, or of one panel if no word has a map."""
        from lavender.drawing import downscaled, overlay_heat

        if image is None:
            rows, cols = self.grid
            image = Image.new("RGB", (max(1, side * cols // max(rows, cols)), max(1, side * rows // max(rows, cols))))
        image = downscaled(image, side)
        for word, heat in zip(self.words[:MAX_PANELS], self.maps, strict=False):
            yield printable(word.text), overlay_heat(image, heat)
        if not self.words:
            yield "no word has a map", image

    def _repr_html_(self) -> str:
        """What a notebook shows: the text with its mapped words in bold, and each map over the image."""
        cells = [
            f'<figure style="display:inline-block;margin:4px"><img src="{_data_uri(pixels)}" alt="">'
            f"<figcaption>{_html(title)}</figcaption></figure>"
            for title, pixels in self._panels(_upright(self.image), _HTML_SIDE)
        ]
        if len(self.words) > MAX_PANELS:
            cells.append(f"<p>and {len(self.words) - MAX_PANELS} more words</p>")
        if self.dropped:
            dropped = "; ".join(f"{drop.what} ({drop.reason})" for drop in self.dropped[:MAX_PANELS])
            cells.append(f"<p>Without a map: {_html(dropped)}</p>")
        return f"<div><p>{self._marked_text()}</p>{''.join(cells)}</div>"

    def _marked_text(self) -> str:
        pieces, done = [], 0
        for word in sorted(self.words, key=lambda word: word.start):
            if done <= word.start and word.end <= _MAX_HTML_TEXT:
                pieces += [_html(self.text[done : word.start]), f"<b>{_html(word.text)}</b>"]
                done = word.end
        return "".join(pieces) + _html(self.text[done:_MAX_HTML_TEXT] + "…" * (len(self.text) > _MAX_HTML_TEXT))


def _upright(image: Image.Image | str | Path | None) -> Image.Image | None:
    """The image as a person sees it: EXIF orientation applied, RGB. Raises DataError."""
    if isinstance(image, str | Path):
        path = expanded(image)
        try:
            if fault := fault_of(path):
                raise OSError(fault)
            with Image.open(path, formats=IMAGE_FORMATS) as opened:
                return ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            got = f"the image {printable(path)}, which cannot be read: {printable(error)}"
            raise DataError(got, f"a file of one of {', '.join(IMAGE_FORMATS)}", "check the path") from error
    return None if image is None else ImageOps.exif_transpose(image).convert("RGB")


def _data_uri(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _html(text: str) -> str:
    """Escaped; lone surrogates, which a notebook cannot send, become question marks."""
    return escape(text.encode(errors="replace").decode())


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
    first, second = (maps.double() - maps.double().mean(dim=(-2, -1), keepdim=True) for maps in (first, second))
    scale = first.square().sum(dim=(-2, -1)) * second.square().sum(dim=(-2, -1))
    return (first * second).sum(dim=(-2, -1)) / scale.sqrt()


def map_agreement(first: Tensor, second: Tensor) -> float | None:
    """Mean over words of the Pearson correlation, over cells, of two maps (word, rows, cols).

    A flat map has no correlation and does not count. None if no word counts.
    """
    values = correlation(first, second)
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else None
