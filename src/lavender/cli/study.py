"""`lavender study`: an experiment on the built-in world, repeated over seeds."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lavender.cli.options import Several
from lavender.cli.output import note, report
from lavender.cli.stopping import DONE
from lavender.errors import ConfigError
from lavender.files import expanded, writing

HELP = "run a controlled experiment on the built-in world, over seeds"
DESCRIPTION = """Train and score students on the built-in world, and judge the result over seeds.
Writes DIR/NAME/page.md, results.json and plot.png. A study that was stopped continues.
Prints page.md, or results.json with --json."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="the study; --list shows them all")
    parser.add_argument("--list", action="store_true", help="print every study with its question and what it costs")
    parser.add_argument(
        "--out",
        type=expanded,
        default=Path("lavender-studies"),
        metavar="DIR",
        help="folder of all studies (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="try the study in minutes: fewer arms, seeds and steps, development scenes; its scores are no result",
    )
    parser.add_argument(
        "--seeds", type=int, action=Several, default=None, help="default: those of the study, three or five"
    )
    parser.add_argument(
        "--split",
        choices=("development", "sealed"),
        default=None,
        help="scenes that students are scored on (default: sealed; with --quick: development)",
    )
    parser.add_argument(
        "--jobs", type=int, default=None, metavar="N", help="run N trainings in parallel (default: one per core)"
    )


def run(options: argparse.Namespace) -> int:
    from lavender.world.studies.cost import facts_of, listed
    from lavender.world.studies.registry import STUDIES, Scale, run_study

    if options.list:
        report(options, facts_of(STUDIES), listed(STUDIES).splitlines())
        return DONE
    if options.name is None:
        raise ConfigError("no study", f"one of {', '.join(STUDIES)}", "see what each costs: lavender study --list")
    seeds = tuple(options.seeds) if options.seeds else None
    scale = Scale.of(options.quick, options.split, seeds)
    jobs = (os.cpu_count() or 1) if options.jobs is None else options.jobs
    with writing(options.out):
        results = run_study(options.name, options.out, scale, jobs, _command(options))
    folder = options.out / options.name
    report(options, results, [] if options.json else (folder / "page.md").read_text().splitlines())
    note(options, f"written: {folder / 'page.md'}, results.json, plot.png")
    return DONE


def _command(options: argparse.Namespace) -> str:
    """The command that repeats this study, as its page prints it."""
    words = ["lavender", "study", options.name]
    words += ["--quick"] if options.quick else []
    words += ["--seeds", *map(str, options.seeds)] if options.seeds else []
    words += ["--split", options.split] if options.split else []
    return " ".join(words)
