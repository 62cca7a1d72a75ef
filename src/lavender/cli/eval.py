"""`lavender eval`: a run, its base model and other runs on the same samples, as a table."""

from __future__ import annotations

import argparse
from typing import Any

from lavender.cli.options import add_columns, add_limit, add_maps, add_trust_remote_code, columns_of
from lavender.cli.stopping import DONE
from lavender.cli.terminal import show
from lavender.files import data_path, expanded, writing

HELP = "compare a run with its base model and with other runs"
DESCRIPTION = """Score a run, its base model and other runs on the same samples.
The scores are printed and written to RUN/eval.json."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=expanded, help="run folder, as `lavender train` writes it")
    parser.add_argument(
        "--against",
        type=expanded,
        action="append",
        default=[],
        metavar="RUN",
        help="another run folder or checkpoint to compare with; may be repeated",
    )
    parser.add_argument("--data", type=data_path, default=None, help="held-out data (default: the training data)")
    add_maps(parser, "one or more map stores of this data (default: the run's, if --data is not given)")
    add_columns(parser)
    add_limit(parser)
    add_trust_remote_code(parser)


def run(options: argparse.Namespace) -> int:
    from lavender.evaluation.runs import evaluate_runs

    with writing(options.run):
        result = evaluate_runs(
            options.run,
            options.against,
            options.data,
            options.maps,
            options.limit,
            options.trust_remote_code,
            columns_of(options),
        )
    show(f"{result['samples']} samples of {result['data']}")
    print("\n".join(_table(result["arms"])))
    for note in result["notes"]:
        show(f"note: {note}")
    return DONE


def _table(arms: dict[str, dict[str, Any]]) -> list[str]:
    """A line with the names of the scores, then a line per model."""
    names = list(next(iter(arms.values())))
    widths = [max(len(arm) for arm in (*arms, "model")), *(max(len(name), 10) for name in names)]
    rows = [["model", *names]]
    for arm, scores in arms.items():
        rows.append([arm, *("–" if scores[name] is None else f"{scores[name]:.4f}" for name in names)])
    row_format = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    return [row_format.format(*row) for row in rows]
