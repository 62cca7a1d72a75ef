"""Running verbs of the command line in this process, and what tests of them share."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml

from lavender.cli import main
from lavender.world import STUDENT_PATH
from lavender.world.scenes import Scene


@dataclass(frozen=True)
class Ran:
    """What a call of the command line gave."""

    code: int
    out: str
    err: str


def lavender(*arguments: object) -> Ran:
    """Run a verb in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's way out
            code = end.code
    return Ran(cast(int, code), out.getvalue(), err.getvalue())


def complaint(ran: Ran, code: int) -> str:
    """The one line on stderr, in its three parts, with the given exit code."""
    assert ran.code == code, ran
    assert "Traceback" not in ran.err
    line = next(line for line in ran.err.splitlines() if line.startswith("lavender "))
    got, expected, do = line.find("Got "), line.find(" Expected "), line.find(" Do this: ")
    assert 0 <= got < expected < do, line
    return line


def write_metadata(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_scenes(folder: Path, scenes: Sequence[Scene], captions: Sequence[str]) -> Path:
    """Scenes as PNG files with their captions, in the layout of `datasets`' imagefolder."""
    for index, scene in enumerate(scenes):
        scene.image.save(folder / f"{index}.png")
    write_metadata(folder, [{"file_name": f"{index}.png", "text": text} for index, text in enumerate(captions)])
    return folder


def write_run(folder: Path, **settings: object) -> Path:
    """A run's YAML file, of the built-in student on the CPU; unless set, its `data` and `maps` are not there."""
    path = folder / "run.yaml"
    ours = {
        "model": str(STUDENT_PATH),
        "data": str(folder / "data"),
        "maps": str(folder / "maps"),
        "out": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
    }
    path.write_text(yaml.safe_dump(ours | settings))
    return path
