"""Silence other libraries' warnings, unless the user sets `LAVENDER_DEBUG=1`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def debugging() -> bool:
    """Whether the user wants tracebacks and other libraries' warnings: `LAVENDER_DEBUG=1`."""
    return os.environ.get("LAVENDER_DEBUG", "") not in ("", "0")


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Hide other libraries' warnings and log lines below ERROR, also in child processes."""
    if debugging():
        yield
        return
    names = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "DATASETS_VERBOSITY")
    added = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "error"))  # the libraries read them when they are imported
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # `python -W` and PYTHONWARNINGS take precedence
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        for name in added:
            del os.environ[name]
