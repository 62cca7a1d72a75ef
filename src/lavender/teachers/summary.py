"""What an extraction did, whoever made the maps."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lavender.errors import StoreError
from lavender.files import expanded, read_whole, write_whole
from lavender.maps import Dropped

FLUSH_SECONDS = 20.0
"""Records are written at least this often: a kill loses at most this much work."""
_COUNTS = ("records", "words", "already_there", "without_picture", "seconds")


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


class History:
    """The file extraction.json in a map store: what every extraction into it did that came to its end.

    `records`, `words` and `seconds` are the sums over `runs`, `in_store` the number of records there now; the rest is
    of the last run. `dropped_before` names what an earlier run dropped and the last one did not name again.

    Raises:
        StoreError: the file cannot be read, or is not such a file. Better told before the work than after it.
    """

    def __init__(self, folder: str | Path):
        self._path = expanded(folder) / "extraction.json"
        self._before: dict[str, Any] = {"dropped": [], "dropped_before": [], "runs": []}
        if not os.path.lexists(self._path):
            return
        try:
            said = json.loads(read_whole(self._path))
            self._before = {name: said[name] for name in self._before}
            self._sums([dict.fromkeys(_COUNTS, 0)])
            [Dropped(one["what"], one["reason"]) for one in self._drops_before()]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            got = f"{self._path}, which cannot be read as the record of an extraction: {error!r}"
            do = "move it away: the maps are not touched by that"
            raise StoreError(got, "what `lavender extract` writes", do) from error

    def add(self, summary: Summary, in_store: int) -> None:
        """Write the file anew with one more run. Raises StoreError if it cannot be written: the maps are whole."""
        now = {name: getattr(summary, name) for name in _COUNTS}
        led_back = {} if summary.reconstruction is None else {"reconstruction": summary.reconstruction}
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        again = {(one.what, one.reason) for one in summary.dropped}
        content = {
            **now,
            **self._sums([now]),
            **led_back,
            "in_store": in_store,
            "dropped": [asdict(one) for one in summary.dropped],
            "dropped_before": [one for one in self._drops_before() if (one["what"], one["reason"]) not in again],
            "runs": [*self._before["runs"], {"finished": finished, **now, **led_back, "dropped": len(summary.dropped)}],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        try:
            write_whole(self._path, text.encode(errors="backslashreplace"))  # half characters as JSON's escapes
        except OSError as error:
            got = f"{self._path}, which cannot be written: {error.strerror or error}; the maps are all written"
            raise StoreError(got, "space and the right to write", "free space and run again") from error

    def _sums(self, more: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            name: sum(run[name] for run in (*self._before["runs"], *more)) for name in ("records", "words", "seconds")
        }

    def _drops_before(self) -> list[dict[str, str]]:
        return [*self._before["dropped_before"], *self._before["dropped"]]
