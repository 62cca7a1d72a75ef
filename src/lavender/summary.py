"""What an extraction did, whoever made the maps."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lavender.maps import Dropped

FLUSH_SECONDS = 20.0
"""Records are written at least this often: a kill loses at most this much work."""


@dataclass
class Summary:
    """What an extraction did.

    Attributes:
        records: texts written, one for each picture that they are mapped on.
        without_picture: samples of text alone, which need no map.
        reconstruction: of null-text, the mean squared error of the latents that its way back ended with; latents of a
            picture vary by about 1. None where nothing was led back.
        dropped: names every sample and word that should have a map and got none, with the reason.
    """

    records: int = 0
    words: int = 0
    already_there: int = 0
    without_picture: int = 0
    seconds: float = 0.0
    reconstruction: float | None = None
    dropped: list[Dropped] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False))
