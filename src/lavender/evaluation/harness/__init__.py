"""Benchmarks through lmms-eval: the paper's, the built-in world's and any other of its tasks, with one command.

    Table of the paper's benchmarks, and groups of names     benchmarks
    A checkpoint as a model of lmms-eval                     models, plugin
    Running base and tuned models, and comparing them        running, comparing
    Answers on disk, so that a stopped run goes on           answer_log
    Tables, and VLMEvalKit's settings                        tables
    Tasks of ours                                            tasks/

Only `models` and `tasks/` import lmms-eval at their top. It is installed without its own dependencies, see
docs/benchmarks.md.
"""

from __future__ import annotations

from pathlib import Path

TASKS_PATH = Path(__file__).parent / "tasks"
"""Folder of our tasks: `lmms-eval --include_path`. `lavender eval --tasks` looks here first."""


def file_name(name: str) -> str:
    """A name of an arm or a task as the name of a file."""
    return "".join(letter if letter.isalnum() or letter in "-_. " else "_" for letter in name)
