"""`lavender export`: the tuned model of a run as an ordinary checkpoint."""

from __future__ import annotations

import argparse

from lavender.cli.options import add_trust_remote_code
from lavender.cli.stopping import DONE
from lavender.cli.terminal import show
from lavender.files import expanded, writing

HELP = "write a run's tuned model as an ordinary checkpoint, LoRA merged"
DESCRIPTION = """Write the tuned model and its processor as a Transformers checkpoint.
Loading it does not require Lavender. LoRA weights are merged into the model."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=expanded, help="run folder, as `lavender train` writes it")
    parser.add_argument("--out", type=expanded, required=True, metavar="DIR", help="new folder of the checkpoint")
    add_trust_remote_code(parser)


def run(options: argparse.Namespace) -> int:
    from lavender.training.run import export_run

    with writing(options.out):
        folder = export_run(options.run, options.out, options.trust_remote_code)
    show(f"model: {folder}")
    return DONE
