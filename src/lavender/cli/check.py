"""`lavender check`: will alignment pay? The figures on stdout, the verdict with its reasons on stderr."""

from __future__ import annotations

import argparse
import os

from lavender.cli.options import add_columns, add_limit, add_maps, add_trust_remote_code, columns_of
from lavender.cli.output import fact_lines, note, report
from lavender.cli.placement import add_batch_size, add_placement, placement_of
from lavender.cli.stopping import DONE
from lavender.files import data_path

HELP = "tell, before training, whether alignment will pay for a model"
DESCRIPTION = """Tell before training whether alignment will pay for a model, data and maps. Known words are predicted
from the whole picture and from parts of it. For new words, a linear reader learns them from the model's image features.
Prints the figures, as JSON with --json or in a pipe, and the verdict on stderr."""
SAID = {
    "pays": "Alignment will pay.",
    "no gain": "Alignment will gain nothing.",
    "cannot say": "This check cannot say whether alignment will pay.",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=os.path.expanduser, help="model folder, hub id, or run folder")
    parser.add_argument("--data", type=data_path, required=True, help="folder or file of pictures and texts")
    add_maps(parser, "one or more map stores of this data", required=True)
    parser.add_argument(
        "--attributes",
        choices=("own", "noun"),
        default="own",
        help="the map of an adjective, as the run will have it (default: %(default)s)",
    )
    add_columns(parser)
    add_limit(parser)
    add_placement(parser)
    add_batch_size(parser)
    add_trust_remote_code(parser)


def run(options: argparse.Namespace) -> int:
    from lavender.evaluation.check import check_model

    result = check_model(
        options.model,
        options.data,
        options.maps,
        options.limit,
        options.attributes,
        options.trust_remote_code,
        columns_of(options),
        placement_of(options),
    )
    figures = {name: value for name, value in result.items() if name not in ("verdict", "reasons")}
    report(options, result, fact_lines(figures), piped=True)
    for group, reason in result["reasons"].items():
        note(options, f"{group.capitalize()} words: {reason}")
    note(options, SAID[result["verdict"]])
    return DONE
