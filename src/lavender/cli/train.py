"""`lavender train`: fine-tune with the alignment loss."""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

from lavender.cli.output import own_lines, report
from lavender.cli.stopping import DONE
from lavender.errors import DataError
from lavender.files import expanded, read_whole, writing

HELP = "fine-tune a model with the alignment loss"
DESCRIPTION = """Fine-tune as a YAML file says. A run that was stopped continues from its last checkpoint.
For several GPUs: accelerate launch -m lavender.cli train RUN."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=expanded, help="YAML file with model, data, maps, out and other settings, or a run's config.yaml"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a setting of the file, such as learning_rate=1e-4 or lora.r=16; may be repeated",
    )
    parser.add_argument(
        "--restart", action="store_true", help="delete the run in the output folder and start from the beginning"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings and data, and print what would train on what, without loading weights or writing",
    )


def run(options: argparse.Namespace) -> int:
    from accelerate import PartialState

    from lavender.training.run import read_run, train

    hushed = ["disable_tqdm=true"] if options.quiet else []
    config = read_run(options.run, [*options.overrides, *hushed])
    if options.dry_run:
        from lavender.evaluation.dry_run import dry_run

        lines = list(dry_run(config, options.restart))
        if PartialState().is_main_process:
            report(options, {"lines": lines}, lines)
    else:
        with writing(config.out), own_lines(options):
            folder = train(config, options.restart)
        if PartialState().is_main_process:
            facts = _facts(folder)
            report(options, facts, end=[_summary(facts), f"run folder: {folder}"])
    # A process group's threads must end before Python does; models in reference cycles would keep them alive.
    gc.collect()
    PartialState().destroy_process_group()
    return DONE


def _facts(folder: Path) -> dict[str, Any]:
    """The run folder, the last of each number that training logged, and the coverage.

    Raises:
        DataError: a file of a run that was finished before is damaged.
    """
    from lavender.students.loading import goes_on
    from lavender.training.run_folder import CHECKPOINT, COVERAGE, METRICS

    last: dict[str, Any] = {}
    name = METRICS
    try:
        for line in (folder / METRICS).read_text().splitlines():
            last |= json.loads(line)
        name = COVERAGE
        return {"run": str(folder), "metrics": last, "coverage": dict(json.loads(read_whole(folder / COVERAGE)))}
    except (ValueError, TypeError) as error:
        do = f"delete {COVERAGE}, and give the command again: the run goes on from its last checkpoint"
        if not goes_on(folder):
            do = f"put back a copy of {name}; the model is in {folder / CHECKPOINT}. Do not delete {COVERAGE}: without "
            do += "a checkpoint of the trainer the run would begin anew"
        raise DataError(f"{folder / name}, which is damaged ({error})", "what `lavender train` wrote", do) from error


def _summary(facts: dict[str, Any]) -> str:
    metrics = facts["metrics"]
    names = ("train_loss", "vlm_loss", "attention_loss", "attention_mass", "probe_attention_mass", "eval_loss")
    numbers = (f", {name} {metrics[name]:.4g}" for name in names if metrics.get(name) is not None)
    return f"trained {metrics.get('step', 0)} steps{''.join(numbers)}"
