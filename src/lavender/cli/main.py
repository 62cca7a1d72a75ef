"""The parser of the command line, and how each call ends. `--help` imports no torch: verbs import it in `run`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from lavender.cli import check, data, demo, env, eval, export, extract, inspect, look, report, store, study, train
from lavender.cli.output import add_output_options
from lavender.cli.parser import Parser, Version, complete
from lavender.cli.quiet import bars, debugging, libraries_logged
from lavender.cli.stopping import DONE, FAILED, WRONG_USAGE, Stopped, signals_stop, unexpected
from lavender.cli.terminal import show
from lavender.errors import ConfigError, LavenderError
from lavender.files import file_error

__all__ = ["DONE", "FAILED", "VERBS", "WRONG_USAGE", "build_parser", "main"]

_MODULES: dict[str, ModuleType] = {
    "demo": demo,
    "data": data,
    "extract": extract,
    "check": check,
    "train": train,
    "eval": eval,
    "study": study,
    "report": report,
    "export": export,
    "inspect": inspect,
    "look": look,
    "store": store,
    "env": env,
}
VERBS: dict[str, Callable[[argparse.Namespace], int]] = {verb: module.run for verb, module in _MODULES.items()}
"""The call of each verb: parsed options → exit code."""


def build_parser() -> Parser:
    """The parser of all verbs. Each module of a verb has its options and its texts."""
    parser = Parser(
        prog="lavender",
        description="Fine-tune a vision-language model whose attention learns from the word maps of a diffusion "
        "model (Diffusion Instruction Tuning).",
        epilog="`lavender VERB --help` lists the options of a verb.",
    )
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    for verb, module in _MODULES.items():
        module.add_options(verbs.add_parser(verb, help=module.HELP, description=module.DESCRIPTION))
    for leaf in parser.leaves():
        add_output_options(leaf)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        arguments: the words after `lavender`; by default those of the process.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage or settings, 130 or 143 stopped by a signal.
    """
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        complete(parser)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with signals_stop(), libraries_logged(options.verbose), bars(not options.quiet):
            return _run(options)
    except Stopped as stop:
        print("\nstopped; what is complete is kept", file=sys.stderr)
        return stop.exit_code


def _run(options: argparse.Namespace) -> int:
    """The verb's exit code. An error is printed as one message on stderr."""
    try:
        return VERBS[options.verb](options)
    except BrokenPipeError:  # the reader of the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except LavenderError as error:
        failure = error
    except OSError as error:
        failure = file_error(error, getattr(options, "out", None))
    except Exception as error:
        if debugging():
            raise
        failure = unexpected(error)
    show(f"lavender {options.verb}: {failure}", sys.stderr, f"lavender {options.verb}:")
    return WRONG_USAGE if isinstance(failure, ConfigError) else FAILED
