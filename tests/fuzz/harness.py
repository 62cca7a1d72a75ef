"""Many small cases, each in a forked child: what it prints, how it ends, whether it hangs or runs what it should not.

The parent imports everything once, so that a case costs milliseconds. It must stay free of threads that hold locks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pkgutil
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HANG = 20.0  # seconds
MEMORY = 10 * 2**30  # bytes of address space that a case may ask for
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (negative: the signal), what it printed, whether it was killed for its time."""

    code: int
    printed: str
    hung: bool

    def fault(self) -> str:
        """Why this is no good end; "" for an end as it should be."""
        from lavender.cli.stopping import UNEXPECTED

        if self.hung:
            return f"hangs for more than {HANG:.0f} s: {self.printed[-900:]}"
        if TRACEBACK in self.printed or UNEXPECTED in self.printed:
            return f"a traceback: {self.last_line()}"
        return f"killed by signal {-self.code}" if self.code < 0 else ""

    def last_line(self) -> str:
        return next((line for line in reversed(self.printed.splitlines()) if line.strip()), "")[:300]


def forked(work: Callable[[], object], log: Path, limit: float = HANG) -> Ended:
    """Run `work` in a child. What it returns, if a number, is the exit code; an exception is printed, code 1."""
    sys.stdout.flush()
    sys.stderr.flush()
    until, child = time.monotonic() + limit, os.fork()
    if not child:
        _be_the_child(work, log)
    status = None
    while status is None and time.monotonic() < until:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        time.sleep(0.002)
    hung = status is None
    if status is None:
        os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(errors="replace") if log.exists() else "", hung)


def _be_the_child(work: Callable[[], object], log: Path) -> None:
    code = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        faulthandler.dump_traceback_later(HANG * 0.9, file=descriptor)  # where it hangs
        output = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stdout = sys.stderr = output
        sys.stdin = open(os.devnull)  # noqa: SIM115
        os.environ["LAVENDER_DEBUG"] = ""
        result = work()
        code = result if isinstance(result, int) else 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code & 255)


def verb(*arguments: object) -> Callable[[], int]:
    """What runs a verb of the command line."""

    def run() -> int:
        from lavender.cli import main

        return main([str(argument) for argument in arguments])

    return run


def verb_fault(ended: Ended) -> str:
    """The fault of a verb: as of any child, and each failure must end with the verb's own line in three parts."""
    if fault := ended.fault():
        return fault
    if ended.code == 0:
        return ""
    if ended.code not in (1, 2):
        return f"exit code {ended.code}"
    said = ended.last_line()
    ours = said.startswith("lavender ") and "Got " in said and " Do this: " in ended.printed
    usage = ended.code == 2 and "error: " in said
    return "" if ours or usage else f"no line of its own: {said!r}"


def preload() -> None:
    """Import what children need, with one thread for torch."""
    import torch

    torch.set_num_threads(1)
    import lavender

    for module in pkgutil.walk_packages(lavender.__path__, "lavender."):
        if not module.name.endswith("__main__"):  # which runs the command line
            importlib.import_module(module.name)
    from lavender.words import content_words

    content_words("a dog", ("noun",))
