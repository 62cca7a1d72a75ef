"""The errors of Lavender. Every message has the same three parts: got, expected, do this."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PARTS = re.compile(r".*\bGot (.*?)\. Expected (.*)\. Do this: (.*)\.\s*", re.DOTALL)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The most similar of the words, for a message about a misspelt one; None if none is similar."""
    import difflib

    return next(iter(difflib.get_close_matches(word[:100], list(words), n=1)), None)


class LavenderError(Exception):
    """Base class of all errors that a user's input or setting can cause.

    Examples:
        >>> from lavender.errors import ConfigError
        >>> print(ConfigError("refine=3", "a number from 0 to 2", "change refine"))
        Got refine=3. Expected a number from 0 to 2. Do this: change refine.

    Args:
        got: what was found, with its value. Without the other two, a whole message that ends with the three parts:
            torch rebuilds the error of a data loader's worker so, with the worker's traceback first.
        expected: what would have been right.
        do: one thing that the user can do now.
    """

    def __init__(self, got: str, expected: str | None = None, do: str | None = None):
        if expected is None or do is None:
            parts = _PARTS.fullmatch(got)
            got, expected, do = parts.groups() if parts else (got, "none", "read the message")
        self.got, self.expected, self.do = got, expected, do
        super().__init__(f"Got {got}. Expected {expected}. Do this: {do}.")

    def __reduce__(self) -> tuple:
        """Keep the three parts across processes: pickle would pass the whole message alone."""
        return type(self), (self.got, self.expected, self.do)


class ConfigError(LavenderError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(LavenderError, ValueError):
    """A data set, picture or text cannot be used as it is."""


class ModelError(LavenderError, ValueError):
    """A model, processor, adapter or teacher is missing, damaged or out of reach."""


class StoreError(LavenderError):
    """A map store is missing, damaged, or made with other settings."""


class UnsupportedModelError(LavenderError, TypeError):
    """No adapter for this model class, or the model is set up in a way that cannot be captured."""


class CaptureError(LavenderError, RuntimeError):
    """Attention could not be captured although the model is supported."""


class NotFiniteError(LavenderError, FloatingPointError):
    """A loss became NaN or infinite."""


class FileError(LavenderError):
    """A file or folder cannot be read or written: no space, no right, no such place."""
