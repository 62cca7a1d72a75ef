"""Lines, tables and colours for a terminal. In a pipe or a file every line stays whole and plain."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO


def wrapped(line: str, width: int, indent: str = "  ") -> str:
    """A line broken between words at `width` columns. Continuation lines begin with `indent`. Paths stay whole."""
    return "\n".join(
        textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]
    )


def width_of(file: TextIO | None = None) -> int | None:
    """The columns of a terminal (default: of stdout); None for a pipe or a file."""
    import shutil

    file = sys.stdout if file is None else file
    return shutil.get_terminal_size().columns if file.isatty() else None


def colours(file: TextIO) -> bool:
    """Whether colours go to a file: on a terminal, unless `NO_COLOR` is set; elsewhere only with `FORCE_COLOR`."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (file.isatty() and os.environ.get("TERM") != "dumb")


def show(line: str, file: TextIO | None = None, wrong: str = "") -> None:
    """Print a line to `file` (default: stdout), wrapped to the terminal's width if it is a terminal.

    Args:
        wrong: the words at the beginning of an error's message, which are red where colours are wanted.
    """
    file = sys.stdout if file is None else file
    width = width_of(file)
    text = line if width is None else wrapped(line, width)
    if wrong and text.startswith(wrong) and colours(file):
        text = f"\033[1;31m{wrong}\033[0m{text.removeprefix(wrong)}"
    print(text, file=file)


def table(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Rows of cells as lines, the first column to the left and the others to the right.

    If the lines would be wider than `width`, rows and columns change places. If that is too wide too, each row
    is a block: its first cell, then a line per other cell with its column's name.

    Args:
        rows: the names of the columns, then the other rows, all with the same number of cells.
        width: the columns of the terminal; None for any width.
    """
    for cells in (rows, list(zip(*rows, strict=True))):
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        if width is None or sum(widths) + 2 * (len(widths) - 1) <= width:
            return [
                "  ".join(cell.rjust(size) if place else cell.ljust(size) for place, (cell, size) in enumerate(pairs))
                for pairs in (list(zip(row, widths, strict=True)) for row in cells)
            ]
    (_, *names), *others = rows
    longest = max(map(len, names))
    return [
        line
        for first, *cells in others
        for line in (first, *(f"  {name:<{longest}}  {cell}" for name, cell in zip(names, cells, strict=True)))
    ]
