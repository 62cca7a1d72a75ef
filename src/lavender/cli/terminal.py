"""Lines for a terminal are wrapped between words; in a pipe or a file every line stays whole."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TextIO


def wrapped(line: str, width: int, indent: str = "  ") -> str:
    """A line broken between words at `width` columns. Continuation lines begin with `indent`. Paths stay whole."""
    return "\n".join(
        textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]
    )


def show(line: str, file: TextIO | None = None) -> None:
    """Print a line to `file` (default: stdout), wrapped to the terminal's width if it is a terminal."""
    file = sys.stdout if file is None else file
    print(wrapped(line, shutil.get_terminal_size().columns) if file.isatty() else line, file=file)
