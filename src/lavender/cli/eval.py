"""`lavender eval`: a run, its base model and other runs on the same samples, as a table."""

from __future__ import annotations

import argparse
from typing import Any

from lavender.cli import eval_tasks
from lavender.cli.options import add_columns, add_maps, add_trust_remote_code, columns_of
from lavender.cli.output import report
from lavender.cli.placement import COMPARED, DTYPES, add_batch_size, add_placement, placement_of
from lavender.cli.stopping import DONE
from lavender.cli.terminal import table, width_of
from lavender.errors import ConfigError
from lavender.files import data_path, expanded, writing

LIMIT = 64
HELP = "compare a run with its base model and with other runs"
DESCRIPTION = """Score a run, its base model and other runs on the same samples.
The scores are printed and written to RUN/eval.json; RUN/eval.jsonl has the answers and scores of each sample.
With --tasks, benchmarks are run through lmms-eval; the result goes to RUN/eval-tasks.json."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=expanded, nargs="?", help="run folder, as `lavender train` writes it")
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
    parser.add_argument(
        "--limit",
        type=int,
        default=None,
        metavar="N",
        help=f"look at N samples, spread evenly over the data (default: {LIMIT}); of --tasks the first N of each "
        "(default: all)",
    )
    add_placement(parser, f"type of the weights ({COMPARED}; with --tasks auto)", ("auto", *DTYPES))
    add_batch_size(parser, "samples per forward pass (default: 16; with --tasks 1; not for tasks of options)")
    add_trust_remote_code(parser)
    eval_tasks.add_options(parser)


def run(options: argparse.Namespace) -> int:
    if options.tasks is not None:
        return eval_tasks.run(options)
    eval_tasks.refuse_without_tasks(options)
    if options.run is None:
        do = "name the folder that `lavender train` wrote"
        do += ", and put it before --maps, which takes every word up to the next option" if options.maps else ""
        raise ConfigError("no run folder", "one, or --model with --tasks", do)
    from lavender.evaluation.runs import evaluate_runs
    from lavender.evaluation.score_help import explained

    place = placement_of(options, on_gpu="auto")
    with writing(options.run):
        result = evaluate_runs(
            options.run,
            options.against,
            options.data,
            options.maps,
            LIMIT if options.limit is None else options.limit,
            options.trust_remote_code,
            columns_of(options),
            place,
        )
    samples = f"{result['samples']} sample{'s' * (result['samples'] != 1)}"
    head = f"{samples} of {result['data']}; {result['dtype']} on {result['device']}"
    ends = [*explained(next(iter(result["arms"].values()))), *(f"note: {note}" for note in result["notes"])]
    ends.append(f"written: {options.run / 'eval.json'}, eval.jsonl")
    report(options, result, [head, *_table(result["arms"], result["teacher"], width_of())], ends)
    return DONE


def _table(
    arms: dict[str, dict[str, Any]], teacher: dict[str, Any] | None = None, width: int | None = None
) -> list[str]:
    """A line with the names of the scores, then a line per model, and one for the teacher's maps if there are any."""
    names = list(next(iter(arms.values())))
    if teacher is not None:
        arms = arms | {"teacher's maps": {name: teacher.get(name) for name in names}}
    rows = [["model", *names]]
    for arm, scores in arms.items():
        rows.append([arm, *("–" if scores[name] is None else f"{scores[name]:.4f}" for name in names)])
    return table(rows, width)
