"""Other libraries' warnings and log lines: to a log file, or with `--verbose` to the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST_LOG = 2**20
"""Bytes. A longer log becomes `NAME.1` when a verb next writes to it."""
_FORMAT = "%(asctime)s %(process)d %(name)s %(levelname)s: %(message)s"


def debugging() -> bool:
    """Whether the user wants tracebacks and other libraries' warnings: `LAVENDER_DEBUG=1`."""
    return os.environ.get("LAVENDER_DEBUG", "") not in ("", "0")


def log_path() -> Path:
    """The log: `LAVENDER_LOG`, or lavender/lavender.log in the user's folder of program states."""
    if chosen := os.environ.get("LAVENDER_LOG"):
        return Path(chosen).expanduser()
    states = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(states) / "lavender" / "lavender.log"


class _Log(logging.FileHandler):
    """Appends to the log, which is made at the first line. Where it cannot be written, lines go to stderr."""

    def __init__(self, path: Path):
        super().__init__(path, delay=True, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter(_FORMAT))
        self._instead: logging.Handler | None = None

    def _open(self) -> Any:
        path = Path(self.baseFilename)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size > LARGEST_LOG:
            path.replace(f"{path}.1")
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._instead is None:
                super().emit(record)
        except OSError:
            self._instead = logging.StreamHandler()
        if self._instead is not None:
            self._instead.emit(record)


@contextmanager
def libraries_logged(verbose: bool = False) -> Iterator[None]:
    """Send other libraries' warnings and log lines to the log, or with `verbose` to stderr alone.

    Errors that they log are on stderr too. With `LAVENDER_DEBUG=1` nothing changes.
    """
    if debugging():
        yield
        return
    handler: logging.Handler = logging.StreamHandler() if verbose else _Log(log_path())
    call_handlers = logging.Logger.callHandlers

    def handle(logger: logging.Logger, record: logging.LogRecord) -> None:
        handler.handle(record)
        if record.levelno >= logging.ERROR and not verbose:
            call_handlers(logger, record)

    # a handler of the root logger would not do: some libraries write to stderr by handlers of their own
    setattr(logging.Logger, "callHandlers", handle)  # noqa: B010
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # `python -W` and PYTHONWARNINGS take precedence
                warnings.simplefilter("default")
                logging.captureWarnings(True)
            yield
    finally:
        logging.captureWarnings(False)
        setattr(logging.Logger, "callHandlers", call_handlers)  # noqa: B010
        handler.close()


@contextmanager
def bars(wanted: bool) -> Iterator[None]:
    """Without progress bars unless they are wanted, in child processes too. tqdm reads the variable when imported."""
    before = os.environ.get("TQDM_DISABLE")
    if not wanted:
        os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TQDM_DISABLE", None)
        else:
            os.environ["TQDM_DISABLE"] = before
