"""A sample: a conversation with its images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lavender.config import ROLES, Texts
from lavender.data.about import About
from lavender.data.conversations import mismatch, num_places, text_of
from lavender.data.images import load_image
from lavender.errors import DataError

Source = Path | bytes | Image.Image


@dataclass(frozen=True)
class Sample:
    """A conversation with any number of images.

    Attributes:
        name: the file and the row or line in it, for messages.
        sources: the images in the order of their places, not yet decoded: each a path, the bytes of a file, or an
            image in memory. () for a text-only sample.
        messages: [{"role": …, "content": [{"type": "image"} or {"type": "text", "text": …}, …]}, …]. The user's turns
            have a part of type "image" for each image.
        about: which words of the answers take the map of which other words, see `lavender.data.about`.

    Raises:
        DataError: the numbers of places and images differ.
    """

    name: str
    sources: tuple[Source, ...]
    messages: list[dict[str, Any]]
    about: tuple[About, ...] = ()

    def __post_init__(self) -> None:
        if (places := num_places(self.messages)) != len(self.sources):
            got = f"{self.name} with {mismatch(len(self.sources), places)}"
            raise DataError(got, "a place for each picture", 'put a part {"type": "image"} where each picture belongs')

    @property
    def source(self) -> Source | None:
        """The image of a sample that has exactly one, else None."""
        return self.sources[0] if len(self.sources) == 1 else None

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts of the assistant's turns, which the model learns."""
        turns = [message["content"] for message in self.messages if message["role"] == "assistant"]
        return tuple(text_of(content) for content in turns)

    @property
    def pairs(self) -> tuple[tuple[int, str], ...]:
        """(index of an image, answer) of each answer on each image before it, image by image."""
        return self.pairs_of("answers")

    def pairs_of(self, texts: Texts) -> tuple[tuple[int, str], ...]:
        """(index of an image, text) of each turn on each image before or in it, image by image: what gets maps.

        Args:
            texts: the turns: "answers" of the assistant, "questions" of the user, or "all". Never the system's.
        """
        pairs: list[tuple[int, str]] = []
        for turn, message in enumerate(self.messages):
            text = text_of(message["content"])
            if message["role"] in ROLES[texts] and (text.strip() or message["role"] == "assistant"):
                pairs += [(index, text) for index in range(num_places(self.messages[: turn + 1]))]
        return tuple(sorted(pairs, key=lambda pair: pair[0]))

    def load(self) -> tuple[Image.Image, ...]:
        """The decoded images; see `load_image`. Raises a DataError that names the sample."""
        return tuple(self.load_picture(index) for index in range(len(self.sources)))

    def load_picture(self, index: int) -> Image.Image:
        """The image of an index, decoded. Raises a DataError that names the sample."""
        which = f"picture {index + 1}" if len(self.sources) > 1 else "the picture"
        return load_image(self.sources[index], f"{which} of {self.name}")
