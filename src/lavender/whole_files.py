"""Files that are either whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

TEMPORARY = ".tmp-"
"""How the names of files begin that are still being written. A kill may leave one behind."""


def write_whole(path: Path, text: str) -> None:
    """Write a text file, UTF-8, in one step: a reader, and a kill, see the file before or the new one.

    The temporary file is a new one, and a link in the file's place is replaced, not followed.
    """
    partial = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    try:
        with partial.open("x", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
