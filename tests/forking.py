"""Verbs of the command line as processes that can be killed, forked from one that has imported everything.

A start of its own costs a verb ten seconds of imports. The parent of all is a process that computes nothing itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Forked:
    """A running verb, with what `subprocess.Popen` has for it."""

    def __init__(self, parent: Parent, pid: int) -> None:
        self.pid = pid
        self._parent = parent
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._parent.ask(ended=self.pid)
        return self._code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 600) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"process {self.pid} still runs after {timeout:.0f} s")
            time.sleep(0.02)
        return code


class Parent:
    """Asks the process that forks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *arguments: object, out: Path, err: Path) -> Forked:
        """`lavender ARGUMENTS`; what it writes is appended to the files, which may be one."""
        words = [str(argument) for argument in arguments]
        return Forked(self, self.ask(arguments=words, out=str(out), err=str(err)))


@contextlib.contextmanager
def parent_of_verbs() -> Iterator[Parent]:
    """Start the process that forks; at the end, it ends."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Parent(process)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    """Answer questions, a JSON object a line, until there are no more."""
    import lavender

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed here is no answer
    for module in pkgutil.walk_packages(lavender.__path__, "lavender."):
        if not module.name.endswith("__main__"):  # which runs the command line
            importlib.import_module(module.name)
    gc.freeze()  # a garbage collection in a child would copy all of it
    for line in sys.stdin:
        question = json.loads(line)
        if "ended" in question:
            done, status = os.waitpid(question["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        else:
            answer = os.fork()
            if not answer:
                answers.close()
                sys.exit(_run(question))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(question: dict[str, Any]) -> int:
    """The verb, in the child."""
    from lavender.cli import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(question[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    return main(question["arguments"])


if __name__ == "__main__":
    _serve()
