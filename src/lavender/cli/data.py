"""`lavender data`: prepare the paper's data sets, inspect a data set, find its overlap with benchmarks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

from lavender.cli.options import add_columns, add_maps, add_trust_remote_code, columns_of
from lavender.cli.output import as_json, fact_lines, note, progress, report
from lavender.cli.stopping import DONE, FAILED
from lavender.cli.terminal import table, width_of
from lavender.files import data_path, expanded, writing

HELP = "prepare the paper's data sets, inspect data, find overlap with benchmarks"
DESCRIPTION = "Prepare, inspect and compare data sets of pictures and texts. docs/data.md describes each action."
SHOWN = 10  # dropped or broken rows on the terminal; the files list all
SETS = ("flickr30k", "laion50k", "rlaif-v", "ocrvqa30k", "paper")


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    for name, add, text in (
        ("prepare", _add_prepare, "write a data set of the paper as train.jsonl and test.jsonl"),
        ("inspect", _add_inspect, "count what is in a data set, and name what is broken"),
        ("overlap", _add_overlap, "find the pictures and texts of benchmarks in a training set"),
    ):
        add(actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}."))


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "set", choices=SETS, help="the data set; `paper` is the mixture of rlaif-v, flickr30k and ocrvqa30k"
    )
    parser.add_argument(
        "--source",
        type=expanded,
        required=True,
        metavar="PATH",
        help="the published files; of `paper` a folder with a folder or link named as each data set",
    )
    parser.add_argument("--out", type=expanded, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--captions",
        choices=("one", "all"),
        default="one",
        help="of flickr30k: the first caption of each picture (default), or all",
    )
    parser.add_argument("--prompt", default=None, help="question of captions (default: the authors')")
    parser.add_argument(
        "--test-share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the pictures in test.jsonl (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the split (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="fail if the number found is not the paper's")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=data_path, metavar="DATA", help="folder, file or hub id of pictures and texts")
    add_columns(parser)
    add_maps(parser, "one or more map stores: the share with maps")
    parser.add_argument(
        "--student",
        type=os.path.expanduser,
        default=None,
        metavar="MODEL",
        help="model folder or hub id: tokens per sample, against its context",
    )
    parser.add_argument(
        "--teacher",
        type=os.path.expanduser,
        default=None,
        metavar="MODEL",
        help="folder or hub id whose tokenizer counts CLIP's tokens; `world` is the built-in teacher (default: count "
        "the fewest tokens that CLIP can need)",
    )
    parser.add_argument("--html", type=expanded, default=None, metavar="FILE", help="also write an HTML page")
    add_trust_remote_code(parser)


def _add_overlap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("train", type=data_path, metavar="TRAIN", help="the training data")
    parser.add_argument("benchmarks", type=data_path, nargs="+", metavar="BENCHMARK", help="one or more benchmarks")
    add_columns(parser)
    add_columns(parser, "--benchmark-columns", "the same of the benchmarks")
    parser.add_argument(
        "--out",
        type=expanded,
        default=None,
        metavar="DIR",
        help="write overlap.json with all matches, overlap.png and overlap.html to this folder",
    )
    parser.add_argument(
        "--distance",
        type=int,
        default=48,
        metavar="BITS",
        help="pictures are near if at most so many of 256 bits of their hashes differ (default: %(default)s)",
    )
    parser.add_argument(
        "--similarity",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="texts are near if at least this share of their word triples is common (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    return {"prepare": _prepare, "inspect": _inspect, "overlap": _overlap}[options.action](options)


def _prepare(options: argparse.Namespace) -> int:
    from lavender.data.recipes import Settings, prepare

    settings = Settings(options.captions, options.test_share, options.seed, options.prompt)
    with writing(options.out), progress(options, unit="row", desc="rows") as bar:
        prepared = prepare(options.set, options.source, options.out, settings, options.strict, bar.update)
    lines = []
    for name, found in prepared["sets"].items():
        lines += [_found_line(name, found), *_first("dropped", found["dropped"], "prepared.json")]
    lines.append(
        f"{prepared['train']:,} samples in {options.out / 'train.jsonl'}, {prepared['test']:,} in test.jsonl; "
        "prepared.json has the counts"
    )
    report(options, prepared, end=lines)
    return DONE


def _found_line(name: str, found: dict[str, Any]) -> str:
    difference = found["found"] - found["expected"]
    compared = f", {abs(difference):,} {'more' if difference > 0 else 'fewer'} than the paper" if difference else ""
    line = f"{name}: {found['found']:,} of {found['expected']:,} {found['counted']}{compared}; "
    line += f"{found['train']:,} samples for training, {found['test']:,} for testing; {len(found['dropped']):,} dropped"
    if found["other_captions"]:
        line += f"; {found['other_captions']:,} further captions left out, as --captions one says"
    return line


def _first(what: str, rows: list[dict[str, str]], where: str) -> Iterator[str]:
    for row in rows[:SHOWN]:
        yield f"  {what} {row['what']}: {row['reason']}"
    if len(rows) > SHOWN:
        yield f"  … and {len(rows) - SHOWN:,} more; {where} lists all"


def _inspect(options: argparse.Namespace) -> int:
    from lavender.evaluation.data_checks.inspect import inspect_data
    from lavender.evaluation.data_checks.pages import inspection_page
    from lavender.evaluation.report.page import write_report
    from lavender.world import TEACHER_NAME, TEACHER_PATH

    teacher = str(TEACHER_PATH) if options.teacher == TEACHER_NAME else options.teacher
    inspection = inspect_data(
        options.data,
        options.maps,
        options.student,
        teacher,
        trust_remote_code=options.trust_remote_code,
        columns=columns_of(options),
    )
    facts = inspection.facts
    report(options, facts, fact_lines(facts), piped=True)  # before a full disk could cost it
    if options.html is not None:
        with writing(options.html):
            options.html.parent.mkdir(parents=True, exist_ok=True)
            write_report(inspection_page(inspection), options.html)
    broken = facts["broken"]
    for line in _first("broken", broken, "--json"):
        note(options, line)
    note(options, f"{facts['samples']:,} samples; {len(broken):,} rows or pictures are broken")
    return FAILED if broken else DONE


def _overlap(options: argparse.Namespace) -> int:
    from lavender.evaluation.data_checks.overlap import Thresholds, find_overlap
    from lavender.evaluation.data_checks.pages import write_overlap

    thresholds = Thresholds(options.distance, options.similarity)
    overlap = find_overlap(
        options.train,
        options.benchmarks,
        thresholds,
        columns_of(options),
        columns_of(options, "--benchmark-columns"),
    )
    report(options, overlap.facts(), table(overlap.rows(), width_of()), piped=True)  # before a full disk could cost it
    if options.out is not None:
        with writing(options.out):
            write_overlap(overlap, options.out)
    for side in (overlap.train, *(one.side for one in overlap.benchmarks)):
        for line in _first(f"{side.path}: dropped", side.numbers["dropped"], "--json"):
            note(options, line)
    if as_json(options, piped=True):
        for line in table(overlap.rows(), width_of(sys.stderr)):
            note(options, line)
    return DONE
