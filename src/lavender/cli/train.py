"""`lavender train`: fine-tune with the alignment loss."""

from __future__ import annotations

import argparse
import gc

from lavender.cli.stopping import DONE
from lavender.cli.terminal import show
from lavender.files import expanded, writing

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
        help="override a setting of the file; may be repeated",
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

    config = read_run(options.run, options.overrides)
    if options.dry_run:
        from lavender.evaluation.dry_run import dry_run

        for line in dry_run(config, options.restart):
            if PartialState().is_main_process:
                show(line)
    else:
        with writing(config.out):
            folder = train(config, options.restart)
        if PartialState().is_main_process:
            print(f"run folder: {folder}")
    # A process group's threads must end before Python does; models in reference cycles would keep them alive.
    gc.collect()
    PartialState().destroy_process_group()
    return DONE
