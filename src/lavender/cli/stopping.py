"""How a verb ends early: by a signal, or by an error that the library did not foresee."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lavender.errors import LavenderError

UNEXPECTED = "an unexpected error"
"""Begins the line of an error that is a fault of the library: tests and the fuzz job look for it."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM asked the process to end. A KeyboardInterrupt, so that all code that cleans up does so."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def signals_stop() -> Iterator[None]:
    """Raise `Stopped` at the first SIGINT or SIGTERM. At the second the process ends at once."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != owner:  # a forked worker, which its parent ends
            os.kill(os.getpid(), number)
        raise Stopped(number)

    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}  # nohup
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def unexpected(error: Exception) -> LavenderError:
    """One line for a fault of the library; the traceback goes to a file, which the line names."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="lavender-", suffix=".log", delete=False, errors="backslashreplace"
    ) as log:
        log.writelines(traceback.format_exception(error))
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return LavenderError(
        f"{UNEXPECTED}, {reason}", "none: this is a fault of lavender", f"report it, with the traceback in {log.name}"
    )
