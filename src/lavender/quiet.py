"""What a verb prints is its own: other libraries' warnings stay silent, unless `LAVENDER_DEBUG` is set."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def hide_loading_bars(*models: str | Path) -> None:
    """No progress bars of transformers and diffusers where every model is a folder; a download shows its bar."""
    if debugging() or not all(Path(model).expanduser().exists() for model in models):
        return
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if "diffusers" in sys.modules:
        from diffusers.utils.logging import disable_progress_bar as disable_bar_of_diffusers

        disable_bar_of_diffusers()
