"""What a verb prints is its own: other libraries' warnings stay silent, unless `LAVENDER_DEBUG` is set."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def debugging() -> bool:
    """Whether the user asked for tracebacks and for the warnings of other libraries: `LAVENDER_DEBUG=1`."""
    return os.environ.get("LAVENDER_DEBUG", "") not in ("", "0")


@contextmanager
def only_our_lines() -> Iterator[None]:
    """Keep other libraries' warnings and log lines below ERROR off the terminal, also those of child processes."""
    if debugging():
        yield
        return
    names = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "DATASETS_VERBOSITY")
    added = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "error"))  # read when the libraries are imported
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # what `python -W` or PYTHONWARNINGS asks for comes first
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        for name in added:
            del os.environ[name]
