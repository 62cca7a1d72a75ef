"""Answers on disk while a benchmark runs, so that a stopped run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from lavender.errors import DataError


class AnswerLog:
    """A file of JSON lines with one answer each, which grows with every batch.

    The file's name has a digest of what the answers depend on beside the request: the checkpoint's content and the
    settings of the model. So another checkpoint never gets these answers.

    Examples:
        >>> key = request_key("pope", 3, 0, "Is there a cat?", {"max_new_tokens": 8}, "v1")
        >>> with AnswerLog(Path("answers"), {"checkpoint": "d41d8"}) as log:
        ...     log.add(key, "no")
        >>> with AnswerLog(Path("answers"), {"checkpoint": "d41d8"}) as log:
        ...     log.known(key), len(log)
        ('no', 1)

    Args:
        folder: where the file lies; it is made.
        identity: what the answers depend on, as JSON values.

    Raises:
        DataError: a line of the file is damaged. A last line that a killed run did not finish is dropped.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"answers-{digest(identity)}.jsonl"
        self._answers: dict[str, Any] = {}
        self._pictures: dict[str, str] = {}
        self._file = self._open()

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._answers)

    def known(self, key: str) -> Any | None:
        """The answer to a request, or None if there is none yet."""
        return self._answers.get(key)

    def pictures(self, key: str) -> str:
        """What identifies the pictures of a request that has an answer; "" if it has none."""
        return self._pictures.get(key, "")

    def add(self, key: str, answer: Any, pictures: str = "") -> None:
        """Write an answer; it is on disk when this returns, unless the machine itself fails."""
        self._answers[key], self._pictures[key] = answer, pictures
        self._file.write(json.dumps({"request": key, "answer": answer, "pictures": pictures}) + "\n")
        self._file.flush()

    def _open(self) -> TextIO:
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole, end, unfinished = content.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines() if end else (), 1):
            try:
                entry = json.loads(line)
                self._answers[entry["request"]] = entry["answer"]
                self._pictures[entry["request"]] = entry.get("pictures", "")
            except (ValueError, KeyError, TypeError) as error:
                got, do = f"a damaged line {number} in {self.path}", "delete the line; its answer is generated again"
                raise DataError(got, "a request and its answer as JSON", do) from error
        file = self.path.open("a", encoding="utf-8")
        if unfinished:
            file.truncate(len(whole) + len(end))
        return file


def request_key(task: str, doc: int, index: int, prompt: str, settings: Mapping[str, Any], data: str) -> str:
    """The name of a request in the log.

    Args:
        task: the task's name.
        doc: the sample's number in its split.
        index: the number of the request of this sample; a question of several options has one per option.
        prompt: the text that the model reads, with a continuation that is to be scored.
        settings: of the generation.
        data: fingerprint of the split, which covers its pictures.
    """
    return f"{task}/{doc}/{index}/{digest([prompt, dict(settings), data])}"


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that identify a JSON value; what JSON does not know counts by its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
