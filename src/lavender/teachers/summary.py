"""The summary of an extraction, and the file extraction.json that collects them; the same for every teacher."""

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
"""Records are written at least this often, so a killed run loses at most this much work."""
_COUNTS = ("records", "words", "already_there", "without_picture", "seconds")


@dataclass
class Summary:
    """What one run of an extraction did.

    Attributes:
        records: records written; a record is one text on one picture.
        words: word maps written.
        already_there: texts that the store had before the run.
        without_picture: samples of text alone, which need no map.
        seconds: duration.
        reconstruction: with `mode="null-text"`, the mean squared error of the latents that its denoising ended with. A
            picture's latents have a variance of about 1. None for other modes.
        dropped: every sample and word that should have a map and has none, with the reason.
    """

    records: int = 0
    words: int = 0
    already_there: int = 0
    without_picture: int = 0
    seconds: float = 0.0
    reconstruction: float | None = None
    dropped: list[Dropped] = field(default_factory=list)


class History:
    """The file extraction.json in a map store, with a summary of every finished run that wrote to the store.

    `records`, `words` and `seconds` are sums over `runs`. `in_store` and `words_in_store` count the store's records and
    their maps. The other entries are those of the last run. `dropped_before` names what only earlier runs dropped.
    Records that no finished run wrote have an entry in `runs` too, whose `finished` is null: a run that was stopped
    wrote them, or another command. How long that took is not known.

    Args:
        folder: the store's folder. The file is read at once, so that a damaged file is reported before the work.

    Raises:
        StoreError: the file cannot be read, or is not a summary of extractions.
    """

    def __init__(self, folder: str | Path):
        self._path = expanded(folder) / "extraction.json"
        self._before: dict[str, Any] = {"dropped": [], "dropped_before": [], "runs": []}
        self._before |= {"in_store": 0, "words_in_store": 0}
        if not os.path.lexists(self._path):
            return
        try:
            content = json.loads(read_whole(self._path))
            content = {"words_in_store": content["words"], **content}  # earlier releases did not write it
            self._before = {name: content[name] for name in self._before}
            # check that what `add` reads is there
            self._sums([dict.fromkeys(_COUNTS, self._before["in_store"] - self._before["words_in_store"])])
            [Dropped(drop["what"], drop["reason"]) for drop in self._drops_before()]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            got = f"{self._path}, which cannot be read as the record of an extraction: {error!r}"
            do = "move it away; the maps do not need it"
            raise StoreError(got, "what `lavender extract` writes", do) from error

    def add(self, summary: Summary, in_store: int, words_in_store: int) -> None:
        """Add a run to the file.

        Args:
            summary: the run's.
            in_store: the number of records in the store.
            words_in_store: the number of their maps.

        Raises:
            StoreError: the file cannot be written. The maps are complete.
        """
        now = {name: getattr(summary, name) for name in _COUNTS}
        reconstruction = {} if summary.reconstruction is None else {"reconstruction": summary.reconstruction}
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        dropped_now = {(drop.what, drop.reason) for drop in summary.dropped}
        runs = [{"finished": finished, **now, **reconstruction, "dropped": len(summary.dropped)}]
        others = {
            "records": in_store - self._before["in_store"] - summary.records,
            "words": words_in_store - self._before["words_in_store"] - summary.words,
        }
        if others["records"] > 0:
            runs.insert(0, {"finished": None, **dict.fromkeys(_COUNTS, 0), **others, "dropped": 0})
        content = {
            **now,
            **self._sums(runs),
            **reconstruction,
            "in_store": in_store,
            "words_in_store": words_in_store,
            "dropped": [asdict(drop) for drop in summary.dropped],
            "dropped_before": [
                drop for drop in self._drops_before() if (drop["what"], drop["reason"]) not in dropped_now
            ],
            "runs": [*self._before["runs"], *runs],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        try:
            write_whole(self._path, text.encode(errors="backslashreplace"))  # lone surrogates as JSON escapes
        except OSError as error:
            got = f"{self._path}, which cannot be written: {error.strerror or error}; the maps are all written"
            raise StoreError(
                got, "free space and write permission", "free space or change permissions, and run again"
            ) from error

    def _sums(self, new_runs: list[dict[str, Any]]) -> dict[str, Any]:
        """What all runs together did."""
        runs = (*self._before["runs"], *new_runs)
        return {name: sum(run[name] for run in runs) for name in ("records", "words", "seconds")}

    def _drops_before(self) -> list[dict[str, str]]:
        return [*self._before["dropped_before"], *self._before["dropped"]]
