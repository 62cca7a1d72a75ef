"""How a verb ends: its exit codes, the signals that stop it, and errors that nobody foresaw."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lavender.errors import LavenderError

DONE, FAILED, WRONG_USAGE = 0, 1, 2

UNEXPECTED = "an unexpected error"
"""How the message of a bug in the library begins. Tests and the fuzz job look for it."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM asked the process to end. As a KeyboardInterrupt it runs all clean-up code."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def signals_stop() -> Iterator[None]:
    """Raise `Stopped` at the first SIGINT or SIGTERM. The second ends the process at once."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    main_process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        for handled in previous:
            signal.signal(handled, signal.SIG_DFL)
        if os.getpid() != main_process:  # a forked worker, which its parent ends
            os.kill(os.getpid(), number)
        raise Stopped(number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    previous = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}  # nohup
    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def unexpected(error: Exception) -> LavenderError:
    """The message about a bug in the library. The traceback goes to a file that the message names.

    Memory that is too small is none.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return LavenderError(
            f"memory that is too small: {' '.join(str(error).split('. ')[0].split()) or type(error).__name__}",
            "a model and a batch that fit",
            "lower --batch-size or per_device_train_batch_size where the command reads one, take smaller images "
            "(image_processor: {size: …}), 16 bits, or a device with more memory",
        )
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile(
        "w", prefix="lavender-", suffix=".log", delete=False, errors="backslashreplace"
    ) as log:
        log.writelines(traceback.format_exception(error))
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return LavenderError(
        f"{UNEXPECTED}, {reason}", "no error: this is a bug in lavender", f"report it with the traceback in {log.name}"
    )
