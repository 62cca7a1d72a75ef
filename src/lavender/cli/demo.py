"""`lavender demo`: new words from few captions, on the built-in world."""

from __future__ import annotations

import argparse
from pathlib import Path

from lavender.cli.output import own_lines, report
from lavender.cli.stopping import DONE
from lavender.files import expanded, writing

HELP = "teach a small model new words with and without alignment, in minutes on a CPU"
DESCRIPTION = """Teach a small model new words from few captions: extract maps, fine-tune with and without
alignment, and compare. Everything is included: scenes, a diffusion teacher and a student. The result is
DIR/report.html."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=expanded,
        default=Path("lavender-demo"),
        metavar="DIR",
        help="folder of the results (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    from lavender.world.demo import run_demo

    with writing(options.out), own_lines(options):
        results = run_demo(options.out)
    report(options, results)
    return DONE
