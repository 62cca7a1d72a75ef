"""`lavender report`: one HTML page about a run."""

from __future__ import annotations

import argparse

from lavender.cli.options import add_trust_remote_code
from lavender.cli.stopping import DONE
from lavender.cli.terminal import show
from lavender.files import expanded, writing

HELP = "write an HTML page about a run"
DESCRIPTION = """Write one self-contained HTML page: losses, maps and answers on pictures, and settings.
It also shows the scores if `lavender eval` was run before."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=expanded, help="run folder, as `lavender train` writes it")
    parser.add_argument(
        "--out", type=expanded, default=None, metavar="FILE", help="the page (default: RUN/report.html)"
    )
    add_trust_remote_code(parser)


def run(options: argparse.Namespace) -> int:
    from lavender.evaluation.runs import report_run
    from lavender.world import TEACHER_NOTES

    with writing(options.out or options.run):
        page = report_run(options.run, options.out, options.trust_remote_code, TEACHER_NOTES)
    show(f"report: {page}")
    return DONE
