"""`lavender export`: the tuned model of a run as an ordinary checkpoint."""

from __future__ import annotations

import argparse

from lavender.cli.options import add_trust_remote_code
from lavender.cli.output import report
from lavender.cli.stopping import DONE
from lavender.errors import ConfigError, FileError
from lavender.files import expanded, writing

HELP = "write a run's tuned model as an ordinary checkpoint, LoRA merged"
DESCRIPTION = """Write the tuned model and its processor as a Transformers checkpoint.
Loading it does not require Lavender. LoRA weights are merged into the model. README.md is its model card, with the
scores that `lavender eval` has found. --push uploads the folder to a hub."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=expanded, help="run folder, as `lavender train` writes it")
    parser.add_argument("--out", type=expanded, required=True, metavar="DIR", help="new folder of the checkpoint")
    parser.add_argument("--adapter", action="store_true", help="write LoRA as an adapter apart, without its base")
    parser.add_argument("--push", metavar="NAME/REPOSITORY", help="then upload the folder to this model repository")
    parser.add_argument("--public", action="store_true", help="make a new repository public; it is private otherwise")
    add_trust_remote_code(parser)


def run(options: argparse.Namespace) -> int:
    from lavender.data.hub import make_repository
    from lavender.training.exporting import check_export, export_run, push

    if options.public and options.push is None:
        raise ConfigError("--public without --push", "both, or neither", "name the repository with --push")
    if options.push is not None:  # before the export, which takes time
        check_export(options.run, options.out, not options.adapter)
        make_repository(options.push, "model", not options.public)
    with writing(options.out):
        folder = export_run(options.run, options.out, options.trust_remote_code, not options.adapter, options.push)
    facts, lines = {"model": str(folder)}, [f"model: {folder}"]
    if options.push is not None:
        try:
            facts["commit"] = push(folder, options.push, private=not options.public)
        except FileError as error:
            do = f"upload it later: hf upload {options.push} {folder}"
            raise FileError(f"{error.got}; the folder {folder} is complete", error.expected, do) from error
        lines.append(f"uploaded to {facts['commit']}")
    report(options, facts, end=lines)
    return DONE
