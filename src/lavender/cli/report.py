"""`lavender report`: one HTML page about a run."""

from __future__ import annotations

import argparse

from lavender.cli import output
from lavender.cli.options import add_columns, add_maps, add_trust_remote_code, columns_of
from lavender.cli.placement import COMPARED, DTYPES, add_batch_size, add_placement, placement_of
from lavender.cli.stopping import DONE
from lavender.errors import ConfigError
from lavender.files import data_path, expanded, prepare_place, writing

HELP = "write an HTML page about a run"
DESCRIPTION = """Write one self-contained HTML page about a run, its base model and other runs: the differences of their
scores with intervals, the best, typical and worst pictures with the maps of each word, the curves of training,
settings, and commands. It shows the scores of RUN/eval.json, and makes them as `lavender eval` does if there are none
or if the options ask for others."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=expanded, help="run folder, as `lavender train` writes it")
    parser.add_argument(
        "--against",
        type=expanded,
        action="append",
        default=None,
        metavar="RUN",
        help="another run folder or checkpoint to compare with; may be repeated (default: those of RUN/eval.json)",
    )
    parser.add_argument(
        "--data", type=data_path, default=None, help="held-out data (default: that of RUN/eval.json, else of training)"
    )
    add_maps(parser, "one or more map stores of this data")
    add_columns(parser)
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="score N samples (default: 64)")
    parser.add_argument("--pictures", type=int, default=12, metavar="N", help="show N pictures (default: %(default)s)")
    parser.add_argument(
        "--by",
        default="answer_nll",
        metavar="SCORE",
        help="the score that says which pictures are best and worst: answer_nll, content_f1 or map_agreement "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=expanded, default=None, metavar="FILE", help="the page (default: RUN/report.html)"
    )
    parser.add_argument("--pdf", type=expanded, default=None, metavar="FILE", help="also write the figures as a PDF")
    add_placement(parser, COMPARED, ("auto", *DTYPES))
    add_batch_size(parser)
    add_trust_remote_code(parser)


def run(options: argparse.Namespace) -> int:
    from lavender.evaluation.run_report import Options, report_run
    from lavender.world import TEACHER_NOTES

    asked = Options(
        against=None if options.against is None else tuple(options.against),
        data=options.data,
        maps=options.maps,
        limit=options.limit,
        columns=columns_of(options),
        num_pictures=options.pictures,
        by=options.by,
        place=placement_of(options, on_gpu="auto"),
        same_dtype=options.dtype is not None,
    )
    if options.pdf is not None and options.pdf == options.out:
        raise ConfigError(f"{options.out} for --out and for --pdf", "two files", "give one of them another name")
    for place in filter(None, (options.out, options.pdf)):
        prepare_place(place)
    with writing(options.out or options.run):
        page = report_run(options.run, options.out, asked, options.trust_remote_code, TEACHER_NOTES, options.pdf)
    lines = [f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)"]
    lines += [] if options.pdf is None else [f"figures: {options.pdf}"]
    facts = {"report": str(page), "figures": None if options.pdf is None else str(options.pdf)}
    output.report(options, facts, end=lines)
    return DONE
